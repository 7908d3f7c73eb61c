"""Evaluation, prediction and merging of a finished run."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from snella_app.config.train import TrainConfig
from snella_app.files import sealed, write_json
from snella_app.methods import AdapterFileError
from snella_app.records.record import read, write
from snella_app.records.run import FoldResults, FoldRow, RunInfo
from snella_app.report.inspect import inspect_run
from snella_app.runs import RunFolder, TaskBank, load_run
from snella_app.runs.evaluate import calibrate_run, evaluate
from snella_app.runs.export import export
from snella_app.runs.merge import load_merged, merge
from snella_app.runs.predict import load
from snella_app.runs.prediction_files import predict_to_files
from snella_app.tasks.predictions import LabelSetPrediction, NumberPrediction, write_predictions
from snella_app.training.train import train

from ..data.mask_folders import write_pairs


def test_evaluation_reproduces_the_test_result(finished):
    result = evaluate(finished.path)
    test = finished.read_json("metrics.json")["test"]
    assert (result["split"], result["images"]) == ("test", sum(map(sum, test["confusion"])))
    assert result["confusion"] == test["confusion"] and result["accuracy"] == test["accuracy"]
    assert result["loss"] == pytest.approx(test["loss"], abs=1e-6)


def test_other_splits_can_be_evaluated(finished):
    val = evaluate(finished.path, split="val", batch_size=3)
    assert val["accuracy"] == finished.read_json("metrics.json")["val"]["accuracy"]
    assert evaluate(finished.path, split="all")["images"] == 48


def test_other_data_is_evaluated_with_the_class_indices_of_the_run(finished, make_photos, tmp_path):
    folder = make_photos(tmp_path / "new", {"owls": 5, "dogs": 5}, contrast=0)
    result = evaluate(finished.path, f"folder:{folder}")
    assert (result["split"], result["images"], result["classes"]) == ("all", 10, ["cats", "dogs", "owls"])
    assert [sum(row) for row in result["confusion"]] == [0, 5, 5]


def test_unknown_classes_are_reported(finished, make_photos, tmp_path):
    folder = make_photos(tmp_path / "new", {"cats": 5, "newts": 5})
    with pytest.raises(
        ValueError,
        match=r"not trained on the classes \['newts'\] of the data; .*'cats', 'dogs', 'owls'\]",
    ):
        evaluate(finished.path, f"folder:{folder}")


def test_unusable_evaluation_settings_are_reported(finished):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(finished.path, batch_size=0)
    with pytest.raises(ValueError, match="split must be one of train, val, test, all, auto for this data, got 'dev'"):
        evaluate(finished.path, split="dev")


def test_predictions_match_the_model(finished, photos):
    paths = [photos / "dogs" / "003.png", photos / "cats" / "001.png"]
    first = load(finished.path, batch_size=1).predict(paths)
    second = load(finished.path).predict([str(p) for p in paths])
    assert [p.path for p in first] == paths
    for a, b in zip(first, second, strict=True):
        assert a.label == b.label and a.probability == pytest.approx(b.probability, abs=1e-6)
        assert sum(p for _, p in a.ranking) == pytest.approx(1.0, abs=1e-5)
        assert [p for _, p in a.ranking] == sorted((p for _, p in a.ranking), reverse=True)
    loaded = load_run(finished.path)
    with torch.inference_mode():
        logits = loaded.model(loaded.transform(Image.open(paths[0]).convert("RGB"))[None])
    assert first[0].label == loaded.classes[int(logits.argmax())]


def test_a_folder_is_expanded_to_its_images(finished, photos):
    assert len(load(finished.path).predict([photos / "cats"])) == 16
    assert len(load(finished.path).predict([photos, photos / "cats" / "000.png"])) == 49


def test_predictions_are_written_as_csv(finished, photos, tmp_path):
    predictions = load(finished.path).predict([photos / "cats"])
    path = write_predictions(predictions, tmp_path / "deep" / "out.csv", top_k=2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and list(rows[0]) == ["image", "label", "probability", "label_2", "probability_2"]
    assert rows[3]["label"] == predictions[3].label
    assert float(rows[3]["probability"]) == pytest.approx(predictions[3].probability, abs=1e-6)
    written = write_predictions(predictions, path, overwrite=True)
    assert written.read_text().splitlines()[0] == "image,label,probability"


def test_an_invalid_output_is_rejected(tmp_path):
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out=.*p\.csv exists; .* with --overwrite \(overwrite=True\)"):
        write_predictions([], tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text() == "mine"
    with pytest.raises(ValueError, match=rf"out must be a file, got the folder '.*{tmp_path.name}'; use .*p\.csv"):
        write_predictions([], tmp_path)
    with pytest.raises(
        ValueError, match="top_k must be at least 1, got 0; omit it for the default, or set --top-k all"
    ):
        write_predictions([], tmp_path / "new.csv", top_k=0)


def test_swapped_arguments_are_reported(finished, photos):
    image = photos / "cats" / "000.png"
    with pytest.raises(ValueError, match=r"run must be the folder of a run, got the file '.*000\.png'; pass the run"):
        load(image)
    with pytest.raises(ValueError, match=r"got '.*cats'; '.*run' is a run; pass it before the images"):
        predict_to_files(str(photos / "cats"), [str(finished.path)])


def test_images_that_cannot_be_read_are_reported_or_skipped(finished, photos, tmp_path):
    content = (photos / "cats" / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    images = [photos / "cats" / "000.png", tmp_path / "cut.png"]
    with pytest.raises(ValueError, match=r"cut\.png' is not a readable image.*; remove it, or pass --skip-corrupt"):
        load(finished.path).predict(images)
    assert [p.path for p in load(finished.path).predict(images, skip_corrupt=True)] == images[:1]


def test_hidden_files_are_ignored_and_content_is_checked(finished, photos, tmp_path):
    Image.open(photos / "cats" / "000.png").save(tmp_path / "a.jfif", "JPEG")
    Image.open(photos / "cats" / "000.png").save(tmp_path / "b", "PNG")
    (tmp_path / "._a.jpg").write_bytes(b"what macOS keeps")
    (tmp_path / "notes.txt").write_text("BMX")
    assert [p.path.name for p in load(finished.path).predict([tmp_path])][:2] == ["a.jfif", "b"]


def test_the_suffix_selects_the_prediction_format(finished, photos, tmp_path, monkeypatch):
    predictions = load(finished.path).predict([photos / "cats" / "000.png"], unsure=1.0)
    (row,) = json.loads(write_predictions(predictions, tmp_path / "p.json", 3).read_text())
    assert list(row) == [
        "image",
        "label",
        "probability",
        "unsure",
        *(f"{n}_{k}" for k in (2, 3) for n in ("label", "probability")),
    ]
    assert (row["label"], row["unsure"]) == (predictions[0].label, True)
    assert row["probability"] == pytest.approx(predictions[0].probability, abs=1e-6)
    (line,) = write_predictions(predictions, tmp_path / "p.jsonl").read_text().splitlines()
    assert json.loads(line) == {name: row[name] for name in ("image", "label", "probability", "unsure")}
    table = pytest.importorskip("pyarrow.parquet").read_table(write_predictions(predictions, tmp_path / "p.parquet", 3))
    assert table.to_pylist() == [row]
    for name in ("p", "p.txt", "p.xlsx"):
        with pytest.raises(ValueError, match=rf"out must end with \.csv, \.json, .*, got '.*{name}'; write '.*p\.csv'"):
            write_predictions([], tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"q\.parquet needs pyarrow: pip install 'snella\[data\]'"):
        write_predictions([], tmp_path / "q.parquet")


def test_json_and_parquet_get_null_and_valid_utf8(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    number = NumberPrediction(Path("caf\udce9.png"), {"dose": float("nan"), "mass": 1.5})
    (row,) = json.loads(write_predictions([number], tmp_path / "p.json").read_text())
    assert row == {"image": "caf\udce9.png", "dose": None, "mass": 1.5}
    assert json.loads(write_predictions([number], tmp_path / "p.jsonl").read_text()) == row
    labels = LabelSetPrediction(Path("a.png"), ["\udce9"], {"\udce9": 0.7})
    table = parquet.read_table(write_predictions([number, number], tmp_path / "p.parquet"))
    assert table.to_pylist() == [{"image": "caf?.png", "dose": None, "mass": 1.5}] * 2
    table = parquet.read_table(write_predictions([labels], tmp_path / "labels.parquet"))
    assert table.to_pylist() == [{"image": "a.png", "labels": ["?"], "?": 0.7}]


def test_classes_named_like_a_column_get_a_suffix(tmp_path):
    probabilities = {"image": 0.75, "labels": 0.25, "image_probability": 0.5}
    labels = LabelSetPrediction(Path("a.png"), ["image", "image_probability"], probabilities)
    (row,) = json.loads(write_predictions([labels], tmp_path / "labels.json").read_text())
    assert row == {
        **{"image": "a.png", "labels": ["image", "image_probability"]},
        **{"image_probability_probability": 0.75, "labels_probability": 0.25, "image_probability": 0.5},
    }
    number = NumberPrediction(Path("a.png"), {"image": 2.0, "labels": 3.0})
    (row,) = json.loads(write_predictions([number], tmp_path / "numbers.json").read_text())
    assert row == {"image": "a.png", "image_value": 2.0, "labels": 3.0}


def test_paths_without_images_are_reported(finished, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image .*nothing\.png; .* has no similar name$"):
        load(finished.path).predict([tmp_path / "nothing.png"])
    with pytest.raises(FileNotFoundError, match=r"no image .*00\.png; nearest: '0\d+\.png'"):
        load(finished.path).predict([photos / "cats" / "00.png"])
    with pytest.raises(FileNotFoundError, match=r"no image .*\*\.tif; no image file matches the pattern"):
        load(finished.path).predict([photos / "cats" / "*.tif"])
    with pytest.raises(FileNotFoundError, match=r"no image .*/\*/a\.png; no image file matches the pattern"):
        load(finished.path).predict([photos / "*" / "a.png"])
    with pytest.raises(FileNotFoundError, match=r"no image .*a\.png; there is no folder .*lions"):
        load(finished.path).predict([photos / "lions" / "a.png"])
    with pytest.raises(FileNotFoundError, match=rf"folder .*{tmp_path.name} has no images; supported suffixes are"):
        load(finished.path).predict([tmp_path])
    with pytest.raises(ValueError, match="images must name at least one file or folder"):
        load(finished.path).predict([])


def test_merged_weights_are_plain_timm_weights_with_equal_outputs(finished, tmp_path):
    merged = merge(finished.path, tmp_path / "deep" / "model.safetensors")
    with safe_open(merged.path, "pt") as file:
        metadata = file.metadata()
        assert not [name for name in file.keys() if "snella" in name or "base_model" in name]  # noqa: SIM118
    assert json.loads(metadata["classes"]) == ["cats", "dogs", "owls"]
    assert json.loads(metadata["data_config"])["input_size"] == [3, 32, 32]
    assert "snella" not in merged.snippet.replace(str(tmp_path), "") and merged.description == "plain timm weights"
    assert "timm.create_model('test_vit', num_classes=3, img_size=32)" in merged.snippet
    names: dict = {}
    exec(merged.snippet, names)
    assert names["classes"] == ["cats", "dogs", "owls"]
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["model"](images), load_run(finished.path).model(images))
    with pytest.raises(ValueError, match="path must be a file written by snella merge"):
        load_merged(export(finished.path, "sparse", tmp_path / "sparse.safetensors").path)


@pytest.mark.parametrize("method", ["linear", "lora-2"])
def test_other_methods_merge_too(method, settings, console, no_report, tmp_path):
    run = train(settings(method=method, epochs=1), console)
    path = merge(run.path, tmp_path / "model.safetensors").path
    plain = timm.create_model("test_vit", num_classes=3, img_size=32)
    plain.load_state_dict(load_file(path), strict=True)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), load_run(run.path).model(images))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_merged_file_needs_no_file_of_the_backbone(task, settings, console, no_report, tmp_path, monkeypatch):
    weights = {
        name: tensor for name, tensor in timm.create_model("test_vit").state_dict().items() if "head" not in name
    }
    save_file(weights, tmp_path / "weights.safetensors")
    changes = {"weights": "weights.safetensors", "method": "linear", "epochs": 1}
    if task == "segmentation":
        changes |= {"task": task, "data": f"masks:{write_pairs(tmp_path / 'm', 10)}", "method": "full", "batch_size": 4}
    monkeypatch.chdir(tmp_path)
    run = train(settings(**changes), console)
    path = merge(run.path, tmp_path / "model.safetensors").path
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = load_run(run.path).model(images)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        torch.testing.assert_close(load_merged(path)(images), expected)
    assert run.read_config().model.weights == "weights.safetensors"  # a moved weight file is no damage
    (tmp_path / "no.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="path must be a file written by snella merge"):
        load_merged(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match=r"written by snella merge, got the folder '.*'; timm loads folders"):
        load_merged(tmp_path)


def timm_predictions(model, transform, classes, paths, views=1):
    with torch.inference_mode():
        images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        probabilities = model(images).softmax(1)
        if views == 2:
            probabilities = (probabilities + model(images.flip(-1)).softmax(1)) / 2
    best = probabilities.max(1)
    return [(classes[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("backbone", "method", "img_size"),
    [("test_vit", "snella-2", 48), ("test_efficientnet", "full", 96), ("vit_tiny_patch16_224", "linear", 64)],
)
def test_timm_predicts_with_a_merged_model_like_the_run(
    backbone, method, img_size, make_photos, settings, console, no_report, tmp_path
):
    photos = make_photos(tmp_path / "photos", {"cats": 12, "dogs": 12}, side=70)
    changes = {"backbone": backbone, "method": method, "img_size": img_size, "epochs": 1, "data": f"folder:{photos}"}
    run = train(settings(**changes), console)
    model = timm.create_model(f"local-dir:{merge(run.path, tmp_path / 'model').path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names: dict = {}
    exec(merge(run.path, tmp_path / "model.safetensors").snippet, names)
    from_file = [names[name] for name in ("model", "transform", "classes")]
    paths = sorted(photos.rglob("*.png"))
    run.update("finished", calibration=None)  # the temperature is not part of the weights
    assert load_run(run.path).info.tta == 2
    for views, expected in ((1, load(run.path).predict(paths, tta=1)), (2, load(run.path).predict(paths))):
        for merged in ([model, transform, model.pretrained_cfg["label_names"]], from_file):
            actual = timm_predictions(*merged, paths, views)
            for (label, probability), prediction in zip(actual, expected, strict=True):
                assert label == prediction.label and probability == pytest.approx(prediction.probability, abs=1e-5)


def test_a_merged_folder_is_a_backbone_for_another_run(finished, settings, console, no_report, tmp_path):
    folder = merge(finished.path, tmp_path / "model").path
    run = train(settings(backbone=str(folder), pretrained=True, img_size=None, epochs=1), console)
    assert load_run(run.path).info.data_config["input_size"] == [3, 32, 32]


def test_merging_keeps_other_files_in_a_folder(finished, tmp_path):
    folder = tmp_path / "model"
    merge(finished.path, folder)
    with pytest.raises(FileExistsError, match=r"out=.*model exists; .* replace it with --overwrite"):
        merge(finished.path, folder)
    assert merge(finished.path, folder, overwrite=True).path == folder
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"out=.*model is a folder with other files, e.g. 'mine.txt'; choose a new"
    ):
        merge(finished.path, folder, overwrite=True)


def test_merging_does_not_overwrite_by_default(finished, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"out=.*model\.safetensors exists; choose another name, or replace it with --overwrite"
    ):
        merge(finished.path, path)
    assert path.read_text() == "mine"
    assert merge(finished.path, path, overwrite=True).path.stat().st_size > 1000
    for name in ("model.pth", "model.SafeTensors"):
        with pytest.raises(ValueError, match=rf"out must end with \.safetensors, or be a folder .*, got '{name}'"):
            merge(finished.path, name)


def test_a_damaged_adapter_is_reported(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"run is damaged: adapter/adapter_model.safetensors changed after the run wrote it"
    ):
        load_run(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.update("finished", files={})
    with pytest.raises(AdapterFileError, match=r"is damaged: .*file not fully covered \(\d+ bytes\)"):
        load_run(run)


def test_every_command_has_the_same_remedy_for_a_damaged_file(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for command in (load_run, inspect_run):
        with pytest.raises(ValueError, match=r"damaged: .*; copy it again, or train again with `--overwrite`"):
            command(folder)
    for content in ("{", '{"status": "finished"}', '{"status": "done"}', "[]"):
        (folder / "run.json").write_text(content)
        for command in (load_run, inspect_run):
            with pytest.raises(ValueError, match=r"run.json.*; copy the file again, or train again with `--overwrite`"):
                command(folder)


def test_a_run_without_adapter_has_a_remedy(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    missing = r"run.adapter is missing, although the run is finished; restore .*train again with `--overwrite`"
    with pytest.raises(FileNotFoundError, match=missing):
        load_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=missing):
        train(TrainConfig.from_flat(out=str(tmp_path / "run"), resume=True))
    RunFolder(tmp_path / "run").update("running")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter yet \(status running or killed\); finish the run with --resume"
    ):
        load_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="this is not a run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "use",
    [
        calibrate_run,
        lambda run: merge(run, run / "model"),
        lambda run: export(run, "timm", run / "model"),
        lambda run: TaskBank({"task": run}, device="cpu"),
    ],
    ids=["calibrate", "merge", "export", "TaskBank"],
)
def test_a_cross_validation_is_not_a_single_run(use, tmp_path):
    write(FoldResults(3, rows=[FoldRow(1, "fold-1", 1, {})]), tmp_path)
    with pytest.raises(
        ValueError, match=r"is a cross-validation with several models; pass one of .*, e\.g\. .*/fold-1$"
    ):
        use(tmp_path)


def test_resuming_does_not_train_a_finished_run(finished, console):
    before = (finished.path / "metrics.json").read_bytes()
    train(TrainConfig.from_flat(out=str(finished.path), resume=True), console)
    assert (finished.path / "metrics.json").read_bytes() == before
    assert "is already finished" in console.file.getvalue()


@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "metrics.json", "predictions.json", "adapter/adapter_config.json"]
)
def test_a_flipped_bit_in_a_finished_run_is_detected(name, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    content = bytearray((folder / name).read_bytes())
    position = content.index(b"e")  # keeps the JSON readable
    content[position] ^= 4
    (folder / name).write_bytes(content)
    commands = {
        "predict, evaluate and merge": lambda: load_run(folder),
        "inspect": lambda: inspect_run(folder),
        "resume": lambda: train(TrainConfig.from_flat(out=str(folder), resume=True)),
    }
    for command in commands.values():
        with pytest.raises(
            ValueError, match=rf"{name}.*(altered after it was written|changed after|damaged|must be|missing)"
        ):
            command()


def test_rewritten_files_of_the_run_are_accepted(finished, tmp_path):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    run.write_json("metrics.json", {**run.read_json("metrics.json"), "train_s": 1.0})
    run.write_config(run.read_config())
    read(RunInfo, run.path)  # checks the digests
    (run.path / "predictions.json").unlink()  # saves space
    read(RunInfo, run.path)  # checks the digests


def test_training_images_are_detected_by_their_pixels(finished, photos, make_photos, tmp_path):
    table = tmp_path / "again.csv"
    files = sorted(photos.rglob("*.png"))
    for index, file in enumerate(files):
        with Image.open(file) as image:
            image.save(tmp_path / f"{index}.bmp")  # other files with the same pixels
    rows = [f"{index}.bmp,{file.parent.name}" for index, file in enumerate(files)]
    table.write_text("\n".join(["path,label", *rows]))
    trained = finished.read_json("run.json")["data"]["sizes"]["train"]
    note = f"{trained} of 48 images are training images of the run, e.g. "
    assert any(text.startswith(note) for text in evaluate(finished.path, str(table))["notes"])
    assert any(text.startswith(note) for text in evaluate(finished.path, split="all")["notes"])
    assert not evaluate(finished.path)["notes"]
    other = make_photos(tmp_path / "new", {"owls": 5, "dogs": 5}, contrast=0)
    assert not any("training images" in text for text in evaluate(finished.path, str(other))["notes"])


def test_a_missing_training_check_is_noted(make_photos, tiny_run, tmp_path, no_report):
    folder = make_photos(tmp_path / "photos", {"cats": 16, "dogs": 16})
    run = train(TrainConfig.from_flat(**{**tiny_run, "epochs": 1}, data=str(folder), out=str(tmp_path / "run")))
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved" / "cats" / "015.png").unlink()
    (note,) = (text for text in evaluate(run.path, str(tmp_path / "moved"))["notes"] if "trained on" in text)
    assert note.startswith("cannot check for training images of the run among these images: ")


def test_an_unfinished_run_is_noted(finished, photos, tmp_path, capsys):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    write_json(run.path / "run.json", sealed({**run.read_json("run.json"), "status": "interrupted"}))
    message = "the run is not finished (interrupted): this is its best epoch so far; finish it with snella train --out "
    assert any(note.startswith(message) for note in evaluate(run.path)["notes"])
    predict_to_files(str(run.path), [str(photos / "cats" / "000.png")])
    assert capsys.readouterr().err.startswith(f"note: {message}{run.path} --resume")


def test_merge_replaces_neither_a_file_by_a_folder_nor_a_folder_by_a_file(finished, tmp_path):
    (tmp_path / "model").write_text("kept")
    (tmp_path / "model.safetensors").mkdir()
    for name, kind in (("model", "file"), ("model.safetensors", "folder")):
        with pytest.raises(FileExistsError, match=f"out=.*{name} is a {kind}, but merge writes a .*; choose"):
            merge(finished.path, tmp_path / name, overwrite=True)
    assert (tmp_path / "model").read_text() == "kept"


def test_a_merged_file_of_a_moved_backbone_file_keeps_its_size(settings, console, no_report, tmp_path):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    save_file(backbone.state_dict(), tmp_path / "vit.safetensors")
    run = train(
        settings(
            backbone=str(tmp_path / "vit.safetensors"), method="linear", epochs=1, img_size=None, pretrained=False
        ),
        console,
    )
    path = merge(run.path, tmp_path / "model.safetensors").path
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = load_run(run.path).model(images)
        (tmp_path / "vit.safetensors").rename(tmp_path / "moved.safetensors")
        torch.testing.assert_close(load_merged(path)(images), expected)
        changed = {name: tensor + 1 for name, tensor in backbone.state_dict().items()}
        save_file(changed, tmp_path / "vit.safetensors")  # the merged file contains all weights
        torch.testing.assert_close(load_merged(path)(images), expected)
        with pytest.raises(ValueError, match="pre-trained weights of the run have changed"):
            load_run(run.path)


def test_loading_a_run_keeps_the_random_numbers(finished):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_run(finished.path)
    assert torch.equal(torch.rand(3), expected)


def test_a_merged_model_names_the_temperature(finished, tmp_path):
    temperature = load_run(finished.path).info.temperature
    notes = merge(finished.path, tmp_path / "model").notes
    assert any(f"predict divides the outputs by the temperature {temperature:g}" in note for note in notes)


def test_hidden_files_do_not_prevent_merging(finished, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".model.safetensors.x.tmp").touch()
    merge(finished.path, tmp_path / "model")
    merge(finished.path, tmp_path / "model", overwrite=True)
