"""Module selection, splits of fused layers, and errors."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from timm.layers import Conv2dSame
from torch import nn

from snella import SnellaConfig, SnellaModel
from snella import targets as targets_module
from snella.layer import SnellaLayer
from snella.matrices import adapted_matrices
from snella.targets import all_linear_names, block_number, count_rows, head_layers, plain_convolution_names


def adapted_modules(model, **settings):
    model = get_peft_model(model, SnellaConfig(r=4, **settings))
    return sorted({matrix.module_name for matrix in adapted_matrices(model)})


# lists, suffixes, expressions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["blocks.1.attn.qkv"], ["blocks.1.attn.qkv"]),
        (["mlp.fc1"], [f"blocks.{k}.mlp.fc1" for k in range(6)]),
        (["qkv", "blocks.0.mlp.fc2"], [*(f"blocks.{k}.attn.qkv" for k in range(6)), "blocks.0.mlp.fc2"]),
        (r"blocks\.[01]\.mlp\.fc\d", [f"blocks.{k}.mlp.fc{i}" for k in (0, 1) for i in (1, 2)]),
        (r".*\.proj", [*(f"blocks.{k}.attn.proj" for k in range(6)), "patch_embed.proj"]),
    ],
)
def test_targets_match_names_suffixes_and_expressions(vit, targets, expected):
    assert adapted_modules(vit.base(), target_modules=targets) == sorted(expected)


def test_all_linear_excludes_head_patch_embedding_and_patch_merging(cases):
    for name, excluded in (
        ("timm_vit", ("head", "patch_embed")),
        ("timm_swin", ("head", "patch_embed", "downsample")),
        ("timm_convnext", ("head", "downsample", "stem", "conv_dw")),
        ("swin", ("classifier", "downsample", "embeddings")),
        ("llama", ("lm_head", "embed_tokens")),
        ("gpt2", ("lm_head", "wte")),
        ("mlp", ("head", "norm")),
    ):
        modules = adapted_modules(cases[name].base(), target_modules="all-linear")
        assert modules
        assert not [module for module in modules if set(excluded) & set(module.split("."))], name


class _Embedded(nn.Module):
    """Transformer in a model whose other layers have names that end layers of the transformer."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_vit", num_classes=0, img_size=32)
        self.proj = nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_default_targets_are_full_names(targets):
    backbone = timm.create_model("test_vit", num_classes=0, img_size=32)
    for model in (nn.Sequential(backbone, nn.Linear(64, 10)), _Embedded()):
        expected = set(all_linear_names(model))
        adapted = get_peft_model(model, SnellaConfig(r=4, target_modules=targets))
        assert {matrix.module_name for matrix in _layers(adapted)} == expected
        loaded = adapted.peft_config["default"]
        assert isinstance(loaded.target_modules, str), "a set of these names would match other modules"


def _layers(model):
    return [module for module in model.modules() if isinstance(module, SnellaLayer)]


def test_all_linear_is_case_insensitive(mlp):
    assert adapted_modules(mlp.base(), target_modules="All-Linear") == ["lin0", "lin1"]


def test_all_linear_is_the_same_for_a_second_adapter(case):
    model = case.adapted(modules_to_save=case.head)
    names = [matrix.name for matrix in adapted_matrices(model)]
    model.add_adapter("second", case.config(modules_to_save=case.head))
    assert [matrix.name for matrix in adapted_matrices(model, "second")] == names


def test_all_linear_without_linear_layers_raises(cases):
    with pytest.raises(ValueError, match=r"target_modules=None matches no linear layer and no inner .* in Sequential"):
        get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), SnellaConfig())
    with pytest.raises(ValueError, match="target_modules='All-Linear' matches no linear layer in Sequential"):
        get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), SnellaConfig(target_modules="All-Linear"))


def test_exclude_modules_matches_suffixes_and_expressions(vit):
    modules = adapted_modules(vit.base(), target_modules="all-linear", exclude_modules=["mlp.fc1", "qkv"])
    assert {module.rpartition(".")[2] for module in modules} == {"proj", "fc2"}
    modules = adapted_modules(vit.base(), target_modules="all-linear", exclude_modules=r"blocks\.[0-4]\..*")
    assert {module.split(".")[1] for module in modules} == {"5"}


@pytest.mark.parametrize("targets", ["all-linear", ["qkv", "fc1", "fc2", "attn.proj"], None])
@pytest.mark.parametrize("pattern", [None, "blocks", ["layers", "blocks"]])
def test_layers_to_transform_selects_blocks(vit, targets, pattern):
    modules = adapted_modules(vit.base(), target_modules=targets, layers_to_transform=[0, 4], layers_pattern=pattern)
    assert len(modules) == 8
    assert {module.split(".")[1] for module in modules} == {"0", "4"}


