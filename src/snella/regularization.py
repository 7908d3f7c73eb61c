"""Dropout and drop-path on the update of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


def update_dropout(layer: SnellaLayer, adapter_name: str) -> float:
    """Return the dropout probability on the update's input in this layer."""
    config, name = layer.snella_config[adapter_name], layer.module_name
    is_excluded = any(name == s or name.endswith(f".{s}") for s in config.dropout_exclude or [])
    return 0.0 if is_excluded else config.update_dropout or 0.0


def is_regularized(layer: SnellaLayer, adapter_name: str) -> bool:
    """Return whether dropout or drop-path acts on this adapter's update, so that it cannot be folded."""
    config = layer.snella_config[adapter_name]
    return bool(config.update_drop_path or (config.update_dropout and update_dropout(layer, adapter_name)))


def add_branches(
    layer: SnellaLayer, y: Tensor, x: Tensor, names: Sequence[str], apply: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """Return `y` plus the regularized updates of these adapters.

    Args:
        layer: The layer.
        y: Output of the layer without these updates.
        x: Input of the layer.
        names: Adapters with dropout or drop-path.
        apply: Applies one adapter's update to an input.
    """
    for name in names:
        dropped = F.dropout(x, update_dropout(layer, name), training=True)
        y = y + drop_path(apply(dropped, name), layer.snella_config[name].update_drop_path or 0.0).to(y.dtype)
    return y


def drop_path(y: Tensor, rate: float) -> Tensor:
    """Drop the update for random samples and rescale the others."""
    if rate == 0:
        return y
    keep = torch.rand((y.shape[0],) + (1,) * (y.ndim - 1), device=y.device) >= rate
    return y * keep.to(y.dtype) / (1 - rate)
