"""Group-wise int8 compression of activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
"""Entries per scale; an outlier channel degrades the precision of 63 other entries instead of the whole token."""
_LEVELS = 127


@dataclass(frozen=True)
class Layout:
    """Shape and memory layout of an encoded tensor.

    Args:
        shape: Shape with the axes in memory order.
        dtype: Dtype of the tensor.
        axes: Position of each axis in memory order.
        row: Entries per row; groups do not cross rows.
        group: Entries per group.
    """

    shape: torch.Size
    dtype: torch.dtype
    axes: tuple[int, ...]
    row: int
    group: int


def encode(z: Tensor, *, by_row: bool = False) -> tuple[Tensor, Layout]:
    """Quantize a tensor to int8 in groups of entries that are adjacent in memory.

        q_i = round(z_i / s),   s = max |z| / 127 over its group of 64;   |s·q_i − z_i| ≤ s/2

    Args:
        z: Floating-point tensor of any shape.
        by_row: Split each row of the last axis into groups of equal size, at most 64, if the last axis is innermost in
            memory. For inputs of row-wise normalizations, where a shared scale could round a small row to zero.

    Returns:
        Float32 scales followed by codes, uint8 `[groups · (4 + group)]` (17/16 bytes per entry for groups of 64), and
        the layout for `decode`.
    """
    order = sorted(range(z.ndim), key=z.stride, reverse=True)
    z_in_memory_order = z.detach().permute(order)
    row, group = max(z.numel(), 1), GROUP
    if by_row and order[-1:] == [z.ndim - 1] and z.shape[-1] > 0:
        row = z.shape[-1]
        group = -(-row // -(-row // GROUP))
    rows = z_in_memory_order.reshape(-1, row)
    padding = -row % group
    groups = (pad(rows, (0, padding)) if padding and len(rows) else rows).reshape(-1, group)
    encoded = torch.empty(groups.numel() + 4 * len(groups), dtype=torch.uint8, device=z.device)
    codes, scales = _parts(encoded, group)
    torch.div(groups.abs().amax(1, keepdim=True).float(), _LEVELS, out=scales)
    # the clamp avoids division by zero for groups of zeros
    codes.copy_((groups * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_()).round_())
    axes = tuple([order.index(axis) for axis in range(z.ndim)])
    return encoded, Layout(z_in_memory_order.shape, z.dtype, axes, row, group)


def decode(encoded: Tensor, layout: Layout) -> Tensor:
    """Decode the result of `encode` to the original shape, dtype and memory order."""
    codes, scales = _parts(encoded, layout.group)
    rows = codes.float().mul_(scales).to(layout.dtype).view(-1, layout.row + -layout.row % layout.group)
    return rows[:, : layout.row].reshape(layout.shape).permute(layout.axes)


def _parts(encoded: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return views of the codes `[groups, group]` and scales `[groups, 1]`."""
    scales, codes = encoded.tensor_split([len(encoded) // (group + 4) * 4])
    return codes.view(torch.int8).view(-1, group), scales.view(torch.float32).view(-1, 1)


__all__ = ["GROUP", "Layout", "decode", "encode"]
