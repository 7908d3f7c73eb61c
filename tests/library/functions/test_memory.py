"""Tensors that a layer saves for the backward pass."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snella.functional import adapted_linear
from snella.ops import Conv2dOp

from .problems import Problem, make_problem

M, N, BATCH = 32, 24, 10


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_by(problem: Problem, impl: str = "eager", cache_delta: bool = False) -> list[Tensor]:
    """Return the saved tensors of one forward pass that are not parameters; assert that parameters are not copied."""
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    parameter_ptrs = {storage(t) for name, t in problem.tensors.items() if t is not None and name != "x"}
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        y = problem.forward(problem.tensors, impl, cache_delta)
    assert y.requires_grad or not saved
    unique = {(storage(t), t.dtype, t.shape): t for t in saved if storage(t) not in parameter_ptrs}
    return list(unique.values())


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trainable_layer(*names: str, **options: object) -> Problem:
    """Create a layer in which only the tensors `names` require gradients."""
    problem = make_problem(**{"m": M, "n": N, "batch": (BATCH,), **options})
    for name in names:
        problem.tensors[name].requires_grad_()
    return problem


def test_layer_saves_input_and_one_threshold():
    problem = trainable_layer("x", "A", "B", "piece_coeff", "alpha", "beta", "temperature")
    saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 4 + 4
    assert {storage(problem.tensors["x"])} == {storage(t) for t in saved if t.ndim > 1}, (
        "the input is saved without a copy"
    )


def test_adapted_linear_saves_factors_and_scalars_without_copies():
    problem = trainable_layer()
    A, B = problem.tensors["A"][0].clone().requires_grad_(), problem.tensors["B"].requires_grad_()
    scalars = {name: problem.tensors[name][0].clone().requires_grad_() for name in ("piece_coeff", "alpha", "beta")}
    x, weight = problem.tensors["x"], problem.tensors["weight"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(x, weight, None, A, B, budget=100, impl="eager", **scalars)
    parameters = [x, weight, A, B, *scalars.values()]
    assert {storage(tensor) for tensor in parameters} <= {storage(tensor) for tensor in saved}
    rest = [tensor for tensor in saved if storage(tensor) not in {storage(p) for p in parameters}]
    assert [tensor.shape for tensor in rest] == [(1,)]


def test_fused_weight_saves_three_thresholds():
    problem = trainable_layer("x", "A", "B", rows=(10, 10, 12), budgets=(40, 0, 80))
    saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 4 + 3 * 4
    assert sum(tensor.numel() for tensor in saved if tensor.ndim == 1) == 3


def test_cache_delta_also_saves_merged_matrix():
    problem = trainable_layer("x", "A", "B")
    saved = saved_by(problem, cache_delta=True)
    assert nbytes(saved) == BATCH * N * 4 + 4 + M * N * 4


def test_cache_delta_saves_nothing_for_matrix_without_budget():
    problem = trainable_layer("x", "A", "B", rows=(20, 12), budgets=(40, 0))
    assert nbytes(saved_by(problem, cache_delta=True)) == BATCH * N * 4 + 2 * 4 + 20 * N * 4


def test_numba_saves_three_numbers_per_column_and_with_cache_delta_the_effective_weight():
    problem = trainable_layer("x", "A", "B", rows=(20, 12), budgets=(40, 0))
    rebuilt = BATCH * N * 4 + 2 * 4 + 2 * 3 * N * 4
    assert nbytes(saved_by(problem, "numba")) == rebuilt
    assert nbytes(saved_by(problem, "numba", cache_delta=True)) == rebuilt + M * N * 4
    # without an input gradient, the backward pass does not need the weight
    assert nbytes(saved_by(trainable_layer("A", "B"), "numba", cache_delta=True)) == BATCH * N * 4 + 4 + 3 * N * 4


def test_reference_saves_several_matrices():
    assert nbytes(saved_by(trainable_layer("x", "A", "B"), "reference")) > 4 * M * N * 4


def test_input_is_not_saved_for_frozen_factors():
    saved = saved_by(trainable_layer("x"))
    assert [tensor.shape for tensor in saved] == [(1,)]


def test_input_is_not_saved_without_budget():
    saved = saved_by(trainable_layer("x", "A", "B", budget=0))
    assert [tensor.shape for tensor in saved] == [(1,)]


def test_first_layer_trains_without_input_gradient():
    problem = trainable_layer("A", "B")
    assert nbytes(saved_by(problem)) == BATCH * N * 4 + 4
    y = problem.forward(problem.tensors, "eager")
    grads = torch.autograd.grad(y, [problem.tensors["A"], problem.tensors["B"]], problem.grad_y)
    assert all(grad.any() for grad in grads)


def test_frozen_layer_saves_nothing():
    assert saved_by(trainable_layer()) == []


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_saves_input_in_bfloat16(base_dtype):
    problem = trainable_layer("x", "A", "B", base_dtype=base_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 2 + 4


def test_bfloat16_layer_saves_bfloat16_input():
    problem = trainable_layer("x", "A", "B", base_dtype=torch.bfloat16)
    saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 2 + 4
    assert storage(problem.tensors["x"]) in {storage(tensor) for tensor in saved}


def test_convolution_saves_input_and_one_threshold():
    problem = trainable_layer("A", "B", n=27, dtype=torch.float32)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    tensors = problem.tensors | {"x": x, "weight": problem.tensors["weight"].reshape(M, 3, 3, 3)}
    saved = saved_by(replace(problem, tensors=tensors, product=Conv2dOp(padding=(1, 1))))
    assert nbytes(saved) == x.nbytes + 4
