"""Layer caches: computed once, never stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from snella import SnellaConfig
from snella import update as spec
from snella.backends import TorchBackend
from snella.backends.numba import backend as numba_backend
from snella.cache import LayerCache
from snella.layer import SnellaLayer
from snella.matrices import adapted_matrices


def count(monkeypatch, calls, *functions):
    """Patch functions, given as owner and name, to record their calls in `calls`."""
    for owner, name in functions:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain: calls.append(1) or plain(*args))


@pytest.fixture
def merges(monkeypatch):
    """Count merges of factors."""
    calls = []
    count(monkeypatch, calls, (TorchBackend, "prepare"), (numba_backend, "pack_factors"))
    return calls


@pytest.fixture
def selections(monkeypatch):
    """Count threshold selections."""
    calls = []
    count(monkeypatch, calls, (spec, "keep_threshold"), (numba_backend, "select_threshold"))
    return calls


def layers(model):
    return [module for module in model.modules() if isinstance(module, SnellaLayer)]


def new_calls(calls):
    count = len(calls)
    calls.clear()
    return count


# in evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_merges_once(mlp, merges):
    model = mlp.adapted()
    for _ in range(5):
        mlp.predict(model)
    assert new_calls(merges) == 2


def test_inference_mode_shares_the_cached_weight(mlp, merges):
    model = mlp.adapted()
    expected = mlp.predict(model)
    with torch.inference_mode():
        assert torch.equal(mlp.run(model), expected)
    assert torch.equal(mlp.predict(model), expected)
    assert new_calls(merges) == 2


def test_weight_cached_in_inference_mode_supports_gradients(mlp):
    model = mlp.adapted()
    with torch.inference_mode():
        expected = mlp.run(model).clone()
    mlp.run(model).sum().backward()
    assert torch.equal(mlp.predict(model), expected)


def test_frozen_adapter_is_merged_once_with_gradients_enabled(mlp, merges, tmp_path):
    mlp.adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    new_calls(merges)
    x = mlp.inputs().requires_grad_()
    for _ in range(3):
        mlp.run(model, x).sum().backward()
    assert new_calls(merges) == 2
    assert x.grad.any()


@torch.no_grad()
def change_in_place(model):
    layers(model)[0].snella_A["default"].add_(0.5)


def step_optimizer(model):
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


class DataWritingOptimizer(torch.optim.Optimizer):
    """Optimizer that changes parameters without a version change, like 8-bit optimizers."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.3)


def step_without_version_change(model):
    DataWritingOptimizer([p for p in model.parameters() if p.requires_grad]).step()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        step_optimizer,
        change_budget,
        load_state,
        change_scale,
        change_base,
        replace_base_data,
        replace_parameter,
        step_without_version_change,
    ],
)
def test_cache_detects_every_change(mlp, change):
    model = mlp.adapted()
    before = mlp.predict(model)
    change(model)
    after = mlp.predict(model)
    assert not torch.equal(after, before)
    fresh = copy.deepcopy(model)
    assert torch.equal(mlp.predict(fresh), after)


def test_cache_detects_adapter_switch(mlp, merges):
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


def test_inference_tensors_are_not_cached(mlp):
    with torch.inference_mode():
        model = mlp.adapted()
        before = mlp.run(model).clone()
        layers(model)[0].snella_A["default"].data.add_(0.5)
        assert not torch.equal(mlp.run(model), before)


# in training --------------------------------------------------------------------------------------------------------


def test_training_does_not_cache_effective_weight(kind):
    model = kind.adapted()
    kind.predict(model)
    assert all(layer._cache._effective is not None for layer in layers(model))
    model.train()
    assert all(layer._cache._effective is None for layer in layers(model))
    kind.run(model).sum().backward()
    with torch.no_grad():
        kind.run(model)
    assert all(layer._cache._effective is None for layer in layers(model))


def test_thresholds_are_selected_once_for_accumulated_batches(mlp, selections):
    model = mlp.adapted(init_sparsity=0.5, target_sparsity=0.5).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        for _ in range(4):
            mlp.run(model).sum().backward()
        assert new_calls(selections) == 2
        optimizer.step()


