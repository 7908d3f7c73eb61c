"""What a recomputation builds is used by the backward pass that asked for it, once, and never wrongly."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from snella.autograd import RecomputeCache
from snella.backends.base import TorchBackend
from snella.backends.numba.backend import NumbaBackend
from snella.functional import adapted_layer

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

    for owner in (TorchBackend, NumbaBackend):
        count(owner, "add_update")
        count(owner, "grad_factors", lambda args: len(args) > 4 and args[4] is not None)
    return calls


def layer(problem, impl):
    """The layer as the tuner calls it: thresholds and the recompute cache shared by its calls."""
    cache, known = RecomputeCache(), []

    def run(x):
        update = problem.update(problem.tensors, impl)._replace(thresholds=known[0] if known else None)
        problem.tensors["x"] = x
        y, thresholds = adapted_layer(x, problem.tensors["weight"], None, [update], problem.product, recompute=cache)
        known[:] = thresholds
        return y

    return run, cache


def learning(impl):
    problem = make_problem("mix_k", m=9, n=8)
    for name in ("A", "B", "piece_coeff", "alpha", "beta"):
        problem.tensors[name].requires_grad_()
    run, cache = layer(problem, impl)
    leaves = [problem.tensors[name] for name in ("A", "B", "piece_coeff", "alpha", "beta")]
    return run, cache, leaves


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("impl", ["eager", "numba"])
def test_checkpointing_builds_the_weight_once_forward_and_once_backward(impl, use_reentrant, built):
    run, cache, leaves = learning(impl)
    x = torch.randn(6, 8, requires_grad=True)
    plain = torch.autograd.grad(run(x).square().sum(), [x, *leaves])
    assert len(built) == 2
    built.clear()
    y = checkpoint(run, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert len(built) == 2
    assert cache.is_empty
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip([x, *leaves], plain, strict=True))


def test_a_layer_used_twice_in_one_checkpoint_gets_the_right_gradients():
    run, cache, leaves = learning("eager")
    x = torch.randn(6, 8, requires_grad=True)

    def twice(x):
        return run(torch.tanh(run(x)[:, :8]))

    plain = torch.autograd.grad(twice(x).square().sum(), [x, *leaves])
    checkpoint(twice, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip([x, *leaves], plain, strict=True))
    run(x)
    assert cache.is_empty


def test_what_was_built_of_a_weight_that_changed_since_is_not_taken(monkeypatch):
    weight, cache = torch.zeros(9, 8), RecomputeCache()
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    problem = make_problem("mix_k", m=9, n=8)
    merged = [TorchBackend().merge(*problem.update(problem.tensors))]
    effective = torch.ones(9, 8)
    cache.stash(effective, merged, weight)
    assert cache.take(weight, torch.float32, 1) == (effective, merged)
    assert cache.is_empty
    for dtype, count in ((torch.bfloat16, 1), (torch.float32, 2)):
        cache.stash(effective, merged, weight)
        assert cache.take(weight, dtype, count) == (None, None)
    cache.stash(effective, merged, weight)
    weight.add_(1)
    assert cache.take(weight, torch.float32, 1) == (None, None)
    assert cache.is_empty


def test_outside_of_a_backward_pass_nothing_is_left():
    run, cache, _ = learning("eager")
    run(torch.randn(6, 8))
    assert cache.is_empty
