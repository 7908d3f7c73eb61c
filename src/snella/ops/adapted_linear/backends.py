"""The four steps of an update that an implementation may do in its own way, and the plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from snella.ops.kernels import MergeGradients
from snella.ops.sparsify import sparsify, sparsify_slope

from .update import GroupFactors, Update


@dataclass
class Merged:
    """A merged matrix, and what its implementation can use again within the same pass.

    Args:
        delta: `ΔW`, `[rows, n]`.
        extra: Whatever `factor_gradients` of the same backend can use; never kept between passes.
    """

    delta: Tensor
    extra: Any = None


class Backend(Protocol):
    """One way to compute an update; every backend gives the values of `TorchBackend` to within rounding."""

    name: str

    def merge(self, update: Update, group: int, factors: GroupFactors) -> Merged:
        """Merge one matrix, and make sure that its threshold is known."""

    def add_sparse(self, update: Update, group: int, merged: Merged, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`, both `[rows, n]`; they may be the same tensor."""

    def factor_gradients(
        self, update: Update, group: int, factors: GroupFactors, merged: Merged, grad: Tensor
    ) -> MergeGradients:
        """Gradients to the factors and scalars, given `grad` = ∂L/∂W of these rows, `[rows, n]`."""


class TorchBackend:
    """Plain torch operations, on any device and in any dtype."""

    name = "eager"

    def merge(self, update: Update, group: int, factors: GroupFactors) -> Merged:  # noqa: D102
        delta = update.merge(factors)
        update.threshold_of(group, delta)
        return Merged(delta)

    def add_sparse(  # noqa: D102
        self, update: Update, group: int, merged: Merged, base: Tensor, out: Tensor
    ) -> None:
        torch.add(base, update.scaling * sparsify(merged.delta, update.thresholds[group], update.mode), out=out)

    def factor_gradients(  # noqa: D102
        self, update: Update, group: int, factors: GroupFactors, merged: Merged, grad: Tensor
    ) -> MergeGradients:
        slope = sparsify_slope(merged.delta, update.thresholds[group], update.mode)
        return update.kernel.vjp(*factors, slope.mul_(grad.to(slope.dtype)).mul_(update.scaling))
