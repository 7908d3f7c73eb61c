import re

import pytest
import timm
import torch

from snella_app.backbones.architectures import infer_vit
from snella_app.backbones.create import create_backbone


def shapes_of(name: str, **options) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return timm.create_model(name, **options).state_dict()


@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        ("vit_tiny_patch16_224", 224),
        ("vit_small_patch32_224", 384),
        ("vit_base_patch16_224", 224),
        ("vit_base_patch8_224", 112),
        ("vit_large_patch14_224", 224),
        ("vit_huge_patch14_224", 224),
        ("vit_small_patch14_dinov2", 518),
        ("vit_large_patch14_dinov2", 98),
        ("vit_base_patch14_reg4_dinov2", 518),
    ],
)
def test_the_architecture_and_input_size_are_read_from_the_shapes(name: str, img_size: int):
    architecture = infer_vit(shapes_of(name, img_size=img_size), source="w.pth")
    assert (architecture.name, architecture.img_size, architecture.options) == (name, img_size, {})


def test_a_norm_after_pooling_selects_average_pooling():
    architecture = infer_vit(shapes_of("vit_base_patch16_224", global_pool="avg"), source="w.pth")
    assert architecture.options == {"global_pool": "avg"}


def test_a_weight_file_is_a_valid_backbone(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=48, global_pool="avg").eval()
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    loaded = create_backbone(str(tmp_path / "vit.pth"), num_classes=3).eval()
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(images), model(images))
    larger = create_backbone(str(tmp_path / "vit.pth"), num_classes=2, img_size=80)
    assert larger(torch.zeros(1, 3, 80, 80)).shape == (1, 2)
    random = create_backbone(str(tmp_path / "vit.pth"), num_classes=3, pretrained=False)
    assert not torch.equal(random.pos_embed, model.pos_embed)


def test_an_original_dinov2_file_with_a_mask_token_is_recognized(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28, depth=12).eval()
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14.pth")
    loaded = create_backbone(str(tmp_path / "dinov2_vits14.pth"), num_classes=2).eval()
    images = torch.randn(1, 3, 28, 28)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))


def test_an_unknown_vit_size_error_contains_the_inferred_sizes():
    with pytest.raises(
        ValueError, match=r"width 64, depth \d+, patch size 16, 101 positions, 0 register .*weights='w.pth'"
    ):
        infer_vit(shapes_of("test_vit"), source="w.pth")


def test_a_size_without_a_timm_name_error_contains_the_inferred_sizes():
    with pytest.raises(ValueError, match="width 768, depth 12, patch size 12"):
        infer_vit(shapes_of("vit_base_patch16_224", patch_size=12, img_size=120), source="w.pth")


def test_an_unknown_network_error_lists_its_tensors():
    with pytest.raises(ValueError, match=re.escape("it contains conv1.0.weight [")):
        infer_vit(shapes_of("test_resnet"), source="w.pth")


@pytest.mark.parametrize(
    ("name", "options", "missing", "error"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 32}, "layers.0.blocks.0.mlp.fc1.weight", "mlp.fc1.weight"),
        ("convnext_tiny", {"dims": (8, 16, 32, 64)}, "stages.0.", "patch_embed.proj.weight .* is missing"),
    ],
)
def test_files_with_missing_tensors_are_rejected(name: str, options, missing: str, error: str, tmp_path):
    state = timm.create_model(name, num_classes=2, depths=(1, 1, 1, 1), **options).state_dict()
    file = tmp_path / "w.pth"
    torch.save({key: value for key, value in state.items() if not key.startswith(missing)}, file)
    with pytest.raises(ValueError, match=rf"cannot infer the architecture of '.*w.pth' .*{error}.* weights='.*w.pth'"):
        create_backbone(str(file), num_classes=2)


@pytest.mark.parametrize("change", [{"pos_embed": torch.zeros(1, 0, 192)}, {"reg_token": torch.zeros(3)}])
def test_files_with_tensors_of_another_shape_are_rejected(change, tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32).state_dict()
    torch.save(state | change, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"cannot infer the architecture of '.*w\.pth' from its shapes: "):
        create_backbone(str(tmp_path / "w.pth"), num_classes=2)
