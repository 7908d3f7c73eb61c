"""`eager` against the reference over kernels, dtypes, shapes and budgets."""

import re
from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snella.autograd import add_by_autograd
from snella.functional import adapted_linear
from snella.kernels import KERNELS, KernelScalars, MixK
from snella.ops import LinearOp

from .formulas import merge_by_hand, sparsify_by_hand
from .problems import (
    Problem,
    assert_close_to_reference,
    draws,
    layer_output,
    make_problem,
    rms_errors,
    simulated_errors,
    solve,
)

DTYPES = [
    pytest.param({"dtype": torch.float32}, id="float32"),
    pytest.param({"dtype": torch.float32, "base_dtype": torch.bfloat16}, id="bfloat16-base"),
]
CACHE_DELTA = pytest.mark.parametrize("cache_delta", [False, True], ids=["rebuilt", "saved"])
HANDWRITTEN = pytest.mark.parametrize("impl", ["eager", "numba"])
MODES = pytest.mark.parametrize("mode", ["soft", "official", "none"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("budget", [0, 1, 14, 35])
def test_layer_equals_hand_computed_formula(kernel, budget):
    problem = make_problem(kernel, budget=budget, dtype=torch.float64)
    tensors = problem.tensors
    scalars = KernelScalars(*(None if tensors[name] is None else tensors[name][0] for name in KernelScalars._fields))
    sparse = sparsify_by_hand(merge_by_hand(problem.kernel, tensors["A"][0], tensors["B"], scalars), budget)
    expected = tensors["x"] @ (tensors["weight"] + problem.scaling * sparse).T + tensors["bias"]
    for impl in ("reference", "eager"):
        torch.testing.assert_close(problem.forward(tensors, impl), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 5), (13, 31), (64, 48)])
@pytest.mark.parametrize("dtypes", DTYPES)
@MODES
def test_eager_is_close_to_reference_for_every_kernel_and_shape(kernel, m, n, dtypes, mode):
    problems = draws(kernel, m=m, n=n, mode=mode, **dtypes)
    assert_close_to_reference(problems)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_eager_is_close_to_reference_at_768_by_3072(dtypes):
    assert_close_to_reference(draws(count=1, m=768, n=3072, r=8, batch=(16,), **dtypes))


@pytest.mark.parametrize("budget", [0, 1, 34, 35])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("mode", ["soft", "official"])
def test_eager_is_close_to_reference_for_every_kind_of_budget(budget, dtypes, mode):
    assert_close_to_reference(draws(budget=budget, mode=mode, **dtypes))


@pytest.mark.parametrize(
    "options", [{"num_pieces": 1}, {"num_pieces": 4}, {"softmax_dim": 1}, {"center_softmax": True}]
)
def test_eager_is_close_to_reference_for_all_kernel_options(options):
    assert_close_to_reference(draws(m=13, n=11, **options))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 4), (0,), (2, 0)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_eager_is_close_to_reference_for_every_batch_shape(batch, dtypes):
    problems = draws(batch=batch, **dtypes)
    assert_close_to_reference(problems)
    assert solve(problems[0], "eager")["y"].shape == (*batch, 7)


@pytest.mark.parametrize("name", ["A", "piece_coeff", "temperature"])
def test_tolerance_rejects_gradient_error_of_200_roundings(name, monkeypatch):
    original = MixK.vjp

    def inaccurate_vjp(*args):
        actual = original(*args)
        return actual._replace(**{name: getattr(actual, name) * (1 + 100 * torch.finfo(torch.float32).eps)})

    monkeypatch.setattr(MixK, "vjp", inaccurate_vjp)
    with pytest.raises(AssertionError, match=rf"\[\('eager, rebuilt', '{name}', "):
        assert_close_to_reference(draws(rows=(9, 7, 5), n=11, budgets=(0, 30, 55)), impls=["eager"])


def test_tolerance_is_positive_for_an_exact_reference():
    problems = draws("normalized_rbf", m=1, n=1, budget=1)  # the softmax of one entry is 1 and has no gradient
    exact = [solve(problem.cast(Tensor.double), "reference") for problem in problems]
    plain = rms_errors([solve(problem, "reference") for problem in problems], exact)
    simulated = simulated_errors(problems, exact)
    assert plain["A"] == 0
    assert torch.finfo(torch.float32).eps / 2 < simulated["A"] < 100 * torch.finfo(torch.float32).eps


def test_empty_batch_has_zero_gradients():
    problem = make_problem(batch=(0,))
    actual = solve(problem, "eager")
    for name, tensor in problem.tensors.items():
        assert torch.equal(actual[name], torch.zeros_like(tensor)), name


