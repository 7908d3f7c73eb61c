"""Triton backend: sync-free piecewise kernels on a CUDA device, where each launch covers all matrices of a weight.

Sync-free means that the host never waits for a result from the device. The Triton kernels are in `forward`, which
defines the symbols and the table `layout`, and in `backward`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from snella.backends import Backend, Gradients, Prepared, zero_gradients
from snella.backends.triton import backward, forward
from snella.kernels import Factors, MixK, NormalizedRBF, PLinear
from snella.sparsify import KEEP_ALL
from snella.update import Update, UpdateSpec

# not autotuned: block sizes determine the order of sums, and results must be bit-reproducible
TILE = {"BLOCK_M": 32, "BLOCK_N": 64}  # rows and columns
_TILES_PER_HISTOGRAM = 4  # a program adds the joint histogram of these tiles once
STATISTICS = {"ALONG": 64, "ACROSS": 16}  # entries along the softmax axis and across it
ADD_BLOCK = 4096  # entries per program
COUNT_BLOCK = 4096  # entries per step of a program
_MAX_COUNT_PROGRAMS = 256  # bounds the atomic additions to a histogram
SUM_BLOCK = 512  # partial sums per step of a program
_MODES = {"soft": forward.SOFT.value, "official": forward.OFFICIAL.value, "none": forward.NONE.value}
_LAUNCHES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "softmax_statistics": ((8, 64), (8, 80), (8, 80)),
    "softmax_weighted_sums": ((8, 64), (8, None), (16, 64)),
    "merge": ((8, 80), (8, 128), (16, 64)),
    "factor_gradients": ((4, 128), (4, 128), (4, 128)),
    "scalar_gradients": ((4, None), (4, None), (4, None)),
}
"""Warps per program and registers per thread: for ranks up to 8, higher ranks, and pieces of more than 8 columns.

