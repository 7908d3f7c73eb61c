"""Weight gradients of linear layers: exact, rounded to bfloat16, or estimated from sampled tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

MIN_TOKENS = 64
"""Minimum sample size, given enough tokens; products of fewer tokens cost little compared to merging."""
MIN_SHARE = 2**-10
"""Minimum fraction of the tokens; above it, numerator and denominator fit the int64 arguments of compiled graphs."""
_ROUNDS = 4  # iterations to find the tokens with probability 1


def parse_weight_gradient(weight_gradient: str) -> tuple[float, bool]:
    """Parse `SnellaConfig.weight_gradient` into the fraction of sampled tokens and whether to round to bfloat16.

    Args:
        weight_gradient: `"exact"`, `"bfloat16"`, or `"sample:P"` with a number or fraction `P` from 1/1024 to 1, e.g.
            `sample:1/2`.

    Raises:
        ValueError: If the value is invalid.
    """
    if weight_gradient in ("exact", "bfloat16"):
        return 1.0, weight_gradient == "bfloat16"
    mode, _, fraction = str(weight_gradient).partition(":")
    try:
        share = float(Fraction(fraction)) if mode == "sample" else math.nan
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not MIN_SHARE <= share <= 1:
        raise ValueError(
            "weight_gradient must be 'exact', 'bfloat16' or 'sample:P' with P from 1/1024 to 1, got "
            f"{weight_gradient!r}; 'sample:1/2' samples half of the tokens"
        )
    return share, False


def sample_tokens(grad_y: Tensor, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Sample tokens so that the product of the results is an unbiased estimate of `grad_yᵀ x`.

        E[Ĝ] = G = Σ_t g_t x_tᵀ,   Ĝ = Σ_{t drawn} g_t x_tᵀ / π_t,   π_t = min(1, c·‖g_t‖·‖x_t‖),   Σ_t π_t = k

    Token `t` is drawn with probability `π_t`. The sample size is `k = share·T`, at least `MIN_TOKENS`. For
    independent draws, this `π` minimizes `E‖Ĝ − G‖² = Σ_t (1/π_t − 1) ‖g_t‖² ‖x_t‖²` for the given `k`. Systematic
    sampling (one random offset shifts `k` equally spaced points over the cumulative sum of `π`) draws exactly `k`
    tokens. No shape depends on values, so sampling does not synchronize with a GPU.

    Args:
        grad_y: `g`, the gradient of the layer's output, `[T, m]`.
        x: The layer's input, `[T, n]`.
        share: Fraction of the tokens, in `(0, 1]`.

    Returns:
        `g_t / π_t` `[k, m]` and `x_t` `[k, n]` of the drawn tokens, or `grad_y` and `x` unchanged if `k` reaches `T`.
    """
    tokens = len(x)
    k = max(math.ceil(share * tokens), min(tokens, MIN_TOKENS))
    if k >= tokens:
        return grad_y, x
    norms = torch.linalg.vector_norm(grad_y, dim=1, dtype=torch.float32)
    norms *= torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    # if all gradients are zero, sample uniformly; the estimate is zero
    norms = norms.clamp(min=torch.finfo(torch.float32).tiny)
    probs = norms * (k / norms.sum())
    for _ in range(_ROUNDS):
        is_certain = probs >= 1
        uncertain = torch.where(is_certain, 0, norms)
        probs = torch.where(is_certain, 1, norms * ((k - is_certain.sum()) / uncertain.sum()))
    # recompute the probabilities from the rounded cumulative sum, which determines the draws
    cumulative = probs.cumsum(0)
    cumulative = cumulative * (k / cumulative[-1])
    probs = torch.diff(cumulative, prepend=cumulative.new_zeros(1))
    points = torch.arange(k, device=x.device) + torch.rand(1, device=x.device)
    indices = torch.searchsorted(cumulative, points, right=True).clamp(max=tokens - 1)
    # divide in float32: 1/π can overflow float16 even if the quotient does not
    return (grad_y[indices] / probs[indices, None]).to(grad_y.dtype), x[indices]
