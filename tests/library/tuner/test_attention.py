"""Adapted `nn.MultiheadAttention`: all code paths and options."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, get_peft_model, set_base_model_state_dict
from torch import nn
from torch.func import functional_call

from snella import SnellaConfig
from snella.compat.attention import AdaptedAttention, Projection
from snella.kernels import merge_factors
from snella.matrices import adapted_matrices
from snella.sparsify import keep_threshold, sparsify
from snella.targets import all_linear_names

WIDTH, HEADS = 8, 2


class Model(nn.Module):
    """Attention between two linear layers."""

    def __init__(self, **options):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, query, key=None, value=None, **options):
        query = self.before(query)
        key = query if key is None else key
        return self.attn(query, key, key if value is None else value, **options)


def make(**options) -> Model:
    torch.manual_seed(0)
    model = Model(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adapt(model: nn.Module, targets=("attn",), adapter_name: str = "default", **settings) -> PeftModel:
    settings = {"r": 4, "init_weights": False, "scaling": 0.2, "init_sparsity": 0.3, "target_sparsity": 0.3} | settings
    targets = targets if isinstance(targets, str) else list(targets)
    torch.manual_seed(1)
    return get_peft_model(model, SnellaConfig(target_modules=targets, **settings), adapter_name=adapter_name).eval()


def names(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    return [matrix.name for matrix in adapted_matrices(model, adapter_name)]


def with_effective_weights(model: PeftModel, base: nn.Module) -> nn.Module:
    """Return a plain model with the weights W0 + scaling·S, computed from the matrices."""
    plain = copy.deepcopy(base)
    by_projection: dict[str, list[torch.Tensor]] = {}
    for matrix in adapted_matrices(model):
        update = matrix.layer.scaling["default"] * matrix.sparse_update()
        by_projection.setdefault(matrix.module_name, []).append(update)
    with torch.no_grad():
        for name, updates in by_projection.items():
            parameter = f"{name}.weight" if name.endswith(("out_proj", "before")) else f"{name}_weight"
            plain.get_parameter(parameter).add_(torch.cat(updates))
    return plain


def inputs(*lengths: int, width: int = WIDTH, batch: int = 3, batch_first: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, length) if batch_first else (length, batch) for length in lengths]
    return [torch.randn(*shape, width, generator=generator) for shape in shapes]


def outputs_of(model: nn.Module, mode: str, *tensors, **options):
    """Return output and attention weights, in training, or in evaluation with or without gradients (fast path)."""
    model.train(mode == "training")
    if mode == "no_grad":
        with torch.no_grad():
            return model(*tensors, **options)
    if mode == "inference":
        with torch.inference_mode():
            return model(*tensors, **options)
    return model(*tensors, **options)


MODES = ["training", "gradients", "no_grad", "inference"]


# values -------------------------------------------------------------------------------------------------------------

PADDING = torch.tensor([[False, False, False, True, True]] + [[False] * 5] * 2)
CAUSAL = torch.ones(5, 5).triu(1).bool()
PER_HEAD = torch.randn(3 * HEADS, 5, 5, generator=torch.Generator().manual_seed(3))
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding as numbers": {"key_padding_mask": torch.zeros(3, 5).masked_fill(PADDING, float("-inf"))},
    "mask": {"attn_mask": CAUSAL},
    "mask of each head": {"attn_mask": PER_HEAD, "need_weights": False},
    "both masks": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": CAUSAL, "is_causal": True},
}


def test_threads_share_an_attention_in_evaluation():
    model, (x,) = adapt(make(batch_first=True)), inputs(5)
    base = model.base_model.model.attn.base_layer
    weight = base.in_proj_weight
    base.register_forward_hook(lambda *_: time.sleep(0.01))  # while the effective weight replaces the base weight

    @torch.no_grad()
    def run(_):
        return model(x)[0]

    expected = run(0)
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(run, range(12)))
    assert all(torch.equal(output, expected) for output in outputs)
    assert base.in_proj_weight is weight


def test_data_parallel_is_rejected():
    with pytest.raises(NotImplementedError, match=r"nn.DataParallel does not support adapted attention"):
        adapt(make()).base_model.model.attn._replicate_for_data_parallel()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_outputs_equal_attention_with_effective_weights(call, mode):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base))
    (x,) = inputs(5)
    output, weights = outputs_of(model, mode, x, **CALLS[call])
    expected, expected_weights = with_effective_weights(model, base)(x, **CALLS[call])
    assert torch.allclose(output, expected, atol=1e-5)
    assert not torch.allclose(output, base(x, **CALLS[call])[0], atol=1e-2)
    assert (weights is None) == (expected_weights is None)
    assert weights is None or torch.allclose(weights, expected_weights, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": False},
        {"batch_first": True, "bias": False},
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
        {"batch_first": False, "add_bias_kv": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["plain", "both masks", "causal"])
def test_all_attention_options_use_the_update(options, call, mode):
    base = make(**options)
    model = adapt(copy.deepcopy(base))
    (x,) = inputs(5, batch_first=options["batch_first"])
    expected = with_effective_weights(model, base)(x, **CALLS[call])[0]
    assert torch.allclose(outputs_of(model, mode, x, **CALLS[call])[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_query_key_and_value_can_differ(batch_first, mode):
    base = make(batch_first=batch_first)
    model = adapt(copy.deepcopy(base))
    query, key, value = inputs(4, 6, 6, batch_first=batch_first)
    for tensors in ((query, key), (query, key, value)):
        expected = with_effective_weights(model, base)(*tensors)[0]
        assert torch.allclose(outputs_of(model, mode, *tensors)[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_other_key_and_value_widths_have_separate_projections(bias, mode):
    base = make(batch_first=True, kdim=6, vdim=5, bias=bias)
    model = adapt(copy.deepcopy(base))
    assert names(model) == ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"]
    assert [matrix.shape for matrix in adapted_matrices(model)] == [(8, 8), (8, 6), (8, 5), (8, 8)]
    tensors = [inputs(4)[0], inputs(6, width=6)[0], inputs(6, width=5)[0]]
    expected = with_effective_weights(model, base)(*tensors)[0]
    assert torch.allclose(outputs_of(model, mode, *tensors)[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_unbatched_input_is_supported(mode):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base))
    x, padding = inputs(5)[0][0], PADDING[0]
    output, weights = outputs_of(model, mode, x, key_padding_mask=padding)
    expected, expected_weights = with_effective_weights(model, base)(x, key_padding_mask=padding)
    assert output.shape == (5, WIDTH) and weights.shape == (5, 5)
    assert torch.allclose(output, expected, atol=1e-5) and torch.allclose(weights, expected_weights, atol=1e-5)


def test_attention_dropout_applies_only_in_training():
    base = make(batch_first=True, dropout=1.0)
    model = adapt(copy.deepcopy(base), targets=["attn", "before"])
    (x,) = inputs(5)
    for options in ({}, {"need_weights": False}):
        # dropout removes all values, so only the output bias remains
        output = outputs_of(model, "training", x, **options)[0]
        assert torch.allclose(output, base.attn.out_proj.bias.expand_as(output), atol=1e-6)
        expected = with_effective_weights(model, base)(x, **options)[0]
        assert torch.allclose(outputs_of(model, "gradients", x, **options)[0], expected, atol=1e-5)


def test_is_causal_without_mask_raises():
    model = adapt(make(batch_first=True))
    with pytest.raises(ValueError, match=r"is_causal=True requires the causal attn_mask, got attn_mask=None"):
        model(inputs(5)[0], is_causal=True)


# gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_formula(training):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base)).train(training)
    (x,) = inputs(5)
    model(x, key_padding_mask=PADDING)[0].square().sum().backward()
    leaves, weights = {}, {}
    for projection, parameter in (("in_proj", "attn.in_proj_weight"), ("out_proj", "attn.out_proj.weight")):
        layer = model.base_model.model.get_submodule(f"attn.{projection}")
        parameters = {
            name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters() if "snella_" in name
        }
        leaves |= {(projection, name): leaf for name, leaf in parameters.items()}
        updates = []
        for group, rows in enumerate(layer.matrix_rows("default")):
            scalars = {key: parameters[f"snella_{key}.default"][group] for key in ("piece_coeff", "alpha", "beta")}
            A, B = parameters["snella_A.default"][group], parameters["snella_B.default"][rows]
            delta = merge_factors(A, B, "mix_k", **scalars)
            updates.append(sparsify(delta, keep_threshold(delta.detach(), layer.budgets("default")[group])))
        weights[parameter] = base.get_parameter(parameter).detach() + 0.2 * torch.cat(updates)
    functional_call(base, weights, (x,), {"key_padding_mask": PADDING})[0].square().sum().backward()
    for (projection, name), leaf in leaves.items():
        actual = model.base_model.model.get_submodule(f"attn.{projection}").get_parameter(name).grad
        assert torch.allclose(actual, leaf.grad, rtol=1e-3, atol=1e-5), (projection, name)
        assert leaf.grad.abs().sum() > 0


def test_training_reduces_a_loss_of_the_attention():
    torch.manual_seed(0)
    model = adapt(
        make(batch_first=True), init_weights=True, scaling=10.0, init_sparsity=0.0, target_sparsity=0.0
    ).train()
    (x,) = inputs(6)
    target = torch.randn(3, 6, WIDTH)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x, need_weights=False)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        evaluated = (model.eval()(x, need_weights=False)[0] - target).square().mean()
    assert evaluated.item() == pytest.approx(losses[-1], rel=0.1)


def test_merged_matrix_is_not_saved_for_backward():
    model = adapt(make(batch_first=True), impl="eager").train()
    frozen = {
        model.get_parameter(f"base_model.model.attn.base_layer.{name}").data_ptr() for name in ("in_proj_weight",)
    }
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(inputs(5)[0], need_weights=False)
    merged = [t for t in saved if t.shape in {(3 * WIDTH, WIDTH), (WIDTH, 3 * WIDTH)} and t.data_ptr() not in frozen]
    assert saved and not merged


@pytest.mark.parametrize("training", [True, False])
def test_compiled_attention_equals_eager(training):
    model = adapt(make(batch_first=True), impl="eager").train(training)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    (x,) = inputs(5)
    results = []
    for attention in (model, compiled):
        output = attention(x, need_weights=False)[0]
        output.square().sum().backward()
        results.append([output, *(p.grad for p in attention.parameters() if p.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


# projections --------------------------------------------------------------------------------------------------------


def test_attention_name_selects_all_projections():
    complete = ["attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"]
    assert names(adapt(make())) == complete
    assert names(adapt(make(), targets=r".*attn")) == complete
    assert [m.kind for m in adapted_matrices(adapt(make()))] == ["attn.q", "attn.k", "attn.v", "attn.out_proj"]
    assert names(adapt(make(), exclude_modules=["out_proj"])) == complete[:3]
    assert names(adapt(make(), qkv_groups=1)) == ["attn.in_proj", "attn.out_proj"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["attn.out_proj", "out_proj"])
def test_output_projection_can_be_the_only_target(target, mode):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base), targets=[target])
    assert names(model) == ["attn.out_proj"]
    (x,) = inputs(5)
    assert torch.allclose(outputs_of(model, mode, x)[0], with_effective_weights(model, base)(x)[0], atol=1e-5)


def test_all_linear_includes_attention_for_every_adapter():
    model = make()
    assert all_linear_names(model) == ["before", "attn", "attn.out_proj"]
    adapted = adapt(model, targets="all-linear")
    assert all_linear_names(adapted.base_model.model) == ["before", "attn", "attn.out_proj"]


@pytest.mark.parametrize(
    ("first", "second"),
    [(["attn.out_proj"], ["attn"]), (["attn"], ["attn.out_proj"]), (["before"], ["attn"]), (["attn"], ["attn"])],
)
def test_second_adapter_can_adapt_other_projections(first, second):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base), targets=first)
    first_only = adapt(copy.deepcopy(base), targets=first)
    model.add_adapter("second", SnellaConfig(r=2, init_weights=False, scaling=0.2, target_modules=second))
    x = inputs(5)[0]
    with torch.no_grad():
        assert torch.equal(model(x)[0], first_only(x)[0])
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".second" in name)
        model.set_adapter("second")
        changed = model(x)[0]
        assert not torch.allclose(changed, first_only(x)[0], atol=1e-4)
        model.set_adapter("default")
        assert torch.equal(model(x)[0], first_only(x)[0])
        model.delete_adapter("second")
        assert torch.equal(model(x)[0], first_only(x)[0])
    assert names(model) == names(first_only)


# merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_first": True}, {"kdim": 6, "vdim": 5}, {"bias": False}], ids=str)
def test_merge_unmerge_disable_and_unload_are_bit_exact(options):
    base = make(**options)
    model = adapt(copy.deepcopy(base))
    x = inputs(5)[0]
    tensors = (x, *(inputs(5, width=width)[0] for width in (6, 5))) if "kdim" in options else (x,)
    with torch.no_grad():
        expected, unchanged = model(*tensors, need_weights=False)[0], base(*tensors, need_weights=False)[0]
        with model.disable_adapter():
            assert torch.equal(model(*tensors, need_weights=False)[0], unchanged)
        model.merge_adapter(safe_merge=True)
        assert torch.equal(model(*tensors, need_weights=False)[0], expected)
        with model.disable_adapter():
            assert torch.equal(model(*tensors, need_weights=False)[0], unchanged)
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(*tensors, need_weights=False)[0], expected)
        restored = copy.deepcopy(model).unload()
        assert type(restored.attn) is nn.MultiheadAttention
        assert list(restored.state_dict()) == list(base.state_dict())
        assert torch.equal(restored(*tensors, need_weights=False)[0], unchanged)
        plain = model.merge_and_unload()
        assert list(plain.state_dict()) == list(base.state_dict())
        assert torch.equal(plain(*tensors, need_weights=False)[0], expected)


# PEFT's names of the base model's parameters --------------------------------------------------------------------------


class Nested(nn.Module):
    """Attention in a block, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.block = Model(**options)
        self.head = nn.Linear(WIDTH, 3)


