"""A product whose weight has some entries of its own: `y = product(x, W0 + entries) + bias`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapted_linear.products import Product, without_view
from .adapted_linear.weight_source import WeightSource


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
