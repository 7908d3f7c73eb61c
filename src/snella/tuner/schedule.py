"""How the global budget shrinks while training runs (eq. 12)."""

from __future__ import annotations

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
