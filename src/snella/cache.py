"""What a layer caches while its parameters stay the same, and its weight as others read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from snella.autograd import RecomputeCache
from snella.update import Factors

_optimizer_steps: list[int] = []  # one number once somebody counts; empty before
_step_checks: list[Callable[[Optimizer], bool]] = []


def optimizer_steps() -> int:
    """Number of optimizer steps of this process since the first call.

    Not every optimizer tells torch that it changed a parameter (8-bit ones write through raw pointers), so a tensor's
    version alone does not prove that it is unchanged.
    """
    if not _optimizer_steps:
        _optimizer_steps.append(0)
        register_optimizer_step_post_hook(_count_step)
    return _optimizer_steps[0]


def check_after_step(check: Callable[[Optimizer], bool]) -> None:
    """Call `check` with the optimizer after every optimizer step, until it returns whether it is done."""
    optimizer_steps()
    _step_checks.append(check)


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    _optimizer_steps[0] += 1
    if _step_checks:
        _step_checks[:] = [check for check in _step_checks if not check(optimizer)]


def contents_of(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, int, int], ...] | None:
    """What torch knows of the contents of tensors that somebody keeps alive: equal while nothing changes.

    `None` where torch does not count changes: of tensors born in inference mode, and on the meta device.
    """
    contents = []
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_inference() or tensor.is_meta:
            return None
        contents.append((id(tensor), tensor.data_ptr(), tensor._version))
    return tuple(contents)


@dataclass
class AdapterState:
    """What the calls of a layer share while one adapter's factors and budgets stay the same.

    Args:
        contents: Of the factors, with all else that it depends on; `None` where nothing is shared.
        factors: Kept alive, as an id is reused once its owner is gone.
        thresholds: `[G]`, once some call has returned them.
        recompute: What a recomputed forward pass leaves to the backward pass.
    """

    contents: tuple[Any, ...] | None = None
    factors: Factors | None = None
    thresholds: Tensor | None = None
    recompute: RecomputeCache = field(default_factory=RecomputeCache)


class LayerCache:
    """Thresholds (a few bytes, kept while training) and the effective weight (kept in evaluation only).

    Both are valid for one state of the tensors that they were computed from. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._sealed: dict[str, tuple[Tensor, int, Tensor, int]] = {}
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._adapters: dict[str, AdapterState] = {}
        self._written: dict[tuple[str, ...], Tensor] = {}
        self._budgets: dict[str, tuple[Tensor, int, int, tuple[int, ...]]] = {}
        self._positions: dict[str, tuple[Tensor, Any, Tensor]] = {}
        self.release_effective_weight()

    def release_effective_weight(self) -> None:
        """Drop the effective weight: training starts, which must not hold a second copy of the model."""
        self._effective: tuple[tuple[Any, ...], Sequence[Tensor], Tensor] | None = None

    def check_written(self, names: Sequence[str], factors: Sequence[Tensor]) -> None:
        """Drop what was computed from other values: whoever writes through `.data` raises no version.

        The values of `factors`, few beside the weight's, are copied and compared; that synchronizes with their device.
        """
        if any(factor.is_meta or (factor.is_cuda and torch.cuda.is_current_stream_capturing()) for factor in factors):
            return
        with torch.no_grad():
            values = torch.cat([factor.flatten() for factor in factors])
        known = self._written.get(tuple(names))
        if known is not None and not torch.equal(known, values):
            self._adapters.clear()
            self.release_effective_weight()
        self._written[tuple(names)] = values

    def adapter(self, name: str, factors: Factors, budgets: tuple[int, ...], mode: tuple[str, bool]) -> AdapterState:
        """What is known of an adapter; an empty state once its factors, its budgets or the mode have changed."""
        # what is computed in inference mode cannot be kept for a backward pass afterwards
        of_factors = None if torch.is_inference_mode_enabled() else contents_of(factors)
        if of_factors is None:
            return AdapterState()
        contents = (of_factors, optimizer_steps(), budgets, mode)
        known = self._adapters.get(name)
        if known is None or known.contents != contents:
            known = self._adapters[name] = AdapterState(contents, factors)
        return known

    def budgets(self, name: str, budget: Tensor, read: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """The budgets as Python integers; `read` synchronizes with the device, only after they changed."""
        known = self._budgets.get(name)
        if known is not None and known[0] is budget and known[1:3] == (budget.data_ptr(), budget._version):
            return known[3]
        integers = read(name)
        self.note_budgets(name, budget, integers)
        return integers

    def note_budgets(self, name: str, budget: Tensor, integers: tuple[int, ...]) -> None:
        """Remember the integers that a buffer holds."""
        if not (budget.is_inference() or budget.is_meta):
            self._budgets[name] = (budget, budget.data_ptr(), budget._version, integers)

    def note_seal(self, name: str, budget: Tensor, seal: Tensor) -> None:
        """Remember the state of a buffer of budgets and of its seal, which fits it."""
        if budget.is_inference() or seal.is_inference():
            self._sealed.pop(name, None)
        else:
            self._sealed[name] = (budget, budget._version, seal, seal._version)

    def is_written_without_seal(self, name: str, budget: Tensor, seal: Tensor) -> bool:
        """Whether something has written into the buffer alone since, as what averages a `state_dict` does."""
        known = self._sealed.get(name)
        is_known = known is not None and known[0] is budget and known[2] is seal
        return is_known and budget._version != known[1] and seal._version == known[3]  # type: ignore[index]

    def positions(self, name: str, packed: Tensor) -> Tensor:
        """The entries that a fixed support names, unpacked once for each of its states."""
        contents = contents_of([packed])
        if contents is None:
            return unpack_positions(packed)
        known = self._positions.get(name)
        if known is None or known[1] != contents:
            with torch.inference_mode(False), torch.no_grad():
                known = self._positions[name] = (packed, contents, unpack_positions(packed))
        return known[2]

    def effective_weight(
        self, tensors: Sequence[Tensor], settings: tuple[Any, ...], compute: Callable[[], Tensor]
    ) -> Tensor:
        """The effective weight for this state of `tensors` and `settings`, computed at most once."""
        contents = contents_of(tensors)
        if contents is None:
            return compute()
        key = (*contents, optimizer_steps(), settings)
        if self._effective is None or self._effective[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._effective = (key, tensors, compute())
        return self._effective[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        return LayerCache()

    def __reduce__(self) -> tuple[type[LayerCache], tuple[()]]:
        return (LayerCache, ())


class LiveBudgets(dict[str, tuple[int, ...]]):
    """Budgets of a layer's adapters as they were last set, in the layer or in a copy of it; copies share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveBudgets:
        return self


def seal_of(budget: int) -> int:
    """A number that follows from a budget, but whose mean over several budgets does not follow from their mean."""
    return (budget + 1) * 0x9E3779B1 % 0x7FFFFFFF


_DESCRIPTIONS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_signed", "get_device", "data_ptr", "untyped_storage", "__len__"),
}
_VALUES = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are operations


class EffectiveWeight(Tensor):
    """`W0 + Σ scaling·S` as a model reads it from `layer.weight`; merged once an operation asks for its values.

    Shape, dtype, device and `data` are those of the base weight, and so is what an in-place operation writes into.
    """

    _stored: Tensor
    _compute: Callable[[], Tensor]
    _multiply: Callable[[Tensor, Tensor | None], Tensor | None] | None
    _effective: Tensor | None

    @staticmethod
    def of(
        base: Tensor,
        compute: Callable[[], Tensor],
        multiply: Callable[[Tensor, Tensor | None], Tensor | None] | None = None,
    ) -> EffectiveWeight:
        """The weight that `compute` returns, in the shape, dtype and device of `base`.

        Args:
            base: The base weight.
            compute: Returns the weight with its updates.
            multiply: Returns `F.linear` of an input, the weight and a bias without keeping the weight for the backward
                pass, or `None` where `compute` keeps nothing.
        """
        weight = base.detach().as_subclass(EffectiveWeight)
        weight._stored, weight._compute, weight._multiply, weight._effective = base, compute, multiply, None
        return weight

    def value(self) -> Tensor:
        """The weight itself, computed once."""
        if self._effective is None:
            self._effective = self._compute()
        return self._effective

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with the base weight where it describes or writes, else with the effective one."""
        kwargs = kwargs or {}
        name = func.__name__
        if func is F.linear and (y := _multiply(*args, **kwargs)) is not None:
            return y
        if name == "__get__":
            describes = func.__self__.__name__ not in _VALUES
        else:
            describes = name in _DESCRIPTIONS or name in ("__set__", "__setitem__")
        writes = name.endswith("_") and not name.endswith("__")
        if describes or (writes and not args):
            return func(*_replace(args, "_stored"), **_replace(kwargs, "_stored"))
        if writes:
            args = (*_replace(args[:1], "_stored"), *args[1:])
        return func(*_replace(args), **_replace(kwargs))


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`F.linear` with an effective weight that nothing has asked for yet, `None` elsewhere."""
    if not isinstance(weight, EffectiveWeight) or weight._multiply is None or weight._effective is not None:
        return None
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return None
    return weight._multiply(input, bias)


def _replace(arguments: Any, attribute: str | None = None) -> Any:
    """Arguments with every effective weight replaced by its value, or by one of its attributes."""
    if attribute is not None:
        return tree_map_only(EffectiveWeight, lambda weight: getattr(weight, attribute), arguments)
    return tree_map_only(EffectiveWeight, EffectiveWeight.value, arguments)


def pack_positions(indices: Tensor, size: int) -> Tensor:
    """A bit for each of `size` entries, eight a byte, the first in the lowest bit: uint8 `[ceil(size / 8)]`.

    Args:
        indices: Positions of the ones, integer.
        size: Number of entries.

    Raises:
        ValueError: A position is out of range or occurs twice.
    """
    bits = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=indices.device)
    where = indices.long()
    if len(where) and not 0 <= int(where.min()) <= int(where.max()) < size:
        raise ValueError(f"indices must be in [0, {size}), got {int(where.min())} to {int(where.max())}")
    bits[where] = 1
    if int(bits.sum()) != len(where):
        raise ValueError(f"indices must differ, got {len(where)} of which {int(bits.sum())} are different")
    return (bits.view(-1, 8) << _shifts(bits.device)).sum(1, dtype=torch.uint8)


def unpack_positions(packed: Tensor) -> Tensor:
    """The ascending positions of the ones, int32."""
    bits = (packed[:, None] >> _shifts(packed.device)) & 1
    return torch.nonzero(bits.view(-1)).flatten().int()


def _shifts(device: torch.device) -> Tensor:
    """Places of the bits in a byte."""
    return torch.arange(8, dtype=torch.uint8, device=device)
