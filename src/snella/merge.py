"""Base and effective weights of a layer: checks, merging and unmerging, quantized weights, and `layer.weight`.

The effective weight is the base weight `W0` plus the updates of all active adapters, `W0 + Σ scaling·S`. Merging writes
this sum into the base layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from snella.autograd import compute_effective_weight
from snella.backends import get_backend
from snella.compat.quantization import Quantization, report_requantization
from snella.ops import LazyWeight, orient
from snella.update import Update

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


# methods of `EffectiveWeight` that do not need its value
_METADATA_METHODS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_signed", "get_device", "data_ptr", "untyped_storage", "__len__"),
}
_VALUE_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}  # the only attributes that need the value


def check_weight(layer: SnellaLayer, weight: Tensor | LazyWeight) -> None:
    """Raise `NotImplementedError` if a dense base weight is on the meta device or has only 8 bits per entry."""
    if isinstance(weight, LazyWeight):
        return
    if weight.dtype.itemsize == 1:
        raise NotImplementedError(
            f"the weight of {layer.module_name!r} must have at least 16 bits per entry, got {weight.dtype}; merge "
            "before enable_layerwise_casting, which upcasts weights only in forward passes, or load the model in "
            "bfloat16"
        )
    if weight.is_meta:
        raise NotImplementedError(
            f"the weight of {layer.module_name!r} is on the meta device; load it, or offload it with "
            "accelerate.cpu_offload or a device_map, whose hooks load it when the layer is called"
        )


def check_parameter(layer: SnellaLayer) -> None:
    """Raise `NotImplementedError` if the base weight is computed from other parameters, e.g. by `weight_norm`."""
    weight = layer.get_base_layer().weight
    if layer.quantization is None and not isinstance(weight, nn.Parameter):
        raise NotImplementedError(
            f"the weight of {layer.module_name!r} is computed from other parameters, e.g. by weight_norm, which would "
            "overwrite a merged weight; use the adapter unmerged, or add it after removing the parametrization"
        )


def merged_weight(
    layer: SnellaLayer,
    weight: Tensor | LazyWeight | None,
    adapter_names: list[str],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the detached `W0 + Σ scaling·S`. With a dense `W0`, it equals the weight in a forward pass bit for bit.

    Args:
        layer: Layer with these adapters.
        weight: `W0` of shape `[m, …]`. If `None`, only the sum of the updates is returned.
        adapter_names: Adapters whose updates are added.
        dtype: Dtype of the result if `weight` is a `LazyWeight`.
    """
    plan = layer._plan_updates(adapter_names)
    total, thresholds = compute_effective_weight(weight, plan.updates, layer._weight().shape, dtype)
    plan.cache_thresholds(thresholds)
    return total


@torch.no_grad()
def merge_updates(layer: SnellaLayer, names: list[str], *, safe_merge: bool) -> None:
    """Add the updates of these adapters to the base weight, and store the original state for `unmerge_updates`.

    The sum starts from the original weight, because merging adapters one by one would round at each step. See
    `SnellaLayer.merge`.

    Raises:
        ValueError: If `safe_merge` finds non-finite values, or the merged adapters have different values of `impl`.
        NotImplementedError: If the base weight is on the meta device, has 8 bits per entry but is not quantized, or is
            computed from other parameters.
    """
    original = _original_weight(layer)
    check_weight(layer, original)
    check_parameter(layer)
    all_names = [*layer.merged_adapters, *names]
    merged = merged_weight(layer, original, all_names)
    if safe_merge and not torch.isfinite(merged).all():
        joined = ", ".join(all_names)
        subject = f"adapter {joined} seems" if len(all_names) == 1 else f"adapters {joined} seem"
        raise ValueError(f"NaNs detected in the merged weights. The {subject} to be broken")  # PEFT's wording
    if isinstance(original, LazyWeight):
        _write_quantized(layer, merged, original)
    else:
        layer._unmerged_weight = original
        _write(layer, merged)
    layer.merged_adapters.extend(names)
    layer.clear_cache()


