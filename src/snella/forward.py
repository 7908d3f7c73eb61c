"""Parts of the forward pass: input casts, dropout and drop-path on updates, and errors of unsupported tracers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from snella.compat.quantization import Quantization

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


def prepare_input(layer: SnellaLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast and pad the input. Under autocast the op casts it, because a cast here would drop its `Mark`."""
    if not torch.is_autocast_enabled(x.device.type):
        x = layer._cast_input_dtype(x, dtype)
    if not layer.pads_input:
        return x
    base: Any = layer.get_base_layer()
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)


def product_dtype(layer: SnellaLayer, x: Tensor) -> torch.dtype:
    """Return the compute dtype of a layer with a quantized weight, ignoring autocast."""
    return cast(Quantization, layer.quantization).product_dtype(layer.get_base_layer(), x.dtype)


def is_regularized(layer: SnellaLayer, adapter_name: str) -> bool:
    """Return whether dropout or drop-path acts on this adapter's update, so that it cannot be folded."""
    config = layer.snella_config[adapter_name]
    return bool(config.update_drop_path or config.dropout_of(layer.module_name))


def add_branches(
    layer: SnellaLayer, y: Tensor, x: Tensor, names: Sequence[str], apply: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """Return `y` plus the updates of these adapters, with dropout on their input and drop-path on their output.

    Args:
        layer: Layer with these adapters.
        y: Output of the layer without these updates.
        x: Input of the layer.
        names: Adapters with dropout or drop-path.
        apply: Applies one adapter's update to an input.
    """
    for name in names:
        config = layer.snella_config[name]
        branch = apply(F.dropout(x, config.dropout_of(layer.module_name), training=True), name)
        if rate := config.update_drop_path:
            keep = torch.rand((branch.shape[0],) + (1,) * (branch.ndim - 1), device=branch.device) >= rate
            branch = branch * keep.to(branch.dtype) / (1 - rate)
        y = y + branch.to(y.dtype)
    return y


def reject_tracing(module_name: str) -> None:
    """Reject `torch.jit.trace` and `torch.func`, which do not support the update's custom autograd function.

    Raises:
        NotImplementedError: If `torch.jit.trace` (or ONNX's TorchScript exporter) or a `torch.func` transform is
            active.
    """
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"torch.jit.trace (and torch.onnx.export with dynamo=False) cannot trace the update of {module_name!r}; "
            "trace model.merge_and_unload(), which has the same outputs"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"torch.func (grad, vmap, jvp, …) does not support the update of {module_name!r}, which has a custom "
            "backward pass; use torch.autograd.grad, or model.merge_and_unload() if no factor needs gradients"
        )
