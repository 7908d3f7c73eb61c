"""Support for base layers with quantized weights.

A base layer is the pre-trained layer inside an adapted layer. Merging adds an update to the weight of the base layer.
The sum must then be requantized, which rounds it.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend
from torch import Tensor, nn

from snella.ops import LazyWeight, widest_dtype


class Quantization(ABC):
    """Storage format of a linear layer's quantized weight `[m, n]`.

    A format has no state of its own, so each method takes the layer.
    """

    name: str
    """Name of the format in warnings."""

    @abstractmethod
    def source(self, base: nn.Module) -> LazyWeight:
        """Return the weight of `base` as a `LazyWeight`, which remains valid if `base` gets a different weight."""

    @abstractmethod
    def write(self, base: nn.Module, weight: Tensor) -> None:
        """Quantize `weight` `[m, n]` with the current settings and store it in `base`."""

    @abstractmethod
    def snapshot(self, base: nn.Module) -> Any:
        """Return the state that `restore` needs, without copying the weight."""

    @abstractmethod
    def restore(self, base: nn.Module, snapshot: Any) -> None:
        """Undo `write` bit for bit."""

    def product_dtype(self, base: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """Return the compute dtype of `base` for an input of `dtype`, ignoring autocast."""
        return dtype

    def is_safe_to_apply(self, base: nn.Module) -> bool:
        """Return whether a forward pass of `base` leaves its weight unchanged."""
        return True


def find_quantization(base: Any, name: str) -> Quantization | None:
    """Return the quantization of a layer's weight, or `None` if it is not quantized.

    Layers and weights are recognized by name, so that neither bitsandbytes nor torchao is imported.

    Args:
        base: A base layer.
        name: Name of the layer, for errors.

    Raises:
        NotImplementedError: If the quantization format is not supported.
        RuntimeError: If a bitsandbytes layer is not quantized yet.
    """
    weight = getattr(base, "weight", None)
    class_name = type(base).__name__
    bitsandbytes_classes = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("bitsandbytes.")]
    # attributes in which layers of other libraries store their quantized weight
    packed_attribute = next((attribute for attribute in ("qweight", "W_q") if hasattr(base, attribute)), None)
    if bitsandbytes_classes:
        for quantization in (Bitsandbytes4bit(), Bitsandbytes8bit()):
            if quantization.layer_class in bitsandbytes_classes:
                quantization.check(base, name)
                return quantization
        description = f"a bitsandbytes {class_name}"
    elif type(weight).__module__.startswith("torchao."):
        problem = _torchao_problem(weight) if isinstance(base, nn.Linear) else "only linear layers are supported"
        if problem is None:
            return TorchaoWeight()
        description = f"a {class_name} with a torchao weight of type {type(weight).__name__}: {problem}"
    elif isinstance(weight, Tensor) and not weight.is_floating_point():
        description = f"a {class_name} with a {weight.dtype} weight"
    elif packed_attribute is not None:
        description = f"a {type(base).__module__}.{class_name}, which stores its weight as {packed_attribute}"
    else:
        return None
    raise NotImplementedError(
        f"target_modules matches {name!r}, {description}; supported quantized layers are bitsandbytes' Linear4bit and "
        "Linear8bitLt, and linear layers with weight-only torchao tensors (Int8Tensor, IntxUnpackedToInt8Tensor); "
        "load the model in one of these formats or unquantized"
    )


class Bitsandbytes4bit(Quantization):
    """Format of bitsandbytes' `Linear4bit`: blocks of 4-bit codes with scales.

    If the layer sets `compress_statistics`, the scales are quantized, too.
    """

    name = "bitsandbytes 4-bit"
    layer_class = "Linear4bit"

    def check(self, base: Any, name: str) -> None:
        """Raise `RuntimeError` if the layer is not quantized yet."""
        if _state(base) is None:
            raise _unquantized_error(base, name)

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        import bitsandbytes.functional

        weight = base.weight
        state = _state(base)
        if getattr(state, "packing_format_for_cpu", False):
            # undo the CPU layout, which supports only matrix products, as bitsandbytes does before saving
            weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
            if state.absmax.ndim == 2:
                # bitsandbytes 0.50 does not convert unquantized scales back
                state.absmax = state.absmax.T.reshape(-1).float()
        # copy the state, because bitsandbytes modifies it in place when it changes the layout
        dequantize = partial(bitsandbytes.functional.dequantize_4bit, weight.data, copy.copy(state))
        return LazyWeight(torch.Size(state.shape), (weight, state.absmax), dequantize)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        old = base.weight
        attributes = dict(base.weight.__dict__)
        state = _state(base)
        Bnb4bitBackend().set_base_weight(_peft_layer(base), weight.to(state.dtype))
        # PEFT marks the old parameter as unquantized, but `restore` needs it unchanged
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
        """Return False on a CPU, where bitsandbytes may change the layout and round the scales in evaluation mode."""
        return base.weight.device.type != "cpu"


class Bitsandbytes8bit(Quantization):
    """Format of bitsandbytes' `Linear8bitLt`: int8 codes with one scale per row.

    `Linear8bitLt` also quantizes its input, whereas an adapted layer multiplies the original input by the dequantized
    weight.
    """

    name = "bitsandbytes 8-bit"
    layer_class = "Linear8bitLt"

    def check(self, base: Any, name: str) -> None:
        """Raise an error if the layer quantizes its weight in every pass or is not quantized yet."""
        if base.state.has_fp16_weights:
            raise NotImplementedError(
                f"target_modules matches {name!r}, a {type(base).__name__} with has_fp16_weights=True, which quantizes "
                "its weight in every forward pass; create it with has_fp16_weights=False, or use nn.Linear"
            )
        if base.weight.dtype != torch.int8:
            raise _unquantized_error(base, name)

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        import bitsandbytes.functional

        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        dequantize = partial(bitsandbytes.functional.int8_vectorwise_dequant, base.weight.data, scales)
        return LazyWeight(base.weight.shape, (base.weight, scales), dequantize)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        Bnb8bitBackend().set_base_weight(_peft_layer(base), weight)

    def snapshot(self, base: Any) -> Any:  # noqa: D102
        weight = base.weight
        return weight, (weight.CB, weight.SCB), (base.state.CB, base.state.SCB)

    def restore(self, base: Any, snapshot: Any) -> None:  # noqa: D102
        device = base.weight.device
        weight, (weight.CB, weight.SCB), (base.state.CB, base.state.SCB) = snapshot
        base.weight = weight
        base.to(device)


def _peft_layer(base: nn.Module) -> SimpleNamespace:
    """Return a stand-in for a PEFT layer, with the only method that PEFT's quantization backends call."""
    return SimpleNamespace(get_base_layer=lambda: base)


