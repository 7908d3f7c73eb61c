"""The adapted layer with a backward pass written by hand, which rebuilds the update instead of keeping it.

Kept for the backward pass: the input, the factors and scalars (which live in the model anyway) and one threshold a
matrix. A weight that is kept in another form, a `WeightSource`, is asked for in both passes. The derivation is in this
package's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snella.ops.backends.base import Backend, FusedBackend, Merged
from snella.ops.spec import LinearProduct, Product, Update, WeightSource, without_view


@dataclass(frozen=True)
class Handover:
    """What a recomputation built, and of which weight.

    Args:
        effective: `W0 + Σ scaling·S`, in the dtype of the product.
        merged: The updates' merged matrices.
        weight: `W0`; not a copy.
        version: Its version then.
    """

    effective: Tensor
    merged: list[list[Merged | None]]
    weight: Tensor | None
    version: int


def _is_within_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def hand_over(
    updates: Sequence[Update], weight: Tensor | None, effective: Tensor, merged: list[list[Merged | None]]
) -> None:
    """Leave what was built to the backward pass, if this is a recomputation."""
    slot = updates[0].handover
    slot.clear()
    if _is_within_backward() and not effective.is_inference():
        slot.append(Handover(effective, merged, weight, -1 if weight is None else weight._version))


def handed_over(
    updates: Sequence[Update], weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, list[list[Merged | None]] | None]:
    """Take what a recomputation has left: the effective weight and the merged matrices, or `None` twice."""
    slot = updates[0].handover
    if not slot:
        return None, None
    found = slot.pop()
    is_same = weight is None or (weight.data_ptr() == found.weight.data_ptr() and weight._version == found.version)
    if not is_same or found.effective.dtype != dtype or len(found.merged) != len(updates):
        return None, None
    return found.effective, found.merged


TENSORS_PER_UPDATE = 6  # A, B and the four kernel scalars: Update.tensors()


def adapted_product_eager(
    x: Tensor,
    weight: Tensor | WeightSource | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    product: Product,
    weight_shape: torch.Size,
    backends: Sequence[Backend],
    keep_delta: bool = False,
) -> Tensor:
    """Same contract as `adapted_product`."""
    tensors = [tensor for update in updates for tensor in update.tensors()]
    source = weight if isinstance(weight, WeightSource) else None
    settings = Settings(tuple(updates), product, weight_shape, tuple(backends), keep_delta, source)
    return _AdaptedProduct.apply(x, None if source else weight, bias, settings, *tensors)


@dataclass(frozen=True)
class Settings:
    """What the op is told besides tensors."""

    updates: tuple[Update, ...]
    product: Product
    weight_shape: torch.Size
    backends: tuple[Backend, ...]
    keep_delta: bool
    source: WeightSource | None = None

    def base(self, weight: Tensor | None) -> Tensor | None:
        """The weight, given what came as a tensor."""
        return weight if self.source is None else self.source.make()

    def identity(self, weight: Tensor | None) -> Tensor | None:
        """A tensor that stays the same as long as the weight does."""
        return weight if self.source is None else self.source.tensors[0]


def merge_groups(update: Update, backend: Backend) -> list[Merged | None]:
    """Merge every matrix and make sure that its threshold is known; `None` where the budget is 0."""
    if isinstance(backend, FusedBackend):
        return backend.merge_groups(update)
    merged: list[Merged | None] = []
    for group, (factors, budget) in enumerate(zip(update.group_factors(), update.budgets, strict=True)):
        if budget:
            merged.append(backend.merge(update, group, factors))
            continue
        merged.append(None)
        if len(update.thresholds) <= group:
            update.thresholds.append(update.B.new_full((), torch.inf))
    return merged


def add_updates(
    weight: Tensor | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    merged: Sequence[Sequence[Merged | None]],
    backends: Sequence[Backend],
    dtype_of_product: torch.dtype | None = None,
    *,
    is_made_here: bool = False,
) -> Tensor:
    """Return `W0 + Σ scaling·S` from merged matrices; values as `effective_weight`.

    A float32 weight may come out in `dtype_of_product`, to which the caller would round it next. One that was made for
    this sum alone is written over, and the sum is not rounded to its dtype.
    """
    if not updates and weight is not None and is_made_here:
        return weight
    if len(updates) == 1 and weight is not None and isinstance(backends[0], FusedBackend):
        base, single = _base_and_target(weight, weight_shape, dtype_of_product, is_made_here)
        backends[0].add_groups(updates[0], merged[0], base, single.view(weight_shape[0], -1))
        return single
    dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
    for update in updates:
        dtype = torch.promote_types(dtype, update.A.dtype)
    # contiguous, so that it can be seen as a matrix: the weight itself may be transposed or laid out channels last
    if weight is None:
        base = torch.zeros(weight_shape, dtype=dtype, device=updates[0].A.device)
    else:
        base = weight.detach().to(dtype).contiguous()
    # a base that was made here is written over, the model's own weight is not
    owned = weight is None or is_made_here or base.data_ptr() != weight.data_ptr()
    total = base if owned else torch.empty_like(base)
    source, target = base.view(weight_shape[0], -1), total.view(weight_shape[0], -1)
    for update, groups, backend in zip(updates, merged, backends, strict=True):
        if isinstance(backend, FusedBackend):
            backend.add_groups(update, groups, source, target)
            source = target
            continue
        for group, (rows, one) in enumerate(zip(update.rows, groups, strict=True)):
            if one is not None:
                backend.add_sparse(update, group, one, source[rows], target[rows])
            elif source is not target:
                target[rows] = source[rows]
        source = target
    return total if weight is None or is_made_here else total.to(weight.dtype)


def _base_and_target(
    weight: Tensor, shape: torch.Size, dtype_of_product: torch.dtype | None, is_made_here: bool
) -> tuple[Tensor, Tensor]:
    """The weight as a matrix, and where a fused backend writes the sum: over it, or into a tensor of its own.

    Such a backend reads and writes both in their own dtypes, so that neither needs a float32 copy.
    """
    base = weight.detach().contiguous().view(shape[0], -1)
    dtype = weight.dtype
    if dtype_of_product is not None and (is_made_here or dtype == torch.float32):
        dtype = dtype_of_product
    if is_made_here and dtype == base.dtype:
        return base, base.view(shape)
    return base, torch.empty(shape, dtype=dtype, device=weight.device)


def effective_weight_eager(
    weight: Tensor | WeightSource | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    backends: Sequence[Backend],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `W0 + Σ scaling·S` without gradients, with the bits that the adapted layer uses.

    `dtype` is the result's where the weight is a `WeightSource`.
    """
    with torch.no_grad():
        merged = [merge_groups(update, backend) for update, backend in zip(updates, backends, strict=True)]
        if isinstance(weight, WeightSource):
            made = weight.make()
            return add_updates(made, updates, weight_shape, merged, backends, dtype, is_made_here=True).to(dtype)
        return add_updates(weight, updates, weight_shape, merged, backends)


