"""`SnellaLayer`: initialization, scaling, merging, precision, checkpointing, regularization."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from snella import SnellaConfig
from snella.layer import SnellaLayer, log_backend
from snella.matrices import adapted_matrices


def layers(model):
    return [module for module in model.modules() if isinstance(module, SnellaLayer)]


def adapted(base, **settings):
    torch.manual_seed(0)
    model = get_peft_model(base, SnellaConfig(**{"r": 4, "init_weights": False, "target_modules": ["0"]} | settings))
    return model


def test_replicas_mark_the_layer_as_used():
    layer = first_layer(adapted(nn.Sequential(nn.Linear(8, 8))))
    assert not layer.is_applied
    layer._replicate_for_data_parallel()
    assert layer.is_applied


def first_layer(model):
    return layers(model)[0]


def sequential(out_features=12, in_features=10, dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(in_features, out_features, dtype=dtype), nn.Tanh(), nn.Linear(out_features, 3, dtype=dtype)
    )


# initial values -----------------------------------------------------------------------------------------------------


def test_factors_are_initialized_in_the_documented_range_per_matrix():
    model = adapted(nn.Sequential(nn.Linear(64, 96)), r=8, init_weights=True, qkv_groups={"0": [64, 32]})
    layer = first_layer(model)
    A, B = layer.snella_A["default"], layer.snella_B["default"]
    for factor, fan in ((A[0], 64 * 4), (A[1], 64 * 4), (B[:64], 64 * 4), (B[64:], 32 * 4)):
        bound = 1 / math.sqrt(fan)
        assert 0.9 * bound < factor.abs().max() <= bound


def test_scalars_have_documented_initial_values():
    layer = first_layer(adapted(sequential(), num_pieces=4, learn_temperature=True))
    assert layer.snella_piece_coeff["default"].tolist() == [pytest.approx([0.1, -0.1, 0.1, -0.1])]
    assert layer.snella_alpha["default"].tolist() == [1]
    assert layer.snella_beta["default"].tolist() == [0]
    assert layer.snella_temperature["default"].tolist() == [1]


@pytest.mark.parametrize(
    ("kernel", "scalars"),
    [
        ("linear", set()),
        ("p_linear", {"piece_coeff"}),
        ("rbf", {"alpha", "beta"}),
        ("sigmoid", {"alpha", "beta"}),
        ("normalized_rbf", {"piece_coeff", "alpha", "beta"}),
        ("mix_k", {"piece_coeff", "alpha", "beta"}),
    ],
)
def test_layer_has_only_the_scalars_of_its_kernel(kernel, scalars):
    layer = first_layer(adapted(sequential(), kernel=kernel))
    present = {name for name in ("piece_coeff", "alpha", "beta", "temperature") if getattr(layer, f"snella_{name}")}
    assert present == scalars


def test_initial_update_of_wide_layer_is_small():
    torch.manual_seed(0)
    layer = first_layer(adapted(nn.Sequential(nn.Linear(768, 768)), r=8, init_weights=True))
    update = layer.get_delta_weight("default")
    assert 0 < update.square().mean().sqrt() < 1e-5
    assert update.abs().max() < 1e-4


def initial_ratio(layer, **settings):
    """Return `√n · rms(S) / rms(W0)` and `α` of a new adapter."""
    torch.manual_seed(0)
    fresh = first_layer(adapted(nn.Sequential(layer), r=8, init_weights=True, **settings))
    update, weight = fresh.sparse_updates("default")[0], fresh.base_layer.weight
    ratio = update.square().mean().sqrt() / weight.square().mean().sqrt() * update.shape[1] ** 0.5
    return ratio.item(), fresh.snella_alpha["default"].item()


@pytest.mark.parametrize("settings", [{}, {"preset": "official"}, {"softmax_dim": 1}], ids=str)
def test_initial_update_of_narrow_layer_is_bounded(settings):
    torch.manual_seed(0)
    for layer, bound in ((nn.Conv2d(32, 32, 3), 0.002), (nn.Linear(16, 16), 0.15)):
        with torch.no_grad():
            layer.weight.mul_(3 if bound < 0.1 else 0.3)
        ratio, alpha = initial_ratio(layer, **settings)
        assert 0.5 * bound < ratio < 1.3 * bound
        assert 0.1 <= alpha < 1


def test_wide_layers_and_zero_weights_use_the_paper_initialization():
    torch.manual_seed(0)
    wide = nn.Linear(384, 384)
    with torch.no_grad():
        wide.weight.normal_(std=0.02)
    assert initial_ratio(wide)[1] == 1
    zeros = nn.Linear(64, 8)
    nn.init.zeros_(zeros.weight)
    assert initial_ratio(zeros)[1] == 1


def test_initial_budget_follows_init_sparsity():
    assert first_layer(adapted(sequential())).budgets("default") == (120,)
    assert first_layer(adapted(sequential(), init_sparsity=0.25)).budgets("default") == (90,)


class _GatheredOnAccess(dict):
    """Parameters that are empty until they are subscripted, as under DeepSpeed's ZeRO-3."""

    def __getitem__(self, name):
        parameter = super().__getitem__(name)
        parameter.data = parameter.full
        return parameter


