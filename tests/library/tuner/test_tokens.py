"""Trainable bare parameters, such as `cls_token`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from snella import SnellaConfig, create_snella_optimizer
from snella.compat.tokens import TokenAdapter, token_adapters


@pytest.fixture(params=["timm_vit", "vit", "dinov2"])
def token_case(request, cases):
    """Model with a token at the root or in a submodule."""
    return cases[request.param]


def trained(case, **settings):
    model = case.adapted(parameters_to_save=["cls_token"], **settings)
    shift(model, 1.0)
    return model


@torch.no_grad()
def shift(model, amount):
    for token in token_adapters(model):
        for value in token.snella_token.values():
            value.add_(amount * torch.linspace(-1, 1, value.shape[-1]))


def token(model):
    return token_adapters(model)[0]


def active_tokens(model):
    adapter = token(model)
    return getattr(adapter._owner[0], adapter.parameter_name)


def test_token_starts_at_pretrained_value_and_is_trained(token_case):
    model = token_case.adapted(parameters_to_save=["cls_token"])
    assert torch.equal(token_case.predict(model), token_case.predict(token_case.adapted()))
    optimizer = create_snella_optimizer(model, lr=0.1)
    token_case.run(model.train()).square().sum().backward()
    before, pretrained = active_tokens(model).clone(), token(model).base_layer.weight.clone()
    optimizer.step()
    assert (active_tokens(model) - before).abs().max() > 0.01
    assert torch.equal(token(model).base_layer.weight, pretrained)


def test_token_is_used_by_every_entry_point(vit):
    model = trained(vit)
    x = vit.inputs()
    other = vit.adapted(parameters_to_save=["cls_token"])
    with torch.no_grad():
        assert not torch.allclose(
            model.base_model.model.forward_features(x), other.base_model.model.forward_features(x)
        )


def test_token_is_saved_with_adapter(token_case, tmp_path):
    model = trained(token_case)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in state if name.endswith("cls_token_adapter.snella_token")]) == 1
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            token_case.base(), tmp_path, adapter_name="other", low_cpu_mem_usage=low, is_trainable=True
        ).eval()
        assert torch.equal(token_case.predict(loaded), token_case.predict(model))
        assert active_tokens(loaded).requires_grad


def test_token_is_disabled_with_adapter(token_case):
    model = trained(token_case)
    after = token_case.predict(model)
    with model.disable_adapter():
        assert torch.equal(token_case.predict(model), token_case.predict(token_case.base()))
    assert torch.equal(token_case.predict(model), after)


def test_tokens_are_switched_and_deleted_with_adapters(token_case):
    model = trained(token_case)
    first = token_case.predict(model)
    model.add_adapter("second", token_case.config(parameters_to_save=["cls_token"]))
    assert torch.equal(token_case.predict(model), first)
    assert active_tokens(model).requires_grad
    model.set_adapter("second")
    assert torch.equal(active_tokens(model), token(model).base_layer.weight)
    assert active_tokens(model) is token(model).snella_token["second"]
    assert not token(model).snella_token["default"].requires_grad
    model.add_adapter("third", token_case.config())
    model.set_adapter("third")
    assert active_tokens(model) is token(model).base_layer.weight
    model.set_adapter("default")
    assert torch.equal(token_case.predict(model), first)
    model.delete_adapter("second")
    assert torch.equal(token_case.predict(model), first)
    assert list(token(model).snella_token) == ["default"]


def test_deleting_active_adapter_activates_next_token(vit):
    model = trained(vit)
    model.add_adapter("second", vit.config(parameters_to_save=["cls_token"]))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert active_tokens(model) is token(model).snella_token["default"]


def test_two_active_adapters_with_one_token_raise(vit):
    model = trained(vit)
    model.add_adapter("second", vit.config(parameters_to_save=["cls_token"]))
    expected = vit.predict(model)
    with pytest.raises(ValueError, match=r"'cls_token' has a separate value in each of the adapters \['default', 's"):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(vit.predict(model), expected)
    model.add_adapter("third", vit.config())
    model.base_model.set_adapter(["default", "third"])
    assert active_tokens(model) is token(model).snella_token["default"]


def test_tokens_merge_and_unmerge(token_case):
    model = trained(token_case)
    expected, weights = token_case.predict(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert torch.equal(token_case.predict(model), expected)
    assert torch.equal(token(model).base_layer.weight, token(model).snella_token["default"])
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(token_case.predict(model), token_case.predict(token_case.base()))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_values_of_two_adapters_are_rejected_before_a_layer_is_merged(vit, merge):
    model = trained(vit)
    model.add_adapter("second", vit.config(parameters_to_save=["cls_token"]))
    expected = vit.predict(model)
    with pytest.raises(ValueError, match="has a separate value in each of the adapters"):
        getattr(model, merge)(adapter_names=["default", "second"])
    assert torch.equal(vit.predict(model), expected)


def test_unmerging_unmerged_token_warns(vit):
    with pytest.warns(UserWarning, match="Already unmerged"):
        token(trained(vit)).unmerge()


def test_adapter_added_while_merged_starts_at_pretrained_token(vit):
    model = trained(vit)
    pretrained = token(model).base_layer.weight.clone()
    model.merge_adapter()
    token(model).update_layer("second", ["default"], False)
    assert torch.equal(token(model).snella_token["second"], pretrained)


def test_safe_merge_rejects_nonfinite_token(vit):
    model = trained(vit)
    token(model).snella_token["default"].data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("merge", [True, False])
def test_unload_restores_parameter(token_case, merge):
    model = trained(token_case)
    expected = token_case.predict(model) if merge else token_case.predict(token_case.base())
    plain = model.merge_and_unload() if merge else model.unload()
    assert list(plain.state_dict()) == list(token_case.base().state_dict())
    assert torch.equal(token_case.predict(plain), expected)
    assert not any(isinstance(module, TokenAdapter) for module in plain.modules())
    fresh = token_case.base()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(token_case.predict(fresh), expected)


def test_copies_and_pickles_keep_active_token(token_case):
    model = trained(token_case)
    expected = token_case.predict(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(token_case.predict(copied), expected)
        assert active_tokens(copied) is token(copied).snella_token["default"]
        shift(copied, 1.0)
        assert not torch.allclose(token_case.predict(copied), expected)
    assert torch.equal(token_case.predict(model), expected)


def test_load_state_dict_restores_active_token(vit):
    model = trained(vit)
    for assign in (False, True):
        other = vit.adapted(parameters_to_save=["cls_token"])
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(vit.predict(other), vit.predict(model))
        assert active_tokens(other) is token(other).snella_token["default"]


def test_half_precision_tokens_have_model_dtype(token_case):
    model = get_peft_model(token_case.base().bfloat16(), token_case.config(parameters_to_save=["cls_token"]))
    assert active_tokens(model).dtype == torch.bfloat16
    inputs = token_case.inputs()
    inputs = {"pixel_values": inputs["pixel_values"].bfloat16()} if isinstance(inputs, dict) else inputs.bfloat16()
    token_case.run(model, inputs).float().sum().backward()
    model.double()
    assert active_tokens(model) is token(model).snella_token["default"]
    assert active_tokens(model).dtype == torch.float64


def test_materialized_meta_model_keeps_active_token(vit):
    with torch.device("meta"):
        model = get_peft_model(vit.make(), vit.config(parameters_to_save=["cls_token"]))
    assert active_tokens(model).is_meta
    model.to_empty(device="cpu")
    assert active_tokens(model) is token(model).snella_token["default"]
    assert not active_tokens(model).is_meta


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_does_not_change_token_gradient(cases, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        base = cases["vit"].base()
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model = get_peft_model(base, cases["vit"].config(parameters_to_save=["cls_token"])).train()
        cases["vit"].run(model).square().sum().backward()
        gradients.append(active_tokens(model).grad)
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")  # one process
def test_token_is_trained_in_fsdp1(vit):
    model = trained(vit).train()
    expected = vit.run(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        output = vit.run(sharded)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in sharded.named_parameters() if "snella_token" in name}
        assert gradients and all(gradient.any() for gradient in gradients.values())
    finally:
        dist.destroy_process_group()


def test_data_parallel_is_rejected(vit):
    with pytest.raises(NotImplementedError, match=r"nn\.DataParallel does not support"):
        token(trained(vit))._replicate_for_data_parallel()


def test_official_preset_trains_existing_class_token(cases):
    model = cases["timm_vit"].adapted(preset="official")
    assert model.peft_config["default"].parameters_to_save == ["cls_token"]
    assert [t.parameter_name for t in token_adapters(model)] == ["cls_token"]
    model = cases["timm_swin"].adapted(preset="official")
    assert model.peft_config["default"].parameters_to_save == []
    assert cases["timm_vit"].adapted().peft_config["default"].parameters_to_save == []


def test_official_config_supports_models_with_and_without_token(cases):
    config = cases["timm_swin"].config(preset="official")
    get_peft_model(cases["timm_swin"].base(), copy.deepcopy(config))
    config.parameters_to_save = []
    config.target_modules = None
    assert token_adapters(get_peft_model(cases["timm_vit"].base(), config))


def test_official_adapter_of_model_without_token_loads(cases, tmp_path):
    case = cases["timm_swin"]
    model = case.adapted(preset="official")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(case.predict(loaded), case.predict(model))


def test_bare_parameter_is_selected_by_suffix(cases):
    model = cases["vit"].adapted(parameters_to_save=["embeddings.position_embeddings", "layernorm.weight"])
    assert model.peft_config["default"].parameters_to_save == [
        "vit.embeddings.position_embeddings",
        "vit.layernorm.weight",
    ]
    cases["vit"].run(model.train()).square().sum().backward()
    assert all(t.snella_token["default"].grad.any() for t in token_adapters(model))


def test_unmatched_token_error_suggests_names(vit):
    base = vit.base()
    with pytest.raises(
        ValueError,
        match="'clstoken' matches no parameter of VisionTransformer outside adapters; did you mean 'cls_token'",
    ):
        get_peft_model(base, vit.config(parameters_to_save=["clstoken"]))
    assert not token_adapters(base)
    with pytest.raises(ValueError, match=r"'xyz' matches no parameter of VisionTransformer outside adapters$"):
        get_peft_model(base, vit.config(parameters_to_save=["xyz"]))
    adapted = vit.adapted()
    with pytest.raises(ValueError, match=r"fc1\.bias' matches no parameter of VisionTransformer outside adapters$"):
        adapted.add_adapter("second", vit.config(parameters_to_save=["fc1.bias"]))


def test_shared_parameters_are_rejected():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "lin": nn.Linear(3, 3)})
    model["a"].token = model["b"].token = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"matches a shared parameter twice, as 'a\.token' and 'b\.token'"):
        get_peft_model(model, SnellaConfig(r=2, target_modules=["lin"], parameters_to_save=["token"]))
    get_peft_model(model, SnellaConfig(r=2, target_modules=["lin"], parameters_to_save=["a.token"]))


def test_tokens_have_no_weight_decay(vit):
    groups = {g["name"]: g["params"] for g in create_snella_optimizer(trained(vit), lr=0.1).param_groups}
    assert "head" not in groups
    assert len(groups["head_no_decay"]) == 1


def test_trained_rows_of_an_embedding_have_no_weight_decay():
    base = nn.Sequential()
    base.embed, base.layer = nn.Embedding(10, 8), nn.Linear(8, 8)
    settings = {"target_modules": ["layer"], "trainable_token_indices": {"embed": [1, 2]}}
    model = get_peft_model(base, SnellaConfig(r=2, **settings))
    groups = {g["name"]: g["params"] for g in create_snella_optimizer(model, lr=0.1).param_groups}
    assert "head" not in groups and [list(p.shape) for p in groups["head_no_decay"]] == [[2, 8]]


class TrainedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(self.fc(self.norm(x)))


def test_trained_norm_weight_gets_a_gradient_with_compressed_activations():
    gradients = []
    for is_compressed in (False, True):
        torch.manual_seed(0)
        config = SnellaConfig(
            r=4, target_modules=["fc", "out"], parameters_to_save=["norm.weight"], compress_activations=is_compressed
        )
        model = get_peft_model(TrainedNorm(), config).train()
        model(torch.randn(3, 64)).square().sum().backward()
        (token,) = token_adapters(model)
        gradients.append(token.snella_token["default"].grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0.05 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", ["fc.bias", "bias"])
def test_a_parameter_inside_an_adapted_layer_is_rejected_before_any_change(name):
    model = TrainedNorm()
    with pytest.raises(ValueError, match=r"outside adapted layers, got .*'fc\.bias'.*bias='snella_only'"):
        get_peft_model(model, SnellaConfig(r=4, target_modules=["fc", "out"], parameters_to_save=[name]))
    assert not token_adapters(model) and isinstance(model.fc, nn.Linear)
