"""Weight-level competition: what is left of a merged matrix once only its largest entries survive."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

SparsifyMode = Literal["soft", "official", "none"]
KEEPS_EVERYTHING = -1.0
"""The threshold of mode `none`, which every magnitude exceeds."""


def sparsify(delta: Tensor, threshold: Tensor, mode: SparsifyMode = "soft") -> Tensor:
    """Keep the entries of `delta` that exceed `threshold` in magnitude, weighted by magnitude; or all, as they are.

        soft:      S[i, j] = delta[i, j] · max(|delta[i, j]| − threshold, 0)                      (eq. 13)
        official:  S[i, j] = delta[i, j] · |delta[i, j]|·1[|delta[i, j]| > threshold]             (the authors' code)
        none:      S[i, j] = delta[i, j]                                                          (KLoRA, Table VII)

    The official factor `|delta|·1[…]` is a constant for differentiation, so that ∂S/∂delta is that factor; with `soft`
    ∂S/∂delta = 2|delta| − threshold above the threshold. At the threshold itself both derivatives are 0.

    Args:
        delta: Merged matrix, `[m, n]`, floating point.
        threshold: Magnitude, 0-dim, same device; a constant for differentiation.
        mode: `"soft"`, `"official"`, or `"none"` for kernelised LoRA, to which `threshold` means nothing.

    Returns:
        `[m, n]`, dtype of `delta`.

    Raises:
        ValueError: `mode` is unknown.
    """
    if mode == "none":
        return delta
    magnitude = delta.abs()
    survives = magnitude > threshold.detach()
    if mode == "soft":
        return delta * torch.where(survives, magnitude - threshold.detach(), 0)
    if mode == "official":
        return delta * torch.where(survives, magnitude, 0).detach()
    raise ValueError(f"mode must be one of {list(get_args(SparsifyMode))}, got {mode!r}")


def sparsify_slope(delta: Tensor, threshold: Tensor, mode: SparsifyMode = "soft") -> Tensor:
    """Return ∂S/∂delta of `sparsify`, entry by entry, `[m, n]`."""
    if mode == "none":
        return torch.ones_like(delta)
    magnitude = delta.abs()
    slope = 2 * magnitude - threshold if mode == "soft" else magnitude
    return torch.where(magnitude > threshold, slope, 0)
