"""The adapted layer with a backward pass written by hand, which rebuilds the update instead of keeping it.

Kept for the backward pass: the input, the factors and scalars (which live in the model anyway) and one threshold a
matrix. A weight that is kept in another form, a `LazyWeight`, is asked for in both passes. The derivation is in this
package's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snella.backends import Gradients, Merged, get_backend
from snella.memory.origins import Origin, once
from snella.update import Factors, LayerOp, LazyWeight, LinearOp, Update, without_view

NUM_FACTORS = len(Factors._fields)


class RecomputeCache:
    """What a recomputed forward pass has built, for the backward pass that asked for it.

    Activation checkpointing runs a layer's forward pass again in the middle of the backward pass, and the layer's own
    backward pass follows at once. What the first has built, the second need not build again; nothing is kept in
    between other than this. One cache serves all calls of a layer while its parameters stay the same.
    """

    def __init__(self) -> None:
        self._entry: tuple[Tensor, list[Merged], Tensor | None, int] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return self._entry is None

    def stash(self, effective: Tensor, merged: list[Merged], weight: Tensor | None) -> None:
        """Keep what was built, if this is a recomputation.

        Args:
            effective: `W0 + Σ scaling·S`, in the dtype of the layer op.
            merged: The updates' merged matrices.
            weight: A tensor that stays the same as long as `W0` does.
        """
        self._entry = None
        is_within_backward = torch._C._current_graph_task_id() != -1
        if is_within_backward and not effective.is_inference():
            self._entry = (effective, merged, weight, -1 if weight is None else weight._version)

    def take(
        self, weight: Tensor | None, dtype: torch.dtype, num_updates: int
    ) -> tuple[Tensor | None, list[Merged] | None]:
        """The effective weight and the merged matrices if they are still those of `weight`; twice `None` if not."""
        entry, self._entry = self._entry, None
        if entry is None:
            return None, None
        effective, merged, built_of, version = entry
        is_same = weight is None or (
            built_of is not None and weight.data_ptr() == built_of.data_ptr() and weight._version == version
        )
        if not is_same or effective.dtype != dtype or len(merged) != num_updates:
            return None, None
        return effective, merged


@dataclass(frozen=True)
class LayerCall:
    """What one call of an adapted layer is given besides tensors and updates.

    Args:
        op: The layer's operation.
        weight_shape: `[m, …]`.
        cache_delta: Whether `ΔW`, or the effective weight, is kept for the backward pass.
        lazy: The weight, where it is kept in another form.
        recompute: What a recomputation leaves to the backward pass, or `None`.
        origin: How the input was computed, where it is computed again in the backward pass instead of being kept.
    """

    op: LayerOp
    weight_shape: torch.Size
    cache_delta: bool = False
    lazy: LazyWeight | None = None
    recompute: RecomputeCache | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Needs:
    """Whose gradients are asked for: the input's, the weight's, the bias's, and those of each update's six tensors."""

    x: bool
    weight: bool
    bias: bool
    factors: tuple[bool, ...]


def apply_updates(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    call: LayerCall,
    kept: tuple[Tensor, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`y = op(x, W0 + Σ scaling·S) + bias`, and the thresholds of each update.

    With `call.origin`, `x` is what that makes of `kept`, tensors that are kept in its place.
    """
    tensors = [tensor for update in updates for tensor in update.factors]
    return _AdaptedLayer.apply(x, weight, bias, call, updates, kept, *tensors)


