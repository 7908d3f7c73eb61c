"""Functional API of the adapted layer: `y = x (W0 + scaling·S)ᵀ + bias` as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from snella.autograd import adapted_layer, add_by_autograd, add_updates
from snella.backends import MergeCache, choose_backend, get_backend
from snella.kernels import Factors, make_kernel
from snella.sparsify import SparsifyMode
from snella.update import LazyWeight, LinearOp, Update, UpdateSpec

__all__ = ["adapted_layer", "adapted_linear", "compute_effective_weight", "write_effective_weight"]


def compute_effective_weight(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute a detached `W0 + Σ scaling·S`, bit-identical to `adapted_layer`.

    Args:
        weight: `[m, …]`, or `None` for the sum of the updates.
        updates: Updates of this weight.
        weight_shape: Shape of the result.
        dtype: Dtype of the result if `weight` is a `LazyWeight`: the op's dtype, or float32 for full precision.
            Otherwise, the result has the dtype of `weight`.

    Returns:
        The weight, and the thresholds `[G]` of each update.
    """
    is_lazy = isinstance(weight, LazyWeight)
    with torch.no_grad():
        if updates and updates[0].spec.backend == "reference":
            base = weight.materialize_wide() if isinstance(weight, LazyWeight) else weight
            total, thresholds = add_by_autograd(base, updates, weight_shape)
            return total.to(dtype) if is_lazy else total, thresholds
        merged = [get_backend(update.spec.backend).merge(*update) for update in updates]
        base = weight.materialize() if isinstance(weight, LazyWeight) else weight
        total = add_updates(base, updates, merged, weight_shape, dtype if is_lazy else None, is_lazy)
    return total, tuple([matrices.thresholds for matrices in merged])


@torch.no_grad()
def write_effective_weight(weight: Tensor, update: Update, out: Tensor, cache: MergeCache | None = None) -> None:
    """Write `W0 + scaling·S` into an existing tensor, bit-identical to `adapted_layer`.

    Args:
        weight: `W0`, `[m, …]`.
        update: The update.
        out: Output with the shape and dtype of `weight`, in different memory. If both tensors are contiguous and the
            thresholds are known, the call allocates no other tensor of this size.
        cache: Cache that the first call with this update fills and later calls read.
    """
    cache = MergeCache(update.thresholds) if cache is None else cache
    if weight.is_contiguous() and out.is_contiguous() and update.spec.backend != "reference":
        rows = weight.shape[0]
        backend = get_backend(update.spec.backend)
        matrices = (weight.detach().view(rows, -1), out.detach().view(rows, -1))
        merged = backend.merge(update.spec, update.factors, update.budgets, cache.thresholds, cache.columns)
        cache.thresholds, cache.columns = merged.thresholds, merged.columns
        backend.add_update(update.spec, merged, *matrices)
    else:
        cached_update = update._replace(thresholds=cache.thresholds)
        total, (cache.thresholds,) = compute_effective_weight(weight, [cached_update], weight.shape)
        out.copy_(total)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    budget: int,
    kernel: str = "mix_k",
    piece_coeff: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    temperature: Tensor | None = None,
    num_pieces: int = 2,
    softmax_dim: int = 0,
    center_softmax: bool = False,
    scaling: float = 1.0,
    mode: SparsifyMode = "soft",
    impl: str = "auto",
    cache_delta: bool = False,
) -> Tensor:
    """Apply a linear layer with one sparse, high-rank weight update.

        y = x (W0 + scaling·S)ᵀ + bias,   S = sparsify(merge_factors(A, B), keep_threshold(·, budget))

    Args:
        x: `[…, n]`.
        weight: Frozen weight `W0`, `[m, n]`.
        bias: `[m]` or `None`.
        A: Input-side factor, `[n, r]`.
        B: Output-side factor, `[m, r]`.
        budget: Maximum number of nonzero entries of `S`, in `[0, m·n]`.
        kernel: Name of the kernel function; see `merge_factors`, which also documents the scalars, `num_pieces`,
            `softmax_dim` and `center_softmax`.
        piece_coeff: `[P]`.
        alpha: 0-dim.
        beta: 0-dim.
        temperature: 0-dim or `None`.
        num_pieces: `P`.
        softmax_dim: 0 or 1.
        center_softmax: If True, subtract the mean of the softmax.
        scaling: Scaling factor of `S`.
        mode: `"soft"` (eq. 13), `"official"`, or `"none"` with a full budget (`S = ΔW`).
        impl: `"eager"` (torch operations; a hand-written backward pass rebuilds the update), `"numba"` (Numba kernels
            on the CPU), `"triton"` (Triton kernels on a CUDA device), `"auto"` (see `choose_backend`) or `"reference"`
            (autograd).
        cache_delta: See `adapted_layer`.

    Returns:
        `[…, m]`.

    Raises:
        ValueError: If the shapes do not match, or the budget, the kernel or a scalar is invalid.
    """
    scalars = [value if value is None else value[None] for value in (piece_coeff, alpha, beta, temperature)]
    factors, budgets = Factors(A[None], B, *scalars), (budget,)
    kernel_function = make_kernel(kernel, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center_softmax)
    spec = UpdateSpec(kernel_function, (B.shape[0],), mode, scaling)
    spec.check(factors, budgets, weight.shape)
    spec = replace(spec, backend=choose_backend(impl, spec, factors.A)[0])
    updates = [Update(spec, factors, budgets)]
    return adapted_layer(x, weight, bias, updates, LinearOp(), cache_delta=cache_delta)[0]
