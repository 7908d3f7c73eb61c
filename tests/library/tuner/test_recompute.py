"""Recomputed and int8-compressed inputs."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import get_peft_model, inject_adapter_in_model
from timm import layers as timm_layers
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook
from torch.utils.checkpoint import checkpoint
from transformers import DeiTConfig, DeiTForImageClassification, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from snella import SnellaConfig
from snella.layer import SnellaLayer
from snella.memory.origins import GROUP, Mark, decode, encode, origin_of
from snella.memory.recompute import can_recompute, mark_outputs, unmark_outputs

WIDTH = 12
BATCH = (GROUP // 4, 3, WIDTH)

SUPPORTED = {
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "layer-norm": nn.LayerNorm(WIDTH),
    "rms-norm": nn.RMSNorm(WIDTH),
    "timm-gelu": timm_layers.GELU(),
    "timm-gelu-tanh": timm_layers.GELUTanh(),
    "timm-quick-gelu": timm_layers.QuickGELU(),
    "timm-layer-norm": timm_layers.LayerNorm(WIDTH),
    "timm-rms-norm": timm_layers.RmsNorm(WIDTH),
    **{
        f"transformers-{name}": ACT2FN[name] for name in ("gelu", "gelu_new", "gelu_fast", "quick_gelu", "silu", "mish")
    },
}


def adapted(module, trained=False, **settings):
    """Return an adapted model of a linear layer, the module and a linear layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), copy.deepcopy(module), nn.Linear(WIDTH, 7))
    config = SnellaConfig(r=4, target_modules=["0", "2"], init_weights=False, **settings)
    model = get_peft_model(base, config).train()
    for parameter in model.base_model.model[1].parameters():
        parameter.requires_grad_(trained)
    return model


def step(model, x):
    """Return the gradients of one step by name, and the bytes of all saved storages except parameters."""
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).float().square().sum()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads, sum(saved.values())


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", SUPPORTED)
def test_recomputation_saves_less_with_identical_gradients(name, trained):
    x = torch.randn(5, 3, WIDTH)
    plain, saved = step(adapted(SUPPORTED[name], trained, recompute_inputs=False), x)
    recomputed, reduced = step(adapted(SUPPORTED[name], trained), x)
    assert_same_bits(plain, recomputed)
    # the output of the module, which only the second layer uses
    assert saved - reduced == x.nbytes


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), timm_layers.LayerNorm2d(6)], ids=lambda norm: type(norm).__name__
)
def test_convolutions_recompute_normalized_inputs(norm):
    def build(recompute):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), nn.Conv2d(6, 4, 3))
        config = SnellaConfig(r=2, target_modules=["0", "2"], init_weights=False, recompute_inputs=recompute)
        model = get_peft_model(base, config)
        model.base_model.model[1].eval()
        return model

    x = torch.randn(2, 3, 9, 9)
    plain, saved = step(build(False), x)
    recomputed, reduced = step(build(True), x)
    assert_same_bits(plain, recomputed)
    assert reduced < saved


def test_trained_batch_norm_is_not_recomputed():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)),
        SnellaConfig(r=2, target_modules=["2"], init_weights=False),
    ).train()
    norm = model.base_model.model[1]
    norm(torch.randn(2, 6, 4, 4, requires_grad=True))
    assert norm.num_batches_tracked == 1
    step(model, torch.randn(2, 3, 9, 9))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("test_vit", num_classes=3),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2),
        lambda: timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1)),
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=3, depths=(1, 1, 1, 1)),
    ],
    ids=["test-vit", "vit", "convnext", "swin"],
)
def test_full_models_save_less_with_identical_gradients(build):
    def adapt(recompute):
        torch.manual_seed(0)
        return get_peft_model(build(), SnellaConfig(r=2, recompute_inputs=recompute)).train()

    size = adapt(True).base_model.model.pretrained_cfg["input_size"][-1]
    model = adapt(True)
    grid = getattr(getattr(model.base_model.model, "patch_embed", None), "img_size", None)
    x = torch.randn(2, 3, *(grid or (size, size)))
    torch.manual_seed(1)
    plain, saved = step(adapt(False), x)
    torch.manual_seed(1)
    recomputed, reduced = step(model, x)
    assert_same_bits(plain, recomputed)
    assert reduced < 0.9 * saved


