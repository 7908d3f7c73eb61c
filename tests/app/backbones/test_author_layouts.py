"""Checkpoints in the authors' layouts, written from tiny timm models of the same class."""

import argparse
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN
from torch import Tensor, nn

from snella_app.backbones.architectures import infer_architecture
from snella_app.backbones.checkpoint import Checkpoint, load_weights, read_checkpoint
from snella_app.backbones.create import create_backbone

SIZE = 64


def build(name: str, **options) -> nn.Module:
    """Return a tiny model whose parameters all differ from their initial values."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def normalization(model: nn.Module) -> tuple[tuple, tuple]:
    config = timm.data.resolve_model_data_config(model)
    return config["mean"], config["std"]


IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def inferred(state: dict[str, Tensor]):
    return infer_architecture(Checkpoint(state, Path("w.pth")), source="w.pth")


def same_features(model: nn.Module, other: nn.Module, size: int = SIZE) -> bool:
    with torch.no_grad():
        return torch.equal(model.eval().forward_features(images(size)), other.forward_features(images(size)))


def sine_positions(grid: int, width: int, first: str) -> Tensor:
    """Fixed position embeddings: MAE encodes the column first, MoCo v3 the row; zero for the class token."""
    rows = [[0.0] * width]
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            places = (column, row) if first == "column" else (row, column)
            entry = []
            for place in places:
                angles = [place / 10000 ** (k / quarter) for k in range(quarter)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(entry)
    return torch.tensor(rows)[None]


def with_positions(first: str, **options) -> nn.Module:
    model = build("test_vit", img_size=SIZE, **options)
    with torch.no_grad():
        model.pos_embed.copy_(sine_positions(SIZE // 16, 64, first))
    return model


# MAE ----------------------------------------------------------------------------------------------------------------


def mae_encoder(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `mae_pretrain_vit_base.pth`, without decoder and head."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


@pytest.mark.parametrize("full", [False, True], ids=["encoder", "with-decoder"])
def test_an_mae_checkpoint_gives_the_same_features_and_imagenet_normalization(full, tmp_path):
    model = with_positions("column", num_classes=0)
    state = mae_encoder(model)
    if full:
        state |= {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
        state |= {"decoder_embed.weight": torch.zeros(32, 64), "decoder_blocks.0.norm1.weight": torch.zeros(32)}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_tiny.pth")
    loaded = create_backbone(
        "test_vit", num_classes=3, weights=str(tmp_path / "mae_pretrain_vit_tiny.pth"), img_size=64
    )
    assert same_features(loaded, model)
    assert normalization(loaded) == IMAGENET
    assert read_checkpoint(tmp_path / "mae_pretrain_vit_tiny.pth").origin.label == "MAE"


def test_a_fine_tuned_mae_checkpoint_uses_average_pooling(tmp_path):
    model = with_positions("column", num_classes=5, global_pool="avg")
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 99, "scaler": {"scale": 2.0}}
    torch.save(content | {"args": argparse.Namespace(lr=0.1)}, tmp_path / "mae_finetuned_vit.pth")
    loaded = create_backbone("test_vit", num_classes=5, weights=str(tmp_path / "mae_finetuned_vit.pth"), img_size=SIZE)
    assert torch.equal(loaded.eval()(images()), model(images()))


def test_a_tensor_missing_from_an_mae_file_is_reported(tmp_path):
    state = mae_encoder(with_positions("column", num_classes=0))
    del state["norm.bias"]
    torch.save({"model": state | {"blocks.9.norm1.weight": torch.zeros(64)}}, tmp_path / "mae.pth")
    with pytest.raises(
        ValueError, match=r"1 missing \(norm\.bias \[64\]\); 1 unexpected \(blocks\.9\.norm1\.weight \[64\]\)"
    ):
        create_backbone("test_vit", num_classes=3, weights=str(tmp_path / "mae.pth"), img_size=SIZE)


def test_mae_positions_are_resampled_for_another_image_size(tmp_path):
    torch.save({"model": mae_encoder(with_positions("column", num_classes=0))}, tmp_path / "mae.pth")
    loaded = create_backbone("test_vit", num_classes=3, weights=str(tmp_path / "mae.pth"), img_size=96)
    expected = timm.layers.resample_abs_pos_embed(sine_positions(4, 64, "column"), [6, 6])
    assert torch.equal(loaded.pos_embed, expected)
    assert loaded(images(96)).shape == (2, 3)


# MoCo v3 ------------------------------------------------------------------------------------------------------------


def test_a_linear_moco_v3_checkpoint_gives_the_same_outputs_and_imagenet_normalization(tmp_path):
    model = with_positions("row", num_classes=7)
    content = {
        "epoch": 90,
        "arch": "vit_base",
        "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
        "best_acc1": torch.tensor(76.7),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    }
    path = tmp_path / "linear-vit-t-300ep.pth.tar"
    torch.save(content, path)
    loaded = create_backbone("test_vit", num_classes=7, weights=str(path), img_size=SIZE)
    assert torch.equal(loaded.eval()(images()), model(images()))
    assert normalization(loaded) == IMAGENET
    assert read_checkpoint(path).origin.label == "MoCo v3"


def test_a_head_for_other_classes_is_dropped_with_a_note(tmp_path, caplog):
    caplog.set_level("INFO", logger="snella_app.backbones")
    model = with_positions("row", num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "linear.pth.tar")
    loaded = create_backbone("test_vit", num_classes=2, weights=str(tmp_path / "linear.pth.tar"), img_size=SIZE)
    assert same_features(loaded, model) and loaded.head.out_features == 2
    assert "head of 7 classes in" in caplog.text
    assert "contains MoCo v3 weights: normalizing images with mean (0.485, 0.456, 0.406)" in caplog.text


def test_a_moco_v3_pretraining_checkpoint_gives_its_base_encoder(tmp_path, caplog):
    caplog.set_level("INFO", logger="snella_app.backbones")
    model = with_positions("row", num_classes=0)
    state = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items()}
    state |= {f"module.momentum_encoder.{key}": value + 1 for key, value in model.state_dict().items()}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(8, 64), "module.predictor.0.weight": torch.zeros(8, 8)}
    torch.save({"state_dict": state}, tmp_path / "vit-t-300ep.pth.tar")
    loaded = create_backbone("test_vit", num_classes=2, weights=str(tmp_path / "vit-t-300ep.pth.tar"), img_size=SIZE)
    assert same_features(loaded, model)
    assert f"momentum encoder, projection head and predictor ({len(model.state_dict()) + 2} tensors)" in caplog.text


def test_a_small_moco_v3_vit_has_twelve_heads(tmp_path):
    for first, heads in (("row", 12), ("column", None)):
        state = {"pos_embed": sine_positions(2, 384, first), "patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)}
        torch.save(state | {f"blocks.{k}.norm1.bias": torch.zeros(384) for k in range(12)}, tmp_path / f"{first}.pth")
        checkpoint = read_checkpoint(tmp_path / f"{first}.pth")
        assert checkpoint.num_heads == heads
        vit = infer_architecture(checkpoint, source="w.pth")
        assert (vit.name, vit.options) == ("vit_small_patch16_224", {"num_heads": 12} if heads else {})
    with pytest.raises(ValueError, match=r"have 12 attention heads, but backbone 'vit_small_patch16_224' has 6"):
        create_backbone("vit_small_patch16_224", num_classes=0, weights=str(tmp_path / "row.pth"), img_size=32)


def test_the_publisher_of_trained_positions_is_unknown(tmp_path):
    for change in (torch.full((1, 1, 64), 0.1), torch.zeros(1, 17, 64) + 0.01):
        torch.save({"pos_embed": sine_positions(4, 64, "row") + change}, tmp_path / "w.pth")
        assert read_checkpoint(tmp_path / "w.pth").origin is None


# Swin ---------------------------------------------------------------------------------------------------------------

SWIN = {"embed_dim": 16, "depths": (2, 1, 2), "num_heads": (2, 4, 8), "window_size": 4, "mlp_ratio": 2.0}


def tiny_swin(**options) -> nn.Module:
    return build("swin_tiny_patch4_window7_224", **{"img_size": SIZE, "num_classes": 6} | SWIN | options)


def microsoft_swin(model: nn.Module) -> dict[str, Tensor]:
    """Microsoft's layout: merging at the end of a stage, a plain head, and saved buffers."""
    state = {}
    for key, value in model.state_dict().items():
        merged = re.match(r"layers\.(\d)\.downsample\.(.*)", key)
        name = f"layers.{int(merged[1]) - 1}.downsample.{merged[2]}" if merged else key
        state[name.replace("head.fc.", "head.")] = value
    for name, module in model.named_modules():
        if hasattr(module, "relative_position_index"):
            state[f"{name}.relative_position_index"] = module.relative_position_index
        if getattr(module, "attn_mask", None) is not None:
            state[f"{name}.attn_mask"] = module.attn_mask
    return state


