"""Batch normalisation below a frozen backbone: its statistics stay as pre-trained."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_running_statistics(model: nn.Module) -> int:
    """Make every batch normalisation layer normalise with its stored statistics, in training too.

    Otherwise "frozen" layers would drift with each batch, and the drift would be missing from the saved adapter.

    Args:
        model: The backbone; changed in place.

    Returns:
        How many layers were frozen.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.register_forward_pre_hook(_use_stored_statistics)
    return len(layers)


def _use_stored_statistics(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook: leave training mode, which `model.train()` set."""
    module.training = False
