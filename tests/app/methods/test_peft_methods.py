import pytest
import torch
from torch import nn

from snella_app.methods import build_method, find_method, load_trained, merge_trained, save_trained


def test_options_are_the_fields_of_the_peft_configuration(make_model):
    assert {"r", "sparsity", "select_top"} <= set(find_method("supertuning").options)
    model = build_method("supertuning", make_model(), sparsity=0.9)
    config = model.peft_config["default"]
    assert config.sparsity == 0.9 and config.modules_to_save == ["head"]
    assert build_method("vera-16", make_model()).peft_config["default"].r == 16


def test_sparse_methods_train_only_values(make_model):
    for method in ("shira-2", "supertuning"):
        model = build_method(method, make_model())
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "head" not in n]
        assert all(p.ndim == 1 and len(p) < 64 * 64 / 4 for p in trained)


def test_ln_tuning_only_changes_layer_normalizations(make_model):
    model = build_method("ln_tuning", make_model())
    trained = {n.split(".ln_tuning_layers")[0] for n, p in model.named_parameters() if p.requires_grad and "ln_" in n}
    names = {f"blocks.{i}.norm{k}" for i in range(6) for k in (1, 2)} | {"norm"}
    assert trained == {f"base_model.model.{name}" for name in names}


def test_random_projections_are_recomputed_from_the_seed_and_not_saved(make_model, images, tmp_path):
    for method, saved in (("vera-8", False), ("randlora-8", False), ("randlora-8", True)):
        folder = tmp_path / f"{method}-{saved}"
        model = build_method(method, make_model(), **({"save_projection": True} if saved else {})).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "head" not in name:
                nn.init.normal_(parameter, std=0.1)
        save_trained(model, folder)
        (weights,) = folder.glob("*.safetensors")
        assert (weights.stat().st_size > 100_000) == saved
        with torch.no_grad():
            assert torch.equal(load_trained(folder, make_model())(images), model(images))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("shira", r"Target module Conv2d.* is not supported"),
        ("vera", "No layers types compatible with VeRA"),
        ("ln_tuning", "ResNet has no LayerNorm outside its head 'fc'"),
    ],
)
def test_an_unsupported_model_is_reported_with_the_method(method, reason, make_model):
    with pytest.raises(ValueError, match=f"method '{method}' cannot be applied to ResNet: {reason}"):
        build_method(method, make_model("test_resnet"))


def test_boft_rejects_a_butterfly_factor_that_peft_would_change(make_model):
    build_method("boft", make_model(), boft_n_butterfly_factor=1)
    with pytest.raises(ValueError, match=r"boft_n_butterfly_factor must be 1 if BOFT's CUDA .* got 2"):
        build_method("boft", make_model(), boft_n_butterfly_factor=2)


@pytest.mark.parametrize("method", ["snella", "boft", "hra"])
def test_layers_to_transform_selects_blocks_and_rejects_missing_ones(method, make_model, tmp_path):
    model = build_method(method, make_model(), layers_to_transform=[1, 4])
    save_trained(model, tmp_path)
    for adapted in (model, load_trained(tmp_path, make_model())):
        names = (name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
        assert {name.split(".")[3] for name in names if "blocks" in name} == {"1", "4"}
    with pytest.raises(ValueError, match="layers_to_transform must be indices from 0 to 5, got 20"):
        build_method(method, make_model(), layers_to_transform=[1, 20])
    with pytest.raises(ValueError, match="layers_to_transform must be indices from 0 to 5, got 6"):
        build_method(method, make_model(), layers_to_transform=6)


def test_layers_to_transform_rejects_a_regular_expression(make_model):
    with pytest.raises(ValueError, match=r"target_modules must be a list with layers_to_transform, got '\.\*qkv'"):
        build_method("loha-2", make_model(), layers_to_transform=[1], target_modules=".*qkv")
    with pytest.raises(ValueError, match="target_modules must be a list with layers_to_transform, got None"):
        build_method("hra", make_model(), layers_to_transform=[1], target_modules=None)


def test_an_unknown_layers_pattern_is_rejected(make_model):
    with pytest.raises(ValueError, match="layers_pattern must name a list of blocks of the model, got 'block'"):
        build_method("boft", make_model(), layers_to_transform=[1], layers_pattern="block")


def test_adapters_of_standardized_weights_cannot_be_merged(make_model):
    model = build_method("lora-2", make_model("nf_resnet26"))
    with pytest.raises(
        ValueError, match=r"cannot be merged into NormFreeNet: .* 'stages.0.0.downsample.conv' and 27 m"
    ):
        merge_trained(model)
