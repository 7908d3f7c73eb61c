import pytest
import timm
import torch
from torch import nn

from snella import SnellaConfig
from snella.matrices import adapted_matrices
from snella_app.methods import METHODS, build_method, check_method, find_method, parse_method, restore_method, spec_of
from snella_app.methods.model_parts import adaptable_layers, find_head
from snella_app.methods.peft_methods import check_gradients


def vit(num_classes=3):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=num_classes, img_size=32)


def trainable(model):
    return {name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad}


def test_linear_trains_the_head_only():
    assert trainable(build_method("linear", vit())) == {"head.weight", "head.bias"}


def test_bias_trains_every_bias_and_the_head():
    model = build_method("bias", vit())
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith("bias")} | {"head.weight"}


def test_bias_trains_query_and_value_biases_outside_linear_layers():
    model = timm.create_model("beit_base_patch16_224", num_classes=3, img_size=32, depth=1, embed_dim=32, num_heads=2)
    names = trainable(build_method("bias", model))
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= names


@pytest.mark.parametrize("method", ["lora-2", "adalora-2"])
def test_adapters_of_weights_that_the_model_reads_are_rejected(method):
    model = timm.create_model("beit_base_patch16_224", num_classes=3, img_size=32, depth=1, embed_dim=32, num_heads=2)
    model = build_method(method, model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.raises(ValueError, match=r"has no effect on '?.*attn\.qkv.*list other layers in target_modules"):
        check_gradients(model, method)


def test_full_trains_everything():
    model = build_method("full", vit())
    assert all(p.requires_grad for p in model.parameters())


def test_lora_adapts_the_four_matrices_of_each_block_and_trains_the_head():
    model = build_method("lora-4", vit())
    names = trainable(model)
    blocks = {f"blocks.{i}.{kind}" for i in range(6) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {n.split(".lora_")[0] for n in names if ".lora_" in n} == blocks
    assert {n for n in names if ".lora_" not in n} == {
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    }
    assert model.peft_config["default"].r == 4 and model.peft_config["default"].lora_alpha == 4


def test_snella_adapts_the_same_layers_as_lora():
    layers = {m.module_name for m in adapted_matrices(build_method("snella-4", vit()))}
    assert layers == set(adaptable_layers(vit(), "head"))
    assert len(adapted_matrices(build_method("snella-4", vit()))) == 36


def test_snell_is_snella_with_p_linear_and_uniform_budgets():
    config = build_method("snell-2", vit()).peft_config["default"]
    assert (config.kernel, config.allocation, config.r) == ("p_linear", "uniform", 2)


def test_options_reach_the_configuration():
    config = build_method("snella", vit(), r=4, target_sparsity=0.9, scaling=3.0, kernel="rbf").peft_config["default"]
    assert (config.r, config.target_sparsity, config.scaling, config.kernel) == (4, 0.9, 3.0, "rbf")


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_convolutions_are_adapted_in_networks_without_linear_layers(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    layers = adaptable_layers(model, find_head(model))
    assert layers and all(isinstance(model.get_submodule(n), nn.Conv2d) for n in layers)
    stem = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert stem not in layers
    for method in ("lora-2", "snella-2"):
        built = build_method(method, timm.create_model(name, num_classes=3))
        assert built(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_a_model_with_nothing_to_adapt_is_rejected():
    with pytest.raises(ValueError, match="Sequential has no Linear or Conv2d layer to adapt besides its head '1'"):
        adaptable_layers(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "1")


def test_layers_with_a_custom_forward_are_rejected_as_unsupported():
    with pytest.raises(ValueError, match=r"'snella-2' cannot be applied to NormFreeNet: .*custom forward"):
        build_method("snella-2", timm.create_model("nf_resnet26", num_classes=3))


def test_running_statistics_are_frozen_except_in_full_fine_tuning():
    for method, updates_statistics in (("linear", False), ("lora-2", False), ("full", True)):
        torch.manual_seed(0)
        model = build_method(method, timm.create_model("test_resnet", num_classes=3)).train()
        before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")}
        model(torch.randn(4, 3, 64, 64))
        assert any(not torch.equal(before[n], b) for n, b in model.named_buffers() if n in before) == updates_statistics


def test_a_typo_error_suggests_the_nearest_names():
    with pytest.raises(ValueError, match="got 'snela'; nearest: snella, snell"):
        build_method("snela", vit())
    with pytest.raises(ValueError, match=r"one of linear, bias, .*, lora-N, .*, got 'vpt-deap-5'; nearest: vpt-deep"):
        parse_method("vpt-deap-5")
    with pytest.raises(ValueError, match="got 'lora8'; did you mean 'lora-8'"):
        parse_method("lora8")
    with pytest.raises(ValueError, match=r"got 'lora0'; nearest: lora, klora"):
        parse_method("lora0")


def test_a_restored_method_that_does_not_fit_has_the_error_of_a_built_one():
    for apply in (build_method, lambda name, model, **options: restore_method(name, model, {}, **options)):
        with pytest.raises(ValueError, match="method 'lora-2' cannot be applied to VisionTransformer: No modules were"):
            apply("lora-2", vit(), target_modules=["none"])


def test_an_unsupported_rank_is_rejected():
    with pytest.raises(ValueError, match="method 'linear' takes no number, got 'linear-8'; use 'linear'"):
        build_method("linear-8", vit())
    with pytest.raises(ValueError, match="name, r, must be at least 1, got 'lora-0'"):
        parse_method("lora-0")


def test_conflicting_ranks_are_rejected():
    with pytest.raises(ValueError, match="'lora-8' sets r to 8, but got r=4"):
        build_method("lora-8", vit(), r=4)
    assert build_method("lora-4", vit(), r=4).peft_config["default"].r == 4


def test_an_unknown_option_error_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"has no option 'target_sparcity' \(nearest: target_sparsity"):
        build_method("snella", vit(), target_sparcity=0.5)
    with pytest.raises(ValueError, match="method 'linear' has no option 'r'; it has no options"):
        build_method("linear", vit(), r=4)
    with pytest.raises(ValueError, match="method 'snell' has no option 'kernel'"):
        check_method("snell", {"kernel": "rbf"})


def test_invalid_values_are_rejected_without_a_model():
    with pytest.raises(ValueError, match=r"target_sparsity.*1\.5"):
        check_method("snella", {"target_sparsity": 1.5})
    with pytest.raises(ValueError, match=r"r must be divisible by num_pieces=2, got r=3"):
        check_method("snella-3", {})
    with pytest.raises(ValueError, match=r"method 'adalora': an option has the wrong type, got \{'r': '8'\}: "):
        check_method("adalora", {"r": "8"})


def test_the_options_of_snella_are_the_fields_of_its_configuration():
    options = set(find_method("snella-8").options)
    assert {"r", "kernel", "target_sparsity", "preset", "min_layer_share"} <= options
    assert options <= set(SnellaConfig.__dataclass_fields__)
    assert "peft_type" not in options and "modules_to_save" not in options


def test_the_registry_lists_these_methods():
    core = "linear bias full partial mlp vpt-shallow vpt-deep vqt adapter mosa ssf lora dora adalora snella snell"
    chosen = "snella-matched klora gps spt-lora spt-adapter fixed-mask noah"
    catalog = "shira supertuning fourierft randlora vera loha lokr boft hra delora ln_tuning"
    assert {*core.split(), *chosen.split(), *catalog.split()} == set(METHODS)


def test_a_name_of_several_words_keeps_its_hyphens():
    assert parse_method("vpt-deep-50") == ("vpt-deep", 50)
    assert parse_method("vpt-deep") == ("vpt-deep", None)
    assert parse_method("ln_tuning") == ("ln_tuning", None)


def test_all_errors_of_the_options_are_reported_together():
    with pytest.raises(
        ValueError, match=r"'adapter-8': scale must be a finite number .*, got 'x'; dropout .*, got 1\.5"
    ):
        check_method("adapter-8", {"scale": "x", "dropout": 1.5})


@pytest.mark.parametrize("kernel", ["mix_k", "p_linear", "linear"])
def test_kernelized_lora_adds_the_dense_update(kernel):
    model = build_method("klora-4", vit(), kernel=kernel, scaling=2.0)
    matrix = next(m for m in adapted_matrices(model) if m.name.endswith("fc1"))
    layer, weight = matrix.layer, matrix.layer.get_base_layer().weight
    A, B = layer.snella_A["default"][0], layer.snella_B["default"]
    if kernel == "linear":
        delta = B @ A.T
    else:
        coeff = layer.snella_piece_coeff["default"][0]
        pieces = [(B[:, None, p : p + 2] - A[None, :, p : p + 2]).norm(dim=-1) for p in (0, 2)]
        delta = coeff[0] * pieces[0] + coeff[1] * pieces[1]
        delta = delta + delta.softmax(0) if kernel == "mix_k" else delta
    x = torch.randn(3, weight.shape[1])
    expected = x @ (weight + 2.0 * delta).T + layer.get_base_layer().bias
    torch.testing.assert_close(layer(x), expected)
    assert matrix.budget == matrix.size
    with pytest.raises(ValueError, match=r"sparsify_mode='none' keeps every entry .* must be 0, got 0\.7"):
        SnellaConfig(sparsify_mode="none")


def test_the_applied_method_is_stored_in_the_model():
    spec = spec_of(build_method("lora-4", vit()))
    assert (spec.name, spec.family, spec.options, spec.head) == ("lora-4", "lora", {"r": 4}, "head")
    with pytest.raises(ValueError, match="VisionTransformer was not created by build_method"):
        spec_of(vit())


def test_the_head_is_detected_or_required():
    assert find_head(timm.create_model("test_convnext", num_classes=3)) == "head.fc"
    assert find_head(timm.create_model("test_resnet", num_classes=3)) == "fc"
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert find_head(plain, "1") == "1"
    with pytest.raises(ValueError, match=r"Sequential does not declare .* linear layers are \['0', '1'\]"):
        find_head(plain)
    with pytest.raises(ValueError, match="head must name a module of the model, got 'out'"):
        find_head(plain, "out")
    assert find_head(plain, "") == ""  # the whole model, for models without a head
    with pytest.raises(ValueError, match=r"head 'head' has no weights \(num_classes=0\)"):
        find_head(vit(num_classes=0))
    with pytest.raises(ValueError, match=r"must name a module with weights, got 'norm_pre'; .* layers are .*'head'\]"):
        find_head(vit(), "norm_pre")


def test_timm_models_without_a_configured_head_use_get_classifier():
    model = vit()
    model.pretrained_cfg = {}
    assert find_head(model) == "head"