OPTIONS = [{}, {"kdim": 6, "vdim": 5, "add_bias_kv": True}, {"bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("first", "second"), [("all-linear", None), (["attn"], ["out_proj"]), (["out_proj"], ["attn", "before"])]
)
def test_base_model_state_dict_equals_original(options, first, second):
    base = Nested(**options)
    expected = copy.deepcopy(base).state_dict()
    model = adapt(base, targets=first, modules_to_save=["head"])
    if second is not None:
        model.add_adapter("second", SnellaConfig(r=2, target_modules=second, init_weights=False))
    # FSDP looks up parameters by name
    assert "base_model.model.block.attn.base_layer.out_proj.weight" in model.state_dict()
    actual = get_base_model_state_dict(model)
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert not any(layer.is_applied for layer in model.modules() if isinstance(layer, Projection))

    copied = copy.deepcopy(model)
    copied.merge_adapter()
    merged = get_base_model_state_dict(copied)
    assert list(merged) == list(expected)
    input_weight = "q_proj_weight" if "kdim" in options else "in_proj_weight"
    changed = "out_proj.weight" if first == ["out_proj"] else input_weight
    assert not torch.equal(merged[f"block.attn.{changed}"], expected[f"block.attn.{changed}"])

    other = {key: value + 1 for key, value in expected.items()}
    set_base_model_state_dict(model, other)
    actual = get_base_model_state_dict(model)
    assert all(torch.equal(actual[key], other[key]) for key in other)
    assert list(model.unload().state_dict()) == list(expected)


def test_unknown_base_model_key_raises_with_name():
    model = adapt(make())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attn\.base_layer\.in_proj_weight"):
        set_base_model_state_dict(model, {"attn.base_layer.in_proj_weight": torch.zeros(3 * WIDTH, WIDTH)})


# the attention's attributes -----------------------------------------------------------------------------------------


def test_attention_attributes_are_forwarded():
    attention = adapt(make(batch_first=True)).base_model.model.attn
    assert isinstance(attention, AdaptedAttention) and isinstance(attention.out_proj, Projection)
    assert (attention.num_heads, attention.batch_first, attention.head_dim) == (HEADS, True, WIDTH // HEADS)
    assert repr(attention.in_proj).startswith("snella.Projection")
    with pytest.raises(AttributeError, match="no attribute 'head_count'"):
        _ = attention.head_count


# torch's encoder layers ---------------------------------------------------------------------------------------------


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True, activation="gelu", **options)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch raises this warning
@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["self_attn"], ["self_attn.out_proj"]], ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["unpadded", "padded"])
def test_fused_encoder_layer_does_not_bypass_updates(targets, padding):
    base = encoder()
    model = adapt(copy.deepcopy(base), targets=targets)
    (x,) = inputs(5)
    is_seen = slice(None) if padding is None else ~padding
    with torch.no_grad():
        evaluated = model(x, src_key_padding_mask=padding)[is_seen]
        assert not torch.allclose(evaluated, base(x, src_key_padding_mask=padding)[is_seen], atol=1e-3)
    trained = model.train()(x, src_key_padding_mask=padding)[is_seen]
    assert torch.allclose(evaluated, trained, atol=1e-5)
    plain = model.eval().merge_and_unload()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    with torch.no_grad():
        assert torch.allclose(plain(x, src_key_padding_mask=padding)[is_seen], evaluated, atol=1e-5)