def scatter(tensor: Tensor) -> Tensor:
    """Return a strided, transposed view with the same values."""
    storage = torch.full([2 * size for size in reversed(tensor.shape)], torch.nan, dtype=tensor.dtype)
    view = storage[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
    return view.copy_(tensor)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_eager_is_close_to_reference_for_strided_tensors(dtypes):
    problems = [problem.cast(scatter) for problem in draws(batch=(2, 3), **dtypes)]
    assert not any(problems[0].tensors[name].is_contiguous() for name in ("x", "weight", "A", "B", "bias"))
    assert_close_to_reference(problems)


def test_eager_supports_expanded_gradient():
    problem = make_problem()
    expanded = replace(problem, grad_y=torch.ones(()).expand_as(problem.grad_y))
    full = replace(problem, grad_y=torch.ones_like(problem.grad_y))
    for name, value in solve(full, "eager").items():
        torch.testing.assert_close(solve(expanded, "eager")[name], value)


@HANDWRITTEN
@CACHE_DELTA
def test_subsets_of_gradients_equal_the_full_set(cache_delta, impl):
    problem = make_problem()
    full = solve(problem, impl, cache_delta=cache_delta)
    names = ["x", "weight", "bias", "A", "B", "piece_coeff", "alpha", "temperature"]
    for needed in chain.from_iterable(combinations(names, size) for size in range(len(names) + 1)):
        actual = solve(problem, impl, cache_delta=cache_delta, needed=needed)
        assert set(actual) == {"y", *needed}
        assert all(torch.equal(actual[name], full[name]) for name in actual), needed


def test_output_without_trainable_inputs_has_no_graph():
    problem = make_problem()
    assert not problem.forward(problem.tensors, "eager").requires_grad


@HANDWRITTEN
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_are_deterministic_with_and_without_cache_delta(dtypes, impl):
    problem = make_problem(m=64, n=48, batch=(33,), **dtypes)
    first = solve(problem, impl)
    for cache_delta in (False, True):
        repeated = solve(problem, impl, cache_delta=cache_delta)
        assert all(torch.equal(repeated[name], first[name]) for name in first)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "official"}, {"rows": (40, 31, 40), "budgets": (900, 0, 1700)}], ids=str
)
@pytest.mark.parametrize(("kernel", "r", "num_pieces"), [("mix_k", 8, 2), ("mix_k", 6, 3), ("p_linear", 8, 2)])
def test_cache_delta_does_not_change_numba_results_with_and_without_temperature(kernel, r, num_pieces, options):
    problem = make_problem(kernel, **{"m": 111, "n": 202, "r": r, "num_pieces": num_pieces, "batch": (9,), **options})
    for tensors in (problem.tensors, problem.tensors | {"temperature": None}):
        variant = replace(problem, tensors=tensors)
        rebuilt, saved = solve(variant, "numba"), solve(variant, "numba", cache_delta=True)
        exact = solve(variant.cast(lambda tensor: tensor.double()), "reference")
        for name, value in rebuilt.items():
            assert torch.equal(saved[name], value), name
            scale = exact[name].abs().max().item()
            assert (value - exact[name]).abs().max().item() <= 2e-4 * scale, name


def test_layer_without_bias_is_close_to_reference():
    problems = [replace(problem, tensors=problem.tensors | {"bias": None}) for problem in draws()]
    assert_close_to_reference(problems)


def without_weight(problem: Problem) -> Problem:
    return replace(problem, tensors=problem.tensors | {"weight": None, "bias": None})


@pytest.mark.parametrize("dtypes", DTYPES)
def test_update_without_base_weight_is_close_to_reference(dtypes):
    assert_close_to_reference([without_weight(problem) for problem in draws(**dtypes)])


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_update_without_base_weight_is_the_difference_from_the_base_layer(impl):
    problem = make_problem(dtype=torch.float64)
    tensors = problem.tensors
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    update_only = without_weight(problem)
    torch.testing.assert_close(update_only.forward(update_only.tensors, impl) + base, problem.forward(tensors, impl))


def test_float32_factors_with_float64_base_are_close_to_reference():
    problems = draws(dtype=torch.float32, base_dtype=torch.float64)
    assert_close_to_reference(problems)
    assert solve(problems[0], "eager")["y"].dtype == torch.float64