@pytest.mark.parametrize("kind", ["deit", "llama"])
def test_query_key_and_value_share_one_recomputation(kind, monkeypatch):
    if kind == "deit":
        shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        base, x = (
            DeiTForImageClassification(DeiTConfig(image_size=16, patch_size=8, **shape)),
            torch.randn(2, 3, 16, 16),
        )
        norm = next(module for name, module in base.named_modules() if name.endswith("layernorm_before"))
    else:
        shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        base, x = LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape)), torch.randint(0, 11, (2, 5))
        norm = base.model.layers[0].input_layernorm
    model = get_peft_model(base, SnellaConfig(r=2, init_weights=False)).train()
    # marks require a gradient, so let the embeddings require one
    base.enable_input_require_grads() if kind == "llama" else base.deit.embeddings.requires_grad_(True)
    calls = []
    forward = type(norm).forward

    def counted(self, *args):
        if self is norm:
            calls.append(torch.is_grad_enabled())
        return forward(self, *args)

    monkeypatch.setattr(type(norm), "forward", counted)
    model(x).logits.square().sum().backward()
    assert calls == [True, False]


def test_autocast_is_bit_identical():
    def train(recompute):
        model = adapted(nn.GELU(), recompute_inputs=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)).float().square().sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(train(False), train(True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_bit_identical(use_reentrant):
    def train(recompute):
        model = adapted(nn.LayerNorm(WIDTH), recompute_inputs=recompute)
        x = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH).requires_grad_()
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        return {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    assert_same_bits(train(False), train(True))


@pytest.mark.parametrize("compress", [False, True])
def test_repeated_backward_is_bit_identical(compress):
    model = adapted(nn.GELU(), compress_activations=compress)
    loss = model(torch.randn(BATCH)).square().sum()
    tensors = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compress", [False, True])
def test_module_change_before_backward_raises(compress):
    model = adapted(nn.LayerNorm(WIDTH), compress_activations=compress)
    loss = model(torch.randn(BATCH)).square().sum()
    with torch.no_grad():
        model.base_model.model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"LayerNorm.*was changed between .*; change it after backward\(\)$"):
        loss.backward()


class WritesData(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x):
        y = self.norm(x)
        y.data.add_(1)
        return self.linear(y)


def test_one_adapter_without_recomputation_disables_it_for_all():
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["linear"], "init_weights": False}
    model = get_peft_model(WritesData(), SnellaConfig(**settings, recompute_inputs=False)).train()
    x = torch.randn(BATCH, requires_grad=True)
    expected, _ = step(model, x)
    model.add_adapter("other", SnellaConfig(**settings))
    model.set_adapter("default")
    assert_same_bits(step(model, x)[0], expected)
    model.set_adapter("other")
    model.delete_adapter("default")
    _, saved = step(model, x)
    unmark_outputs(model)
    assert saved < step(model, x)[1]  # the other adapter recomputes its inputs


def test_module_change_before_use_disables_recomputation():
    norm, z = nn.LayerNorm(WIDTH), torch.randn(5, WIDTH, requires_grad=True)
    mark_outputs(norm)
    marked = norm(z)
    with torch.no_grad():
        norm.weight.mul_(2)
    assert origin_of(marked) == ((), None)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["gelu", "layer-norm", "batch-norm"])
def test_training_mode_can_change_between_passes(name, compress):
    def gradients(switches):
        model = adapted(
            nn.BatchNorm1d(WIDTH) if name == "batch-norm" else SUPPORTED[name], compress_activations=compress
        )
        model.eval()
        inner = model.base_model.model[1]
        loss = model(torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH)).square().sum()
        model.train(switches)
        loss.backward()
        assert inner.training is switches
        assert getattr(inner, "num_batches_tracked", None) in (None, torch.tensor(0))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(gradients(False), gradients(True))


