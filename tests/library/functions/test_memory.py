"""What a layer keeps for its backward pass, counted through autograd's own hooks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snella.functional import adapted_linear
from snella.update import Conv2dOp

from .problems import Problem, make_problem

M, N, BATCH = 32, 24, 10


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_by(problem: Problem, impl: str = "eager", cache_delta: bool = False) -> list[Tensor]:
    """The tensors that one forward pass keeps and the model does not own; every parameter kept must be the model's."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    owned = {storage(t) for name, t in problem.tensors.items() if t is not None and name != "x"}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = problem.forward(problem.tensors, impl, cache_delta)
    assert y.requires_grad or not kept
    unique = {(storage(t), t.dtype, t.shape): t for t in kept if storage(t) not in owned}
    return list(unique.values())


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def learning(*names: str, **options: object) -> Problem:
    """A layer whose tensors `names` need gradients."""
    problem = make_problem(**{"m": M, "n": N, "batch": (BATCH,), **options})
    for name in names:
        problem.tensors[name].requires_grad_()
    return problem


def test_a_layer_keeps_its_input_and_one_threshold():
    problem = learning("x", "A", "B", "piece_coeff", "alpha", "beta", "temperature")
    saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 4 + 4
    assert {storage(problem.tensors["x"])} == {storage(t) for t in saved if t.ndim > 1}, "the input itself, no copy"


def test_adapted_linear_keeps_its_factors_and_scalars_as_they_are():
    problem = learning()
    A, B = problem.tensors["A"][0].clone().requires_grad_(), problem.tensors["B"].requires_grad_()
    scalars = {name: problem.tensors[name][0].clone().requires_grad_() for name in ("piece_coeff", "alpha", "beta")}
    x, weight = problem.tensors["x"], problem.tensors["weight"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linear(x, weight, None, A, B, budget=100, impl="eager", **scalars)
    parameters = [x, weight, A, B, *scalars.values()]
    assert {storage(tensor) for tensor in parameters} <= {storage(tensor) for tensor in kept}
    others = [tensor for tensor in kept if storage(tensor) not in {storage(p) for p in parameters}]
    assert [tensor.shape for tensor in others] == [(1,)]


def test_three_matrices_keep_three_thresholds():
    problem = learning("x", "A", "B", rows=(10, 10, 12), budgets=(40, 0, 80))
    saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 4 + 3 * 4
    assert sum(tensor.numel() for tensor in saved if tensor.ndim == 1) == 3


def test_cache_delta_keeps_the_merged_matrix_and_no_more():
    problem = learning("x", "A", "B")
    saved = saved_by(problem, cache_delta=True)
    assert nbytes(saved) == BATCH * N * 4 + 4 + M * N * 4


def test_cache_delta_keeps_nothing_of_a_matrix_without_budget():
    problem = learning("x", "A", "B", rows=(20, 12), budgets=(40, 0))
    assert nbytes(saved_by(problem, cache_delta=True)) == BATCH * N * 4 + 2 * 4 + 20 * N * 4


def test_numba_keeps_three_numbers_a_column_and_with_cache_delta_the_effective_weight():
    problem = learning("x", "A", "B", rows=(20, 12), budgets=(40, 0))
    rebuilt = BATCH * N * 4 + 2 * 4 + 2 * 3 * N * 4
    assert nbytes(saved_by(problem, "numba")) == rebuilt
    assert nbytes(saved_by(problem, "numba", cache_delta=True)) == rebuilt + M * N * 4
    # nobody asks for the input's gradient, for which alone the weight would be read
    assert nbytes(saved_by(learning("A", "B"), "numba", cache_delta=True)) == BATCH * N * 4 + 4 + 3 * N * 4


def test_the_reference_keeps_several_matrices():
    assert nbytes(saved_by(learning("x", "A", "B"), "reference")) > 4 * M * N * 4


def test_frozen_factors_leave_the_input_alone():
    saved = saved_by(learning("x"))
    assert [tensor.shape for tensor in saved] == [(1,)]


def test_factors_without_any_budget_leave_the_input_alone():
    saved = saved_by(learning("x", "A", "B", budget=0))
    assert [tensor.shape for tensor in saved] == [(1,)]


def test_the_first_layer_learns_although_its_input_needs_no_gradient():
    problem = learning("A", "B")
    assert nbytes(saved_by(problem)) == BATCH * N * 4 + 4
    y = problem.forward(problem.tensors, "eager")
    grads = torch.autograd.grad(y, [problem.tensors["A"], problem.tensors["B"]], problem.grad_y)
    assert all(grad.any() for grad in grads)


def test_a_frozen_layer_keeps_nothing():
    assert saved_by(learning()) == []


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_input_is_kept_in_bfloat16(base_dtype):
    problem = learning("x", "A", "B", base_dtype=base_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 2 + 4


def test_a_bfloat16_layer_keeps_a_bfloat16_input():
    problem = learning("x", "A", "B", base_dtype=torch.bfloat16)
    saved = saved_by(problem)
    assert nbytes(saved) == BATCH * N * 2 + 4
    assert storage(problem.tensors["x"]) in {storage(tensor) for tensor in saved}


def test_a_convolution_keeps_its_input_and_one_threshold():
    problem = learning("A", "B", n=27, dtype=torch.float32)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    tensors = problem.tensors | {"x": x, "weight": problem.tensors["weight"].reshape(M, 3, 3, 3)}
    saved = saved_by(replace(problem, tensors=tensors, product=Conv2dOp(padding=(1, 1))))
    assert nbytes(saved) == x.nbytes + 4
