"""What a layer remembers while its parameters stay the same, and its weight as others read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from snella.ops.autograd import RecomputeCache
from snella.ops.spec import Factors
from snella.tuner.support import unpack_positions

_optimizer_steps: list[int] = []  # one number once somebody counts; empty before


def optimizer_steps() -> int:
    """Number of optimiser steps of this process since the first call.

    Not every optimiser tells torch that it changed a parameter (8-bit ones write through raw pointers), so a tensor's
    version alone does not prove that it is unchanged.
    """
    if not _optimizer_steps:
        _optimizer_steps.append(0)
        register_optimizer_step_post_hook(_count_step)
    return _optimizer_steps[0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


class _State:
    """The tensors that something was computed from, and what torch knows of their contents."""

    def __init__(self, tensors: Sequence[Tensor], *settings: Any) -> None:
        # the tensors themselves, not their ids: an id is reused once its owner is gone
        self.tensors = tuple(tensors)
        self.contents = (*((t.data_ptr(), t._version) for t in tensors), *settings)

    def is_same_as(self, other: _State) -> bool:
        """Whether nothing changed between the two."""
        return self.contents == other.contents and all(
            mine is theirs for mine, theirs in zip(self.tensors, other.tensors, strict=True)
        )


def _keeps_versions(tensors: Sequence[Tensor]) -> bool:
    """Whether torch counts changes of these tensors: not of those born in inference mode, nor on the meta device."""
    return not any(tensor.is_inference() or tensor.is_meta for tensor in tensors)


@dataclass
class AdapterState:
    """What calls of a layer share while one adapter's parameters stay the same.

    Args:
        computed_from: The parameters; `None` where nothing is shared.
        thresholds: `[G]`, once some call has returned them.
        recompute: What a recomputed forward pass leaves to the backward pass.
    """

    computed_from: _State | None
    thresholds: Tensor | None = None
    recompute: RecomputeCache = field(default_factory=RecomputeCache)


class EffectiveWeightCache:
    """Thresholds (a few bytes, kept while training) and the effective weight (kept in evaluation only).

    Both are valid for one state of the tensors that they were computed from. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._adapters: dict[str, AdapterState] = {}
        self._integers: dict[str, tuple[_State, tuple[int, ...]]] = {}
        self._positions: dict[str, tuple[_State, Tensor]] = {}
        self.drop_effective_weight()

    def drop_effective_weight(self) -> None:
        """Let the effective weight go: training starts, which must not hold a second copy of the model."""
        self._effective: tuple[_State, Tensor] | None = None

    def adapter(self, name: str, factors: Factors, budgets: tuple[int, ...], mode: str) -> AdapterState:
        """What is known of an adapter; an empty state once its factors or budgets have changed."""
        tensors = [tensor for tensor in factors if tensor is not None]
        if torch.is_inference_mode_enabled() or not _keeps_versions(tensors):
            # what is computed in inference mode cannot be kept for a backward pass afterwards
            return AdapterState(None)
        computed_from = _State(tensors, optimizer_steps(), budgets, mode)
        known = self._adapters.get(name)
        if known is None or known.computed_from is None or not known.computed_from.is_same_as(computed_from):
            known = self._adapters[name] = AdapterState(computed_from)
        return known

    def integers(self, name: str, budgets: Tensor) -> tuple[int, ...]:
        """The budgets as Python integers; reading them waits for the device only after they changed."""
        if not _keeps_versions([budgets]):
            return tuple(budgets.tolist())
        state = _State([budgets])
        known = self._integers.get(name)
        if known is None or not known[0].is_same_as(state):
            known = self._integers[name] = (state, tuple(budgets.tolist()))
        return known[1]

    def positions(self, name: str, packed: Tensor) -> Tensor:
        """The entries that a fixed support names, unpacked once for each of its states."""
        if not _keeps_versions([packed]):
            return unpack_positions(packed)
        state = _State([packed])
        known = self._positions.get(name)
        if known is None or not known[0].is_same_as(state):
            with torch.inference_mode(False), torch.no_grad():
                known = self._positions[name] = (state, unpack_positions(packed))
        return known[1]

    def effective_weight(
        self, tensors: Sequence[Tensor], settings: tuple[Any, ...], compute: Callable[[], Tensor]
    ) -> Tensor:
        """The effective weight for this state of `tensors` and `settings`, computed at most once."""
        if not _keeps_versions(tensors):
            return compute()
        state = _State(tensors, optimizer_steps(), settings)
        if self._effective is None or not self._effective[0].is_same_as(state):
            with torch.inference_mode(False), torch.no_grad():
                self._effective = (state, compute())
        return self._effective[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> EffectiveWeightCache:
        return EffectiveWeightCache()

    def __reduce__(self) -> tuple[type[EffectiveWeightCache], tuple[()]]:
        return (EffectiveWeightCache, ())


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
    _effective: Tensor | None

    @staticmethod
    def of(base: Tensor, compute: Callable[[], Tensor]) -> EffectiveWeight:
        """The weight that `compute` returns, in the shape, dtype and device of `base`."""
        weight = base.detach().as_subclass(EffectiveWeight)
        weight._stored, weight._compute, weight._effective = base, compute, None
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


def _replace(arguments: Any, attribute: str | None = None) -> Any:
    """Arguments with every effective weight replaced by its value, or by one of its attributes."""
    if attribute is not None:
        return tree_map_only(EffectiveWeight, lambda weight: getattr(weight, attribute), arguments)
    return tree_map_only(EffectiveWeight, EffectiveWeight.value, arguments)
