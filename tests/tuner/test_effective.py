"""What a layer remembers between forward passes: computed once, never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel
from torch import nn

from snella.ops.adapted_linear import numba_backend
from snella.ops.adapted_linear import update as update_module
from snella.ops.adapted_linear.backends import TorchBackend
from snella.tuner import adapted_matrices
from snella.tuner.effective import EffectiveWeightCache
from snella.tuner.layer import SnellaLayer


def count(monkeypatch, calls, *functions):
    """Let every call of the functions, given as owner and name, add to `calls`."""
    for owner, name in functions:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain: calls.append(1) or plain(*args))


@pytest.fixture
def merges(monkeypatch):
    """Counts how often two factors are merged."""
    calls = []
    count(monkeypatch, calls, (TorchBackend, "merge"), (numba_backend, "_prepare"))
    return calls


@pytest.fixture
def selections(monkeypatch):
    """Counts how often a threshold is looked for."""
    calls = []
    count(monkeypatch, calls, (update_module, "keep_threshold"), (numba_backend, "_threshold"))
    return calls


def layers(model):
    return [module for module in model.modules() if isinstance(module, SnellaLayer)]


def spent(calls):
    count = len(calls)
    calls.clear()
    return count


# in evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_merges_once_for_all_batches(mlp, merges):
    model = mlp.adapted()
    for _ in range(5):
        mlp.predict(model)
    assert spent(merges) == 2


def test_inference_mode_uses_the_same_weight(mlp, merges):
    model = mlp.adapted()
    expected = mlp.predict(model)
    with torch.inference_mode():
        assert torch.equal(mlp.run(model), expected)
    assert torch.equal(mlp.predict(model), expected)
    assert spent(merges) == 2


def test_a_weight_first_computed_in_inference_mode_serves_gradients_afterwards(mlp):
    model = mlp.adapted()
    with torch.inference_mode():
        expected = mlp.run(model).clone()
    mlp.run(model).sum().backward()
    assert torch.equal(mlp.predict(model), expected)


def test_a_frozen_adapter_is_merged_once_although_gradients_are_enabled(mlp, merges, tmp_path):
    mlp.adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    spent(merges)
    x = mlp.inputs().requires_grad_()
    for _ in range(3):
        mlp.run(model, x).sum().backward()
    assert spent(merges) == 2
    assert x.grad.any()


@torch.no_grad()
def change_in_place(model):
    layers(model)[0].snella_A["default"].add_(0.5)


def step_optimiser(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3).step()


def change_budget(model):
    layers(model)[0].set_budget("default", [7])


def load_state(model):
    model.load_state_dict(
        {name: tensor + 0.5 for name, tensor in model.state_dict().items() if "snella_B" in name}, False
    )


def change_scale(model):
    layers(model)[0].set_scale("default", 3)


@torch.no_grad()
def change_base(model):
    layers(model)[0].get_base_layer().weight.add_(0.5)


def replace_base_data(model):
    layer = layers(model)[0]
    layer.set_base_weight(layer.get_base_weight() + 0.5)


def replace_parameter(model):
    layer = layers(model)[0]
    layer.snella_A["default"] = nn.Parameter(layer.snella_A["default"].detach() + 0.5)


class WritesThroughData(torch.optim.Optimizer):
    """As 8-bit optimisers do: torch does not see that the parameter changed."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.3)


def step_unseen(model):
    WritesThroughData([p for p in model.parameters() if p.requires_grad]).step()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        step_optimiser,
        change_budget,
        load_state,
        change_scale,
        change_base,
        replace_base_data,
        replace_parameter,
        step_unseen,
    ],
)
def test_evaluation_follows_every_change(mlp, change):
    model = mlp.adapted()
    before = mlp.predict(model)
    change(model)
    after = mlp.predict(model)
    assert not torch.equal(after, before)
    fresh = copy.deepcopy(model)
    assert torch.equal(mlp.predict(fresh), after)


