"""The adapted layer by plain torch operations and autograd: slow, memory-hungry and obviously right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .products import Product
from .update import Update


def effective_weight(weight: Tensor | None, updates: Sequence[Update], shape: torch.Size | None = None) -> Tensor:
    """Return `W0 + Σ scaling·S`, differentiable with respect to everything.

    The sum is formed in the wider of the two dtypes and rounded once to the dtype of `weight`.

    Args:
        weight: Frozen weight, `[m, …]`, or `None` for the sum of the updates alone.
        updates: Updates of this weight.
        shape: Shape of the result where `weight` is `None`, default `[m, n]`.

    Returns:
        Shape and dtype of `weight`; without one, `shape` and the dtype that the updates were merged in.
    """
    total = weight
    for update in updates:
        delta = update.scaling * torch.cat(update.sparse_groups())
        if total is None:
            total = delta.reshape(shape) if shape is not None else delta
        else:
            total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta.reshape(total.shape)
    if total is None:
        raise ValueError("effective_weight needs a weight or at least one update, got neither")
    return total if weight is None else total.to(weight.dtype)


def adapted_product_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    product: Product,
    weight_shape: torch.Size,
) -> Tensor:
    """Same contract as `adapted_product`; autograd keeps the effective weight and every intermediate of the merge."""
    with torch.autocast(x.device.type, enabled=False):
        merged = effective_weight(weight, updates, weight_shape).to(x.dtype)
        return product(x, merged, bias)
