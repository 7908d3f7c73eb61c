"""`nn.MultiheadAttention`: its update is used and trained on every way through it, with every option that it has."""

from __future__ import annotations

import copy

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
    """An attention between two other layers, as models hold it."""

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


def with_sums(model: PeftModel, base: nn.Module) -> nn.Module:
    """A plain model whose weights are W0 + s·S, from the matrices alone."""
    plain = copy.deepcopy(base)
    by_projection: dict[str, list[torch.Tensor]] = {}
    for matrix in adapted_matrices(model):
        update = matrix.layer.scaling["default"] * matrix.sparse_update()
        by_projection.setdefault(matrix.module_name, []).append(update)
    with torch.no_grad():
        for name, updates in by_projection.items():
            parameter = f"{name}.weight" if name.endswith("out_proj") else f"{name}_weight"
            plain.get_parameter(parameter).add_(torch.cat(updates))
    return plain


def inputs(*lengths: int, width: int = WIDTH, batch: int = 3, batch_first: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, length) if batch_first else (length, batch) for length in lengths]
    return [torch.randn(*shape, width, generator=generator) for shape in shapes]


def outputs_of(model: nn.Module, mode: str, *tensors, **options):
    """Output and attention weights, in training, in evaluation with gradients, or without (torch's fast path)."""
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_output_and_weights_are_those_of_an_attention_whose_weights_are_the_sums(call, mode):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base))
    (x,) = inputs(5)
    output, weights = outputs_of(model, mode, x, **CALLS[call])
    expected, expected_weights = with_sums(model, base)(x, **CALLS[call])
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
def test_every_kind_of_attention_uses_its_update(options, call, mode):
    base = make(**options)
    model = adapt(copy.deepcopy(base))
    (x,) = inputs(5, batch_first=options["batch_first"])
    expected = with_sums(model, base)(x, **CALLS[call])[0]
    assert torch.allclose(outputs_of(model, mode, x, **CALLS[call])[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_queries_keys_and_values_may_be_different_tensors(batch_first, mode):
    base = make(batch_first=batch_first)
    model = adapt(copy.deepcopy(base))
    query, key, value = inputs(4, 6, 6, batch_first=batch_first)
    for tensors in ((query, key), (query, key, value)):
        expected = with_sums(model, base)(*tensors)[0]
        assert torch.allclose(outputs_of(model, mode, *tensors)[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_widths_have_three_projections_of_their_own(bias, mode):
    base = make(batch_first=True, kdim=6, vdim=5, bias=bias)
    model = adapt(copy.deepcopy(base))
    assert names(model) == ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"]
    assert [matrix.shape for matrix in adapted_matrices(model)] == [(8, 8), (8, 6), (8, 5), (8, 8)]
    tensors = [inputs(4)[0], inputs(6, width=6)[0], inputs(6, width=5)[0]]
    expected = with_sums(model, base)(*tensors)[0]
    assert torch.allclose(outputs_of(model, mode, *tensors)[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_sample_without_a_batch_axis(mode):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base))
    x, padding = inputs(5)[0][0], PADDING[0]
    output, weights = outputs_of(model, mode, x, key_padding_mask=padding)
    expected, expected_weights = with_sums(model, base)(x, key_padding_mask=padding)
    assert output.shape == (5, WIDTH) and weights.shape == (5, 5)
    assert torch.allclose(output, expected, atol=1e-5) and torch.allclose(weights, expected_weights, atol=1e-5)


def test_dropout_of_the_attention_acts_in_training_alone():
    base = make(batch_first=True, dropout=1.0)
    model = adapt(copy.deepcopy(base), targets=["attn", "before"])
    (x,) = inputs(5)
    for options in ({}, {"need_weights": False}):
        # nothing passes the attention, so that the output's bias alone is left
        output = outputs_of(model, "training", x, **options)[0]
        assert torch.allclose(output, base.attn.out_proj.bias.expand_as(output), atol=1e-6)
        expected = with_sums_of_before(model, base)(x, **options)[0]
        assert torch.allclose(outputs_of(model, "gradients", x, **options)[0], expected, atol=1e-5)


def with_sums_of_before(model: PeftModel, base: nn.Module) -> nn.Module:
    plain = with_sums_without(model, base, "before")
    matrix = next(matrix for matrix in adapted_matrices(model) if matrix.name == "before")
    with torch.no_grad():
        plain.before.weight.add_(0.2 * matrix.sparse_update())
    return plain


def with_sums_without(model: PeftModel, base: nn.Module, left_out: str) -> nn.Module:
    plain = copy.deepcopy(base)
    parts = {m.name: 0.2 * m.sparse_update() for m in adapted_matrices(model) if m.name != left_out}
    with torch.no_grad():
        plain.attn.in_proj_weight.add_(torch.cat([parts[f"attn.in_proj.{part}"] for part in "qkv"]))
        plain.attn.out_proj.weight.add_(parts["attn.out_proj"])
    return plain


def test_a_causal_hint_without_its_mask_is_refused_as_torch_does():
    model = adapt(make(batch_first=True))
    with pytest.raises(ValueError, match=r"is_causal=True requires the causal attn_mask, got attn_mask=None"):
        model(inputs(5)[0], is_causal=True)


# gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_those_of_the_formula(training):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base)).train(training)
    (x,) = inputs(5)
    model(x, key_padding_mask=PADDING)[0].square().sum().backward()
    leaves, weights = {}, {}
    for projection, parameter in (("in_proj", "attn.in_proj_weight"), ("out_proj", "attn.out_proj.weight")):
        layer = model.base_model.model.get_submodule(f"attn.{projection}")
        own = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters() if "snella_" in name}
        leaves |= {(projection, name): leaf for name, leaf in own.items()}
        updates = []
        for group, rows in enumerate(layer.matrix_rows("default")):
            scalars = {key: own[f"snella_{key}.default"][group] for key in ("piece_coeff", "alpha", "beta")}
            A, B = own["snella_A.default"][group], own["snella_B.default"][rows]
            delta = merge_factors(A, B, "mix_k", **scalars)
            updates.append(sparsify(delta, keep_threshold(delta.detach(), layer.budgets("default")[group])))
        weights[parameter] = base.get_parameter(parameter).detach() + 0.2 * torch.cat(updates)
    functional_call(base, weights, (x,), {"key_padding_mask": PADDING})[0].square().sum().backward()
    for (projection, name), leaf in leaves.items():
        mine = model.base_model.model.get_submodule(f"attn.{projection}").get_parameter(name).grad
        assert torch.allclose(mine, leaf.grad, rtol=1e-3, atol=1e-5), (projection, name)
        assert leaf.grad.abs().sum() > 0


def test_training_lowers_a_loss_that_only_the_attention_can_lower():
    torch.manual_seed(0)
    model = adapt(
        make(batch_first=True), init_weights=True, scaling=10.0, init_sparsity=0.0, target_sparsity=0.0
    ).train()
    (x,) = inputs(6)
    goal = torch.randn(3, 6, WIDTH)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x, need_weights=False)[0] - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        evaluated = (model.eval()(x, need_weights=False)[0] - goal).square().mean()
    assert evaluated.item() == pytest.approx(losses[-1], rel=0.1)


def test_no_merged_matrix_is_kept_for_the_backward_pass():
    model = adapt(make(batch_first=True), impl="eager").train()
    frozen = {
        model.get_parameter(f"base_model.model.attn.base_layer.{name}").data_ptr() for name in ("in_proj_weight",)
    }
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs(5)[0], need_weights=False)
    merged = [t for t in kept if t.shape in {(3 * WIDTH, WIDTH), (WIDTH, 3 * WIDTH)} and t.data_ptr() not in frozen]
    assert kept and not merged


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_attention_gives_the_same_outputs_and_gradients(training):
    model = adapt(make(batch_first=True), impl="eager").train(training)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    (x,) = inputs(5)
    results = []
    for one in (model, compiled):
        output = one(x, need_weights=False)[0]
        output.square().sum().backward()
        results.append([output, *(p.grad for p in one.parameters() if p.requires_grad)])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# which projections --------------------------------------------------------------------------------------------------


def test_the_name_of_an_attention_stands_for_all_of_its_projections():
    whole = ["attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"]
    assert names(adapt(make())) == whole
    assert names(adapt(make(), targets=r".*attn")) == whole
    assert [m.kind for m in adapted_matrices(adapt(make()))] == ["attn.q", "attn.k", "attn.v", "attn.out_proj"]
    assert names(adapt(make(), exclude_modules=["out_proj"])) == whole[:3]
    assert names(adapt(make(), qkv_groups=1)) == ["attn.in_proj", "attn.out_proj"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["attn.out_proj", "out_proj"])
def test_the_output_projection_may_be_adapted_alone(target, mode):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base), targets=[target])
    assert names(model) == ["attn.out_proj"]
    (x,) = inputs(5)
    assert torch.allclose(outputs_of(model, mode, x)[0], with_sums(model, base)(x)[0], atol=1e-5)