def forward_pass(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Settings
) -> tuple[Tensor, list[list[Merged | None]]]:
    """Return `y` and the merged matrices; the thresholds are known afterwards."""
    updates, backends, shape = settings.updates, settings.backends, settings.weight_shape
    with torch.autocast(x.device.type, enabled=False):
        merged = [merge_groups(update, backend) for update, backend in zip(updates, backends, strict=True)]
        base, is_made_here = settings.base(weight), settings.source is not None
        effective = add_updates(base, updates, shape, merged, backends, x.dtype, is_made_here=is_made_here).to(x.dtype)
        del base
        y = settings.product(x, effective, bias)
    if updates:
        hand_over(updates, settings.identity(weight), effective, merged)
    return y, merged


@dataclass(frozen=True)
class Needs:
    """Whose gradients are asked for: the input's, the weight's, the bias's, and those of each update's six tensors."""

    x: bool
    weight: bool
    bias: bool
    tensors: tuple[bool, ...]

    @property
    def updates(self) -> list[tuple[bool, ...]]:
        """Those of the tensors, update by update."""
        return [self.tensors[k : k + TENSORS_PER_UPDATE] for k in range(0, len(self.tensors), TENSORS_PER_UPDATE)]


def backward_pass(
    grad_y: Tensor,
    x: Tensor | None,
    x_shape: torch.Size,
    weight: Tensor | None,
    settings: Settings,
    kept: Sequence[Sequence[Tensor | None]],
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients to input, weight, bias and the updates' tensors.

    Args:
        grad_y: ∂L/∂y.
        x: The input; `None` where only its own gradient is asked for.
        x_shape: Its shape.
        weight: As in the forward pass.
        settings: The same, thresholds known.
        kept: `ΔW` of each update's matrices if they were kept, else empty.
        needs: Whose gradients are asked for; the others are `None`.
    """
    updates, backends, shape, product = settings.updates, settings.backends, settings.weight_shape, settings.product
    grad_x = grad_weight = None
    grads: list[Tensor | None] = []
    with torch.autocast(grad_y.device.type, enabled=False):
        effective, merged = handed_over(updates, settings.identity(weight), grad_y.dtype) if updates else (None, None)
        if merged is None:
            merged = [_restored(*one) for one in zip(updates, backends, kept, strict=True)]
        if x is not None:
            if needs.weight or len(updates) != 1 or not isinstance(product, LinearProduct):
                grad_weight = product.grad_weight(grad_y, x, shape)
            else:
                grad_weight = _gradient_where_kept(updates[0], merged[0], backends[0], grad_y, x)
        found: list[Sequence[Tensor | None]] | None = None
        if needs.x and effective is None:
            effective, found = _weight_and_gradients(settings, weight, merged, grad_weight, grad_y.dtype, needs)
        if needs.x and effective is not None:
            grad_x = product.grad_input(grad_y, effective, x_shape)
        effective = None
        for k, needed in enumerate(needs.updates):
            of_update: Sequence[Tensor | None] = [None] * TENSORS_PER_UPDATE
            if found is not None:
                of_update = found[k]
            elif any(needed):
                of_update = _update_gradients(updates[k], merged[k], grad_weight, shape, backends[k])
            grads.extend(grad if need else None for grad, need in zip(of_update, needed, strict=True))
        grad_bias = product.grad_bias(grad_y) if needs.bias else None
    if not needs.weight or weight is None or grad_weight is None:
        return grad_x, None, grad_bias, grads
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grads


class _AdaptedProduct(torch.autograd.Function):
    """`y = product(x, W0 + Σ scaling·S) + bias`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Settings, *tensors: Tensor | None
    ) -> Tensor:
        updates = settings.updates
        y, merged = forward_pass(x, weight, bias, settings)
        ctx.settings, ctx.x_shape, ctx.has_bias = settings, x.shape, bias is not None
        ctx.source_versions = settings.source and settings.source.versions()
        some_update_learns = any(ctx.needs_input_grad[4:]) and any(any(update.budgets) for update in updates)
        thresholds = [threshold for update in updates for threshold in update.thresholds]
        pairs = zip(merged, settings.backends, strict=True) if settings.keep_delta else ()
        kept = [delta for one in pairs for delta in _to_keep(*one)]
        ctx.num_thresholds = len(thresholds)
        needs_x = some_update_learns or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_x else None, weight, *thresholds, *kept, *tensors)
        return without_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        settings, kept = _restore(ctx.settings, ctx.num_thresholds, rest)
        if settings.source is not None:
            settings.source.check_unchanged(ctx.source_versions)
        needs_x, needs_weight, needs_bias, _, *of_tensors = ctx.needs_input_grad
        needs = Needs(needs_x, needs_weight, needs_bias and ctx.has_bias, tuple(of_tensors))
        grad_x, grad_weight, grad_bias, grads = backward_pass(grad_y, x, ctx.x_shape, weight, settings, kept, needs)
        return (grad_x, grad_weight, grad_bias, None, *grads)


