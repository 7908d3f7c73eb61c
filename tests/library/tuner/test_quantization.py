"""Quantized base layers: bitsandbytes and torchao on the CPU."""

from __future__ import annotations

import copy
import importlib.util
import warnings
import weakref

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from snella import SnellaConfig
from snella.compat.quantization import Quantization, report_requantization
from snella.layer import SnellaLayer, product_dtype
from snella.merge import merged_weight
from snella.ops import LazyWeight

M, N = 64, 128
BITSANDBYTES = ["nf4", "fp4", "nf4 double", "nf4 bfloat16", "int8"]
TORCHAO = ["torchao int8", "torchao int8 groups", "torchao int4", "torchao int4 bfloat16"]


def skip_without(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(package)


def linear(kind, m=M, n=N, bias=True):
    """Create a quantized linear layer, and return it with its dequantized weight."""
    plain = nn.Linear(n, m, bias=bias)
    if kind in BITSANDBYTES:
        bnb = skip_without("bitsandbytes")
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
        else:
            name, double = kind.split()[0], kind.endswith("double")
            layer = bnb.nn.Linear4bit(n, m, bias=bias, quant_type=name, compress_statistics=double)
        layer.load_state_dict(plain.state_dict())
        if kind.endswith("bfloat16"):
            layer.weight.data = layer.weight.data.bfloat16()
        layer.to("cpu")
        functional = bnb.functional
        if kind == "int8":
            return layer, functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        return layer, functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    skip_without("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, granularity, quantize_

    configs = {
        "torchao int8": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
        "torchao int8 groups": lambda: Int8WeightOnlyConfig(
            granularity=granularity.PerGroup(32), set_inductor_config=False
        ),
        "torchao int4": lambda: IntxWeightOnlyConfig(torch.int4, granularity.PerGroup(32)),
        "torchao int4 bfloat16": lambda: IntxWeightOnlyConfig(torch.int4, granularity.PerGroup(32)),
    }
    plain = plain.bfloat16() if kind.endswith("bfloat16") else plain
    quantize_(plain, configs[kind]())
    return plain, plain.weight.dequantize()


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.lin = layer
        self.head = nn.Linear(layer.out_features, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.lin(x)))


CONFIG = dict(r=4, target_modules=["lin"], init_sparsity=0.5, init_weights=False, scaling=0.3)


def adapted(kind, **options):
    """Create an adapted model with a quantized layer, and a copy with the dequantized weight."""
    torch.manual_seed(0)
    layer, weight = linear(kind)
    torch.manual_seed(0)
    plain = nn.Linear(N, M, dtype=torch.float32)
    plain.weight.data, plain.bias.data = weight.float(), layer.bias.data.float().clone()
    nets = [Net(layer), Net(plain)]
    nets[1].head.load_state_dict(nets[0].head.state_dict())
    models = []
    for net in nets:
        torch.manual_seed(1)
        models.append(get_peft_model(net, SnellaConfig(**CONFIG | options)))
    return models


def adapted_layer_of(model):
    return next(module for module in model.modules() if isinstance(module, SnellaLayer))


def bits(model):
    """Return copies of all tensors of the quantized weight."""
    base = adapted_layer_of(model).get_base_layer()
    source = adapted_layer_of(model)._weight()
    stored = [] if type(base.weight).__module__.startswith("torchao.") else [base.weight.data]
    return [tensor.detach().clone() for tensor in (*stored, *source.tensors)] + [source.materialize()]


def is_lossy(kind):
    return pytest.warns(UserWarning, match=r"merged into 1 quantized weight \(.*\): .* by \d+\.\d% of .* in 'lin'")


@pytest.fixture(params=BITSANDBYTES + TORCHAO)
def kind(request):
    return request.param


@pytest.fixture(params=["bytes", *BITSANDBYTES, *TORCHAO])
def kind_or_bytes(request):
    return request.param


@pytest.fixture(params=["nf4 double", "int8", "torchao int4"])
def representative_kind(request):
    return request.param


@pytest.fixture(params=["bytes", "nf4 double", "int8", "torchao int4"])
def representative_kind_or_bytes(request):
    return request.param


x = torch.randn(5, N, generator=torch.Generator().manual_seed(3))


# forward and backward -----------------------------------------------------------------------------------------------


def test_outputs_and_gradients_equal_dequantized_layer(kind):
    model, by_hand = adapted(kind)
    is_half = kind == "torchao int4 bfloat16"  # the layer computes in bfloat16
    actual, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    tolerance = dict(rtol=2e-2, atol=2e-2) if is_half else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        outputs = model(actual), by_hand(expected)
    torch.testing.assert_close(*outputs, **tolerance)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(actual.grad, expected.grad, **tolerance)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) >= 5, "factors and scalars"
    for name, parameter in trained:
        target = by_hand.get_parameter(name).grad
        scale = target.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, target, **(dict(rtol=0, atol=5e-2 * scale) if is_half else dict(rtol=1e-4, atol=1e-5))
        )
    assert all(p.grad is None for p in adapted_layer_of(model).get_base_layer().parameters())


