"""Tracking of operations between a normalization or activation and an adapted layer."""

import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import FeedForward
from peft import get_peft_model
from timm.layers import GluMlp, SwiGLU
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamModel,
    SwinConfig,
    SwinForImageClassification,
    VitDetConfig,
    VitDetModel,
)

from snella import SnellaConfig
from snella.memory.origins import GROUP, decode, encode, origin_of
from snella.memory.recompute import can_track, mark_outputs, unmark_outputs

from .test_recompute import assert_same_bits, relative_error, step

WIDTH = 24


class Call(nn.Module):
    """Model wrapped as a function from one tensor to one tensor."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model, x).sin()  # a plain sum of squares has no gradient through a normalization


def gated(kind):
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(WIDTH, 2 * WIDTH, act_layer=nn.SiLU))
    return base, lambda model, x: model(x), torch.randn(16, 16, WIDTH)


def llama():
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=88)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape))
    base.enable_input_require_grads()
    return base, lambda model, x: model(input_ids=x, use_cache=False).logits, torch.randint(0, 11, (2, 8))


def dinov2():
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    base = Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **shape))
    return base, lambda model, x: model(x).last_hidden_state, torch.randn(2, 3, 28, 28)


def vit():
    base = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2, embed_dim=64, num_heads=2)
    return base, lambda model, x: model(x), torch.randn(8, 3, 64, 64)


def timm_swin():
    base = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=3, depths=(2, 2, 1, 1))
    return base, lambda model, x: model(x), torch.randn(2, 3, 56, 56)


def transformers_swin():
    base = SwinForImageClassification(SwinConfig(image_size=56, embed_dim=16, depths=[2, 2], num_heads=[2, 4]))
    return base, lambda model, x: model(x).logits, torch.randn(2, 3, 56, 56)


def sam():
    vision = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8)
    vision |= dict(window_size=5, global_attn_indexes=[2], mlp_dim=64, output_channels=8)
    base = SamModel(SamConfig(vision_config=vision)).vision_encoder
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    return base, lambda model, x: model(x).last_hidden_state, torch.randn(2, 3, 64, 64)


def vitdet():
    shape = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=64, pretrain_image_size=64)
    base = VitDetModel(VitDetConfig(patch_size=8, window_size=3, window_block_indices=[0, 1, 2], **shape))
    return base, lambda model, x: model(x).last_hidden_state, torch.randn(2, 3, 64, 64)


def geglu():
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), FeedForward(WIDTH, activation_fn="geglu"))
    return base, lambda model, x: model(x), torch.randn(16, 16, WIDTH)


def sd3():
    base = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    text, pooled, timestep = torch.randn(2, 5, 32), torch.randn(2, 16), torch.tensor([3.0, 500.0])

    def run(model, x):
        return model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep).sample

    return base, run, torch.randn(2, 4, 8, 8)


LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "timm-swiglu": (lambda: gated(SwiGLU), ["0", "fc1_g", "fc1_x", "fc2"]),
    "timm-glu": (lambda: gated(GluMlp), ["0", "fc1", "fc2"]),
    "llama": (llama, LLAMA_LAYERS),
    "dinov2": (dinov2, LLAMA_LAYERS),
    "vit": (vit, ["qkv", "proj", "fc1", "fc2"]),
    "timm-swin": (timm_swin, ["qkv", "proj", "fc1", "fc2"]),
    "transformers-swin": (transformers_swin, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]),
    "sam": (sam, ["qkv", "proj", "lin1", "lin2"]),
    "vitdet": (vitdet, ["qkv", "proj", "fc1", "fc2"]),
    "geglu": (geglu, r"0|1\.net\.0\.proj|1\.net\.2"),
    "sd3": (sd3, r".*\.(to_q|to_k|to_v|to_out\.0|add_._proj|to_add_out|net\.0\.proj|net\.2)"),
}


def adapted(kind, **settings):
    """Create an adapted model and a batch."""
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    base, run, x = make()
    model = get_peft_model(base, SnellaConfig(r=2, target_modules=targets, init_weights=False, **settings)).train()
    return Call(model, run), x


def without_tracking(monkeypatch):
    monkeypatch.setattr("snella.memory.recompute.can_track", lambda module, compress: False)


def seeded_step(model, x):
    """Run `step` with reproducible stochastic depth."""
    torch.manual_seed(1)
    return step(model, x)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "vit"])
def test_tracked_blocks_save_less_with_identical_gradients(kind, monkeypatch):
    model, x = adapted(kind)
    tracked, reduced = seeded_step(model, x)
    plain, maximum = seeded_step(*adapted(kind, recompute_inputs=False))
    without_tracking(monkeypatch)
    _, baseline = seeded_step(*adapted(kind))
    assert_same_bits(plain, tracked)
    assert reduced < 0.97 * baseline
    assert reduced < 0.83 * maximum
    assert any(can_track(module, compress=False) for module in model.modules())


# maximum fraction of the exact activation memory; attention in SAM and timm's Swin is not a single op
SHARES = {
    **{"timm-swiglu": 0.66, "timm-glu": 0.78, "vit": 0.53, "llama": 0.38, "dinov2": 0.38},
    **{"timm-swin": 0.62, "transformers-swin": 0.46, "sam": 0.86, "sd3": 0.47},
}


@pytest.mark.parametrize("kind", SHARES)
def test_compression_has_exact_outputs_and_close_gradients(kind):
    model, x = adapted(kind)
    compressed, _ = adapted(kind, compress_activations=True)
    outputs = []
    for module in (model, compressed):
        torch.manual_seed(1)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    exact, saved = seeded_step(model, x)
    grads, reduced = seeded_step(compressed, x)
    assert reduced < SHARES[kind] * saved
    assert 0 < relative_error(grads, exact) < 0.05


@pytest.mark.parametrize("settings", [{}, {"compress_activations": True}], ids=["exact", "int8"])
def test_gated_blocks_under_checkpointing_are_bit_identical(settings):
    def train(is_checkpointed):
        model, x = adapted("timm-swiglu", **settings)
        y = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        y.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(train(False), train(True))


@pytest.mark.parametrize("settings", [{}, {"compress_activations": True}], ids=["exact", "int8"])
def test_repeated_backward_through_gated_block_is_bit_identical(settings):
    model, x = adapted("timm-swiglu", **settings)
    loss = model(x).square().sum()
    tensors = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(a, b)


def test_gated_block_under_autocast_is_bit_identical():
    def train(**settings):
        model, x = adapted("llama", **settings)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(train(recompute_inputs=False), train())


def test_compiled_gated_block_disables_tracking():
    def train(recompute):
        model, x = adapted("timm-swiglu", recompute_inputs=recompute)
        torch.compile(model, backend="eager", fullgraph=True)(x).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(train(False), train(True))


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.randn(1, 1, 6, 6)},
    "scale": {"scale": 0.3},
}


class Attention(timm.layers.Attention):
    """Attention with fixed inputs."""

    __module__, __qualname__ = timm.layers.Attention.__module__, timm.layers.Attention.__qualname__

    def __init__(self, **options):
        super().__init__(GROUP)
        self.options = options

    def forward(self, *inputs):
        return F.scaled_dot_product_attention(*inputs, **self.options)


def make_heads(requires_grad=(True, True, True)):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 6, GROUP, requires_grad=flags) for flags in requires_grad]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("requires_grad", [(True, True, True), (True, False, False)], ids=["self", "cross"])
def test_attention_saves_inputs_in_int8(name, requires_grad):
    attention, inputs = Attention(**ATTENTION[name]), make_heads(requires_grad)
    exact = attention(*inputs)
    mark_outputs(attention, compress=lambda: True)
    y = attention(*inputs)
    assert torch.equal(y, exact)
    (y.sin().sum()).backward()
    rounded = [decode(*encode(z)).requires_grad_() if z.requires_grad else z for z in inputs]
    repeated = F.scaled_dot_product_attention(*rounded, **ATTENTION[name])
    repeated.backward(exact.detach().cos())
    for actual, reference in zip(inputs, rounded, strict=True):
        assert (actual.grad is None) == (not actual.requires_grad)
        assert actual.grad is None or torch.equal(actual.grad, reference.grad)
    saved, origin = origin_of(y)
    assert [tensor.dtype == torch.uint8 for tensor in saved] == [*requires_grad, *([False] * (len(saved) - 3))]
    origin.add_user()
    assert torch.equal(origin.compute(saved), repeated)


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"attn_mask": torch.zeros(6, 6, requires_grad=True)}])
def test_attention_with_dropout_or_trainable_mask_is_not_compressed(options):
    attention, inputs = Attention(**options), make_heads()
    mark_outputs(attention, compress=lambda: True)
    assert origin_of(attention(*inputs)) == ((), None)
    mark_outputs(exact := Attention())
    assert origin_of(exact(*inputs)) == ((), None)


class Block(GluMlp):
    """Tracked block that applies a function."""

    __module__, __qualname__ = GluMlp.__module__, GluMlp.__qualname__

    def __init__(self, function):
        super().__init__(WIDTH)
        self.norm, self.function = nn.LayerNorm(WIDTH), function

    def forward(self, z):
        return self.function(self.norm(z))


def run_block(function, z=None):
    """Return the block's output for an input with a gradient."""
    block = Block(function)
    mark_outputs(block)
    return block(torch.randn(2, 8, WIDTH, requires_grad=True) if z is None else z)


