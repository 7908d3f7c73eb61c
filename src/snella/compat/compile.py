"""Custom operators for the forward and backward pass of an adapted layer in a `torch.compile` graph.

An adapter adds a sparse update to the layer's weight, and a budget limits the number of nonzero entries in each matrix
of the update. A graph cannot detect changes to tensors between calls, so nothing is cached. The first update is folded
into the base weight, and the results of the others are added to the output. The operators call the functions of
`snella.autograd` with the backend of the update's spec (its settings), and the compiler traces only the shapes of their
results. Budgets are passed as a tensor, so changing them does not trigger recompilation. The shape letters are defined
in `snella.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from snella.autograd import LayerCall, RequiredGrads, backward_pass, forward_pass
from snella.compat.hooks import is_hooked_in_graph
from snella.kernels import Factors
from snella.ops import LayerOp, LinearOp, check_floating_point, layer_op_from_ints, pad_input
from snella.update import Update, UpdateSpec

if TYPE_CHECKING:
    from snella.layer import SnellaLayer

_TAGS = (torch.Tag.cudagraph_unsafe,)
"""The operators read the budgets from the device, which a CUDA graph does not allow."""


def forward_in_graph(layer: SnellaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply the base layer with the updates of all active adapters."""
    names = [name for name in layer.active_adapters if name in layer.snella_A]
    # a disabled layer that is still merged must be unmerged, which `forward` does outside the graph
    if layer.quantization is not None or (layer.disable_adapters and layer.merged):
        return _forward_outside_graphs(layer, x, *args, **kwargs)
    if layer.disable_adapters or layer.merged or not names:
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        return y
    base = layer._modules.get("base_layer")
    if base is not None and is_hooked_in_graph(base, layer._base_hook_dicts):
        return _forward_outside_graphs(layer, x, *args, **kwargs)
    check_floating_point(x, layer.module_name)
    _set_applied(layer)
    weight = cast(Tensor, layer._weight())
    bias = layer.bias
    dtype = x.dtype
    op = layer._op()
    shape = weight.shape

    def apply(x: Tensor, name: str, update: Update, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Apply an adapter's update, and the base weight and bias if given."""
        budgets = layer.snella_budget[name]
        return adapted_layer_in_graph(x, weight, bias, update.spec, update.factors, budgets, op, shape)

    is_autocast = torch.is_autocast_enabled(x.device.type)
    if is_autocast:
        x = pad_input(layer.get_base_layer(), x).to(torch.get_autocast_dtype(x.device.type))
    else:
        x = pad_input(layer.get_base_layer(), x.to(weight.dtype))
    bias = bias if bias is None else bias.to(x.dtype)
    plan = layer._plan_updates(names, with_branches=True, in_graph=True)
    y = apply(x, plan.names[0], plan.updates[0], weight, bias) if plan.updates else op(x, weight.to(x.dtype), bias)
    for name, update in zip(plan.names[1:], plan.updates[1:], strict=True):
        y = y + apply(x, name, update).to(y.dtype)
    if plan.branches:

        def apply_branch(dropped: Tensor, name: str) -> Tensor:
            """Apply an adapter's update to its input after dropout."""
            (update,) = layer._plan_updates([name], in_graph=True).updates
            return apply(dropped, name, update)

        y = plan.add_branches(layer, y, x, apply_branch)
    return y if is_autocast else y.to(dtype)


def weight_in_graph(layer: SnellaLayer, names: list[str]) -> Tensor:
    """Return the effective weight `W0 + Σ scaling·S`, `[m, …]`.

    It is computed as a product with the identity matrix. The compiler removes this product if the result is unused.
    """
    _set_applied(layer)
    weight = cast(Tensor, layer._weight())
    op = LinearOp()
    matrix = weight.reshape(weight.shape[0], -1)
    plan = layer._plan_updates(names, in_graph=True)
    with torch.autocast(weight.device.type, enabled=False):
        identity = torch.eye(matrix.shape[1], dtype=weight.dtype, device=weight.device)
        total: Tensor | None = None
        for name, update in zip(plan.names, plan.updates, strict=True):
            # only the first product includes the base weight
            base = matrix if total is None else None
            budgets = layer.snella_budget[name]
            y = adapted_layer_in_graph(identity, base, None, update.spec, update.factors, budgets, op, matrix.shape)
            total = y if total is None else total + y.to(total.dtype)
    return cast(Tensor, total).T.reshape(weight.shape)


def _set_applied(layer: SnellaLayer) -> None:
    """Set `is_applied`, except during an export, because exported programs do not have this attribute."""
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
    """Apply a layer with one update, like `adapted_layer`, but inside `torch.compile(fullgraph=True)`.

    Args:
        x: Input, in the dtype of the layer op.
        weight: `[m, …]`, or `None` to apply only the update.
        bias: `[m]` or `None`.
        spec: Settings of the update.
        factors: Factors and scalars of the update.
        budgets: `[G]`, integers. The operator reads them, which synchronizes with the device.
        op: The layer's operation.
        weight_shape: Shape of the weight, required even if `weight` is `None`.
    """
    # operators accept no objects, so the settings are encoded as integers
    tensors = [tensor for tensor in factors if tensor is not None]
    fields = [index for index, tensor in enumerate(factors) if tensor is not None]
    encoded_call = [len(weight_shape), *weight_shape, *op.to_ints(weight_shape)]
    return _adapted_layer(x, weight, bias, tensors, budgets, fields, spec.to_ints(), spec.scaling, encoded_call)[0]


@torch.library.custom_op("snella::adapted_layer", mutates_args=(), tags=_TAGS)
def _adapted_layer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    budgets: Tensor,
    fields: Sequence[int],
    spec: Sequence[int],
    scaling: float,
    layer: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the layer's output and the update's thresholds `[G]`.

    `tensors` are the entries of `Factors` with the indices `fields`, and `layer` is the encoded call.
    """
    update = _decode(tensors, budgets, fields, spec, scaling)
    call = _decode_call(layer)
    y, (prepared,), _ = forward_pass(x, weight, bias, [update], call)
    return y, prepared.thresholds


@_adapted_layer.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, _, tensors, budgets, *_, layer = args
    call = _decode_call(layer)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return call.op(x, x.new_empty(call.weight_shape), None), tensors[0].new_empty(budgets.shape[0], dtype=dtype)


@torch.library.custom_op("snella::adapted_layer_backward", mutates_args=(), tags=_TAGS)
def _backward(
    required: Sequence[bool],
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    thresholds: Tensor,
    budgets: Tensor,
    fields: Sequence[int],
    spec: Sequence[int],
    scaling: float,
    layer: Sequence[int],
) -> list[Tensor]:
    """Return only the required gradients, in the order x, weight, bias, tensors."""
    update = _decode(tensors, budgets, fields, spec, scaling, thresholds)
    call = _decode_call(layer)
    needs_x, needs_weight, needs_bias, *needs_tensors = required
    needs_by_field = dict(zip(fields, needs_tensors, strict=True))
    needs_factors = tuple([needs_by_field.get(index, False) for index in range(len(update.factors))])
    needs = RequiredGrads(needs_x, needs_weight, needs_bias, needs_factors)
    needed_x = x if needs_weight or any(needs_factors) else None
    *layer_grads, factor_grads = backward_pass(grad_y, needed_x, x.shape, weight, [update], call, needs)
    return [grad.contiguous() for grad in (*layer_grads, *factor_grads) if grad is not None]


@_backward.register_fake
def _(
    required: Sequence[bool], grad_y: Tensor, x: Tensor, weight: Tensor | None, tensors: Sequence[Tensor], *args: Any
) -> list[Tensor]:
    bias = grad_y.new_empty(_decode_call(args[-1]).weight_shape[0])
    pairs = zip((x, weight, bias, *tensors), required, strict=True)
    contiguous = torch.contiguous_format
    return [torch.empty_like(tensor, memory_format=contiguous) for tensor, need in pairs if need and tensor is not None]


def _decode_call(layer: Sequence[int]) -> LayerCall:
    """Decode a layer call from `[ndim, *weight_shape, *layer_op]`."""
    ndim, *rest = layer
    return LayerCall(layer_op_from_ints(rest[ndim:]), torch.Size(rest[:ndim]))


def _decode(
    tensors: Sequence[Tensor],
    budgets: Tensor,
    fields: Sequence[int],
    spec: Sequence[int],
    scaling: float,
    thresholds: Tensor | None = None,
) -> Update:
    """Return the update that the arguments of an operator encode."""
    factors: Any = {Factors._fields[index]: tensor.detach() for index, tensor in zip(fields, tensors, strict=True)}
    return Update(UpdateSpec.from_ints(spec, scaling), Factors(**factors), tuple(budgets.tolist()), thresholds)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the tensors for the backward pass."""
    x, weight, bias, tensors, budgets, *ctx.settings = inputs
    ctx.has_bias, ctx.num_tensors = bias is not None, len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, budgets, output[1], *tensors)


def _differentiate(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Return a gradient or `None` for each argument of `_adapted_layer`."""
    no_grads = [None] * (1 + len(ctx.settings))  # budgets and settings
    if grad_y is None:
        return None, None, None, [None] * ctx.num_tensors, *no_grads
    x, weight, budgets, thresholds, *tensors = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs_tensors = [tensor.requires_grad for tensor in tensors]
    required = [needs_x, weight is not None and needs_weight, ctx.has_bias and needs_bias, *needs_tensors]
    computed = iter(_backward(required, grad_y, x, weight, tensors, thresholds, budgets, *ctx.settings))
    grad_x, grad_weight, grad_bias, *grads = (next(computed) if need else None for need in required)
    return grad_x, grad_weight, grad_bias, grads, *no_grads


_adapted_layer.register_autograd(_differentiate, setup_context=_setup_context)
