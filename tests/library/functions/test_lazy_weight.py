"""Lazy weights: materialized in both passes and freed in between."""

import weakref

import pytest
import torch
from torch import Tensor

from snella.backends import missing_reason
from snella.ops import Conv2dOp, LazyWeight, LinearOp

from .problems import Problem, computed_weight, layer_output, make_problem

M, N, BATCH = 32, 24, 10
IMPLS = [
    "eager",
    "reference",
    pytest.param(
        "numba", marks=pytest.mark.skipif(missing_reason("numba") is not None, reason=str(missing_reason("numba")))
    ),
]


class Int8Weight:
    """Int8 weight with one scale, and weak references to its dequantized copies."""

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.codes = (weight / self.scale).round().to(torch.int8)
        self.dtype = weight.dtype
        self.dequantized: list[weakref.ref[Tensor]] = []

    def make(self) -> Tensor:
        weight = self.codes.to(self.dtype) * self.scale
        self.dequantized.append(weakref.ref(weight))
        return weight

    @property
    def source(self) -> LazyWeight:
        return LazyWeight(self.codes.shape, (self.codes, self.scale), self.make)

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.dequantized)


def apply(problem: Problem, weight: Tensor | LazyWeight, impl: str, num_updates: int = 1) -> Tensor:
    tensors = problem.tensors
    updates = [problem.update(tensors) for _ in range(num_updates)]
    return layer_output(tensors["x"], weight, tensors["bias"], updates, problem.product, impl=impl)


def trainable_layer(*names: str, **options: object) -> Problem:
    problem = make_problem(**{"m": M, "n": N, "batch": (BATCH,), **options})
    for name in names:
        problem.tensors[name].requires_grad_()
    return problem


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_updates", [0, 1, 2])
def test_output_and_gradients_equal_dense_weight(impl, num_updates):
    names = ["x", "bias", *(["A", "B", "piece_coeff", "alpha", "beta"] if num_updates else [])]
    problem = trainable_layer(*names, rows=(20, 12), budgets=(100, 60))
    int8_weight = Int8Weight(problem.tensors["weight"])
    leaves = [problem.tensors[name] for name in names]
    actual = apply(problem, int8_weight.source, impl, num_updates)
    expected = apply(problem, int8_weight.make(), impl, num_updates)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    actual_outputs = torch.autograd.grad(actual, leaves, problem.grad_y)
    expected_outputs = torch.autograd.grad(expected, leaves, problem.grad_y)
    for actual, expected in zip(actual_outputs, expected_outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_convolution_supports_lazy_weight():
    problem = trainable_layer("x", "A", "B", m=8, n=3 * 9)
    x, kernel = torch.randn(2, 3, 6, 6, requires_grad=True), problem.tensors["weight"].view(8, 3, 3, 3)
    int8_weight, product, update = Int8Weight(kernel), Conv2dOp(padding=(1, 1)), problem.update(problem.tensors)
    actual, expected = (
        layer_output(x, weight, None, [update], product, impl="eager")
        for weight in (int8_weight.source, int8_weight.make())
    )
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (actual, expected)))


@pytest.mark.parametrize("impl", ["eager", *IMPLS[2:]])
@pytest.mark.parametrize("num_updates", [0, 1])
def test_dense_weight_is_freed_between_passes(impl, num_updates):
    problem = trainable_layer("x", "A", "B")
    int8_weight = Int8Weight(problem.tensors["weight"])
    y = apply(problem, int8_weight.source, impl, num_updates)
    assert (len(int8_weight.dequantized), int8_weight.alive()) == (1, 0)
    y.backward(problem.grad_y)
    assert (len(int8_weight.dequantized), int8_weight.alive()) == (2, 0)


def test_dense_input_weight_is_saved():
    problem = trainable_layer("x", "A", "B")
    int8_weight = Int8Weight(problem.tensors["weight"])
    y = apply(problem, int8_weight.make(), "eager")
    assert int8_weight.alive() == 1, "a saved dense weight is still alive"
    y.backward(problem.grad_y)
    assert int8_weight.alive() == 0


def test_no_tensor_of_weight_size_is_saved():
    problem = trainable_layer("x", "A", "B")
    int8_weight, saved = Int8Weight(problem.tensors["weight"]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply(problem, int8_weight.source, "eager")
    parameter_ptrs = {t.data_ptr() for t in problem.tensors.values() if t is not None}
    assert [t.shape for t in saved if t.data_ptr() not in parameter_ptrs] == [torch.Size([1])], "one threshold"


def test_weight_is_not_materialized_without_input_gradient():
    problem = trainable_layer("A", "B")
    int8_weight = Int8Weight(problem.tensors["weight"])
    apply(problem, int8_weight.source, "eager").backward(problem.grad_y)
    assert len(int8_weight.dequantized) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_sum_is_not_rounded_to_dtype_of_dequantized_weight(impl):
    problem = trainable_layer()
    int8_weight = Int8Weight(problem.tensors["weight"].bfloat16())
    weight, update = int8_weight.make(), problem.update(problem.tensors)
    delta = computed_weight(None, [update], weight.shape, impl)
    expected = weight.float() + delta
    assert not torch.equal(expected, expected.bfloat16().float())
    torch.testing.assert_close(computed_weight(int8_weight.source, [update], weight.shape, impl), expected)
    y = layer_output(problem.tensors["x"], int8_weight.source, None, [update], LinearOp(), impl=impl)
    torch.testing.assert_close(y, problem.tensors["x"] @ expected.T)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_weight_equals_weight_of_forward_pass(impl, dtype):
    problem = trainable_layer()
    problem.tensors["x"] = torch.eye(N, dtype=dtype)
    int8_weight, update = Int8Weight(problem.tensors["weight"].bfloat16()), problem.update(problem.tensors)
    y = layer_output(problem.tensors["x"], int8_weight.source, None, [update], LinearOp(), impl=impl)
    effective = computed_weight(int8_weight.source, [update], torch.Size((M, N)), impl, dtype)
    torch.testing.assert_close(y.T, effective, rtol=0, atol=0)


def test_autocast_determines_dtype_of_product():
    problem = trainable_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert apply(problem, Int8Weight(problem.tensors["weight"]).source, "eager").dtype == torch.bfloat16


def test_weight_change_between_passes_raises():
    problem = trainable_layer("x", "A")
    int8_weight = Int8Weight(problem.tensors["weight"])
    y = apply(problem, int8_weight.source, "eager")
    int8_weight.codes.zero_()
    with pytest.raises(
        RuntimeError, match=r"weight \[32, 24\] .* versions were \[0, 0\], now \[1, 0\]; change them before"
    ):
        y.sum().backward()
