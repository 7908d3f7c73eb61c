"""Export formats of a run's model."""

import ast
import dataclasses
import json
import math
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

from snella import load_sparse
from snella.compat.sparse_file import SparsePatch, decode_positions, encode_positions
from snella_app.cli.commands import ExportName
from snella_app.cli.main import main
from snella_app.config.train import TrainConfig
from snella_app.runs import export as exporting
from snella_app.runs import load_run
from snella_app.runs.export import FORMATS, export
from snella_app.runs.graphs import MAX_RELATIVE_ERROR, ExportedGraph, compare_outputs, export_onnx, preprocessing_code
from snella_app.runs.image_inputs import read_input
from snella_app.runs.model import make_backbone
from snella_app.runs.predict import load
from snella_app.training.train import train

CHECKED = ("onnx", "torchscript", "torch-export")


@pytest.fixture(scope="module")
def loaded(finished):
    return load_run(finished.path, "cpu")


@pytest.fixture(scope="module")
def images(loaded, photos):
    paths = sorted(photos.rglob("*.png"))[::5]
    return torch.stack([loaded.transform(Image.open(path).convert("RGB")) for path in paths])


@pytest.fixture(scope="module")
def expected(loaded, images):
    with torch.no_grad():
        return loaded.model(images)


@pytest.fixture
def probabilities(any_run, images):
    """Outputs of predict: mean over an image and its flip, with the run's temperature."""
    loaded = load_run(any_run.path, "cpu")
    assert loaded.info.tta == 2
    with torch.no_grad():
        mean = (loaded.network(images).softmax(1) + loaded.network(images.flip(-1)).softmax(1)) / 2
    return (mean.log() / loaded.info.temperature).softmax(1)


def backbone_of(loaded):
    return make_backbone(loaded.info.backbone, loaded.task.name).eval()


def reader(name, path):
    """Return a function from images to outputs of an exported file."""
    if name == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if name == "torchscript":
        return torch.jit.load(str(path))
    return torch.export.load(str(path)).module()


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
@pytest.mark.parametrize("name", CHECKED)
def test_a_graph_gives_the_probabilities_of_the_run_for_any_batch_size(name, any_run, images, probabilities, tmp_path):
    result = export(any_run.path, name, tmp_path / "model")
    run = reader(name, result.path)
    for count in (1, 3, len(images)):
        got = run(images[:count])
        assert (got - probabilities[:count]).abs().max() <= MAX_RELATIVE_ERROR
    assert "differ by " in result.notes[0] and list(tmp_path.iterdir()) == [result.path]
    temperature = any_run.read_json("run.json")["calibration"]["temperature"]
    assert result.notes[1].startswith(
        f"outputs are the probabilities of predict, from logits divided by the temperature {temperature:g}; "
        "use --logits"
    )
    assert result.notes[2] == "outputs are averaged over an image and its flip, as in predict"


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_a_graph_exported_with_logits_gives_the_raw_outputs_of_the_model(name, finished, images, expected, tmp_path):
    result = export(finished.path, name, tmp_path / "model", logits=True)
    assert (reader(name, result.path)(images) - expected).abs().max() <= MAX_RELATIVE_ERROR * expected.abs().max()
    assert result.notes[1].startswith("outputs are uncalibrated logits: softmax(outputs / ")
    assert " gives the probabilities of predict --tta 1; the temperature is " in result.notes[1]
    assert result.notes[2].startswith(
        "predict averages the outputs for an image and its flip, unless --tta 1 is set; this model "
    )
    with pytest.raises(ValueError, match="opset=0 is an option of format onnx, not of torchscript"):
        export(finished.path, "torchscript", tmp_path / "other", opset=0)
    with pytest.raises(ValueError, match="logits=True is an option of format onnx, torchscript, torch-export, not of"):
        export(finished.path, "timm", tmp_path / "x", logits=True)


