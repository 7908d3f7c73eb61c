"""Caches of thresholds and effective weights, invalidated by parameter changes and optimizer steps.

The effective weight of a layer is its base weight plus the updates of all active adapters. An update is nonzero only
where the magnitude of its merged matrix exceeds a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from snella.autograd import CheckpointCache
from snella.kernels import Factors

_optimizer_steps: list[int] = []  # the count, or empty until the first call of `optimizer_steps`
_step_checks: list[Callable[[Optimizer], bool]] = []


def optimizer_steps() -> int:
    """Return the number of optimizer steps in this process since the first call of this function.

    Caches need this count because tensor versions do not reveal all changes. For example, 8-bit optimizers write
    through raw pointers.
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
    """Count an optimizer step and run the remaining checks."""
    _optimizer_steps[0] += 1
    if _step_checks:
        _step_checks[:] = [check for check in _step_checks if not check(optimizer)]


def compute_fingerprint(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, int, int], ...] | None:
    """Return the ids, addresses, and versions of tensors. Every write that torch records changes one of these values.

    Returns `None` if a tensor was created in inference mode, in which torch records no writes, or is on the meta
    device.
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
        key: Fingerprint of the factors and all other inputs, or `None` if the state is not shared.
        factors: The factors, kept alive because Python reuses the ids of freed objects.
        thresholds: `[G]`, or `None` before the first call.
        checkpoint_cache: Results of a forward pass that activation checkpointing repeats, for the backward pass.
    """

    key: tuple[Any, ...] | None = None
    factors: Factors | None = None
    thresholds: Tensor | None = None
    checkpoint_cache: CheckpointCache = field(default_factory=CheckpointCache)


class LayerCache:
    """Cache of a layer: thresholds (a few bytes) and, in evaluation mode, the effective weight and the factors' values.

    An entry is valid as long as its inputs do not change. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Clear all entries."""
        self._adapters: dict[str, AdapterState] = {}
        self._factor_values: dict[str, Tensor] = {}
        self.release_effective_weight()

    def release_effective_weight(self) -> None:
        """Free the effective weight, so that training does not hold a second copy of the model."""
        # key, version of the weight, source tensors, weight
        self._effective: tuple[tuple[Any, ...], int, Sequence[Tensor], Tensor] | None = None

    def check_written(self, name: str, factors: Sequence[Tensor]) -> None:
        """Invalidate entries if an adapter's factors moved, or changed without a version change, e.g. through `.data`.

        Copies and compares the values of `factors`, which are small compared to the weight, and synchronizes with
        their device.
        """
        # a CUDA graph cannot capture the synchronization
        if any(factor.is_meta or (factor.is_cuda and torch.cuda.is_current_stream_capturing()) for factor in factors):
            return
        with torch.no_grad():
            values = torch.cat([factor.flatten() for factor in factors])
        previous = self._factor_values.get(name)
        if previous is not None and (previous.device != values.device or not torch.equal(previous, values)):
            self._adapters.clear()
            self.release_effective_weight()
        self._factor_values[name] = values

    def adapter(self, name: str, factors: Factors, budgets: tuple[int, ...], settings: tuple[Any, ...]) -> AdapterState:
        """Return an adapter's cached state, or a new one after an optimizer step or a change of its inputs.

        The new state is not cached in inference mode or if the factors have no fingerprint.
        """
        # a later backward pass cannot use tensors computed in inference mode
        fingerprint = None if torch.is_inference_mode_enabled() else compute_fingerprint(factors)
        if fingerprint is None:
            return AdapterState()
        key = (fingerprint, optimizer_steps(), budgets, settings)
        state = self._adapters.get(name)
        if state is None or state.key != key:
            state = self._adapters[name] = AdapterState(key, factors)
        return state

    def weight(self, tensors: Sequence[Tensor], settings: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """Return the effective weight, cached until an optimizer step or a change of `tensors` or `settings`.

        It is not cached if `tensors` have no fingerprint (see `compute_fingerprint`).
        """
        fingerprint = compute_fingerprint(tensors)
        if fingerprint is None:
            return compute()
        key = (*fingerprint, optimizer_steps(), settings)
        effective = self._effective  # read once, because replicas of `nn.DataParallel` share this cache
        # a caller that reads `layer.weight` may write into a view of the returned tensor
        if effective is None or effective[:2] != (key, effective[3]._version):
            with torch.inference_mode(False), torch.no_grad():
                value = compute()
                effective = self._effective = (key, value._version, tensors, value)
        return effective[3]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        return LayerCache()

    def __reduce__(self) -> tuple[type[LayerCache], tuple[()]]:
        return (LayerCache, ())
