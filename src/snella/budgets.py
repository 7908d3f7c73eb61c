"""Budgets of a layer's adapters, in buffers that are saved with the adapter and survive model averaging.

Model averaging may also average buffers (`AveragedModel(use_buffers=True)`, timm's `ModelEmaV2`). An averaged budget
no longer matches its seal, a hash of the budget, so the layer restores the most recently set budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


class LiveBudgets(dict[str, tuple[int, ...]]):
    """Most recently set budgets of a layer's adapters, shared by all copies of the layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveBudgets:
        return self


def compute_seal(budget: int) -> int:
    """Return a hash of a budget that averaging does not preserve, to detect averaged budgets."""
    return (budget + 1) * 0x9E3779B1 % 0x7FFFFFFF


def read_budgets(layer: SnellaLayer, adapter_name: str) -> tuple[int, ...]:
    """Return the budgets in the buffer, after replacing averaged budgets with the live ones."""
    buffer, seals = layer.snella_budget[adapter_name], layer.snella_seal[adapter_name]
    budgets, stored_seals = torch.stack((buffer, seals.to(buffer.device))).tolist()  # one transfer
    is_sealed = stored_seals == [compute_seal(budget) for budget in budgets]
    if is_sealed and not layer._cache.is_written_without_seal(adapter_name, buffer, seals):
        layer._cache.record_seal(adapter_name, buffer, seals)
        return tuple(budgets)
    live = layer._live_budgets[adapter_name]
    buffer.copy_(torch.tensor(live, dtype=buffer.dtype))
    seal_budgets(layer, adapter_name, live)
    return live


def seal_budgets(layer: SnellaLayer, adapter_name: str, budgets: tuple[int, ...] | None = None) -> None:
    """Record the buffer's values as the live budgets.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        budgets: The buffer's values; read from the device by default.
    """
    buffer = layer.snella_budget[adapter_name]
    if buffer.is_meta:
        layer.snella_seal[adapter_name] = torch.zeros_like(buffer)
        return
    budgets = tuple(buffer.tolist()) if budgets is None else budgets
    layer._live_budgets[adapter_name] = budgets
    seals = torch.tensor([compute_seal(budget) for budget in budgets], dtype=buffer.dtype, device=buffer.device)
    layer.snella_seal[adapter_name] = seals
    layer._cache.record_seal(adapter_name, buffer, seals)
    layer._cache.record_budgets(adapter_name, buffer, budgets)


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
