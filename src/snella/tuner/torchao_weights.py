"""Weights quantised by torchao: weight-only integers of one to eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snella.ops.spec import LazyWeight
from snella.tuner.quantized import Quantization


def obstacle(weight: Any) -> str | None:
    """Why a weight of this kind cannot be adapted, `None` where it can."""
    if type(weight).__name__ not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return "it cannot be dequantised and quantised again; IntxWeightOnlyConfig makes integers of any width that can"
    for attribute in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
        value = getattr(weight, attribute, None)
        if value is not None:
            kind = value.item() if isinstance(value, Tensor) and value.numel() == 1 else type(value).__name__
            return f"it also changes the layer's input ({attribute}={kind}); use a weight-only configuration"
    return None


class TorchaoWeight(Quantization):
    """A linear layer whose `weight` is a tensor of torchao's that stores integers and scales."""

    name = "torchao"

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        weight = base.weight
        parts = (weight.qdata, weight.scale, getattr(weight, "zero_point", None))
        tensors = tuple(part for part in parts if part is not None)
        return LazyWeight(weight.shape, tensors, weight.dequantize)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        old, wanted = base.weight, weight.contiguous()
        in_its_dtype = wanted.to(old.dtype)
        # new scales suit a large change; the old ones leave every entry alone that a small change does not touch
        found = min(
            (_quantise(old, in_its_dtype), _quantise(old, in_its_dtype, keeps_scales=True)),
            key=lambda one: torch.linalg.vector_norm(one.dequantize().to(wanted.dtype) - wanted).item(),
        )
        base.weight = nn.Parameter(found, requires_grad=False)

    def snapshot(self, base: Any) -> Any:  # noqa: D102
        return base.weight

    def restore(self, base: Any, snapshot: Any) -> None:  # noqa: D102
        device = base.weight.device
        base.weight = snapshot
        base.to(device)

    def product_dtype(self, base: Any, dtype: torch.dtype) -> torch.dtype:  # noqa: D102
        return base.weight.dtype


def _quantise(old: Any, weight: Tensor, keeps_scales: bool = False) -> Any:
    """Quantise `weight` as `old` was: the same blocks, the same width, a zero point only where there was one."""
    from torchao.quantization import granularity
    from torchao.quantization.quant_primitives import MappingType

    has_zero_point = getattr(old, "zero_point", None) is not None and bool(torch.count_nonzero(old.zero_point))
    mapping = MappingType.ASYMMETRIC if has_zero_point else MappingType.SYMMETRIC
    if type(old).__name__ == "IntxUnpackedToInt8Tensor":
        of_old = {"custom_scale": old.scale, "custom_zero_point": old.zero_point, "intx_choose_qparams_algorithm": None}
        scales = of_old if keeps_scales else {}
        return type(old).from_hp(weight, old.block_size, old.target_dtype, mapping_type=mapping, **scales)
    rows, columns = old.block_size
    blocks: granularity.Granularity = granularity.PerGroup(columns)
    if columns == weight.shape[1]:
        blocks = granularity.PerTensor() if rows == weight.shape[0] else granularity.PerRow()
    scales = {"scale": old.scale, "zero_point": old.zero_point} if keeps_scales else {}
    return type(old).from_hp(weight, blocks, mapping_type=mapping, reduce_range=old.reduce_range, **scales)


__all__ = ["TorchaoWeight", "obstacle"]
