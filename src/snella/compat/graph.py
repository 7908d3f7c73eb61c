"""Forward pass of an adapted layer within a graph of `torch.compile`.

A graph cannot detect changes between calls, so nothing is cached. The first update is folded into the base weight; the
others are added to the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from snella.base_layer import input_of_op
from snella.compat.compile import adapted_layer_in_graph
from snella.compat.hooks import is_hooked_in_graph
from snella.regularization import add_branches
from snella.update import LayerOp, LinearOp, Update

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


def forward_in_graph(layer: SnellaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply the base layer with the updates of all active adapters."""
    names = [name for name in layer.active_adapters if name in layer.snella_A]
    if layer.quantization is None and (layer.disable_adapters or layer.merged or not names):
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        return y
    base = layer._modules.get("base_layer")
    is_opaque = layer.quantization is not None or (base is not None and is_hooked_in_graph(base, layer._around_base))
    if is_opaque or any(name in layer.snella_support for name in names):
        return _forward_outside_graphs(layer, x, *args, **kwargs)
    _note_applied(layer)
    weight, bias, dtype, op = cast(Tensor, layer._weight()), layer.bias, x.dtype, layer._op()
    is_autocast = torch.is_autocast_enabled(x.device.type)
    x = input_of_op(layer, x, weight.dtype)
    x = x.to(torch.get_autocast_dtype(x.device.type) if is_autocast else weight.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    plan = layer._plan_updates(names, with_branches=True, in_graph=True)
    # the first update is folded into the base weight; the others are added to the output
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
    _note_applied(layer)
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


def _note_applied(layer: SnellaLayer) -> None:
    """Set `is_applied`, except in an exported program, which lacks the attribute."""
    if not torch.compiler.is_exporting():
        layer.is_applied = True


@torch.compiler.disable
def _forward_outside_graphs(layer: SnellaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `forward` outside compiled graphs."""
    y: Tensor = layer.forward(x, *args, **kwargs)
    return y
