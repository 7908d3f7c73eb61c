"""Matrices that keep few entries: their weight's gradient is computed there alone."""

from dataclasses import replace

import pytest
import torch

from snella.backends.numba import backend as numba_backend
from snella.backends.numba import backward as numba_backward

from .problems import assert_close_to_reference, draws, make_problem, solve

SPARSE = {"m": 41, "n": 37, "r": 8, "batch": (3, 100), "budget": 20}


@pytest.fixture
def products(monkeypatch):
    """The shapes of what the sampled product was given."""
    shapes = []
    original = numba_backward.sddmm_accumulate

    def noted(first, last, grad_y, x, *rest):
        shapes.append((grad_y.shape, x.shape))
        return original(first, last, grad_y, x, *rest)

    monkeypatch.setattr(numba_backward, "sddmm_accumulate", noted)
    return shapes


@pytest.mark.parametrize("kernel", ["p_linear", "normalized_rbf", "mix_k"])
def test_the_sampled_gradient_stays_close_to_the_reference(kernel, products):
    problems = draws(kernel, **SPARSE)
    learning = [name for name, tensor in problems[0].tensors.items() if tensor is not None and name != "weight"]
    assert_close_to_reference(problems, impls=["numba"], needed=learning)
    assert products


def test_all_tokens_count_and_few_at_a_time_are_seen(products):
    solve(make_problem("mix_k", **SPARSE), "numba", needed=("A", "B"))
    assert products == [((41, 256), (37, 256)), ((41, 44), (37, 44))]


def test_a_dense_matrix_is_not_sampled(products):
    limit = numba_backend._SDDMM_DENSITY * 41 * 37
    solve(make_problem("mix_k", **SPARSE | {"budget": int(limit) + 1}), "numba", needed=("A", "B"))
    assert not products
    solve(make_problem("mix_k", **SPARSE | {"budget": int(limit)}), "numba", needed=("A", "B"))
    assert products


def test_a_weight_that_learns_itself_needs_its_whole_gradient(products):
    found = solve(make_problem("mix_k", **SPARSE), "numba")
    assert not products
    assert found["weight"].count_nonzero() == 41 * 37


def test_only_the_sparse_one_of_three_matrices_is_sampled_and_the_frozen_one_costs_nothing(products):
    problem = make_problem("mix_k", n=37, r=8, rows=(41, 40, 39), budgets=(20, 1000, 0), batch=(64,))
    needed = ("x", "A", "B", "piece_coeff", "alpha", "beta")
    found, expected = solve(problem, "numba", needed=needed), solve(problem, "eager", needed=needed)
    assert [shape for shape, _ in products] == [(41, 64)]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not found["A"][2].any()
    assert not found["B"][81:].any()


def test_bfloat16_activations_are_sampled_in_float32():
    problem = make_problem("mix_k", **SPARSE, base_dtype=torch.bfloat16)
    dense = replace(problem, budgets=problem.budgets)
    found = solve(problem, "numba", needed=("A", "B"))
    expected = solve(dense, "eager", needed=("A", "B"))
    for name in ("A", "B"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max())


def test_a_matrix_is_sampled_below_one_density_whatever_its_size():
    for rows, n in ((10, 10), (768, 3072)):
        limit = numba_backend._SDDMM_DENSITY * rows * n
        for budget, expected in ((int(limit * 0.9), True), (int(limit * 1.1) + 1, False)):
            problem = make_problem("mix_k", m=rows, n=n, budget=budget)
            assert numba_backend.use_sddmm(problem.update(problem.tensors).spec, budget, rows * n) is expected
