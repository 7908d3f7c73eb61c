"""The backend of plain torch operations, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from snella.ops.backends.base import Backend, Gradients, Merged, store_gradients, zero_gradients
from snella.ops.sparsify import sparsify, sparsify_slope
from snella.ops.spec import Factors, UpdateSpec


class TorchBackend(Backend):
    """Matrix by matrix, with the kernels of `snella.ops.kernels`."""

    name = "eager"

    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:  # noqa: D102
        return None

    def merge(  # noqa: D102
        self,
        spec: UpdateSpec,
        factors: Factors,
        budgets: tuple[int, ...],
        thresholds: Tensor | None = None,
        delta: tuple[Tensor | None, ...] = (),
    ) -> Merged:
        matrices = zip(spec.matrices(factors), budgets, strict=True)
        delta = delta or tuple([spec.merge_matrix(matrix) if budget else None for matrix, budget in matrices])
        if thresholds is None:
            infinite = factors.B.new_full((), torch.inf)
            pairs = zip(delta, budgets, strict=True)
            thresholds = torch.stack(
                [infinite if one is None else spec.find_threshold(one, budget) for one, budget in pairs]
            )
        return Merged(factors, budgets, thresholds, delta)

    def add_update(self, spec: UpdateSpec, merged: Merged, base: Tensor, out: Tensor) -> None:  # noqa: D102
        for group, (rows, delta) in enumerate(zip(spec.rows, merged.delta, strict=True)):
            if delta is not None:
                sparse = spec.scaling * sparsify(delta, merged.thresholds[group], spec.mode)
                torch.add(base[rows], sparse, out=out[rows])
            elif out is not base:
                out[rows] = base[rows]

    def grad_factors(  # noqa: D102
        self,
        spec: UpdateSpec,
        merged: Merged,
        grad_weight: Tensor,
        base: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Gradients:
        grads = zero_gradients(merged.factors)
        for group, (matrix, rows) in enumerate(zip(spec.matrices(merged.factors), spec.rows, strict=True)):
            delta = merged.delta[group]
            if delta is None:
                continue
            slope = sparsify_slope(delta, merged.thresholds[group], spec.mode)
            grad_delta = slope.mul_(grad_weight[rows].to(slope.dtype)).mul_(spec.scaling)
            store_gradients(grads, group, rows, spec.kernel.vjp(*matrix, grad_delta))
        return tuple(grads)