def test_layers_to_transform_accepts_an_integer(cases):
    modules = adapted_modules(cases["llama"].base(), layers_to_transform=1)
    assert len(modules) == 7
    assert {module.split(".")[2] for module in modules} == {"1"}


def test_layers_pattern_selects_the_inner_index(cases):
    base = cases["timm_swin"].base()
    assert {module[:8] for module in adapted_modules(base, layers_to_transform=[1])} == {"layers.1"}
    modules = adapted_modules(cases["timm_swin"].base(), layers_to_transform=[0], layers_pattern="blocks")
    assert len(modules) == 8


@pytest.mark.parametrize(
    ("name", "pattern", "number"),
    [
        ("blocks.3.attn.qkv", None, 3),
        ("vit.encoder.layer.11.output", None, 11),
        ("layers.1.blocks.7.mlp", None, 1),
        ("layers.1.blocks.7.mlp", "blocks", 7),
        ("layers.1.blocks.7.mlp", ["h", "layers"], 1),
        ("layers.1.blocks.7.mlp", "h", None),
        ("head.fc", None, None),
        ("blocks.3", None, None),
    ],
)
def test_block_number_is_the_index_after_the_pattern(name, pattern, number):
    assert block_number(name, pattern) == number


# defaults -----------------------------------------------------------------------------------------------------------


def test_stable_diffusion_defaults_to_joint_attention_projections(cases):
    kinds = {matrix.kind for matrix in adapted_matrices(cases["sd3"].adapted())}
    assert kinds == {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}


def _sam():
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, mlp_dim=24)
    vision |= dict(output_channels=8, window_size=2, global_attn_indexes=[1])
    return transformers.SamModel(transformers.SamConfig(vision_config=vision))


def test_sam_defaults_to_its_image_encoder():
    with torch.device("meta"):
        model = _sam()
    modules = adapted_modules(model)
    assert len(modules) == 8
    assert all(module.startswith("vision_encoder.layers.") for module in modules)


def test_sam_defaults_support_layers_to_transform():
    with torch.device("meta"):
        model = _sam()
    assert {module.split(".")[2] for module in adapted_modules(model, layers_to_transform=[1])} == {"1"}


# counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "matrices", "weights"),
    [
        ("vit_base_patch16_224", 72, 84_934_656),
        ("vit_large_patch16_224", 144, 301_989_888),
        ("vit_huge_patch14_224", 192, 629_145_600),
        ("swin_base_patch4_window7_224", 144, None),
        ("convnext_base", 72, None),
    ],
)
def test_large_models_have_the_matrices_of_the_paper(name, matrices, weights):
    with torch.device("meta"):
        model = get_peft_model(timm.create_model(name), SnellaConfig(r=8, target_modules="all-linear"))
        actual = adapted_matrices(model)
        assert len(actual) == matrices
        assert weights is None or sum(matrix.size for matrix in actual) == weights
        if name == "vit_base_patch16_224":
            factors = [p for n, p in model.named_parameters() if ".snella_A" in n or ".snella_B" in n]
            assert sum(p.numel() for p in factors) == 1_327_104
            rest = {id(p) for p in factors}
            scalars = [p for p in model.parameters() if p.requires_grad and id(p) not in rest]
            assert sum(p.numel() for p in scalars) == 72 * 4
            assert model.get_nb_trainable_parameters()[0] == 1_327_104 + 72 * 4


# errors -------------------------------------------------------------------------------------------------------------


def test_unmatched_targets_error_suggests_names(vit):
    base = vit.base()
    names = list(base.state_dict())
    with pytest.raises(
        ValueError,
        match=r"no module matches target_modules=\['attn.qvk'\]; this model has e.g. 'blocks.0.attn.qkv', .*"
        r"did you mean 'qkv'",
    ):
        get_peft_model(base, SnellaConfig(target_modules=["attn.qvk"]))
    assert list(base.state_dict()) == names


def test_unmatched_expression_is_quoted(vit):
    with pytest.raises(ValueError, match=r"='qkv'; .*; a string is a regular expression .* did you mean \['qkv'.*\]\?"):
        get_peft_model(vit.base(), vit.config(target_modules="qkv"))
    with pytest.raises(ValueError, match=r"no module matches target_modules='encoder\.\*'; this model has e\.g\."):
        get_peft_model(vit.base(), SnellaConfig(target_modules="encoder.*"))


