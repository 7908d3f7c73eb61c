"""Backend interface, and its implementation with torch operations."""

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
"""Gradients in the order of `Factors`; zeros for matrices without a budget."""

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function that computes `∂L/∂yᵀ x` from tokens `[k, m]` and `[k, n]`."""


@dataclass(frozen=True)
class Merged:
    """Merged matrices of an update: the result of `Backend.merge` and an argument of its other methods.

    Args:
        factors: The merged factors.
        budgets: Budget of each matrix.
        thresholds: `[G]`, infinite for a budget of 0.
        delta: Tensors that `cache_delta` saves for `merge` in the backward pass: `ΔW` of each matrix (`None` without a
            budget), or one tensor for all matrices. Empty if the backend saves the effective weight instead.
        columns: Column statistics of all matrices, saved for `merge` in the backward pass instead of `delta`.
        workspace: Scratch data of the backend, valid within one pass.
    """

    factors: Factors
    budgets: tuple[int, ...]
    thresholds: Tensor
    delta: tuple[Tensor | None, ...] = ()
    columns: tuple[Tensor, ...] = ()
    workspace: Any = None


@dataclass
class MergeCache:
    """Cache for repeated writes of an update: a few numbers per matrix, valid until its factors change.

    Args:
        thresholds: `[G]`, or `None` before the first write.
        stats: Other backend-specific data.
    """

    thresholds: Tensor | None = None
    stats: Any = None


class Backend(ABC):
    """Merge, addition and gradients of an update; all backends agree with `TorchBackend` up to rounding."""

    name: str

    fused_add_in_backward = False
    """True if `grad_factors` supports `base` and `out`."""

    @abstractmethod
    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:
        """Return the reason why updates with this spec and factors like `A` are not supported, or `None`."""

    @abstractmethod
    def merge(
        self,
        spec: UpdateSpec,
        factors: Factors,
        budgets: tuple[int, ...],
        thresholds: Tensor | None = None,
        delta: tuple[Tensor | None, ...] = (),
    ) -> Merged:
        """Merge every matrix with a nonzero budget and compute the thresholds.

        Args:
            spec: Settings of the update.
            factors: Factors and scalars.
            budgets: Budget of each matrix.
            thresholds: `[G]` of an earlier call, if available.
            delta: `Merged.delta` or `Merged.columns` of an earlier call with the same factors.
        """

    @abstractmethod
    def add_update(self, spec: UpdateSpec, merged: Merged, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`: contiguous `[m, n]` of any dtype, possibly the same tensor."""

    def write_effective(
        self,
        spec: UpdateSpec,
        factors: Factors,
        budgets: tuple[int, ...],
        base: Tensor,
        out: Tensor,
        cache: MergeCache,
    ) -> None:
        """Merge an update and write `base + scaling·S` into `out`, using and filling `cache`."""
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
        """Return the gradients of factors and scalars, given `grad_weight` = ∂L/∂W `[m, n]`.

        With `base` and `out`, a backend with `fused_add_in_backward` also performs `add_update` in the same pass.
        """

    def grad_weight(self, spec: UpdateSpec, merged: Merged, grad_y: Tensor, x: Tensor, product: Product) -> Tensor:
        """Return ∂L/∂W `[m, n]` of a linear layer. Entries where `S` is zero are unused and may be zero.

        Args:
            spec: Settings of the update.
            merged: Merged matrices. Matrices without a budget need no product.
            grad_y: ∂L/∂y, `[tokens, m]`.
            x: `[tokens, n]`, dtype of `grad_y`.
            product: Computes a dense product.
        """
        if all(merged.budgets):
            return product(grad_y, x)
        result = _zeros_float32(grad_y, x)
        for rows, budget in zip(spec.rows, merged.budgets, strict=True):
            if budget:
                result[rows] = product(grad_y[:, rows], x)
        return result


def _zeros_float32(grad_y: Tensor, x: Tensor) -> Tensor:
    """Return zeros `[m, n]`, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(grad_y.shape[1], x.shape[1], dtype=dtype, device=x.device)


def zero_gradients(factors: Factors) -> list[Tensor | None]:
    """Return zero gradients for all tensors of an update."""
    return [None if tensor is None else torch.zeros_like(tensor) for tensor in factors]


def store_gradients(grads: list[Tensor | None], group: int, rows: slice, values: Gradients) -> None:
    """Copy the gradients of one matrix into the gradients of all matrices."""
    for k, value in enumerate(values):
        target = grads[k]
        if value is not None and target is not None:
            (target[rows] if k == 1 else target[group]).copy_(value)


class TorchBackend(Backend):
    """Backend for any device and dtype, with the kernels of `snella.kernels` applied per matrix."""

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
                [infinite if matrix is None else spec.find_threshold(matrix, budget) for matrix, budget in pairs]
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