@pytest.mark.parametrize(
    ("any_run", "name", "mode"),
    [
        *(("finished", name, "RGB") for name in CHECKED),
        *(("finished", "torchscript", mode) for mode in ("RGBA", "I;16")),
        ("finished_default", "torchscript", "RGB"),
    ],
    indirect=["any_run"],
)
def test_the_printed_snippet_runs_and_matches_predict(any_run, name, mode, photos, tmp_path, capsys):
    image, out = tmp_path / "new.png", tmp_path / "m"
    with Image.open(photos / "dogs" / "003.png") as picture:
        pixels = np.asarray(picture.resize((50, 41)))
    if mode == "RGBA":
        alpha = np.linspace(0, 255, pixels[..., 0].size).reshape(41, 50, 1).astype(np.uint8)
        pixels = np.concatenate([pixels, alpha], 2)
    Image.fromarray(pixels if mode != "I;16" else pixels[..., 0].astype(np.uint16) * 257).save(image)
    with Image.open(image) as picture:
        assert picture.mode == mode
    assert main(["export", str(any_run.path), "--format", name, "--out", str(out), "--images", f"[{image}]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("print("))
    code = "\n".join(lines[lines.index("import json") : end + 1])
    program = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.run(program, capture_output=True, text=True, check=True, cwd=tmp_path)
    (prediction,) = load(any_run.path).predict([image])
    assert ast.literal_eval(process.stdout) == pytest.approx(prediction.probabilities, abs=1e-4)


@pytest.mark.parametrize("high", [200, 257 * 255])
def test_the_printed_transform_reads_32_bit_gray_images_as_predict_does(high, loaded):
    names: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps}
    exec("\n".join(preprocessing_code(loaded)), names)
    gray = np.linspace(0, high, 41 * 50).reshape(41, 50).astype(np.int32)
    expected = loaded.transform(read_input(Image.fromarray(gray), "gray", loaded.reading))
    assert np.abs(names["transform"](Image.fromarray(gray)) - expected.numpy()).max() <= 1e-4


def test_a_run_with_a_white_value_has_no_preprocessing_snippet(loaded):
    assert preprocessing_code(loaded) is not None
    data = dataclasses.replace(loaded.info.data, white=4095)
    other = dataclasses.replace(loaded, info=dataclasses.replace(loaded.info, data=data))
    assert preprocessing_code(other) is None


def test_the_images_of_the_run_are_loaded_once(finished, tmp_path, monkeypatch):
    loadings = []
    load = exporting.load_run_splits
    monkeypatch.setattr(exporting, "load_run_splits", lambda *args: loadings.append(args) or load(*args))
    result = export(finished.path, "torchscript", tmp_path / "m")
    assert "transform(Image.open(" in result.snippet and len(loadings) == 1


def test_onnx_stores_classes_and_preprocessing_and_supports_opset(finished, loaded, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = export(finished.path, "onnx", tmp_path / "m.onnx", opset=20).path
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["cats", "dogs", "owls"] and metadata["task"] == "classification"
    assert json.loads(metadata["data_config"])["input_size"] == [3, 32, 32]
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    with pytest.raises(ValueError, match="opset must be at least 18, got 5; omit opset"):
        export(finished.path, "onnx", tmp_path / "old.onnx", opset=5)
    with pytest.raises(ValueError, match=r"does not support opset=99 for this model and wrote opset \d\d; omit"):
        export(finished.path, "onnx", tmp_path / "new.onnx", opset=99)


@pytest.mark.parametrize("name", CHECKED)
def test_different_outputs_are_rejected_without_a_file(name, finished, tmp_path, monkeypatch):
    compare = exporting.compare_outputs

    def compare_altered(graph, model, images):
        return compare(dataclasses.replace(graph, run=lambda batch: 1.01 * graph.run(batch)), model, images)

    monkeypatch.setattr(exporting, "compare_outputs", compare_altered)
    with pytest.raises(ValueError, match=r"outputs on .* differ from the model's by .* times the largest output"):
        export(finished.path, name, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_equal_outputs_up_to_rounding_may_have_another_largest_index():
    model = torch.nn.Identity()
    graph = ExportedGraph("runtime", b"", lambda images: images + torch.tensor([0.0, 1e-6]), "module", "load", "run")
    assert "differ by at most 9.5e-07" in compare_outputs(graph, model, torch.ones(3, 2))


def test_onnx_rejects_two_gib_of_weights():
    pytest.importorskip("onnxruntime")
    model = torch.nn.Linear(2**14, 2**15, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"can hold less than 2 GiB of weights, got 2\.00 GiB; use torch-export$"):
        export_onnx(model, torch.empty(2, 2**14), {}, "logits", None)


def test_outputs_of_the_model_that_are_not_finite_are_rejected():
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, math.nan)
    graph = ExportedGraph("runtime", b"", lambda images: torch.zeros(len(images), 1), "module", "load", "run")
    with pytest.raises(ValueError, match="outputs on 1 image differ from the model's by nan times the largest output"):
        compare_outputs(graph, model, torch.ones(3, 2))


def test_sparse_files_restore_fine_tuned_and_original_weights_bit_for_bit(finished, loaded, images, tmp_path):
    result = export(finished.path, "sparse", tmp_path / "m.safetensors")
    model = backbone_of(loaded)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch = load_sparse(model, result.path)
    merged = load_run(finished.path, "cpu").model.merge_and_unload()
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images), merged(images))
    with pytest.raises(RuntimeError, match="already applied"):
        patch.apply(model)
    patch.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match="not applied"):
        patch.remove()
    assert "bit for bit" in result.notes[0] and set(patch.replaced) == {"head.weight", "head.bias"}
    assert json.loads(patch.metadata["classes"]) == ["cats", "dogs", "owls"]


