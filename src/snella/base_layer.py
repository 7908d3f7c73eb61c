"""Base-layer helpers: weight layout, compute dtype, input casts and weight checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from snella.compat.quantization import Quantization
from snella.update import LazyWeight

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


def orient(base: Any, weight: Tensor) -> Tensor:
    """Convert a weight between the base layer's layout and `[m, …]`, outputs first.

    The two layouts differ only for transformers' `Conv1D`, which stores `[in, out]`.
    """
    return weight.T if isinstance(base, Conv1D) else weight


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


def check_weight(layer: SnellaLayer, weight: Tensor | LazyWeight) -> None:
    """Reject a missing or 8-bit base weight, to which no update can be added."""
    if isinstance(weight, Tensor) and (weight.dtype.itemsize == 1 or weight.is_meta):
        raise unusable_weight_error(layer, weight.dtype)


def unusable_weight_error(layer: SnellaLayer, dtype: torch.dtype) -> NotImplementedError:
    """Return the error for a missing or 8-bit base weight."""
    if dtype.itemsize == 1:
        return NotImplementedError(
            f"the weight of {layer.module_name!r} must have at least 16 bits per entry, got {dtype}; merge before "
            "enable_layerwise_casting, which upcasts weights only in forward passes, or load the model in bfloat16"
        )
    return NotImplementedError(
        f"the weight of {layer.module_name!r} is on the meta device; load it, or offload it with "
        "accelerate.cpu_offload or a device_map, whose hooks load it when the layer is called"
    )