def test_small_update_is_not_rounded_away():
    model, _ = adapted("nf4 bfloat16", scaling=1e-4)
    layer = adapted_layer_of(model)
    weight, delta = layer._weight().materialize(), layer.get_delta_weight("default")
    is_rounded_away = (weight.float() + delta).bfloat16() == weight
    assert is_rounded_away[delta != 0].float().mean() > 0.9, "a bfloat16 sum would round it away"
    torch.testing.assert_close(layer(x), x @ (weight.float() + delta).T + layer.bias)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["folded", "separate-branch"])
def test_dequantized_weight_is_freed_between_passes(representative_kind, dropout, monkeypatch):
    model, _ = adapted(representative_kind, update_dropout=dropout)
    layer, dequantized = adapted_layer_of(model), []
    plain = layer.quantization.source

    def record_source(base):
        source = plain(base)

        def make():
            weight = source.materialize()
            dequantized.append(weakref.ref(weight))
            return weight

        return type(source)(source.shape, source.tensors, make)

    monkeypatch.setattr(layer.quantization, "source", record_source)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x.clone().requires_grad_())
    assert len(dequantized) == 1 and dequantized[0]() is None
    parameter_ptrs = {p.data_ptr() for p in model.parameters()}
    assert max(t.numel() for t in saved if t.data_ptr() not in parameter_ptrs) < M * N / 2, (
        "no saved tensor has the size of the weight"
    )
    y.sum().backward()
    assert len(dequantized) == 2, "dequantized again"


# dynamo reads gradients of tensors between graphs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_model_supports_quantized_layer():
    model, _ = adapted("nf4")
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)


