import re

import numpy as np
import pytest
import timm
import torch

from snella_app.backbones.create import create_backbone

QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
POSITIONS = "Transformer/posembed_input/pos_embedding"


def load(path, name="test_vit", num_classes=4, **options):
    return create_backbone(name, num_classes=num_classes, weights=str(path), **options).eval()


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_file_in_google_layout_reproduces_the_outputs_of_the_saved_model(
    prefix, tiny_vit, write_npz, images, tmp_path
):
    model = tiny_vit()
    write_npz(model, tmp_path / "vit.npz", prefix)
    assert torch.equal(load(tmp_path / "vit.npz")(images), model(images))


def test_other_class_counts_and_input_sizes_are_supported(tiny_vit, write_npz, tmp_path):
    model = tiny_vit(num_classes=21)
    write_npz(model, tmp_path / "vit.npz")
    loaded = load(tmp_path / "vit.npz", img_size=64)
    assert torch.equal(loaded.pos_embed, timm.layers.resample_abs_pos_embed(model.pos_embed, [4, 4]))
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_the_architecture_is_inferred_from_the_path(write_npz, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64).eval()
    write_npz(model, tmp_path / "Ti_16.npz")
    loaded = create_backbone(str(tmp_path / "Ti_16.npz"), num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 64, 64) and config["mean"] == (0.5, 0.5, 0.5)


def test_a_wrong_number_of_heads_is_rejected_even_if_all_shapes_match(tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(num_heads=4), tmp_path / "vit.npz")
    with pytest.raises(ValueError, match=r"vit\.npz' have 4 attention heads, but backbone 'test_vit' has 2"):
        load(tmp_path / "vit.npz")


def test_an_array_that_would_be_broadcast_is_rejected(tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(), tmp_path / "vit.npz", **{"Transformer/encoder_norm/scale": np.ones(1, dtype=np.float32)})
    with pytest.raises(ValueError, match=re.escape("Transformer/encoder_norm/scale: file [1], expected [64]")):
        load(tmp_path / "vit.npz")


def test_missing_arrays_are_reported(tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(), tmp_path / "vit.npz", **{"Transformer/encoderblock_1/LayerNorm_2/bias": None})
    with pytest.raises(ValueError, match=r"encoderblock_1/LayerNorm_2/bias: file lacks it, expected \[64\]"):
        load(tmp_path / "vit.npz")
    write_npz(tiny_vit(), tmp_path / "vit.npz", **{QUERY: None})
    with pytest.raises(ValueError, match=f"not a ViT in Google's layout: {QUERY} missing"):
        load(tmp_path / "vit.npz")


def test_many_invalid_arrays_are_counted(tiny_vit, write_npz, tmp_path):
    gone = {f"Transformer/encoderblock_{i}/LayerNorm_{n}/bias": None for i in range(4) for n in (0, 2)}
    write_npz(tiny_vit(), tmp_path / "vit.npz", **gone)
    with pytest.raises(ValueError, match="and 3 more"):
        load(tmp_path / "vit.npz")


def test_positions_without_a_class_token_are_rejected(tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(), tmp_path / "vit.npz", **{POSITIONS: np.zeros((1, 100, 64), dtype=np.float32)})
    with pytest.raises(ValueError, match=re.escape(f"{POSITIONS} [1, 100, 64]")):
        load(tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("key", "kind"),
    [("conv_root/kernel", "a ResNet-ViT hybrid"), ("params/img/embedding/kernel", "a big_vision checkpoint")],
)
def test_other_google_layouts_are_rejected(key, kind, tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(), tmp_path / "vit.npz", **{key: np.zeros(1, dtype=np.float32)})
    with pytest.raises(NotImplementedError, match=kind):
        load(tmp_path / "vit.npz")


def test_an_unexpected_array_is_reported(tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(), tmp_path / "vit.npz", **{"Transformer/encoderblock_9/extra": np.zeros(3, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"Transformer/encoderblock_9/extra: file \[3\], not part of a ViT"):
        load(tmp_path / "vit.npz")


def test_the_representation_layer_of_early_releases_is_dropped_with_a_note(
    tiny_vit, write_npz, images, tmp_path, caplog
):
    caplog.set_level("INFO", logger="snella_app.backbones")
    layer = {"pre_logits/kernel": np.ones((64, 64), dtype=np.float32), "pre_logits/bias": np.ones(64, dtype=np.float32)}
    write_npz(tiny_vit(), tmp_path / "vit.npz", **layer)
    assert torch.equal(load(tmp_path / "vit.npz").forward_features(images), tiny_vit().forward_features(images))
    assert "dropped the representation layer of" in caplog.text
