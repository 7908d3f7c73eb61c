"""Which entries an update with a fixed support may change, one bit a weight."""

from __future__ import annotations

import torch
from torch import Tensor


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
