"""First values of an adapter: random factors, and an update that starts small beside the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snella.kernels import Kernel, KernelScalars
from snella.update import Factors

_FIRST_VALUES = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
_PIECE_COEFF = 0.1
_START_SAMPLE = 64  # rows or columns that tell the size of the first update: its factors are drawn independently
_LEAST_START = 0.1  # of the paper's start, so that weights near zero keep an update that can grow


@torch.no_grad()
def init_factors(factors: Factors, rows: Sequence[slice], num_pieces: int, *, is_larger: bool = False) -> None:
    """Draw the factors of an update, and set its scalars, in place.

        A ~ U(±1/√(n·r/P)),  B ~ U(±1/√(rows·r/P)),  piece_coeff = 0.1, −0.1, …,  α = γ = 1,  β = 0

    Args:
        factors: Those of `G` matrices, `A` `[G, n, r]` and `B` `[m, r]`.
        rows: Rows of `B` that belong to each matrix.
        num_pieces: `P`.
        is_larger: Whether factors are drawn from `±1` instead.
    """
    A, B = factors.A, factors.B
    width = max(A.shape[-1] // num_pieces, 1)
    for group, part in enumerate(rows):
        for factor, fan in ((A[group], A.shape[1] * width), (B[part], (part.stop - part.start) * width)):
            factor.uniform_(-1, 1).mul_(1.0 if is_larger else fan**-0.5)
    for name, value in _FIRST_VALUES.items():
        scalar: Tensor | None = getattr(factors, name)
        if scalar is not None:
            scalar.fill_(value)
    if factors.piece_coeff is not None:
        factors.piece_coeff.copy_(_PIECE_COEFF * (-1.0) ** torch.arange(factors.piece_coeff.shape[1]))


@torch.no_grad()
def bound_first_update(factors: Factors, rows: Sequence[slice], kernel: Kernel, weight: Tensor, bound: float) -> None:
    """Shrink factors and `α` of an update that is quadratic in `ΔW`, in place, where it is large beside the weight.

        √n · rms(S) / rms(W0) ≤ bound, for each matrix

    The softmax adds up to 1 over the `m` outputs, so that `S` starts near `1/m²`: large where a layer is narrow.

    Args:
        factors: As `init_factors` has drawn them.
        rows: Rows of each matrix.
        kernel: That merges them.
        weight: `W0`, `[m, …]`.
        bound: `SnellaLayer.largest_start`; what exceeds it by far still keeps a hundredth of its size.
    """
    A, B = factors.A, factors.B
    columns, outputs = (_START_SAMPLE, None) if kernel.softmax_dim == 0 else (None, _START_SAMPLE)
    for group, part in enumerate(rows):
        scalars = KernelScalars(*(value if value is None else value[group] for value in factors[2:]))
        delta = kernel.merge(A[group][:columns], B[part][:outputs], scalars)
        base = weight[part].float().square().mean().sqrt()
        start = float(A.shape[1] ** 0.5 * delta.square().square().mean().sqrt().to(base.device) / base)
        if bound < start < float("inf"):
            shrink = max((bound / start) ** 0.5, _LEAST_START)
            alpha = () if factors.alpha is None else (factors.alpha[group],)
            for tensor in (A[group], B[part], *alpha):
                tensor.mul_(shrink)
