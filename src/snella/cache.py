"""Layer caches, invalidated by parameter changes; budget buffers; and the lazy `layer.weight`.

Budgets are buffers that are saved with the adapter. Model averaging may also average buffers
(`AveragedModel(use_buffers=True)`, timm's `ModelEmaV2`). An averaged budget no longer matches its seal, a hash of the
budget, so the layer restores the most recently set budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from snella.autograd import RecomputeCache
from snella.kernels import Factors

if TYPE_CHECKING:
    from snella.layer import SnellaLayer

_optimizer_steps: list[int] = []  # empty until the first call of `optimizer_steps`
_step_checks: list[Callable[[Optimizer], bool]] = []


def optimizer_steps() -> int:
    """Return the number of optimizer steps in this process since the first call of this function.

    Tensor versions do not reveal all changes: 8-bit optimizers, for example, write through raw pointers.
    """
    if not _optimizer_steps:
        _optimizer_steps.append(0)
        register_optimizer_step_post_hook(_count_step)
    return _optimizer_steps[0]


def check_after_step(check: Callable[[Optimizer], bool]) -> None:
    """Call `check` with the optimizer after every optimizer step until it returns True."""
    optimizer_steps()
    _step_checks.append(check)


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    _optimizer_steps[0] += 1
    if _step_checks:
        _step_checks[:] = [check for check in _step_checks if not check(optimizer)]


def compute_fingerprint(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, int, int], ...] | None:
    """Return the ids, addresses and versions of tensors, at least one of which changes with every recorded write.

    Returns `None` for tensors created in inference mode or on the meta device, which do not track changes.
    """
    entries = []
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_inference() or tensor.is_meta:
            return None
        entries.append((id(tensor), tensor.data_ptr(), tensor._version))
    return tuple(entries)


@dataclass
class AdapterState:
    """State shared by the calls of a layer while one adapter's factors and budgets do not change.

    Args:
        key: Fingerprint of the factors and all other inputs; `None` if the state is not shared.
        factors: The factors, kept alive because Python reuses the ids of freed objects.
        thresholds: `[G]`, or `None` before the first call.
        recompute: Cache of a recomputed forward pass, for the backward pass.
    """

    key: tuple[Any, ...] | None = None
    factors: Factors | None = None
    thresholds: Tensor | None = None
    recompute: RecomputeCache = field(default_factory=RecomputeCache)


class BudgetRecord(NamedTuple):
    """Budgets of an adapter as integers, with the buffer and seal that contain them and their versions."""

    budgets: tuple[int, ...]
    buffer: Tensor
    address: int
    version: int
    seal: Tensor
    seal_version: int


class LayerCache:
    """Cache of thresholds (a few bytes), budgets and, in evaluation only, of the effective weight.

    Entries are valid for one state of their inputs. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.budget_records: dict[str, BudgetRecord] = {}
        self.clear()

    def clear(self) -> None:
        """Clear all entries except the budgets."""
        self._adapters: dict[str, AdapterState] = {}
        self._factor_values: dict[tuple[str, ...], Tensor] = {}
        self.release_effective_weight()

    def release_effective_weight(self) -> None:
        """Free the effective weight, so that training does not hold a second copy of the model."""
        self._effective: tuple[tuple[Any, ...], Sequence[Tensor], Tensor] | None = None

    def check_written(self, names: Sequence[str], factors: Sequence[Tensor]) -> None:
        """Invalidate entries if factors changed without a version change, e.g. through `.data`.

        Copies and compares the values of `factors`, which are small compared to the weight, and synchronizes with
        their device.
        """
        if any(factor.is_meta or (factor.is_cuda and torch.cuda.is_current_stream_capturing()) for factor in factors):
            return
        with torch.no_grad():
            values = torch.cat([factor.flatten() for factor in factors])
        previous = self._factor_values.get(tuple(names))
        if previous is not None and not torch.equal(previous, values):
            self._adapters.clear()
            self.release_effective_weight()
        self._factor_values[tuple(names)] = values

    def adapter(self, name: str, factors: Factors, budgets: tuple[int, ...], mode: tuple[str, bool]) -> AdapterState:
        """Return the cached state of an adapter, or a new one if its factors, budgets or mode have changed."""
        # a later backward pass cannot use tensors computed in inference mode
        fingerprint = None if torch.is_inference_mode_enabled() else compute_fingerprint(factors)
        if fingerprint is None:
            return AdapterState()
        key = (fingerprint, optimizer_steps(), budgets, mode)
        state = self._adapters.get(name)
        if state is None or state.key != key:
            state = self._adapters[name] = AdapterState(key, factors)
        return state

    def weight(self, tensors: Sequence[Tensor], settings: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """Return the effective weight, computed at most once per state of `tensors` and `settings`."""
        fingerprint = compute_fingerprint(tensors)
        if fingerprint is None:
            return compute()
        key = (*fingerprint, optimizer_steps(), settings)
        if self._effective is None or self._effective[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._effective = (key, tensors, compute())
        return self._effective[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        return LayerCache()

    def __reduce__(self) -> tuple[type[LayerCache], tuple[()]]:
        return (LayerCache, ())


# budgets -----------------------------------------------------------------------------------------------------------


class LiveBudgets(dict[str, tuple[int, ...]]):
    """Most recently set budgets of a layer's adapters, shared by all copies of the layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveBudgets:
        return self


def compute_seal(budget: int) -> int:
    """Return a hash of a budget that averaging does not preserve, to detect averaged budgets."""
    return (budget + 1) * 0x9E3779B1 % 0x7FFFFFFF


def read_budgets(layer: SnellaLayer, adapter_name: str) -> tuple[int, ...]:
    """Return the budgets in the buffer, after replacing averaged budgets with the live ones."""
    buffer, seal = layer.snella_budget[adapter_name], layer.snella_seal[adapter_name]
    budgets, stored_seals = torch.stack((buffer, seal.to(buffer.device))).tolist()  # one transfer
    is_sealed = stored_seals == [compute_seal(budget) for budget in budgets]
    record = layer._cache.budget_records.get(adapter_name)
    if is_sealed and record is not None and record.buffer is buffer and record.seal is seal:
        # a write, e.g. of an averaged `state_dict`, may change the buffer but not its seal
        is_sealed = buffer._version == record.version or seal._version != record.seal_version
    if not is_sealed:
        budgets = layer._live_budgets[adapter_name]
        buffer.copy_(torch.tensor(budgets, dtype=buffer.dtype))
        seal_budgets(layer, adapter_name, budgets)
        return budgets
    return _record_budgets(layer, adapter_name, tuple(budgets))


def _record_budgets(layer: SnellaLayer, adapter_name: str, budgets: tuple[int, ...]) -> tuple[int, ...]:
    """Cache the budgets in an adapter's buffer, unless its tensors do not track changes, and return them."""
    buffer, seal = layer.snella_budget[adapter_name], layer.snella_seal[adapter_name]
    if buffer.is_inference() or seal.is_inference():
        layer._cache.budget_records.pop(adapter_name, None)
    else:
        record = BudgetRecord(budgets, buffer, buffer.data_ptr(), buffer._version, seal, seal._version)
        layer._cache.budget_records[adapter_name] = record
    return budgets


def seal_budgets(layer: SnellaLayer, adapter_name: str, budgets: tuple[int, ...] | None = None) -> None:
    """Record the buffer's values as the live budgets; see `SnellaLayer.seal_budgets`."""
    buffer = layer.snella_budget[adapter_name]
    if buffer.is_meta:
        layer.snella_seal[adapter_name] = torch.zeros_like(buffer)
        return
    budgets = tuple(buffer.tolist()) if budgets is None else budgets
    seals = [compute_seal(budget) for budget in budgets]
    layer.snella_seal[adapter_name] = torch.tensor(seals, dtype=buffer.dtype, device=buffer.device)
    layer._live_budgets[adapter_name] = _record_budgets(layer, adapter_name, budgets)


def seal_all_budgets(layer: SnellaLayer, *_: Any) -> None:
    """Seal the loaded budgets; a `load_state_dict` hook."""
    for name in layer.snella_budget:
        seal_budgets(layer, name)


def restore_budgets(layer: SnellaLayer, *_: Any) -> None:
    """Replace averaged budgets, for code that reads the buffers directly; a `state_dict` hook."""
    for name, buffer in layer.snella_budget.items():
        if not buffer.is_meta and not layer.snella_seal[name].is_meta:
            read_budgets(layer, name)


@contextmanager
def buffers_off_meta(layer: SnellaLayer) -> Iterator[None]:
    """Keep budgets and seals on their device when the layer moves to the meta device, e.g. in accelerate."""
    buffers = (layer.snella_budget, layer.snella_seal)
    before = [(values, name, values[name]) for values in buffers for name in values]
    yield
    for values, name, buffer in before:
        if values[name].is_meta:
            values[name] = buffer


# lazy weight -------------------------------------------------------------------------------------------------------

_METADATA_METHODS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_signed", "get_device", "data_ptr", "untyped_storage", "__len__"),
}
_VALUE_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that return values


class EffectiveWeight(Tensor):
    """Lazy `W0 + Σ scaling·S`, the value of `layer.weight`; the first operation that reads it merges the updates.

    Shape, dtype, device and `data` come from the base weight, and in-place operations write into the base weight.
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
        """Create a lazy weight with the shape, dtype and device of `base`.

        Args:
            base: The base weight.
            compute: Returns the weight with its updates.
            multiply: Computes `F.linear` of an input, the weight and a bias without saving the weight for the backward
                pass, or returns `None` if `compute` does not save it either. `None` if the layer is not linear.
        """
        weight = base.detach().as_subclass(EffectiveWeight)
        weight._base_weight, weight._compute, weight._multiply, weight._effective = base, compute, multiply, None
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
        """Call `func` with the base weight for metadata and writes, otherwise with the effective weight."""
        kwargs = kwargs or {}
        name = func.__name__
        unwrap = partial(tree_map_only, EffectiveWeight, EffectiveWeight.value)
        unwrap_base = partial(tree_map_only, EffectiveWeight, attrgetter("_base_weight"))
        if func is F.linear and (y := _multiply(*args, **kwargs)) is not None:
            return y
        if name == "__get__":
            is_metadata = func.__self__.__name__ not in _VALUE_ATTRIBUTES
        else:
            is_metadata = name in _METADATA_METHODS or name in ("__set__", "__setitem__")
        is_in_place = name.endswith("_") and not name.endswith("__")
        if is_metadata or (is_in_place and not args):
            return func(*unwrap_base(args), **unwrap_base(kwargs))
        if is_in_place:
            args = (*unwrap_base(args[:1]), *args[1:])
        return func(*unwrap(args), **unwrap(kwargs))


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return `F.linear` with an effective weight that has not been computed yet, otherwise `None`."""
    if not isinstance(weight, EffectiveWeight) or weight._multiply is None or weight._effective is not None:
        return None
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return None
    return weight._multiply(input, bias)
