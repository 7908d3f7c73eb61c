"""From a forward pass that recomputes to the backward pass that asked for it.

Activation checkpointing runs a layer's forward pass again in the middle of the backward pass, and the layer's own
backward pass follows at once. What the first has built, the second need not build again; nothing is kept in between
other than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Merged
from .update import Update


@dataclass(frozen=True)
class Handover:
    """What a recomputation built, and of which weight.

    Args:
        effective: `W0 + Σ scaling·S`, in the dtype of the product.
        merged: The updates' merged matrices.
        weight: `W0`; not a copy.
        version: Its version then.
    """

    effective: Tensor
    merged: list[list[Merged | None]]
    weight: Tensor | None
    version: int


def _is_within_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def hand_over(
    updates: Sequence[Update], weight: Tensor | None, effective: Tensor, merged: list[list[Merged | None]]
) -> None:
    """Leave what was built to the backward pass, if this is a recomputation."""
    slot = updates[0].handover
    slot.clear()
    if _is_within_backward() and not effective.is_inference():
        slot.append(Handover(effective, merged, weight, -1 if weight is None else weight._version))


def handed_over(
    updates: Sequence[Update], weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, list[list[Merged | None]] | None]:
    """Take what a recomputation has left: the effective weight and the merged matrices, or `None` twice."""
    slot = updates[0].handover
    if not slot:
        return None, None
    found = slot.pop()
    is_same = weight is None or (weight.data_ptr() == found.weight.data_ptr() and weight._version == found.version)
    if not is_same or found.effective.dtype != dtype or len(found.merged) != len(updates):
        return None, None
    return found.effective, found.merged
