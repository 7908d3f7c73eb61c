"""Weight-level competition: exact thresholds and sparsification of a merged matrix.

The entries of a matrix compete for its budget, the maximum number of nonzero entries. Only the largest magnitudes win.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

SparsifyMode = Literal["soft", "official", "none"]
KEEP_ALL = -1.0
"""Threshold of mode `none`: every magnitude exceeds it."""


def sparsify(delta: Tensor, threshold: Tensor, mode: SparsifyMode = "soft") -> Tensor:
    """Zero the entries of `delta` whose magnitude does not exceed `threshold`, and scale the others as `mode` requires.

        soft:      S[i, j] = delta[i, j] · max(|delta[i, j]| − threshold, 0)                      (eq. 13)
        official:  S[i, j] = delta[i, j] · |delta[i, j]|·1[|delta[i, j]| > threshold]             (the authors' code)
        none:      S[i, j] = delta[i, j]                                                          (KLoRA, Table VII)

    In mode `official`, the factor `|delta|·1[…]` is a constant for differentiation, so ∂S/∂delta equals this factor. In
    mode `soft`, ∂S/∂delta = 2|delta| − threshold above the threshold. At the threshold, both derivatives are 0.

    Args:
        delta: Merged matrix, `[m, n]`, floating point.
        threshold: 0-dim, on the device of `delta`; a constant for differentiation.
        mode: `"soft"`, `"official"`, or `"none"` (kernelized LoRA), which ignores `threshold`.

    Returns:
        `[m, n]`, in the dtype of `delta`.

    Raises:
        ValueError: If `mode` is unknown.
    """
    if mode == "none":
        return delta
    magnitude = delta.abs()
    is_above = magnitude > threshold.detach()
    if mode == "soft":
        return delta * torch.where(is_above, magnitude - threshold.detach(), 0)
    if mode == "official":
        return delta * torch.where(is_above, magnitude, 0).detach()
    raise ValueError(f"mode must be one of {list(get_args(SparsifyMode))}, got {mode!r}")


def sparsify_slope(delta: Tensor, threshold: Tensor, mode: SparsifyMode = "soft") -> Tensor:
    """Return the elementwise derivative ∂S/∂delta of `sparsify`, `[m, n]`."""
    if mode == "none":
        return torch.ones_like(delta)
    magnitude = delta.abs()
    slope = 2 * magnitude - threshold if mode == "soft" else magnitude
    return torch.where(magnitude > threshold, slope, 0)


def keep_threshold(delta: Tensor, budget: int) -> Tensor:
    """Return the magnitude that exactly `budget` entries of a tie-free matrix exceed.

        t = the (budget + 1)-th largest |delta|,   t = 0 when budget = delta.numel()

    Eq. 13 of the paper uses the `budget`-th largest magnitude, which keeps one entry fewer than the paper's text
    states. The selection is exact at every size (`torch.quantile` fails above 2²⁴ entries) and causes no host-device
    synchronization.

    All entries that tie with `t` become zero. Fewer than `budget` entries remain if `t` occurs more than once among
    the `budget + 1` largest magnitudes. No entry remains if the largest magnitude ties with `t`, e.g. in a constant
    matrix. Ties occur if `delta` has few distinct values (e.g. in half precision) or repeated rows or columns.

    Args:
        delta: Matrix of any shape, floating point.
        budget: Maximum number of nonzero entries, in `[0, delta.numel()]`.

    Returns:
        Detached 0-dim tensor with the dtype and device of `delta`.

    Raises:
        ValueError: If `budget` is out of range.
    """
    size = delta.numel()
    if not 0 <= budget <= size:
        raise ValueError(f"budget must be in [0, {size}] for a matrix {list(delta.shape)}, got {budget}")
    if budget == size:
        return delta.new_zeros(())
    rank = size - budget - 1  # counted from the smallest entry, which has rank 0
    return _smallest(delta.detach().abs(), [rank])[0]


def quantile_threshold(delta: Tensor, sparsity: float) -> Tensor:
    """Return the linearly interpolated `sparsity`-quantile of the magnitudes, as in the authors' code.

        t = quantile(|delta|, sparsity)

    Unlike `torch.quantile`, this function has no limit on the number of entries, computes the position of the quantile
    in double precision for every dtype, and ranks NaN above all numbers. Otherwise, the results are equal.

    Args:
        delta: Matrix of any shape, floating point.
        sparsity: Fraction of the entries below the threshold, in `[0, 1]`.

    Returns:
        Detached 0-dim tensor with the dtype and device of `delta`.

    Raises:
        ValueError: If `sparsity` is out of range or `delta` is empty.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    if not delta.numel():
        raise ValueError(f"delta must have at least one entry, got {list(delta.shape)}")
    position = sparsity * (delta.numel() - 1)
    lower_rank = int(position)
    upper_rank = min(lower_rank + 1, delta.numel() - 1)
    low, high = _smallest(delta.detach().abs(), [lower_rank, upper_rank])
    return torch.lerp(low, high, position - lower_rank)


def _smallest(magnitudes: Tensor, ranks: list[int]) -> list[Tensor]:
    """Return the entries with these ranks (0 is the smallest), without a full sort.

    May reorder `magnitudes` in place.
    """
    flat = magnitudes.flatten()
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        array = flat.numpy()  # shares the memory of `flat`, which the partition therefore reorders
        array.partition(np.unique(ranks))
        return [flat[rank].clone() for rank in ranks]
    return [torch.kthvalue(flat, rank + 1).values for rank in ranks]
