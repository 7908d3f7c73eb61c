"""Budget schedules (eq. 12)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snella.allocation import budget_at, schedule_length

KINDS = ["cubic", "quadratic", "linear", "constant"]


@pytest.mark.parametrize("schedule", ["cubic", "quadratic", "linear"])
def test_schedule_starts_and_ends_exactly_at_its_budgets(schedule):
    assert budget_at(0, 7, 84_934_656, 25_480_397, schedule) == 84_934_656
    assert budget_at(7, 7, 84_934_656, 25_480_397, schedule) == 25_480_397
    assert budget_at(99, 7, 84_934_656, 25_480_397, schedule) == 25_480_397


def test_constant_schedule_is_at_target_from_the_start():
    assert [budget_at(t, 4, 1000, 300, "constant") for t in range(5)] == [300] * 5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 300 + (1 − t/4)^k · 700, rounded down
        ("cubic", [1000, 595, 387, 310, 300]),
        ("quadratic", [1000, 693, 475, 343, 300]),
        ("linear", [1000, 825, 650, 475, 300]),
    ],
)
def test_values_equal_hand_computation(schedule, expected):
    assert [budget_at(t, 4, 1000, 300, schedule) for t in range(5)] == expected


@given(
    total=st.integers(1, 200),
    target=st.integers(0, 10**9),
    extra=st.integers(0, 10**9),
    schedule=st.sampled_from(KINDS),
)
def test_budget_is_monotonic_and_bounded(total, target, extra, schedule):
    budgets = [budget_at(t, total, target + extra, target, schedule) for t in range(total + 2)]
    assert all(later <= earlier for earlier, later in pairwise(budgets))
    assert budgets[-1] == budgets[-2] == target
    assert max(budgets) <= target + extra


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (0, 4, 10, 3, "cubed"),
            r"schedule must be one of \['cubic', .*'constant'\], got 'cubed'",
        ),
        ((0, 0, 10, 3), "total must be at least 1, got 0"),
        ((-1, 4, 10, 3), "t must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        budget_at(*arguments)


@pytest.mark.parametrize(
    ("total", "schedule_end", "length"),
    # 0.55 * 100 and 0.07 * 100 are slightly above 55 and 7 in floating point
    [(100, 0.55, 55), (100, 0.07, 7), (10, 0.7, 7), (10, 0.71, 8), (7, 1.0, 7), (7, None, 7), (3, 1e-12, 1)],
)
def test_schedule_length_rounds_up(total, schedule_end, length):
    assert schedule_length(total, schedule_end) == length
