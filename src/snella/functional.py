"""Functional API of the adapted layer: `y = x (W0 + scaling·S)ᵀ + bias` as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from snella.autograd import LayerCall, RecomputeCache, add_updates, apply_updates
from snella.backends import choose_backend, get_backend
from snella.backends.base import MergeCache
from snella.kernels import make_kernel
from snella.memory.origins import ORIGIN_ATTRIBUTE, origin_of
from snella.sparsify import SparsifyMode, sparsify
from snella.update import Factors, LayerOp, LazyWeight, LinearOp, Update, UpdateSpec


def adapted_layer(
    x: Tensor,
    weight: Tensor | LazyWeight | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    op: LayerOp,
    *,
    weight_shape: torch.Size | None = None,
    cache_delta: bool = False,
    recompute: RecomputeCache | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply a layer with sparse weight updates.

        y = op(x, W0 + Σ_k scaling_k·S_k) + bias

    Under autocast the input and the effective weight are cast to the autocast dtype. Updates are always merged in at
    least float32.

    Args:
        x: Input of the layer.
        weight: Frozen weight `W0`, `[m, …]`; `None` applies only the updates. Both passes materialize a `LazyWeight`,
            and the op then computes in the dtype of `x`.
        bias: `[m]` or `None`.
        updates: Updates of this weight, each `[m, n]` with `n` the product of the weight's other axes. If one has
            `backend="reference"` (differentiated by autograd), all must have it.
        op: The layer's operation.
        weight_shape: Shape of the weight if `weight` is `None`; defaults to `[m, n]`.
        cache_delta: Save `ΔW` (with Numba kernels the effective weight) for the backward pass instead of rebuilding it.
            Costs one more matrix in memory; results stay bit-identical. Ignored with `"reference"`.
        recompute: Cache shared by the calls of one layer while its parameters do not change.

    Returns:
        The layer's output, in the dtype of `weight` or autocast (with a `LazyWeight` in the dtype of `x`), and the
        thresholds `[G]` of each update.

    Raises:
        ValueError: If both `weight` and `updates` are missing.
    """
    if weight is None and not updates:
        raise ValueError("adapted_layer requires a weight or at least one update, got neither")
    if weight_shape is None:
        if weight is None:
            weight_shape = torch.Size((updates[0].factors.B.shape[0], updates[0].factors.A.shape[1]))
        else:
            weight_shape = weight.shape
    input_sources, origin = origin_of(x) if hasattr(x, ORIGIN_ATTRIBUTE) else ((), None)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif isinstance(weight, Tensor):
        x = x.to(weight.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    if isinstance(weight, Tensor) and not updates:
        return op(x, weight.to(x.dtype), bias), ()
    if updates and updates[0].spec.backend == "reference":
        return _reference_layer(x, weight, bias, updates, op, weight_shape)
    lazy = weight if isinstance(weight, LazyWeight) else None
    call = LayerCall(op, weight_shape, cache_delta, lazy, recompute, origin)
    return apply_updates(x, None if isinstance(weight, LazyWeight) else weight, bias, updates, call, input_sources)


def compute_effective_weight(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute `W0 + Σ scaling·S` without gradients, bit-identical to `adapted_layer`.

    Args:
        weight: `[m, …]`, or `None` for the sum of the updates.
        updates: Updates of this weight.
        weight_shape: Shape of the result.
        dtype: Dtype of the result if `weight` is a `LazyWeight`: the op's dtype, or float32 for full precision. The
            result otherwise has the dtype of `weight`.

    Returns:
        The weight, and the thresholds `[G]` of each update.
    """
    is_lazy = isinstance(weight, LazyWeight)
    with torch.no_grad():
        if updates and updates[0].spec.backend == "reference":
            base = weight.materialize_wide() if isinstance(weight, LazyWeight) else weight
            total, thresholds = _add_by_autograd(base, updates, weight_shape)
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
        out: Output, with the shape and dtype of `weight`, in different memory. If both tensors are contiguous and the
            thresholds are known, the call allocates no further tensor of this size.
        cache: Cache that the first call with this update fills; later calls are faster.
    """
    cache = MergeCache(update.thresholds) if cache is None else cache
    is_direct = weight.is_contiguous() and out.is_contiguous() and update.spec.backend != "reference"
    if is_direct:
        rows = weight.shape[0]
        backend = get_backend(update.spec.backend)
        matrices = (weight.detach().view(rows, -1), out.detach().view(rows, -1))
        backend.write_effective(update.spec, update.factors, update.budgets, *matrices, cache)
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
        kernel: Name of the kernel function. See `merge_factors` for this and for the scalars, `num_pieces`,
            `softmax_dim` and `center_softmax`.
        piece_coeff: `[P]`.
        alpha: 0-dim.
        beta: 0-dim.
        temperature: 0-dim or `None`.
        num_pieces: `P`.
        softmax_dim: 0 or 1.
        center_softmax: If True, subtract the softmax's mean.
        scaling: Factor on `S`.
        mode: `"soft"` (eq. 13), `"official"`, or `"none"` with a full budget (`S = ΔW`).
        impl: `"eager"` (torch operations; a hand-written backward pass rebuilds the update), `"numba"` (Numba kernels
            on the CPU), `"triton"` (Triton kernels on a CUDA device), `"auto"` (see `choose_backend`) or `"reference"`
            (autograd).
        cache_delta: See `adapted_layer`.

    Returns:
        `[…, m]`.

    Raises:
        ValueError: If shapes, budget, kernel or scalars do not match.
    """
    scalars = [value if value is None else value[None] for value in (piece_coeff, alpha, beta, temperature)]
    factors, budgets = Factors(A[None], B, *scalars), (budget,)
    kernel_function = make_kernel(kernel, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center_softmax)
    spec = UpdateSpec(kernel_function, (B.shape[0],), mode, scaling)
    spec.check(factors, budgets, weight.shape)
    spec = replace(spec, backend=choose_backend(impl, spec, factors.A)[0])
    updates = [Update(spec, factors, budgets)]
    return adapted_layer(x, weight, bias, updates, LinearOp(), cache_delta=cache_delta)[0]


def sparsify_update(update: Update) -> tuple[list[Tensor], Tensor]:
    """Merge and sparsify every matrix of an update with differentiable torch operations.

    Returns:
        `G` tensors `[rows, n]` without `scaling`, and the thresholds `[G]`.
    """
    spec, factors, budgets, thresholds = update
    deltas = [spec.merge_matrix(matrix) for matrix in spec.matrices(factors)]
    if thresholds is None:
        pairs = zip(deltas, budgets, strict=True)
        thresholds = torch.stack([spec.find_threshold(delta, budget) for delta, budget in pairs])
    return [sparsify(delta, thresholds[group], spec.mode) for group, delta in enumerate(deltas)], thresholds


def effective_weight(weight: Tensor | None, updates: Sequence[Update], shape: torch.Size | None = None) -> Tensor:
    """Return `W0 + Σ scaling·S`, differentiable by autograd with respect to all inputs; the reference implementation.

    The sum is computed in the wider of the two dtypes and rounded once to the dtype of `weight`.

    Args:
        weight: Frozen weight, `[m, …]`, or `None` for the sum of the updates.
        updates: Updates of this weight.
        shape: Shape of the result if `weight` is `None`; defaults to `[m, n]`.

    Returns:
        Shape and dtype of `weight`; without a weight, `shape` and the dtype of the merged updates.

    Raises:
        ValueError: If both `weight` and `updates` are missing.
    """
    return _add_by_autograd(weight, updates, shape)[0]


def _add_by_autograd(
    weight: Tensor | None, updates: Sequence[Update], shape: torch.Size | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `effective_weight` and the thresholds of each update."""
    total, all_thresholds = weight, []
    for update in updates:
        matrices, thresholds = sparsify_update(update)
        delta = update.spec.scaling * torch.cat(matrices)
        if total is None:
            total = delta.reshape(shape) if shape is not None else delta
        else:
            total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta.reshape(total.shape)
        all_thresholds.append(thresholds)
    if total is None:
        raise ValueError("effective_weight requires a weight or at least one update, got neither")
    return total if weight is None else total.to(weight.dtype), tuple(all_thresholds)


def _reference_layer(
    x: Tensor,
    weight: Tensor | LazyWeight | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    op: LayerOp,
    weight_shape: torch.Size,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`adapted_layer` by autograd, which saves the effective weight and every intermediate of the merge."""
    base = weight.materialize_wide() if isinstance(weight, LazyWeight) else weight
    with torch.autocast(x.device.type, enabled=False):
        effective, thresholds = _add_by_autograd(base, updates, weight_shape)
        return op(x, effective.to(x.dtype), bias), thresholds
