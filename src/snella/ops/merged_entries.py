"""Single entries of a merged matrix, for an update whose support is fixed instead of competed for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapted_linear.update import Update


def merged_entries(update: Update, indices: Tensor) -> Tensor:
    """The entries of `scaling·ΔW` at fixed positions; nothing of the size of `ΔW` is kept for the backward pass.

        values[k] = scaling · ΔW[i, j],   indices[k] = i·n + j

    Args:
        update: Factors, scalars, kernel and scaling; its budgets, thresholds and mode play no part.
        indices: Positions in the flattened `[m, n]`, ascending, on the factors' device.

    Returns:
        `[len(indices)]`, in the dtype of the merge, differentiable with respect to `update.tensors()`.
    """
    return _MergedEntries.apply(update, indices, *update.tensors())


def _positions(update: Update, indices: Tensor) -> list[tuple[slice, Tensor]]:
    """For each matrix the part of `indices` that lies in it, and the positions within it."""
    columns = update.A.shape[1]
    starts = torch.tensor([rows.start * columns for rows in update.rows] + [update.num_rows * columns])
    cuts: Sequence[int] = torch.searchsorted(indices, starts.to(indices)).tolist()
    return [
        (slice(start, stop), indices[start:stop].long() - int(offset))
        for start, stop, offset in zip(cuts[:-1], cuts[1:], starts[:-1].tolist(), strict=True)
    ]


class _MergedEntries(torch.autograd.Function):
    """`scaling·ΔW[indices]`, with ΔW merged anew in the backward pass by the kernel's own derivative."""

    @staticmethod
    def forward(ctx: Any, update: Update, indices: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.update = update
        ctx.save_for_backward(indices, *tensors)
        parts = []
        for factors, (_, where) in zip(update.group_factors(), _positions(update, indices), strict=True):
            parts.append(update.merge(factors).flatten()[where])
        return torch.cat(parts) * update.scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        indices, *tensors = ctx.saved_tensors
        update: Update = ctx.update.with_tensors(tuple(tensors))
        grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in tensors]
        groups = zip(update.group_factors(), update.rows, _positions(update, indices), strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            for group, (factors, rows, (part, where)) in enumerate(groups):
                if not len(where):
                    continue
                dense = torch.zeros(len(factors.B), len(factors.A), dtype=factors.A.dtype, device=grad.device)
                dense.view(-1)[where] = (grad[part] * update.scaling).to(dense.dtype)
                for k, value in enumerate(update.kernel.vjp(*factors, dense)):
                    into = grads[k]
                    if value is not None and into is not None:
                        (into[rows] if k == 1 else into[group]).copy_(value)
        return None, None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[2:], strict=True))
