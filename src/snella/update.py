"""Data structures for a weight's update, and initial values of its factors.

A kernel function merges the factors `A` and `B` into `ΔW`. The update `S` is the sparsified `ΔW`, and `scaling·S` is
added to the base weight `W0`. The budget of a matrix is the maximum number of nonzero entries of `S`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple, Self, get_args

import torch
from torch import Tensor

from snella.kernels import KERNELS, Factors, Kernel, KernelScalars, check_factors
from snella.sparsify import KEEP_ALL, SparsifyMode, keep_threshold, quantile_threshold

BACKENDS = ("eager", "reference", "numba", "triton")
"""Backends: `eager` (torch operations), `reference` (torch with autograd), `numba` and `triton` (compiled kernels)."""
_MODES = get_args(SparsifyMode)

_INITIAL_SCALARS = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
_INITIAL_PIECE_COEFF = 0.1
_SAMPLE_SIZE = 64  # rows or columns used to estimate the size of the initial update
_MIN_SHRINK = 0.1  # minimum scale of the factors, so that updates of near-zero weights can grow


def row_slices(row_counts: Sequence[int]) -> tuple[slice, ...]:
    """Return the row slice of each stacked matrix."""
    return tuple(slice(*bounds) for bounds in pairwise(accumulate(row_counts, initial=0)))


class MatrixFactors(NamedTuple):
    """Inputs of the merge of one matrix, in at least float32: `A` `[n, r]`, `B` `[rows, r]`, and the scalars."""

    A: Tensor
    B: Tensor
    scalars: KernelScalars


@dataclass(frozen=True)
class UpdateSpec:
    """Settings of a weight's sparse update `S`, without its tensors.

    The weight consists of `G` stacked matrices (e.g. 3 in a fused qkv layer), each with its own budget.

    Args:
        kernel: Kernel function, with its pieces and softmax settings.
        row_counts: Number of rows of each matrix, `G` integers that sum to `m`.
        mode: Sparsification mode of `ΔW`.
        scaling: Scaling factor of `S`.
        backend: One of `BACKENDS`; `snella.backends.choose_backend` selects one.

    Raises:
        ValueError: If `mode` or `backend` is unknown.
    """

    kernel: Kernel
    row_counts: tuple[int, ...]
    mode: SparsifyMode = "soft"
    scaling: float = 1.0
    backend: str = "eager"
    rows: tuple[slice, ...] = field(init=False, compare=False, repr=False)
    """Row slice of each matrix, computed from `row_counts`."""

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {list(_MODES)}, got {self.mode!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")
        object.__setattr__(self, "rows", row_slices(self.row_counts))

    @property
    def num_rows(self) -> int:
        """`m`, the total number of rows of the weight."""
        return sum(self.row_counts)

    def to_ints(self) -> list[int]:
        """Encode the spec as integers for a `torch.compile` operator, which receives `scaling` separately."""
        kernel = self.kernel
        choices = (list(KERNELS).index(kernel.name), _MODES.index(self.mode), BACKENDS.index(self.backend))
        return [*choices, kernel.num_pieces, kernel.softmax_dim, int(kernel.center_softmax), *self.row_counts]

    @classmethod
    def from_ints(cls, ints: Sequence[int], scaling: float) -> Self:
        """Decode a spec from the result of `to_ints`."""
        kernel_index, mode_index, backend_index, num_pieces, softmax_dim, center_softmax, *row_counts = ints
        kernel_type = KERNELS[list(KERNELS)[kernel_index]]
        kernel = kernel_type(num_pieces, softmax_dim, bool(center_softmax))
        return cls(kernel, tuple(row_counts), _MODES[mode_index], scaling, BACKENDS[backend_index])

    def matrices(self, factors: Factors) -> Iterator[MatrixFactors]:
        """Yield the factors and scalars of each matrix in at least float32."""
        A, B, *scalars = factors
        dtype = torch.promote_types(A.dtype, torch.float32)
        for group, rows in enumerate(self.rows):
            matrix_scalars = [value if value is None else value[group].to(dtype) for value in scalars]
            yield MatrixFactors(A[group].to(dtype), B[rows].to(dtype), KernelScalars(*matrix_scalars))

    def merge_matrix(self, factors: MatrixFactors) -> Tensor:
        """Return a matrix's `ΔW`, `[rows, n]`, computed without autocast."""
        if torch.is_autocast_enabled(factors.A.device.type):
            with torch.autocast(factors.A.device.type, enabled=False):
                return self.kernel.merge(*factors)
        return self.kernel.merge(*factors)

    def find_threshold(self, delta: Tensor, budget: int) -> Tensor:
        """Return the 0-dim threshold of a merged matrix. Only entries with a larger magnitude are kept."""
        if self.mode == "none":
            return delta.new_full((), KEEP_ALL)
        if self.mode == "official":
            return quantile_threshold(delta, 1 - budget / delta.numel())
        return keep_threshold(delta, budget)

    def check(self, factors: Factors, budgets: Sequence[int], weight_shape: torch.Size | None = None) -> None:
        """Raise `ValueError` unless the spec matches the tensors, budgets, and weight shape `[m, …]`."""
        A = factors.A
        B = factors.B
        if A.ndim != 3 or A.shape[0] != len(self.row_counts) or self.num_rows != B.shape[0]:
            raise ValueError(
                f"A must be [{len(self.row_counts)}, n, r] and B [{self.num_rows}, r] for matrices of "
                f"{list(self.row_counts)} rows, got {list(A.shape)} and {list(B.shape)}"
            )
        if len(budgets) != len(self.row_counts):
            raise ValueError(f"budgets must have {len(self.row_counts)} entries, one per matrix, got {list(budgets)}")
        num_columns = A.shape[1]
        for budget, num_rows in zip(budgets, self.row_counts, strict=True):
            size = num_rows * num_columns
            if not 0 <= budget <= size:
                raise ValueError(f"budget must be in [0, {size}] for a matrix {[num_rows, num_columns]}, got {budget}")
            if self.mode == "none" and budget != size:
                raise ValueError(
                    f"mode='none' keeps every entry; budget must be {size} for a matrix {[num_rows, num_columns]}, "
                    f"got {budget}"
                )
        for matrix in self.matrices(factors):
            check_factors(matrix.A, matrix.B, self.kernel, matrix.scalars)
        update_shape = [self.num_rows, num_columns]
        if weight_shape is not None and [weight_shape[0], weight_shape[1:].numel()] != update_shape:
            raise ValueError(f"update and weight must have the same size, got {update_shape} and {list(weight_shape)}")


