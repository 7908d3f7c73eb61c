"""Recompute cache: the backward pass reuses the matrices of a recomputed forward pass."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from snella.autograd import CheckpointCache
from snella.backends import TorchBackend
from snella.backends.numba.backend import NumbaBackend
from snella.functional import adapted_layer

from .problems import make_problem


@pytest.fixture
def computed_weights(monkeypatch):
    """Return a list with one entry per computed effective weight."""
    calls = []

    def count(owner, name):
        original = getattr(owner, name)

        def call(*args):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (TorchBackend, "add_update"),
        (NumbaBackend, "add_update"),
        (NumbaBackend, "add_and_grad_factors"),
    ):
        count(owner, name)
    return calls


def layer(problem, impl):
    """Create a layer function whose calls share thresholds and recompute cache, as in the tuner."""
    cache, thresholds_cache = CheckpointCache(), []

    def run(x):
        update = problem.update(problem.tensors, impl)._replace(
            thresholds=thresholds_cache[0] if thresholds_cache else None
        )
        problem.tensors["x"] = x
        y, thresholds = adapted_layer(
            x, problem.tensors["weight"], None, [update], problem.product, checkpoint_cache=cache
        )
        thresholds_cache[:] = thresholds
        return y

    return run, cache


def trainable_layer(impl):
    problem = make_problem("mix_k", m=9, n=8)
    for name in ("A", "B", "piece_coeff", "alpha", "beta"):
        problem.tensors[name].requires_grad_()
    run, cache = layer(problem, impl)
    leaves = [problem.tensors[name] for name in ("A", "B", "piece_coeff", "alpha", "beta")]
    return run, cache, leaves


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("impl", ["eager", "numba"])
def test_checkpointing_computes_weight_once_per_pass(impl, use_reentrant, computed_weights):
    run, cache, leaves = trainable_layer(impl)
    x = torch.randn(6, 8, requires_grad=True)
    plain = torch.autograd.grad(run(x).square().sum(), [x, *leaves])
    assert len(computed_weights) == 2
    computed_weights.clear()
    y = checkpoint(run, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert len(computed_weights) == 2
    assert cache._entry is None
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip([x, *leaves], plain, strict=True))


def test_layer_used_twice_in_one_checkpoint_has_correct_gradients():
    run, cache, leaves = trainable_layer("eager")
    x = torch.randn(6, 8, requires_grad=True)

    def call_twice(x):
        return run(torch.tanh(run(x)[:, :8]))

    plain = torch.autograd.grad(call_twice(x).square().sum(), [x, *leaves])
    checkpoint(call_twice, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip([x, *leaves], plain, strict=True))
    run(x)
    assert cache._entry is None


def test_cache_is_invalid_after_weight_change(monkeypatch):
    weight, cache = torch.zeros(9, 8), CheckpointCache()
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    problem = make_problem("mix_k", m=9, n=8)
    merged = [TorchBackend().prepare(problem.update(problem.tensors))]
    effective = torch.ones(9, 8)
    cache.stash(effective, merged, weight)
    assert cache.take(weight, torch.float32, 1) == (effective, merged)
    assert cache._entry is None
    for dtype, count in ((torch.bfloat16, 1), (torch.float32, 2)):
        cache.stash(effective, merged, weight)
        assert cache.take(weight, dtype, count) == (None, None)
    cache.stash(effective, merged, weight)
    weight.add_(1)
    assert cache.take(weight, torch.float32, 1) == (None, None)
    assert cache._entry is None


def test_cache_is_empty_outside_backward():
    run, cache, _ = trainable_layer("eager")
    run(torch.randn(6, 8))
    assert cache._entry is None