def test_a_pass_gathers_the_factors_of_zero_3():
    model, x = adapted(sequential(), num_pieces=2), torch.randn(3, 10)
    expected = model(x)
    for values in [getattr(first_layer(model), name) for name in first_layer(model).adapter_layer_names]:
        for parameter in values._parameters.values():
            parameter.full, parameter.data = parameter.data, torch.empty(0)
        values._parameters = _GatheredOnAccess(values._parameters)
    assert torch.equal(model(x), expected)


# budgets and scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 37, 119, 120])
def test_number_of_nonzeros_equals_budget(budget):
    layer = first_layer(adapted(sequential()))
    layer.set_budget("default", [budget])
    assert torch.count_nonzero(layer.get_delta_weight("default")) == budget


def test_scaling_can_be_set_multiplied_and_reset(mlp):
    model = mlp.adapted(scaling=0.5)
    layer = first_layer(model)
    expected, once = mlp.predict(model), layer.get_delta_weight("default")
    for module in layers(model):
        module.set_scale("default", 3)
    assert layer.scaling["default"] == 1.5
    assert torch.allclose(layer.get_delta_weight("default"), 3 * once)
    assert not torch.allclose(mlp.predict(model), expected)
    layer.scale_layer(2)
    assert layer.scaling["default"] == 3
    layer.unscale_layer(4)
    assert layer.scaling["default"] == 0.75
    for module in layers(model):
        module.unscale_layer()
    assert layer.scaling["default"] == 0.5
    assert torch.equal(mlp.predict(model), expected)
    layer.set_scale("nobody", 7)
    assert layer.scaling == {"default": 0.5}


def test_scale_layer_does_not_change_inactive_adapters(mlp):
    model = mlp.adapted(scaling=0.5)
    model.add_adapter("second", mlp.config(scaling=2.0))
    first_layer(model).scale_layer(3)
    assert first_layer(model).scaling == {"default": 1.5, "second": 2.0}
    first_layer(model).set_scale("second", 0.5)
    first_layer(model).unscale_layer()
    assert first_layer(model).scaling == {"default": 0.5, "second": 1.0}


# values -------------------------------------------------------------------------------------------------------------


def test_linear_layer_applies_weight_plus_scaled_update():
    model = adapted(sequential(), scaling=0.3)
    layer = first_layer(model)
    layer.set_budget("default", [50])
    x = torch.randn(7, 10)
    weight = layer.get_base_layer().weight + 0.3 * adapted_matrices(model)[0].sparse_update()
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.get_base_layer().bias))


def test_convolutions_apply_weight_plus_update(cases):
    model = cases["conv"].adapted()
    for layer in layers(model):
        plain = copy.deepcopy(layer.get_base_layer())
        with torch.no_grad():
            plain.weight.add_(layer.get_delta_weight("default"))
        x = torch.randn(2, 8 if plain.in_channels == 8 else 3, 9, 7)
        assert torch.allclose(layer(x), plain(x), atol=1e-6), layer.module_name
        assert torch.allclose(layer(x[0]), plain(x[0]), atol=1e-6), layer.module_name


def test_convolution_gradients_equal_reference(cases):
    models = [cases["conv"].adapted(impl=impl) for impl in ("eager", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        cases["conv"].run(model.train()).square().sum().backward()
    for (name, actual), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if actual.requires_grad:
            assert torch.allclose(actual.grad, expected.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("settings", [{}, {"preset": "official"}], ids=str)
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(8, 8), (2, 3, 8)), (nn.Conv2d(8, 8, 1), (8, 4, 4))], ids=["linear", "unbatched"]
)
def test_output_supports_in_place_operations(layer, shape, settings):
    x, gradients = torch.randn(shape), {}
    for inplace in (False, True):
        model = adapted(nn.Sequential(copy.deepcopy(layer), nn.ReLU(inplace=inplace)), **settings)
        torch.manual_seed(0)
        model(x).square().sum().backward()
        gradients[inplace] = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, gradients[False], gradients[True]))


