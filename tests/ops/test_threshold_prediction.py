"""A threshold that is looked for near the last one is the same as one looked for everywhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snella.ops.backends.numba import backend as numba_backend
from snella.ops.functional import effective_weight_of
from snella.ops.spec import Guess

from .problems import make_problem


def effective(update, weight):
    return effective_weight_of(weight, [update], weight.shape, "numba")


@pytest.fixture
def searches(monkeypatch):
    """How often a matrix was written to look for its threshold everywhere."""
    calls = []
    original = numba_backend._merge
    monkeypatch.setattr(numba_backend, "_merge", lambda factors: calls.append(1) or original(factors))
    return calls


@settings(max_examples=40, deadline=None)
@given(step=st.sampled_from([0.0, 1e-4, 1e-2, 0.3]), seed=st.integers(0, 50), data=st.data())
def test_steps_of_any_size_give_the_bits_of_a_fresh_search(step, seed, data):
    problem = make_problem("mix_k", m=23, n=17, r=8, seed=seed, budget=data.draw(st.integers(0, 23 * 17)))
    weight, guesses = problem.tensors["weight"], []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        for name in ("A", "B"):
            problem.tensors[name] += step * torch.randn(problem.tensors[name].shape, generator=generator)
        fresh, warm = problem.update(problem.tensors), problem.update(problem.tensors)
        warm.guesses = guesses
        assert torch.equal(effective(warm, weight), effective(fresh, weight))
        assert warm.thresholds == fresh.thresholds


def test_a_threshold_that_stays_is_found_without_writing_the_matrix(searches):
    problem = make_problem("mix_k", m=60, n=50, r=8)
    guesses = []
    for _ in range(5):
        update = problem.update(problem.tensors)
        update.guesses = guesses
        effective(update, problem.tensors["weight"])
    assert len(searches) == 2, "the first two tell that it is steady"


def test_a_threshold_that_jumps_is_found_everywhere(searches):
    problem = make_problem("mix_k", m=60, n=50, r=8)
    update = problem.update(problem.tensors)
    fresh = effective(update, problem.tensors["weight"])
    wrong = float(update.thresholds[0]) * 1.5
    searches.clear()
    update = replace(problem.update(problem.tensors), guesses=[Guess(wrong, wrong, 0.0, 0.02)])
    assert torch.equal(effective(update, problem.tensors["weight"]), fresh)
    assert len(searches) == 1
    assert update.guesses[0].last == float(update.thresholds[0])
    assert update.guesses[0].window == 0, "after a miss this large, the next one is looked for everywhere"


def test_equal_magnitudes_that_overflow_the_room_are_found_everywhere(searches):
    problem = make_problem("p_linear", m=60, n=50, r=8)
    ones = {name: torch.ones_like(problem.tensors[name]) for name in ("A", "B")}
    ones["B"][:, 0] += 1
    problem = replace(problem, tensors=problem.tensors | ones)
    update = problem.update(problem.tensors)
    fresh = effective(update, problem.tensors["weight"])
    searches.clear()
    update = replace(problem.update(problem.tensors), guesses=[Guess(*[float(update.thresholds[0])] * 2, 0.0, 0.02)])
    assert torch.equal(effective(update, problem.tensors["weight"]), fresh)
    assert len(searches) == 1


def test_the_matrices_of_a_fused_weight_have_a_guess_each():
    problem = make_problem("mix_k", n=20, r=8, rows=(10, 12, 14), budgets=(30, 0, 100))
    guesses = []
    for _ in range(3):
        update = problem.update(problem.tensors)
        update.guesses = guesses
        effective(update, problem.tensors["weight"])
    assert [guess.window > 0 for guess in guesses] == [True, False, True]
    assert guesses[2].last == float(update.thresholds[2])


def test_a_threshold_that_moves_evenly_is_found_where_it_is_expected(searches):
    problem = make_problem("p_linear", m=60, n=50, r=8)
    guesses = []
    for _ in range(8):
        for name in ("A", "B"):
            problem.tensors[name] *= 0.97  # and so does the threshold, by more than any window is wide in three steps
        update = problem.update(problem.tensors)
        update.guesses = guesses
        effective(update, problem.tensors["weight"])
    assert len(searches) < 5
    assert guesses[0].expected == pytest.approx(0.97 * guesses[0].last, rel=1e-3)


def test_a_guess_widens_at_a_miss_and_narrows_again():
    guess = Guess(0.0, 0.0).follow(1.0, (0.004, 0.06)).follow(1.01, (0.004, 0.06))
    assert guess.expected == pytest.approx(1.01**2) and guess.window == pytest.approx(0.03)
    widths = [guess.window]
    for k in range(2, 12):
        guess = guess.follow(1.01**k, (0.004, 0.06))
        widths.append(guess.window)
    assert widths == sorted(widths, reverse=True) and widths[-1] == 0.004


def test_a_threshold_that_is_not_finite_leads_to_no_guess():
    guess = Guess(0.0, 0.0).follow(float("nan"), (0.004, 0.06))
    assert guess == Guess(0.0, 0.0)
    assert guess.follow(1.0, (0.004, 0.06)) == Guess(1.0, 1.0)
    assert Guess(1.0, 1.0).follow(float("inf"), (0.004, 0.06)) == Guess(0.0, 0.0)