SCALE = torch.randn(2, 1, WIDTH)
RECOMPUTED = {
    "windows": lambda x: torch.roll(x.view(2, 2, 4, WIDTH), (1, 1), (1, 2)).permute(0, 2, 1, 3).reshape(16, WIDTH),
    "padding": lambda x: F.pad(x, (0, 0, 0, 3)).transpose(1, 2).contiguous().flatten(1),
    "modulation": lambda x: x * (1 + SCALE) + SCALE,
    "modulation-with-gradient": lambda x: x * (1 + SCALE.clone().requires_grad_()) + SCALE,
    "numbers": lambda x: 2 * (3 + x) * 0.5 + 1,
    "gate": lambda x: x.sin() * F.silu(x),
    "product-from-the-right": lambda x: x.cos() * x,
}
UNCHANGED = {
    "large-sum": lambda x: x + x.sin(),
    "slice": lambda x: x[:, 1:],
    "broadcast-output": lambda x: x[:, :1] * torch.randn(2, 8, WIDTH),
    "other-dtype": lambda x: x * SCALE.double(),
    "in-place": lambda x: x.mul_(2),
    "in-place-activation": lambda x: F.silu(x + 0, inplace=True),
    "unknown": lambda x: x.tanh(),
    "written-to": lambda x: x.view(16, WIDTH).add_(1),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_tracked_operations_are_recomputed_bit_identically(name):
    x = run_block(RECOMPUTED[name])
    saved, origin = origin_of(x)
    origin.add_user()
    repeated = origin.compute(saved)
    assert torch.equal(repeated, x)
    assert repeated.stride() == x.stride()
    assert not repeated.requires_grad


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_operations_are_not_marked(name):
    assert origin_of(run_block(UNCHANGED[name])) == ((), None)


@pytest.mark.parametrize("shape", [(2, 8, WIDTH), (2, 1, WIDTH), (WIDTH,)])
def test_product_gradients_equal_autograd(shape):
    z, second = torch.randn(2, 8, WIDTH, requires_grad=True), torch.randn(shape, requires_grad=True)
    block = Block(lambda x: second * x)
    grads = []
    for set_tracking in (mark_outputs, unmark_outputs):
        set_tracking(block)
        grads.append(torch.autograd.grad(block(z).sin().sum(), (z, second)))
    for actual, reference in zip(*grads, strict=True):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize("is_first", [False, True])
def test_compressed_second_factor_is_freed(is_first):
    second_factors = [torch.randn(2, 8, WIDTH, requires_grad=True) * 1]
    is_alive = weakref.ref(second_factors[0])
    block = Block(lambda x: second_factors.pop() * F.gelu(x) if is_first else F.gelu(x) * second_factors.pop())
    mark_outputs(block, compress=lambda: True)
    y = block(torch.randn(2, 8, WIDTH, requires_grad=True))
    assert is_alive() is None
    y.sum().backward()


def test_write_to_second_factor_raises_torch_error():
    second = torch.randn(2, 8, WIDTH, requires_grad=True) * 1
    y = run_block(lambda x: x * second)
    second.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_mismatched_shapes_raise_torch_error():
    with pytest.raises(RuntimeError, match=r"size of tensor a \(24\) must match the size of tensor b \(5\)"):
        run_block(lambda x: x * torch.randn(2, 8, 5))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cos().transpose(1, 2).contiguous().transpose(1, 2) * x,
        lambda x: F.gelu(input=x),
        lambda x: torch.roll(input=x, shifts=1, dims=1),
        lambda x: torch.flatten(input=x, start_dim=1),
    ],
    ids=["layout-of-first-factor", "gelu", "roll", "flatten"],
)
def test_tracking_does_not_change_outputs(function):
    z = torch.randn(2, 8, WIDTH, requires_grad=True)
    block = Block(function)
    plain = block(z)
    mark_outputs(block)
    assert torch.equal(block(z), plain)
    assert block(z).stride() == plain.stride()


