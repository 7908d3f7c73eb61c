"""Custom operator for `torch.compile`: equal to the eager op, without graph breaks."""

from dataclasses import replace

import pytest
import torch

from snella.compat.compile import adapted_layer_in_graph
from snella.kernels import Factors
from snella.ops import Conv2dOp
from snella.update import UpdateSpec

from .problems import Problem, make_problem, solve

CONV = Conv2dOp(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=1)


def convolution() -> Problem:
    problem = make_problem("mix_k", m=6, n=2 * 3 * 2, r=4)
    x, weight = torch.randn(3, 2, 7, 8), problem.tensors["weight"].view(6, 2, 3, 2)
    tensors = problem.tensors | {"x": x, "weight": weight}
    problem = replace(problem, tensors=tensors, product=CONV)
    return replace(problem, grad_y=torch.randn_like(problem.forward(tensors, "eager")))


PROBLEMS = {
    "linear": lambda: make_problem("mix_k", m=9, n=8),
    "three matrices, one frozen": lambda: make_problem("mix_k", n=8, rows=(4, 3, 5), budgets=(10, 0, 40)),
    "no softmax, no bias": lambda: (
        (p := make_problem("p_linear", m=9, n=8)) and replace(p, tensors=p.tensors | {"bias": None})
    ),
    "float64": lambda: make_problem("rbf", m=9, n=8, dtype=torch.float64),
    "convolution": convolution,
    "official": lambda: make_problem("mix_k", m=9, n=8, mode="official"),
    "none": lambda: make_problem("mix_k", m=9, n=8, mode="none"),
}


def in_graph(problem: Problem, tensors: dict, budgets: torch.Tensor, spec: UpdateSpec | None = None) -> torch.Tensor:
    spec = spec or problem.update(tensors, "auto").spec
    factors = Factors(*(tensors[name] for name in Factors._fields))
    base, shape = (tensors["x"], tensors["weight"], tensors["bias"]), tensors["weight"].shape
    return adapted_layer_in_graph(*base, spec, factors, budgets, problem.product, shape)


def leaves_of(problem: Problem, needed=None) -> dict:
    return {
        name: tensor if tensor is None else tensor.detach().requires_grad_(needed is None or name in needed)
        for name, tensor in problem.tensors.items()
    }


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("needed", [None, ("A", "B"), ("x", "beta", "piece_coeff")])
def test_operator_equals_eager_op_bit_for_bit(name, needed):
    problem = PROBLEMS[name]()
    expected = solve(problem, "auto", needed=needed)
    leaves = leaves_of(problem, needed)
    y = in_graph(problem, leaves, torch.tensor(problem.budgets))
    assert torch.equal(y, expected.pop("y"))
    grads = torch.autograd.grad(y, [leaves[key] for key in expected], problem.grad_y)
    assert all(torch.equal(grad, expected[key]) for key, grad in zip(expected, grads, strict=True))


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_operator_passes_opcheck(name):
    problem = PROBLEMS[name]()
    update = problem.update(leaves_of(problem))
    records = []
    op = torch.ops.snella.adapted_layer.default

    class RecordOps(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is op:
                records.append(args)
            return function(*args, **(kwargs or {}))

    with RecordOps():
        in_graph(problem, problem.tensors, torch.tensor(problem.budgets))
    x, weight, bias, _, *rest = records[0]
    tensors = [tensor for tensor in update.factors if tensor is not None]
    torch.library.opcheck(op, (x.requires_grad_(), weight, bias, tensors, *rest))


def test_budget_changes_do_not_recompile():
    problem = make_problem("mix_k", m=9, n=8)
    spec = problem.update(problem.tensors, "auto").spec  # the backend selection is outside the graph
    compiled = torch.compile(
        lambda tensors, budgets: in_graph(problem, tensors, budgets, spec), fullgraph=True, backend="eager"
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for budget in (40, 12, 0):
            y = compiled(problem.tensors, torch.tensor([budget]))
            assert torch.equal(y, solve(replace(problem, budgets=(budget,)), "auto", needed=())["y"])


def test_unused_output_has_no_gradient():
    problem = make_problem("mix_k", m=9, n=8)
    leaves = leaves_of(problem)
    y = in_graph(problem, leaves, torch.tensor(problem.budgets))
    grads = torch.autograd.grad(y * 0 + leaves["x"].sum(), [leaves["x"], leaves["A"]], torch.ones_like(y))
    assert torch.equal(grads[1], torch.zeros_like(grads[1]))
