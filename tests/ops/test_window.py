"""A threshold that is looked for near the last one is the same as one looked for everywhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snella.ops.adapted_linear import effective_weight_of, numba_backend
from snella.ops.adapted_linear.update import Guess

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
    update = replace(problem.update(problem.tensors), guesses=[Guess(wrong, True)])
    assert torch.equal(effective(update, problem.tensors["weight"]), fresh)
    assert len(searches) == 1
    assert update.guesses == [Guess(float(update.thresholds[0]), False)]


def test_equal_magnitudes_that_overflow_the_room_are_found_everywhere(searches):
    problem = make_problem("p_linear", m=60, n=50, r=8)
    ones = {name: torch.ones_like(problem.tensors[name]) for name in ("A", "B")}
    ones["B"][:, 0] += 1
    problem = replace(problem, tensors=problem.tensors | ones)
    update = problem.update(problem.tensors)
    fresh = effective(update, problem.tensors["weight"])
    searches.clear()
    update = replace(problem.update(problem.tensors), guesses=[Guess(float(update.thresholds[0]), True)])
    assert torch.equal(effective(update, problem.tensors["weight"]), fresh)
    assert len(searches) == 1


def test_the_matrices_of_a_fused_weight_have_a_guess_each():
    problem = make_problem("mix_k", n=20, r=8, rows=(10, 12, 14), budgets=(30, 0, 100))
    guesses = []
    for _ in range(3):
        update = problem.update(problem.tensors)
        update.guesses = guesses
        effective(update, problem.tensors["weight"])
    assert [guess.is_steady for guess in guesses] == [True, False, True]
    assert guesses[2].threshold == float(update.thresholds[2])