def test_summands_can_change_and_outputs_can_be_pickled(tmp_path):
    shift = torch.randn(WIDTH)
    y = run_block(lambda x: x + shift)
    saved, origin = origin_of(y)
    expected = y.detach().clone()
    shift.zero_()
    origin.add_user()
    assert torch.equal(origin.compute(saved), expected)
    y.sum().backward()
    torch.save(y, tmp_path / "y.pt")
    assert origin_of(torch.load(tmp_path / "y.pt", weights_only=False)) == ((), None)


@pytest.mark.parametrize("is_disabled", [False, True])
def test_double_backward_raises(is_disabled):
    model, x = adapted("timm-swiglu")
    x.requires_grad_()
    with model.model.disable_adapter() if is_disabled else nullcontext():
        loss = (model(x) * torch.linspace(0, 1, WIDTH)).sum()
        with pytest.raises(
            RuntimeError, match="create_graph=True is not supported: this backward pass is not differentiable"
        ):
            torch.autograd.grad(loss, x, create_graph=True)


def test_keyboard_interrupt_ends_tracking():
    def interrupt(x):
        raise KeyboardInterrupt

    block = Block(interrupt)
    mark_outputs(block, compress=lambda: True)
    with pytest.raises(KeyboardInterrupt):
        block(torch.randn(2, 8, WIDTH, requires_grad=True))
    x = torch.randn(3, requires_grad=True)
    assert origin_of(F.gelu(x)) == ((), None)
    assert origin_of(run_block(RECOMPUTED["windows"]))[1] is not None
    assert origin_of(F.gelu(x)) == ((), None)
    while (mode := _get_current_function_mode()) is not None:  # the mode remains, without effect
        mode.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo inspects it
