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
    """

    shape: torch.Size
    dtype: torch.dtype
    axes: tuple[int, ...]


def encode(z: Tensor) -> tuple[Tensor, Layout]:
    """Round a tensor to eight bits, group by group of its flattened entries.

        q_i = round(z_i / s),   s = max |z| / 127 over its group of 64;   |s·q_i − z_i| ≤ s/2

    Args:
        z: Floating-point numbers, of any shape; neighbors are those in memory.

    Returns:
        Codes, and behind them the scales in float32: one byte an entry and a sixteenth, uint8 `[17/16 · entries]` where
        the last group is whole; and what `decode` needs to know.
    """
    order = sorted(range(z.ndim), key=z.stride, reverse=True)
    in_memory = z.detach().permute(order)
    flat = in_memory.reshape(-1)
    missing = -len(flat) % GROUP
    groups = (pad(flat, (0, missing)) if missing else flat).view(-1, GROUP)
    encoded = torch.empty(groups.numel() + 4 * len(groups), dtype=torch.uint8, device=z.device)
    codes, scales = _parts(encoded)
    torch.div(groups.abs().amax(1, keepdim=True).float(), _LEVELS, out=scales)
    # a group of zeros has no inverse, and stays one of zeros
    codes.copy_((groups * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_()).round_())
    return encoded, Layout(in_memory.shape, z.dtype, tuple([order.index(axis) for axis in range(z.ndim)]))


def decode(encoded: Tensor, layout: Layout) -> Tensor:
    """The tensor that `encode` rounded, in its shape and dtype; its axes lie in memory in the same order."""
    codes, scales = _parts(encoded)
    flat = codes.float().mul_(scales).to(layout.dtype).view(-1)
    return flat[: layout.shape.numel()].view(layout.shape).permute(layout.axes)


def _parts(encoded: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[groups, 64]` and scales `[groups, 1]`, as views."""
    codes, scales = encoded.tensor_split([len(encoded) // (GROUP + 4) * GROUP])
    return codes.view(torch.int8).view(-1, GROUP), scales.view(torch.float32).view(-1, 1)


__all__ = ["GROUP", "Layout", "decode", "encode"]
