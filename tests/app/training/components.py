"""Data and model of a run, without training."""

from snella_app.device import choose_device
from snella_app.training.build import build, load


def build_components(config):
    """Load the data and build the model."""
    data = load(config.data, config.optim, config.run)
    return build(config.model, config.method, data, choose_device(config.run.device))
