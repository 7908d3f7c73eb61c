"""Data and model of a run without training, and interrupted runs."""

import os
import signal
from contextlib import contextmanager
from unittest import mock

from snella_app.device import choose_device
from snella_app.training import session
from snella_app.training.build import build, load
from snella_app.training.trainer import SnellaTrainer


def build_components(config):
    """Load the data and build the model."""
    data = load(config.data, config.optim, config.run)
    return build(config.model, config.method, data, choose_device(config.run.device))


@contextmanager
def interrupt_before(step, presses=1, number=signal.SIGINT, repeat_s=None):
    """Send a signal before a training step, counted from 0; the second press stops the run without a checkpoint."""
    original = SnellaTrainer.training_step
    if repeat_s is None:
        repeat_s = 0.0 if presses > 1 else session._MIN_REPEAT_S

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step and trainer._micro_step == 0:
            for _ in range(presses):
                os.kill(os.getpid(), number)
        return original(trainer, *args, **kwargs)

    with (
        mock.patch.object(SnellaTrainer, "training_step", training_step),
        mock.patch.object(session, "_MIN_REPEAT_S", repeat_s),
    ):
        yield
