"""The piecewise kernels on a CUDA device in Triton: all matrices of a weight in one launch, no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snella.ops.backends.base import FusedBackend, Merged
from snella.ops.backends.triton import backward, forward
from snella.ops.kernels import MixK, NormalizedRBF, PLinear
from snella.ops.sparsify import KEEPS_EVERYTHING
from snella.ops.spec import Update

# fixed, not tuned on the machine: the order of sums, and so the bits of a result, depends on them
TILE = {"BLOCK_M": 32, "BLOCK_N": 64}
_TILES_PER_HISTOGRAM = 4
STATISTICS = {"ALONG": 64, "ACROSS": 16}
_ENTRIES_TO_ADD = 2048
_ENTRIES_TO_COUNT = 4096
_MOST_PROGRAMS_TO_COUNT = 256  # each adds its counts to the matrix's histogram once
_SUMS_AT_ONCE = 512
_MODES = {"soft": forward.SOFT.value, "official": forward.OFFICIAL.value, "none": forward.NONE.value}
LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass
class Fused:
    """What the matrices of an update share within one pass.

    Args:
        delta: `ΔW` of all matrices, `[m, n]`; rows of matrices without budget are not written.
        thresholds: `[G]`.
        peak: Largest logit of each column (`[G·n]`) or row (`[m]`) of the softmax.
        inverse_sum: One over the sum of its exponentials.
    """

    delta: Tensor
    thresholds: Tensor
    peak: Tensor | None
    inverse_sum: Tensor | None


class UpdateOnDevice:
    """The launches for one update."""

    def __init__(self, update: Update) -> None:
        self.update = update
        self.A, self.B = update.A.detach().contiguous(), update.B.detach().contiguous()
        self.scalars = tuple(None if value is None else value.detach().contiguous() for value in update.scalars)
        self.coeff, self.alpha, self.beta, self.temperature = self.scalars
        self.groups, self.n, self.rank = self.A.shape
        self.m = self.B.shape[0]
        kernel = update.kernel
        self.has_softmax = isinstance(kernel, NormalizedRBF)
        self.sizes = {"P": kernel.num_pieces, "R": self.rank}
        self.axis = {"HAS_TEMPERATURE": self.temperature is not None, "AXIS": kernel.softmax_dim}
        self.terms = {"SOFTMAX": self.has_softmax, "LINEAR_TERM": not self.has_softmax or isinstance(kernel, MixK)}
        is_cuda = self.A.is_cuda
        self.layout = _layout(
            update.row_counts,
            update.budgets,
            self.n,
            update.mode != "official",
            self.A.device,
            torch.cuda.current_stream(self.A.device).cuda_stream if is_cuda else 0,
        )

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.A.device) if self.A.is_cuda else nullcontext()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor beside the factors."""
        return torch.empty(shape, dtype=dtype, device=self.A.device)

    def tiles(self, tiles_of_rows: int = 1) -> tuple[int, int, int]:
        """Grid of tiles over every matrix."""
        rows = max(self.update.row_counts)
        return -(-self.n // TILE["BLOCK_N"]), -(-rows // (TILE["BLOCK_M"] * tiles_of_rows)), self.groups

    def softmax_statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Largest logit and one over the sum of exponentials of each column or row."""
        if not self.has_softmax:
            return None, None
        by_column = self.axis["AXIS"] == 0
        peak, inverse_sum = self.new(2, self.groups * self.n if by_column else self.m).unbind()
        across = self.n if by_column else max(self.update.row_counts)
        forward.softmax_statistics[-(-across // STATISTICS["ACROSS"]), self.groups](
            self.A,
            self.B,
            self.coeff,
            self.temperature,
            self.layout,
            peak,
            inverse_sum,
            self.n,
            **self.sizes,
            **self.axis,
            **STATISTICS,
            **LAUNCH,
        )
        return peak, inverse_sum

    def merge(
        self, delta: Tensor, peak: Tensor | None, inverse_sum: Tensor | None, counts: Tensor | None = None
    ) -> None:
        """Write `ΔW`, and add to the first histogram if it is given."""
        forward.merge[self.tiles(_TILES_PER_HISTOGRAM)](
            self.A,
            self.B,
            self.coeff,
            self.alpha,
            self.beta,
            self.temperature,
            self.layout,
            peak,
            inverse_sum,
            delta,
            counts,
            self.n,
            **self.sizes,
            **self.terms,
            **self.axis,
            CENTER=self.update.kernel.center_softmax,
            COUNT=counts is not None,
            TILES=_TILES_PER_HISTOGRAM,
            **TILE,
            **LAUNCH,
        )

    def merge_and_select(self, delta: Tensor, peak: Tensor | None, inverse_sum: Tensor | None) -> Tensor:
        """Write `ΔW`, and return the thresholds, `[G]`; without a selection where everything is kept."""
        if self.update.mode == "none":
            self.merge(delta, peak, inverse_sum)
            return self.new(self.groups).fill_(KEEPS_EVERYTHING)
        targets = 1 if self.update.mode == "soft" else 2
        high_bins, low_bins = forward.HIGH_BINS.value * self.groups, forward.LOW_BINS.value * self.groups * targets
        counts = torch.zeros(high_bins + 2 * low_bins, dtype=torch.int32, device=self.A.device)
        high, middle, low = counts.split([high_bins, low_bins, low_bins])
        state, thresholds = self.new(2 * self.groups * targets, dtype=torch.int32), self.new(self.groups)
        self.merge(delta, peak, inverse_sum, high)
        entries = max(self.update.row_counts) * self.n
        grid = (min(-(-entries // _ENTRIES_TO_COUNT), _MOST_PROGRAMS_TO_COUNT), self.groups)
        for level in (1, 2):
            forward.count_within_bin[grid](
                delta,
                self.layout,
                high,
                middle,
                low,
                state,
                self.n,
                TARGETS=targets,
                LEVEL=level,
                BLOCK=_ENTRIES_TO_COUNT,
                **LAUNCH,
            )
        forward.finish_thresholds[(self.groups,)](
            self.layout, high, middle, low, state, thresholds, TARGETS=targets, **LAUNCH
        )
        return thresholds

    def add_sparse(self, delta: Tensor, thresholds: Tensor, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`."""
        entries = max(self.update.row_counts) * self.n
        forward.add_sparse[-(-entries // _ENTRIES_TO_ADD), self.groups](
            delta,
            thresholds,
            self.layout,
            base,
            out,
            self.update.scaling,
            self.n,
            MODE=_MODES[self.update.mode],
            BLOCK=_ENTRIES_TO_ADD,
            **LAUNCH,
        )

    def gradients(self, fused: Fused, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to A, B and the scalars."""
        grid, mode = self.tiles(), {"MODE": _MODES[self.update.mode]}
        columns, rows, groups = grid
        matrix = (fused.delta, fused.thresholds, grad)
        weighted_sum = None
        if self.has_softmax:
            by_column = self.axis["AXIS"] == 0
            kept = self.groups * self.n if by_column else self.m
            partial = self.new(rows if by_column else columns, kept)
            backward.softmax_weighted_sums[grid](
                self.A,
                self.B,
                self.coeff,
                self.temperature,
                self.layout,
                fused.peak,
                fused.inverse_sum,
                *matrix,
                partial,
                self.update.scaling,
                self.n,
                kept,
                **self.sizes,
                **self.axis,
                **mode,
                **TILE,
                **LAUNCH,
            )
            weighted_sum = partial.sum(0)
        part_A, part_B = self.new(rows, groups, self.n, self.rank), self.new(columns, self.m, self.rank)
        sums = self.new(groups, rows * columns, self.sizes["P"] + 3)
        backward.factor_gradients[grid](
            self.A,
            self.B,
            self.coeff,
            self.alpha,
            self.temperature,
            self.layout,
            fused.peak,
            fused.inverse_sum,
            weighted_sum,
            *matrix,
            part_A,
            part_B,
            sums,
            self.update.scaling,
            self.n,
            self.m,
            **self.sizes,
            **self.terms,
            **self.axis,
            **mode,
            **TILE,
            **LAUNCH,
        )
        # zeros, as a kernel without softmax leaves α, β and γ alone if somebody gives it any
        found = [value if value is None else torch.zeros_like(value) for value in self.scalars]
        backward.scalar_gradients[(groups,)](
            sums,
            self.layout,
            self.temperature,
            *found,
            self.n,
            rows * columns,
            P=self.sizes["P"],
            SOFTMAX=self.has_softmax,
            CENTER=self.update.kernel.center_softmax,
            **self.axis,
            BLOCK=_SUMS_AT_ONCE,
            **LAUNCH,
        )
        return part_A.sum(0).to(self.A.dtype), part_B.sum(0).to(self.B.dtype), *found


@lru_cache(maxsize=4096)
def _layout(
    row_counts: tuple[int, ...], budgets: tuple[int, ...], n: int, takes_rank: bool, device: torch.device, stream: int
) -> Tensor:
    """The table that every kernel reads, `[G, 6]` on `device`, one a `stream`; copied without a wait, then kept."""
    table = np.zeros((len(budgets), forward.LAYOUT_FIELDS.value), np.int32)
    start = 0
    for entry, count, budget in zip(table, row_counts, budgets, strict=True):
        size = count * n
        entry[:3] = start, count, count if budget else 0
        if takes_rank:
            entry[3] = -1 if budget == size else budget
        elif budget:
            # ranks from the largest on of the two entries that the quantile lies between: see `quantile_threshold`
            position = (1 - budget / size) * (size - 1)
            below = int(position)
            entry[3:5] = size - 1 - below, max(size - 2 - below, 0)
            entry[5] = np.float32(position - below).view(np.int32)
        start += count
    cpu = torch.from_numpy(table)
    return cpu.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cpu


_MOST_ENTRIES = 1 << 30  # positions within a matrix are int32
_LEAST_CAPABILITY = (7, 0)


def is_interpreted() -> bool:
    """Whether the kernels were defined under `TRITON_INTERPRET=1` and run on the CPU, slowly, for tests."""
    return type(forward.merge).__name__ == "InterpretedFunction"


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
