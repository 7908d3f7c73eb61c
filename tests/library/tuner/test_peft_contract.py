"""Integration with PEFT, transformers and diffusers beyond the tuner class."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import re
from collections import OrderedDict

import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from PIL import Image
from torch import nn

from snella import SnellaConfig
from snella.compat.tokens import token_adapters
from snella.layer import SnellaLayer
from snella.matrices import adapted_matrices
from snella.ops import orient

TOKENS = torch.arange(6)[None]


def llama(**settings):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **settings
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def large_config(**settings):
    """Return a config with a large initial update."""
    return SnellaConfig(**{"r": 4, "init_weights": False, "scaling": 0.1} | settings)


@pytest.fixture
def saved(tmp_path):
    """Save a small language model and an adapter; return both folders and the expected output."""
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, large_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model(TOKENS).logits.detach()


# libraries that read `peft_type.value` ------------------------------------------------------------------------------


def test_auto_classes_load_adapter_folder(saved):
    _, adapter, expected = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(adapter).eval()
    assert torch.equal(model(TOKENS).logits, expected)


REQUIRED = transformers.integrations.peft.MIN_PEFT_VERSION
IS_REJECTED = Version(importlib.metadata.version("peft")) < Version(REQUIRED)
"""transformers 5.24 rejects PEFT 0.21 for every method."""


@pytest.mark.skipif(not IS_REJECTED, reason="transformers accepts this PEFT")
def test_transformers_rejects_older_peft_but_loads_adapters(saved):
    base, adapter, expected = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    for config in (large_config(), LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(ValueError, match=f"version of PEFT.*{re.escape(REQUIRED)}"):
            model.add_adapter(config)
    model.load_adapter(str(adapter), adapter_name="mine")
    assert torch.equal(model(TOKENS).logits, expected)


def test_transformers_loads_switches_and_deletes_adapters(saved, monkeypatch):
    if IS_REJECTED:
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    base, adapter, expected = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    plain = model(TOKENS).logits.detach()
    model.load_adapter(str(adapter), adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    assert torch.equal(model(TOKENS).logits, expected)
    model.disable_adapters()
    assert torch.equal(model(TOKENS).logits, plain)
    model.enable_adapters()
    model.delete_adapter("mine")
    assert torch.equal(model(TOKENS).logits, plain)
    assert not [name for name, _ in model.named_parameters() if ".snella_" in name]


def test_transformers_loads_budgets_and_tokens(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, large_config(preset="official", target_sparsity=0.7)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        token_adapters(model)[0].snella_token["default"].add_(1.0)
    for matrix in adapted_matrices(model):
        matrix.layer.set_budget("default", [matrix.size // 3])
    model.save_pretrained(tmp_path / "adapter")
    for change in (lambda m: m, lambda m: m.double().float(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base").eval()
        loaded.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
        loaded = change(loaded)
        assert [m.budget for m in adapted_matrices(loaded)] == [m.budget for m in adapted_matrices(model)]
        assert torch.equal(loaded.eval()(pixel_values=x).logits, model(pixel_values=x).logits)


def test_adapter_in_pickle_format_loads_from_the_hub(monkeypatch):
    def download(*_args, **_options):
        raise EntryNotFoundError("404")

    config = large_config(target_modules=["q_proj"])
    monkeypatch.setattr("snella.config.PeftConfig.from_pretrained", classmethod(lambda *_args, **_options: config))
    monkeypatch.setattr("snella.config.hf_hub_download", download)
    assert SnellaConfig.from_pretrained("organization/adapter-in-bin-format") is config


def test_trained_rows_of_tied_embeddings_merge():
    base = llama(tie_word_embeddings=True)
    model = get_peft_model(base, large_config(target_modules=["q_proj"], trainable_token_indices=[1, 2])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    expected = model(TOKENS).logits.detach()
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected)


def test_trained_rows_of_a_weight_that_another_module_uses_do_not_merge():
    base = nn.Sequential(OrderedDict(embed=nn.Embedding(8, 8), first=nn.Linear(8, 8), head=nn.Linear(8, 8)))
    base.head.weight = base.embed.weight
    model = get_peft_model(base, large_config(target_modules=["first"], trainable_token_indices={"embed": [1]}))
    with pytest.raises(NotImplementedError, match=r"merging .* would also change"):
        model.merge_adapter()


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_merging_into_a_computed_weight_raises(normalize):
    base = nn.Sequential(OrderedDict(second=nn.Linear(8, 8), first=nn.Linear(8, 4)))
    normalize(base.first)
    model = get_peft_model(base, large_config(target_modules=["first", "second"]))
    with pytest.raises(NotImplementedError, match="the weight of 'first' is computed from other parameters"):
        model.merge_adapter()
    assert not model.base_model.model.second.merged


def test_pipeline_loads_adapter_folder(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, large_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    classify = transformers.pipeline(
        "image-classification", model=str(tmp_path / "adapter"), image_processor=processor, device="cpu"
    )
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    expected = model(**processor(image, return_tensors="pt")).logits.detach().softmax(-1).max()
    assert classify(image)[0]["score"] == pytest.approx(float(expected), rel=1e-5)


def test_model_status_contains_the_method(mlp):
    model = mlp.adapted()
    status = get_model_status(model)
    assert status.peft_types == {"default": "SNELLA"}
    assert status.adapter_model_type == "SnellaModel" and status.num_adapter_layers == 2
    assert {layer.module_type for layer in get_layer_status(model)} == {"snella.Linear"}


def test_mixed_model_raises_peft_error(mlp):
    with pytest.raises(ValueError, match="'SNELLA' is not compatible with the `PeftMixedModel`"):
        PeftMixedModel(mlp.base(), SnellaConfig())


def test_peft_hotswap_raises_peft_error(mlp, tmp_path):
    model = mlp.adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SNELLA was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


# conversion to LoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_linear_layers_convert_to_lora(cases, name):
    case = cases[name]
    model = case.adapted()
    assert model.supports_lora_conversion()
    expected = case.predict(model)
    config, state = convert_to_lora(model, rank=8)
    config.fan_in_fan_out = name == "gpt2"
    lora = get_peft_model(case.base(), config).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    # rank 8 is the full rank only of lin1; the conversion must at least reduce the error
    assert (case.predict(lora) - expected).norm() < (case.predict(case.base()) - expected).norm()


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_compiled_lora_conversion_equals_eager(mlp, impl):
    model = mlp.adapted(impl=impl)
    _, expected = convert_to_lora(model, rank=2)
    _, state = convert_to_lora(model, rank=2, compile_kwargs={"backend": "eager"})
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_delta_weight_has_dtype_of_factors(mlp, dtype):
    model = mlp.adapted()
    layer = model.base_model.model.lin0
    exact = layer.get_delta_weight("default")
    for name in layer.adapter_layer_names:
        getattr(layer, name).to(dtype)
    assert layer.get_delta_weight("default").dtype == dtype
    assert layer.get_delta_weight("default", torch.float32).dtype == torch.float32
    torch.testing.assert_close(layer.get_delta_weight("default").float(), exact, rtol=0.1, atol=0.1)
    assert convert_to_lora(model, rank=2)[1]["base_model.model.lin0.lora_A.weight"].dtype == dtype


@pytest.mark.parametrize("name", ["conv", "torch_vit"])
def test_other_layers_do_not_support_lora_conversion(cases, name):
    model = cases[name].adapted()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)


# features of other methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("all", {"lin0.base_layer.bias", "norm.bias", "head.bias"}), ("snella_only", {"lin0.base_layer.bias"})],
)
def test_biases_are_trained_and_saved(mlp, tmp_path, bias, trained):
    model = mlp.adapted(bias=bias, target_sparsity=0.0).train()
    names = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if ".snella_" not in name} == trained
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mlp.run(model).square().sum().backward()
    # the bias gradient equals that of the plain layer
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("lin0.base_layer.bias"))
    optimizer.step()
    expected = mlp.predict(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(mlp.predict(PeftModel.from_pretrained(mlp.base(), tmp_path).eval()), expected)


def test_bias_gradient_equals_merged_layer(mlp):
    model = mlp.adapted(bias="snella_only").train()
    mlp.run(model).square().sum().backward()
    plain = mlp.adapted(bias="snella_only").merge_and_unload()
    plain.lin0.bias.requires_grad_(True)
    mlp.run(plain).square().sum().backward()
    grad = model.base_model.model.lin0.get_base_layer().bias.grad
    torch.testing.assert_close(grad, plain.lin0.bias.grad)


@pytest.mark.parametrize("rows", [[1, 99], {"embed_tokens": [99]}, [-1], {"tokens": [-1]}, {"lm_head": [99]}])
def test_token_indices_out_of_range_raise(rows):
    message = r"trainable_token_indices must be in \[0, \d+\] for '.*(embed_tokens|lm_head)', got (99|-1)"
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(), large_config(trainable_token_indices=rows))
    model = get_peft_model(llama(), large_config(trainable_token_indices=[1]))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", large_config(trainable_token_indices=rows))


def test_token_indices_of_a_missing_embedding_raise():
    message = r"requires a module 'words', which LlamaForCausalLM lacks; map .* embeddings, \['model\.embed_tokens'\]"
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(), large_config(trainable_token_indices={"words": [1]}))
    model = nn.ModuleDict({"words": nn.Embedding(4, 8), "first": nn.Linear(8, 8)})
    message = r"requires a module 'embed_tokens', which ModuleDict lacks; map .* embeddings, \['words'\], to rows"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, large_config(target_modules=["first"], trainable_token_indices=[1]))


def test_trainable_tokens_are_saved_and_merged(tmp_path):
    model = get_peft_model(llama(), large_config(trainable_token_indices=[1, 3])).train()
    model(TOKENS).logits.square().sum().backward()
    deltas = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert len(deltas) == 1 and deltas[0].shape == (2, 16) and deltas[0].grad.abs().sum() > 0
    with torch.no_grad():
        deltas[0].add_(1.0)
    expected = model.eval()(TOKENS).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected)
    assert (merged.get_input_embeddings().weight != llama().get_input_embeddings().weight).any(1).sum() == 2


def test_tied_embeddings_remain_tied(tmp_path):
    config = large_config(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config).train()
    embedding = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert embedding is head and embedding.requires_grad
    with torch.no_grad():
        embedding.mul_(2.0)
    expected = model.eval()(TOKENS).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, expected)


def test_tied_target_raises():
    config = large_config(target_modules=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(NotImplementedError, match=r"a target among the tied layers \['lm_head'\].*modules_to_save"):
        get_peft_model(llama(tie_word_embeddings=True), config)


def test_add_weighted_adapter_raises_with_alternative(kind):
    model = kind.adapted()
    model.add_adapter("second", kind.config(r=2))
    with pytest.raises(NotImplementedError, match=r"add_weighted_adapter\(\['default', 'second'\], \[0\.3, 0\.7\]"):
        model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "sum")
    # the suggested alternative computes the sum
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    for layer in layers:
        layer.set_scale("default", 0.3)
        layer.set_scale("second", 0.7)
    weights = [layer._weight().clone() for layer in layers]
    updates = [layer.get_delta_weight("default") + layer.get_delta_weight("second") for layer in layers]
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    for layer, weight, update in zip(layers, weights, updates, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight, orient(layer.get_base_layer(), weight) + update)


def test_mixed_batch_raises(mlp):
    model = mlp.adapted()
    with pytest.raises(
        NotImplementedError, match=r"adapter_names=\['default', '__base__'\] is not supported: a batch cannot mix"
    ):
        model(mlp.inputs(), adapter_names=["default", "__base__"])


def test_other_peft_methods_still_work(mlp):
    lora = get_peft_model(mlp.base(), LoraConfig(r=2, target_modules=["lin0"]))
    assert get_model_status(lora).peft_types == {"default": "LORA"}
    with pytest.raises(ValueError, match="SNELLA"):
        lora.add_adapter("second", SnellaConfig())


def test_plain_adapter_does_not_warn(mlp):
    model = get_peft_model(mlp.base(), SnellaConfig(rank_pattern={"lin0": 2}))
    assert len(adapted_matrices(model)) == 2
    assert all(".snella_" in name for name in get_peft_model_state_dict(model))
    assert isinstance(model.base_model.model.lin0.get_base_layer(), nn.Linear)
