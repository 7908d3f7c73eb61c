"""The launches of the Triton kernels for one update: grids, scratch memory and the order of the passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snella.ops.kernels import MixK, NormalizedRBF
from snella.ops.sparsify import KEEPS_EVERYTHING

from . import triton_gradients as gradients
from . import triton_kernels as kernels
from . import triton_select as select
from .update import Update

# fixed, not tuned on the machine: the order of sums, and so the bits of a result, depends on them
TILE = {"BLOCK_M": 32, "BLOCK_N": 64}
_TILES_PER_HISTOGRAM = 4
STATISTICS = {"ALONG": 64, "ACROSS": 16}
_ENTRIES_TO_ADD = 2048
_ENTRIES_TO_COUNT = 4096
_MOST_PROGRAMS_TO_COUNT = 256  # each adds its counts to the matrix's histogram once
_SUMS_AT_ONCE = 512
_MODES = {"soft": kernels.SOFT.value, "official": kernels.OFFICIAL.value, "none": kernels.NONE.value}
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
        kernels.softmax_statistics[-(-across // STATISTICS["ACROSS"]), self.groups](
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
        kernels.merge[self.tiles(_TILES_PER_HISTOGRAM)](
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
        high_bins, low_bins = kernels.HIGH_BINS.value * self.groups, select.LOW_BINS.value * self.groups * targets
        counts = torch.zeros(high_bins + 2 * low_bins, dtype=torch.int32, device=self.A.device)
        high, middle, low = counts.split([high_bins, low_bins, low_bins])
        state, thresholds = self.new(2 * self.groups * targets, dtype=torch.int32), self.new(self.groups)
        self.merge(delta, peak, inverse_sum, high)
        entries = max(self.update.row_counts) * self.n
        grid = (min(-(-entries // _ENTRIES_TO_COUNT), _MOST_PROGRAMS_TO_COUNT), self.groups)
        for level in (1, 2):
            select.count_within_bin[grid](
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
        select.finish_thresholds[(self.groups,)](
            self.layout, high, middle, low, state, thresholds, TARGETS=targets, **LAUNCH
        )
        return thresholds

    def add_sparse(self, delta: Tensor, thresholds: Tensor, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`."""
        entries = max(self.update.row_counts) * self.n
        kernels.add_sparse[-(-entries // _ENTRIES_TO_ADD), self.groups](
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
            gradients.softmax_weighted_sums[grid](
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
        gradients.factor_gradients[grid](
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
        gradients.scalar_gradients[(groups,)](
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
    table = np.zeros((len(budgets), kernels.LAYOUT_FIELDS.value), np.int32)
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