def test_sparse_values_equal_the_update_of_the_adapter(finished, loaded, tmp_path):
    patch = SparsePatch.read(export(finished.path, "sparse", tmp_path / "m").path)
    layer = loaded.model.base_model.model.blocks[0].attn.qkv
    update = layer.get_delta_weight("default").flatten()
    entries = patch.entries["blocks.0.attn.qkv.weight"]
    assert torch.equal(update.nonzero().flatten(), entries.indices)
    assert torch.equal(update[entries.indices], entries.values)


def test_half_precision_values_are_smaller_and_nearly_the_same(finished, loaded, tmp_path):
    full = export(finished.path, "sparse", tmp_path / "fp32")
    half = export(finished.path, "sparse", tmp_path / "bf16", values="bf16")
    assert half.path.stat().st_size < 0.75 * full.path.stat().st_size and "to within" in half.notes[0]
    patches = [SparsePatch.read(result.path) for result in (full, half)]
    for name, entries in patches[0].entries.items():
        torch.testing.assert_close(patches[1].entries[name].values.float(), entries.values, rtol=2**-8, atol=0)


def test_a_sparse_file_rejects_another_model(finished, loaded, tmp_path):
    path = export(finished.path, "sparse", tmp_path / "m").path
    other = backbone_of(loaded)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[0, 0] += 1
    before = other.blocks[0].attn.qkv.weight.clone()
    with pytest.raises(
        ValueError, match=r"the weights 'blocks\.1\.mlp\.fc1\.weight' of .* differ from the weights that the update was"
    ):
        load_sparse(other, path)
    assert torch.equal(other.blocks[0].attn.qkv.weight, before)
    load_sparse(other, path, check_base=False)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight is missing"):
        load_sparse(timm.create_model("test_resnet"), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        load_sparse(other, path)


@pytest.mark.parametrize(
    ("density", "kind"), [(0.0, "gaps"), (0.00001, "gaps"), (0.01, "gaps"), (0.3, "bitmap"), (1.0, "bitmap")]
)
def test_positions_use_the_smallest_encoding(density, kind):
    size = 300_007
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(size, generator=generator) < density).nonzero().flatten()
    name, encoded = encode_positions(indices, size)
    assert name == kind or len(indices) == 0
    assert torch.equal(decode_positions(name, encoded), indices)
    assert encoded.numel() * encoded.element_size() <= min(4 * len(indices), -(-size // 8))


def test_gaps_of_every_length_are_encoded():
    indices = torch.tensor([0, 1, 129, 130 + 2**7, 2**14 + 500, 2**21 + 2**15, 2**28 + 2**22, 2**31 - 2])
    name, encoded = encode_positions(indices, 2**31)
    assert name == "gaps" and len(encoded) == 1 + 1 + 1 + 2 + 3 + 4 + 5 + 5
    assert torch.equal(decode_positions(name, encoded), indices)


@pytest.mark.parametrize("method", ["shira-2", "gps", "linear"])
def test_other_sparse_methods_are_exact(method, settings, no_report, tmp_path):
    run = train(settings(method=method, epochs=1, method_options={}))
    model = make_backbone(load_run(run.path, "cpu").info.backbone, "classification").eval()
    load_sparse(model, export(run.path, "sparse", tmp_path / "m").path)
    from snella_app.methods import merge_trained

    merged = merge_trained(load_run(run.path, "cpu").model).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["boft", "hra"])
def test_a_method_that_rotates_weights_is_rejected(method, settings, no_report, tmp_path):
    run = train(settings(method=method, epochs=1, method_options={}))
    with pytest.raises(ValueError, match=r"the update of '.*' is not an addition to individual weights; use snella me"):
        export(run.path, "sparse", tmp_path / "m")


def test_a_method_that_changes_all_weights_is_rejected(settings, no_report, tmp_path):
    run = train(settings(method="lora-2", epochs=1, head_init="random"))
    with pytest.raises(ValueError, match=r"method lora-2 changes .* use snella merge to a \.safetensors file, which "):
        export(run.path, "sparse", tmp_path / "m")
    with pytest.raises(ValueError, match="is already a LoRA"):
        export(run.path, "lora", tmp_path / "l")
    assert not list(tmp_path.glob("[ml]"))


def test_lora_error_decreases_with_its_rank(finished, loaded, images, expected, tmp_path):
    from peft import PeftModel

    notes, errors = [], []
    for rank in (4, 64):
        result = export(finished.path, "lora", tmp_path / f"r{rank}", rank=rank)
        model = PeftModel.from_pretrained(backbone_of(loaded), result.path).eval()
        with torch.no_grad():
            errors.append(float((model(images) - expected).abs().max() / expected.abs().max()))
        notes.append(float(result.notes[0].split("= ")[1].split(" ")[0]))
    assert 0.05 < notes[0] < 1 and notes[1] < 1e-3  # 64 is the rank of every matrix of this model
    assert errors[1] < 1e-4
    with pytest.raises(ValueError, match="model to a LoRA with rank=65: The chosen rank 65 is larger than the weight"):
        export(finished.path, "lora", tmp_path / "big", rank=65)


def test_transformers_loads_the_hf_folder_with_labels_and_preprocessing(finished, photos, images, expected, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    path = export(finished.path, "hf", tmp_path / "hf").path
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    assert model.config.id2label == {0: "cats", 1: "dogs", 2: "owls"}
    with torch.no_grad():
        assert torch.equal(model(pixel_values=images).logits, expected)
    paths = sorted(photos.rglob("*.png"))[::5]
    processor = AutoImageProcessor.from_pretrained(path)
    pixels = processor([Image.open(p).convert("RGB") for p in paths], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, images)
    best = pipeline("image-classification", model=str(path))(str(paths[0]))[0]
    assert best["label"] == ["cats", "dogs", "owls"][int(expected[0].argmax())]
    card = (path / "README.md").read_text()
    assert (
        card.startswith("---\n") and "pipeline_tag: image-classification" in card and '["cats", "dogs", "owls"]' in card
    )
    with torch.no_grad():
        plain = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        assert torch.equal(plain(images), expected)


def test_the_timm_folder_equals_merge(finished, images, expected, tmp_path):
    from snella_app.runs.merge import merge

    exported = export(finished.path, "timm", tmp_path / "exported").path
    merged = merge(finished.path, tmp_path / "merged").path
    assert sorted(p.name for p in exported.iterdir()) == sorted(p.name for p in merged.iterdir())
    assert all((exported / p.name).read_bytes() == p.read_bytes() for p in merged.iterdir())


def test_nothing_is_overwritten_silently(finished, tmp_path):
    path = export(finished.path, "timm", tmp_path / "m").path
    with pytest.raises(FileExistsError, match=r"out=.*m exists; .* --overwrite"):
        export(finished.path, "timm", path)
    export(finished.path, "timm", path, overwrite=True)
    (path / "mine.txt").write_text("notes")
    with pytest.raises(FileExistsError, match=r"other files, e\.g\. 'mine\.txt'"):
        export(finished.path, "timm", path, overwrite=True)
    with pytest.raises(FileExistsError, match="is a folder, which cannot be replaced by a file"):
        export(finished.path, "sparse", path)
    with pytest.raises(ValueError, match=r"out must end with a name, got '\.'; use e\.g\. 'run-timm'"):
        export(finished.path, "timm", ".", overwrite=True)
    assert (path / "mine.txt").read_text() == "notes" and sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_missing_package_is_reported_with_its_extra(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"format onnx needs onnxscript: pip install 'snella\[export\]'"):
        export(finished.path, "onnx", tmp_path / "m")


def test_comparison_images_can_be_passed(make_photos, tiny_run, tmp_path, no_report):
    folder = make_photos(tmp_path / "photos", {"cats": 16, "dogs": 16})
    config = TrainConfig.from_flat(**{**tiny_run, "epochs": 1}, data=f"folder:{folder}", out=str(tmp_path / "run"))
    run = train(config)
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="images must be given to compare outputs, since"):
        export(run.path, "torchscript")
    image = tmp_path / "moved" / "cats" / "000.png"
    assert "on 1 image " in export(run.path, "torchscript", images=[image]).notes[0]
    assert (tmp_path / "run.torchscript.pt").is_file()


def test_the_command_prints_the_loading_code(finished, tmp_path, capsys):
    out = tmp_path / "m.sparse"
    assert main(["export", str(finished.path), "--format", "sparse", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "from snella import load_sparse" in printed and "bit for bit" in printed
    temperature = finished.read_json("run.json")["calibration"]["temperature"]
    divided = f"softmax(outputs / {temperature:g}) gives the probabilities of predict --tta 1"
    assert f"{divided}; the temperature is stored as 'temperature' in the metadata" in printed
    assert main(["export", str(finished.path), "--format", "timm", "--opset", "18"]) == 2
    assert "--opset 18 is an option of format onnx, not of timm; leave it out" in capsys.readouterr().err


def test_the_command_line_lists_every_format():
    assert get_args(ExportName) == tuple(FORMATS)


@pytest.mark.parametrize("logits", [False, True])
def test_metadata_describe_the_outputs_of_the_graph(logits, finished, loaded, tmp_path):
    result = export(finished.path, "torch-export", tmp_path / "m.pt2", logits=logits)
    files = {"temperature": "", "use": "", "img_size": ""}
    torch.export.load(result.path, extra_files=files)
    assert json.loads(files["img_size"]) == 32
    assert json.loads(files["temperature"]) == (loaded.info.temperature if logits else 1.0)
    assert ("argmax" in files["use"]) == logits
