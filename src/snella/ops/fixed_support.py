"""Updates whose support is fixed instead of competed for: single entries of a merged matrix, and their product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snella.ops.spec import Product, Update, WeightSource, without_view


def merged_entries(update: Update, indices: Tensor) -> Tensor:
    """The entries of `scaling·ΔW` at fixed positions; nothing of the size of `ΔW` is kept for the backward pass.

        values[k] = scaling · ΔW[i, j],   indices[k] = i·n + j

    Args:
        update: Factors, scalars, kernel and scaling; its budgets, thresholds and mode play no part.
        indices: Positions in the flattened `[m, n]`, ascending, on the factors' device.

    Returns:
        `[len(indices)]`, in the dtype of the merge, differentiable with respect to `update.tensors()`.
    """
    return _MergedEntries.apply(update, indices, *update.tensors())


def _positions(update: Update, indices: Tensor) -> list[tuple[slice, Tensor]]:
    """For each matrix the part of `indices` that lies in it, and the positions within it."""
    columns = update.A.shape[1]
    starts = torch.tensor([rows.start * columns for rows in update.rows] + [update.num_rows * columns])
    cuts: Sequence[int] = torch.searchsorted(indices, starts.to(indices)).tolist()
    return [
        (slice(start, stop), indices[start:stop].long() - int(offset))
        for start, stop, offset in zip(cuts[:-1], cuts[1:], starts[:-1].tolist(), strict=True)
    ]


class _MergedEntries(torch.autograd.Function):
    """`scaling·ΔW[indices]`, with ΔW merged anew in the backward pass by the kernel's own derivative."""

    @staticmethod
    def forward(ctx: Any, update: Update, indices: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.update = update
        ctx.save_for_backward(indices, *tensors)
        parts = []
        for factors, (_, where) in zip(update.group_factors(), _positions(update, indices), strict=True):
            parts.append(update.merge(factors).flatten()[where])
        return torch.cat(parts) * update.scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        indices, *tensors = ctx.saved_tensors
        update: Update = ctx.update.with_tensors(tuple(tensors))
        grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in tensors]
        groups = zip(update.group_factors(), update.rows, _positions(update, indices), strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            for group, (factors, rows, (part, where)) in enumerate(groups):
                if not len(where):
                    continue
                dense = torch.zeros(len(factors.B), len(factors.A), dtype=factors.A.dtype, device=grad.device)
                dense.view(-1)[where] = (grad[part] * update.scaling).to(dense.dtype)
                for k, value in enumerate(update.kernel.vjp(*factors, dense)):
                    into = grads[k]
                    if value is not None and into is not None:
                        (into[rows] if k == 1 else into[group]).copy_(value)
        return None, None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[2:], strict=True))


def sparse_product(
    x: Tensor, weight: Tensor | WeightSource, bias: Tensor | None, values: Tensor, indices: Tensor, product: Product
) -> Tensor:
    """Apply a layer whose weight has `values` added at single positions.

        y = product(x, W) + bias,   W = weight, W[indices[k]] += values[k]

    Kept for the backward pass are the input, the frozen weight itself and the values; `W` is made anew there.

    Args:
        x: Input of the layer, in the dtype to compute in.
        weight: `[m, …]`, or where to get it in both passes.
        bias: `[m]` or `None`.
        values: `[K]`, differentiable.
        indices: Positions in the flattened weight, `[K]`, integer, each at most once.
        product: The layer's product.
    """
    source = weight if isinstance(weight, WeightSource) else None
    return _SparseProduct.apply(x, None if source else weight, bias, values, indices, product, source)


def fold_entries(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """`weight` with `values` added at the flattened positions `indices`; each sum is rounded once to its dtype."""
    flat = weight.reshape(-1)
    where = indices.long()
    sums = (flat[where].to(values.dtype) + values).to(weight.dtype)
    return flat.index_put((where,), sums).view(weight.shape)


class _SparseProduct(torch.autograd.Function):
    """`product(x, fold_entries(weight, values, indices)) + bias`, which remembers no weight besides the frozen one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        product: Product,
        source: WeightSource | None,
    ) -> Tensor:
        ctx.product, ctx.x_shape, ctx.has_bias, ctx.source = product, x.shape, bias is not None, source
        ctx.source_versions = source and source.versions()
        needs_x = ctx.needs_input_grad[1] or (ctx.needs_input_grad[3] and len(values))
        ctx.save_for_backward(x if needs_x else None, weight, values, indices)
        with torch.autocast(x.device.type, enabled=False):
            effective = fold_entries(_matrix(weight, source), values, indices).to(x.dtype)
            return without_view(product(x, effective, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
        product: Product = ctx.product
        if ctx.source is not None:
            ctx.source.check_unchanged(ctx.source_versions)
        grad_x = grad_weight = grad_bias = grad_values = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if needs_x:
                effective = fold_entries(_matrix(weight, ctx.source), values, indices).to(grad_y.dtype)
                grad_x = product.grad_input(grad_y, effective, ctx.x_shape)
                del effective
            if needs_bias and ctx.has_bias:
                grad_bias = product.grad_bias(grad_y)
            if x is not None:
                # of the weight's size, for this layer and this moment; picking out single entries first costs more
                # time than the product from about one entry in 400 on
                grad_weight = product.grad_weight(grad_y, x, (weight if ctx.source is None else ctx.source).shape)
            if needs_values:
                grad_values = torch.zeros_like(values)
                if grad_weight is not None:
                    grad_values.copy_(grad_weight.reshape(-1)[indices.long()])
        grad_weight = grad_weight.to(weight.dtype) if needs_weight and grad_weight is not None else None
        return grad_x, grad_weight, grad_bias, grad_values, None, None, None


def _matrix(weight: Tensor | None, source: WeightSource | None) -> Tensor:
    """The weight itself, or made anew, wide enough for what is added to it."""
    return cast(Tensor, weight) if source is None else source.make_wide()