def test_thresholds_detect_optimizer_steps_without_version_change(mlp, selections):
    model = mlp.adapted(init_sparsity=0.5, target_sparsity=0.5).train()
    optimizer = DataWritingOptimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        mlp.run(model).sum().backward()
        assert [m.nonzeros() for m in adapted_matrices(model)] == [m.budget for m in adapted_matrices(model)]
        assert new_calls(selections) == 2
        optimizer.step()


def test_thresholds_detect_budget_change(mlp):
    model = mlp.adapted().train()
    mlp.run(model).sum().backward()
    layers(model)[0].set_budget("default", [13])
    mlp.run(model).sum().backward()
    assert adapted_matrices(model)[0].nonzeros() == 13


def test_accumulated_gradients_equal_sum_of_batches(mlp):
    model = mlp.adapted(init_sparsity=0.5).train()
    batches = [mlp.inputs(seed) for seed in (1, 2, 3)]
    for x in batches:
        mlp.run(model, x).square().sum().backward()
    accumulated = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(gradient) for gradient in accumulated]
    for x in batches:
        model.zero_grad()
        copied = copy.deepcopy(model)
        mlp.run(copied, x).square().sum().backward()
        total = [t + p.grad for t, p in zip(total, (p for p in copied.parameters() if p.requires_grad), strict=True)]
    assert all(torch.allclose(a, t, rtol=1e-4, atol=1e-5) for a, t in zip(accumulated, total, strict=True))


# copies -------------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_have_empty_caches(mlp):
    model = mlp.adapted()
    mlp.predict(model)
    cache = layers(model)[0]._cache
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(copied, LayerCache)
        assert copied._effective is None
        assert not copied._adapters


# entries in inference mode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access",
    [
        lambda mlp, model: mlp.run(model),
        lambda mlp, model: adapted_matrices(model)[0].nonzeros(),
        lambda mlp, model: layers(model)[0].get_delta_weight("default"),
    ],
    ids=["forward", "nonzeros", "get_delta_weight"],
)
def test_access_in_inference_mode_does_not_affect_training(mlp, access):
    model = mlp.adapted().train()
    with torch.inference_mode():
        access(mlp, model)
    mlp.run(model).sum().backward()
    assert layers(model)[0].snella_A["default"].grad.any()


def test_repeated_train_call_keeps_thresholds(mlp, selections):
    model = mlp.adapted().train()
    for number in range(4):
        model.train()  # like transformers' Trainer before every batch
        mlp.run(model, mlp.inputs(number)).sum().backward()
    assert new_calls(selections) == 2


# models that read layer.weight --------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Model that calls its layer, or reads its weight like BEiT and Swin V2."""

    def __init__(self, layer, reads):
        super().__init__()
        self.layer, self.reads = layer, reads

    def forward(self, x):
        if not self.reads:
            return self.layer(x)
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        weight = self.layer.weight
        if isinstance(self.layer.get_base_layer(), nn.Conv2d):
            return F.conv2d(x, weight, bias, padding=1)
        return F.linear(x, weight.T if isinstance(self.layer.get_base_layer(), Conv1D) else weight, bias)


READ_LAYERS = {
    "linear": (lambda: nn.Linear(6, 9), (2, 3, 6)),
    "transposed": (lambda: Conv1D(9, 6), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), (2, 4, 5, 5)),
}


def pair(kind="linear", **settings):
    """Create one model that calls an adapted layer, one that reads its weight, and an input."""
    make, shape = READ_LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    models = []
    for reads in (False, True):
        torch.manual_seed(1)
        config = SnellaConfig(**{"r": 4, "target_modules": ["layer"], "init_weights": False, "scaling": 0.1} | settings)
        model = get_peft_model(Reader(copy.deepcopy(layer), reads), config)
        models.append(model)
    return *models, torch.randn(shape)


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("settings", [{}, {"impl": "eager"}, {"impl": "reference"}], ids=str)
@pytest.mark.parametrize("kind", READ_LAYERS)
def test_read_weight_equals_applied_weight(kind, settings):
    called, reading, x = pair(kind, **settings)
    torch.testing.assert_close(reading(x), called(x))
    torch.testing.assert_close(gradients(reading, x), gradients(called, x))
    for model in (called, reading):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(reading(x), called(x))
        unmerged = reading(x)
        with reading.disable_adapter():
            assert not torch.equal(reading(x), unmerged)
        reading.merge_adapter()
        torch.testing.assert_close(reading(x), unmerged)