# errors -------------------------------------------------------------------------------------------------------------


class CustomForward(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query, key, 2 * value, **options)


@pytest.mark.parametrize("target", ["attn", "attn.out_proj"])
def test_custom_forward_raises_by_name_and_is_excluded_from_all_linear(target):
    model = make()
    model.attn = CustomForward(WIDTH, HEADS)
    assert all_linear_names(model) == ["before"]
    with pytest.raises(NotImplementedError, match=r"matches 'attn', a .*CustomForward with a custom forward\(\)"):
        adapt(model, targets=[target])


def test_attention_as_root_module_raises():
    with pytest.raises(NotImplementedError, match=r"matches 'out_proj', but the model is an nn\.Mul"):
        adapt(nn.MultiheadAttention(WIDTH, HEADS), targets=["out_proj"])


def test_shared_attention_raises():
    model = make()
    model.again = model.attn
    with pytest.raises(NotImplementedError, match=r"'attn', but \['attn', 'again'\] share one weight"):
        adapt(model)


# torchvision --------------------------------------------------------------------------------------------------------


def test_torchvision_vit_has_block_indices_and_restores_its_head(cases):
    base = cases["torch_vit"].base()
    model = cases["torch_vit"].adapted(modules_to_save=["heads"])
    matrices = adapted_matrices(model)
    assert [matrix.depth for matrix in matrices] == [0] * 6 + [1] * 6
    kinds = ["q", "k", "v", "out_proj"]
    assert [m.kind for m in matrices[:6]] == [*(f"self_attention.{kind}" for kind in kinds), "mlp.0", "mlp.3"]
    with torch.no_grad():
        model.get_parameter("base_model.model.heads.modules_to_save.default.head.weight").mul_(2)
    expected = cases["torch_vit"].predict(model)
    plain = model.merge_and_unload()
    assert type(plain.heads) is nn.Sequential and list(plain.state_dict()) == list(base.state_dict())
    assert torch.equal(cases["torch_vit"].predict(plain), expected)


@pytest.mark.parametrize("bias", ["all", "snella_only"])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 3}], ids=["fused", "separate"])
def test_attention_biases_are_trained_and_saved(bias, options, tmp_path):
    model = adapt(make(**options), bias=bias).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "snella" not in name}
    prefix = "base_model.model.attn.base_layer."
    expected = {f"{prefix}in_proj_bias", f"{prefix}out_proj.bias"}
    assert trained == expected | ({"base_model.model.before.bias"} if bias == "all" else set())
    inputs = [torch.randn(4, 2, width) for width in (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))]
    model(*inputs)[0].square().sum().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.abs().sum() > 0, name
                parameter -= 0.1 * parameter.grad
        outputs = model.eval()(*inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(**options), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs)[0], outputs)
        assert torch.equal(loaded.merge_and_unload()(*inputs)[0], outputs)


def test_bias_of_frozen_projection_does_not_change():
    model = adapt(make(), ["attn.out_proj"], bias="snella_only")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "snella" not in name}
    assert trained == {"base_model.model.attn.base_layer.out_proj.bias"}