def test_evaluation_follows_a_switch_of_adapters(mlp, merges):
    model = mlp.adapted()
    first = mlp.predict(model)
    model.add_adapter("second", mlp.config())
    model.set_adapter("second")
    second = mlp.predict(model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(mlp.predict(model), first)
    model.delete_adapter("second")
    assert torch.equal(mlp.predict(model), first)


def test_a_cached_budget_follows_the_buffer(mlp):
    layer = layers(mlp.adapted())[0]
    assert layer.budgets("default") == (120,)
    layer.snella_budget["default"].fill_(11)
    assert layer.budgets("default") == (11,)


def test_adapters_born_in_inference_mode_are_never_cached(mlp):
    with torch.inference_mode():
        model = mlp.adapted()
        before = mlp.run(model).clone()
        layers(model)[0].snella_A["default"].data.add_(0.5)
        assert not torch.equal(mlp.run(model), before)


# in training --------------------------------------------------------------------------------------------------------


def test_training_keeps_no_effective_weight(kind):
    model = kind.adapted()
    kind.predict(model)
    assert all(layer._cache._effective is not None for layer in layers(model))
    model.train()
    assert all(layer._cache._effective is None for layer in layers(model))
    kind.run(model).sum().backward()
    with torch.no_grad():
        kind.run(model)
    assert all(layer._cache._effective is None for layer in layers(model))


def test_thresholds_are_found_once_for_all_accumulated_batches(mlp, selections):
    model = mlp.adapted(init_sparsity=0.5).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        for _ in range(4):
            mlp.run(model).sum().backward()
        assert spent(selections) == 2
        optimizer.step()


def test_thresholds_follow_an_optimiser_that_writes_past_torch(mlp, selections):
    model = mlp.adapted(init_sparsity=0.5).train()
    optimizer = WritesThroughData([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        mlp.run(model).sum().backward()
        assert [m.nonzeros() for m in adapted_matrices(model)] == [m.budget for m in adapted_matrices(model)]
        assert spent(selections) == 2
        optimizer.step()


def test_thresholds_follow_a_change_of_budget(mlp):
    model = mlp.adapted().train()
    mlp.run(model).sum().backward()
    layers(model)[0].set_budget("default", [13])
    mlp.run(model).sum().backward()
    assert adapted_matrices(model)[0].nonzeros() == 13


def test_accumulated_gradients_equal_those_of_single_batches(mlp):
    model = mlp.adapted(init_sparsity=0.5).train()
    batches = [mlp.inputs(seed) for seed in (1, 2, 3)]
    for x in batches:
        mlp.run(model, x).square().sum().backward()
    accumulated = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(gradient) for gradient in accumulated]
    for x in batches:
        model.zero_grad()
        twin = copy.deepcopy(model)
        mlp.run(twin, x).square().sum().backward()
        total = [t + p.grad for t, p in zip(total, (p for p in twin.parameters() if p.requires_grad), strict=True)]
    assert all(torch.allclose(a, t, rtol=1e-4, atol=1e-5) for a, t in zip(accumulated, total, strict=True))


# copies -------------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_start_empty(mlp):
    model = mlp.adapted()
    mlp.predict(model)
    cache = layers(model)[0]._cache
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(twin, EffectiveWeightCache)
        assert twin._effective is None
        assert not twin._shared


# entries in inference mode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        lambda mlp, model: mlp.run(model),
        lambda mlp, model: adapted_matrices(model)[0].nonzeros(),
        lambda mlp, model: layers(model)[0].get_delta_weight("default"),
    ],
    ids=["forward", "nonzeros", "get_delta_weight"],
)
def test_a_look_in_inference_mode_does_not_disturb_training(mlp, look):
    model = mlp.adapted().train()
    with torch.inference_mode():
        look(mlp, model)
    mlp.run(model).sum().backward()
    assert layers(model)[0].snella_A["default"].grad.any()


def test_setting_the_mode_that_is_set_already_keeps_the_thresholds(mlp, selections):
    model = mlp.adapted().train()
    for number in range(4):
        model.train()  # as transformers' Trainer does before every batch
        mlp.run(model, mlp.inputs(number)).sum().backward()
    assert spent(selections) == 2
