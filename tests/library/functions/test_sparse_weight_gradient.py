"""Sampled dense-dense matrix products (SDDMM) for weight gradients of sparse matrices."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from snella import SnellaConfig
from snella.backends.numba import backend as numba_backend
from snella.backends.numba import backward as numba_backward

from .problems import assert_close_to_reference, draws, make_problem, solve

SPARSE = {"m": 41, "n": 37, "r": 8, "batch": (3, 100), "budget": 20}


@pytest.fixture
def sddmm_shapes(monkeypatch):
    """Return a list of the shapes of all SDDMM inputs."""
    shapes = []
    original = numba_backward.sddmm_accumulate

    def record(first, last, grad_y, x, *rest):
        shapes.append((grad_y.shape, x.shape))
        return original(first, last, grad_y, x, *rest)

    monkeypatch.setattr(numba_backward, "sddmm_accumulate", record)
    return shapes


@pytest.mark.parametrize("kernel", ["p_linear", "normalized_rbf", "mix_k"])
def test_sddmm_gradient_is_close_to_reference(kernel, sddmm_shapes):
    problems = draws(kernel, **SPARSE)
    trainable = [name for name, tensor in problems[0].tensors.items() if tensor is not None and name != "weight"]
    assert_close_to_reference(problems, impls=["numba"], needed=trainable)
    assert sddmm_shapes


def test_sddmm_processes_all_tokens_in_chunks(sddmm_shapes):
    solve(make_problem("mix_k", **SPARSE), "numba", needed=("A", "B"))
    assert sddmm_shapes == [((41, 256), (37, 256)), ((41, 44), (37, 44))]


def test_dense_matrix_does_not_use_sddmm(sddmm_shapes):
    limit = numba_backend._SDDMM_DENSITY * 41 * 37
    solve(make_problem("mix_k", **SPARSE | {"budget": int(limit) + 1}), "numba", needed=("A", "B"))
    assert not sddmm_shapes
    solve(make_problem("mix_k", **SPARSE | {"budget": int(limit)}), "numba", needed=("A", "B"))
    assert sddmm_shapes


def test_trainable_weight_does_not_use_sddmm(sddmm_shapes):
    actual = solve(make_problem("mix_k", **SPARSE), "numba")
    assert not sddmm_shapes
    assert actual["weight"].count_nonzero() == 41 * 37


def test_only_sparse_matrices_use_sddmm_and_frozen_matrices_cost_nothing(sddmm_shapes):
    problem = make_problem("mix_k", n=37, r=8, rows=(41, 40, 39), budgets=(20, 1000, 0), batch=(64,))
    needed = ("x", "A", "B", "piece_coeff", "alpha", "beta")
    actual, expected = solve(problem, "numba", needed=needed), solve(problem, "eager", needed=needed)
    assert [shape for shape, _ in sddmm_shapes] == [(41, 64)]
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not actual["A"][2].any()
    assert not actual["B"][81:].any()


def test_sddmm_computes_bfloat16_activations_in_float32(sddmm_shapes):
    problem, needed = make_problem("mix_k", **SPARSE, base_dtype=torch.bfloat16), ("A", "B")
    actual = solve(problem, "numba", needed=needed)
    assert sddmm_shapes
    in_float32 = solve(problem.cast(torch.Tensor.float), "eager", needed=needed)
    in_bfloat16 = solve(problem, "eager", needed=needed)
    for name in needed:
        largest = in_float32[name].abs().max()
        torch.testing.assert_close(actual[name], in_float32[name], rtol=0, atol=1e-5 * largest)
        torch.testing.assert_close(actual[name], in_bfloat16[name], rtol=0, atol=0.02 * largest)


def test_sddmm_density_threshold_does_not_depend_on_size():
    for rows, n in ((10, 10), (768, 3072)):
        limit = numba_backend._SDDMM_DENSITY * rows * n
        for budget, expected in ((int(limit * 0.9), True), (int(limit * 1.1) + 1, False)):
            problem = make_problem("mix_k", m=rows, n=n, budget=budget)
            assert numba_backend.use_sddmm(problem.update(problem.tensors).spec, budget, rows * n) is expected


def test_an_outdated_threshold_is_an_error_instead_of_a_write_outside_the_buffers():
    torch.manual_seed(0)
    layer = get_peft_model(
        nn.Sequential(nn.Linear(37, 41)), SnellaConfig(r=8, target_modules=["0"], impl="numba")
    ).train()
    inner = layer.base_model.model[0]
    inner.set_budget("default", [20])
    x = torch.randn(300, 37)
    layer(x).square().sum().backward()
    inner.snella_B["default"].data.mul_(20)  # not seen by the cached threshold
    with pytest.raises(RuntimeError, match="threshold is outdated because the factors were changed"):
        layer(x).square().sum().backward()