def test_all_linear_takes_the_attention_and_means_the_same_for_a_second_adapter():
    model = make()
    assert all_linear_names(model) == ["before", "attn", "attn.out_proj"]
    adapted = adapt(model, targets="all-linear")
    assert all_linear_names(adapted.base_model.model) == ["before", "attn", "attn.out_proj"]


@pytest.mark.parametrize(
    ("first", "second"),
    [(["attn.out_proj"], ["attn"]), (["attn"], ["attn.out_proj"]), (["before"], ["attn"]), (["attn"], ["attn"])],
)
def test_a_second_adapter_may_adapt_other_projections(first, second):
    base = make(batch_first=True)
    model = adapt(copy.deepcopy(base), targets=first)
    alone = adapt(copy.deepcopy(base), targets=first)
    model.add_adapter("second", SnellaConfig(r=2, init_weights=False, scaling=0.2, target_modules=second))
    x = inputs(5)[0]
    with torch.no_grad():
        assert torch.equal(model(x)[0], alone(x)[0])
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".second" in name)
        model.set_adapter("second")
        changed = model(x)[0]
        assert not torch.allclose(changed, alone(x)[0], atol=1e-4)
        model.set_adapter("default")
        assert torch.equal(model(x)[0], alone(x)[0])
        model.delete_adapter("second")
        assert torch.equal(model(x)[0], alone(x)[0])
    assert names(model) == names(alone)


# merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_first": True}, {"kdim": 6, "vdim": 5}, {"bias": False}], ids=str)
def test_merging_unmerging_disabling_and_unloading_keep_their_bits(options):
    base = make(**options)
    model = adapt(copy.deepcopy(base))
    x = inputs(5)[0]
    tensors = (x, *(inputs(5, width=width)[0] for width in (6, 5))) if "kdim" in options else (x,)
    with torch.no_grad():
        expected, untouched = model(*tensors, need_weights=False)[0], base(*tensors, need_weights=False)[0]
        with model.disable_adapter():
            assert torch.equal(model(*tensors, need_weights=False)[0], untouched)
        model.merge_adapter(safe_merge=True)
        assert torch.equal(model(*tensors, need_weights=False)[0], expected)
        with model.disable_adapter():
            assert torch.equal(model(*tensors, need_weights=False)[0], untouched)
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(*tensors, need_weights=False)[0], expected)
        back = copy.deepcopy(model).unload()
        assert type(back.attn) is nn.MultiheadAttention
        assert list(back.state_dict()) == list(base.state_dict())
        assert torch.equal(back(*tensors, need_weights=False)[0], untouched)
        plain = model.merge_and_unload()
        assert list(plain.state_dict()) == list(base.state_dict())
        assert torch.equal(plain(*tensors, need_weights=False)[0], expected)


# PEFT's names of the base model's parameters --------------------------------------------------------------------------


class Deeper(nn.Module):
    """An attention in a block, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.block = Model(**options)
        self.head = nn.Linear(WIDTH, 3)


OPTIONS = [{}, {"kdim": 6, "vdim": 5, "add_bias_kv": True}, {"bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("first", "second"), [("all-linear", None), (["attn"], ["out_proj"]), (["out_proj"], ["attn", "before"])]
)
def test_the_base_model_has_the_keys_and_values_of_the_model_before_it_was_adapted(options, first, second):
    base = Deeper(**options)
    expected = copy.deepcopy(base).state_dict()
    model = adapt(base, targets=first, modules_to_save=["head"])
    if second is not None:
        model.add_adapter("second", SnellaConfig(r=2, target_modules=second, init_weights=False))
    # FSDP looks parameters up by the names that they have
    assert "base_model.model.block.attn.base_layer.out_proj.weight" in model.state_dict()
    found = get_base_model_state_dict(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
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
    found = get_base_model_state_dict(model)
    assert all(torch.equal(found[key], other[key]) for key in other)
    assert list(model.unload().state_dict()) == list(expected)


def test_a_key_that_the_base_model_lacks_is_refused_by_its_name():
    model = adapt(make())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attn\.base_layer\.in_proj_weight"):
        set_base_model_state_dict(model, {"attn.base_layer.in_proj_weight": torch.zeros(3 * WIDTH, WIDTH)})


# the attention's attributes -----------------------------------------------------------------------------------------


def test_attributes_of_the_attention_are_there_and_unknown_ones_are_not():
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own use of them
@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["self_attn"], ["self_attn.out_proj"]], ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
def test_torchs_fused_encoder_layer_does_not_pass_by_the_updates(targets, padding):
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


# what is refused ----------------------------------------------------------------------------------------------------


class OwnForward(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query, key, 2 * value, **options)


@pytest.mark.parametrize("target", ["attn", "attn.out_proj"])
def test_an_attention_with_a_forward_of_its_own_is_refused_by_name_and_left_out_of_all_linear(target):
    model = make()
    model.attn = OwnForward(WIDTH, HEADS)
    assert all_linear_names(model) == ["before"]
    with pytest.raises(NotImplementedError, match=r"matches 'attn', a .*OwnForward with a custom forward\(\)"):
        adapt(model, targets=[target])


def test_an_attention_that_is_the_whole_model_is_refused():
    with pytest.raises(NotImplementedError, match=r"matches 'out_proj', but the model is an nn\.Mul"):
        adapt(nn.MultiheadAttention(WIDTH, HEADS), targets=["out_proj"])


def test_an_attention_with_two_names_is_refused():
    model = make()
    model.again = model.attn
    with pytest.raises(NotImplementedError, match=r"'attn', whose weight \['attn', 'again'\] share"):
        adapt(model)


# torchvision --------------------------------------------------------------------------------------------------------


def test_torchvisions_blocks_are_numbered_and_its_head_of_several_layers_is_given_back(cases):
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
def test_the_biases_of_an_adapted_attention_are_trained_and_saved(bias, options, tmp_path):
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


def test_the_bias_of_a_projection_that_is_not_adapted_stays():
    model = adapt(make(), ["attn.out_proj"], bias="snella_only")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "snella" not in name}
    assert trained == {"base_model.model.attn.base_layer.out_proj.bias"}