# peft uses a name that transformers deprecates
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_quantized_language_model_trains_under_checkpointing(package, tmp_path):
    skip_without(package)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    if package == "bitsandbytes":
        quantized = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    else:
        from torchao.quantization import IntxWeightOnlyConfig, granularity

        quantized = transformers.TorchAoConfig(IntxWeightOnlyConfig(torch.int4, granularity.PerGroup(32)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantized, device_map="cpu", dtype=torch.float32
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, SnellaConfig(r=4, init_weights=False, scaling=0.1, target_sparsity=0.0))
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    assert len(layers) == 14 and all(layer.quantization is not None for layer in layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens, losses = torch.arange(32).view(2, 16), []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# evaluation ---------------------------------------------------------------------------------------------------------


class Int8Quantization(Quantization):
    """Int8 weight with one scale; requires no package."""

    name = "bytes"

    def __init__(self, weight):
        self.scale = weight.abs().max() / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    def source(self, base):
        return LazyWeight(self.codes.shape, (self.codes, self.scale), lambda: self.codes * self.scale)

    def write(self, base, weight):
        raise NotImplementedError

    def snapshot(self, base):
        raise NotImplementedError

    def restore(self, base, snapshot):
        raise NotImplementedError


def adapted_on(kind, **options):
    """Create an adapted model with a quantized layer; `bytes` requires no package."""
    if kind != "bytes":
        return adapted(kind, **options)[0]
    torch.manual_seed(0)
    net = Net(nn.Linear(N, M))
    torch.manual_seed(1)
    model = get_peft_model(net, SnellaConfig(**CONFIG | options))
    adapted_layer_of(model).quantization = Int8Quantization(net.lin.weight.detach())
    return model


def test_evaluation_equals_training_and_caches_no_dequantized_weight(kind_or_bytes, monkeypatch):
    model = adapted_on(kind_or_bytes)
    layer, saved = adapted_layer_of(model), []
    trained = layer(x)
    model.eval()

    def record_source(*args, **options):
        weight = merged_weight(*args, **options)
        saved.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr("snella.layer.merged_weight", record_source)
    for is_enabled in (False, True):
        with torch.set_grad_enabled(is_enabled):
            torch.testing.assert_close(layer(x), trained.detach(), rtol=0, atol=0)
    assert layer._cache._effective is None
    assert saved and all(ref() is None for ref in saved)


def test_frozen_adapter_propagates_gradients_without_caching_weight(representative_kind_or_bytes):
    model = adapted_on(representative_kind_or_bytes)
    layer, actual, expected = adapted_layer_of(model), *(x.clone().requires_grad_() for _ in range(2))
    layer(expected).square().sum().backward()
    model.requires_grad_(False).eval()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(actual)
    assert max((t.numel() for t in saved), default=0) < M * N / 2
    y.square().sum().backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0)


def test_evaluation_detects_weight_change():
    model = adapted_on("bytes")
    model.requires_grad_(False).eval()
    y = adapted_layer_of(model)(x.clone().requires_grad_())
    adapted_layer_of(model).snella_B["default"].add_(1)
    with pytest.raises(RuntimeError, match=rf"a weight \[{M}, {N}\] must not change between forward and backward"):
        y.sum().backward()


def test_cache_delta_caches_weight_in_evaluation(kind_or_bytes, monkeypatch):
    model = adapted_on(kind_or_bytes)
    layer = adapted_layer_of(model)
    model.eval()
    with torch.no_grad():
        expected = layer(x)
        model.peft_config["default"].cache_delta = True
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        assert layer._cache._effective is not None
        with monkeypatch.context() as patch:
            patch.setattr("snella.layer.merged_weight", None)  # no longer required
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        model.peft_config["default"].cache_delta = False
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert layer._cache._effective is None


def test_cached_weight_depends_on_dtype(representative_kind):
    model, by_hand = adapted(representative_kind)
    model.eval(), by_hand.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), by_hand(x))


def test_disabled_adapter_equals_base_layer(kind):
    model, _ = adapted(kind)
    before = bits(model)
    base = copy.deepcopy(adapted_layer_of(model).get_base_layer())
    # bitsandbytes does not round 4-bit weights to their dtype before the product, and changes their
    # layout in evaluation; its 8-bit layers quantize their input only in evaluation
    tolerance = dict(rtol=0, atol=5e-3) if kind == "nf4 bfloat16" else {}
    inputs = x.to(product_dtype(adapted_layer_of(model), x)).requires_grad_()
    for mode in (True, False):
        model.train(mode)
        expected = base.train(mode if kind == "int8" else True)(inputs)
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(adapted_layer_of(model)(inputs), expected, **tolerance)
    for actual, reference in zip(bits(model), before, strict=True):
        assert torch.equal(actual, reference), "evaluation must not change the base layer"


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 2**-8), ("nf4 double", 0.05)])
def test_cpu_layout_of_bitsandbytes_is_undone(kind, tolerance):
    bnb = skip_without("bitsandbytes")
    layer, weight = linear(kind)
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    model = get_peft_model(Net(layer), SnellaConfig(**CONFIG))
    # the layout stores the scales in bfloat16, and requantizes quantized scales
    torch.testing.assert_close(adapted_layer_of(model)._weight().materialize(), weight, rtol=tolerance, atol=0)