`None` sets no limit on the registers. The README explains the choice.
"""

_MAX_ENTRIES = 1 << 30  # positions within a matrix, rounded up to whole blocks, are int32
_MIN_CAPABILITY = (7, 0)  # minimum compute capability


def launch_options(kernel: str, rank: int = 1, pieces: int = 1, aligned: bool = True) -> dict[str, Any]:
    """Return the launch options of a Triton kernel: warps per program and registers per thread, without FMA fusion.

    Without fusion, distances are bit-identical in all kernels. Kernels that `_LAUNCHES` does not list use eight warps.
    """
    column = 2 if rank // pieces > 8 else int(rank > 8)
    warps, registers = _LAUNCHES[kernel][column] if kernel in _LAUNCHES else (8, None)
    if kernel == "factor_gradients" and not aligned:
        registers = 168  # loads of unaligned columns are not vectorized, so a thread holds more rows
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if registers is not None and torch.version.hip is None:  # AMD's compiler does not support this limit
        options["maxnreg"] = registers
    return options


class SoftmaxStats(NamedTuple):
    """Maximum logit and inverse sum of exponentials of each column (`[G·n]`) or row (`[m]`) of the softmax.

    Both are `None` if the kernel function has no softmax.
    """

    max_logit: Tensor | None
    inverse_sum: Tensor | None


class _Launches:
    """Launches of the Triton kernels for one update, with their common arguments and options."""

    def __init__(self, spec: UpdateSpec, factors: Factors, budgets: tuple[int, ...]) -> None:
        A, B, *scalars = [None if tensor is None else tensor.detach().contiguous() for tensor in factors]
        self.A, self.B, self.scalars = cast(Tensor, A), cast(Tensor, B), scalars
        self.coeff, self.alpha, self.beta, self.temperature = scalars
        self.groups, self.n, self.rank = self.A.shape
        self.spec, self.m, self.max_rows = spec, self.B.shape[0], max(spec.row_counts)
        self.has_softmax = isinstance(spec.kernel, NormalizedRBF)
        self.by_column = spec.kernel.softmax_dim == 0
        has_linear_term = not self.has_softmax or isinstance(spec.kernel, MixK)
        self.axis = {"HAS_TEMPERATURE": self.temperature is not None, "AXIS": spec.kernel.softmax_dim}
        self.pieces = {"P": spec.kernel.num_pieces, "R": self.rank, **self.axis}
        self.terms = {"SOFTMAX": self.has_softmax, "LINEAR_TERM": has_linear_term}
        device = self.A.device
        stream = torch.cuda.current_stream(device).cuda_stream if self.A.is_cuda else 0
        self.layout = _layout(spec.row_counts, budgets, self.n, spec.mode != "official", device, stream)

    def on_device(self) -> AbstractContextManager[Any]:
        """Return a context that selects the factors' device, because Triton launches on the current device."""
        return torch.cuda.device(self.A.device) if self.A.is_cuda else nullcontext()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized tensor on the factors' device."""
        return torch.empty(shape, dtype=dtype, device=self.A.device)

    def tiles(self, row_tiles: int = 1) -> tuple[int, int, int]:
        """Return the grid of tiles over the columns, rows, and matrices; a program covers `row_tiles` tiles."""
        return -(-self.n // TILE["BLOCK_N"]), -(-self.max_rows // (TILE["BLOCK_M"] * row_tiles)), self.groups

    def softmax_stats(self) -> SoftmaxStats:
        """Compute the maximum logit and inverse sum of exponentials of each column or row."""
        if not self.has_softmax:
            return SoftmaxStats(None, None)
        stats = SoftmaxStats(*self.new(2, self.groups * self.n if self.by_column else self.m).unbind())
        across = self.n if self.by_column else self.max_rows
        options = self.pieces | STATISTICS | launch_options("softmax_statistics", self.rank)
        forward.softmax_statistics[-(-across // STATISTICS["ACROSS"]), self.groups](
            self.A, self.B, self.coeff, self.temperature, self.layout, *stats, self.n, **options
        )
        return stats

    def merge(self, delta: Tensor, stats: SoftmaxStats, counts: Tensor | None = None) -> None:
        """Write `ΔW`, and add the first of the three histograms of `|ΔW|` to `counts` if given."""
        options = self.pieces | self.terms | TILE | launch_options("merge", self.rank, self.pieces["P"])
        is_counted, center = counts is not None, self.spec.kernel.center_softmax
        options |= {"CENTER": center, "COUNT": is_counted, "TILES": _TILES_PER_HISTOGRAM}
        forward.merge[self.tiles(_TILES_PER_HISTOGRAM)](
            self.A, self.B, *self.scalars, self.layout, *stats, delta, counts, self.n, **options
        )

    def merge_and_select(self, delta: Tensor, stats: SoftmaxStats) -> Tensor:
        """Write `ΔW` and return the thresholds, `[G]`. Mode `none` needs no selection."""
        if self.spec.mode == "none":
            self.merge(delta, stats)
            return self.new(self.groups).fill_(KEEP_ALL)
        targets = 1 if self.spec.mode == "soft" else 2  # mode `official` interpolates between two entries
        high_bins, low_bins = forward.HIGH_BINS.value * self.groups, forward.LOW_BINS.value * self.groups * targets
        counts = torch.zeros(high_bins + 2 * low_bins, dtype=torch.int32, device=self.A.device)
        high, middle, low = counts.split([high_bins, low_bins, low_bins])
        state, thresholds = self.new(2 * self.groups * targets, dtype=torch.int32), self.new(self.groups)
        self.merge(delta, stats, high)
        grid = (min(-(-self.max_rows * self.n // COUNT_BLOCK), _MAX_COUNT_PROGRAMS), self.groups)
        options = {"TARGETS": targets, "BLOCK": COUNT_BLOCK, **launch_options("count_within_bin")}
        for level in (1, 2):
            forward.count_within_bin[grid](delta, self.layout, high, middle, low, state, self.n, LEVEL=level, **options)
        forward.finish_thresholds[(self.groups,)](
            self.layout, high, middle, low, state, thresholds, TARGETS=targets, **launch_options("finish_thresholds")
        )
        return thresholds

    def add_sparse(self, delta: Tensor, thresholds: Tensor, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`."""
        options = {"MODE": _MODES[self.spec.mode], "BLOCK": ADD_BLOCK, **launch_options("add_sparse")}
        forward.add_sparse[-(-self.max_rows * self.n // ADD_BLOCK), self.groups](
            delta, thresholds, self.layout, base, out, self.spec.scaling, self.n, **options
        )

    def gradients(
        self, delta: Tensor, thresholds: Tensor, stats: SoftmaxStats, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of A, B, and the scalars, given `grad` = ∂L/∂W."""
        grid, scaling = self.tiles(), self.spec.scaling
        columns, rows, _ = grid
        matrix = (delta, thresholds, grad)
        tile: dict[str, Any] = self.pieces | TILE | {"MODE": _MODES[self.spec.mode]}
        weighted_sum = None
        if self.has_softmax:
            num_sums = self.groups * self.n if self.by_column else self.m
            partial = self.new(rows if self.by_column else columns, num_sums)
            factors = (self.A, self.B, self.coeff, self.temperature, self.layout)
            options = tile | launch_options("softmax_weighted_sums", self.rank, self.pieces["P"])
            backward.softmax_weighted_sums[grid](
                *factors, *stats, *matrix, partial, scaling, self.n, num_sums, **options
            )
            weighted_sum = partial.sum(0)
        # partial gradients of each tile, added in a fixed order for reproducible results
        part_A, part_B = self.new(rows, self.groups, self.n, self.rank), self.new(columns, self.m, self.rank)
        sums = self.new(self.groups, rows * columns, self.pieces["P"] + 3)
        inputs = (self.A, self.B, self.coeff, self.alpha, self.temperature, self.layout, *stats, weighted_sum, *matrix)
        options = tile | self.terms | launch_options("factor_gradients", self.rank, aligned=self.n % 16 == 0)
        backward.factor_gradients[grid](*inputs, part_A, part_B, sums, scaling, self.n, self.m, **options)
        # zeros, because kernels without a softmax do not write the gradients of α, β, and γ
        scalar_grads = [value if value is None else torch.zeros_like(value) for value in self.scalars]
        options = {"P": self.pieces["P"], "SOFTMAX": self.has_softmax, "CENTER": self.spec.kernel.center_softmax}
        options |= self.axis | {"BLOCK": SUM_BLOCK} | launch_options("scalar_gradients")
        backward.scalar_gradients[(self.groups,)](
            sums, self.layout, self.temperature, *scalar_grads, self.n, rows * columns, **options
        )
        return part_A.sum(0).to(self.A.dtype), part_B.sum(0).to(self.B.dtype), *scalar_grads


@lru_cache(maxsize=4096)
def _layout(
    row_counts: tuple[int, ...], budgets: tuple[int, ...], n: int, selects_rank: bool, device: torch.device, stream: int
) -> Tensor:
    """Return the table `layout`, an argument of all kernels, `[G, 6]` on `device`.

    It is copied without synchronization, so each `stream` has its own cached copy.
    """
    table = np.zeros((len(budgets), forward.LAYOUT_FIELDS.value), np.int32)
    start = 0
    for entry, count, budget in zip(table, row_counts, budgets, strict=True):
        size = count * n
        entry[:3] = start, count, count if budget else 0
        if selects_rank:
            entry[3] = -1 if budget == size else budget
        elif budget:
            # descending ranks of the two entries around the quantile, see `quantile_threshold`; the position of the
            # quantile between them is stored as the bits of a float32
            position = (1 - budget / size) * (size - 1)
            below = int(position)
            entry[3:5] = size - 1 - below, max(size - 2 - below, 0)
            entry[5] = np.float32(position - below).view(np.int32)
        start += count
    cpu = torch.from_numpy(table)
    return cpu.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cpu


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter on the CPU (`TRITON_INTERPRET=1`), for tests."""
    return type(forward.merge).__name__ == "InterpretedFunction"


class TritonBackend(Backend):
    """Backend for the kernels `mix_k`, `normalized_rbf`, and `p_linear` in float32 on a CUDA device."""

    name = "triton"

    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:  # noqa: D102
        if type(spec.kernel) not in (PLinear, NormalizedRBF, MixK):  # subclasses have other formulas
            return f"supports only the piecewise kernels, got kernel={spec.kernel.name!r}"
        if A.device.type != ("cpu" if is_interpreted() else "cuda"):
            place = "the CPU under TRITON_INTERPRET=1" if is_interpreted() else "a CUDA device"
            return f"runs on {place}, got factors on {str(A.device)!r}"
        if torch.promote_types(A.dtype, torch.float32) != torch.float32:
            return f"computes in float32, got factors in {A.dtype}"
        largest = max(spec.row_counts) * A.shape[1]
        if largest > _MAX_ENTRIES:
            return f"supports at most {_MAX_ENTRIES} entries per matrix, got {largest}"
        if A.device.type == "cuda":
            capability = torch.cuda.get_device_capability(A.device)
            if capability < _MIN_CAPABILITY:
                needed, got = (f"{major}.{minor}" for major, minor in (_MIN_CAPABILITY, capability))
                return f"requires compute capability {needed}, got {got} on {str(A.device)!r}"
        return None

    def prepare(self, update: Update, saved: tuple[Tensor | None, ...] = ()) -> Prepared:  # noqa: D102
        spec, factors, budgets, thresholds = update
        launches = _Launches(spec, factors, budgets)
        if not any(budgets):
            infinite = launches.new(launches.groups).fill_(torch.inf) if thresholds is None else thresholds
            return Prepared(factors, budgets, infinite)
        if saved and thresholds is not None:
            return Prepared(factors, budgets, thresholds, saved)
        with launches.on_device():
            stats = launches.softmax_stats()
            matrix = launches.new(launches.m, launches.n)
            if thresholds is None:
                thresholds = launches.merge_and_select(matrix, stats)
            else:
                thresholds = thresholds.detach().to(torch.float32)
                launches.merge(matrix, stats)
        return Prepared(factors, budgets, thresholds, (matrix,), workspace=stats)

    def add_update(self, spec: UpdateSpec, prepared: Prepared, base: Tensor, out: Tensor) -> None:  # noqa: D102
        (delta,) = prepared.delta or (None,)
        if delta is None:
            if out is not base:
                out.copy_(base)
            return
        launches = _Launches(spec, prepared.factors, prepared.budgets)
        with launches.on_device():
            launches.add_sparse(delta, prepared.thresholds, base, out)

    def grad_factors(self, spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor) -> Gradients:  # noqa: D102
        (delta,) = prepared.delta or (None,)
        if delta is None:
            return tuple(zero_gradients(prepared.factors))
        launches = _Launches(spec, prepared.factors, prepared.budgets)
        with launches.on_device():
            # recompute the softmax statistics if only ΔW was saved
            stats = prepared.workspace or launches.softmax_stats()
            return launches.gradients(delta, prepared.thresholds, stats, grad_weight.detach().contiguous())