def test_layer_norm_target_raises(mlp):
    with pytest.raises(TypeError, match=r"target_modules matches 'norm', a LayerNorm; SNELLA adapts torch\.nn\.Linear"):
        get_peft_model(mlp.base(), SnellaConfig(target_modules=["norm"]))


def test_integer_weight_raises():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"matches '0', a Linear with a torch\.int8 weight"):
        get_peft_model(model, SnellaConfig(target_modules=["0"]))


def test_even_kernel_with_same_padding_raises_with_a_hint():
    model = nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"))
    with pytest.raises(NotImplementedError, match=r"kernel_size=\[2, 2\] with dilation=\[1, 1\]; pad the input"):
        get_peft_model(model, SnellaConfig(target_modules=["0"]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_even_kernel_with_even_dilation_is_adapted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2, padding="same", dilation=2))
    model.append(nn.Conv2d(4, 4, 2, padding="same"))
    assert plain_convolution_names(model) == ["1"]
    adapted = get_peft_model(model, SnellaConfig(target_modules=["1"]))
    images = torch.randn(2, 3, 8, 8)
    outputs = adapted(images)
    outputs.sum().backward()
    adapted.eval()
    torch.testing.assert_close(adapted.merge_and_unload()(images), outputs)


def test_custom_forward_raises():
    model = nn.Sequential(Conv2dSame(1, 2, 3, stride=2))
    with pytest.raises(NotImplementedError, match=r"matches '0', a timm\..*Conv2dSame with a custom forward\(\)"):
        get_peft_model(model, SnellaConfig(target_modules=["0"]))


def test_layer_with_adapter_of_another_method_raises(mlp):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), mlp.base())
    del model.peft_config
    with pytest.raises(
        NotImplementedError, match=r"'lin0', which already has an adapter, peft\.tuners\.lora\.layer\.Linear"
    ):
        SnellaModel(model, SnellaConfig(target_modules=["lin0"]), "default")


# fused layers -------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Fused projection of a model with grouped-query attention."""

    def __init__(self, rows=32, columns=16, heads=4, kv_heads=2):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv_proj = nn.Linear(columns, rows)
        self.attn.config = transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads)

    def forward(self, x):
        return self.attn.qkv_proj(x)


def rows_of(model, groups, targets=("qkv_proj",)):
    model = inject_adapter_in_model(SnellaConfig(r=4, target_modules=list(targets), qkv_groups=groups), model)
    return [matrix.shape[0] for matrix in adapted_matrices(model)]


def test_fused_layers_are_split_into_three(vit, cases):
    assert rows_of(vit.base(), "auto", ["blocks.0.attn.qkv"]) == [64, 64, 64]
    assert rows_of(cases["gpt2"].base(), "auto", ["h.0.attn.c_attn"]) == [16, 16, 16]
    assert rows_of(vit.base(), "auto", ["blocks.0.mlp.fc1"]) == [192]


def test_grouped_query_attention_has_fewer_rows_for_keys_and_values():
    assert rows_of(Fused(), "auto") == [16, 8, 8]


def test_integer_splits_only_fused_layers(vit):
    assert rows_of(vit.base(), 1, ["blocks.0.attn.qkv"]) == [192]
    assert rows_of(vit.base(), 6, ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]) == [32] * 6 + [192]


def test_longest_suffix_in_mapping_wins(vit):
    groups = {"qkv": 2, "blocks.1.attn.qkv": [100, 92], "fc1": 3}
    rows = rows_of(
        vit.base(), groups, ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    )
    assert rows == [96, 96, 64, 64, 64, 64, 100, 92]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (5, r"qkv_groups=5 splits 'attn\.qkv_proj' into rows \[6, 6, 6, 6, 6\], .* or map the name to a list"),
        ({"qkv_proj": [16, 8]}, r"into rows \[16, 8\], but it has 32 rows; use a number that divides 32"),
        ({"qkv_proj": 33}, r"into rows \[0(, 0)*\], but it has 32 rows"),
    ],
)
def test_invalid_splits_raise(groups, message):
    with pytest.raises(ValueError, match=message):
        rows_of(Fused(), groups)


@pytest.mark.parametrize(
    ("suffix", "rows", "columns", "expected"),
    [
        ("qkv", 48, 16, (16, 16, 16)),
        ("qkv", 24, 16, (8, 8, 8)),
        ("c_attn", 32, 16, (32,)),
        ("in_proj", 48, 16, (16, 16, 16)),
        ("in_proj", 24, 16, (24,)),
        ("fc1", 48, 16, (48,)),
    ],
)
def test_only_fused_layers_are_split(suffix, rows, columns, expected):
    assert count_rows(f"blocks.0.{suffix}", rows, columns, nn.Module(), "auto") == expected