def test_compiled_part_of_tracked_block_is_not_tracked():
    part = torch.compile(lambda x: F.gelu(x.view(16, WIDTH)) * 2, backend="eager", fullgraph=True)
    z = torch.randn(2, 8, WIDTH, requires_grad=True)
    block = Block(part)
    plain = block(z)
    mark_outputs(block)
    assert torch.equal(block(z), plain)


class Checkpointed(SwiGLU):
    """Block that checkpoints a part of itself."""

    __module__, __qualname__ = SwiGLU.__module__, SwiGLU.__qualname__

    def __init__(self):
        super().__init__(WIDTH, 2 * WIDTH)
        self.own_norm = nn.LayerNorm(2 * WIDTH)

    def forward(self, x):
        gate = self.fc1_g(x)
        rows = self.own_norm(gate).view(-1, gate.shape[-1])
        part = checkpoint(lambda a, b: self.fc2(self.act(a) * b.view_as(a)), gate, rows, use_reentrant=False)
        return part + self.fc2(F.silu(gate) * self.fc1_x(x))


@pytest.mark.parametrize("compress", [False, True])
def test_part_of_tracked_block_can_be_checkpointed(compress):
    def train(**settings):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(WIDTH, WIDTH), Checkpointed())
        targets = ["0", "fc1_g", "fc1_x", "fc2"]
        model = get_peft_model(base, SnellaConfig(r=2, target_modules=targets, init_weights=False, **settings)).train()
        model(torch.randn(3, 5, WIDTH)).sin().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = train(recompute_inputs=False)
    if compress:
        assert 0 < relative_error(train(compress_activations=True), exact) < 0.05
    else:
        assert_same_bits(exact, train())


