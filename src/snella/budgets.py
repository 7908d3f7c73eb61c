"""Budgets of a layer's matrices, as buffers that are protected from model averaging.

The budget of a matrix is the maximum number of nonzero entries of its update. A layer stores budgets in four forms:

| form | contents |
|---|---|
| `layer.snella_budget` | buffers, saved with the adapter and read by compiled graphs |
| `layer.snella_seal` | buffers, not saved: a hash of each budget (its seal) |
| `Budgets.live` | the most recently set budgets |
| `Budgets.records` | copies of the buffers as integers, valid until a buffer changes |

Model averaging may also average buffers (`AveragedModel(use_buffers=True)`, timm's `ModelEmaV2`). An averaged budget no
longer matches its seal, so the layer restores the live budgets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


class BudgetRecord(NamedTuple):
    """Budgets of an adapter as integers, and the state of their buffer and seal, to detect later changes."""

    budgets: tuple[int, ...]
    buffer: Tensor
    address: int
    version: int
    seal: Tensor
    seal_version: int


class Budgets:
    """Budgets of a layer's adapters as integers.

    Attributes:
        live: Most recently set budgets by adapter. All copies of the layer share them.
        records: Known contents of the buffers, by adapter. Copies and pickles start without records.
    """

    def __init__(self) -> None:
        self.live: dict[str, tuple[int, ...]] = {}
        self.records: dict[str, BudgetRecord] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Budgets:
        copied = Budgets()
        copied.live = self.live
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"live": self.live, "records": {}}


class BudgetBuffers(BufferDict):
    """Budgets or seals of a layer by adapter. Assigning an attribute seals the budgets again.

    This is necessary because transformers' `load_adapter` assigns the budgets and replaces the seals with uninitialized
    tensors. Averaging writes in place, and moves between devices replace the entries of `_buffers`, so neither seals
    the budgets.
    """

    # does not refer to the layer itself, because a reference cycle would keep a deleted model in memory
    _group: LayerBudgets | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        group = self._group
        # a replica of `nn.DataParallel` is not in its group and must not seal the original's budgets
        if name in self._buffers and group is not None and self in (group.snella_budget, group.snella_seal):
            seal_budgets(group, name)


@dataclass(frozen=True, eq=False)
class LayerBudgets:
    """The parts of a `SnellaLayer` that contain its budgets, under the layer's attribute names."""

    snella_budget: BudgetBuffers
    snella_seal: BudgetBuffers
    _budgets: Budgets


def link_budgets(layer: SnellaLayer) -> None:
    """Make assignments to the layer's buffers seal its budgets."""
    group = LayerBudgets(layer.snella_budget, layer.snella_seal, layer._budgets)
    layer.snella_budget._group = layer.snella_seal._group = group


def compute_seal(budget: int) -> int:
    """Return the seal of a budget: a hash that averaging does not preserve, so that averaged budgets are detected."""
    # multiplicative hash of a square, because the mean of squares is not the square of the mean
    return (budget + 1) ** 2 * 0x9E3779B1 % 0x7FFFFFFF


def budget_error(layer: SnellaLayer, adapter_name: str, budgets: Sequence[int]) -> str | None:
    """Return the end of an error message about invalid budgets, or `None` if they are valid."""
    sizes = [rows * layer.in_features for rows in layer.row_counts[adapter_name]]
    if len(budgets) == len(sizes) and all(0 <= budget <= size for budget, size in zip(budgets, sizes, strict=True)):
        return None
    return f"must be one number per matrix, from 0 to {sizes}, got {list(budgets)}"


def read_budgets(layer: SnellaLayer, adapter_name: str) -> tuple[int, ...]:
    """Return the budgets in the buffer, after replacing averaged budgets with the live ones."""
    buffer, seal = layer.snella_budget[adapter_name], layer.snella_seal[adapter_name]
    budgets, stored_seals = torch.stack((buffer, seal.to(buffer.device))).tolist()  # one transfer for both
    is_sealed = stored_seals == [compute_seal(budget) for budget in budgets]
    record = layer._budgets.records.get(adapter_name)
    if is_sealed and record is not None and record.buffer is buffer and record.seal is seal:
        # if only the buffer was written, e.g. with an averaged budget, a matching seal does not count
        is_sealed = buffer._version == record.version or seal._version != record.seal_version
    if not is_sealed:
        budgets = layer._budgets.live[adapter_name]
        write_budgets(layer, adapter_name, budgets)
        return budgets
    return _record_budgets(layer, adapter_name, tuple(budgets))


