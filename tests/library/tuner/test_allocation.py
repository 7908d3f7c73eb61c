"""Algorithm 1: properties of allocations, and a hand-computed example."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snella.allocator import allocate

IMPORTANCE = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0, 1e-300, 1e300])


@st.composite
def problems(draw, importance=IMPORTANCE):
    caps = draw(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
    scores = draw(st.lists(importance, min_size=len(caps), max_size=len(caps)))
    budget = draw(st.integers(0, sum(caps)))
    return scores, caps, budget


@given(problems(), st.floats(0, 1))
def test_sum_is_exact_and_caps_hold(problem, min_layer_share):
    scores, caps, budget = problem
    shares = allocate(scores, caps, budget, min_layer_share)
    assert sum(shares) == budget
    assert all(isinstance(share, int) and 0 <= share <= cap for share, cap in zip(shares, caps, strict=True))


@given(problems(), st.sampled_from([0.0, 0.3, 1.0]), st.randoms())
def test_allocation_does_not_depend_on_order(problem, min_layer_share, random):
    scores, caps, budget = problem
    shares = allocate(scores, caps, budget, min_layer_share)
    order = list(range(len(caps)))
    random.shuffle(order)
    shuffled = allocate([scores[k] for k in order], [caps[k] for k in order], budget, min_layer_share)

    is_usable = all(math.isfinite(score) for score in scores)

    def group_shares(scores, caps, shares):
        scores_used = (score if is_usable and score > 0 else 0.0 for score in scores)  # the scores that `allocate` uses
        return Counter(zip(map(str, scores_used), caps, shares, strict=True))

    # matrices with equal importance and size are interchangeable
    assert group_shares([scores[k] for k in order], [caps[k] for k in order], shuffled) == group_shares(
        scores, caps, shares
    )


@given(problems())
def test_allocation_is_deterministic(problem):
    assert allocate(*problem) == allocate(*problem)


@given(problems(st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf])))
def test_allocation_is_uniform_without_positive_importance(problem):
    scores, caps, budget = problem
    assert sorted(allocate(scores, caps, budget)) == sorted(allocate([1.0 * cap for cap in caps], caps, budget))


@given(problems(), st.floats(0, 1))
def test_every_matrix_gets_its_minimum_share(problem, min_layer_share):
    scores, caps, budget = problem
    shares = allocate(scores, caps, budget, min_layer_share)
    for share, cap in zip(shares, caps, strict=True):
        assert share >= math.floor(min_layer_share * budget * cap / max(sum(caps), 1) - 1e-6)


def test_min_layer_share_1_is_the_uniform_allocation():
    assert allocate([9.0, 1.0, 0.0], [100, 200, 300], 60, 1.0) == [10, 20, 30]


@given(problems(st.floats(0.001, 1000)))
def test_budget_is_monotonic_in_importance(problem):
    scores, _, budget = problem
    cap = max(budget, 1)
    shares = allocate(scores, [cap] * len(scores), budget)
    ranked = sorted(zip(scores, shares, strict=True))
    assert all(first[1] <= second[1] for first, second in pairwise(ranked) if first[0] < second[0])


def test_algorithm_1_equals_hand_computed_example():
    # round 1: 100 entries in the ratio 5:3:2 are 50, 30, 20; the first matrix is capped at 20
    # round 2: the remaining 80 in the ratio 3:2 are 48 and 32; the second matrix is capped at 40
    # round 3: the third matrix gets the remaining 40
    assert allocate([5.0, 3.0, 2.0], [20, 40, 1000], 100) == [20, 40, 40]


def test_rounding_uses_largest_remainder():
    # 10 · 4/9 = 4.44, 10 · 3/9 = 3.33, 10 · 2/9 = 2.22: the remaining entry goes to the largest remainder
    assert allocate([4.0, 3.0, 2.0], [100, 100, 100], 10) == [5, 3, 2]


def test_ties_are_broken_by_importance_then_by_size():
    assert allocate([1.0, 1.0], [5, 9], 3) == [1, 2]
    assert allocate([3.0, 1.0], [9, 9], 2) == [2, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nonfinite_importance_gives_uniform_allocation(broken):
    assert allocate([1.0, broken, 5.0], [10, 20, 30], 12) == [2, 4, 6]


@pytest.mark.parametrize("broken", [0.0, -3.0])
def test_matrix_without_importance_gets_only_the_excess(broken):
    assert allocate([1.0, broken], [10, 10], 8) == [8, 0]
    assert allocate([1.0, broken], [10, 10], 15) == [10, 5]


def test_importance_of_very_different_magnitudes_is_supported():
    assert allocate([1e-300, 3e-300, 1e300], [100, 100, 10], 50) == [10, 30, 10]


def test_allocation_is_exact_for_large_models():
    caps = [4096 * 11008] * 96
    shares = allocate([1.0 + k for k in range(96)], caps, sum(caps) * 3 // 10)
    assert sum(shares) == sum(caps) * 3 // 10


def test_budget_0_gives_0_everywhere():
    assert allocate([1.0, 2.0], [3, 4], 0) == [0, 0]
    assert allocate([], [], 0) == []
    assert allocate([1.0], [0], 0) == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [2, 3], 1), "importance and caps must have equal lengths, got 1 and 2"),
        (([1.0, 1.0], [2, -3], 0), "caps must not be negative, got -3"),
        (([1.0, 1.0], [2, 3], 6), r"budget must be in \[0, 5\], the total size of all matrices, got 6"),
        (([1.0, 1.0], [2, 3], -1), r"budget must be in \[0, 5\].* got -1"),
        (([1.0, 1.0], [2, 3], 1, 1.5), r"min_layer_share must be in \[0, 1\], got 1\.5"),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


def test_ties_of_equal_remaining_sizes_are_broken_by_size():
    assert allocate([0, 0], [1, 2], 2, 1.0) == allocate([0, 0], [2, 1], 2, 1.0)[::-1]