def test_microsoft_swin_gives_the_same_features_and_size_from_its_file_alone(tmp_path):
    model = tiny_swin()
    state = microsoft_swin(model)
    assert {"layers.0.downsample.reduction.weight", "head.weight", "layers.0.blocks.1.attn_mask"} < set(state)
    torch.save({"model": state}, tmp_path / "swin_tiny_22k.pth")
    loaded = create_backbone(str(tmp_path / "swin_tiny_22k.pth"), num_classes=6)
    assert torch.equal(loaded.eval()(images()), model(images()))
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, SIZE, SIZE)
    assert normalization(loaded) == IMAGENET
    other = create_backbone(str(tmp_path / "swin_tiny_22k.pth"), num_classes=3)
    assert same_features(other, model)


# raised by `resize_rel_pos_bias_table`
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
def test_swin_position_tables_are_resampled_as_in_timm(tmp_path):
    model = tiny_swin()
    torch.save({"model": microsoft_swin(model)}, tmp_path / "swin.pth")
    # at 32 pixels the last stage has 2x2 patches, fewer than a window
    smaller = create_backbone(str(tmp_path / "swin.pth"), num_classes=6, img_size=32)
    tables = [m.layers[2].blocks[0].attn.relative_position_bias_table for m in (model, smaller)]
    assert tables[1].shape == (9, 8)
    resized = timm.layers.resize_rel_pos_bias_table(tables[0], new_window_size=(2, 2), new_bias_shape=(9, 8))
    assert torch.equal(tables[1], resized)
    # both grids contain the bias of a patch to itself
    assert torch.allclose(tables[1][4], tables[0][24], atol=1e-6)
    first = [m.layers[0].blocks[0].attn.relative_position_bias_table for m in (model, smaller)]
    assert torch.equal(*first)
    assert smaller(images(32)).shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        ("swin_tiny_patch4_window7_224", 224),
        ("swin_small_patch4_window7_224", 224),
        ("swin_base_patch4_window7_224", 224),
        ("swin_base_patch4_window12_384", 384),
        ("swin_large_patch4_window7_224", 224),
    ],
)
def test_the_published_swins_are_inferred_from_their_shapes(name, img_size):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    architecture = inferred(state)
    assert (architecture.name, architecture.img_size, architecture.options) == (name, img_size, {})
    other = inferred(state | {"layers.0.blocks.1.attn_mask": torch.zeros(1, 1, 1)})
    assert other.img_size == 4


