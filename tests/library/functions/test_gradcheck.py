"""Reference and hand-written backward passes against finite differences in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snella.kernels import KERNELS
from snella.ops import Conv2dOp

from .problems import Problem, layer_output, make_problem, solve

STEP = 1e-6  # step size of the finite differences


def merged(problem: Problem) -> list[Tensor]:
    update = problem.update(problem.tensors)
    return [update.spec.merge_matrix(factors) for factors in update.spec.matrices(update.factors)]


def fix_thresholds(problem: Problem) -> Problem:
    """Fix each threshold in the middle of the widest gap between magnitudes, so that no step crosses it."""
    thresholds = []
    for delta in merged(problem):
        magnitudes = delta.abs().flatten().sort().values
        gaps = magnitudes.diff()[len(magnitudes) // 4 :]
        position = int(gaps.argmax()) + len(magnitudes) // 4
        assert gaps.max() > 1000 * STEP
        thresholds.append((magnitudes[position] + magnitudes[position + 1]) / 2)
    return replace(problem, thresholds=tuple(thresholds))


def check_gradients(problem: Problem, impl: str) -> None:
    names = [name for name, tensor in problem.tensors.items() if tensor is not None]

    def layer(*values: Tensor) -> Tensor:
        return problem.forward(problem.tensors | dict(zip(names, values, strict=True)), impl)

    leaves = [problem.tensors[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(layer, leaves, eps=STEP)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_soft_gradients_equal_finite_differences(kernel, impl):
    problem = make_problem(kernel, m=4, n=3, batch=(2,), dtype=torch.float64)
    check_gradients(fix_thresholds(problem), impl)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_full_budget_is_differentiable(kernel, impl):
    problem = make_problem(kernel, m=4, n=3, batch=(2,), budget=12, dtype=torch.float64)
    check_gradients(problem, impl)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_official_gradients_equal_finite_differences_with_constant_factor(kernel, impl):
    problem = fix_thresholds(make_problem(kernel, m=4, n=3, batch=(2,), dtype=torch.float64, mode="official"))
    delta = torch.cat(merged(problem))
    factor = torch.where(delta.abs() > problem.thresholds[0], delta.abs(), 0)
    assert 0 < factor.count_nonzero() < factor.numel()
    names = [name for name, tensor in problem.tensors.items() if tensor is not None]

    def surrogate(*values: Tensor) -> Tensor:
        changed = replace(problem, tensors=problem.tensors | dict(zip(names, values, strict=True)))
        weight = changed.tensors["weight"] + problem.scaling * factor * torch.cat(merged(changed))
        return layer_output(changed.tensors["x"], weight, changed.tensors["bias"], [], problem.product)

    leaves = [problem.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(surrogate, leaves, eps=STEP)
    expected = torch.autograd.grad(surrogate(*leaves), leaves, problem.grad_y)
    actual = solve(problem, impl)
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradients_of_fused_weight_equal_finite_differences(impl):
    problem = make_problem("mix_k", rows=(3, 2, 4), n=3, batch=(2,), dtype=torch.float64)
    check_gradients(fix_thresholds(problem), impl)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_convolution_gradients_equal_finite_differences(impl):
    problem = make_problem("mix_k", m=4, n=4, batch=(2,), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    problem = replace(
        problem,
        tensors=problem.tensors | {"x": x, "weight": weight},
        product=Conv2dOp(stride=(1, 2), padding=(1, 0), groups=2),
    )
    check_gradients(fix_thresholds(problem), impl)