class Update(NamedTuple):
    """An update: its spec and its current tensors.

    Args:
        spec: Settings of the update.
        factors: Factors and scalars.
        budgets: Budget of each matrix, `G` integers.
        thresholds: `[G]`, from an earlier call with these factors and budgets. If `None`, they are computed.
    """

    spec: UpdateSpec
    factors: Factors
    budgets: tuple[int, ...]
    thresholds: Tensor | None = None


# initial values ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_factors(factors: Factors, rows: Sequence[slice], num_pieces: int, *, is_larger: bool = False) -> None:
    """Initialize the factors and scalars of an update in place.

        A ~ U(±1/√(n·r/P)),  B ~ U(±1/√(rows·r/P)),  piece_coeff = 0.1, −0.1, …,  α = γ = 1,  β = 0

    `γ` is the temperature of a softmax kernel.

    Args:
        factors: Factors of `G` matrices, `A` `[G, n, r]` and `B` `[m, r]`.
        rows: Row slice of `B` for each matrix.
        num_pieces: `P`.
        is_larger: If True, draw the factors from `U(±1)` instead, for tests.
    """
    A = factors.A
    B = factors.B
    piece_width = max(A.shape[-1] // num_pieces, 1)
    for group, matrix_rows in enumerate(rows):
        num_rows = matrix_rows.stop - matrix_rows.start
        for factor, length in ((A[group], A.shape[1]), (B[matrix_rows], num_rows)):
            bound = 1.0 if is_larger else (length * piece_width) ** -0.5
            factor.uniform_(-1, 1).mul_(bound)
    for name, value in _INITIAL_SCALARS.items():
        scalar: Tensor | None = getattr(factors, name)
        if scalar is not None:
            scalar.fill_(value)
    if factors.piece_coeff is not None:
        factors.piece_coeff.copy_(_INITIAL_PIECE_COEFF * (-1.0) ** torch.arange(factors.piece_coeff.shape[1]))


@torch.no_grad()
def bound_initial_update(factors: Factors, rows: Sequence[slice], kernel: Kernel, weight: Tensor, bound: float) -> None:
    """Shrink the factors and `α` in place to make the initial update small relative to the weight.

        √n · rms(S) / rms(W0) ≤ bound, for each matrix

    The mean of a softmax over `m` outputs is `1/m`, so `S` starts near `1/m²`, which is large in narrow layers. `S` is
    estimated as `ΔW²`, without `scaling`, from at most 64 columns, or rows if `softmax_dim` is 1.

    Args:
        factors: Factors initialized by `init_factors`.
        rows: Row slice of each matrix.
        kernel: Piecewise kernel function that merges the factors.
        weight: `W0`, `[m, …]`.
        bound: `SnellaLayer.max_initial_ratio`. The factors and `α` shrink at most tenfold, even if the update then
            still exceeds the bound, and do not shrink if the matrix in `weight` is zero.
    """
    A = factors.A
    B = factors.B
    max_columns, max_rows = (_SAMPLE_SIZE, None) if kernel.softmax_dim == 0 else (None, _SAMPLE_SIZE)
    for group, matrix_rows in enumerate(rows):
        scalars = [value if value is None else value[group] for value in factors[2:]]
        delta = kernel.merge(A[group][:max_columns], B[matrix_rows][:max_rows], KernelScalars(*scalars))
        weight_rms = weight[matrix_rows].float().square().mean().sqrt()
        update_rms = delta.square().square().mean().sqrt().to(weight_rms.device)
        initial_ratio = float(A.shape[1] ** 0.5 * update_rms / weight_rms)
        if bound < initial_ratio < float("inf"):
            # `ΔW` is roughly proportional to the factors and `α`, and `S` is quadratic in `ΔW`
            scale = max((bound / initial_ratio) ** 0.5, _MIN_SHRINK)
            alpha = () if factors.alpha is None else (factors.alpha[group],)
            for tensor in (A[group], B[matrix_rows], *alpha):
                tensor.mul_(scale)