def test_missing_and_extra_swin_tensors_are_reported(tmp_path):
    state = microsoft_swin(tiny_swin())
    del state["layers.1.downsample.norm.weight"]
    torch.save({"model": state | {"absolute_pos_embed": torch.zeros(1, 256, 16)}}, tmp_path / "swin.pth")
    with pytest.raises(ValueError) as caught:
        create_backbone(str(tmp_path / "swin.pth"), num_classes=6)
    assert "1 missing (layers.2.downsample.norm.weight [128])" in str(caught.value)
    assert "1 unexpected (absolute_pos_embed [1, 256, 16])" in str(caught.value)


def test_swin_tables_for_other_heads_or_blocks_are_rejected_before_timm_resizes_them(tmp_path):
    model = tiny_swin()
    state = microsoft_swin(model)
    state["layers.1.blocks.0.attn.relative_position_bias_table"] = torch.zeros(49, 2)
    state["layers.2.blocks.2.attn.relative_position_bias_table"] = torch.zeros(49, 8)
    with pytest.raises(
        ValueError, match=r"unexpected \(layers\.2\.blocks\.2.*different shape .*file \[1, 2\], model \[1, 4\]"
    ):
        load_weights(model, Checkpoint(state, Path("swin.pth")), name="swin")


# ConvNeXt -----------------------------------------------------------------------------------------------------------

CONVNEXT = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}


