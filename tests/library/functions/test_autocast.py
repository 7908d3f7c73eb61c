"""Mixed precision: products in bfloat16, merges in float32."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snella.autograd import add_by_autograd, compute_effective_weight, sparsify_update
from snella.backends import TorchBackend
from snella.kernels import KERNELS

from .problems import assert_close_to_reference, draws, make_problem

IMPL = pytest.mark.parametrize("impl", ["reference", "eager", "auto"])


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@IMPL
@pytest.mark.parametrize("kernel", KERNELS)
def test_update_is_merged_in_float32_and_multiplied_in_bfloat16(kernel, impl):
    problem = make_problem(kernel, m=32, n=24, r=8)
    x, weight, bias = (problem.tensors[name] for name in ("x", "weight", "bias"))
    effective = add_by_autograd(weight, [problem.update(problem.tensors)])[0]
    with autocast():
        y = problem.forward(problem.tensors, impl)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), effective.bfloat16(), bias.bfloat16()))


@pytest.mark.parametrize("cache_delta", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_inside_autocast_equals_backward_outside(kernel, cache_delta):
    problem = make_problem(kernel, m=32, n=24, r=8)
    leaves = {k: v if v is None else v.requires_grad_() for k, v in problem.tensors.items()}
    expected = [leaf for leaf in leaves.values() if leaf is not None]
    grad_y = problem.grad_y.bfloat16()
    with autocast():
        y = problem.forward(leaves, "eager", cache_delta)
        inside = torch.autograd.grad(y, expected, grad_y, retain_graph=True)
    outside = torch.autograd.grad(y, expected, grad_y)
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_does_not_change_merge_and_selection(kernel):
    problem = make_problem(kernel, m=32, n=24, r=8)
    weight = problem.tensors["weight"]

    def compute() -> list[Tensor]:
        update = problem.update(problem.tensors)
        merged = TorchBackend().prepare(update)
        eager, _ = compute_effective_weight(weight, [update], weight.shape)
        sparse, thresholds = sparsify_update(update)
        assert torch.equal(thresholds, merged.thresholds)
        return [*merged.delta, thresholds, *sparse, eager, add_by_autograd(weight, [update])[0]]

    outside = compute()
    with autocast():
        inside = compute()
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))
    assert all(value.dtype == torch.float32 for value in inside)


@IMPL
def test_update_without_base_weight_runs_in_bfloat16(impl):
    problem = make_problem(m=32, n=24, r=8)
    x = problem.tensors["x"]
    update_only = problem.tensors | {"weight": None, "bias": None}
    expected = F.linear(x.bfloat16(), add_by_autograd(None, [problem.update(update_only)])[0].bfloat16())
    with autocast():
        assert torch.equal(problem.forward(update_only, impl), expected)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_close_to_reference(base_dtype):
    problems = draws(m=13, n=11, base_dtype=base_dtype)
    problems = [replace(problem, grad_y=problem.grad_y.bfloat16()) for problem in problems]
    assert_close_to_reference(problems, within=autocast)