@pytest.mark.parametrize("settings", [{}, {"compress_activations": True}], ids=["exact", "int8"])
@pytest.mark.parametrize("part", ["attn", "ff", "ff_context"])
def test_tracked_block_can_be_inside_checkpointed_part_of_another_block(part, settings):
    def train(is_checkpointed):
        model, x = adapted("sd3", **settings)
        for block in model.model.base_model.model.transformer_blocks if is_checkpointed else ():
            module = getattr(block, part)
            if module is not None:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        model(x).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, repeated = train(False), train(True)
    assert relative_error(repeated, plain) < (0.05 if settings else 1e-6)


def test_checkpointed_layer_frees_recomputed_input_after_backward():
    linear = get_peft_model(nn.Sequential(nn.Linear(WIDTH, 3)), SnellaConfig(r=2, target_modules=["0"])).train()
    x = run_block(RECOMPUTED["windows"])
    origin = origin_of(x)[1]
    y = checkpoint(linear, x, use_reentrant=False)
    y.sum().backward()
    assert origin._output is None
    assert origin.source._output is None


def heads_first(x):
    return x.view(2, 8, 2, WIDTH // 2).transpose(1, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.scaled_dot_product_attention(*[heads_first(x)] * 3).transpose(1, 2).contiguous(),
        lambda x: F.gelu(x.transpose(1, 2)).transpose(1, 2).contiguous(),
    ],
    ids=["attention", "gelu"],
)
def test_compression_preserves_memory_layouts(function):
    block, linear = Block(lambda x: function(linear(x)).view(2, 8, WIDTH)), nn.Linear(WIDTH, WIDTH)
    mark_outputs(block, compress=lambda: True)
    y = block(torch.randn(2, 8, WIDTH, requires_grad=True))
    saved, origin = origin_of(y)
    origin.add_user()
    repeated = origin.compute(saved)
    assert repeated.stride() == y.stride()
    torch.testing.assert_close(repeated, y, rtol=0, atol=0.05)
    y.sum().backward()


def test_copies_of_tracked_block_run_their_own_forward_pass():
    block = Block(lambda x: x.view(16, WIDTH))
    mark_outputs(block)
    replica = block._replicate_for_data_parallel()
    replica.function = lambda x: x.view(8, 2 * WIDTH)
    x = replica(torch.randn(2, 8, WIDTH, requires_grad=True))
    assert x.shape == (8, 2 * WIDTH)
    assert origin_of(x)[1] is not None


def test_operations_outside_tracked_blocks_are_not_tracked():
    norm, z = nn.LayerNorm(WIDTH), torch.randn(2, 8, WIDTH, requires_grad=True)
    mark_outputs(norm)
    assert origin_of(norm(z).view(16, WIDTH)) == ((), None)
    with torch.no_grad():
        assert origin_of(run_block(RECOMPUTED["windows"])) == ((), None)


def test_tracking_ends_after_an_exception():
    def fail(x):
        assert _get_current_function_mode() is not None
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_block(fail)
    assert _get_current_function_mode() is None
    inner = Block(lambda x: x * 2)
    mark_outputs(inner)
    assert origin_of(run_block(lambda x: inner(x)))[1] is not None
    assert _get_current_function_mode() is None


def test_unloaded_model_has_no_tracking():
    model, _ = adapted("timm-swiglu", compress_activations=True)
    plain = model.model.unload()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called
        for module in plain.modules()
    )


def test_autocast_does_not_save_recomputed_inputs():
    def saved_bytes(**settings):
        model, x = adapted("vit", **settings)
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, x)[1]

    # three of four bfloat16 inputs per block are recomputed; attention saves the fourth
    wide, blocks, images, tokens = 64, 2, 8, 17
    saved = saved_bytes(recompute_inputs=False) - saved_bytes()
    assert saved >= 2 * (wide + wide + 4 * wide) * blocks * images * tokens