def test_in_place_write_to_input_raises_torch_error():
    z = torch.randn(5, WIDTH, requires_grad=True)
    model = adapted(nn.GELU())
    copied = z * 1
    loss = model.base_model.model[2](model.base_model.model[1](copied)).square().sum()
    copied.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_unmodified_outputs_of_supported_modules_are_recomputed():
    norm, z = nn.LayerNorm(WIDTH), torch.randn(5, WIDTH, requires_grad=True)
    assert mark_outputs(norm) == 1
    assert mark_outputs(norm) == 1  # adds no second mark
    marked = norm(z)
    assert origin_of(marked)[0][0].data_ptr() == z.data_ptr()
    for other in (marked.view(5, WIDTH), marked[:3], marked + 0, marked.detach(), z, F.layer_norm(z, (WIDTH,))):
        assert origin_of(other) == ((), None)
    written = norm(z)
    written.mul_(2)
    assert origin_of(written) == ((), None)
    replaced = norm(z)
    replaced.data = replaced.data + 1
    assert origin_of(replaced) == ((), None)
    with torch.no_grad():
        assert origin_of(norm(z)) == ((), None)
    handle = norm.register_forward_hook(lambda module, args, output: output * 2)
    assert origin_of(norm(z)) == ((), None)
    handle.remove()
    unmark_outputs(norm)
    assert origin_of(norm(z)) == ((), None)


def test_random_and_unknown_modules_are_not_supported():
    class Noisy(nn.GELU):
        def forward(self, x):
            return super().forward(x) * torch.rand(())

    for module in (nn.Dropout(), nn.RReLU(), Noisy(), nn.ReLU(), nn.Identity()):
        assert not can_recompute(module)


def test_recomputation_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "snella.model"):
        adapted(nn.GELU())
    lines = [record.message for record in caplog.records if "recomputing" in record.message]
    assert lines == ["recomputing inputs of adapted layers from 1 normalizations and activations"]


def test_saved_outputs_load_without_their_mark(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = get_peft_model(base, SnellaConfig(r=2, target_modules=["0"]))
    output = model(torch.randn(2, 8))
    torch.save(output, tmp_path / "output.pt")
    loaded = torch.load(tmp_path / "output.pt")
    assert torch.equal(loaded, output) and Mark.on(loaded) is None and Mark.on(copy.deepcopy(output.detach())) is None


@pytest.mark.parametrize("compress", [False, True])
def test_copied_and_pickled_models_recompute(compress, tmp_path):
    model = adapted(nn.GELU(), compress_activations=compress)
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(BATCH)
    grads, saved = step(model, x)
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        repeated, same = step(other, x)
        assert_same_bits(grads, repeated)
        assert same == saved


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_unloaded_model_has_no_hooks(unload, compress):
    plain = getattr(adapted(nn.GELU(), compress_activations=compress), unload)()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


# compress_activations


def relative_error(grads, exact):
    """Return the relative error of the concatenated gradients."""
    difference = sum(float((grads[name] - grad).square().sum()) for name, grad in exact.items())
    return (difference / sum(float(grad.square().sum()) for grad in exact.values())) ** 0.5


def images_of(model):
    grid = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return torch.randn(2, 3, *grid)


@pytest.mark.parametrize("name", SUPPORTED)
def test_compression_has_exact_outputs_close_gradients_and_a_quarter_of_the_memory(name):
    x = torch.randn(BATCH)
    exact, saved = step(adapted(SUPPORTED[name]), x)
    compressed, reduced = step(adapted(SUPPORTED[name], compress_activations=True), x)
    assert torch.equal(adapted(SUPPORTED[name])(x), adapted(SUPPORTED[name], compress_activations=True)(x))
    assert relative_error(compressed, exact) < 0.03
    # one byte per entry and one scale per group; some modules save more than their input
    group = WIDTH if "norm" in name else GROUP
    assert saved - reduced >= x.nbytes - x.numel() * (1 + 4 / group)


def test_gradients_are_computed_at_rounded_input():
    module, z, weights = nn.LayerNorm(WIDTH), torch.randn(BATCH, requires_grad=True), torch.randn(BATCH)
    module.requires_grad_(False)
    mark_outputs(module, compress=lambda: True)
    (module(z) * weights).sum().backward()
    unmark_outputs(module)
    rounded = decode(*encode(z, by_row=True)).requires_grad_()
    (module(rounded) * weights).sum().backward()
    assert torch.equal(z.grad, rounded.grad)
    assert not torch.equal(rounded, z)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, timm_layers.RmsNorm])
