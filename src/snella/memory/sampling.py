"""What the gradient of a linear layer's weight is computed from: all tokens, rounded ones, or a sample without bias."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

LEAST_TOKENS = 64
"""A sample is no smaller than this, or than all tokens: with so few a product costs little next to merging."""
LEAST_SHARE = 2**-10
"""Of the tokens; both parts of a larger number's ratio of integers have 63 bits, in which a compiled graph takes it."""
_ROUNDS = 4  # in which certain tokens are found: those whose share of what is left exceeds one


def parse_weight_gradient(weight_gradient: str) -> tuple[float, bool]:
    """The share of the tokens that is asked for, and whether they are rounded to bfloat16.

    Args:
        weight_gradient: `"exact"`, `"bfloat16"`, or `"sample:P"` with `P` a number or a fraction from 1/1024 to 1, such
            as `sample:1/2`.

    Raises:
        ValueError: It is none of them.
    """
    if weight_gradient in ("exact", "bfloat16"):
        return 1.0, weight_gradient == "bfloat16"
    kind, _, number = str(weight_gradient).partition(":")
    try:
        share = float(Fraction(number)) if kind == "sample" else math.nan
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not LEAST_SHARE <= share <= 1:
        raise ValueError(
            "weight_gradient must be 'exact', 'bfloat16' or 'sample:P' with P from 1/1024 to 1, got "
            f"{weight_gradient!r}; 'sample:1/2' takes half of the tokens"
        )
    return share, False


def sample_tokens(grad_y: Tensor, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw tokens so that the product of what is returned estimates `grad_yᵀ x`.

        E[Ĝ] = G = Σ_t g_t x_tᵀ,   Ĝ = Σ_{t drawn} g_t x_tᵀ / π_t,   π_t = min(1, c·‖g_t‖·‖x_t‖),   Σ_t π_t = k

    Token `t` is drawn with probability `π_t`, `k = share·T` of them in all, at least `LEAST_TOKENS`. Of all `π` with
    that sum this one has the least `E‖Ĝ − G‖² = Σ_t (1/π_t − 1) ‖g_t‖² ‖x_t‖²`, if each is drawn by itself. They are
    drawn together (systematic sampling: one random number shifts a comb of `k` teeth over the running sum of `π`), so
    that exactly `k` come out and no size depends on values: nothing waits for a GPU.

    Args:
        grad_y: `g`, the gradient of the layer's output, `[T, m]`.
        x: The layer's input, `[T, n]`.
        share: In `(0, 1]`.

    Returns:
        `g_t / π_t` `[k, m]` and `x_t` `[k, n]` of the tokens that were drawn; `grad_y` and `x` as they are where all
        would be.
    """
    tokens = len(x)
    k = max(math.ceil(share * tokens), min(tokens, LEAST_TOKENS))
    if k >= tokens:
        return grad_y, x
    norms = torch.linalg.vector_norm(grad_y, dim=1, dtype=torch.float32)
    norms *= torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    # where no token has a gradient all are alike, and the estimate is the zero that it should be
    norms = norms.clamp(min=torch.finfo(torch.float32).tiny)
    chances = norms * (k / norms.sum())
    for _ in range(_ROUNDS):
        is_certain = chances >= 1
        left = torch.where(is_certain, 0, norms)
        chances = torch.where(is_certain, 1, norms * ((k - is_certain.sum()) / left.sum()))
    # the chance of a token is the piece of the comb's line that it has, rounding included
    ends = chances.cumsum(0)
    ends = ends * (k / ends[-1])
    chances = torch.diff(ends, prepend=ends.new_zeros(1))
    teeth = torch.arange(k, device=x.device) + torch.rand(1, device=x.device)
    drawn = torch.searchsorted(ends, teeth, right=True).clamp(max=tokens - 1)
    # in float32: the quotient is in range where 1/π alone is too large for float16
    return (grad_y[drawn] / chances[drawn, None]).to(grad_y.dtype), x[drawn]
