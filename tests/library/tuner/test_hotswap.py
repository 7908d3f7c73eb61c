"""Hot-swapping of adapters in a running model."""

import gc
import sys

import pytest
import timm
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from snella import SnellaConfig, hotswap
from snella.autograd import compute_effective_weight
from snella.compat.hotswap import AdapterValues
from snella.kernels import Factors, make_kernel
from snella.layer import SnellaLayer
from snella.merge import MergeCache, write_effective_weight
from snella.update import Update, UpdateSpec

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TASKS = {"one": 1, "two": 2}


def backbone():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32).eval()


def adapted(seed, **changes):
    torch.manual_seed(0)
    settings = {"r": 4, "target_sparsity": 0.7, "init_sparsity": 0.7, "modules_to_save": ["head"]}
    model = get_peft_model(backbone(), SnellaConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape, generator=generator), alpha=0.3)
        for module in model.modules():
            if isinstance(module, SnellaLayer):  # different budgets per task
                module.set_budget("default", [budget // seed for budget in module.budgets("default")])
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in TASKS.items():
        adapted(seed, scaling=float(seed)).save_pretrained(root / name)
    return {name: root / name for name in TASKS}


def expected(folder):
    return PeftModel.from_pretrained(backbone(), folder).merge_and_unload().eval()(IMAGES)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}


def test_saved_configuration_describes_the_new_adapter(folders, tmp_path):
    adapted(3, target_sparsity=0.9, init_sparsity=0.8).save_pretrained(tmp_path / "sparser")
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    hotswap(model, tmp_path / "sparser")
    model.save_pretrained(tmp_path / "saved")
    config = SnellaConfig.from_pretrained(tmp_path / "saved")
    assert (config.target_sparsity, config.init_sparsity) == (0.9, 0.8)


@pytest.mark.parametrize("is_merged", [True, False])
def test_outputs_equal_freshly_loaded_model_and_unmerge_restores_base(folders, is_merged):
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    before = weights(model)
    if is_merged:
        model.merge_adapter()
    with torch.no_grad():
        for name in ("two", "one", "two", "two"):
            hotswap(model, folders[name])
            assert torch.equal(model(IMAGES), expected(folders[name]))
    if is_merged:
        model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_adapter_in_memory_reads_no_file_and_reuses_thresholds(folders, monkeypatch):
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    model.merge_adapter()
    values = {name: hotswap(model, folder) for name, folder in folders.items()}
    monkeypatch.setattr(sys.modules["snella.compat.hotswap"], "load_file", None)
    with torch.no_grad():
        for name in ("one", "two", "one"):
            assert hotswap(model, values[name]) is values[name]
            assert torch.equal(model(IMAGES), expected(folders[name]))
    assert all(cache.thresholds is not None for cache in values["one"].caches.values())
    num_bytes = sum(tensor.nbytes for tensor in values["one"].tensors.values())
    assert num_bytes < 0.5 * sum(p.numel() * 4 for p in backbone().parameters())


def test_state_dict_can_be_swapped_in(folders):
    model, other = (PeftModel.from_pretrained(backbone(), folders[name]).eval() for name in ("one", "one"))
    state = {
        name: tensor + 0.01 for name, tensor in get_peft_model_state_dict(other).items() if tensor.is_floating_point()
    }
    state |= {name: t for name, t in get_peft_model_state_dict(other).items() if name not in state}
    hotswap(model, state)
    merged = model.merge_and_unload()
    assert torch.equal(merged.head.weight, state["base_model.model.head.weight"])


def test_swap_does_not_recompile(folders):
    torch._dynamo.reset()
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    model.merge_adapter()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    counters = torch._dynamo.utils.counters
    with torch.no_grad():
        compiled(IMAGES)
        graphs = counters["stats"]["unique_graphs"]
        for name in ("two", "one", "two"):
            hotswap(compiled, folders[name])
            assert torch.equal(compiled(IMAGES), expected(folders[name]))
    assert graphs >= 1 and counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_tensors_keep_their_identity(folders):
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    model.merge_adapter()
    values = [AdapterValues.read(folder) for folder in folders.values()]
    for adapter_values in values:
        hotswap(model, adapter_values)

    def storages():
        gc.collect()
        return {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, nn.Parameter) and t.numel() > 500
        }

    addresses, before = [p.data_ptr() for p in model.parameters()], storages()
    for _ in range(3):
        for adapter_values in values:
            hotswap(model, adapter_values)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert len(storages()) <= len(before)


def test_convolution_conv1d_and_attention_are_swapped(tmp_path):
    from transformers.pytorch_utils import Conv1D

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), Conv1D(12, 8)
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x):
            tokens = self.mix(self.conv(x).flatten(2).transpose(1, 2).contiguous())
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    def make(seed):
        torch.manual_seed(0)
        config = SnellaConfig(r=4, target_modules=["conv", "mix", "attention"], target_sparsity=0.5, init_sparsity=0.5)
        model = get_peft_model(Net(), config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand(parameter.shape))
        return model

    make(1).save_pretrained(tmp_path / "one")
    model, images = make(2), torch.randn(2, 3, 4, 4)
    model.merge_adapter()
    for _ in range(3):
        hotswap(model, tmp_path / "one")
        with torch.no_grad():
            assert torch.equal(model(images), make(1).merge_and_unload()(images))


