"""The adapted layer with a backward pass written by hand, which rebuilds the update instead of keeping it.

Kept for the backward pass: the input, the factors and scalars (which live in the model anyway) and one threshold a
matrix. The derivation is in this folder's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import Backend, Merged
from .products import Product
from .update import Update

_TENSORS_PER_UPDATE = 6  # A, B and the four kernel scalars: Update.tensors()


def adapted_product_eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    product: Product,
    weight_shape: torch.Size,
    backends: Sequence[Backend],
    keep_delta: bool = False,
) -> Tensor:
    """Same contract as `adapted_product`."""
    tensors = [tensor for update in updates for tensor in update.tensors()]
    settings = _Settings(tuple(updates), product, weight_shape, tuple(backends), keep_delta)
    return _AdaptedProduct.apply(x, weight, bias, settings, *tensors)


@dataclass(frozen=True)
class _Settings:
    """What the op is told besides tensors."""

    updates: tuple[Update, ...]
    product: Product
    weight_shape: torch.Size
    backends: tuple[Backend, ...]
    keep_delta: bool


def merge_groups(update: Update, backend: Backend) -> list[Merged | None]:
    """Merge every matrix and make sure that its threshold is known; `None` where the budget is 0."""
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
) -> Tensor:
    """Return `W0 + Σ scaling·S` from merged matrices; values as `effective_weight`."""
    dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
    for update in updates:
        dtype = torch.promote_types(dtype, update.A.dtype)
    # contiguous, so that it can be seen as a matrix: the weight itself may be transposed or laid out channels last
    if weight is None:
        base = torch.zeros(weight_shape, dtype=dtype, device=updates[0].A.device)
    else:
        base = weight.detach().to(dtype).contiguous()
    # a base that was made here is written over, the model's own weight is not
    owned = weight is None or base.data_ptr() != weight.data_ptr()
    total = base if owned else torch.empty_like(base)
    source, target = base.view(weight_shape[0], -1), total.view(weight_shape[0], -1)
    for update, groups, backend in zip(updates, merged, backends, strict=True):
        for group, (rows, one) in enumerate(zip(update.rows, groups, strict=True)):
            if one is not None:
                backend.add_sparse(update, group, one, source[rows], target[rows])
            elif source is not target:
                target[rows] = source[rows]
        source = target
    return total if weight is None else total.to(weight.dtype)


def effective_weight_eager(
    weight: Tensor | None, updates: Sequence[Update], weight_shape: torch.Size, backends: Sequence[Backend]
) -> Tensor:
    """Return `W0 + Σ scaling·S` without gradients, with the bits that the adapted layer uses."""
    with torch.no_grad():
        merged = [merge_groups(update, backend) for update, backend in zip(updates, backends, strict=True)]
        return add_updates(weight, updates, weight_shape, merged, backends)


class _AdaptedProduct(torch.autograd.Function):
    """`y = product(x, W0 + Σ scaling·S) + bias`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: _Settings, *tensors: Tensor | None
    ) -> Tensor:
        updates, backends = settings.updates, settings.backends
        with torch.autocast(x.device.type, enabled=False):
            merged = [merge_groups(update, backend) for update, backend in zip(updates, backends, strict=True)]
            effective = add_updates(weight, updates, settings.weight_shape, merged, backends).to(x.dtype)
            y = settings.product(x, effective, bias)
        ctx.settings, ctx.x_shape, ctx.has_bias = settings, x.shape, bias is not None
        some_update_learns = any(ctx.needs_input_grad[4:]) and any(any(update.budgets) for update in updates)
        thresholds = [threshold for update in updates for threshold in update.thresholds]
        kept = [one and one.delta for groups in merged for one in groups] if settings.keep_delta else []
        ctx.num_thresholds = len(thresholds)
        needs_x = some_update_learns or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_x else None, weight, *thresholds, *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        settings: _Settings = ctx.settings
        product, shape = settings.product, settings.weight_shape
        x, weight, *rest = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads: list[Tensor | None] = []
        grad_x = grad_weight = None
        with torch.autocast(grad_y.device.type, enabled=False):
            updates, merged = _restore(settings, ctx.num_thresholds, rest)
            if needs_x:
                effective = add_updates(weight, updates, shape, merged, settings.backends).to(grad_y.dtype)
                grad_x = product.grad_input(grad_y, effective, ctx.x_shape)
                del effective
            if x is not None:
                grad_weight = product.grad_weight(grad_y, x, shape)
            for k, (update, groups) in enumerate(zip(updates, merged, strict=True)):
                needed = ctx.needs_input_grad[4 + k * _TENSORS_PER_UPDATE :][:_TENSORS_PER_UPDATE]
                if any(needed):
                    found = _update_gradients(update, groups, grad_weight, shape, settings.backends[k])
                    grads.extend(grad if need else None for grad, need in zip(found, needed, strict=True))
                else:
                    grads.extend([None] * _TENSORS_PER_UPDATE)
            grad_bias = product.grad_bias(grad_y) if needs_bias and ctx.has_bias else None
        if needs_weight and weight is not None and grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return (grad_x, grad_weight if needs_weight else None, grad_bias, None, *grads)


def _restore(
    settings: _Settings, num_thresholds: int, saved: Sequence[Tensor]
) -> tuple[list[Update], list[list[Merged | None]]]:
    """Rebuild the updates over the saved tensors, and their merged matrices: kept ones, or merged anew."""
    thresholds = list(saved[:num_thresholds])
    tensors = list(saved[len(saved) - len(settings.updates) * _TENSORS_PER_UPDATE :])
    kept = list(saved[num_thresholds : len(saved) - len(tensors)])
    updates: list[Update] = []
    merged: list[list[Merged | None]] = []
    for update, backend in zip(settings.updates, settings.backends, strict=True):
        count = len(update.row_counts)
        restored = update.with_tensors(tuple(tensors[:_TENSORS_PER_UPDATE]))
        restored.thresholds = thresholds[:count]
        updates.append(restored)
        if settings.keep_delta:
            merged.append([None if delta is None else Merged(delta) for delta in kept[:count]])
        else:
            merged.append(merge_groups(restored, backend))
        del tensors[:_TENSORS_PER_UPDATE], thresholds[:count], kept[:count]
    return updates, merged


def _update_gradients(
    update: Update,
    merged: Sequence[Merged | None],
    grad_weight: Tensor | None,
    weight_shape: torch.Size,
    backend: Backend,
) -> tuple[Tensor | None, ...]:
    """Gradients to `update.tensors()`, given ∂L/∂W of the effective weight; zero for matrices without budget."""
    grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in update.tensors()]
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