def write_budgets(layer: SnellaLayer, adapter_name: str, budgets: tuple[int, ...]) -> None:
    """Set the budgets in the buffer and make them the live ones."""
    buffer = layer.snella_budget[adapter_name]
    buffer.copy_(torch.tensor(budgets, dtype=buffer.dtype))
    seal_budgets(layer, adapter_name, budgets)


def _record_budgets(layer: SnellaLayer | LayerBudgets, adapter_name: str, budgets: tuple[int, ...]) -> tuple[int, ...]:
    """Create a record of the budgets that an adapter's buffer contains, and return the budgets.

    Inference tensors do not track changes, so they get no record.
    """
    buffer, seal = layer.snella_budget[adapter_name], layer.snella_seal[adapter_name]
    if buffer.is_inference() or seal.is_inference():
        layer._budgets.records.pop(adapter_name, None)
    else:
        record = BudgetRecord(budgets, buffer, buffer.data_ptr(), buffer._version, seal, seal._version)
        layer._budgets.records[adapter_name] = record
    return budgets


def seal_budgets(layer: SnellaLayer | LayerBudgets, adapter_name: str, budgets: tuple[int, ...] | None = None) -> None:
    """Seal the buffer's values and record them as the live budgets.

    A caller that knows the values can pass them as `budgets` to avoid reading the buffer.
    """
    buffer = layer.snella_budget[adapter_name]
    if buffer.is_meta:  # there are no values to seal yet
        layer.snella_seal[adapter_name] = torch.zeros_like(buffer)
        return
    budgets = tuple(buffer.tolist()) if budgets is None else budgets
    seals = [compute_seal(budget) for budget in budgets]
    layer.snella_seal[adapter_name] = torch.tensor(seals, dtype=buffer.dtype, device=buffer.device)
    layer._budgets.live[adapter_name] = _record_budgets(layer, adapter_name, budgets)


def seal_all_budgets(layer: SnellaLayer, *_: Any) -> None:
    """Seal the loaded budgets; registered as a hook of `load_state_dict`."""
    for name in layer.snella_budget:
        seal_budgets(layer, name)


def warn_about_missing_budgets(layer: SnellaLayer, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Warn about factors without their budgets; registered as a hook that runs before `load_state_dict`."""
    for name, config in layer.snella_config.items():
        is_sparse = config.target_sparsity > 0 or config.init_sparsity > 0
        has_factors = f"{prefix}snella_A.{name}" in state_dict
        if is_sparse and has_factors and f"{prefix}snella_budget.{name}" not in state_dict:
            warnings.warn(
                f"the state dict contains the factors of adapter {name!r} but not their budgets (snella_budget), so "
                "the updates keep the budgets that the model has now; save all entries whose names contain 'snella_', "
                "or use save_pretrained",
                stacklevel=2,
            )


def restore_budgets(layer: SnellaLayer, *_: Any, only_changed: bool = False) -> None:
    """Replace averaged budgets with the live ones, for code that reads the buffers directly.

    Also registered as a hook of `state_dict`. If `only_changed`, buffers whose version is unchanged are not read, which
    avoids a device synchronization.
    """
    read = layer.budgets if only_changed else partial(read_budgets, layer)
    for name, buffer in layer.snella_budget.items():
        if not buffer.is_meta and not layer.snella_seal[name].is_meta:
            read(name)


@contextmanager
def buffers_off_meta(layer: SnellaLayer) -> Iterator[None]:
    """Keep budgets and seals on their device if the layer moves to the meta device in this block."""
    buffer_dicts = (layer.snella_budget, layer.snella_seal)
    originals = [(buffers, name, buffers[name]) for buffers in buffer_dicts for name in buffers]
    yield
    for buffers, name, original in originals:
        if buffers[name].is_meta:
            buffers[name] = original