def _state(base: Any) -> Any:
    """Return the quantization state of a `Linear4bit`, which its weight or, with FSDP, the layer itself stores."""
    state = getattr(base.weight, "quant_state", None)
    return base.quant_state if state is None else state


def _unquantized_error(base: nn.Module, name: str) -> RuntimeError:
    """Return the error for a layer that is not quantized yet."""
    return RuntimeError(
        f"target_modules matches {name!r}, a bitsandbytes {type(base).__name__} that is not quantized yet: its "
        f"weight is {base.weight.dtype} on {str(base.weight.device)!r}; move the model to its device first, which "
        "quantizes the layer"
    )


def _torchao_problem(weight: Any) -> str | None:
    """Return the reason why a torchao weight is not supported, or `None` if it is supported."""
    if type(weight).__name__ not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return "requantization is not supported; use IntxWeightOnlyConfig, which supports integers of any width"
    for attribute in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
        value = getattr(weight, attribute, None)
        if value is not None:
            shown = value.item() if isinstance(value, Tensor) and value.numel() == 1 else type(value).__name__
            return f"it also changes the layer's input ({attribute}={shown}); use a weight-only configuration"
    return None


class TorchaoWeight(Quantization):
    """Format of torchao, in which the layer's `weight` is a tensor subclass that stores integers and scales."""

    name = "torchao"

    def source(self, base: Any) -> LazyWeight:  # noqa: D102
        weight = base.weight
        stored = (weight.qdata, weight.scale, getattr(weight, "zero_point", None))
        tensors = tuple(tensor for tensor in stored if tensor is not None)
        return LazyWeight(weight.shape, tensors, weight.dequantize)

    def write(self, base: Any, weight: Tensor) -> None:  # noqa: D102
        old = base.weight
        target = weight.contiguous()
        cast_target = target.to(old.dtype)
        # new scales suit large updates, but the old scales preserve all entries that a small update does not change
        candidates = (_requantize(old, cast_target), _requantize(old, cast_target, keep_scales=True))
        quantized = min(
            candidates,
            key=lambda candidate: torch.linalg.vector_norm(candidate.dequantize().to(target.dtype) - target).item(),
        )
        base.weight = nn.Parameter(quantized, requires_grad=False)

    def snapshot(self, base: Any) -> Any:  # noqa: D102
        return base.weight

    def restore(self, base: Any, snapshot: Any) -> None:  # noqa: D102
        device = base.weight.device
        base.weight = snapshot
        base.to(device)

    def product_dtype(self, base: Any, dtype: torch.dtype) -> torch.dtype:  # noqa: D102
        return base.weight.dtype


