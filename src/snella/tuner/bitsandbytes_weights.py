"""Weights quantised by bitsandbytes: NF4 and FP4 in `Linear4bit`, LLM.int8() in `Linear8bitLt`."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend
from torch import Tensor, nn

from snella.ops.spec import LazyWeight
from snella.tuner.quantized import Quantization


class Bitsandbytes4bit(Quantization):
    """Blocks of four-bit codes with one scale each, the scales quantised again where `compress_statistics` is on."""

    name = "bitsandbytes 4-bit"
    layer_class = "Linear4bit"

    def check(self, base: Any, name: str) -> None:
        """Raise `RuntimeError` where the layer is not quantised yet."""
        if _state(base) is None:
            raise _not_yet(base, name)

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        import bitsandbytes.functional

        weight, state = base.weight, _state(base)
        if getattr(state, "packing_format_for_cpu", False):
            # undone as bitsandbytes does before it saves: its fast layout for CPUs can only be multiplied with
            weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
            if state.absmax.ndim == 2:
                # bitsandbytes 0.50 forgets the scales that are not quantised themselves
                state.absmax = state.absmax.T.reshape(-1).float()
        # a state of our own: bitsandbytes changes the layer's in place when it changes the layout
        make = partial(bitsandbytes.functional.dequantize_4bit, weight.data, copy.copy(state))
        return LazyWeight(torch.Size(state.shape), (weight, state.absmax), make)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        state = _state(base)
        attributes = dict(base.weight.__dict__)
        old = base.weight
        Bnb4bitBackend().set_base_weight(_Holder(base), weight.to(state.dtype))
        # PEFT marks the old parameter as unquantised on its way
        old.__dict__.update(attributes)

    def snapshot(self, base: Any) -> Any:  # noqa: D102
        return base.weight, _state(base)

    def restore(self, base: Any, snapshot: Any) -> None:  # noqa: D102
        device = base.weight.device
        base.weight, base.quant_state = snapshot
        base.to(device)

    def product_dtype(self, base: Any, dtype: torch.dtype) -> torch.dtype:  # noqa: D102
        return base.compute_dtype or dtype

    def is_safe_to_apply(self, base: Any) -> bool:
        """Not on a CPU: there bitsandbytes may change the layout in evaluation, which rounds the scales for good."""
        return base.weight.device.type != "cpu"


class Bitsandbytes8bit(Quantization):
    """Rows of eight-bit integers with one scale each.

    `Linear8bitLt` quantises its input too. An adapted layer does not: it multiplies with the dequantised weight.
    """

    name = "bitsandbytes 8-bit"
    layer_class = "Linear8bitLt"

    def check(self, base: Any, name: str) -> None:
        """Raise where the layer is not quantised: not yet, or not at all."""
        if base.state.has_fp16_weights:
            raise NotImplementedError(
                f"target_modules matches {name!r}, a {type(base).__name__} with has_fp16_weights=True, which quantises "
                "its weight in every forward pass; make it with has_fp16_weights=False, or use nn.Linear"
            )
        if base.weight.dtype != torch.int8:
            raise _not_yet(base, name)

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        import bitsandbytes.functional

        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        make = partial(bitsandbytes.functional.int8_vectorwise_dequant, base.weight.data, scales)
        return LazyWeight(base.weight.shape, (base.weight, scales), make)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        Bnb8bitBackend().set_base_weight(_Holder(base), weight)

    def snapshot(self, base: Any) -> Any:  # noqa: D102
        weight, state = base.weight, base.state
        return weight, (weight.CB, weight.SCB), (state.CB, state.SCB)

    def restore(self, base: Any, snapshot: Any) -> None:  # noqa: D102
        device = base.weight.device
        weight, (weight.CB, weight.SCB), (base.state.CB, base.state.SCB) = snapshot
        base.weight = weight
        base.to(device)


class _Holder:
    """What PEFT's backends take for a PEFT layer: something that has the base layer."""

    def __init__(self, base: nn.Module) -> None:
        self.base_layer = base

    def get_base_layer(self) -> nn.Module:
        """The base layer."""
        return self.base_layer


def _state(base: Any) -> Any:
    """Scales and settings of a `Linear4bit`; FSDP leaves them at the layer alone."""
    state = getattr(base.weight, "quant_state", None)
    return base.quant_state if state is None else state


def _not_yet(base: nn.Module, name: str) -> RuntimeError:
    """The error for a layer that holds its weight as it was."""
    return RuntimeError(
        f"target_modules matches {name!r}, a {type(base).__name__} of bitsandbytes that is not quantised yet: its "
        f"weight is {base.weight.dtype} on {str(base.weight.device)!r}; move the model to its device first, which "
        "quantises it"
    )


__all__ = ["Bitsandbytes4bit", "Bitsandbytes8bit"]
