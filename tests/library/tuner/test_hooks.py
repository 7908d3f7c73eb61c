"""Hooks of torch, accelerate and diffusers on base layers of adapters."""

from __future__ import annotations

import copy
import types

import accelerate
import pytest
import torch
import transformers
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from snella import SnellaConfig


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 4, 3))


class Attention(nn.Module):
    """Model that calls an attention module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


MODELS = {
    "linear": (net, ["0", "2"], (3, 8)),
    "conv": (conv, ["0", "2"], (2, 3, 6, 6)),
    "attention": (Attention, ["attn"], (2, 4, 8)),
}
METHODS = {
    "snella": lambda targets: SnellaConfig(
        r=4, target_modules=targets, init_weights=False, scaling=0.2, init_sparsity=0.3, target_sparsity=0.3
    ),
    "lora": lambda targets: LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
}


def adapt(model: nn.Module, targets=("0", "2"), method: str = "snella") -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, METHODS[method](list(targets))).eval()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("is_training", [False, True], ids=["no_grad", "training"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_forward_hooks_of_base_layer_can_change_input_and_output(method, kind, is_training):
    make, targets, shape = MODELS[kind]
    base, x = make(), inputs(*shape)
    layer = base.attn if kind == "attention" else base[2]
    calls = []

    def before(module, args):
        calls.append("before")

    def after(module, args, output):
        calls.append("after")
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

    with torch.set_grad_enabled(is_training):
        expected = adapt(copy.deepcopy(base), targets, method).train(is_training)(x) + 1
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
        actual = adapt(base, targets, method).train(is_training)(x)
    assert calls == ["before", "after"]
    torch.testing.assert_close(actual, expected)


def test_backward_hooks_of_base_layer_run():
    base, calls_seen = net(), []
    base[2].register_full_backward_hook(lambda module, grad_in, grad_out: calls_seen.append(grad_out[0]))
    model = adapt(base).train()
    model(inputs(3, 8)).sum().backward()
    assert len(calls_seen) == 1
    assert torch.equal(calls_seen[0], torch.ones(3, 8))


def test_backward_pre_hooks_of_base_layer_run():
    base, calls_seen = net(), []
    base[2].register_full_backward_pre_hook(lambda module, grad_out: calls_seen.append(grad_out[0]))
    adapt(base).train()(inputs(3, 8)).sum().backward()
    assert len(calls_seen) == 1 and torch.equal(calls_seen[0], torch.ones(3, 8))


def test_hooks_do_not_change_gradients():
    plain, hooked, x = adapt(net()).train(), net(), inputs(3, 8)
    hooked[0].register_forward_hook(lambda *_: None)
    hooked = adapt(hooked).train()
    for model in (plain, hooked):
        model(x).square().sum().backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (plain, hooked)]
    assert grads[0]
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_offloaded_model_runs_and_merges(kind, when):
    make, targets, shape = MODELS[kind]
    x = inputs(*shape)
    with torch.no_grad():
        expected = adapt(make(), targets)(x)
        if when == "before":
            model = adapt(accelerate.cpu_offload(make(), execution_device="cpu"), targets)
        else:
            model = accelerate.cpu_offload(adapt(make(), targets), execution_device="cpu")
        base = model.base_model.model[0]
        for _ in range(2):
            assert torch.equal(model(x), expected)
            assert base.base_layer.weight.is_meta
            assert base.snella_A["default"].is_meta == (when == "after")
            assert base._cache._effective is None, "the effective weight of an offloaded layer must not be cached"
        assert torch.equal(model.merge_and_unload()(x), expected)


def test_adapter_of_offloaded_model_trains():
    plain, x = adapt(net()).train(), inputs(3, 8)
    model = adapt(accelerate.cpu_offload(net(), execution_device="cpu")).train()
    for trained in (plain, model):
        trained(x).square().sum().backward()
    for name in ("snella_A", "snella_B"):
        expected = getattr(plain.base_model.model[0], name)["default"].grad
        assert torch.equal(getattr(model.base_model.model[0], name)["default"].grad, expected)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")  # PEFT's warning
@pytest.mark.parametrize("method", ["snella", "lora"])
def test_adapter_loads_into_partially_disk_offloaded_model(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT copies the files into the working directory

    def build():
        torch.manual_seed(0)
        shape = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()

    settings = dict(r=4, target_modules=["q_proj", "v_proj"])
    if method == "snella":
        config = SnellaConfig(**settings, init_weights=False, init_sparsity=0.5)
    else:
        config = LoraConfig(**settings, init_lora_weights=False)
    model, x = get_peft_model(build(), config).eval(), torch.arange(6)[None]
    with torch.no_grad():
        expected = model(x).logits
    model.save_pretrained(tmp_path / "adapter")
    build().save_pretrained(tmp_path / "base")
    device_map = {"model.layers.1": "disk"}
    device_map |= dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    folder = tmp_path / "offloaded"
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=folder
    )
    assert base.model.layers[1].self_attn.q_proj.weight.is_meta
    context = {f"base_model.model.{name}": device for name, device in device_map.items()}
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=context, offload_dir=folder)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, expected)
        assert loaded.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.is_meta
        torch.testing.assert_close(loaded.merge_and_unload()(x).logits, expected)


def test_device_hooks_are_not_affected():
    x, base = inputs(3, 8), net()
    expected = adapt(net())(x)
    model = adapt(accelerate.dispatch_model(base, {"0": "cpu", "1": "cpu", "2": "cpu"}, force_hooks=True))
    assert hasattr(model.base_model.model[0].base_layer, "_hf_hook")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_is_supported(when, dtype):
    base, x = net().to(dtype), inputs(3, 8).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn).to(dtype))
    reference = adapt(copy.deepcopy(base)).train()
    if when == "before":
        apply_layerwise_casting(base, torch.float8_e4m3fn, dtype)
        model = adapt(base)
    else:
        model = adapt(base)
        apply_layerwise_casting(model, torch.float8_e4m3fn, dtype, skip_modules_pattern=["snella_"])
    layer = model.base_model.model[0]
    with torch.no_grad():
        # equal random values, rounded to the base weight's dtype only for 16-bit weights
        for parameter, value in zip(reference.parameters(), model.parameters(), strict=True):
            parameter.copy_(value.float())
        assert torch.equal(model(x), reference.eval()(x))
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    assert layer._cache._effective is None
    for trained in (reference.train(), model.train()):
        trained(x).square().sum().backward()
    expected = reference.base_model.model[0].snella_A["default"].grad
    assert torch.equal(layer.snella_A["default"].grad, expected)
    with pytest.raises(
        NotImplementedError,
        match=r"'0' must have at least 16 bits per entry, got torch.float8_e4m3fn; merge before",
    ):
        model.merge_adapter()


def test_float8_or_meta_weight_raises_with_name():
    x = inputs(3, 8)
    model = adapt(net())
    model.base_model.model[2].base_layer.to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"'2' must have at least 16 bits per entry, got torch.float8_e4m3fn"):
        model(x)
    model = adapt(net())
    model.base_model.model[2].base_layer.to("meta")
    with pytest.raises(NotImplementedError, match="the weight of '2' is on the meta device; load it"):
        model(x)
    with pytest.raises(NotImplementedError, match="the weight of '2' is on the meta device"):
        torch.nn.functional.linear(x, model.base_model.model[2].weight)


def test_replaced_forward_raises_with_name():
    base = net()
    base[2].forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight) * 2, base[2])
    with pytest.raises(NotImplementedError, match=r"the forward\(\) of an adapted Linear was replaced by .*lambda"):
        adapt(base)(inputs(3, 8))


@torch.no_grad()
def test_compiled_graph_runs_hooks_of_base_layer():
    base, calls = net(), []
    for layer in (base[0], base[2]):
        layer.register_forward_hook(lambda *_: calls.append(1))
    model, x = adapt(base), inputs(3, 8)
    expected = model(x)
    calls.clear()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    assert calls == [1, 1]


class TripleOutput(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return output * 3


def add_torch_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _module, _inputs, y: y * 3)


def add_accelerate_hook(layer: nn.Module) -> None:
    accelerate.hooks.add_hook_to_module(layer, TripleOutput())


@torch.no_grad()
@pytest.mark.parametrize("add_hook", [add_torch_hook, add_accelerate_hook])
@pytest.mark.parametrize("hooked", [0, 2])
def test_compiled_layer_recompiles_for_different_hooks(add_hook, hooked):
    torch._dynamo.reset()
    base, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), inputs(3, 8)
    model = get_peft_model(base, SnellaConfig(r=2, target_modules=["0", "1", "2"]))
    without = model(x)
    layers = model.base_model.model
    add_hook(layers[hooked].base_layer)
    expected = model(x)
    assert (expected - without).abs().max() > 0.1
    for adapted in (model, copy.deepcopy(model)):
        for layer in adapted.base_model.model:
            layer.compile(backend="eager")
        torch.testing.assert_close(adapted(x), expected)


@torch.no_grad()
def test_compiled_attention_recompiles_for_different_hooks():
    torch._dynamo.reset()
    base, x = nn.Sequential(Attention(), Attention()), inputs(2, 3, 8)
    model = get_peft_model(base, SnellaConfig(r=2, target_modules=["attn"]))
    without = model(x)
    base[1].attn.base_layer.register_forward_hook(lambda _module, _inputs, out: (out[0] * 3, out[1]))
    expected = model(x)
    assert (expected - without).abs().max() > 0.1
    for part in model.base_model.model:
        part.compile(backend="eager")
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_hook_changes_after_compilation_take_effect():
    torch._dynamo.reset()
    model, x = adapt(net()), inputs(3, 8)
    compiled = torch.compile(model, backend="eager")
    without = compiled(x)
    handle = model.base_model.model[2].base_layer.register_forward_hook(lambda _module, _inputs, y: y * 3)
    torch.testing.assert_close(compiled(x), without * 3)
    handle.remove()
    torch.testing.assert_close(compiled(x), without)