@pytest.mark.parametrize("width", [12, 96])
def test_small_rows_keep_accurate_gradients(norm, width):
    module, weights = norm(width, eps=1e-12).requires_grad_(False), torch.randn(4, width)
    z = torch.randn(4, width) * torch.tensor([1.0, 1e-3, 0, 1.0])[:, None]
    grads = []
    for compress in (None, lambda: True):
        mark_outputs(module, compress=compress)
        x = z.clone().requires_grad_()
        (module(x) * weights).sum().backward()
        grads.append(x.grad)
    for exact, rounded in zip(*grads, strict=True):
        assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_activations_that_save_their_output_are_not_compressed():
    def run_step(compress):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        settings = dict(target_modules=["0", "3"], init_weights=False, compress_activations=compress)
        return step(get_peft_model(base, SnellaConfig(r=2, **settings)).eval(), torch.randn(2, 3, 9, 9))

    (exact, plain), (same, compressed) = run_step(False), run_step(True)
    assert compressed <= plain
    assert_same_bits(exact, same)


def test_trained_normalization_saves_exact_input():
    x = torch.randn(BATCH)
    exact, saved = step(adapted(nn.LayerNorm(WIDTH), trained=True), x)
    same, as_much = step(adapted(nn.LayerNorm(WIDTH), trained=True, compress_activations=True), x)
    assert_same_bits(exact, same)
    assert saved == as_much


@pytest.mark.parametrize(
    ("build", "share"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2), 0.63),
        (lambda: timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1)), 0.63),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=3, depths=(1, 1, 1, 1)),
            0.7,
        ),
    ],
    ids=["vit", "convnext", "swin"],
)
def test_compression_of_full_models_saves_memory_with_close_gradients(build, share):
    def adapt(**settings):
        torch.manual_seed(0)
        return get_peft_model(build(), SnellaConfig(r=2, **settings)).eval()

    x = images_of(build())
    exact, saved = step(adapt(), x)
    compressed, reduced = step(adapt(compress_activations=True), x)
    assert reduced < share * saved
    assert relative_error(compressed, exact) < 0.03


def test_compression_of_language_model_saves_memory_with_close_gradients():
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)

    def adapt(**settings):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape)), SnellaConfig(r=2, **settings))
        model.get_base_model().enable_input_require_grads()
        return _Logits(model).train()

    x = torch.randint(0, 11, (2, 8))
    exact, saved = step(adapt(), x)
    compressed, reduced = step(adapt(compress_activations=True), x)
    assert reduced < 0.85 * saved
    assert 0 < relative_error(compressed, exact) < 0.03