# merging ------------------------------------------------------------------------------------------------------------


def test_merge_requantizes_and_warns_about_the_error(kind):
    model, _ = adapted(kind)
    layer = adapted_layer_of(model)
    before, delta = layer._weight().materialize().float(), layer.get_delta_weight("default").float()
    attributes = dict(layer.get_base_layer().weight.__dict__)
    with is_lossy(kind) as records:
        model.merge_adapter()
    after = layer._weight().materialize().float()
    assert not torch.equal(after, before)
    relative_error = (after - (before + delta)).norm() / delta.norm()
    message = float(str(records[0].message).split("by ")[1].split("%")[0]) / 100
    assert message > 0 and message == pytest.approx(relative_error.item(), rel=0.02, abs=1e-3)
    assert set(layer.get_base_layer().weight.__dict__) == set(attributes), "quantized with the same settings"
    merged = layer.get_base_layer()(x.to(product_dtype(layer, x))) if kind != "int8" else layer(x)
    expected = x @ after.T + layer.bias.float()
    torch.testing.assert_close(merged.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao_merge_keeps_scales_if_more_accurate(kind):
    model, _ = adapted(kind, scaling=1e-3)
    layer, before = adapted_layer_of(model), bits(model)
    with pytest.warns(UserWarning, match=r"by (100\.0|\d\d?\.\d)% of"):  # at most the entire update
        layer.merge()
    after = bits(model)
    assert torch.equal(after[1], before[1]), "scales"
    unchanged = layer.get_delta_weight("default") == 0
    assert torch.equal(after[0][unchanged], before[0][unchanged])


def test_unmerge_is_bit_exact(kind):
    model, _ = adapted(kind)
    layer, before, output = adapted_layer_of(model), bits(model), model(x)
    for _ in range(2):
        with is_lossy(kind):
            model.merge_adapter()
        layer(x.to(product_dtype(layer, x)))
        model.unmerge_adapter()
    for actual, expected in zip(bits(model), before, strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(model(x), output, rtol=0, atol=0)


def test_second_adapter_is_merged_into_original_weight(representative_kind):
    model, _ = adapted(representative_kind)
    model.add_adapter("other", SnellaConfig(**CONFIG))
    layer, before = adapted_layer_of(model), bits(model)
    target = layer._weight().materialize().float() + sum(layer.get_delta_weight(name) for name in ("default", "other"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT warns about the second merge; SNELLA warns about the requantization error
        layer.merge(adapter_names=["default"])
        layer.merge(adapter_names=["other"])
    both = layer._weight().materialize()
    layer.quantization.write(layer.get_base_layer(), target)
    torch.testing.assert_close(layer._weight().materialize(), both)
    layer.unmerge()
    assert all(torch.equal(actual, expected) for actual, expected in zip(bits(model), before, strict=True))


def test_nonfinite_safe_merge_raises_without_changes(representative_kind):
    model, _ = adapted(representative_kind)
    before = bits(model)
    adapted_layer_of(model).snella_A["default"].data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        adapted_layer_of(model).merge(safe_merge=True)
    assert all(torch.equal(actual, expected) for actual, expected in zip(bits(model), before, strict=True))


def test_merging_many_layers_warns_once_and_unloads_quantized_layers(representative_kind):
    torch.manual_seed(0)
    model = nn.Sequential(*(linear(representative_kind, N, N)[0] for _ in range(3)))
    names = [type(layer) for layer in model]
    model = get_peft_model(model, SnellaConfig(**CONFIG | {"target_modules": ["0", "1", "2"]}))
    with pytest.warns(UserWarning, match=r"merged into 3 quantized weights .* in '[012]'\)") as records:
        merged = model.merge_and_unload()
    assert len(records) == 1
    assert [type(layer) for layer in merged] == names
    assert not any(isinstance(module, SnellaLayer) for module in merged.modules())


def test_requantization_error_is_relative_to_update():
    before, update, error = torch.zeros(4), torch.tensor([3.0, 4, 0, 0]), torch.tensor([0.0, 0, 0, 1])
    for target, percentage in ((before + update, "20.0%"), (before, "inf%")):
        with pytest.warns(UserWarning, match=rf"changed the sums by {percentage} of .* {percentage} in 'lin'"):
            report_requantization("lin", "some bits", before, target, target + error)


# saving, copying ----------------------------------------------------------------------------------------------------


def test_adapter_saves_and_loads_on_quantized_base(representative_kind, tmp_path):
    model, _ = adapted(representative_kind)
    base = Net(copy.deepcopy(adapted_layer_of(model).get_base_layer()))
    base.head.load_state_dict(model.base_model.model.head.state_dict())
    with torch.no_grad():
        expected = model.eval()(x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(loaded.eval()(x), expected, rtol=0, atol=0)


def test_copies_are_equal(representative_kind):
    model, _ = adapted(representative_kind)
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)


@pytest.mark.filterwarnings("ignore:.* no budget allocator is attached:UserWarning")
def test_training_changes_only_the_adapter(representative_kind):
    model, _ = adapted(representative_kind)
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(actual, expected) for actual, expected in zip(bits(model), before, strict=True))


# unsupported layers -------------------------------------------------------------------------------------------------


def wrap(layer, targets=("lin",)):
    return get_peft_model(Net(layer), SnellaConfig(r=4, target_modules=list(targets)))


def test_unquantized_bitsandbytes_layer_raises():
    bnb = skip_without("bitsandbytes")
    for cls, options in ((bnb.nn.Linear4bit, {}), (bnb.nn.Linear8bitLt, {"has_fp16_weights": False})):
        with pytest.raises(
            RuntimeError,
            match=r"'lin', a bitsandbytes Linear\w+ that is not quantized yet: its weight is torch\.float32 on 'cpu'",
        ):
            wrap(cls(N, M, **options))


def test_has_fp16_weights_raises():
    layer = skip_without("bitsandbytes").nn.Linear8bitLt(N, M, has_fp16_weights=True)
    with pytest.raises(NotImplementedError, match=r"'lin', a Linear8bitLt with has_fp16_weights=True"):
        wrap(layer)


def test_other_bitsandbytes_modules_raise_with_name():
    model = nn.ModuleDict({"lin": skip_without("bitsandbytes").nn.StableEmbedding(4, 4)})
    with pytest.raises(
        NotImplementedError, match=r"'lin', a bitsandbytes StableEmbedding; supported quantized layers are"
    ):
        get_peft_model(model, SnellaConfig(target_modules=["lin"]))


def test_other_torchao_tensors_raise_with_name():
    skip_without("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Linear(N, M)
    quantize_(layer, Float8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(
        NotImplementedError,
        match=r"'lin', a Linear with a torchao weight of type Float8Tensor: requantization is not supported",
    ):
        wrap(layer)
    layer = nn.Linear(N, M)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    with pytest.raises(NotImplementedError, match=r"of type Int8Tensor: it also changes .* \(act_quant_kwargs="):
        wrap(layer)


@pytest.mark.parametrize("packed", ["qweight", "W_q"])
def test_layers_of_other_packages_raise_with_name(packed):
    class Packed(nn.Module):
        out_features = M

    layer = Packed()
    layer.register_buffer(packed, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(
        NotImplementedError, match=rf"'lin', a .*Packed, which stores its weight as {packed}; supported quantized"
    ):
        wrap(layer)


def test_quantized_attention_projection_raises():
    skip_without("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2)})
    quantize_(
        model, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=lambda module, name: name == "attn.out_proj"
    )
    with pytest.raises(
        NotImplementedError, match=r"'attn\.out_proj', a projection of .* whose weight is a quantized Int8Tensor of"
    ):
        get_peft_model(model, SnellaConfig(target_modules=["attn"]))


def test_unquantized_model_does_not_import_quantization_packages(monkeypatch):
    import sys

    for module in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, module, None)  # an import would raise
    wrap(nn.Linear(N, M))(x)