def _restore(
    settings: Settings, num_thresholds: int, saved: Sequence[Tensor]
) -> tuple[Settings, list[list[Tensor | None]]]:
    """The settings over the saved tensors, and the kept matrices of each update."""
    thresholds = list(saved[:num_thresholds])
    tensors = list(saved[len(saved) - len(settings.updates) * TENSORS_PER_UPDATE :])
    deltas = list(saved[num_thresholds : len(saved) - len(tensors)])
    updates: list[Update] = []
    kept: list[list[Tensor | None]] = []
    for update in settings.updates:
        count = len(update.row_counts)
        restored = update.with_tensors(tuple(tensors[:TENSORS_PER_UPDATE]))
        restored.thresholds = thresholds[:count]
        updates.append(restored)
        kept.append(list(deltas[:count]))
        del tensors[:TENSORS_PER_UPDATE], thresholds[:count], deltas[:count]
    return replace(settings, updates=tuple(updates)), kept


def _to_keep(merged: Sequence[Merged | None], backend: Backend) -> list[Tensor | None]:
    """What `keep_delta` keeps of one update; an empty tensor where its backend rather rebuilds it."""
    if isinstance(backend, FusedBackend) and not backend.keeps_delta:
        return [None if one is None else one.delta.new_empty(0) for one in merged]
    return [None if one is None else one.delta for one in merged]


