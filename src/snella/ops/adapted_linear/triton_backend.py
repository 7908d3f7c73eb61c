"""The piecewise kernels on a CUDA device in Triton: all matrices of a weight in one launch, no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snella.ops.kernels import PLinear

from . import triton_kernels as kernels
from .backends import FusedBackend, Merged
from .triton_launches import Fused, UpdateOnDevice
from .update import Update

_MOST_ENTRIES = 1 << 30  # positions within a matrix are int32
_LEAST_CAPABILITY = (7, 0)


def is_interpreted() -> bool:
    """Whether the kernels were defined under `TRITON_INTERPRET=1` and run on the CPU, slowly, for tests."""
    return type(kernels.merge).__name__ == "InterpretedFunction"


def obstacle(update: Update) -> str | None:
    """Why this update cannot be computed here, or `None`."""
    device = update.A.device
    if not isinstance(update.kernel, PLinear):
        return f"has the piecewise kernels only, got kernel={update.kernel.name!r}"
    if device.type != ("cpu" if is_interpreted() else "cuda"):
        return f"runs on a CUDA device, got factors on {str(device)!r}"
    if torch.promote_types(update.A.dtype, torch.float32) != torch.float32:
        return f"computes in float32, got factors in {update.A.dtype}"
    largest = max(update.row_counts) * update.A.shape[1]
    if largest > _MOST_ENTRIES:
        return f"counts at most {_MOST_ENTRIES} entries a matrix, got {largest}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"needs compute capability {_LEAST_CAPABILITY}, got {capability} on {str(device)!r}"
    return None


class TritonBackend(FusedBackend):
    """Mix-K, its normalised RBF and P-Linear in float32 on a CUDA device."""

    name = "triton"

    def merge_groups(self, update: Update) -> list[Merged | None]:  # noqa: D102
        call = UpdateOnDevice(update)
        if not any(update.budgets):
            if len(update.thresholds) < call.groups:
                update.thresholds[:] = call.new(call.groups).fill_(torch.inf).unbind()
            return [None] * call.groups
        with call.on_device():
            peak, inverse_sum = call.softmax_statistics()
            delta = call.new(call.m, call.n)
            if len(update.thresholds) < call.groups:
                thresholds = call.merge_and_select(delta, peak, inverse_sum)
                update.thresholds[:] = thresholds.unbind()
            else:
                thresholds = _stacked(update.thresholds)
                call.merge(delta, peak, inverse_sum)
        fused = Fused(delta, thresholds, peak, inverse_sum)
        return [
            Merged(delta[rows], fused) if budget else None
            for rows, budget in zip(update.rows, update.budgets, strict=True)
        ]

    def add_groups(  # noqa: D102
        self, update: Update, merged: Sequence[Merged | None], base: Tensor, out: Tensor
    ) -> None:
        if not any(update.budgets):
            if out is not base:
                out.copy_(base)
            return
        call = UpdateOnDevice(update)
        with call.on_device():
            fused = _fused_of(update, merged)
            call.add_sparse(fused.delta, fused.thresholds, base, out)

    def group_gradients(  # noqa: D102
        self,
        update: Update,
        merged: Sequence[Merged | None],
        grad: Tensor,
        base: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        if not any(update.budgets):
            return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in update.tensors())
        call = UpdateOnDevice(update)
        with call.on_device():
            fused = _fused_of(update, merged)
            if fused.peak is None:
                # ΔW was kept, the statistics of its softmax were not
                fused.peak, fused.inverse_sum = call.softmax_statistics()
            return call.gradients(fused, grad.detach().contiguous())


def _stacked(thresholds: Sequence[Tensor]) -> Tensor:
    """Known thresholds as `[G]`, float32."""
    if len(thresholds) == 1:
        return thresholds[0].detach().reshape(1).to(torch.float32)
    return torch.stack([threshold.detach().to(torch.float32) for threshold in thresholds])


def _fused_of(update: Update, merged: Sequence[Merged | None]) -> Fused:
    """What `merge_groups` handed over, or the same made of matrices that were kept from the forward pass."""
    present = [(rows, one) for rows, one in zip(update.rows, merged, strict=True) if one is not None]
    rows, first = present[0]
    if first.extra is not None:
        return first.extra
    m, n = update.num_rows, first.delta.shape[1]
    storage = first.delta.untyped_storage()
    origin = first.delta.storage_offset() - rows.start * n
    if 0 <= origin <= storage.nbytes() // first.delta.element_size() - m * n and all(
        one.delta.untyped_storage().data_ptr() == storage.data_ptr()
        and one.delta.storage_offset() == origin + rows.start * n
        and one.delta.is_contiguous()
        for rows, one in present
    ):
        # they still are rows of one matrix
        delta = first.delta.as_strided((m, n), (n, 1), origin)
    else:
        delta = first.delta.new_empty(m, n)
        for rows, one in present:
            delta[rows] = one.delta
    return Fused(delta, _stacked(update.thresholds), None, None)