def facebook_convnext(model: nn.Module) -> dict[str, Tensor]:
    """Facebook's layout: stem and downsampling in one list, no separate block list, pointwise layers as `pwconv`."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        if ".mlp.grn." in key:
            value = value.reshape(1, 1, 1, -1)
        for timm_name, original_name in (
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("mlp.grn.weight", "grn.gamma"),
            ("mlp.grn.bias", "grn.beta"),
            ("head.norm", "norm"),
            ("head.fc", "head"),
        ):
            key = key.replace(timm_name, original_name)
        state[key] = value
    return state


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
def test_facebook_convnext_gives_the_same_features_from_its_file_alone(name, tmp_path):
    model = build(name, num_classes=6, **CONVNEXT)
    state = facebook_convnext(model)
    assert {
        "downsample_layers.0.0.weight",
        "downsample_layers.3.1.bias",
        "stages.1.1.pwconv2.weight",
        "norm.bias",
    } < set(state)
    torch.save({"model": state}, tmp_path / "convnext_tiny_22k_224.pth")
    loaded = create_backbone(str(tmp_path / "convnext_tiny_22k_224.pth"), num_classes=6)
    assert torch.equal(loaded.eval()(images()), model(images()))
    assert normalization(loaded) == IMAGENET
    other = create_backbone(str(tmp_path / "convnext_tiny_22k_224.pth"), num_classes=3, img_size=96)
    assert same_features(other, model, 96)
    assert timm.data.resolve_model_data_config(other)["input_size"] == (3, 96, 96)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_a_timm_convnext_file_needs_no_name(conv_mlp, tmp_path):
    model = build("convnext_tiny", num_classes=6, conv_mlp=conv_mlp, **CONVNEXT)
    torch.save(model.state_dict(), tmp_path / "convnext.pth")
    loaded = create_backbone(str(tmp_path / "convnext.pth"), num_classes=6)
    assert torch.equal(loaded.eval()(images()), model(images()))


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "convnextv2_base"]
)
def test_the_published_convnexts_are_inferred_from_their_shapes(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
        for layout in (state, facebook_convnext(timm.create_model(name))):
            architecture = inferred(layout)
            assert (architecture.name, architecture.img_size, architecture.options) == (name, None, {})


def test_missing_and_extra_convnext_tensors_are_reported(tmp_path):
    state = facebook_convnext(build("convnext_tiny", num_classes=6, **CONVNEXT))
    del state["stages.1.1.gamma"]
    torch.save({"model": state | {"norm2.weight": torch.zeros(3)}}, tmp_path / "convnext.pth")
    with pytest.raises(ValueError) as caught:
        create_backbone(str(tmp_path / "convnext.pth"), num_classes=6)
    assert "1 missing (stages.1.blocks.1.gamma [16])" in str(caught.value)
    assert "1 unexpected (norm2.weight [3])" in str(caught.value)


# model names and other layouts --------------------------------------------------------------------------------------


def test_arguments_beyond_the_name_are_stored_with_the_model(tmp_path):
    torch.save(build("convnext_tiny", num_classes=6, **CONVNEXT).state_dict(), tmp_path / "convnext.pth")
    loaded = create_backbone(str(tmp_path / "convnext.pth"), num_classes=6)
    arguments = loaded.pretrained_cfg["model_args"]
    assert arguments == {**CONVNEXT, "patch_size": 4}
    rebuilt = timm.create_model(loaded.pretrained_cfg["architecture"], num_classes=6, **arguments)
    rebuilt.load_state_dict(loaded.state_dict())


def test_a_clip_tower_error_suggests_names():
    with torch.device("meta"):
        state = timm.create_model("vit_base_patch16_clip_224").state_dict()
    with pytest.raises(
        ValueError, match=r"a norm before the blocks .* vit_base_patch16_clip_224 or .*weights='w\.pth'"
    ):
        inferred(state)


def openai_clip(model: nn.Module) -> dict[str, Tensor]:
    """CLIP's layout: image tower and text tower, torch's attention, projection as head."""
    values = model.state_dict()
    state = {"positional_embedding": torch.zeros(7, 8), "logit_scale": torch.tensor(1.0)}
    state |= {
        "visual.class_embedding": values["cls_token"][0, 0],
        "visual.positional_embedding": values["pos_embed"][0],
        "visual.conv1.weight": values["patch_embed.proj.weight"],
        "visual.proj": values["head.weight"].T,
    }
    for timm_name, original_name in (("norm_pre", "ln_pre"), ("norm", "ln_post")):
        state |= {f"visual.{original_name}.{leaf}": values[f"{timm_name}.{leaf}"] for leaf in ("weight", "bias")}
    layers = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "attn.proj": "attn.out_proj",
    }
    for k in range(len(model.blocks)):
        block = f"visual.transformer.resblocks.{k}"
        for timm_name, original_name in layers.items():
            state |= {
                f"{block}.{original_name}.{leaf}": values[f"blocks.{k}.{timm_name}.{leaf}"]
                for leaf in ("weight", "bias")
            }
        state |= {f"{block}.attn.in_proj_{leaf}": values[f"blocks.{k}.attn.qkv.{leaf}"] for leaf in ("weight", "bias")}
    return state


def test_the_openai_clip_layout_gives_the_same_features(tmp_path):
    sizes = {"num_classes": 6, "img_size": SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = build("vit_base_patch16_clip_224", **sizes)
    torch.save(openai_clip(model), tmp_path / "clip.pt")
    fresh = timm.create_model("vit_base_patch16_clip_224", **sizes)
    load_weights(fresh, read_checkpoint(tmp_path / "clip.pt"), name="vit_base_patch16_clip_224")
    assert same_features(fresh, model)
    assert normalization(fresh)[0] == OPENAI_CLIP_MEAN


def test_a_google_file_keeps_its_normalization_under_another_name(tiny_vit, write_npz, tmp_path):
    write_npz(tiny_vit(), tmp_path / "vit.npz")
    assert normalization(create_backbone("test_vit", num_classes=4, weights=str(tmp_path / "vit.npz")))[0] == (0.5,) * 3
