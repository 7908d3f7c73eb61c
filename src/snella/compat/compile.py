"""Adapted layer in a `torch.compile` graph: custom operators for its forward and backward pass.

A graph cannot detect changes between calls, so nothing is cached. The first update is folded into the base weight; the
others are added to the output. The operator calls the functions of `autograd` with the backend of the update's spec;
the compiler traces only shapes. Budgets are a tensor, so a reallocation does not trigger recompilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from snella.autograd import LayerCall, RequiredGrads, backward_pass, forward_pass
from snella.compat.hooks import is_hooked_in_graph
from snella.forward import add_branches, prepare_input
from snella.update import Factors, LayerOp, LinearOp, Update, UpdateSpec, layer_op_from_ints

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


def forward_in_graph(layer: SnellaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply the base layer with the updates of all active adapters."""
    names = [name for name in layer.active_adapters if name in layer.snella_A]
    if layer.quantization is None and (layer.disable_adapters or layer.merged or not names):
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        return y
    base = layer._modules.get("base_layer")
    is_opaque = layer.quantization is not None or (
        base is not None and is_hooked_in_graph(base, layer._base_hook_dicts)
    )
    if is_opaque:
        return _forward_outside_graphs(layer, x, *args, **kwargs)
    _set_applied(layer)
    weight, bias, dtype, op = cast(Tensor, layer._weight()), layer.bias, x.dtype, layer._op()
    is_autocast = torch.is_autocast_enabled(x.device.type)
    x = prepare_input(layer, x, weight.dtype)
    x = x.to(torch.get_autocast_dtype(x.device.type) if is_autocast else weight.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    plan = layer._plan_updates(names, with_branches=True, in_graph=True)
    first, others = plan.updates[:1], plan.updates[1:]
    y = _apply(layer, x, plan.names[0], first[0], op, weight, bias) if first else op(x, weight.to(x.dtype), bias)
    for name, update in zip(plan.names[1:], others, strict=True):
        y = y + _apply(layer, x, name, update, op).to(y.dtype)
    if plan.branches:

        def apply(dropped: Tensor, name: str) -> Tensor:
            (update,) = layer._plan_updates([name], in_graph=True).updates
            return _apply(layer, dropped, name, update, op)

        y = add_branches(layer, y, x, plan.branches, apply)
    return y if is_autocast else y.to(dtype)


def weight_in_graph(layer: SnellaLayer, names: list[str]) -> Tensor:
    """Return `W0 + Σ scaling·S`, `[m, …]`, as a product with the identity, which the compiler removes if unused."""
    _set_applied(layer)
    weight, op = cast(Tensor, layer._weight()), LinearOp()
    matrix = weight.reshape(weight.shape[0], -1)
    plan = layer._plan_updates(names, in_graph=True)
    with torch.autocast(weight.device.type, enabled=False):
        identity = torch.eye(matrix.shape[1], dtype=weight.dtype, device=weight.device)
        total: Tensor | None = None
        for name, update in zip(plan.names, plan.updates, strict=True):
            folded = matrix if total is None else None
            y = _apply(layer, identity, name, update, op, folded, shape=matrix.shape)
            total = y if total is None else total + y.to(total.dtype)
    return cast(Tensor, total).T.reshape(weight.shape)


def _apply(
    layer: SnellaLayer,
    x: Tensor,
    name: str,
    update: Update,
    op: LayerOp,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shape: torch.Size | None = None,
) -> Tensor:
    """Apply the layer op with one update, with or without the base weight."""
    shape = layer._weight().shape if shape is None else shape
    budgets = layer.snella_budget[name]
    return adapted_layer_in_graph(x, weight, bias, update.spec, update.factors, budgets, op, shape)


def _set_applied(layer: SnellaLayer) -> None:
    """Set `is_applied`, except in an exported program, which does not have the attribute."""
    if not torch.compiler.is_exporting():
        layer.is_applied = True


@torch.compiler.disable
def _forward_outside_graphs(layer: SnellaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `forward` outside compiled graphs."""
    y: Tensor = layer.forward(x, *args, **kwargs)
    return y


def adapted_layer_in_graph(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: UpdateSpec,
    factors: Factors,
    budgets: Tensor,
    op: LayerOp,
    weight_shape: torch.Size,
) -> Tensor:
    """Apply a layer with one update; the counterpart of `adapted_layer` for `torch.compile(fullgraph=True)`.

    Args:
        x: Input, in the dtype of the layer op.
        weight: `[m, …]`, or `None` to apply only the update.
        bias: `[m]` or `None`.
        spec: Settings of the update.
        factors: Factors and scalars of the update.
        budgets: `[G]`, integers. The operator reads them, which synchronizes with the device.
        op: The layer's operation.
        weight_shape: Shape of the weight.
    """
    tensors = [tensor for tensor in factors if tensor is not None]
    is_present = [int(tensor is not None) for tensor in factors]
    sections = (spec.to_ints(), is_present, list(weight_shape), op.to_ints(weight_shape))
    ints = [value for section in sections for value in (len(section), *section)]
    return _adapted_layer(x, weight, bias, tensors, budgets, ints, spec.scaling)[0]


def _sections(ints: Sequence[int]) -> list[list[int]]:
    """Unpack the length-prefixed sections that `adapted_layer_in_graph` packed."""
    sections, start = [], 0
    while start < len(ints):
        stop = start + 1 + ints[start]
        sections.append(list(ints[start + 1 : stop]))
        start = stop
    return sections


def _decode_call(ints: Sequence[int]) -> LayerCall:
    """Decode the layer op and the shape of the weight."""
    _, _, shape, op = _sections(ints)
    return LayerCall(layer_op_from_ints(op), torch.Size(shape))


def _decode_update(
    tensors: Sequence[Tensor],
    budgets: Tensor,
    ints: Sequence[int],
    scaling: float,
    thresholds: Tensor | None = None,
) -> Update:
    """Decode the update."""
    spec, is_present, _, _ = _sections(ints)
    remaining = iter(tensors)
    factors = Factors(*[next(remaining).detach() if present else None for present in is_present])  # type: ignore[arg-type]
    counts = tuple([int(budget) for budget in budgets.tolist()])
    return Update(UpdateSpec.from_ints(spec, scaling), factors, counts, thresholds)


@torch.library.custom_op("snella::adapted_layer", mutates_args=())
def _adapted_layer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    budgets: Tensor,
    ints: Sequence[int],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return `y` and the thresholds `[G]`."""
    y, (merged,), _ = forward_pass(
        x, weight, bias, [_decode_update(tensors, budgets, ints, scaling)], _decode_call(ints)
    )
    return y, merged.thresholds


@_adapted_layer.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    budgets: Tensor,
    ints: Sequence[int],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    call = _decode_call(ints)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return call.op(x, x.new_empty(call.weight_shape), None), tensors[0].new_empty(budgets.shape[0], dtype=dtype)


@torch.library.custom_op("snella::adapted_layer_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    thresholds: Tensor,
    budgets: Tensor,
    ints: Sequence[int],
    scaling: float,
    required: Sequence[bool],
) -> list[Tensor]:
    """Return the required gradients in the order x, weight, bias, tensors."""
    update = _decode_update(tensors, budgets, ints, scaling, thresholds)
    flags = iter(required[3:])
    needs = RequiredGrads(
        required[0], required[1], required[2], tuple([tensor is not None and next(flags) for tensor in update.factors])
    )
    needed_x = x if needs.weight or any(needs.factors) else None
    *first, grads = backward_pass(grad_y, needed_x, x.shape, weight, [update], _decode_call(ints), needs)
    return [grad.contiguous() for grad in (*first, *grads) if grad is not None]


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    thresholds: Tensor,
    budgets: Tensor,
    ints: Sequence[int],
    scaling: float,
    required: Sequence[bool],
) -> list[Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format)] if required[0] else []
    if required[1] and weight is not None:
        grads.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if required[2]:
        grads.append(grad_y.new_empty(_decode_call(ints).weight_shape[0]))
    contiguous = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    return grads + [tensor for tensor, need in zip(contiguous, required[3:], strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the tensors for the backward pass."""
    x, weight, bias, tensors, budgets, *ctx.settings = inputs
    ctx.has_bias, ctx.num_tensors = bias is not None, len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, budgets, output[1], *tensors)


def _differentiate(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Return gradients in the structure of the forward pass's arguments."""
    empty = (None,) * 7
    if grad_y is None:
        return (*empty[:3], [None] * ctx.num_tensors, *empty[4:])
    x, weight, budgets, thresholds, *tensors = ctx.saved_tensors
    needs_tensors = [tensor.requires_grad for tensor in tensors]
    needs_bias = ctx.has_bias and ctx.needs_input_grad[2]
    required = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[1], needs_bias, *needs_tensors]
    computed = iter(_backward(grad_y, x, weight, tensors, thresholds, budgets, *ctx.settings, required))
    grad_x, grad_weight, grad_bias, *grads = (next(computed) if need else None for need in required)
    return grad_x, grad_weight, grad_bias, grads, *empty[4:]


_adapted_layer.register_autograd(_differentiate, setup_context=_setup_context)
