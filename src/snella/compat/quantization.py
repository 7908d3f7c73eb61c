"""Base layers whose weight is quantized: which ones can be adapted, and what an adapted layer needs of them."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snella.update import LazyWeight

_WHAT_WORKS = (
    "of quantized layers, those of bitsandbytes (Linear4bit, Linear8bitLt) and linear layers with weight-only tensors "
    "of torchao (Int8Tensor, IntxUnpackedToInt8Tensor) can be adapted"
)


class Quantization(ABC):
    """One way to store the weight `[m, n]` of a linear layer in few bits. Knows no layer; each method is given one."""

    name: str

    @abstractmethod
    def source(self, base: nn.Module) -> LazyWeight:
        """Where the op gets the dequantized weight of `base`; stays valid when `base` is given another weight."""

    @abstractmethod
    def write(self, base: nn.Module, weight: Tensor) -> None:
        """Give `base` a new weight `[m, n]`, quantized with the settings of the present one."""

    @abstractmethod
    def snapshot(self, base: nn.Module) -> Any:
        """What `restore` needs to give `base` back every bit of its present weight; no copy is made."""

    @abstractmethod
    def restore(self, base: nn.Module, snapshot: Any) -> None:
        """Undo `write`."""

    def product_dtype(self, base: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which `base` computes with an input of `dtype`, autocast aside."""
        return dtype

    def is_safe_to_apply(self, base: nn.Module) -> bool:
        """Whether applying `base` itself leaves its weight as it is."""
        return True


def find_quantization(base: Any, name: str) -> Quantization | None:
    """Return how the weight of `base` is quantized, `None` where it is not. Imports neither package unless it is used.

    Args:
        base: A base layer.
        name: Its name, for errors.

    Raises:
        NotImplementedError: The weight is quantized in a way that cannot be dequantized and quantized again here.
        RuntimeError: A layer of bitsandbytes that has not been quantized yet.
    """
    weight = getattr(base, "weight", None)
    of_bitsandbytes = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("bitsandbytes.")]
    if of_bitsandbytes:
        for kind in (Bitsandbytes4bit(), Bitsandbytes8bit()):
            if kind.layer_class in of_bitsandbytes:
                kind.check(base, name)
                return kind
        raise _refusal(name, f"a {type(base).__name__} of bitsandbytes")
    if type(weight).__module__.startswith("torchao."):
        problem = (
            torchao_unsupported_reason(weight) if isinstance(base, nn.Linear) else "only linear layers are supported"
        )
        if problem is not None:
            weight_type = f"{type(weight).__name__} of torchao"
            raise _refusal(name, f"a {type(base).__name__} whose weight is a {weight_type}: {problem}")
        return TorchaoWeight()
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise _refusal(name, f"a {type(base).__name__} whose weight is {weight.dtype}")
    packed = next((packed for packed in ("qweight", "W_q") if hasattr(base, packed)), None)
    if packed is not None:
        raise _refusal(name, f"a {type(base).__module__}.{type(base).__name__}, which keeps its weight as {packed}")
    return None


def _refusal(name: str, what: str) -> NotImplementedError:
    """The error for a quantized layer that cannot be adapted."""
    return NotImplementedError(
        f"target_modules matches {name!r}, {what}; {_WHAT_WORKS}; load the model in one of these forms or unquantized"
    )