def test_mismatched_adapter_raises_without_changes(folders, tmp_path):
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(1, kernel="p_linear").save_pretrained(tmp_path / "kernel")
    with pytest.raises(ValueError, match="kernel is 'p_linear', but the model has 'mix_k'"):
        hotswap(model, tmp_path / "kernel")
    adapted(1, r=8).save_pretrained(tmp_path / "rank")
    with pytest.raises(ValueError, match=r"snella_A has shape \[3, 64, 8\], but the model has \[3, 64, 4\]"):
        hotswap(model, tmp_path / "rank")
    values = AdapterValues.read(folders["two"])
    values.tensors["base_model.model.head.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"head\.weight is not finite; save the adapter again or load an earlier"):
        hotswap(model, values)
    with pytest.raises(ValueError, match="has no SNELLA adapter 'other'"):
        hotswap(model, folders["two"], "other")
    get_peft_model(backbone(), LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="contains no SNELLA adapter, but one with a LoraConfig"):
        hotswap(model, tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    stored = config.read_text()
    for peft_type, shown in (('"OTHER"', "'OTHER'"), ("null", "None")):
        config.write_text(stored.replace('"LORA"', peft_type))
        with pytest.raises(
            ValueError, match=rf"peft_type in .*lora.adapter_config\.json must be a PEFT method, got {shown}$"
        ):
            hotswap(model, tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="nowhere contains no adapter"):
        hotswap(model, tmp_path / "nowhere")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_trained_biases_of_the_base_model_cannot_be_swapped(folders, tmp_path):
    adapted(1, bias="snella_only").save_pretrained(tmp_path / "bias")
    for first, second in ((tmp_path / "bias", folders["two"]), (folders["one"], tmp_path / "bias")):
        model = PeftModel.from_pretrained(backbone(), first).eval()
        with pytest.raises(ValueError, match="bias='snella_only' trains parameters outside"):
            hotswap(model, second)


@pytest.mark.parametrize("backend", ["numba", "eager"])
@pytest.mark.parametrize("budget", [0, 37, 13 * 11])
def test_repeated_write_of_effective_weight_is_bit_identical(backend, budget):
    if backend == "numba":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    spec = UpdateSpec(make_kernel("mix_k"), (13,), "soft", 0.7, backend)
    factors = Factors(
        torch.randn(1, 11, 8), torch.randn(13, 8), torch.tensor([[0.1, -0.1]]), torch.ones(1), torch.zeros(1)
    )
    weight, update = torch.randn(13, 11), Update(spec, factors, (budget,))
    expected_weight, _ = compute_effective_weight(weight, [update], weight.shape)
    cache, strided = MergeCache(), torch.empty(11, 13).T
    for out in (torch.empty(13, 11), torch.empty(13, 11), torch.empty(13, 11), strided):
        write_effective_weight(weight, update, out, cache)
        assert torch.equal(out, expected_weight)


def test_stored_unmerged_weight_moves_with_the_model(folders):
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    model.merge_adapter()
    model.half()
    layer = model.base_model.model.blocks[0].attn.qkv
    assert layer._unmerged_weight.dtype == layer.base_layer.weight.dtype == torch.float16


def fused(groups, seed, kv_heads=4):
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.qkv = nn.Linear(8, 24)
    model.config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=kv_heads)
    model = get_peft_model(model, SnellaConfig(r=4, target_modules=["qkv"], qkv_groups=groups))
    return model.eval()


def test_adapters_with_other_rows_per_matrix_or_invalid_budgets_are_rejected(tmp_path):
    model = fused({"qkv": [8, 8, 8]}, 0)
    fused({"qkv": [12, 6, 6]}, 1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"qkv has matrices of \[12, 6, 6\] rows, but the model has \[8, 8, 8\]"):
        hotswap(model, tmp_path / "other")
    values = get_peft_model_state_dict(fused(3, 1))
    hotswap(model, values)
    budgets = next(name for name in values if name.endswith("snella_budget"))
    with pytest.raises(ValueError, match=r"qkv' must be .* from 0 to \[64, 64, 64\], got \[65, 8, 8\]"):
        hotswap(model, {**values, budgets: torch.tensor([65, 8, 8])})


def test_rows_of_auto_are_inferred_from_the_layers_parent(tmp_path):
    fused("auto", 1).save_pretrained(tmp_path / "equal")
    with pytest.raises(ValueError, match=r"qkv has matrices of \[8, 8, 8\] rows, but the model has \[12, 6, 6\]"):
        hotswap(fused({"qkv": [12, 6, 6]}, 0), tmp_path / "equal")
    fused("auto", 1, kv_heads=1).save_pretrained(tmp_path / "grouped")
    with pytest.raises(ValueError, match=r"qkv has matrices of \[16, 4, 4\] rows, but the model has \[8, 8, 8\]"):
        hotswap(fused(3, 0, kv_heads=1), tmp_path / "grouped")
    model = fused({"qkv": [16, 4, 4]}, 0, kv_heads=1)
    expected = hotswap(model, tmp_path / "grouped").tensors["base_model.model.qkv.snella_A"]
    assert torch.equal(model.base_model.model.qkv.snella_A["default"], expected)


def test_a_model_inside_another_module_is_swapped():
    outer = nn.Module()
    outer.net = fused(3, 0)
    values = get_peft_model_state_dict(fused(3, 1))
    hotswap(outer, values)
    assert torch.equal(
        outer.net.base_model.model.qkv.snella_A["default"], fused(3, 1).base_model.model.qkv.snella_A["default"]
    )


def test_swap_sets_the_scaling_of_the_new_adapter_after_set_scale(folders):
    model = PeftModel.from_pretrained(backbone(), folders["one"]).eval()
    for module in model.modules():
        if isinstance(module, SnellaLayer):
            module.set_scale("default", 0.5)
    hotswap(model, folders["one"])
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected(folders["one"]))