def test_each_matrix_of_fused_layer_trains_like_a_separate_layer():
    torch.manual_seed(0)
    fused, x, goal = nn.Sequential(nn.Linear(6, 15)), torch.randn(20, 6), torch.randn(20, 15)
    config = dict(r=4, init_weights=False, init_sparsity=0.3, target_sparsity=0.3)
    model = get_peft_model(fused, SnellaConfig(target_modules=["0"], qkv_groups={"0": [4, 5, 6]}, **config))
    rows = [slice(0, 4), slice(4, 9), slice(9, 15)]
    layer = model.base_model.model[0]
    separate = []
    for group, part in enumerate(rows):
        linear = nn.Linear(6, part.stop - part.start)
        linear.load_state_dict({"weight": layer.base_layer.weight[part], "bias": layer.base_layer.bias[part]})
        single = get_peft_model(nn.Sequential(linear), SnellaConfig(target_modules=["0"], **config))
        for name, parameter in single.base_model.model[0].named_parameters():
            if name.startswith("snella_"):
                complete = layer.get_parameter(name).detach()
                parameter.data.copy_(complete[part] if "snella_B" in name else complete[group][None])
        separate.append(single)
    for step in range(3):
        for net, target in [(model, goal), *((item, goal[:, part]) for item, part in zip(separate, rows, strict=True))]:
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-4)
            optimizer.zero_grad()
            (net(x) - target).square().sum().backward()
            optimizer.step()
        joined = torch.cat([item.base_model.model[0].get_delta_weight("default") for item in separate])
        assert torch.allclose(layer.get_delta_weight("default"), joined, rtol=1e-4, atol=1e-6), step


def test_head_of_wrapped_model_is_excluded():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("test_vit", num_classes=3)

    assert "net.head" not in all_linear_names(Wrapper())
    assert "net.blocks.0.attn.qkv" in all_linear_names(Wrapper())


def test_tied_targets_raise():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(NotImplementedError, match=r"target_modules matches '0', but \['0', '1'\] share one weight"):
        get_peft_model(model, SnellaConfig(r=2, target_modules=["0", "1"]))


def test_shared_layer_raises():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model.again = model[0]
    with pytest.raises(NotImplementedError, match=r"but \['0', 'again'\] share one weight"):
        get_peft_model(model, SnellaConfig(r=2, target_modules=["0"]))


# default targets of other architectures -----------------------------------------------------------------------------


def default_kinds(make, **settings):
    """Return the matrix types of a meta-device model with default targets."""
    with torch.device("meta"):
        model = get_peft_model(make(), SnellaConfig(r=2, **settings))
    return {re.sub(r"\d+", "#", matrix.module_name) for matrix in adapted_matrices(model)}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet18", {"layer#.#.conv#"}),
        (
            "efficientnet_b0",
            {
                *("conv_head", "blocks.#.#.conv_pw", "blocks.#.#.conv_pwl"),
                *("blocks.#.#.se.conv_reduce", "blocks.#.#.se.conv_expand"),
            },
        ),
        ("convnext_atto", {"stages.#.blocks.#.mlp.fc#"}),
        ("convnext_tiny", {"stages.#.blocks.#.mlp.fc#"}),
    ],
)
def test_model_without_linear_layers_adapts_ungrouped_convolutions(name, kinds):
    assert default_kinds(lambda: timm.create_model(name)) == kinds


def test_convolutions_with_custom_forward_are_excluded_by_default():
    assert "conv_stem" not in default_kinds(lambda: timm.create_model("tf_efficientnet_b0"))


def test_all_linear_error_mentions_convolutions():
    with pytest.raises(ValueError, match=r"no linear layer in ResNet .*; target_modules=None adapts its convolutions"):
        default_kinds(lambda: timm.create_model("resnet18"), target_modules="all-linear")


def test_convolutional_model_trains_with_defaults():
    model = get_peft_model(timm.create_model("resnet18", num_classes=3), SnellaConfig(r=2, modules_to_save=["fc"]))
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _deit():
    config = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**config))


def _detr():
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    config |= dict(encoder_attention_heads=2, decoder_attention_heads=2, use_timm_backbone=False, backbone=None)
    return transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **config))


def _mask2former():
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32)
    config |= dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, **config)
    return transformers.Mask2FormerForUniversalSegmentation(config)


@pytest.mark.parametrize("make", [_deit, _detr, _mask2former])
@pytest.mark.filterwarnings("ignore:the selected target_modules adapt")
def test_heads_of_deit_detr_and_mask2former_are_excluded(make):
    kinds = default_kinds(make)
    assert any(kind.endswith("q_proj") or kind.endswith("query") for kind in kinds)
    heads = ("classifier", "predictor", "mask_embedder")
    assert not [kind for kind in kinds if any(head in kind for head in heads)]


