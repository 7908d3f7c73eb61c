"""What merging into quantised weights loses, measured and said once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeLoss:
    """What one layer's weight lost when it was quantised again after an update had been added.

        relative = ‖Q(W + U) - (W + U)‖ / ‖U‖            (Frobenius norms; W dequantised, U the update)

    Args:
        module_name: Name of the layer.
        quantization: How its weight is stored.
        lost: `‖Q(W + U) - (W + U)‖`.
        update: `‖U‖`.
    """

    module_name: str
    quantization: str
    lost: float
    update: float

    @property
    def relative(self) -> float:
        """0: the update is there in full; 1: what is wrong is as large as the update itself."""
        if self.update:
            return self.lost / self.update
        return math.inf if self.lost else 0.0


def measure_loss(module_name: str, quantization: str, before: Tensor, wanted: Tensor, after: Tensor) -> MergeLoss:
    """Compare the weight before merging, the sum as it should be, and what is stored of it, all dequantised."""
    lost, update = (
        float(torch.linalg.vector_norm(a.float() - wanted.float(), dtype=torch.float64)) for a in (after, before)
    )
    return MergeLoss(module_name, quantization, lost, update)


_collected: ContextVar[list[MergeLoss] | None] = ContextVar("losses of the merge under way", default=None)


def report(loss: MergeLoss) -> None:
    """Warn of a loss, or leave that to the `one_warning` that this happens in."""
    collected = _collected.get()
    if collected is None:
        _warn([loss])
    else:
        collected.append(loss)


@contextmanager
def one_warning() -> Iterator[None]:
    """Gather the losses of all layers that are merged within, and warn once at the end."""
    losses: list[MergeLoss] = []
    token = _collected.set(losses)
    try:
        yield
    finally:
        _collected.reset(token)
    if losses:
        _warn(losses)


def _warn(losses: list[MergeLoss]) -> None:
    """Say what was lost in all, and where most."""
    total = MergeLoss("", "", sum(x.lost**2 for x in losses) ** 0.5, sum(x.update**2 for x in losses) ** 0.5)
    worst = max(losses, key=lambda loss: loss.relative)
    kinds = " and ".join(sorted({loss.quantization for loss in losses}))
    warnings.warn(
        f"merged into {len(losses)} quantised weight{'s' if len(losses) > 1 else ''} ({kinds}): rounding the sums to "
        f"the few bits again changed them by {total.relative:.1%} of the update's own size (relative Frobenius error; "
        f"{worst.relative:.1%} in {worst.module_name!r}); to lose nothing keep the adapter unmerged, or merge it into "
        "the unquantised model",
        stacklevel=3,
    )


__all__ = ["MergeLoss", "measure_loss", "one_warning", "report"]
