"""The adapted layer with a backward pass written by hand, which rebuilds the update instead of keeping it.

Kept for the backward pass: the input, the factors and scalars (which live in the model anyway) and one threshold a
matrix. The derivation is in this folder's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snella.ops.kernels import MergeGradients
from snella.ops.sparsify import sparsify, sparsify_slope

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
    keep_delta: bool = False,
) -> Tensor:
    """Same contract as `adapted_product`."""
    tensors = [tensor for update in updates for tensor in update.tensors()]
    return _AdaptedProduct.apply(x, weight, bias, updates, product, weight_shape, keep_delta, *tensors)


def merge_groups(update: Update) -> list[Tensor | None]:
    """Return `ΔW` of each matrix, `[rows, n]`; `None` where the budget is 0, so that nothing is merged in vain."""
    return [
        update.merge(factors) if budget else None
        for factors, budget in zip(update.group_factors(), update.budgets, strict=True)
    ]


def fill_thresholds(update: Update, deltas: Sequence[Tensor | None]) -> None:
    """Make sure that `update.thresholds` holds the threshold of every matrix."""
    for group, delta in enumerate(deltas):
        if delta is None and len(update.thresholds) <= group:
            update.thresholds.append(update.B.new_full((), torch.inf))
        elif delta is not None:
            update.threshold_of(group, delta)


def effective_weight_eager(
    weight: Tensor | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    deltas: Sequence[Sequence[Tensor | None]],
) -> Tensor:
    """Return `W0 + Σ scaling·S` from merged matrices whose thresholds are known; values as `effective_weight`."""
    dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
    for update in updates:
        dtype = torch.promote_types(dtype, update.A.dtype)
    if weight is None:
        total = torch.zeros(weight_shape, dtype=dtype, device=updates[0].A.device)
    else:
        # contiguous, so that it can be seen as a matrix: the weight itself may be laid out channels last
        total = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    flat = total.view(weight_shape[0], -1)
    for update, merged in zip(updates, deltas, strict=True):
        for rows, delta, threshold in zip(update.rows, merged, update.thresholds, strict=True):
            if delta is not None:
                flat[rows] += update.scaling * sparsify(delta, threshold, update.mode)
    return total if weight is None else total.to(weight.dtype)


class _AdaptedProduct(torch.autograd.Function):
    """`y = product(x, W0 + Σ scaling·S) + bias`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        updates: Sequence[Update],
        product: Product,
        weight_shape: torch.Size,
        keep_delta: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            deltas = [merge_groups(update) for update in updates]
            for update, merged in zip(updates, deltas, strict=True):
                fill_thresholds(update, merged)
            y = product(x, effective_weight_eager(weight, updates, weight_shape, deltas).to(x.dtype), bias)
        ctx.updates, ctx.product, ctx.weight_shape = updates, product, weight_shape
        ctx.x_shape, ctx.has_bias, ctx.keep_delta = x.shape, bias is not None, keep_delta
        some_update_learns = any(ctx.needs_input_grad[7:]) and any(any(update.budgets) for update in updates)
        thresholds = [threshold for update in updates for threshold in update.thresholds]
        kept = [delta for merged in deltas for delta in merged] if keep_delta else []
        ctx.num_thresholds = len(thresholds)
        needs_x = some_update_learns or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_x else None, weight, *thresholds, *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        updates, deltas = _restore(ctx, rest)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads: list[Tensor | None] = [None] * (len(updates) * _TENSORS_PER_UPDATE)
        grad_x = grad_weight = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if needs_x:
                effective = effective_weight_eager(weight, updates, ctx.weight_shape, deltas).to(grad_y.dtype)
                grad_x = ctx.product.grad_input(grad_y, effective, ctx.x_shape)
                del effective
            if x is not None:
                grad_weight = ctx.product.grad_weight(grad_y, x, ctx.weight_shape)
            for k, (update, merged) in enumerate(zip(updates, deltas, strict=True)):
                needed = ctx.needs_input_grad[7 + k * _TENSORS_PER_UPDATE :][:_TENSORS_PER_UPDATE]
                if any(needed):
                    found = _update_gradients(update, merged, grad_weight, ctx.weight_shape)
                    start = k * _TENSORS_PER_UPDATE
                    grads[start : start + _TENSORS_PER_UPDATE] = [
                        grad if need else None for grad, need in zip(found, needed, strict=True)
                    ]
            grad_bias = ctx.product.grad_bias(grad_y) if needs_bias and ctx.has_bias else None
        if needs_weight and weight is not None and grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return (grad_x, grad_weight if needs_weight else None, grad_bias, None, None, None, None, *grads)


def _restore(ctx: Any, saved: Sequence[Tensor]) -> tuple[list[Update], list[list[Tensor | None]]]:
    """Rebuild the updates over the saved tensors, and their merged matrices: kept ones, or merged anew."""
    thresholds = list(saved[: ctx.num_thresholds])
    tensors = list(saved[len(saved) - len(ctx.updates) * _TENSORS_PER_UPDATE :])
    kept = list(saved[ctx.num_thresholds : len(saved) - len(tensors)])
    updates: list[Update] = []
    deltas: list[list[Tensor | None]] = []
    for update in ctx.updates:
        restored = update.with_tensors(tuple(tensors[:_TENSORS_PER_UPDATE]))
        restored.thresholds = thresholds[: len(update.row_counts)]
        updates.append(restored)
        deltas.append([*kept[: len(update.row_counts)]] if ctx.keep_delta else merge_groups(restored))
        del tensors[:_TENSORS_PER_UPDATE], thresholds[: len(update.row_counts)], kept[: len(update.row_counts)]
    return updates, deltas


def _update_gradients(
    update: Update, deltas: Sequence[Tensor | None], grad_weight: Tensor | None, weight_shape: torch.Size
) -> tuple[Tensor | None, ...]:
    """Gradients to `update.tensors()`, given ∂L/∂W of the effective weight; zero for matrices without budget."""
    grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in update.tensors()]
    for group, (factors, rows, delta) in enumerate(zip(update.group_factors(), update.rows, deltas, strict=True)):
        if delta is None or grad_weight is None:
            continue
        grad_sparse = grad_weight.reshape(weight_shape[0], -1)[rows].to(delta.dtype)
        slope = sparsify_slope(delta, update.thresholds[group], update.mode)
        found: MergeGradients = update.kernel.vjp(*factors, slope.mul_(grad_sparse).mul_(update.scaling))
        for k, grad in enumerate(found):
            into = grads[k]
            if grad is not None and into is not None:
                (into[rows] if k == 1 else into[group]).copy_(grad)
    return tuple(grads)
