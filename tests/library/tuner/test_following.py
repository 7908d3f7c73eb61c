"""What becomes of a normalization's or an activation's output on its way to an adapted layer is computed again too."""

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
from snella.memory.compression import GROUP, decode, encode
from snella.memory.origins import origin_of
from snella.memory.recompute import can_follow, mark_outputs, unmark_outputs

from .test_recompute import assert_same_bits, relative_error, step

WIDTH = 24


class Call(nn.Module):
    """A model as a function of one tensor to one tensor."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model, x).sin()  # a sum of squares alone has no gradient behind a normalization


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


def swin_of_timm():
    base = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=3, depths=(2, 2, 1, 1))
    return base, lambda model, x: model(x), torch.randn(2, 3, 56, 56)


def swin_of_transformers():
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
    "timm-swin": (swin_of_timm, ["qkv", "proj", "fc1", "fc2"]),
    "transformers-swin": (swin_of_transformers, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]),
    "sam": (sam, ["qkv", "proj", "lin1", "lin2"]),
    "vitdet": (vitdet, ["qkv", "proj", "fc1", "fc2"]),
    "geglu": (geglu, r"0|1\.net\.0\.proj|1\.net\.2"),
    "sd3": (sd3, r".*\.(to_q|to_k|to_v|to_out\.0|add_._proj|to_add_out|net\.0\.proj|net\.2)"),
}


def adapted(kind, **settings):
    """A model with adapted layers, as a function, and a batch."""
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    base, run, x = make()
    model = get_peft_model(base, SnellaConfig(r=2, target_modules=targets, init_weights=False, **settings)).train()
    return Call(model, run), x


def without_following(monkeypatch):
    monkeypatch.setattr("snella.memory.recompute.can_follow", lambda module, compress: False)


def seeded_step(model, x):
    """`step`, with the same stochastic depth each time."""
    torch.manual_seed(1)
    return step(model, x)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "vit"])
def test_blocks_keep_less_and_gradients_have_the_same_bits(kind, monkeypatch):
    model, x = adapted(kind)
    followed, less = seeded_step(model, x)
    plain, most = seeded_step(*adapted(kind, recompute_inputs=False))
    without_following(monkeypatch)
    _, more = seeded_step(*adapted(kind))
    assert_same_bits(plain, followed)
    assert less < 0.97 * more
    assert less < 0.83 * most
    assert any(can_follow(module) for module in model.modules())


# at most so much of what is kept exactly; the attention of SAM and of timm's Swin is no single operation
SHARES = {
    **{"timm-swiglu": 0.66, "timm-glu": 0.78, "vit": 0.53, "llama": 0.38, "dinov2": 0.38},
    **{"timm-swin": 0.62, "transformers-swin": 0.46, "sam": 0.86, "sd3": 0.47},
}


@pytest.mark.parametrize("kind", SHARES)
def test_with_eight_bits_outputs_are_exact_and_gradients_near(kind):
    model, x = adapted(kind)
    compressed, _ = adapted(kind, compress_activations=True)
    outputs = []
    for one in (model, compressed):
        torch.manual_seed(1)
        outputs.append(one(x))
    assert torch.equal(*outputs)
    exact, kept = seeded_step(model, x)
    grads, less = seeded_step(compressed, x)
    assert less < SHARES[kind] * kept
    assert 0 < relative_error(grads, exact) < 0.05


@pytest.mark.parametrize("settings", [{}, {"compress_activations": True}], ids=["exact", "eight-bits"])
def test_gated_blocks_under_gradient_checkpointing_have_the_same_bits(settings):
    def train(is_checkpointed):
        model, x = adapted("timm-swiglu", **settings)
        y = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        y.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(train(False), train(True))


@pytest.mark.parametrize("settings", [{}, {"compress_activations": True}], ids=["exact", "eight-bits"])
def test_two_backward_passes_over_a_gated_block_give_the_same_bits(settings):
    model, x = adapted("timm-swiglu", **settings)
    loss = model(x).square().sum()
    tensors = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_a_gated_block_s_bits_again():
    def train(**settings):
        model, x = adapted("llama", **settings)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(train(recompute_inputs=False), train())


def test_a_compiled_gated_block_steps_aside():
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
    """Attention as a test calls it."""

    __module__, __qualname__ = timm.layers.Attention.__module__, timm.layers.Attention.__qualname__

    def __init__(self, **options):
        super().__init__(GROUP)
        self.options = options

    def forward(self, *inputs):
        return F.scaled_dot_product_attention(*inputs, **self.options)


def heads(requires_grad=(True, True, True)):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 6, GROUP, requires_grad=learns) for learns in requires_grad]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("learning", [(True, True, True), (True, False, False)], ids=["self", "cross"])
def test_attention_keeps_what_it_is_computed_from_in_eight_bits(name, learning):
    attention, inputs = Attention(**ATTENTION[name]), heads(learning)
    exact = attention(*inputs)
    mark_outputs(attention, compress=lambda: True)
    y = attention(*inputs)
    assert torch.equal(y, exact)
    (y.sin().sum()).backward()
    rounded = [decode(*encode(z)).requires_grad_() if z.requires_grad else z for z in inputs]
    again = F.scaled_dot_product_attention(*rounded, **ATTENTION[name])
    again.backward(exact.detach().cos())
    for mine, own in zip(inputs, rounded, strict=True):
        assert (mine.grad is None) == (not mine.requires_grad)
        assert mine.grad is None or torch.equal(mine.grad, own.grad)
    kept, origin = origin_of(y)
    assert [one.dtype == torch.uint8 for one in kept] == [*learning, *([False] * (len(kept) - 3))]
    origin.add_user()
    assert torch.equal(origin.compute(kept), again)


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"attn_mask": torch.zeros(6, 6, requires_grad=True)}])
def test_attention_that_draws_or_learns_its_mask_keeps_what_it_does(options):
    attention, inputs = Attention(**options), heads()
    mark_outputs(attention, compress=lambda: True)
    assert origin_of(attention(*inputs)) == ((), None)
    mark_outputs(exact := Attention())
    assert origin_of(exact(*inputs)) == ((), None)


class Block(GluMlp):
    """A followed block that does what a test says."""

    __module__, __qualname__ = GluMlp.__module__, GluMlp.__qualname__

    def __init__(self, function):
        super().__init__(WIDTH)
        self.norm, self.function = nn.LayerNorm(WIDTH), function

    def forward(self, z):
        return self.function(self.norm(z))


def outcome(function, z=None):
    """What the block gives for an input with a gradient."""
    block = Block(function)
    mark_outputs(block)
    return block(torch.randn(2, 8, WIDTH, requires_grad=True) if z is None else z)


SCALE = torch.randn(2, 1, WIDTH)
MADE_AGAIN = {
    "windows": lambda x: torch.roll(x.view(2, 2, 4, WIDTH), (1, 1), (1, 2)).permute(0, 2, 1, 3).reshape(16, WIDTH),
    "padding": lambda x: F.pad(x, (0, 0, 0, 3)).transpose(1, 2).contiguous().flatten(1),
    "modulation": lambda x: x * (1 + SCALE) + SCALE,
    "modulation-with-gradient": lambda x: x * (1 + SCALE.clone().requires_grad_()) + SCALE,
    "numbers": lambda x: 2 * (3 + x) * 0.5 + 1,
    "gate": lambda x: x.sin() * F.silu(x),
    "product-from-the-right": lambda x: x.cos() * x,
}
LEFT_ALONE = {
    "large-sum": lambda x: x + x.sin(),
    "slice": lambda x: x[:, 1:],
    "broadcast-output": lambda x: x[:, :1] * torch.randn(2, 8, WIDTH),
    "other-dtype": lambda x: x * SCALE.double(),
    "in-place": lambda x: x.mul_(2),
    "in-place-activation": lambda x: F.silu(x + 0, inplace=True),
    "unknown": lambda x: x.tanh(),
    "written-to": lambda x: x.view(16, WIDTH).add_(1),
}


@pytest.mark.parametrize("name", MADE_AGAIN)
def test_what_is_followed_is_computed_again_to_the_same_bits(name):
    x = outcome(MADE_AGAIN[name])
    kept, origin = origin_of(x)
    origin.add_user()
    again = origin.compute(kept)
    assert torch.equal(again, x)
    assert again.stride() == x.stride()
    assert not again.requires_grad


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_computed_again_or_saves_nothing_is_left_alone(name):
    assert origin_of(outcome(LEFT_ALONE[name])) == ((), None)


@pytest.mark.parametrize("shape", [(2, 8, WIDTH), (2, 1, WIDTH), (WIDTH,)])
def test_gradients_of_a_product_are_autograd_s_own(shape):
    z, second = torch.randn(2, 8, WIDTH, requires_grad=True), torch.randn(shape, requires_grad=True)
    block = Block(lambda x: second * x)
    grads = []
    for follow in (mark_outputs, unmark_outputs):
        follow(block)
        grads.append(torch.autograd.grad(block(z).sin().sum(), (z, second)))
    for mine, own in zip(*grads, strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize("is_first", [False, True])
def test_with_eight_bits_a_second_factor_is_held_by_nothing_else(is_first):
    seconds = [torch.randn(2, 8, WIDTH, requires_grad=True) * 1]
    held = weakref.ref(seconds[0])
    block = Block(lambda x: seconds.pop() * F.gelu(x) if is_first else F.gelu(x) * seconds.pop())
    mark_outputs(block, compress=lambda: True)
    y = block(torch.randn(2, 8, WIDTH, requires_grad=True))
    assert held() is None
    y.sum().backward()


def test_a_second_factor_that_was_written_to_is_torch_s_own_error():
    second = torch.randn(2, 8, WIDTH, requires_grad=True) * 1
    y = outcome(lambda x: x * second)
    second.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_shapes_that_do_not_fit_are_torch_s_own_error():
    with pytest.raises(RuntimeError, match=r"size of tensor a \(24\) must match the size of tensor b \(5\)"):
        outcome(lambda x: x * torch.randn(2, 8, 5))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cos().transpose(1, 2).contiguous().transpose(1, 2) * x,
        lambda x: F.gelu(input=x),
        lambda x: torch.roll(input=x, shifts=1, dims=1),
        lambda x: torch.flatten(input=x, start_dim=1),
    ],
    ids=["layout-of-the-first", "gelu", "roll", "flatten"],
)
def test_a_followed_function_gives_what_it_gives_else(function):
    z = torch.randn(2, 8, WIDTH, requires_grad=True)
    block = Block(function)
    plain = block(z)
    mark_outputs(block)
    assert torch.equal(block(z), plain)
    assert block(z).stride() == plain.stride()


def test_summands_may_be_written_to_and_outputs_stored(tmp_path):
    shift = torch.randn(WIDTH)
    y = outcome(lambda x: x + shift)
    kept, origin = origin_of(y)
    expected = y.detach().clone()
    shift.zero_()
    origin.add_user()
    assert torch.equal(origin.compute(kept), expected)
    y.sum().backward()
    torch.save(y, tmp_path / "y.pt")
    assert origin_of(torch.load(tmp_path / "y.pt", weights_only=False)) == ((), None)


@pytest.mark.parametrize("is_disabled", [False, True])
def test_second_derivatives_are_refused_and_not_lost(is_disabled):
    model, x = adapted("timm-swiglu")
    x.requires_grad_()
    with model.model.disable_adapter() if is_disabled else nullcontext():
        loss = (model(x) * torch.linspace(0, 1, WIDTH)).sum()
        with pytest.raises(
            RuntimeError, match="create_graph=True is not supported: this backward pass is not differentiable"
        ):
            torch.autograd.grad(loss, x, create_graph=True)


def test_interrupted_blocks_end_too():
    def interrupt(x):
        raise KeyboardInterrupt

    block = Block(interrupt)
    mark_outputs(block, compress=lambda: True)
    with pytest.raises(KeyboardInterrupt):
        block(torch.randn(2, 8, WIDTH, requires_grad=True))
    x = torch.randn(3, requires_grad=True)
    assert origin_of(F.gelu(x)) == ((), None)
    assert origin_of(outcome(MADE_AGAIN["windows"]))[1] is not None
    assert origin_of(F.gelu(x)) == ((), None)
    while (mode := _get_current_function_mode()) is not None:  # it stays, and does nothing
        mode.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_part_of_a_followed_block_is_left_to_the_compiler():
    part = torch.compile(lambda x: F.gelu(x.view(16, WIDTH)) * 2, backend="eager", fullgraph=True)
    z = torch.randn(2, 8, WIDTH, requires_grad=True)
    block = Block(part)
    plain = block(z)
    mark_outputs(block)
    assert torch.equal(block(z), plain)


class Checkpointed(SwiGLU):
    """A block that checkpoints a part of itself."""

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
def test_a_part_of_a_followed_block_may_be_checkpointed(compress):
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


@pytest.mark.parametrize("settings", [{}, {"compress_activations": True}], ids=["exact", "eight-bits"])
@pytest.mark.parametrize("part", ["attn", "ff", "ff_context"])
def test_a_followed_block_within_a_checkpointed_part_of_another_one(part, settings):
    def train(is_checkpointed):
        model, x = adapted("sd3", **settings)
        for block in model.model.base_model.model.transformer_blocks if is_checkpointed else ():
            module = getattr(block, part)
            if module is not None:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        model(x).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = train(False), train(True)
    assert relative_error(again, plain) < (0.05 if settings else 1e-6)


def test_after_the_backward_pass_of_a_checkpointed_layer_nothing_is_held():
    linear = get_peft_model(nn.Sequential(nn.Linear(WIDTH, 3)), SnellaConfig(r=2, target_modules=["0"])).train()
    x = outcome(MADE_AGAIN["windows"])
    origin = origin_of(x)[1]
    y = checkpoint(linear, x, use_reentrant=False)
    y.sum().backward()
    assert origin._output is None
    assert origin._source._output is None


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
def test_layouts_with_eight_bits_are_those_of_the_forward_pass(function):
    block, linear = Block(lambda x: function(linear(x)).view(2, 8, WIDTH)), nn.Linear(WIDTH, WIDTH)
    mark_outputs(block, compress=lambda: True)
    y = block(torch.randn(2, 8, WIDTH, requires_grad=True))
    kept, origin = origin_of(y)
    origin.add_user()
    again = origin.compute(kept)
    assert again.stride() == y.stride()
    torch.testing.assert_close(again, y, rtol=0, atol=0.05)
    y.sum().backward()


def test_outside_of_a_followed_block_nothing_is_followed():
    norm, z = nn.LayerNorm(WIDTH), torch.randn(2, 8, WIDTH, requires_grad=True)
    mark_outputs(norm)
    assert origin_of(norm(z).view(16, WIDTH)) == ((), None)
    with torch.no_grad():
        assert origin_of(outcome(MADE_AGAIN["windows"])) == ((), None)


def test_following_ends_with_the_block_whatever_happens_in_it():
    def fail(x):
        assert _get_current_function_mode() is not None
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        outcome(fail)
    assert _get_current_function_mode() is None
    inner = Block(lambda x: x * 2)
    mark_outputs(inner)
    assert origin_of(outcome(lambda x: inner(x)))[1] is not None
    assert _get_current_function_mode() is None


def test_a_model_without_its_adapters_follows_nothing():
    model, _ = adapted("timm-swiglu", compress_activations=True)
    plain = model.model.unload()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called
        for module in plain.modules()
    )


def test_autocast_keeps_nothing_of_an_input_that_is_computed_again():
    def kept(**settings):
        model, x = adapted("vit", **settings)
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, x)[1]

    # of four inputs a block in bfloat16 three are computed again, the fourth is what attention keeps
    wide, blocks, images, tokens = 64, 2, 8, 17
    saved = kept(recompute_inputs=False) - kept()
    assert saved >= 2 * (wide + wide + 4 * wide) * blocks * images * tokens