class _AdaptedLayer(torch.autograd.Function):
    """`apply_updates` with gradients to input, weight, bias and the updates' factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: LayerCall,
        updates: Sequence[Update],
        of_x: tuple[Tensor, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, merged, effective = forward_pass(x, weight, bias, updates, call)
        thresholds = tuple([one.thresholds for one in merged])
        ctx.call, ctx.updates, ctx.x_shape, ctx.has_bias = call, updates, x.shape, bias is not None
        ctx.lazy_versions = call.lazy and call.lazy.versions()
        some_update_learns = any(ctx.needs_input_grad[6:]) and any([any(update.budgets) for update in updates])
        needs_x = some_update_learns or ctx.needs_input_grad[1]
        kept: list[Tensor | None] = []
        ctx.kept_sizes = []
        keeps_effective = call.cache_delta and ctx.needs_input_grad[0]
        for one in merged:
            own = one.delta if call.cache_delta and one.delta else one.columns if some_update_learns else ()
            keeps_effective = keeps_effective and any(one.budgets) and not one.delta
            ctx.kept_sizes.append(len(own))
            kept += own
        if needs_x and call.origin is not None:
            call.origin.add_user()
        of_x = () if not needs_x else (x,) if call.origin is None else of_x
        ctx.num_of_x = len(of_x)
        kept_weight = effective if keeps_effective else None
        ctx.save_for_backward(*of_x, weight, kept_weight, *thresholds, *kept, *tensors)
        return without_view(y), thresholds

    @staticmethod
    @once("impl='reference' of a kernel without distances is")
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        of_x, (weight, effective, *rest) = saved[: ctx.num_of_x], saved[ctx.num_of_x :]
        call: LayerCall = ctx.call
        if call.lazy is not None:
            call.lazy.check_unchanged(ctx.lazy_versions)
        updates, kept = [], []
        for k, update in enumerate(ctx.updates):
            start = len(rest) - (len(ctx.updates) - k) * NUM_FACTORS
            factors = Factors(*rest[start : start + NUM_FACTORS])
            updates.append(update._replace(factors=factors, thresholds=rest[k]))
        position = len(updates)
        for size in ctx.kept_sizes:
            kept.append(tuple(rest[position : position + size]))
            position += size
        x: Tensor | None = of_x[0] if of_x else None
        if of_x and call.origin is not None:
            x = call.origin.compute(of_x).to(grad_y.dtype)
        needs_x, needs_weight, needs_bias, _, _, _, *of_factors = ctx.needs_input_grad
        needs = Needs(needs_x, needs_weight, needs_bias and ctx.has_bias, tuple(of_factors))
        grad_x, grad_weight, grad_bias, grads = backward_pass(
            grad_y, x, ctx.x_shape, weight, updates, call, needs, kept, effective
        )
        return (grad_x, grad_weight, grad_bias, None, None, None, *grads)


def forward_pass(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, updates: Sequence[Update], call: LayerCall
) -> tuple[Tensor, list[Merged], Tensor]:
    """Return `y`, the merged matrices of each update, and the effective weight."""
    with torch.autocast(x.device.type, enabled=False):
        merged = [get_backend(update.spec.backend).merge(*update) for update in updates]
        base = weight if call.lazy is None else call.lazy.materialize()
        effective = add_updates(base, updates, merged, call.weight_shape, x.dtype, call.lazy is not None)
        del base
        y = call.op(x, effective, bias)
    if call.recompute is not None:
        call.recompute.stash(effective, merged, weight if call.lazy is None else call.lazy.tensors[0])
    return y, merged, effective


def backward_pass(
    grad_y: Tensor,
    x: Tensor | None,
    x_shape: torch.Size,
    weight: Tensor | None,
    updates: Sequence[Update],
    call: LayerCall,
    needs: Needs,
    kept: Sequence[tuple[Tensor | None, ...]] = (),
    effective: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Gradients]:
    """Gradients to input, weight, bias and the updates' factors.

    Args:
        grad_y: ∂L/∂y.
        x: The input; `None` where only its own gradient is asked for.
        x_shape: Its shape.
        weight: As in the forward pass.
        updates: As in the forward pass, with their thresholds.
        call: As in the forward pass.
        needs: Whose gradients are asked for; the others are `None`.
        kept: `Merged.delta` or `Merged.columns` of each update where they were kept, else empty.
        effective: The effective weight, where it was kept.
    """
    op, shape = call.op, call.weight_shape
    merged = grad_x = grad_weight = grads = None
    with torch.autocast(grad_y.device.type, enabled=False):
        if call.recompute is not None and effective is None:
            built_of = weight if call.lazy is None else call.lazy.tensors[0]
            effective, merged = call.recompute.take(built_of, grad_y.dtype, len(updates))
        if merged is None:
            pairs = zip(updates, kept or [()] * len(updates), strict=True)
            merged = [get_backend(update.spec.backend).merge(*update, own) for update, own in pairs]
        if x is not None:
            grad_weight = _grad_weight(grad_y, x, updates, merged, call, needs)
        if needs.x and effective is None:
            effective, grads = _weight_and_gradients(weight, updates, merged, call, grad_weight, grad_y.dtype, needs)
        if needs.x and effective is not None:
            grad_x = op.grad_input(grad_y, effective, x_shape)
        effective = None
        if grads is None:
            grads = _factor_gradients(updates, merged, grad_weight, shape, needs)
        grad_bias = op.grad_bias(grad_y) if needs.bias else None
    grads = tuple([grad if need else None for grad, need in zip(grads, needs.factors, strict=True)])
    if not needs.weight or weight is None or grad_weight is None:
        return grad_x, None, grad_bias, grads
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grads


def add_updates(
    weight: Tensor | None,
    updates: Sequence[Update],
    merged: Sequence[Merged],
    shape: torch.Size,
    dtype: torch.dtype | None = None,
    owns_buffer: bool = False,
) -> Tensor:
    """`W0 + Σ scaling·S` from merged matrices, `[m, …]`.

    Args:
        weight: `W0`, or `None` for the sum of the updates alone.
        updates: The updates.
        merged: Their matrices.
        shape: Shape of the result.
        dtype: That of the layer op, to which the result is rounded; `None`: that of `weight`, without one the dtype
            that the updates were merged in.
        owns_buffer: Whether `weight` was made for this sum: it is written over, and the sum is not rounded to its dtype
            first.
    """
    if weight is not None and not updates:
        return weight if dtype is None else weight.to(dtype)
    if weight is not None and len(updates) == 1:
        base, out = _base_and_out(weight, updates[0].factors.A.dtype, shape, dtype, owns_buffer)
        get_backend(updates[0].spec.backend).add_update(updates[0].spec, merged[0], base, out.view(shape[0], -1))
        return out if dtype is None else out.to(dtype)
    wide = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
    for update in updates:
        wide = torch.promote_types(wide, update.factors.A.dtype)
    if weight is None:
        total = torch.zeros(shape, dtype=wide, device=updates[0].factors.A.device)
    else:
        # contiguous, so that it can be seen as a matrix: the weight itself may be transposed or laid out channels last
        total = weight.detach().to(wide).contiguous()
        if not owns_buffer and total.data_ptr() == weight.data_ptr():
            total = total.clone()
    matrix = total.view(shape[0], -1)
    for update, one in zip(updates, merged, strict=True):
        get_backend(update.spec.backend).add_update(update.spec, one, matrix, matrix)
    if weight is not None and not owns_buffer:
        total = total.to(weight.dtype)
    return total if dtype is None else total.to(dtype)


def _base_and_out(
    weight: Tensor, factor_dtype: torch.dtype, shape: torch.Size, dtype: torch.dtype | None, owns_buffer: bool
) -> tuple[Tensor, Tensor]:
    """The weight as a matrix, and where the sum is written: over it, or into a tensor of its own.

    A backend reads and writes both in their own dtypes, so that neither needs a float32 copy. A float32 sum comes out
    in the dtype of the layer op at once, to which it would be rounded next.
    """
    base = weight.detach().contiguous().view(shape[0], -1)
    is_rounded_once = owns_buffer or (weight.dtype == torch.float32 and factor_dtype != torch.float64)
    out_dtype = dtype if dtype is not None and is_rounded_once else weight.dtype
    if owns_buffer and out_dtype == base.dtype:
        return base, base.view(shape)
    return base, torch.empty(shape, dtype=out_dtype, device=weight.device)


def _grad_weight(
    grad_y: Tensor, x: Tensor, updates: Sequence[Update], merged: Sequence[Merged], call: LayerCall, needs: Needs
) -> Tensor:
    """∂L/∂W `[m, …]`; of a frozen linear layer its estimate, if asked for, and where its one update needs it."""
    if needs.weight or not isinstance(call.op, LinearOp):
        return call.op.grad_weight(grad_y, x, call.weight_shape)
    flat_y, flat_x = call.op.tokens_of(grad_y, x)
    if len(updates) != 1:
        return call.op.product(flat_y, flat_x)
    backend = get_backend(updates[0].spec.backend)
    return backend.grad_weight(updates[0].spec, merged[0], flat_y, flat_x, call.op.product)


def _weight_and_gradients(
    weight: Tensor | None,
    updates: Sequence[Update],
    merged: Sequence[Merged],
    call: LayerCall,
    grad_weight: Tensor | None,
    dtype: torch.dtype,
    needs: Needs,
) -> tuple[Tensor, Gradients | None]:
    """The effective weight; with it the gradients to the factors, where a backend forms both in one sweep."""
    shape, owns_buffer = call.weight_shape, call.lazy is not None
    base = weight if call.lazy is None else call.lazy.materialize()
    if len(updates) == 1 and base is not None and grad_weight is not None and any(needs.factors):
        spec, backend = updates[0].spec, get_backend(updates[0].spec.backend)
        if backend.fused_add_in_backward:
            matrix, out = _base_and_out(base, updates[0].factors.A.dtype, shape, dtype, owns_buffer)
            grad = grad_weight.reshape(shape[0], -1)
            grads = backend.grad_factors(spec, merged[0], grad, matrix, out.view(shape[0], -1))
            return out.to(dtype), grads
    return add_updates(base, updates, merged, shape, dtype, owns_buffer), None


def _factor_gradients(
    updates: Sequence[Update],
    merged: Sequence[Merged],
    grad_weight: Tensor | None,
    shape: torch.Size,
    needs: Needs,
) -> Gradients:
    """Gradients to the factors of all updates, given ∂L/∂W of the effective weight."""
    grads: list[Tensor | None] = []
    for k, (update, one) in enumerate(zip(updates, merged, strict=True)):
        if not any(needs.factors[k * NUM_FACTORS : (k + 1) * NUM_FACTORS]):
            grads += [None] * NUM_FACTORS
        elif grad_weight is None:
            grads += [None if tensor is None else torch.zeros_like(tensor) for tensor in update.factors]
        else:
            backend = get_backend(update.spec.backend)
            grads += backend.grad_factors(update.spec, one, grad_weight.reshape(shape[0], -1))
    return tuple(grads)