def _restored(update: Update, backend: Backend, kept: Sequence[Tensor | None]) -> list[Merged | None]:
    """The merged matrices: kept ones, or merged anew."""
    # a fused backend that rebuilds as fast as it reads had nothing to keep
    if kept and all(delta is None or delta.numel() for delta in kept):
        return [None if delta is None else Merged(delta) for delta in kept]
    return merge_groups(update, backend)


def _weight_and_gradients(
    settings: Settings,
    weight: Tensor | None,
    merged: Sequence[Sequence[Merged | None]],
    grad_weight: Tensor | None,
    dtype: torch.dtype,
    needs: Needs,
) -> tuple[Tensor, list[Sequence[Tensor | None]] | None]:
    """The effective weight; with it the gradients to the update's tensors, where a backend forms both in one pass."""
    updates, backends, shape = settings.updates, settings.backends, settings.weight_shape
    is_made_here = settings.source is not None
    weight = settings.base(weight)
    is_one = len(updates) == 1 and isinstance(backends[0], FusedBackend) and backends[0].adds_while_differentiating
    if not is_one or weight is None or grad_weight is None or not any(needs.tensors):
        total = add_updates(weight, updates, shape, merged, backends, dtype, is_made_here=is_made_here)
        return total.to(dtype), None
    base, effective = _base_and_target(weight, shape, dtype, is_made_here)
    grad, target = grad_weight.reshape(shape[0], -1), effective.view(shape[0], -1)
    found = cast(FusedBackend, backends[0]).group_gradients(updates[0], merged[0], grad, base, target)
    return effective.to(dtype), [found]


def _gradient_where_kept(
    update: Update, merged: Sequence[Merged | None], backend: Backend, grad_y: Tensor, x: Tensor
) -> Tensor:
    """∂L/∂W `[m, n]` of a linear layer where `S` is not zero; frozen and very sparse matrices need no whole product."""
    grad_y, x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
    sampled = {
        group
        for group, one in enumerate(merged)
        if one is not None and isinstance(backend, FusedBackend) and backend.samples_gradient(update, group)
    }
    if not sampled and None not in merged:
        return grad_y.T @ x
    dtype = torch.promote_types(x.dtype, torch.float32)
    result = torch.zeros(update.num_rows, x.shape[1], dtype=dtype, device=x.device)
    for group, (rows, one) in enumerate(zip(update.rows, merged, strict=True)):
        if one is None:
            continue
        if group in sampled and isinstance(backend, FusedBackend):
            backend.sample_gradient(update, group, one, grad_y[:, rows], x, result[rows])
        else:
            result[rows] = grad_y[:, rows].T @ x
    return result


def _update_gradients(
    update: Update,
    merged: Sequence[Merged | None],
    grad_weight: Tensor | None,
    weight_shape: torch.Size,
    backend: Backend,
) -> tuple[Tensor | None, ...]:
    """Gradients to `update.tensors()`, given ∂L/∂W of the effective weight; zero for matrices without budget."""
    grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in update.tensors()]
    if isinstance(backend, FusedBackend):
        if grad_weight is None:
            return tuple(grads)
        return backend.group_gradients(update, merged, grad_weight.reshape(weight_shape[0], -1))
    for group, (factors, rows, one) in enumerate(zip(update.group_factors(), update.rows, merged, strict=True)):
        if one is None or grad_weight is None:
            continue
        grad = grad_weight.reshape(weight_shape[0], -1)[rows]
        found = backend.factor_gradients(update, group, factors, one, grad)
        for k, value in enumerate(found):
            into = grads[k]
            if value is not None and into is not None:
                (into[rows] if k == 1 else into[group]).copy_(value)
    return tuple(grads)
