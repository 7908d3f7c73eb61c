"""Algorithm 1: properties of every allocation, and one worked by hand."""

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
def test_the_sum_is_exact_and_no_cap_is_exceeded(problem, min_layer_share):
    scores, caps, budget = problem
    shares = allocate(scores, caps, budget, min_layer_share)
    assert sum(shares) == budget
    assert all(isinstance(share, int) and 0 <= share <= cap for share, cap in zip(shares, caps, strict=True))


@given(problems(), st.randoms())
def test_the_order_of_the_matrices_does_not_matter(problem, random):
    scores, caps, budget = problem
    shares = allocate(scores, caps, budget)
    order = list(range(len(caps)))
    random.shuffle(order)
    shuffled = allocate([scores[k] for k in order], [caps[k] for k in order], budget)

    is_usable = all(math.isfinite(score) for score in scores)

    def kinds(scores, caps, shares):
        read = (score if is_usable and score > 0 else 0.0 for score in scores)  # what allocate makes of an importance
        return Counter(zip(map(str, read), caps, shares, strict=True))

    # matrices alike in importance and size are interchangeable
    assert kinds([scores[k] for k in order], [caps[k] for k in order], shuffled) == kinds(scores, caps, shares)


@given(problems())
def test_the_same_problem_has_the_same_solution_every_time(problem):
    assert allocate(*problem) == allocate(*problem)


@given(problems(st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf])))
def test_without_any_usable_importance_size_decides(problem):
    scores, caps, budget = problem
    assert sorted(allocate(scores, caps, budget)) == sorted(allocate([1.0 * cap for cap in caps], caps, budget))


@given(problems(), st.floats(0, 1))
def test_every_matrix_keeps_its_minimal_share(problem, min_layer_share):
    scores, caps, budget = problem
    shares = allocate(scores, caps, budget, min_layer_share)
    for share, cap in zip(shares, caps, strict=True):
        assert share >= math.floor(min_layer_share * budget * cap / max(sum(caps), 1) - 1e-6)


def test_a_full_minimal_share_is_the_uniform_allocation():
    assert allocate([9.0, 1.0, 0.0], [100, 200, 300], 60, 1.0) == [10, 20, 30]


@given(problems(st.floats(0.001, 1000)))
def test_more_importance_never_means_less_budget(problem):
    scores, _, budget = problem
    cap = max(budget, 1)
    shares = allocate(scores, [cap] * len(scores), budget)
    ranked = sorted(zip(scores, shares, strict=True))
    assert all(first[1] <= second[1] for first, second in pairwise(ranked) if first[0] < second[0])


def test_algorithm_1_worked_by_hand():
    # round 1: shares of 100 by 5:3:2 are 50, 30, 20; the first has room for 20 only
    # round 2: the 80 left by 3:2 are 48 and 32; the second has room for 40 only
    # round 3: the last gets the 40 left
    assert allocate([5.0, 3.0, 2.0], [20, 40, 1000], 100) == [20, 40, 40]


def test_fractions_go_by_largest_remainder():
    # 10 · 4/9 = 4.44, 10 · 3/9 = 3.33, 10 · 2/9 = 2.22: the entry left goes to the largest remainder
    assert allocate([4.0, 3.0, 2.0], [100, 100, 100], 10) == [5, 3, 2]


def test_ties_go_to_the_more_important_then_to_the_larger():
    assert allocate([1.0, 1.0], [5, 9], 3) == [1, 2]
    assert allocate([3.0, 1.0], [9, 9], 2) == [2, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_one_importance_that_is_not_finite_leaves_the_decision_to_size(broken):
    assert allocate([1.0, broken, 5.0], [10, 20, 30], 12) == [2, 4, 6]


@pytest.mark.parametrize("broken", [0.0, -3.0])
def test_a_matrix_without_importance_gets_only_what_others_cannot_hold(broken):
    assert allocate([1.0, broken], [10, 10], 8) == [8, 0]
    assert allocate([1.0, broken], [10, 10], 15) == [10, 5]


def test_differences_of_many_orders_of_magnitude_are_kept():
    assert allocate([1e-300, 3e-300, 1e300], [100, 100, 10], 50) == [10, 30, 10]


def test_large_models_are_allocated_exactly():
    caps = [4096 * 11008] * 96
    shares = allocate([1.0 + k for k in range(96)], caps, sum(caps) * 3 // 10)
    assert sum(shares) == sum(caps) * 3 // 10


def test_nothing_to_give_is_given_to_nobody():
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
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)