def unmerge_updates(layer: SnellaLayer) -> None:
    """Restore the base weight, bit for bit, to its state before the merge, or warn if nothing is merged."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    if layer._unmerged_weight is not None:
        _write(layer, layer._unmerged_weight)
    if layer._unmerged_quantized is not None and layer.quantization is not None:
        layer.quantization.restore(layer.get_base_layer(), layer._unmerged_quantized[1])
    layer._unmerged_weight = layer._unmerged_quantized = None
    layer.merged_adapters.clear()
    layer.clear_cache()


def refresh(layer: SnellaLayer, adapter_name: str, cache: MergeCache) -> None:
    """Make in-place changes to an adapter's values take effect, even if it is merged.

    Rewrites a merged weight from the copy that `merge` stored, so rounding errors do not accumulate. A dense weight
    stays the same tensor, which compiled graphs require.

    Args:
        layer: Layer with this adapter.
        adapter_name: Name of the adapter.
        cache: Cache of an earlier call for the same values in this layer, or an empty one.
    """
    layer.clear_cache()
    if adapter_name not in layer.merged_adapters:
        return
    names = list(layer.merged_adapters)
    original = layer._unmerged_weight
    # a quantized weight has no dense copy, and the updates of several adapters are summed
    if original is None or len(names) > 1:
        layer.unmerge()
        layer.merge(adapter_names=names)
        return
    weight = cast(Tensor, layer._weight())
    write_effective_weight(original, layer.get_update(adapter_name), weight, cache)
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)  # compiled kernels do not increment it themselves


@dataclass
class MergeCache:
    """Cache for repeated merges of an update: at most three numbers per column, valid until the factors change.

    Args:
        thresholds: `[G]`, or `None` before the first merge.
        columns: `Prepared.columns` of the last merge.
    """

    thresholds: Tensor | None = None
    columns: tuple[Tensor, ...] = ()


@torch.no_grad()
def write_effective_weight(weight: Tensor, update: Update, out: Tensor, cache: MergeCache) -> None:
    """Write `W0 + scaling·S` into an existing tensor, bit-identical to the effective weight of `adapted_layer`.

    Args:
        weight: `W0`, `[m, …]`.
        update: The update.
        out: Output with the shape and dtype of `weight`, in different memory. With Numba kernels, contiguous tensors,
            and a filled cache, the call allocates no tensor of this size.
        cache: Cache that the first call with this update fills and later calls read.
    """
    update = update._replace(thresholds=cache.thresholds)
    if weight.is_contiguous() and out.is_contiguous() and update.spec.backend != "reference":
        rows = weight.shape[0]
        backend = get_backend(update.spec.backend)
        prepared = backend.prepare(update, cache.columns)
        cache.thresholds = prepared.thresholds
        cache.columns = prepared.columns
        backend.add_update(update.spec, prepared, weight.detach().view(rows, -1), out.detach().view(rows, -1))
    else:
        total, (cache.thresholds,) = compute_effective_weight(weight, [update], weight.shape)
        out.copy_(total)


def _original_weight(layer: SnellaLayer) -> Tensor | LazyWeight:
    """Return the unmerged base weight: a copy if it is dense, because merging overwrites dense weights in place."""
    if layer._unmerged_quantized is not None:
        stored = layer._unmerged_quantized[0]
        device = cast(Tensor, layer.get_base_layer().weight).device  # the layer may have moved since the first merge
        if stored.tensors[0].device == device:
            return stored
        return LazyWeight(stored.shape, stored.tensors, lambda: stored.materialize().to(device))
    if layer._unmerged_weight is not None:
        return layer._unmerged_weight
    weight = layer._weight()
    return weight.detach().clone() if isinstance(weight, Tensor) else weight


def _write(layer: SnellaLayer, weight: Tensor) -> None:
    """Write `weight`, of shape `[m, …]`, into the base weight in place, so that tied weights and views stay valid."""
    base = layer.get_base_layer()
    orient(base, cast(Tensor, base.weight)).data.copy_(weight)


def _write_quantized(layer: SnellaLayer, merged: Tensor, original: LazyWeight) -> None:
    """Store a merged weight in the quantized base layer and report the requantization error."""
    base = layer.get_base_layer()
    quantization = cast(Quantization, layer.quantization)
    if layer._unmerged_quantized is None:
        layer._unmerged_quantized = (original, quantization.snapshot(base))
    quantization.write(base, merged)
    requantized = quantization.source(base).materialize()
    report_requantization(layer.module_name, quantization.name, original.materialize(), merged, requantized)


# reads of layer.weight -----------------------------------------------------------------------------------------------


class EffectiveWeight(Tensor):
    """Lazy `W0 + Σ scaling·S`, the value of `layer.weight`, computed by the first operation that reads it.

    Shape, dtype, device, and `data` come from the base weight, and in-place operations write into the base weight.
    In-place operations on a view, e.g. `weight[0].zero_()`, do not change the layer.
    """

    _base_weight: Tensor
    _compute: Callable[[], Tensor]
    _multiply: Callable[[Tensor, Tensor | None], Tensor | None] | None
    _effective: Tensor | None

    @staticmethod
    def of(
        base: Tensor,
        compute: Callable[[], Tensor],
        multiply: Callable[[Tensor, Tensor | None], Tensor | None] | None,
    ) -> EffectiveWeight:
        """Create a lazy weight with the shape, dtype, and device of `base`.

        Args:
            base: The base weight.
            compute: Returns the weight with its updates.
            multiply: Returns `F.linear` of an input, this weight, and a bias, without saving the weight for the
                backward pass. Returns `None` if the weight must be computed. This argument itself is `None` for
                convolutions and transformers' `Conv1D`.
        """
        weight = base.detach().as_subclass(EffectiveWeight)
        weight._base_weight = base
        weight._compute = compute
        weight._multiply = multiply
        weight._effective = None
        return weight

    def value(self) -> Tensor:
        """Return the effective weight, computed once."""
        if self._effective is None:
            self._effective = self._compute()
        return self._effective

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with the base weight for metadata and writes, and otherwise with the effective weight."""
        kwargs = dict(kwargs or {})
        if isinstance(out := kwargs.get("out"), EffectiveWeight):
            kwargs["out"] = out._base_weight
        name = func.__name__
        unwrap = partial(tree_map_only, EffectiveWeight, EffectiveWeight.value)
        unwrap_base = partial(tree_map_only, EffectiveWeight, attrgetter("_base_weight"))
        if func is F.linear and (y := _multiply(*args, **kwargs)) is not None:
            return y
        if name == "__get__":  # of an attribute, e.g. `shape`
            is_metadata = func.__self__.__name__ not in _VALUE_ATTRIBUTES
        else:
            is_metadata = name in _METADATA_METHODS
        is_in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if is_metadata or (is_in_place and not args):
            return func(*unwrap_base(args), **unwrap_base(kwargs))
        if is_in_place:  # writes to the first argument and reads the others
            args = (*unwrap_base(args[:1]), *args[1:])
        return func(*unwrap(args), **unwrap(kwargs))


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # named as in `F.linear`
    """Return `F.linear` of an effective weight that has not been computed yet, or `None` for other arguments."""
    if not isinstance(weight, EffectiveWeight) or weight._multiply is None or weight._effective is not None:
        return None
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return None
    return weight._multiply(input, bias)
