"""One sparse update of one weight, described by tensors and settings; what every implementation takes as input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from snella.ops.kernels import Kernel, KernelScalars, check_factors
from snella.ops.sparsify import KEEPS_EVERYTHING, SparsifyMode, sparsify
from snella.ops.threshold import keep_threshold, quantile_threshold

_FADING = 0.7  # what is left of a miss after a step
_WINDOW_OVER_MISS = 3.0  # 92 to 95 of 100 thresholds then lie in the window, with factor rates of 1e-4 to 5e-3


class GroupFactors(NamedTuple):
    """What one of an update's matrices is merged from: `A` `[n, r]`, `B` `[rows, r]` and 0-dim or `[P]` scalars."""

    A: Tensor
    B: Tensor
    scalars: KernelScalars


class Guess(NamedTuple):
    """Where the next threshold is looked for first: in `expected · (1 ± window)`, or nowhere if `window` is 0.

    A threshold is expected to go on as it went last. How far it was from there (`miss`, relative, the largest of the
    last few) says how wide to look.
    """

    last: float
    expected: float
    miss: float = 0.0
    window: float = 0.0

    def follow(self, threshold: float, widths: tuple[float, float]) -> Guess:
        """The guess after the next threshold turned out to be `threshold`; `widths` are least and most of a window."""
        if not math.isfinite(threshold):  # a factor that is not: nothing follows from it
            return Guess(0.0, 0.0)
        if min(threshold, self.last, self.expected) <= 0:
            return Guess(threshold, threshold)
        least, most = widths
        miss = max(abs(threshold / self.expected - 1), _FADING * self.miss)
        window = max(_WINDOW_OVER_MISS * miss, least)
        miss = min(miss, most / _WINDOW_OVER_MISS)  # after a jump, a new budget's for one, there are no such jumps
        return Guess(threshold, threshold * threshold / self.last, miss, window if window <= most else 0.0)


@dataclass
class Update:
    """The sparse update `S` of a weight that holds `G` matrices one above the other (3 in a fused qkv layer, else 1).

    The matrices compete on their own: each has its own factors, scalars, budget and threshold.

    Args:
        A: Input-side factors, `[G, n, r]`.
        B: Output-side factors, `[m, r]`, the rows of all matrices one above the other.
        scalars: As in `KernelScalars` with one more leading axis `G`: `piece_coeff` `[G, P]`, the others `[G]`.
        kernel: How the factors are merged.
        budgets: Entries each matrix may keep, `G` integers.
        row_counts: Rows of each matrix, `G` integers that sum to `m`.
        scaling: Factor before `S`.
        mode: How `ΔW` is sparsified.
        thresholds: Thresholds of the current factors, one a matrix, if somebody computed them before; an
            implementation that finds this list empty computes and stores them here.
        guesses: Thresholds of earlier factors, one a matrix: where a backend may look first. It keeps them up to date.
        handover: A place for what a recomputation leaves to the backward pass; shared like `thresholds`.
    """

    A: Tensor
    B: Tensor
    scalars: KernelScalars
    kernel: Kernel
    budgets: tuple[int, ...]
    row_counts: tuple[int, ...]
    scaling: float = 1.0
    mode: SparsifyMode = "soft"
    thresholds: list[Tensor] = field(default_factory=list)
    handover: list[Any] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in get_args(SparsifyMode):
            raise ValueError(f"mode must be one of {list(get_args(SparsifyMode))}, got {self.mode!r}")

    @property
    def num_rows(self) -> int:
        """`m`, rows of all matrices together."""
        return self.B.shape[0]

    @property
    def rows(self) -> list[slice]:
        """Rows of the weight that each matrix occupies."""
        slices, start = [], 0
        for count in self.row_counts:
            slices.append(slice(start, start + count))
            start += count
        return slices

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything differentiable, in a fixed order that `with_tensors` takes back."""
        return (self.A, self.B, *self.scalars)

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> Update:
        """Return the same update over other tensors, sharing the thresholds."""
        A, B, *scalars = tensors
        if A is None or B is None:
            raise TypeError("an update needs both factors, got None")
        settings = (self.kernel, self.budgets, self.row_counts, self.scaling, self.mode, self.thresholds, self.handover)
        return Update(A, B, KernelScalars(*scalars), *settings, self.guesses)

    def group_factors(self) -> Iterator[GroupFactors]:
        """Yield the factors and scalars of each matrix, half precision widened to float32."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        for group, rows in enumerate(self.rows):
            scalars = KernelScalars(*(value if value is None else value[group].to(dtype) for value in self.scalars))
            yield GroupFactors(self.A[group].to(dtype), self.B[rows].to(dtype), scalars)

    def merge(self, factors: GroupFactors) -> Tensor:
        """`ΔW` of one matrix, `[rows, n]`. Autocast does not reach it, wherever this is called from."""
        with torch.autocast(factors.A.device.type, enabled=False):
            return self.kernel.merge(*factors)

    def threshold_of(self, group: int, delta: Tensor) -> Tensor:
        """Threshold of matrix `group` whose merged value is `delta`, from the list where it is known."""
        if len(self.thresholds) <= group:
            budget = self.budgets[group]
            if self.mode == "none":
                threshold = delta.new_full((), KEEPS_EVERYTHING)
            elif self.mode == "official":
                threshold = quantile_threshold(delta, 1 - budget / delta.numel())
            else:
                threshold = keep_threshold(delta, budget)
            self.thresholds.append(threshold)
        return self.thresholds[group]

    def sparse_groups(self) -> list[Tensor]:
        """Merge and sparsify every matrix by plain torch operations: `G` tensors `[rows, n]`, without `scaling`."""
        groups = []
        for group, factors in enumerate(self.group_factors()):
            delta = self.merge(factors)
            threshold = self.threshold_of(group, delta)
            groups.append(sparsify(delta, threshold, self.mode))
        return groups

    def check(self, weight_shape: torch.Size | None = None) -> None:
        """Raise `ValueError` unless tensors, settings and the weight `[m, n…]` fit together."""
        if self.A.ndim != 3 or self.A.shape[0] != len(self.row_counts) or sum(self.row_counts) != self.num_rows:
            raise ValueError(
                f"A must be [{len(self.row_counts)}, n, r] and B [{sum(self.row_counts)}, r] for matrices of "
                f"{list(self.row_counts)} rows, got {list(self.A.shape)} and {list(self.B.shape)}"
            )
        for budget, rows in zip(self.budgets, self.row_counts, strict=True):
            if not 0 <= budget <= rows * self.A.shape[1]:
                raise ValueError(
                    f"budget must be in [0, {rows * self.A.shape[1]}] for a matrix {[rows, self.A.shape[1]]}, "
                    f"got {budget}"
                )
            if self.mode == "none" and budget != rows * self.A.shape[1]:
                raise ValueError(
                    f"mode='none' keeps every entry: budget must be {rows * self.A.shape[1]} for a matrix "
                    f"{[rows, self.A.shape[1]]}, got {budget}"
                )
        for A, B, scalars in self.group_factors():
            check_factors(A, B, self.kernel, scalars)
        expected = [self.num_rows, self.A.shape[1]]
        if weight_shape is not None and [weight_shape[0], weight_shape[1:].numel()] != expected:
            raise ValueError(f"the update is {expected} but the weight is {list(weight_shape)}")