class Bitsandbytes4bit(Quantization):
    """Blocks of four-bit codes with one scale each, the scales quantized again where `compress_statistics` is on."""

    name = "bitsandbytes 4-bit"
    layer_class = "Linear4bit"

    def check(self, base: Any, name: str) -> None:
        """Raise `RuntimeError` where the layer is not quantized yet."""
        if _state(base) is None:
            raise _not_yet(base, name)

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        import bitsandbytes.functional

        weight, state = base.weight, _state(base)
        if getattr(state, "packing_format_for_cpu", False):
            # undone as bitsandbytes does before it saves: its fast layout for CPUs can only be multiplied with
            weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
            if state.absmax.ndim == 2:
                # bitsandbytes 0.50 forgets the scales that are not quantized themselves
                state.absmax = state.absmax.T.reshape(-1).float()
        # a state of our own: bitsandbytes changes the layer's in place when it changes the layout
        make = partial(bitsandbytes.functional.dequantize_4bit, weight.data, copy.copy(state))
        return LazyWeight(torch.Size(state.shape), (weight, state.absmax), make)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        state = _state(base)
        attributes = dict(base.weight.__dict__)
        old = base.weight
        from peft.utils.quantization_utils import Bnb4bitBackend

        Bnb4bitBackend().set_base_weight(_Holder(base), weight.to(state.dtype))
        # PEFT marks the old parameter as unquantized on its way
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

    `Linear8bitLt` quantizes its input too. An adapted layer does not: it multiplies with the dequantized weight.
    """

    name = "bitsandbytes 8-bit"
    layer_class = "Linear8bitLt"

    def check(self, base: Any, name: str) -> None:
        """Raise where the layer is not quantized: not yet, or not at all."""
        if base.state.has_fp16_weights:
            raise NotImplementedError(
                f"target_modules matches {name!r}, a {type(base).__name__} with has_fp16_weights=True, which quantizes "
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
        from peft.utils.quantization_utils import Bnb8bitBackend

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
        f"target_modules matches {name!r}, a {type(base).__name__} of bitsandbytes that is not quantized yet: its "
        f"weight is {base.weight.dtype} on {str(base.weight.device)!r}; move the model to its device first, which "
        "quantizes it"
    )


def torchao_unsupported_reason(weight: Any) -> str | None:
    """Why a weight of this kind cannot be adapted, `None` where it can."""
    if type(weight).__name__ not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return "it cannot be dequantized and quantized again; IntxWeightOnlyConfig makes integers of any width that can"
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
            (_requantize(old, in_its_dtype), _requantize(old, in_its_dtype, keeps_scales=True)),
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


def _requantize(old: Any, weight: Tensor, keeps_scales: bool = False) -> Any:
    """Quantize `weight` as `old` was: the same blocks, the same width, a zero point only where there was one."""
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


@dataclass(frozen=True)
class RequantizationLoss:
    """What one layer's weight lost when it was quantized again after an update had been added.

        relative = ‖Q(W + U) - (W + U)‖ / ‖U‖            (Frobenius norms; W dequantized, U the update)

    Args:
        module_name: Name of the layer.
        quantization: How its weight is stored.
        lost: `‖Q(W + U) - (W + U)‖`.
        update: `‖U‖`.
    """

    module_name: str
    quantization: str
    lost: float
    update: float

    @property
    def relative(self) -> float:
        """0: the update is there in full; 1: what is wrong is as large as the update itself."""
        if self.update:
            return self.lost / self.update
        return math.inf if self.lost else 0.0


def measure_requantization(
    module_name: str, quantization: str, before: Tensor, wanted: Tensor, after: Tensor
) -> RequantizationLoss:
    """Compare the weight before merging, the sum as it should be, and what is stored of it, all dequantized."""
    lost, update = (
        float(torch.linalg.vector_norm(a.float() - wanted.float(), dtype=torch.float64)) for a in (after, before)
    )
    return RequantizationLoss(module_name, quantization, lost, update)


_collected: ContextVar[list[RequantizationLoss] | None] = ContextVar("losses of the merge under way", default=None)


def report_requantization(loss: RequantizationLoss) -> None:
    """Warn of a loss, or leave that to the `one_warning` that this happens in."""
    collected = _collected.get()
    if collected is None:
        _warn([loss])
    else:
        collected.append(loss)


@contextmanager
def one_warning() -> Iterator[None]:
    """Gather the losses of all layers that are merged within, and warn once at the end."""
    losses: list[RequantizationLoss] = []
    token = _collected.set(losses)
    try:
        yield
    finally:
        _collected.reset(token)
    if losses:
        _warn(losses)


def _warn(losses: list[RequantizationLoss]) -> None:
    """Say what was lost in all, and where most."""
    total = RequantizationLoss("", "", sum(x.lost**2 for x in losses) ** 0.5, sum(x.update**2 for x in losses) ** 0.5)
    worst = max(losses, key=lambda loss: loss.relative)
    kinds = " and ".join(sorted({loss.quantization for loss in losses}))
    warnings.warn(
        f"merged into {len(losses)} quantized weight{'s' if len(losses) > 1 else ''} ({kinds}): rounding the sums to "
        f"the few bits again changed them by {total.relative:.1%} of the update's own size (relative Frobenius error; "
        f"{worst.relative:.1%} in {worst.module_name!r}); to lose nothing keep the adapter unmerged, or merge it into "
        "the unquantized model",
        stacklevel=3,
    )