@pytest.mark.parametrize("kind", READ_LAYERS)
def test_compiled_model_reads_the_same_weight(kind):
    called, reading, x = pair(kind)
    torch._dynamo.reset()
    compiled = torch.compile(reading, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), called(x))
    compiled(x).square().sum().backward()
    expected = gradients(called, x)[1:]
    torch.testing.assert_close([p.grad for p in reading.parameters() if p.requires_grad], expected)


def test_read_weight_trains_like_layer_under_checkpointing_and_autocast():
    called, reading, x = pair()
    expected = gradients(called, x)
    assert all(map(torch.equal, gradients(checkpointed(reading), x)[1:], gradients(reading, x)[1:]))
    torch.testing.assert_close(gradients(reading, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert reading(x).dtype == torch.bfloat16
        torch.testing.assert_close(reading(x), called(x))


def checkpointed(model):
    """Wrap a model in activation checkpointing."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    return Checkpointed()


def test_metadata_access_does_not_merge(mlp, merges):
    model = mlp.adapted().train()
    layer = layers(model)[0]
    new_calls(merges)
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.size(0)) == (torch.float32, (12, 10), 12)
    assert (len(weight), weight.ndim, weight.device.type, weight.is_floating_point()) == (12, 2, "cpu", True)
    assert weight.data_ptr() == layer.base_layer.weight.data_ptr()
    assert not merges
    assert torch.equal(weight.detach(), layer.base_layer.weight + layer.get_delta_weight("default"))


def test_in_place_writes_change_the_base_weight(mlp):
    layer = layers(mlp.adapted())[0]
    nn.init.ones_(layer.weight)
    assert (layer.base_layer.weight == 1).all()
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.weight.data.add_(1)
        assert (layer.base_layer.weight == 3).all()
        torch.add(layer.base_layer.weight, 1, out=layer.weight)
    assert (layer.base_layer.weight == 4).all()
    assert not (layer.weight == 4).all()


def test_writes_into_views_of_a_read_weight_do_not_reach_the_cached_weight(mlp):
    model = mlp.adapted().eval()
    layer = layers(model)[0]
    with torch.no_grad():
        expected = layer.weight.clone()
        layer.weight[0].zero_()
        layer.weight.detach().mul_(2)
        assert torch.equal(layer.weight.clone(), expected)


def test_assigning_a_read_weight_copies_its_updates(mlp):
    layer = layers(mlp.adapted())[0]
    stacked = torch.zeros(2, 12, 10)
    stacked[1] = layer.weight
    assert torch.equal(stacked[1], layer.weight.detach())
    with torch.no_grad():
        layer.weight[0] = 1
    assert (layer.base_layer.weight[0] == 1).all()


def test_read_weight_is_cached_in_evaluation(merges):
    _, reading, x = pair()
    reading.eval()
    new_calls(merges)
    with torch.no_grad():
        for _ in range(3):
            reading(x)
    assert new_calls(merges) == 1


def test_linear_with_read_weight_saves_the_same_tensors_as_a_call():
    called, reading, x = pair()

    def saved_shapes(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            model(x)
        return sizes

    assert saved_shapes(reading) == saved_shapes(called)
    for actual, expected in zip(gradients(reading, x), gradients(called, x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("has_grad", [True, False])
def test_dropout_applies_to_linear_with_read_weight(has_grad):
    called, reading, x = pair(update_dropout=0.5)
    outputs = []
    for model in (called, reading, reading):
        torch.manual_seed(len(outputs) // 2)
        with torch.set_grad_enabled(has_grad):
            outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("is_training", [True, False])
def test_linear_with_read_weight_and_mismatched_dtypes_raises_torch_error(is_training):
    _, reading, x = pair()
    with pytest.raises(RuntimeError, match="dtype"):
        reading.train(is_training)(x.double())


def test_linear_with_read_weight_uses_the_given_bias():
    _, reading, x = pair()
    layer, bias = reading.base_model.model.layer, torch.randn(9, requires_grad=True)
    y = F.linear(bias=bias, input=x, weight=layer.weight)
    torch.testing.assert_close(y, F.linear(x, layer.weight.detach(), bias))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((9,), 6.0))


def test_dropout_on_read_weight_warns_once():
    _, reading, x = pair("transposed", update_dropout=0.5)
    with pytest.warns(UserWarning, match="the model reads the weight of 'layer'.*update_dropout") as records:
        reading(x)
        reading(x)
    assert len(records) == 1


def test_weight_of_adapted_attention_can_be_read():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}),
        SnellaConfig(r=4, target_modules=["attn"], init_weights=False),
    )
    attention = model.base_model.model["attn"]
    update = attention.in_proj.get_delta_weight("default")
    torch.testing.assert_close(attention.in_proj_weight.detach(), attention.base_layer.in_proj_weight + update)
    attention.in_proj_weight.sum().backward()
    assert attention.in_proj.snella_A["default"].grad is not None


@pytest.mark.parametrize("with_gradients", [False, True])
def test_cache_detects_averages_copied_into_factors(mlp, with_gradients):
    model = mlp.adapted().eval()
    averages = EMAModel([p for p in model.parameters() if p.requires_grad], decay=0.5)
    for average in averages.shadow_params:
        average.mul_(2)
    inputs = mlp.inputs()
    with torch.set_grad_enabled(with_gradients):
        before = mlp.run(model, inputs).detach()
        parameters = [p for p in model.parameters() if p.requires_grad]
        averages.store(parameters)
        averages.copy_to(parameters)
        averaged = mlp.run(model, inputs).detach()
        torch.testing.assert_close(averaged, mlp.run(copy.deepcopy(model), inputs).detach())
        assert not torch.allclose(averaged, before)
        averages.restore(parameters)
        torch.testing.assert_close(mlp.run(model, inputs).detach(), before)


def test_entries_are_invalid_after_a_move_to_another_device():
    cache, factors = LayerCache(), [torch.ones(3)]
    cache.check_written("default", factors)
    cache._adapters["default"] = "stale"
    cache._factor_values["default"] = torch.ones(3, device="meta")
    cache.check_written("default", factors)
    assert not cache._adapters


def test_cache_detects_writes_before_a_change_of_the_active_adapters(mlp):
    model = mlp.adapted()
    model.add_adapter("other", mlp.config())
    expected_model = copy.deepcopy(model)
    mlp.predict(model)
    for parameters in (model, expected_model):
        for module in parameters.modules():
            if isinstance(module, SnellaLayer):
                module.snella_A["default"].data.mul_(2)
    for both in (model, expected_model):
        both.base_model.set_adapter(["default", "other"])
    assert torch.equal(mlp.predict(model), mlp.predict(expected_model))


def test_backward_pass_frees_the_recomputed_weight_with_a_cached_update(mlp):
    model = mlp.adapted(cache_delta=True).train()
    checkpoint(lambda x: mlp.run(model, x), mlp.inputs().requires_grad_(), use_reentrant=False).sum().backward()
    states = [state for matrix in adapted_matrices(model) for state in matrix.layer._cache._adapters.values()]
    assert states and all(state.checkpoint_cache._entry is None for state in states)


def test_deleted_model_is_freed_without_the_garbage_collector():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), SnellaConfig(r=2, target_modules=["0"]))
    (layer,) = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    alive = weakref.ref(layer)
    gc.collect()
    gc.disable()
    try:
        del model, layer
        assert alive() is None
    finally:
        gc.enable()
