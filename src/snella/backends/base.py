"""The protocol of a backend, what it computes of an update; and the one of plain torch operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from snella.sparsify import sparsify, sparsify_slope
from snella.update import Factors, UpdateSpec

Gradients: TypeAlias = tuple[Tensor | None, ...]
"""Gradients in the order of `Factors`; zero for what belongs to a matrix without budget."""


Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`∂L/∂yᵀ x` of tokens `[k, m]` and `[k, n]`."""


@dataclass(frozen=True)
class Merged:
    """The merged matrices of an update, as `Backend.merge` returns them and its other methods take them.

    Args:
        factors: What they were merged from.
        budgets: Entries that each of them keeps.
        thresholds: `[G]`, infinite where the budget is 0.
        delta: What `cache_delta` keeps for the backward pass, to be given to `merge` there: `ΔW` of each matrix (`None`
            without budget), or of all in one; nothing where that is the effective weight.
        columns: A few numbers a column of all matrices, which the backward pass gets in any case, in the place of
            `delta`.
        workspace: What the same backend can use again within the pass; never kept between passes.
    """

    factors: Factors
    budgets: tuple[int, ...]
    thresholds: Tensor
    delta: tuple[Tensor | None, ...] = ()
    columns: tuple[Tensor, ...] = ()
    workspace: Any = None


@dataclass
class MergeCache:
    """What writing the same update again need not find again; a few numbers a matrix, for one state of its factors.

    Args:
        thresholds: `[G]`, once they are known.
        stats: What else a backend keeps.
    """

    thresholds: Tensor | None = None
    stats: Any = None


class Backend(ABC):
    """One way to compute an update, all matrices of a weight at once; values as `TorchBackend` to within rounding."""

    name: str

    fused_add_in_backward = False
    """Whether `grad_factors` takes `base` and `out`."""

    @abstractmethod
    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:
        """Why updates of this spec, with factors like `A`, cannot be computed here, or `None`."""

    @abstractmethod
    def merge(
        self,
        spec: UpdateSpec,
        factors: Factors,
        budgets: tuple[int, ...],
        thresholds: Tensor | None = None,
        delta: tuple[Tensor | None, ...] = (),
    ) -> Merged:
        """Merge every matrix that has a budget, and find the thresholds.

        Args:
            spec: How.
            factors: Of what.
            budgets: Entries that each matrix keeps.
            thresholds: `[G]`, where an earlier call has found them.
            delta: `Merged.delta` or `Merged.columns` of an earlier call for the same factors.
        """

    @abstractmethod
    def add_update(self, spec: UpdateSpec, merged: Merged, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`, both `[m, n]`, contiguous, of any two dtypes; they may be the same."""

    def write_effective(
        self,
        spec: UpdateSpec,
        factors: Factors,
        budgets: tuple[int, ...],
        base: Tensor,
        out: Tensor,
        cache: MergeCache,
    ) -> None:
        """Merge and write `base + scaling·S` into `out`, as `merge` and `add_update` do; `cache` is used and filled."""
        merged = self.merge(spec, factors, budgets, cache.thresholds)
        cache.thresholds = merged.thresholds
        self.add_update(spec, merged, base, out)

    @abstractmethod
    def grad_factors(
        self,
        spec: UpdateSpec,
        merged: Merged,
        grad_weight: Tensor,
        base: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Gradients:
        """Gradients to factors and scalars, given `grad_weight` = ∂L/∂W `[m, n]`.

        With `base` and `out` the same sweep also does what `add_update` does, if the backend has
        `fused_add_in_backward`.
        """

    def grad_weight(self, spec: UpdateSpec, merged: Merged, grad_y: Tensor, x: Tensor, product: Product) -> Tensor:
        """∂L/∂W `[m, n]` of a linear layer where `S` is not zero; elsewhere it may be zero, as nobody reads it.

        Args:
            spec: How the update is computed.
            merged: Its matrices. One without budget needs no product.
            grad_y: ∂L/∂y, `[tokens, m]`.
            x: `[tokens, n]`, in the dtype of `grad_y`.
            product: Of both, where whole products are formed.
        """
        if all(merged.budgets):
            return product(grad_y, x)
        result = _zeros_wide(grad_y, x)
        for rows, budget in zip(spec.rows, merged.budgets, strict=True):
            if budget:
                result[rows] = product(grad_y[:, rows], x)
        return result


def _zeros_wide(grad_y: Tensor, x: Tensor) -> Tensor:
    """Zeros `[m, n]`, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(grad_y.shape[1], x.shape[1], dtype=dtype, device=x.device)


def zero_gradients(factors: Factors) -> list[Tensor | None]:
    """Zeros like everything that an update has."""
    return [None if tensor is None else torch.zeros_like(tensor) for tensor in factors]


def store_gradients(grads: list[Tensor | None], group: int, rows: slice, values: Gradients) -> None:
    """Write the gradients of one matrix into those of all."""
    for k, value in enumerate(values):
        into = grads[k]
        if value is not None and into is not None:
            (into[rows] if k == 1 else into[group]).copy_(value)


class TorchBackend(Backend):
    """On any device and in any dtype, matrix by matrix, with the kernels of `snella.kernels`."""

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
