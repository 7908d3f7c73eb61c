"""Activations in eight bits: groups of neighbors that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
"""Neighbors that share a scale: a channel that stands out takes the precision of 63 others, not that of its token."""
_LEVELS = 127


@dataclass(frozen=True)
class Layout:
    """What an encoded tensor looked like.

    Args:
        shape: Its shape, axes in the order in which they lie in memory.
        dtype: Its dtype.
        axes: Where each of its axes is in that order.
        row: Entries that no group reaches beyond.
        group: Entries of a group.
    """

    shape: torch.Size
    dtype: torch.dtype
    axes: tuple[int, ...]
    row: int
    group: int


def encode(z: Tensor, *, by_row: bool = False) -> tuple[Tensor, Layout]:
    """Round a tensor to eight bits, group by group of its flattened entries.

        q_i = round(z_i / s),   s = max |z| / 127 over its group of 64;   |s·q_i − z_i| ≤ s/2

    Args:
        z: Floating-point numbers, of any shape; neighbors are those in memory.
        by_row: Cut each row of the last axis into groups of equal size, at most 64, where it lies innermost in memory.
            A row that is normalized by itself may be far smaller than the next one, whose scale would round it to zero.

    Returns:
        Scales in float32, then codes: uint8 `[groups · (4 + group)]`, 17/16 bytes an entry for groups of 64; and the
        layout for `decode`.
    """
    order = sorted(range(z.ndim), key=z.stride, reverse=True)
    in_memory = z.detach().permute(order)
    row, group = max(z.numel(), 1), GROUP
    if by_row and order[-1:] == [z.ndim - 1] and z.shape[-1] > 0:
        row = z.shape[-1]
        group = -(-row // -(-row // GROUP))
    rows = in_memory.reshape(-1, row)
    missing = -row % group
    groups = (pad(rows, (0, missing)) if missing and len(rows) else rows).reshape(-1, group)
    encoded = torch.empty(groups.numel() + 4 * len(groups), dtype=torch.uint8, device=z.device)
    codes, scales = _parts(encoded, group)
    torch.div(groups.abs().amax(1, keepdim=True).float(), _LEVELS, out=scales)
    # a group of zeros has no inverse, and stays one of zeros
    codes.copy_((groups * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_()).round_())
    axes = tuple([order.index(axis) for axis in range(z.ndim)])
    return encoded, Layout(in_memory.shape, z.dtype, axes, row, group)


def decode(encoded: Tensor, layout: Layout) -> Tensor:
    """The tensor that `encode` rounded, in its shape and dtype; its axes lie in memory in the same order."""
    codes, scales = _parts(encoded, layout.group)
    rows = codes.float().mul_(scales).to(layout.dtype).view(-1, layout.row + -layout.row % layout.group)
    return rows[:, : layout.row].reshape(layout.shape).permute(layout.axes)


def _parts(encoded: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes `[groups, group]` and scales `[groups, 1]`, as views."""
    scales, codes = encoded.tensor_split([len(encoded) // (group + 4) * 4])
    return codes.view(torch.int8).view(-1, group), scales.view(torch.float32).view(-1, 1)


__all__ = ["GROUP", "Layout", "decode", "encode"]
