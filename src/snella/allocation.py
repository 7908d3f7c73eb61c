"""Layer-level competition: budget allocation among matrices by importance (Algorithm 1 of arXiv 2510.24037).

The budget of a matrix is the maximum number of nonzero entries of its sparse update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

Schedule = Literal["cubic", "quadratic", "linear", "constant"]

_POWERS: dict[str, int] = {"cubic": 3, "quadratic": 2, "linear": 1}


def budget_at(t: int, total: int, b0: int, bT: int, schedule: str = "cubic") -> int:
    """Return the total budget of all matrices at time `t`.

        b_t = b_T + (1 − t/T)^k (b_0 − b_T)                                               (eq. 12)

    with `k` = 3, 2, 1 for `"cubic"`, `"quadratic"`, `"linear"`. With `"constant"`, it is `b_T` at every `t`.

    The formula is evaluated in integers and rounded down, so `b_0` and `b_T` are exact.

    Args:
        t: Epoch or step, in the unit of `total`. After `total`, the budget stays at `bT`.
        total: `T`, total number of epochs or steps.
        b0: Budget at `t = 0`; unused by `"constant"`.
        bT: Budget at `t = T`.
        schedule: One of `Schedule`.

    Raises:
        ValueError: If `schedule` is unknown, `total` is not positive, or `t` is negative.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {list(get_args(Schedule))}, got {schedule!r}")
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    if t < 0:
        raise ValueError(f"t must be at least 0, got {t}")
    if schedule == "constant" or t >= total:
        return bT
    power = _POWERS[schedule]
    return bT + (b0 - bT) * (total - t) ** power // total**power


def schedule_length(total: int, schedule_end: float | None) -> int:
    """Return `T = ⌈schedule_end · total⌉`, the epoch or step at which the budget reaches its target.

    The product is rounded to nine decimals first, so 0.55 of 100 is 55, although `0.55 * 100 > 55`.

    Args:
        total: Total number of epochs or steps.
        schedule_end: Fraction in `(0, 1]`; None means 1.
    """
    return max(1, math.ceil(round((schedule_end or 1.0) * total, 9)))


def allocate(importance: Sequence[float], caps: Sequence[int], budget: int, min_layer_share: float = 0.0) -> list[int]:
    """Allocate `budget` entries among matrices in proportion to their importance.

    If the share of a matrix exceeds its size, the matrix is saturated: its budget is its size, and the excess is
    redistributed among the other matrices in the same way until all entries are allocated. Shares are computed in exact
    rational arithmetic and rounded by the largest-remainder method, so the sum is exact, and the result depends neither
    on the order of the matrices nor on the machine.

    Args:
        importance: Importance of each matrix. Negative values count as 0. If any value is not finite, all count as 0.
            If all unsaturated matrices have importance 0, their shares are proportional to size.
        caps: Size of each matrix.
        budget: Number of entries to allocate, in `[0, sum(caps)]`.
        min_layer_share: Minimum budget of each matrix, as a fraction of its uniform share `budget · cap / Σ caps`. Only
            the rest of the budget depends on importance. The paper uses no minimum, so a matrix can get budget 0 and
            then has no gradient.

    Returns:
        One integer per matrix, `0 ≤ b[l] ≤ caps[l]`, `Σ b == budget`.

    Raises:
        ValueError: If the lengths differ, a cap is negative, or `budget` or `min_layer_share` is out of range.
    """
    total_size = sum(caps)
    if len(importance) != len(caps):
        raise ValueError(f"importance and caps must have equal lengths, got {len(importance)} and {len(caps)}")
    if any(cap < 0 for cap in caps):
        raise ValueError(f"caps must not be negative, got {min(caps)}")
    if not 0 <= budget <= total_size:
        raise ValueError(f"budget must be in [0, {total_size}], the total size of all matrices, got {budget}")
    if not 0 <= min_layer_share <= 1:
        raise ValueError(f"min_layer_share must be in [0, 1], got {min_layer_share}")
    if total_size == 0:
        return [0] * len(caps)
    share = Fraction(min_layer_share)
    minimums = [int(share * budget * cap / total_size) for cap in caps]
    remaining = budget - sum(minimums)
    is_finite = all(math.isfinite(value) for value in importance)
    scores = [Fraction(value) if is_finite and value > 0 else Fraction(0) for value in importance]
    capacities = [cap - minimum for cap, minimum in zip(caps, minimums, strict=True)]
    shares = _fill_in_proportion(scores, capacities, remaining)
    rounded = _round_to_sum(shares, caps, remaining, scores)
    return [minimum + extra for minimum, extra in zip(minimums, rounded, strict=True)]


def _fill_in_proportion(scores: list[Fraction], capacities: list[int], budget: int) -> list[Fraction]:
    """Return shares in proportion to the scores, capped at the capacities; the excess goes to the other matrices."""
    shares = [Fraction(0)] * len(capacities)
    open_matrices = {k for k, capacity in enumerate(capacities) if capacity > 0}
    remaining = Fraction(budget)
    while remaining > 0:
        # if all open (unsaturated) matrices have zero importance, allocate by capacity
        weights = {k: scores[k] for k in open_matrices}
        if not any(weights.values()):
            weights = {k: Fraction(capacities[k]) for k in open_matrices}
        total_weight = sum(weights.values())
        saturated = {k for k in open_matrices if remaining * weights[k] >= capacities[k] * total_weight}
        if not saturated:
            for k in open_matrices:
                shares[k] = remaining * weights[k] / total_weight
            break
        for k in saturated:
            shares[k] = Fraction(capacities[k])
            remaining -= capacities[k]
        open_matrices -= saturated
    return shares


def _round_to_sum(shares: list[Fraction], caps: Sequence[int], budget: int, scores: list[Fraction]) -> list[int]:
    """Round shares by the largest-remainder method, to integers that sum to `budget`.

    Ties are broken by importance, then by size.
    """
    rounded = [int(share) for share in shares]
    num_missing = budget - sum(rounded)
    remainders = [share - integer for share, integer in zip(shares, rounded, strict=True)]
    # matrices that also tie in importance and size are interchangeable; breaking other ties by position would make the
    # result depend on the order of the layers
    order = sorted(range(len(shares)), key=lambda k: (remainders[k], scores[k], caps[k]), reverse=True)
    for k in order[:num_missing]:  # all of these have a remainder, so they are below their capacity
        rounded[k] += 1
    return rounded
