"""What a recomputation builds is used by the backward pass that asked for it, once, and never wrongly."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from snella.ops import autograd
from snella.ops.backends import choose_backend
from snella.ops.backends.numba.backend import NumbaBackend
from snella.ops.backends.torch import TorchBackend

from .problems import make_problem


@pytest.fixture
def built(monkeypatch):
    """A list that grows whenever an effective weight is built, alone or together with the gradients."""
    calls = []

    def count(owner, name, builds=lambda args: True):
        original = getattr(owner, name)

        def call(*args):
            if builds(args):
                calls.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    count(TorchBackend, "add_sparse")
    count(NumbaBackend, "_add")
    count(NumbaBackend, "_gradients", lambda args: args[-1] is not None)
    return calls


def layer(problem, impl):
    """The layer as the tuner calls it: a new description each time, thresholds and handover shared."""
    first = problem.update(problem.tensors)

    def run(x):
        update = problem.update(problem.tensors)
        update.thresholds, update.handover = first.thresholds, first.handover
        problem.tensors["x"] = x
        backends = [choose_backend(impl, update)[0]]
        return autograd.adapted_product_eager(
            x, problem.tensors["weight"], None, [update], problem.product, problem.tensors["weight"].shape, backends
        )

    return run, first


def learning(impl):
    problem = make_problem("mix_k", m=9, n=8)
    for name in ("A", "B", "piece_coeff", "alpha", "beta"):
        problem.tensors[name].requires_grad_()
    run, first = layer(problem, impl)
    leaves = [problem.tensors[name] for name in ("A", "B", "piece_coeff", "alpha", "beta")]
    return run, first, leaves


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("impl", ["eager", "numba"])
def test_checkpointing_builds_the_weight_once_forward_and_once_backward(impl, use_reentrant, built):
    run, first, leaves = learning(impl)
    x = torch.randn(6, 8, requires_grad=True)
    plain = torch.autograd.grad(run(x).square().sum(), [x, *leaves])
    assert len(built) == 2
    built.clear()
    y = checkpoint(run, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert len(built) == 2
    assert not first.handover
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip([x, *leaves], plain, strict=True))


def test_a_layer_used_twice_in_one_checkpoint_gets_the_right_gradients():
    run, first, leaves = learning("eager")
    x = torch.randn(6, 8, requires_grad=True)

    def twice(x):
        return run(torch.tanh(run(x)[:, :8]))

    plain = torch.autograd.grad(twice(x).square().sum(), [x, *leaves])
    checkpoint(twice, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip([x, *leaves], plain, strict=True))
    run(x)
    assert not first.handover


def test_a_weight_that_changed_since_is_built_anew():
    problem = make_problem("mix_k", m=9, n=8)
    update, weight = problem.update(problem.tensors), problem.tensors["weight"]
    update.handover.append(autograd.Handover(torch.zeros(9, 8), [[None]], weight, weight._version))
    weight.add_(1)
    assert autograd.handed_over([update], weight, torch.float32) == (None, None)
    assert not update.handover


def test_outside_of_a_backward_pass_nothing_is_left():
    run, first, _ = learning("eager")
    run(torch.randn(6, 8))
    assert not first.handover