def _requantize(old: Any, weight: Tensor, keep_scales: bool = False) -> Any:
    """Quantize `weight` in the format of the torchao tensor `old`.

    The blocks and the bit width are the same, and there is a zero point only if `old` has a nonzero one. If
    `keep_scales`, the scales and zero points of `old` are used as well.
    """
    from torchao.quantization import granularity
    from torchao.quantization.quant_primitives import MappingType

    has_zero_point = getattr(old, "zero_point", None) is not None and bool(torch.count_nonzero(old.zero_point))
    mapping = MappingType.ASYMMETRIC if has_zero_point else MappingType.SYMMETRIC
    if type(old).__name__ == "IntxUnpackedToInt8Tensor":
        custom = {"custom_scale": old.scale, "custom_zero_point": old.zero_point, "intx_choose_qparams_algorithm": None}
        scales = custom if keep_scales else {}
        return type(old).from_hp(weight, old.block_size, old.target_dtype, mapping_type=mapping, **scales)
    # `Int8Tensor` takes a granularity instead of a block size
    rows, columns = old.block_size
    blocks: granularity.Granularity = granularity.PerGroup(columns)
    if columns == weight.shape[1]:
        blocks = granularity.PerTensor() if rows == weight.shape[0] else granularity.PerRow()
    scales = {"scale": old.scale, "zero_point": old.zero_point} if keep_scales else {}
    return type(old).from_hp(weight, blocks, mapping_type=mapping, reduce_range=old.reduce_range, **scales)


class _Requantization(NamedTuple):
    """Error of one requantization `Q` of a weight `W` plus an update `U`."""

    module_name: str
    quantization: str
    error: float  # ‖Q(W + U) − (W + U)‖, Frobenius norm
    update: float  # ‖U‖


_collected: ContextVar[list[_Requantization] | None] = ContextVar("requantizations", default=None)


def report_requantization(module_name: str, quantization: str, before: Tensor, target: Tensor, after: Tensor) -> None:
    """Warn about the requantization error of a merge, or add it to the active `combined_warning` block.

        relative error = ‖Q(W + U) − (W + U)‖ / ‖U‖            (Frobenius norms; W dequantized, U the update)

    Args:
        module_name: Name of the layer.
        quantization: Name of the storage format.
        before: `W`, the weight before merging.
        target: `W + U`.
        after: `Q(W + U)`, the stored weight, dequantized.
    """
    dtype = widest_dtype(target.device.type)

    def distance(weight: Tensor) -> float:
        """Return the Frobenius norm of the difference from `W + U`."""
        return float(torch.linalg.vector_norm(weight.float() - target.float(), dtype=dtype))

    requantization = _Requantization(module_name, quantization, distance(after), distance(before))
    pending = _collected.get()
    if pending is None:
        _warn([requantization])
    else:
        pending.append(requantization)


@contextmanager
def combined_warning() -> Iterator[None]:
    """Collect the requantization errors of all merges in this block and warn once at the end."""
    collected: list[_Requantization] = []
    token = _collected.set(collected)
    try:
        yield
    finally:
        _collected.reset(token)
    if collected:
        _warn(collected)


def _warn(merges: list[_Requantization]) -> None:
    """Warn about the total requantization error and the worst layer."""
    total_error = sum(merge.error**2 for merge in merges) ** 0.5
    total_update = sum(merge.update**2 for merge in merges) ** 0.5
    total = _relative(total_error, total_update)
    worst = max(merges, key=lambda merge: _relative(merge.error, merge.update))
    formats = " and ".join(sorted({merge.quantization for merge in merges}))
    warnings.warn(
        f"merged into {len(merges)} quantized weight{'s' if len(merges) > 1 else ''} ({formats}): requantization "
        f"changed the sums by {total:.1%} of the update's size (relative Frobenius error; "
        f"{_relative(worst.error, worst.update):.1%} in {worst.module_name!r}); for exact results, keep the adapter "
        "unmerged or merge it into the unquantized model",
        stacklevel=3,
    )


def _relative(error: float, update: float) -> float:
    """Return the error relative to the update's size; infinite if there is an error but no update."""
    if update:
        return error / update
    return math.inf if error else 0.0
