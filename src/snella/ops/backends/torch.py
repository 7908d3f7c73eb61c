"""The backend of plain torch operations, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from snella.ops.backends.base import Merged
from snella.ops.kernels import MergeGradients
from snella.ops.sparsify import sparsify, sparsify_slope
from snella.ops.spec import GroupFactors, Update


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
