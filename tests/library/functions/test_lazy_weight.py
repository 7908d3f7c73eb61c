"""A weight that nobody holds as a matrix: asked for in both passes, kept in none."""

import weakref

import pytest
import torch
from torch import Tensor

from snella.backends import numba_problem
from snella.fixed_support import layer_with_entries
from snella.update import Conv2dOp, LazyWeight, LinearOp

from .problems import Problem, computed_weight, layer_output, make_problem

M, N, BATCH = 32, 24, 10
IMPLS = [
    "eager",
    "reference",
    pytest.param("numba", marks=pytest.mark.skipif(numba_problem() is not None, reason=str(numba_problem()))),
]


class Stored:
    """A weight kept as bytes with one scale, and what was made of it."""

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.codes = (weight / self.scale).round().to(torch.int8)
        self.dtype = weight.dtype
        self.made: list[weakref.ref[Tensor]] = []

    def make(self) -> Tensor:
        weight = self.codes.to(self.dtype) * self.scale
        self.made.append(weakref.ref(weight))
        return weight

    @property
    def source(self) -> LazyWeight:
        return LazyWeight(self.codes.shape, (self.codes, self.scale), self.make)

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)


def apply(problem: Problem, weight: Tensor | LazyWeight, impl: str, num_updates: int = 1) -> Tensor:
    tensors = problem.tensors
    updates = [problem.update(tensors) for _ in range(num_updates)]
    return layer_output(tensors["x"], weight, tensors["bias"], updates, problem.product, impl=impl)


def learning(*names: str, **options: object) -> Problem:
    problem = make_problem(**{"m": M, "n": N, "batch": (BATCH,), **options})
    for name in names:
        problem.tensors[name].requires_grad_()
    return problem


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_updates", [0, 1, 2])
def test_output_and_gradients_are_those_of_the_matrix(impl, num_updates):
    names = ["x", "bias", *(["A", "B", "piece_coeff", "alpha", "beta"] if num_updates else [])]
    problem = learning(*names, rows=(20, 12), budgets=(100, 60))
    stored = Stored(problem.tensors["weight"])
    leaves = [problem.tensors[name] for name in names]
    found = apply(problem, stored.source, impl, num_updates)
    expected = apply(problem, stored.make(), impl, num_updates)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    of_found = torch.autograd.grad(found, leaves, problem.grad_y)
    of_expected = torch.autograd.grad(expected, leaves, problem.grad_y)
    for mine, true in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)


def test_a_convolution_takes_its_weight_from_a_source_too():
    problem = learning("x", "A", "B", m=8, n=3 * 9)
    x, kernel = torch.randn(2, 3, 6, 6, requires_grad=True), problem.tensors["weight"].view(8, 3, 3, 3)
    stored, product, update = Stored(kernel), Conv2dOp(padding=(1, 1)), problem.update(problem.tensors)
    found, expected = (
        layer_output(x, weight, None, [update], product, impl="eager") for weight in (stored.source, stored.make())
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (found, expected)))


@pytest.mark.parametrize("impl", ["eager", *IMPLS[2:]])
@pytest.mark.parametrize("num_updates", [0, 1])
def test_the_matrix_is_let_go_between_the_passes(impl, num_updates):
    problem = learning("x", "A", "B")
    stored = Stored(problem.tensors["weight"])
    y = apply(problem, stored.source, impl, num_updates)
    assert (len(stored.made), stored.alive()) == (1, 0)
    y.backward(problem.grad_y)
    assert (len(stored.made), stored.alive()) == (2, 0)


def test_a_matrix_that_is_passed_as_such_is_kept():
    problem = learning("x", "A", "B")
    stored = Stored(problem.tensors["weight"])
    y = apply(problem, stored.make(), "eager")
    assert stored.alive() == 1, "what the test above would see if the op kept what it asked for"
    y.backward(problem.grad_y)
    assert stored.alive() == 0


def test_nothing_of_the_weights_size_is_saved():
    problem = learning("x", "A", "B")
    stored, kept = Stored(problem.tensors["weight"]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(problem, stored.source, "eager")
    owned = {t.data_ptr() for t in problem.tensors.values() if t is not None}
    assert [t.shape for t in kept if t.data_ptr() not in owned] == [torch.Size([1])], "one threshold"


def test_the_matrix_is_not_made_where_the_input_needs_no_gradient():
    problem = learning("A", "B")
    stored = Stored(problem.tensors["weight"])
    apply(problem, stored.source, "eager").backward(problem.grad_y)
    assert len(stored.made) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_is_not_rounded_to_the_dtype_that_the_weight_is_made_in(impl):
    problem = learning()
    stored = Stored(problem.tensors["weight"].bfloat16())
    weight, update = stored.make(), problem.update(problem.tensors)
    delta = computed_weight(None, [update], weight.shape, impl)
    expected = weight.float() + delta
    assert not torch.equal(expected, expected.bfloat16().float())
    torch.testing.assert_close(computed_weight(stored.source, [update], weight.shape, impl), expected)
    y = layer_output(problem.tensors["x"], stored.source, None, [update], LinearOp(), impl=impl)
    torch.testing.assert_close(y, problem.tensors["x"] @ expected.T)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_effective_weight_has_the_bits_of_the_forward_pass(impl, dtype):
    problem = learning()
    problem.tensors["x"] = torch.eye(N, dtype=dtype)
    stored, update = Stored(problem.tensors["weight"].bfloat16()), problem.update(problem.tensors)
    y = layer_output(problem.tensors["x"], stored.source, None, [update], LinearOp(), impl=impl)
    effective = computed_weight(stored.source, [update], torch.Size((M, N)), impl, dtype)
    torch.testing.assert_close(y.T, effective, rtol=0, atol=0)


def test_autocast_decides_the_dtype_of_the_product():
    problem = learning()
    with torch.autocast("cpu", torch.bfloat16):
        assert apply(problem, Stored(problem.tensors["weight"]).source, "eager").dtype == torch.bfloat16


@pytest.mark.parametrize("fixed", [False, True], ids=["competing", "fixed support"])
def test_a_weight_that_changes_between_the_passes_is_refused(fixed):
    problem = learning("x", "A")
    stored = Stored(problem.tensors["weight"])
    if fixed:
        values = torch.zeros(2, requires_grad=True)
        y = layer_with_entries(problem.tensors["x"], stored.source, None, values, torch.tensor([0, 5]), LinearOp())
    else:
        y = apply(problem, stored.source, "eager")
    stored.codes.zero_()
    with pytest.raises(
        RuntimeError, match=r"weight \[32, 24\] .* versions were \[0, 0\], now \[1, 0\]; change them before"
    ):
        y.sum().backward()


def test_entries_of_their_own_are_added_to_the_matrix_in_both_passes():
    problem = learning("x")
    x, stored, indices = problem.tensors["x"], Stored(problem.tensors["weight"]), torch.tensor([3, 40, 700])
    values = torch.randn(3, requires_grad=True)
    found, expected = (
        layer_with_entries(x, weight, None, values, indices, LinearOp()) for weight in (stored.source, stored.make())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y, (x, values), problem.grad_y) for y in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
