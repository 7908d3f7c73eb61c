import argparse
import re
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from snella_app.backbones.checkpoint import read_checkpoint
from snella_app.backbones.create import create_backbone


def save(state: dict, path: Path) -> str:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_a_saved_model_reloads_with_the_same_outputs(suffix, tiny_vit, images, tmp_path):
    model = tiny_vit()
    file = save(model.state_dict(), tmp_path / f"weights{suffix}")
    loaded = create_backbone("test_vit", num_classes=4, weights=file).eval()
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    ],
    ids=["model", "state_dict", "both", "ddp", "compiled-ddp", "lightning", "namespace"],
)
def test_nested_dictionaries_and_wrapper_prefixes_are_recognized(wrap, tiny_vit, images, tmp_path):
    model = tiny_vit()
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    loaded = create_backbone("test_vit", num_classes=4, weights=str(tmp_path / "weights.pth")).eval()
    assert torch.equal(loaded(images), model(images))


def test_weights_replace_the_hub_regardless_of_pretrained(tiny_vit, images, tmp_path):
    model = tiny_vit()
    file = save(model.state_dict(), tmp_path / "w.pth")
    loaded = create_backbone("test_vit", num_classes=4, weights=file, pretrained=False).eval()
    assert torch.equal(loaded(images), model(images))


def test_a_head_with_another_class_count_is_dropped_and_the_rest_loaded(tiny_vit, images, tmp_path):
    model = tiny_vit(num_classes=7)
    file = save(model.state_dict(), tmp_path / "w.pth")
    loaded = create_backbone("test_vit", num_classes=3, weights=file).eval()
    assert loaded(images).shape == (2, 3)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    headless = create_backbone("test_vit", num_classes=0, weights=file).eval()
    assert torch.equal(headless.forward_features(images), model.forward_features(images))


def test_a_file_without_a_head_is_loaded(tiny_vit, images, tmp_path):
    model = tiny_vit(num_classes=0)
    loaded = create_backbone("test_vit", num_classes=3, weights=save(model.state_dict(), tmp_path / "w.pth")).eval()
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))


def test_positions_are_resampled_for_another_input_size(tiny_vit, tmp_path):
    model = tiny_vit()
    file = save(model.state_dict(), tmp_path / "w.pth")
    loaded = create_backbone("test_vit", num_classes=4, weights=file, img_size=96)
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [6, 6], num_prefix_tokens=1)
    assert loaded.pos_embed.shape == (1, 37, 64)
    assert torch.equal(loaded.pos_embed, expected)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 96, 96)


def test_half_precision_weights_are_loaded_into_a_float32_model(tiny_vit, tmp_path):
    state = {key: value.half() for key, value in tiny_vit().state_dict().items()}
    loaded = create_backbone("test_vit", num_classes=4, weights=save(state, tmp_path / "w.safetensors"))
    assert loaded.norm.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, state["head.weight"].float())


def test_a_convolutional_network_loads_without_batch_counters(tmp_path):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    loaded = create_backbone("test_resnet", num_classes=4, weights=save(state, tmp_path / "w.pth")).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_missing_unexpected_and_reshaped_tensors_are_reported_together_with_their_shapes(tiny_vit, tmp_path):
    state = tiny_vit().state_dict()
    del state["blocks.0.norm1.weight"]
    state["blocks.9.extra"] = torch.zeros(2, 3)
    state["norm.weight"] = torch.zeros(63)
    file = save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError) as caught:
        create_backbone("test_vit", num_classes=4, weights=file)
    message = str(caught.value)
    assert "1 missing (blocks.0.norm1.weight [64])" in message
    assert "1 unexpected (blocks.9.extra [2, 3])" in message
    assert "1 with a different shape (norm.weight: file [63], model [64])" in message
    assert "w.pth" in message and "'test_vit'" in message


def test_errors_show_the_number_of_mismatches_and_the_first_names(tiny_vit, tmp_path):
    state = {key: value for key, value in tiny_vit().state_dict().items() if not key.startswith("blocks.")}
    file = save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"\d+ missing \(blocks.0.norm1.weight \[64\], .* and \d+ more\)"):
        create_backbone("test_vit", num_classes=4, weights=file)


def test_a_different_patch_size_is_rejected_rather_than_resampled(tiny_vit, tmp_path):
    state = tiny_vit().state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(64, 3, 8, 8)
    file = save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=re.escape("patch_embed.proj.weight: file [64, 3, 8, 8], model [64, 3, 16, 16]")
    ):
        create_backbone("test_vit", num_classes=4, weights=file)


def test_positions_without_a_square_grid_are_rejected(tiny_vit, tmp_path):
    state = tiny_vit().state_dict()
    state["pos_embed"] = torch.zeros(1, 91, 64)
    file = save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"timm cannot convert them .*pos_embed \[1, 91, 64\]"):
        create_backbone("test_vit", num_classes=4, weights=file)


def test_a_file_with_code_is_rejected_and_not_executed(tmp_path):
    class Surprise:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Surprise()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth' cannot be read as tensors \(files that contain code are rejected\)"):
        read_checkpoint(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("n_bytes", [0, 900])
def test_a_damaged_file_is_reported(suffix, n_bytes, tiny_vit, write_npz, tmp_path):
    path = tmp_path / f"broken{suffix}"
    model = tiny_vit()
    write_npz(model, path) if suffix == ".npz" else save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match=rf"broken\{suffix}' (cannot be read|are not a readable)"):
        read_checkpoint(path)


def test_a_damaged_pickle_is_reported(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, b"\x80\x02R." if name.endswith("data.pkl") else content)
    with pytest.raises(IndexError, match="pop from empty list"):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"w\.pth' cannot be read as tensors"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "description"),
    [([1, 2], "got list"), ({"epoch": 3}, "a dictionary with epoch"), ({"model": {}}, "a dictionary with ")],
)
def test_a_file_without_tensors_error_lists_its_content(content, description, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"must contain a dictionary of tensors, .*{description}"):
        read_checkpoint(tmp_path / "w.pth")


def test_an_unknown_suffix_error_lists_the_supported_suffixes(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"must end in one of \.pth, \.pt, \.bin, \.pth\.tar, \.safetensors, \.npz, got '\.h5'"
    ):
        create_backbone("test_vit", num_classes=2, weights=str(tmp_path / "w.h5"))


def test_a_missing_weight_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights '.*gone\.pth': no such file"):
        create_backbone("test_vit", num_classes=2, weights=str(tmp_path / "gone.pth"))
