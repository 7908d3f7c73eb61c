"""Layer-level competition: how one budget is allocated among matrices by their importance (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

Schedule = Literal["cubic", "quadratic", "linear", "constant"]

_POWERS: dict[str, int] = {"cubic": 3, "quadratic": 2, "linear": 1}


def budget_at(t: int, total: int, b0: int, bT: int, schedule: str = "cubic") -> int:
    """Return the number of entries that all matrices together may keep at time `t`.

        b_t = b_T + (1 − t/T)^k (b_0 − b_T),   k = 3, 2, 1 for cubic, quadratic, linear; constant: b_T at every t

    Evaluated in integers, rounded down, so that `b_0` and `b_T` come out exactly.

    Args:
        t: Time, in the unit of `total`; past the end it stays at `bT`.
        total: `T`, epochs or steps of the whole training.
        b0: Budget at `t = 0`.
        bT: Budget at `t = T`.
        schedule: One of `Schedule`.

    Raises:
        ValueError: `schedule` is unknown, `total` is not positive, or `t` is negative.
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


def allocate(importance: Sequence[float], caps: Sequence[int], budget: int, min_layer_share: float = 0.0) -> list[int]:
    """Share `budget` entries out among matrices in proportion to their importance, none beyond its size.

    Each matrix gets its proportional share, capped at its size; what the filled ones leave over is shared out among the
    others in the same way, until nothing is left. Exact rational arithmetic, so that the sum is exact, the order of the
    matrices does not matter, and every machine finds the same numbers. Fractions of an entry go by largest remainder.

    Args:
        importance: One number a matrix; what is negative counts as 0. If one of them is not finite, or nothing is left
            above 0, shares go by size.
        caps: Size of each matrix.
        budget: Entries to give away, in `[0, sum(caps)]`.
        min_layer_share: Fraction of its uniform share `budget · cap / Σ caps` that every matrix gets beforehand, so
            that it cannot lose its gradient for good; 0 is the paper.

    Returns:
        One integer a matrix, `0 ≤ b[l] ≤ caps[l]`, `Σ b == budget`.

    Raises:
        ValueError: Lengths differ, a cap is negative, `budget` or `min_layer_share` is out of range.
    """
    total = sum(caps)
    if len(importance) != len(caps):
        raise ValueError(f"importance and caps must have one length, got {len(importance)} and {len(caps)}")
    if any(cap < 0 for cap in caps):
        raise ValueError(f"caps must not be negative, got {min(caps)}")
    if not 0 <= budget <= total:
        raise ValueError(f"budget must be in [0, {total}], the size of all matrices together, got {budget}")
    if not 0 <= min_layer_share <= 1:
        raise ValueError(f"min_layer_share must be in [0, 1], got {min_layer_share}")
    if total == 0:
        return [0] * len(caps)
    share = Fraction(min_layer_share)
    floors = [int(share * budget * cap / total) for cap in caps]
    is_usable = all(math.isfinite(value) for value in importance)
    scores = [Fraction(value) if is_usable and value > 0 else Fraction(0) for value in importance]
    rooms = [cap - floor for cap, floor in zip(caps, floors, strict=True)]
    shares = _fill_in_proportion(scores, rooms, budget - sum(floors))
    rounded = _round_to_sum(shares, rooms, budget - sum(floors), scores)
    return [floor + extra for floor, extra in zip(floors, rounded, strict=True)]


def _fill_in_proportion(scores: list[Fraction], rooms: list[int], budget: int) -> list[Fraction]:
    """Proportional shares under caps: fill those whose share exceeds their room, share the rest out anew."""
    shares = [Fraction(0)] * len(rooms)
    open_matrices = {k for k, room in enumerate(rooms) if room > 0}
    left = Fraction(budget)
    while left > 0 and open_matrices:
        # where no open matrix has any importance left, size decides
        weight = {k: scores[k] for k in open_matrices}
        if not any(weight.values()):
            weight = {k: Fraction(rooms[k]) for k in open_matrices}
        total = sum(weight.values())
        full = {k for k in open_matrices if left * weight[k] >= rooms[k] * total}
        if not full:
            for k in open_matrices:
                shares[k] = left * weight[k] / total
            break
        for k in full:
            shares[k] = Fraction(rooms[k])
            left -= rooms[k]
        open_matrices -= full
    return shares


def _round_to_sum(shares: list[Fraction], rooms: list[int], budget: int, scores: list[Fraction]) -> list[int]:
    """Round down and hand the missing entries to the largest remainders; ties go by importance, then by size."""
    counts = [int(share) for share in shares]
    missing = budget - sum(counts)
    # what decides a tie must not be the position of a matrix, or the result would depend on the order of the layers;
    # matrices alike in remainder, importance and size are interchangeable
    order = sorted(range(len(shares)), key=lambda k: (shares[k] - counts[k], scores[k], rooms[k]), reverse=True)
    for k in (k for k in order if counts[k] < rooms[k]):
        if missing == 0:
            break
        counts[k] += 1
        missing -= 1
    return counts
