"""Initialization of an adapter: random factors whose update is small relative to the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snella.kernels import Kernel, KernelScalars
from snella.update import Factors

_INITIAL_SCALARS = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
_INITIAL_PIECE_COEFF = 0.1
_SAMPLE_SIZE = 64  # rows or columns used to estimate the size of the initial update
_MIN_SHRINK = 0.1  # minimum scale of the factors, so that updates of near-zero weights can grow


@torch.no_grad()
def init_factors(factors: Factors, rows: Sequence[slice], num_pieces: int, *, is_larger: bool = False) -> None:
    """Initialize the factors and scalars of an update in place.

        A ~ U(±1/√(n·r/P)),  B ~ U(±1/√(rows·r/P)),  piece_coeff = 0.1, −0.1, …,  α = γ = 1,  β = 0

    Args:
        factors: Factors of `G` matrices, `A` `[G, n, r]` and `B` `[m, r]`.
        rows: Row slice of `B` for each matrix.
        num_pieces: `P`.
        is_larger: If True, draw factors from `U(±1)` instead.
    """
    A, B = factors.A, factors.B
    width = max(A.shape[-1] // num_pieces, 1)
    for group, matrix_rows in enumerate(rows):
        for factor, fan in (
            (A[group], A.shape[1] * width),
            (B[matrix_rows], (matrix_rows.stop - matrix_rows.start) * width),
        ):
            factor.uniform_(-1, 1).mul_(1.0 if is_larger else fan**-0.5)
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

    The softmax sums to 1 over the `m` outputs, so `S` starts near `1/m²`, which is large in narrow layers.

    Args:
        factors: Factors initialized by `init_factors`.
        rows: Row slice of each matrix.
        kernel: Kernel function that merges the factors.
        weight: `W0`, `[m, …]`.
        bound: `SnellaLayer.max_initial_ratio`. The update shrinks by a factor of at most 100, even if it still exceeds
            the bound.
    """
    A, B = factors.A, factors.B
    max_columns, max_rows = (_SAMPLE_SIZE, None) if kernel.softmax_dim == 0 else (None, _SAMPLE_SIZE)
    for group, matrix_rows in enumerate(rows):
        scalars = KernelScalars(*(value if value is None else value[group] for value in factors[2:]))
        delta = kernel.merge(A[group][:max_columns], B[matrix_rows][:max_rows], scalars)
        weight_rms = weight[matrix_rows].float().square().mean().sqrt()
        initial_ratio = float(
            A.shape[1] ** 0.5 * delta.square().square().mean().sqrt().to(weight_rms.device) / weight_rms
        )
        if bound < initial_ratio < float("inf"):
            shrink = max((bound / initial_ratio) ** 0.5, _MIN_SHRINK)
            alpha = () if factors.alpha is None else (factors.alpha[group],)
            for tensor in (A[group], B[matrix_rows], *alpha):
                tensor.mul_(shrink)