def test_active_adapters_are_summed():
    model = adapted(sequential())
    torch.manual_seed(5)
    model.add_adapter("second", SnellaConfig(r=2, init_weights=False, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    layer = first_layer(model)
    base, x = layer.get_base_layer(), torch.randn(4, 10)
    weight = base.weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert torch.allclose(layer(x), nn.functional.linear(x, weight, base.bias), atol=1e-6)


# merging ------------------------------------------------------------------------------------------------------------


def test_merging_twice_warns_without_changes(mlp):
    model = mlp.adapted()
    expected = mlp.predict(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(mlp.predict(model), expected)


def test_unmerging_without_merge_warns(mlp):
    with pytest.warns(UserWarning, match="Already unmerged"):
        mlp.adapted().unmerge_adapter()


def test_merging_two_adapters_together_equals_merging_in_sequence(kind):
    model = kind.adapted()
    model.add_adapter("second", kind.config(r=2))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.base_model.set_adapter(["default", "second"])
    expected = kind.predict(model)
    model.merge_adapter()
    kind.assert_unchanged_by_merging(at_once := kind.predict(model), expected)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="now additionally merging second"):
        model.merge_adapter(["second"])
    assert torch.equal(kind.predict(model), at_once)
    assert layers(model)[0].merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_merging_a_string_raises(mlp):
    with pytest.raises(TypeError, match="list of strings, got 'default'"):
        mlp.adapted().merge_adapter("default")


def test_integers_are_rejected_as_by_linear_layers(kind):
    model = kind.adapted()
    layer = layers(model)[0]
    with pytest.raises(TypeError, match=r"the input of '.*' must be floating-point, got torch.int64; convert it first"):
        layer(torch.ones(2, *([layer.in_features] if layer.weight.ndim == 2 else [3, 8, 8]), dtype=torch.int64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_safe_merge_rejects_nonfinite_adapter_without_changes(kind, value):
    model = kind.adapted()
    invalid = layers(model)[-1]
    invalid.snella_alpha["default"].data.fill_(value)
    before = invalid.get_base_layer().weight.clone()
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(invalid.get_base_layer().weight, before)
    assert not invalid.merged


def test_disabling_unmerges(mlp):
    model = mlp.adapted()
    base = mlp.predict(mlp.base())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(mlp.predict(model), base)
    assert not layers(model)[0].merged


def test_switching_adapters_unmerges_with_warning(mlp):
    model = mlp.adapted()
    model.add_adapter("second", mlp.config())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert not layers(model)[0].merged


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("make_layer", "make_other"),
    [
        (lambda: nn.Linear(12, 8), lambda: nn.Linear(12, 8)),
        (lambda: nn.Linear(12, 8), lambda: nn.Embedding(8, 12)),
        (lambda: nn.Conv2d(3, 5, 2), lambda: nn.ConvTranspose2d(5, 3, 2)),
    ],
    ids=["linear", "embedding", "convolution"],
)
def test_a_weight_that_another_module_uses_is_trained_but_not_merged(make_layer, make_other, merge):
    base = nn.Sequential(make_layer(), make_other())
    base[1].weight = base[0].weight
    layer, before = base[0], base[0].weight.clone()
    model = adapted(base, r=2)
    with pytest.raises(NotImplementedError, match=r"merging '0' would also change \['1'\]"):
        getattr(model, merge)()
    assert torch.equal(base[1].weight, before) and not first_layer(model).merged
    assert model.unload()[0] is layer and layer.weight is base[1].weight


def test_moving_or_casting_a_layer_frees_its_cached_weight(mlp):
    model = mlp.adapted().eval()
    with torch.no_grad():
        mlp.predict(model)
    cache = first_layer(model)._cache
    assert cache._effective is not None and cache._factor_values
    model.double()
    assert cache._effective is None and not cache._factor_values


# precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_float32_factors_and_merge_exactly(kind, dtype):
    model = get_peft_model(kind.base().to(dtype), kind.config()).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inputs = _cast(kind.inputs(), dtype)
    with torch.no_grad():
        expected = kind.run(model, inputs)
        assert expected.dtype == dtype
        model.merge_adapter()
        kind.assert_unchanged_by_merging(kind.run(model, inputs), expected)
        model.unmerge_adapter()
    kind.run(model.train(), inputs).float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(gradient).all() and gradient.dtype == torch.float32 for gradient in gradients)


def _cast(inputs, dtype):
    return inputs if isinstance(inputs, dict) else inputs.to(dtype)


def test_factors_can_be_half_precision(mlp):
    model = get_peft_model(mlp.base().bfloat16(), mlp.config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert first_layer(model).snella_budget["default"].dtype == torch.int64
    mlp.run(model.train()).float().square().mean().backward()
    assert first_layer(model).snella_A["default"].grad.dtype == torch.bfloat16


def test_float32_input_to_half_precision_layer_gives_float32_output():
    layer = first_layer(adapted(sequential(dtype=torch.bfloat16)))
    assert layer(torch.randn(2, 10)).dtype == torch.float32


def test_autocast_is_close_to_float32(kind):
    model = kind.adapted()
    full = kind.predict(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = kind.predict(model)
        output = kind.run(model.train())
    output.float().square().mean().backward()
    assert torch.allclose(half.float(), full, atol=0.1 * full.abs().max().item())
    assert not torch.equal(half.float(), full)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_autocast_output_has_autocast_dtype():
    layer = first_layer(adapted(sequential()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 10)).dtype == torch.bfloat16


# gradient checkpointing ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_gradients(kind, use_reentrant):
    if kind.name == "gpt2":
        pytest.skip("transformers checkpoints its blocks, see the next test")
    gradients = []
    for checkpointed in (False, True):
        model = kind.adapted().train()
        x = kind.inputs().requires_grad_()
        run = Checkpointed(model, use_reentrant) if checkpointed else model
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad] + [x.grad])
        assert all(layer._cache._effective is None for layer in layers(model))
    assert all(torch.equal(actual, expected) for actual, expected in zip(*gradients, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_transformers_checkpointing_does_not_change_gradients(cases, name, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        base = cases[name].base()
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            base.enable_input_require_grads()
        model = get_peft_model(base, cases[name].config()).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        cases[name].run(model).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*gradients, strict=True))


# dropout and drop-path on the update --------------------------------------------------------------------------------


def test_drop_path_drops_the_update_per_sample():
    model = adapted(sequential(), update_drop_path=0.5).train()
    layer = first_layer(model)
    x = torch.randn(1, 10).expand(400, 10)
    base = layer.get_base_layer()(x)
    with torch.no_grad():
        update = nn.functional.linear(x, layer.get_delta_weight("default"))
        torch.manual_seed(0)
        y = layer(x) - base
    dropped = (y.abs().sum(1) < 1e-6).float().mean()
    assert 0.4 < dropped < 0.6
    saved = y[y.abs().sum(1) > 1e-6]
    assert torch.allclose(saved, 2 * update[: len(saved)], atol=1e-5)


def test_update_dropout_applies_only_to_the_update_in_training():
    model = adapted(sequential(), update_dropout=0.5, dropout_exclude=[])
    layer = first_layer(model)
    x = torch.randn(3, 10)
    layer.set_budget("default", [0])
    assert torch.allclose(layer.train()(x), layer.get_base_layer()(x), atol=1e-6)
    layer.set_budget("default", [120])
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_dropout_exclude_disables_update_dropout(vit):
    model = vit.adapted(preset="official")
    with_dropout = {
        layer.module_name.rpartition(".")[2]: layer.snella_config["default"].dropout_of(layer.module_name)
        for layer in layers(model)
    }
    assert with_dropout == {"qkv": 0.1, "proj": 0.0, "fc1": 0.1, "fc2": 0.1}


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "sam", "gpt2", "timm_swin"])
def test_official_preset_excludes_attention_output_from_dropout(cases, name):
    model = cases[name].adapted(preset="official")
    kinds = {m.kind: m.layer.snella_config["default"].dropout_of(m.module_name) for m in adapted_matrices(model)}
    excluded = {kind for kind, rate in kinds.items() if rate == 0}
    assert len(excluded) == 1
    assert "proj" in excluded.pop()


def test_separate_and_folded_products_agree_in_evaluation():
    folded = adapted(sequential())
    branched = adapted(sequential(), update_dropout=1e-9).train()
    branched.load_state_dict(folded.state_dict())
    x = torch.randn(5, 10)
    assert torch.allclose(folded(x), branched(x), atol=1e-6)


# names --------------------------------------------------------------------------------------------------------------


def test_layers_have_names_for_every_adapter(mlp):
    model = mlp.adapted(target_modules=["lin0"])
    model.add_adapter("second", mlp.config(target_modules=["lin0", "lin1"]))
    assert [layer.module_name for layer in layers(model)] == ["lin0", "lin1"]


def test_layer_supports_lora_conversion(mlp):
    assert mlp.adapted().supports_lora_conversion()


def test_active_adapters_must_have_the_same_implementation(mlp):
    model = mlp.adapted(impl="eager")
    model.add_adapter("other", mlp.config(impl="numba"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"impl must be the same in all active adapters, got .*'other': 'numba'"):
        mlp.run(model)


def test_adapters_with_different_implementations_keep_their_budgets(mlp):
    model = mlp.adapted(target_sparsity=0.5, init_sparsity=0.5)
    model.add_adapter("other", mlp.config(kernel="linear", init_sparsity=0.2))
    model.base_model.set_adapter(["default", "other"])
    mlp.run(model.train())
    for name in ("default", "other"):
        for matrix in adapted_matrices(model, name):
            assert matrix.nonzeros() == matrix.budget


# backend selection --------------------------------------------------------------------------------------------------


@pytest.fixture
def numba_layer():
    pytest.importorskip("numba")
    log_backend.cache_clear()
    return get_peft_model(nn.Sequential(nn.Linear(6, 8)), SnellaConfig(r=4, target_modules=["0"])).base_model.model[0]


def test_backend_is_selected_at_injection_and_after_moves_and_logged_once(numba_layer, caplog):
    assert numba_layer.backend_name("default") == "numba"
    with caplog.at_level("INFO", logger="snella.layer"):
        for _ in range(2):
            assert numba_layer.double().backend_name("default") == "eager"
            assert numba_layer.float().backend_name("default") == "numba"
    assert caplog.messages == [
        "updates on 'cpu' use backend 'eager' (numba computes in float32, got factors in torch.float64)"
    ]


def test_forward_does_not_select_backend(numba_layer, monkeypatch):
    monkeypatch.setattr("snella.layer.choose_backend", None)
    x = torch.randn(3, 6)
    numba_layer.train()(x).sum().backward()
    numba_layer.eval()
    with torch.no_grad():
        numba_layer(x)
    numba_layer.set_scale("default", 0.5)
    numba_layer.train()(x).sum().backward()


def export(model, x):
    mode = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False, training=mode, do_constant_folding=False)


class AttentionAndLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("target", ["attn", "fc"])
@pytest.mark.parametrize(
    ("tool", "transform"),
    [
        ("torch.jit.trace", lambda model, x: torch.jit.trace(model, (x,))),
        ("torch.jit.trace", lambda model, x: torch.no_grad()(torch.jit.trace)(model, (x,))),
        (
            "torch.jit.trace",
            export,
        ),
        ("torch.func", lambda model, x: torch.func.grad(lambda x: model(x).sum())(x)),
        ("torch.func", lambda model, x: torch.func.vmap(model)(x[None])),
    ],
    ids=["trace", "trace-without-gradients", "onnx", "grad", "vmap"],
)
# torch's deprecation warnings
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:There is a perf")
def test_unsupported_tracers_raise_and_trace_the_merged_model(tool, transform, target):
    model, x = adapted(AttentionAndLayer(), target_modules=[target]).eval(), torch.randn(2, 3, 8)
    expected = model(x).detach()
    with pytest.raises(NotImplementedError, match=rf"{tool}.*{target}.*merge_and_unload"):
        transform(model, x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    transform(merged.train(), x)  # few tools can trace torch's fused attention in evaluation


def test_initial_budgets_do_not_depend_on_the_default_dtype():
    def budgets():
        model = get_peft_model(
            nn.Sequential(nn.Linear(768, 768, dtype=torch.float32)), SnellaConfig(r=2, target_modules=["0"])
        )
        return model.base_model.model[0].budgets("default")

    expected = budgets()
    torch.set_default_dtype(torch.float16)
    try:
        assert budgets() == expected
    finally:
        torch.set_default_dtype(torch.float32)
