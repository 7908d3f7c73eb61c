"""The adapted layer as an autograd function whose backward pass rebuilds the update instead of saving it.

A kernel function merges the factors and scalars of an update into matrices `ΔW`. The update `S` is nonzero only where
the magnitude of `ΔW` exceeds the threshold of its matrix. The backward pass needs the input, the base weight `W0`, the
factors and scalars, and one threshold per matrix. From these, it rebuilds `ΔW` and the effective weight
`W0 + Σ scaling·S`. A base weight without a dense matrix in memory (`LazyWeight`, e.g. a quantized weight) is
materialized in both passes. `DERIVATION.md` derives the gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from snella.backends import Gradients, Prepared, get_backend, zero_gradients
from snella.kernels import Factors
from snella.memory.origins import ORIGIN_ATTRIBUTE, Origin, origin_of, reject_double_backward
from snella.ops import LayerOp, LazyWeight, LinearOp, without_view
from snella.sparsify import sparsify
from snella.update import Update

NUM_FACTORS = len(Factors._fields)


class CheckpointCache:
    """Results of a recomputed forward pass, reused by the following backward pass.

    Activation checkpointing reruns a layer's forward pass immediately before the layer's backward pass. The cache
    avoids computing the same matrices twice. All calls of a layer share one cache while the layer's parameters do not
    change.
    """

    def __init__(self) -> None:
        # effective weight, prepared updates, and the source of the weight with its version
        self._entry: tuple[Tensor, list[Prepared], Tensor | None, int] | None = None

    def stash(self, effective: Tensor, prepared: list[Prepared], weight: Tensor | None) -> None:
        """Store the results of a forward pass if it is a recomputation.

        Args:
            effective: `W0 + Σ scaling·S`, in the dtype of the layer op.
            prepared: The prepared updates.
            weight: Tensor that changes whenever `W0` changes, or `None` if there is no `W0`.
        """
        self._entry = None
        is_within_backward = torch._C._current_graph_task_id() != -1  # -1: no backward pass is running
        if is_within_backward and not effective.is_inference():
            self._entry = (effective, prepared, weight, -1 if weight is None else weight._version)

    def take(
        self, weight: Tensor | None, dtype: torch.dtype, num_updates: int
    ) -> tuple[Tensor | None, list[Prepared] | None]:
        """Remove and return the cached effective weight and prepared updates.

        Returns `(None, None)` if nothing is cached, or if the weight, the dtype, or the number of updates has changed.
        """
        entry = self._entry
        self._entry = None
        if entry is None:
            return None, None
        effective, prepared, source, version = entry
        is_unchanged = weight is source
        if weight is not None and source is not None:
            is_unchanged = weight.data_ptr() == source.data_ptr() and weight._version == version
        if not is_unchanged or effective.dtype != dtype or len(prepared) != num_updates:
            return None, None
        return effective, prepared


@dataclass(frozen=True)
class LayerCall:
    """Non-tensor arguments of one layer call.

    Args:
        op: The layer's operation.
        weight_shape: `[m, …]`.
        cache_delta: If True, save `ΔW` (with Numba kernels, the effective weight) for the backward pass.
        lazy: The weight, if it is a `LazyWeight`.
        checkpoint_cache: Cache for the results of a forward pass that activation checkpointing repeats, or `None`.
        origin: Recomputes the input in the backward pass, if the input is not saved.
    """

    op: LayerOp
    weight_shape: torch.Size
    cache_delta: bool = False
    lazy: LazyWeight | None = None
    checkpoint_cache: CheckpointCache | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class RequiredGrads:
    """Flags for the required gradients: of the input, the weight, the bias, and the six tensors of each update."""

    x: bool
    weight: bool
    bias: bool
    factors: tuple[bool, ...]


def adapted_layer(
    x: Tensor,
    weight: Tensor | LazyWeight | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    op: LayerOp,
    *,
    weight_shape: torch.Size | None = None,
    cache_delta: bool = False,
    checkpoint_cache: CheckpointCache | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply a layer with sparse weight updates.

        y = op(x, W0 + Σ_k scaling_k·S_k) + bias

    Under autocast, the input and the effective weight are cast to the autocast dtype. Updates are always merged in at
    least float32.

    Args:
        x: Input of the layer.
        weight: Base weight `W0`, `[m, …]`. If `None`, only the updates are applied. A `LazyWeight` is materialized in
            both passes, and the op computes in the dtype of `x`.
        bias: `[m]` or `None`.
        updates: Updates of this weight, each `[m, n]` with `n` the product of the weight's other axes. If one has
            `backend="reference"` (differentiated by autograd), all of them must.
        op: The layer's operation.
        weight_shape: Shape of the weight if `weight` is `None`; defaults to `[m, n]`.
        cache_delta: If True, save `ΔW` (with Numba kernels, the effective weight) for the backward pass instead of
            rebuilding it. This costs one more matrix in memory and changes no bit of the results. It has no effect with
            `"reference"`.
        checkpoint_cache: Cache shared by the calls of one layer while its parameters do not change.

    Returns:
        The layer's output and the thresholds `[G]` of each update. Under autocast, the output has the autocast dtype.
        Otherwise, it has the dtype of `weight`, or of `x` if there is no dense weight.

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
        # needs more memory, because autograd saves the effective weight and all intermediate results of the merge
        with torch.autocast(x.device.type, enabled=False):
            effective, thresholds = add_by_autograd(weight, updates, weight_shape)
            return op(x, effective.to(x.dtype), bias), thresholds
    lazy = weight if isinstance(weight, LazyWeight) else None
    call = LayerCall(op, weight_shape, cache_delta, lazy, checkpoint_cache, origin)
    tensors = [tensor for update in updates for tensor in update.factors]
    return _AdaptedLayer.apply(x, None if lazy else weight, bias, call, updates, input_sources, *tensors)


class _AdaptedLayer(torch.autograd.Function):
    """Autograd function of `adapted_layer`, differentiable in the input, weight, bias, and the updates' factors.

    If `call.origin` is set, `input_sources` are saved instead of `x`, and the backward pass recomputes `x` from them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: LayerCall,
        updates: Sequence[Update],
        input_sources: tuple[Tensor, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, prepared, effective = forward_pass(x, weight, bias, updates, call)
        thresholds = tuple([update.thresholds for update in prepared])
        ctx.call = call
        ctx.updates = updates
        ctx.x_shape = x.shape
        ctx.has_bias = bias is not None
        ctx.lazy_versions = call.lazy and call.lazy.versions()
        # flags from index 6 on belong to `tensors`; their gradients are zero if no matrix has a budget
        needs_factor_grads = any(ctx.needs_input_grad[6:]) and any([any(update.budgets) for update in updates])
        saves_input = needs_factor_grads or ctx.needs_input_grad[1]
        saved: list[tuple[Tensor | None, ...]] = []
        saves_effective = call.cache_delta and ctx.needs_input_grad[0]
        for update in prepared:
            is_delta_saved = call.cache_delta and update.delta
            saved.append(update.delta if is_delta_saved else update.columns if needs_factor_grads else ())
            saves_effective = saves_effective and any(update.budgets) and not update.delta
        if saves_input and call.origin is not None:
            call.origin.add_user()
        input_sources = () if not saves_input else (x,) if call.origin is None else input_sources
        saved_weight = effective if saves_effective else None
        tensor_groups = (input_sources, (weight, saved_weight), thresholds, *saved, tensors)
        ctx.group_sizes = tuple(map(len, tensor_groups))
        ctx.save_for_backward(*itertools.chain(*tensor_groups))
        return without_view(y), thresholds

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        reject_double_backward("use impl='reference' with a kernel without distances")
        remaining = iter(ctx.saved_tensors)
        tensor_groups = [tuple(itertools.islice(remaining, size)) for size in ctx.group_sizes]
        input_sources, (weight, effective), thresholds, *saved, tensors = tensor_groups
        call: LayerCall = ctx.call
        if call.lazy is not None:
            call.lazy.check_unchanged(ctx.lazy_versions)
        updates = []
        for k, update in enumerate(ctx.updates):
            factors = Factors(*tensors[k * NUM_FACTORS : (k + 1) * NUM_FACTORS])
            updates.append(update._replace(factors=factors, thresholds=thresholds[k]))
        x: Tensor | None = input_sources[0] if input_sources else None
        if input_sources and call.origin is not None:
            x = call.origin.compute(input_sources).to(grad_y.dtype)
        needs_x, needs_weight, needs_bias, _, _, _, *needs_factors = ctx.needs_input_grad
        needs = RequiredGrads(needs_x, needs_weight, needs_bias and ctx.has_bias, tuple(needs_factors))
        grad_x, grad_weight, grad_bias, grads = backward_pass(
            grad_y, x, ctx.x_shape, weight, updates, call, needs, saved, effective
        )
        return (grad_x, grad_weight, grad_bias, None, None, None, *grads)


def forward_pass(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, updates: Sequence[Update], call: LayerCall
) -> tuple[Tensor, list[Prepared], Tensor]:
    """Return `y`, the prepared updates, and the effective weight."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return forward_pass(x, weight, bias, updates, call)
    prepared = [get_backend(update.spec.backend).prepare(update) for update in updates]
    effective = add_updates(call.lazy or weight, updates, prepared, call.weight_shape, x.dtype)
    y = call.op(x, effective, bias)
    if call.checkpoint_cache is not None:
        call.checkpoint_cache.stash(effective, prepared, weight if call.lazy is None else call.lazy.tensors[0])
    return y, prepared, effective


def backward_pass(
    grad_y: Tensor,
    x: Tensor | None,
    x_shape: torch.Size,
    weight: Tensor | None,
    updates: Sequence[Update],
    call: LayerCall,
    needs: RequiredGrads,
    saved: Sequence[tuple[Tensor | None, ...]] = (),
    effective: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Gradients]:
    """Return the gradients of the input, the weight, the bias, and the updates' factors.

    Args:
        grad_y: ∂L/∂y.
        x: The input, or `None` if ∂L/∂W is not required.
        x_shape: Shape of the input.
        weight: As in the forward pass.
        updates: As in the forward pass, with their thresholds.
        call: As in the forward pass.
        needs: Gradients to return. The others are `None`.
        saved: `Prepared.delta` or `Prepared.columns` of each update, or an empty tuple if neither is saved.
        effective: The effective weight, if saved.
    """
    op, shape = call.op, call.weight_shape
    prepared = grad_x = grad_weight = grads = None
    with torch.autocast(grad_y.device.type, enabled=False):
        if call.checkpoint_cache is not None:  # also frees the cached weight if `effective` was saved
            source = weight if call.lazy is None else call.lazy.tensors[0]
            cached, prepared = call.checkpoint_cache.take(source, grad_y.dtype, len(updates))
            effective = cached if effective is None else effective
        if prepared is None:
            pairs = zip(updates, saved or [()] * len(updates), strict=True)
            prepared = [get_backend(update.spec.backend).prepare(update, tensors) for update, tensors in pairs]
        if x is not None:
            grad_weight = _grad_weight(grad_y, x, updates, prepared, call, needs)
        if needs.x and effective is None:
            base = call.lazy or weight
            effective, grads = _weight_and_gradients(base, updates, prepared, shape, grad_weight, grad_y.dtype, needs)
        if needs.x and effective is not None:
            grad_x = op.grad_input(grad_y, effective, x_shape)
        effective = None
        if grads is None:
            grads = _factor_gradients(updates, prepared, grad_weight, shape, needs)
        grad_bias = op.grad_bias(grad_y) if needs.bias else None
    grads = tuple([grad if need else None for grad, need in zip(grads, needs.factors, strict=True)])
    if not needs.weight or weight is None or grad_weight is None:
        return grad_x, None, grad_bias, grads
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grads


def compute_effective_weight(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the detached `W0 + Σ scaling·S` of `adapted_layer`.

    Args:
        weight: `[m, …]`, or `None` for the sum of the updates.
        updates: Updates of this weight.
        weight_shape: Shape of the result.
        dtype: Dtype of the result if `weight` is a `LazyWeight`: the op's dtype, or float32 for full precision.
            Otherwise, the result has the dtype of `weight`, or of the merged updates if `weight` is `None`.

    Returns:
        The weight, and the thresholds `[G]` of each update.
    """
    op_dtype = dtype if isinstance(weight, LazyWeight) else None
    with torch.no_grad():
        if updates and updates[0].spec.backend == "reference":
            total, thresholds = add_by_autograd(weight, updates, weight_shape)
            return total if op_dtype is None else total.to(op_dtype), thresholds
        prepared = [get_backend(update.spec.backend).prepare(update) for update in updates]
        total = add_updates(weight, updates, prepared, weight_shape, op_dtype)
    return total, tuple([matrices.thresholds for matrices in prepared])


def add_updates(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    prepared: Sequence[Prepared],
    shape: torch.Size,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `W0 + Σ scaling·S`, `[m, …]`, from prepared updates.

    Args:
        weight: `W0`, or `None` for the sum of the updates. A sum with a `LazyWeight` is not first rounded to the dtype
            of the weight.
        updates: Updates of this weight.
        prepared: The prepared updates.
        shape: Shape of the result.
        dtype: Dtype of the layer op, to which the result is rounded. If `None`, the result has the dtype of `weight`,
            or of the merged updates if `weight` is `None`.
    """
    # the sum with a single update needs no wide copy of the weight
    if weight is not None and len(updates) == 1:
        spec = updates[0].spec
        matrix, out = _base_and_out(weight, updates[0].factors.A.dtype, shape, dtype)
        out_matrix = out.view(shape[0], -1)
        get_backend(spec.backend).add_update(spec, prepared[0], matrix, out_matrix)
        return out if dtype is None else out.to(dtype)
    owns_buffer = isinstance(weight, LazyWeight)
    base = weight.materialize() if isinstance(weight, LazyWeight) else weight
    if base is not None and not updates:
        return base if dtype is None else base.to(dtype)
    wide_dtype = torch.float32 if base is None else torch.promote_types(base.dtype, torch.float32)
    for update in updates:
        wide_dtype = torch.promote_types(wide_dtype, update.factors.A.dtype)
    if base is None:
        total = torch.zeros(shape, dtype=wide_dtype, device=updates[0].factors.A.device)
    else:
        # the matrix view needs contiguous memory, but the weight may be transposed or channels-last
        total = base.detach().to(wide_dtype).contiguous()
        if not owns_buffer and total.data_ptr() == base.data_ptr():
            total = total.clone()
    matrix = total.view(shape[0], -1)
    for update, matrices in zip(updates, prepared, strict=True):
        get_backend(update.spec.backend).add_update(update.spec, matrices, matrix, matrix)
    if base is not None and not owns_buffer:
        total = total.to(base.dtype)
    return total if dtype is None else total.to(dtype)


def _base_and_out(
    weight: Tensor | LazyWeight, factor_dtype: torch.dtype, shape: torch.Size, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the weight as a matrix, and the output buffer of the sum: a new tensor, or the memory of a lazy weight.

    Backends read and write both in their dtypes, so neither needs a float32 copy. The sum with a lazy weight, or with a
    float32 weight and no float64 factors, is rounded only once, to `dtype`. Any other sum is first rounded to the dtype
    of the weight.
    """
    owns_buffer = isinstance(weight, LazyWeight)
    weight = weight.materialize() if isinstance(weight, LazyWeight) else weight
    base = weight.detach().contiguous().view(shape[0], -1)
    is_rounded_once = owns_buffer or (weight.dtype == torch.float32 and factor_dtype != torch.float64)
    out_dtype = dtype if dtype is not None and is_rounded_once else weight.dtype
    if owns_buffer and out_dtype == base.dtype:
        return base, base.view(shape)
    return base, torch.empty(shape, dtype=out_dtype, device=weight.device)


def _grad_weight(
    grad_y: Tensor,
    x: Tensor,
    updates: Sequence[Update],
    prepared: Sequence[Prepared],
    call: LayerCall,
    needs: RequiredGrads,
) -> Tensor:
    """Return ∂L/∂W `[m, …]`.

    For a frozen linear weight, it may be estimated from a sample of tokens or computed in bfloat16, and entries where
    `S` is zero may be zero.
    """
    if needs.weight or not isinstance(call.op, LinearOp):
        return call.op.grad_weight(grad_y, x, call.weight_shape)
    flat_y, flat_x = call.op.gradient_tokens(grad_y, x)
    if len(updates) != 1:
        return call.op.product(flat_y, flat_x)
    backend = get_backend(updates[0].spec.backend)
    return backend.grad_where_nonzero(updates[0].spec, prepared[0], flat_y, flat_x, call.op.product)


def _weight_and_gradients(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    prepared: Sequence[Prepared],
    shape: torch.Size,
    grad_weight: Tensor | None,
    dtype: torch.dtype,
    needs: RequiredGrads,
) -> tuple[Tensor, Gradients | None]:
    """Return the effective weight, and the factors' gradients if the backend computes both in one pass, else `None`."""
    if len(updates) != 1 or weight is None or grad_weight is None or not any(needs.factors):
        return add_updates(weight, updates, prepared, shape, dtype), None
    spec = updates[0].spec
    backend = get_backend(updates[0].spec.backend)
    base, out = _base_and_out(weight, updates[0].factors.A.dtype, shape, dtype)
    matrix = out.view(shape[0], -1)
    grads = backend.add_and_grad_factors(spec, prepared[0], grad_weight.reshape(shape[0], -1), base, matrix)
    if grads is None:
        backend.add_update(spec, prepared[0], base, matrix)
    return out.to(dtype), grads


def _factor_gradients(
    updates: Sequence[Update],
    prepared: Sequence[Prepared],
    grad_weight: Tensor | None,
    shape: torch.Size,
    needs: RequiredGrads,
) -> Gradients:
    """Return the gradients of all updates' factors, given ∂L/∂W of the effective weight.

    Gradients of updates that require none are `None`. Without `grad_weight`, required gradients are zero.
    """
    grads: list[Tensor | None] = []
    for k, (update, matrices) in enumerate(zip(updates, prepared, strict=True)):
        if not any(needs.factors[k * NUM_FACTORS : (k + 1) * NUM_FACTORS]):
            grads += [None] * NUM_FACTORS
        elif grad_weight is None:
            grads += zero_gradients(update.factors)
        else:
            backend = get_backend(update.spec.backend)
            grads += backend.grad_factors(update.spec, matrices, grad_weight.reshape(shape[0], -1))
    return tuple(grads)


def sparsify_update(update: Update) -> tuple[list[Tensor], Tensor]:
    """Merge and sparsify every matrix of an update with differentiable torch operations.

    Returns:
        `G` tensors `[rows, n]`, not multiplied by `scaling`, and the thresholds `[G]`.
    """
    spec, factors, budgets, thresholds = update
    deltas = [spec.merge_matrix(matrix) for matrix in spec.matrices(factors)]
    if thresholds is None:
        pairs = zip(deltas, budgets, strict=True)
        thresholds = torch.stack([spec.find_threshold(delta, budget) for delta, budget in pairs])
    return [sparsify(delta, thresholds[group], spec.mode) for group, delta in enumerate(deltas)], thresholds


def add_by_autograd(
    weight: Tensor | LazyWeight | None, updates: Sequence[Update], shape: torch.Size | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute `W0 + Σ scaling·S`, differentiable by autograd in all inputs, as the reference implementation.

    The sum is computed in the widest dtype of `weight` and the updates, and rounded once to the dtype of `weight`. A
    materialized `LazyWeight` is first converted to at least float32.

    Args:
        weight: Base weight, `[m, …]`, or `None` for the sum of the updates.
        updates: Updates of this weight; must not be empty if `weight` is `None`.
        shape: Shape of the result if `weight` is `None`; defaults to `[m, n]`.

    Returns:
        The sum, with the shape and dtype of `weight` (or `shape` and the dtype of the merged updates if it is `None`),
        and the thresholds of each update.
    """
    base: Tensor | None
    if isinstance(weight, LazyWeight):
        base = weight.materialize()
        base = base.to(torch.promote_types(base.dtype, torch.float32))
    else:
        base = weight
    total = base
    all_thresholds = []
    for update in updates:
        matrices, thresholds = sparsify_update(update)
        delta = update.spec.scaling * torch.cat(matrices)
        if total is None:
            total = delta.reshape(shape) if shape is not None else delta
        else:
            total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta.reshape(total.shape)
        all_thresholds.append(thresholds)
    result = cast(Tensor, total)
    return result if base is None else result.to(base.dtype), tuple(all_thresholds)
