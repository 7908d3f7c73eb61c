"""The adapted product as an operator that `torch.compile` puts into its graph as it stands, forward and backward.

What happens inside is `eager`'s, with the backends that it would use; the compiler sees shapes only. Budgets come as a
tensor, so that the allocator's changes do not compile the model anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snella.ops.autograd import Needs, Settings, backward_pass, forward_pass
from snella.ops.backends import choose_backend
from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.spec import Conv2dProduct, LinearProduct, Product, Update

_NUM_SCALARS = len(KernelScalars._fields)


def adapted_product_in_graph(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    update: Update,
    budgets: Tensor,
    product: Product,
    weight_shape: torch.Size,
    impl: str,
) -> Tensor:
    """Same value as `adapted_product` with one update; `torch.compile(fullgraph=True)` can trace it.

    Args:
        x: Input, in the dtype of the product.
        weight: `[m, …]`, or `None` for the update alone.
        bias: `[m]` or `None`.
        update: Its `budgets` and `thresholds` are not read.
        budgets: `[G]`, integers. Reading them waits for the device.
        product: The layer's product.
        weight_shape: Shape of the weight.
        impl: As in `adapted_product`.
    """
    kernel = update.kernel
    tensors = [tensor for tensor in update.tensors() if tensor is not None]
    has = [int(value is not None) for value in update.scalars]
    layout = [kernel.num_pieces, kernel.softmax_dim, int(kernel.center_softmax), *has]
    layout += [len(update.row_counts), *update.row_counts, len(weight_shape), *weight_shape]
    if isinstance(product, Conv2dProduct):
        layout += [*product.stride, *product.padding_sizes(weight_shape), *product.dilation, product.groups]
    names = f"{kernel.name} {update.mode} {impl}"
    return _adapted_product(x, weight, bias, tensors, budgets, layout, names, update.scaling)[0]


def _product_of(layout: Sequence[int]) -> tuple[tuple[int, ...], torch.Size, Product]:
    """Row counts, shape of the weight and product out of a layout."""
    rest = list(layout[3 + _NUM_SCALARS :])
    row_counts, rest = tuple(rest[1 : 1 + rest[0]]), rest[1 + rest[0] :]
    shape, rest = torch.Size(rest[1 : 1 + rest[0]]), rest[1 + rest[0] :]
    if not rest:
        return row_counts, shape, LinearProduct()
    return row_counts, shape, Conv2dProduct(tuple(rest[:2]), tuple(rest[2:4]), tuple(rest[4:6]), rest[6])


def _settings(
    tensors: Sequence[Tensor], budgets: Tensor, layout: Sequence[int], names: str, scaling: float
) -> Settings:
    """What `eager` is told."""
    name, mode, impl = names.split()
    num_pieces, softmax_dim, center_softmax, *has = layout[: 3 + _NUM_SCALARS]
    row_counts, shape, product = _product_of(layout)
    kernel = make_kernel(name, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=bool(center_softmax))
    A, B, *given = (tensor.detach() for tensor in tensors)
    scalars = KernelScalars(*(given.pop(0) if present else None for present in has))
    counts = tuple(int(budget) for budget in budgets.tolist())
    update = Update(A, B, scalars, kernel, counts, row_counts, scaling, mode)  # type: ignore[arg-type]
    return Settings((update,), product, shape, (choose_backend(impl, update)[0],), False)


@torch.library.custom_op("snella::adapted_product", mutates_args=())
def _adapted_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    budgets: Tensor,
    layout: Sequence[int],
    names: str,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`y` and the thresholds `[G]`."""
    settings = _settings(tensors, budgets, layout, names, scaling)
    y, _ = forward_pass(x, weight, bias, settings)
    return y, torch.stack(settings.updates[0].thresholds)


@_adapted_product.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    budgets: Tensor,
    layout: Sequence[int],
    names: str,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    _, shape, product = _product_of(layout)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return product(x, x.new_empty(shape), None), tensors[0].new_empty(budgets.shape[0], dtype=dtype)


@torch.library.custom_op("snella::adapted_product_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    thresholds: Tensor,
    budgets: Tensor,
    layout: Sequence[int],
    names: str,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, in the order x, weight, bias, tensors."""
    settings = _settings(tensors, budgets, layout, names, scaling)
    settings.updates[0].thresholds = list(thresholds.unbind())
    present = [True, True, *(bool(has) for has in layout[3 : 3 + _NUM_SCALARS])]
    wanted = iter(needs[3:])
    asked = Needs(needs[0], needs[1], needs[2], tuple(has and next(wanted) for has in present))
    used = x if needs[1] or any(needs[3:]) else None
    *first, grads = backward_pass(grad_y, used, x.shape, weight, settings, [[]], asked)
    return [grad.contiguous() for grad in (*first, *grads) if grad is not None]


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    thresholds: Tensor,
    budgets: Tensor,
    layout: Sequence[int],
    names: str,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    _, shape, _ = _product_of(layout)
    found = [torch.empty_like(x, memory_format=torch.contiguous_format)] if needs[0] else []
    if needs[1] and weight is not None:
        found.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if needs[2]:
        found.append(grad_y.new_empty(shape[0]))
    contiguous = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    return found + [one for one, needed in zip(contiguous, needs[3:], strict=True) if needed]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what `eager` keeps."""
    x, weight, bias, tensors, budgets, *ctx.settings = inputs
    ctx.has_bias, ctx.num_tensors = bias is not None, len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, budgets, output[1], *tensors)


def _differentiate(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Gradients in the structure of the forward pass's arguments."""
    nothing = (None,) * 8
    if grad_y is None:
        return (*nothing[:3], [None] * ctx.num_tensors, *nothing[4:])
    x, weight, budgets, thresholds, *tensors = ctx.saved_tensors
    of_tensors = [tensor.requires_grad for tensor in tensors]
    of_bias = ctx.has_bias and ctx.needs_input_grad[2]
    needs = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[1], of_bias, *of_tensors]
    found = iter(_backward(grad_y, x, weight, tensors, thresholds, budgets, *ctx.settings, needs))
    grad_x, grad_weight, grad_bias, *grads = (next(found) if needed else None for needed in needs)
    return grad_x, grad_weight, grad_bias, grads, *nothing[4:]


_adapted_product.register_autograd(_differentiate, setup_context=_keep)