def test_distilled_head_of_timm_deit_is_excluded():
    assert default_kinds(lambda: timm.create_model("deit_tiny_distilled_patch16_224")) == {
        *("blocks.#.attn.qkv", "blocks.#.attn.proj", "blocks.#.mlp.fc#"),
    }


def _flux():
    from diffusers import FluxTransformer2DModel

    sizes = dict(attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8)
    return FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, axes_dims_rope=(2, 2, 4), **sizes)


def test_patch_embedding_and_head_of_flux_are_excluded():
    kinds = default_kinds(_flux)
    assert "single_transformer_blocks.#.proj_out" in kinds and "context_embedder" in kinds
    assert not kinds & {"x_embedder", "proj_out"}


def test_patch_merging_of_torchvision_swin_is_excluded():
    from torchvision.models import swin_t

    assert default_kinds(swin_t) == {"features.#.#.attn.qkv", "features.#.#.attn.proj", "features.#.#.mlp.#"}


def test_falcon_linear_layers_are_adapted():
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    base = transformers.FalconForCausalLM(config).eval()
    tokens = torch.arange(6)[None]
    before = base(tokens).logits
    model = get_peft_model(base, SnellaConfig(r=2, init_weights=False, scaling=0.1)).eval()
    after = model(tokens).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, before)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, after)


def _mixtral():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=32, num_key_value_heads=2, **sizes))


def test_excluded_experts_are_reported_with_coverage():
    covered = 4 * 16 * 16
    share = covered / (covered + 4 * (48 * 16 + 16 * 24) + 4 * 16)
    with pytest.warns(
        UserWarning, match=rf"adapt {share:.0%} of the weights of MixtralForCausalLM.*experts"
    ) as records:
        kinds = default_kinds(_mixtral)
    assert kinds == {f"model.layers.#.self_attn.{part}_proj" for part in "qkvo"}
    message = str(next(w.message for w in records if "MixtralForCausalLM" in str(w.message)))
    assert "'model.layers.0.mlp.experts.gate_up_proj' [4, 48, 16] of MixtralExperts" in message
    assert "'model.layers.0.mlp.gate.weight' [4, 16] of MixtralTopKRouter" in message


def test_experts_can_be_trained_in_full():
    model = get_peft_model(
        _mixtral(), SnellaConfig(r=2, target_modules=["q_proj"], parameters_to_save=["gate_up_proj"])
    )
    model(torch.arange(6)[None]).logits.square().sum().backward()
    experts = [p for n, p in model.named_parameters() if "gate_up_proj" in n and p.requires_grad]
    assert len(experts) == 1 and experts[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (
            lambda: nn.Embedding(4, 4),
            "a Embedding; .*trainable_token_indices, or the whole embedding",
        ),
        (lambda: nn.Conv1d(4, 4, 1), "a Conv1d; .*train it in full with modules_to_save"),
        (lambda: nn.Conv3d(4, 4, 1), "a Conv3d; .*train it in full with modules_to_save"),
    ],
)
def test_unsupported_layers_raise_with_alternative(make, hint):
    with pytest.raises(TypeError, match=f"target_modules matches '0', {hint}"):
        get_peft_model(nn.Sequential(make()), SnellaConfig(target_modules=["0"]))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_slow_expression_raises(field, monkeypatch):
    monkeypatch.setattr(targets_module, "_MATCH_TIMEOUT_S", 0.2)
    model = nn.ModuleDict({"a" * 40: nn.Linear(4, 4)})
    settings = {"target_modules": ["linear"]} | {field: r"(a|aa)+(a|aa)+(a|aa)+(a|aa)+b"}
    with pytest.raises(ValueError, match=r"regular expression '\(a\|aa\)\+.*' takes more than 0\.2 s to match .*aaaa"):
        get_peft_model(model, SnellaConfig(**settings))


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Sequential(nn.Linear(6, 3))),
        nn.ModuleDict({"a": nn.Linear(6, 3)}),
        nn.ModuleList([nn.Linear(6, 3)]),
        nn.TransformerEncoderLayer(6, 2),
    ],
)
def test_all_layers_of_a_nested_head_belong_to_it(head):
    model = nn.Module()
    model.body, model.out = nn.Linear(6, 6), head
    model.get_classifier = lambda: model.out
    assert all_linear_names(model) == ["body"]
    assert set(head_layers(model)) == {f"out.{name}" for name, part in head.named_modules() if type(part) is nn.Linear}