class _Logits(nn.Module):
    """Language model that returns logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits


def test_compression_under_autocast_has_close_gradients():
    def train(**settings):
        model = adapted(nn.GELU(), **settings)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.linspace(-1, 1, GROUP * WIDTH).view(GROUP, WIDTH)).float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert 0 < relative_error(train(compress_activations=True), train()) < 0.05


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_compression_under_gradient_checkpointing_is_bit_identical(use_reentrant):
    def train(is_checkpointed):
        model = adapted(nn.LayerNorm(WIDTH), compress_activations=True)
        x = torch.linspace(-1, 1, GROUP * WIDTH).view(GROUP, WIDTH).requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if is_checkpointed else model(x)
        y.square().sum().backward()
        return {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    assert_same_bits(train(False), train(True))


def test_other_hooks_see_original_inputs():
    x = torch.randn(BATCH)
    model, exact = adapted(nn.GELU(), compress_activations=True), adapted(nn.GELU())
    for adapted_model in (model, exact):
        adapted_model.base_model.model[1].register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(model(x), exact(x))
    assert 0 < relative_error(step(model, x)[0], step(exact, x)[0]) < 0.03
    for adapted_model in (model, exact):  # the hook changes the module's input, so it cannot be compressed
        adapted_model.base_model.model[1].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    assert_same_bits(step(exact, x)[0], step(model, x)[0])


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_modules_with_backward_hooks_save_exact_inputs(register):
    x, shapes = torch.randn(BATCH), []
    model, exact = adapted(nn.LayerNorm(WIDTH), compress_activations=True), adapted(nn.LayerNorm(WIDTH))
    for adapted_model in (model, exact):
        norm = adapted_model.base_model.model[1]
        getattr(norm, register)(lambda module, *grads: shapes.append([tuple(grad.shape) for (grad,) in grads]))
    assert_same_bits(step(model, x)[0], step(exact, x)[0])
    assert shapes[0] == shapes[1] and set(shapes[0]) == {BATCH}


@pytest.mark.parametrize(
    "register", [register_module_full_backward_hook, register_module_full_backward_pre_hook], ids=["post", "pre"]
)
def test_modules_save_exact_inputs_with_global_backward_hooks(register):
    x, shapes = torch.randn(BATCH, requires_grad=True), []

    def record(module, *grads):
        if isinstance(module, nn.LayerNorm):
            shapes.append([None if grad is None else tuple(grad.shape) for (grad,) in grads])

    model, exact = adapted(nn.LayerNorm(WIDTH), compress_activations=True), adapted(nn.LayerNorm(WIDTH))
    handle = register(record)
    try:
        assert_same_bits(step(model, x)[0], step(exact, x)[0])
    finally:
        handle.remove()
    assert shapes[0] == shapes[1] and set(shapes[0]) == {BATCH}


def test_compression_requires_all_active_adapters():
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 7)
    )
    settings = {"r": 4, "init_weights": False}
    model = get_peft_model(base, SnellaConfig(target_modules=["2"], compress_activations=True, **settings)).train()
    model.add_adapter("other", SnellaConfig(target_modules=["4"], compress_activations=False, **settings))
    x, saved = torch.randn(BATCH), []
    for compress in (False, True):
        model.base_model.model[4].snella_config["other"].compress_activations = compress
        model.base_model.set_adapter(["default", "other"])
        saved.append(step(model, x)[1])
    assert saved[1] < saved[0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("add", ["get_peft_model", "inject_adapter_in_model"])
@pytest.mark.parametrize("first", [False, True])
def test_inactive_adapters_do_not_affect_compression(first, add):
    """Activations are compressed only if all active adapters set `compress_activations`."""

    def config(compress):
        targets = ["0", "2"] if compress is first else ["0"]
        return SnellaConfig(r=4, target_modules=targets, init_weights=False, compress_activations=compress)

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))
    if add == "get_peft_model":
        model = get_peft_model(base, config(first)).train()
        model.add_adapter("other", config(not first))
        choose = model.base_model.set_adapter
    else:
        inject_adapter_in_model(config(first), base, "default")
        model = inject_adapter_in_model(config(not first), base, "other").train()

        def choose(names):
            for module in model.modules():
                if isinstance(module, SnellaLayer):
                    module.set_adapter(names)

    x = torch.randn(BATCH)
    saved = {}
    for names in ("default", "other", ["default", "other"], "default"):
        choose(names)
        saved[str(names)] = step(model, x)[1]
    compressed, plain = (saved["default"], saved["other"]) if first else (saved["other"], saved["default"])
    assert compressed < plain
    # one active adapter without compression disables compression
    assert saved["['default', 'other']"] >= plain


def test_compiled_model_disables_compression():
    x = torch.randn(BATCH)
    exact, compressed = adapted(nn.GELU()), adapted(nn.GELU(), compress_activations=True)
    for model in (exact, compressed):
        torch.compile(model, backend="eager")(x).square().sum().backward()
    grads, same = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in (exact, compressed)
    )
    assert "base_model.model.0.snella_A.default" in grads
    assert_same_bits(grads, same)


def test_compression_requires_recomputation():
    with pytest.raises(ValueError, match="compress_activations=True requires recompute_inputs=True"):
        SnellaConfig(compress_activations=True, recompute_inputs=False)
    with pytest.raises((TypeError, ValueError), match="compress_activations"):
        SnellaConfig(compress_activations="int8")
