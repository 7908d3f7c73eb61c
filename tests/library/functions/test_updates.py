"""Fused weights, and several updates of one weight."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snella.autograd import adapted_layer, add_by_autograd, sparsify_update
from snella.kernels import KERNELS, Factors, KernelScalars, make_kernel
from snella.ops import LinearOp
from snella.sparsify import keep_threshold
from snella.update import UpdateSpec

from .problems import Problem, assert_close_to_reference, draws, layer_output, make_problem, solve

ROWS, BUDGETS = (5, 3, 4), (11, 0, 20)
IMPL = pytest.mark.parametrize("impl", ["reference", "eager"])


def one_matrix(problem: Problem, group: int) -> Problem:
    """Return matrix `group` of a fused problem as a separate layer."""
    rows = problem.update(problem.tensors).spec.rows[group]
    tensors = {
        name: value
        if value is None or name == "x"
        else value[rows]
        if name in ("weight", "bias", "B")
        else value[group : group + 1]
        for name, value in problem.tensors.items()
    }
    return replace(
        problem,
        tensors=tensors,
        budgets=problem.budgets[group : group + 1],
        row_counts=problem.row_counts[group : group + 1],
        grad_y=problem.grad_y[..., rows],
    )


@pytest.mark.parametrize("mode", ["soft", "official"])
@IMPL
def test_fused_weight_equals_three_layers(impl, mode):
    problem = make_problem(rows=ROWS, n=6, budgets=BUDGETS, dtype=torch.float64, mode=mode)
    combined = solve(problem, impl)
    separate = [solve(one_matrix(problem, group), impl) for group in range(3)]
    for name, value in combined.items():
        parts = [actual[name] for actual in separate]
        expected = sum(parts) if name == "x" else torch.cat(parts, dim=-1 if name == "y" else 0)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_fused_updates_are_close_to_reference(base_dtype):
    problems = draws(rows=ROWS, n=6, budgets=BUDGETS, batch=(2, 4), base_dtype=base_dtype)
    assert_close_to_reference(problems)


@IMPL
def test_matrix_without_budget_has_zero_gradients_and_update(impl):
    problem = make_problem(rows=ROWS, n=6, budgets=BUDGETS)
    actual = solve(problem, impl)
    rows = problem.update(problem.tensors).spec.rows[1]
    base = torch.nn.functional.linear(*(problem.tensors[name] for name in ("x", "weight", "bias")))
    assert torch.equal(actual["y"][..., rows], base[..., rows])
    assert not actual["B"][rows].any()
    for name in ("A", *KernelScalars._fields):
        assert not actual[name][1].any() and actual[name][0].any() and actual[name][2].any(), name


@IMPL
def test_each_matrix_has_a_separate_budget(impl):
    problem = make_problem(rows=ROWS, n=6, budgets=BUDGETS)
    update = problem.update(problem.tensors)
    assert [int(sparse.count_nonzero()) for sparse in sparsify_update(update)[0]] == list(BUDGETS)


def two_updates(seeds=(0, 1), dtype=torch.float64):
    """Return one base layer and two updates with different kernels, ranks, budgets and scalings."""
    first = make_problem("mix_k", seed=seeds[0], dtype=dtype)
    second = make_problem("p_linear", seed=seeds[1], r=6, budget=9, dtype=dtype, mode="official")
    second.scaling = -0.7
    return first, second


def run_two(impl, first, second, cache_delta=False):
    base = [first.tensors[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
    updates, leaves = [], list(base)
    for problem in (first, second):
        tensors = {k: v if v is None else v.detach().requires_grad_() for k, v in problem.tensors.items()}
        update = problem.update(tensors)
        updates.append(update)
        leaves += [tensor for tensor in update.factors if tensor is not None]
    y = layer_output(*base, updates, LinearOp(), impl=impl, cache_delta=cache_delta)
    return [y.detach(), *torch.autograd.grad(y, leaves, first.grad_y)]


@IMPL
def test_two_updates_are_added(impl):
    first, second = two_updates()
    x, weight, bias = (first.tensors[name] for name in ("x", "weight", "bias"))
    added = weight + sum(
        problem.scaling * torch.cat(sparsify_update(problem.update(problem.tensors))[0]) for problem in (first, second)
    )
    torch.testing.assert_close(run_two(impl, first, second)[0], x @ added.T + bias, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cache_delta", [False, True])
def test_gradients_of_two_updates_equal_reference(cache_delta):
    first, second = two_updates()
    expected = run_two("reference", first, second)
    for actual, exact_value in zip(run_two("eager", first, second, cache_delta), expected, strict=True):
        torch.testing.assert_close(actual, exact_value, rtol=1e-12, atol=1e-13)


def test_updates_with_different_dtypes_are_added_in_the_wider_dtype():
    first, second = two_updates(dtype=torch.float32)
    second = second.cast(Tensor.double)
    x = torch.eye(5, dtype=torch.float64)
    updates = [problem.update(problem.tensors) for problem in (first, second)]
    actual = [layer_output(x, None, None, updates, LinearOp(), impl=impl) for impl in ("reference", "eager")]
    assert torch.equal(*actual)


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_thresholds_of_half_precision_factors_are_float32(impl):
    problem = make_problem(rows=ROWS, n=6, budgets=(0, 0, 0)).cast(Tensor.bfloat16)
    arguments = [problem.tensors[name] for name in ("x", "weight", "bias")]
    _, (thresholds,) = adapted_layer(*arguments, [problem.update(problem.tensors, impl)], LinearOp())
    assert thresholds.dtype == torch.float32


def test_thresholds_are_returned_and_reused():
    problem = make_problem(rows=ROWS, n=6, budgets=BUDGETS)
    update = problem.update(problem.tensors, "auto")
    arguments = [problem.tensors[name] for name in ("x", "weight", "bias")]
    y, (thresholds,) = adapted_layer(*arguments, [update], LinearOp())
    first = update.spec.merge_matrix(next(update.spec.matrices(update.factors)))
    assert thresholds[0] == keep_threshold(first, BUDGETS[0])
    repeated, (reused,) = adapted_layer(*arguments, [update._replace(thresholds=thresholds)], LinearOp())
    assert torch.equal(repeated, y) and reused is thresholds
    no_thresholds = update._replace(thresholds=torch.full((3,), torch.inf))
    assert torch.equal(
        adapted_layer(*arguments, [no_thresholds], LinearOp())[0], torch.nn.functional.linear(*arguments)
    )


def test_effective_weight_without_base_has_the_requested_shape():
    problem = make_problem(m=4, n=6)
    update = problem.update(problem.tensors)
    flat = add_by_autograd(None, [update])[0]
    assert flat.shape == (4, 6)
    assert torch.equal(add_by_autograd(None, [update], torch.Size((4, 3, 2, 1)))[0], flat.reshape(4, 3, 2, 1))


def test_missing_weight_and_update_raise():
    with pytest.raises(ValueError, match="adapted_layer requires a weight or at least one update, got neither"):
        layer_output(torch.ones(2, 3), None, None, [], LinearOp())


@pytest.mark.parametrize(
    ("row_counts", "shapes"), [((5, 3), r"\[2, n, r\] and B \[8, r\]"), ((5, 3, 3), r"\[3, n, r\] and B \[11, r\]")]
)
def test_mismatched_row_counts_raise(row_counts, shapes):
    problem = make_problem(rows=ROWS, n=6, budgets=BUDGETS)
    update = replace(problem, row_counts=row_counts).update(problem.tensors)
    with pytest.raises(ValueError, match=rf"A must be {shapes} .*, got \[3, 6, 4\] and \[12, 4\]"):
        update.spec.check(update.factors, update.budgets)


def test_budget_out_of_range_in_fused_weight_raises():
    problem = make_problem(rows=ROWS, n=6, budgets=(11, 19, 20))
    with pytest.raises(ValueError, match=r"budget must be in \[0, 18\] for a matrix \[3, 6\], got 19"):
        update = problem.update(problem.tensors)
        update.spec.check(update.factors, update.budgets)


def test_convolution_weight_is_checked_as_a_matrix():
    problem = make_problem(m=4, n=6)
    update = problem.update(problem.tensors)
    update.spec.check(update.factors, update.budgets, torch.Size((4, 3, 2, 1)))
    with pytest.raises(ValueError, match=r"same size, got \[4, 6\] and \[4, 3, 3, 1\]"):
        update.spec.check(update.factors, update.budgets, torch.Size((4, 3, 3, 1)))


def test_check_reports_missing_scalar():
    problem = make_problem()
    factors = Factors(problem.tensors["A"], problem.tensors["B"], problem.tensors["piece_coeff"])
    with pytest.raises(ValueError, match=r"requires the scalars \['alpha', 'beta'\], got None"):
        UpdateSpec(problem.kernel, (7,)).check(factors, (3,))


@pytest.mark.parametrize("mode", ["soft", "official", "none"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_spec_round_trips_through_integers(kernel, mode):
    function = make_kernel(kernel, num_pieces=3, softmax_dim=1, center_softmax=True)
    spec = UpdateSpec(function, (5, 3, 4), mode, 0.3, "numba")
    assert UpdateSpec.from_ints(spec.to_ints(), 0.3) == spec


def test_unknown_backend_error_lists_choices():
    with pytest.raises(ValueError, match=r"backend must be one of \['eager', 'reference', .*\], got 'cuda'"):
        UpdateSpec(make_kernel("linear"), (7,), backend="cuda")