def test_bfloat16_factors_are_close_to_reference():
    assert_close_to_reference(draws(dtype=torch.bfloat16))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_small_update_of_bfloat16_weight_is_rounded_once(impl):
    problem = make_problem(dtype=torch.float32, base_dtype=torch.bfloat16)
    identity = torch.eye(5, dtype=torch.bfloat16)
    tensors = problem.tensors | {"x": identity, "bias": None}
    exact = add_by_autograd(tensors["weight"].float(), [problem.update(tensors)])[0]
    assert torch.equal(problem.forward(tensors, impl).T, exact.bfloat16())


def call(problem: Problem, **options: object) -> Tensor:
    """Call the layer through `adapted_linear`."""
    tensors = problem.tensors
    scalars = {name: None if tensors[name] is None else tensors[name][0] for name in KernelScalars._fields}
    return adapted_linear(
        tensors["x"],
        tensors["weight"],
        tensors["bias"],
        tensors["A"][0],
        tensors["B"],
        **{
            "budget": problem.budgets[0],
            "kernel": problem.kernel.name,
            "scaling": problem.scaling,
            **scalars,
            **options,
        },
    )


@pytest.mark.parametrize("kernel", KERNELS)
@MODES
@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
def test_adapted_linear_is_adapted_layer_with_one_update(kernel, mode, impl):
    problem = make_problem(kernel, mode=mode)
    assert torch.equal(call(problem, mode=mode, impl=impl), problem.forward(problem.tensors, impl))


def test_layer_without_updates_equals_base_layer():
    problem = make_problem()
    x, weight, bias = (problem.tensors[name] for name in ("x", "weight", "bias"))
    assert torch.equal(layer_output(x, weight, bias, [], LinearOp()), F.linear(x, weight, bias))


@pytest.mark.parametrize("cache_delta", [False, True])
def test_double_backward_raises(cache_delta):
    problem = make_problem()
    A = problem.tensors["A"].requires_grad_()
    y = problem.forward(problem.tensors, "eager", cache_delta)
    with pytest.raises(
        RuntimeError, match=r"create_graph=True is not supported: .* is not differentiable; .* impl='reference'"
    ):
        torch.autograd.grad(y.square().sum(), A, create_graph=True)


def test_changing_a_factor_between_forward_and_backward_raises():
    problem = make_problem()
    A = problem.tensors["A"].requires_grad_()
    y = problem.forward(problem.tensors, "eager")
    with torch.no_grad():
        A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_unknown_implementation_error_lists_choices():
    with pytest.raises(ValueError, match=r"impl must be one of \['auto', 'triton', 'numba', .*\], got 'cuda'"):
        call(make_problem(), impl="cuda")


@pytest.mark.parametrize("budget", [-1, 36])
def test_budget_out_of_range_raises(budget):
    with pytest.raises(ValueError, match=rf"budget must be in \[0, 35\] for a matrix \[7, 5\], got {budget}"):
        call(make_problem(), budget=budget)


def test_mismatched_weight_shape_raises():
    problem = make_problem()
    problem.tensors["weight"] = torch.ones(5, 7)
    with pytest.raises(ValueError, match=r"same size, got \[7, 5\] and \[5, 7\]"):
        call(problem)


@pytest.mark.parametrize("shape", [(35,), (7, 5, 1), (7, 1, 5, 1)])
def test_weight_that_is_not_a_matrix_raises(shape):
    problem = make_problem()
    problem.tensors["weight"] = torch.ones(shape)
    with pytest.raises(ValueError, match=rf"weight must be \[m, n\], got {re.escape(str(list(shape)))}"):
        call(problem)


@pytest.mark.parametrize(("name", "shape"), [("A", [1, 5, 4]), ("A", [5]), ("B", [])])
def test_factors_that_are_not_matrices_raise_with_their_shapes(name, shape):
    tensors = {"A": torch.ones(5, 4), "B": torch.ones(7, 4), name: torch.ones(shape)}
    shapes = re.escape(f"{list(tensors['A'].shape)} and {list(tensors['B'].shape)}")
    with pytest.raises(ValueError, match=rf"A and B must be \[n, r\] and \[m, r\] with equal r, got {shapes}"):
        adapted_linear(torch.ones(3, 5), torch.ones(7, 5), None, **tensors, budget=3, kernel="linear")


@pytest.mark.parametrize("impl", ["reference", "eager", "numba"])
def test_unknown_mode_raises(impl):
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'hard'"):
        call(make_problem(), mode="hard", impl=impl)


def test_adapted_linear_supports_all_kernel_options():
    for options in ({"softmax_dim": 1}, {"center_softmax": True}):
        problem = make_problem(**options)
        assert torch.equal(call(problem, **options), problem.forward(problem.tensors, "auto"))
