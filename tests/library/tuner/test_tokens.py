"""Bare parameters such as `cls_token`, trained with the adapter."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from snella import create_snella_optimizer
from snella.compat.tokens import TokenAdapter, token_adapters


@pytest.fixture(params=["timm_vit", "vit", "dinov2"])
def tokened(request, cases):
    """Models whose token belongs to the model itself, or to a module inside of it."""
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


def in_use(model):
    adapter = token(model)
    return getattr(adapter._owner[0], adapter.parameter_name)


def test_a_token_starts_at_its_pretrained_value_and_is_trained(tokened):
    model = tokened.adapted(parameters_to_save=["cls_token"])
    assert torch.equal(tokened.predict(model), tokened.predict(tokened.adapted()))
    optimizer = create_snella_optimizer(model, lr=0.1)
    tokened.run(model.train()).square().sum().backward()
    before, pretrained = in_use(model).clone(), token(model).base_layer.weight.clone()
    optimizer.step()
    assert (in_use(model) - before).abs().max() > 0.01
    assert torch.equal(token(model).base_layer.weight, pretrained)


def test_a_token_is_seen_by_every_way_of_calling_the_model(vit):
    model = trained(vit)
    x = vit.inputs()
    other = vit.adapted(parameters_to_save=["cls_token"])
    with torch.no_grad():
        assert not torch.allclose(
            model.base_model.model.forward_features(x), other.base_model.model.forward_features(x)
        )


def test_a_token_is_saved_with_the_adapter_and_gives_the_same_bits(tokened, tmp_path):
    model = trained(tokened)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in state if name.endswith("cls_token_adapter.snella_token")]) == 1
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            tokened.base(), tmp_path, adapter_name="other", low_cpu_mem_usage=low, is_trainable=True
        ).eval()
        assert torch.equal(tokened.predict(loaded), tokened.predict(model))
        assert in_use(loaded).requires_grad


def test_a_token_is_disabled_with_the_adapter(tokened):
    model = trained(tokened)
    after = tokened.predict(model)
    with model.disable_adapter():
        assert torch.equal(tokened.predict(model), tokened.predict(tokened.base()))
    assert torch.equal(tokened.predict(model), after)


def test_tokens_are_switched_and_deleted_with_their_adapters(tokened):
    model = trained(tokened)
    first = tokened.predict(model)
    model.add_adapter("second", tokened.config(parameters_to_save=["cls_token"]))
    assert torch.equal(tokened.predict(model), first)
    assert in_use(model).requires_grad
    model.set_adapter("second")
    assert torch.equal(in_use(model), token(model).base_layer.weight)
    assert in_use(model) is token(model).snella_token["second"]
    assert not token(model).snella_token["default"].requires_grad
    model.add_adapter("third", tokened.config())
    model.set_adapter("third")
    assert in_use(model) is token(model).base_layer.weight
    model.set_adapter("default")
    assert torch.equal(tokened.predict(model), first)
    model.delete_adapter("second")
    assert torch.equal(tokened.predict(model), first)
    assert list(token(model).snella_token) == ["default"]


def test_deleting_the_active_adapter_hands_the_token_to_the_next(vit):
    model = trained(vit)
    model.add_adapter("second", vit.config(parameters_to_save=["cls_token"]))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert in_use(model) is token(model).snella_token["default"]


def test_two_active_adapters_with_one_token_are_refused(vit):
    model = trained(vit)
    model.add_adapter("second", vit.config(parameters_to_save=["cls_token"]))
    expected = vit.predict(model)
    with pytest.raises(ValueError, match=r"'cls_token' has a separate value in each of the adapters \['default', 's"):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(vit.predict(model), expected)
    model.add_adapter("third", vit.config())
    model.base_model.set_adapter(["default", "third"])
    assert in_use(model) is token(model).snella_token["default"]


def test_tokens_are_merged_and_restored(tokened):
    model = trained(tokened)
    expected, weights = tokened.predict(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert torch.equal(tokened.predict(model), expected)
    assert torch.equal(token(model).base_layer.weight, token(model).snella_token["default"])
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(tokened.predict(model), tokened.predict(tokened.base()))


def test_unmerging_a_token_that_is_not_merged_warns(vit):
    with pytest.warns(UserWarning, match="Already unmerged"):
        token(trained(vit)).unmerge()


def test_an_adapter_added_while_merged_starts_at_the_pretrained_token(vit):
    model = trained(vit)
    pretrained = token(model).base_layer.weight.clone()
    model.merge_adapter()
    token(model).update_layer("second", ["default"], False)
    assert torch.equal(token(model).snella_token["second"], pretrained)


def test_a_broken_token_is_not_merged_safely(vit):
    model = trained(vit)
    token(model).snella_token["default"].data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_gives_the_parameter_back(tokened, merge):
    model = trained(tokened)
    expected = tokened.predict(model) if merge else tokened.predict(tokened.base())
    plain = model.merge_and_unload() if merge else model.unload()
    assert list(plain.state_dict()) == list(tokened.base().state_dict())
    assert torch.equal(tokened.predict(plain), expected)
    assert not any(isinstance(module, TokenAdapter) for module in plain.modules())
    fresh = tokened.base()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(tokened.predict(fresh), expected)


def test_copies_and_pickles_keep_the_token_in_use(tokened):
    model = trained(tokened)
    expected = tokened.predict(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(tokened.predict(twin), expected)
        assert in_use(twin) is token(twin).snella_token["default"]
        shift(twin, 1.0)
        assert not torch.allclose(tokened.predict(twin), expected)
    assert torch.equal(tokened.predict(model), expected)


def test_a_state_dict_restores_the_token_in_use(vit):
    model = trained(vit)
    for assign in (False, True):
        other = vit.adapted(parameters_to_save=["cls_token"])
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(vit.predict(other), vit.predict(model))
        assert in_use(other) is token(other).snella_token["default"]


def test_half_precision_tokens_keep_the_models_dtype(tokened):
    model = get_peft_model(tokened.base().bfloat16(), tokened.config(parameters_to_save=["cls_token"]))
    assert in_use(model).dtype == torch.bfloat16
    inputs = tokened.inputs()
    inputs = {"pixel_values": inputs["pixel_values"].bfloat16()} if isinstance(inputs, dict) else inputs.bfloat16()
    tokened.run(model, inputs).float().sum().backward()
    model.double()
    assert in_use(model) is token(model).snella_token["default"]
    assert in_use(model).dtype == torch.float64


def test_a_model_materialised_from_the_meta_device_keeps_its_token_in_use(vit):
    with torch.device("meta"):
        model = get_peft_model(vit.make(), vit.config(parameters_to_save=["cls_token"]))
    assert in_use(model).is_meta
    model.to_empty(device="cpu")
    assert in_use(model) is token(model).snella_token["default"]
    assert not in_use(model).is_meta


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient_of_a_token(cases, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        base = cases["vit"].base()
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model = get_peft_model(base, cases["vit"].config(parameters_to_save=["cls_token"])).train()
        cases["vit"].run(model).square().sum().backward()
        gradients.append(in_use(model).grad)
    assert torch.equal(*gradients)


def test_the_official_preset_trains_the_class_token_where_there_is_one(cases):
    model = cases["timm_vit"].adapted(preset="official")
    assert model.peft_config["default"].parameters_to_save == ["cls_token"]
    assert [t.parameter_name for t in token_adapters(model)] == ["cls_token"]
    model = cases["timm_swin"].adapted(preset="official")
    assert model.peft_config["default"].parameters_to_save == []
    assert cases["timm_vit"].adapted().peft_config["default"].parameters_to_save == []


def test_one_official_configuration_serves_models_with_and_without_a_token(cases):
    config = cases["timm_swin"].config(preset="official")
    get_peft_model(cases["timm_swin"].base(), copy.deepcopy(config))
    config.parameters_to_save = []
    config.target_modules = None
    assert token_adapters(get_peft_model(cases["timm_vit"].base(), config))


def test_an_official_adapter_of_a_model_without_a_token_can_be_loaded(cases, tmp_path):
    case = cases["timm_swin"]
    model = case.adapted(preset="official")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(case.predict(loaded), case.predict(model))


def test_any_bare_parameter_can_be_trained_by_suffix(cases):
    model = cases["vit"].adapted(parameters_to_save=["embeddings.position_embeddings", "layernorm.weight"])
    assert model.peft_config["default"].parameters_to_save == [
        "vit.embeddings.position_embeddings",
        "vit.layernorm.weight",
    ]
    cases["vit"].run(model.train()).square().sum().backward()
    assert all(t.snella_token["default"].grad.any() for t in token_adapters(model))


def test_a_token_that_the_model_lacks_is_answered_with_near_names(vit):
    base = vit.base()
    with pytest.raises(
        ValueError,
        match="parameters_to_save='clstoken' matches no parameter of VisionTransformer; did you mean 'cls_token'",
    ):
        get_peft_model(base, vit.config(parameters_to_save=["clstoken"]))
    assert not token_adapters(base)
    with pytest.raises(ValueError, match=r"parameters_to_save='xyz' matches no parameter of VisionTransformer$"):
        get_peft_model(base, vit.config(parameters_to_save=["xyz"]))


def test_an_empty_place_cannot_become_a_token(vit):
    base = vit.base()
    base.register_parameter("nothing", None)
    with pytest.raises(ValueError, match=r"VisionTransformer\.nothing must be a parameter, got None"):
        TokenAdapter(base, "nothing")


def test_tokens_do_not_decay(vit):
    groups = {g["name"]: g["params"] for g in create_snella_optimizer(trained(vit), lr=0.1).param_groups}
    assert "head" not in groups
    assert len(groups["head_no_decay"]) == 1
