"""Segmentation through the command line: train, evaluate, predict, inspect, merge."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from transformers import SamModel

from snella import load_sparse
from snella_app.cli.main import main
from snella_app.cli.parser import parse
from snella_app.config.train import TrainConfig
from snella_app.data.images import read_image
from snella_app.report.examples import read_mask
from snella_app.runs import load_merged, load_run
from snella_app.runs.evaluate import evaluate
from snella_app.runs.export import export
from snella_app.runs.model import make_backbone
from snella_app.runs.predict import load
from snella_app.runs.serve import create_app
from snella_app.training.train import train

from ..backbones.test_sam import tiny_config
from ..data.mask_folders import write_pairs
from ..runs.test_serve import post, served

TINY = ["--backbone", "test_vit", "--pretrained", "false", "--img-size", "32", "--device", "cpu", "--progress", "false"]

_PANELS = 'true mask and predicted mask">'


def run_command(*args, status=0):
    assert main([str(arg) for arg in args]) == status


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("masks") / "discs", 24, classes=3)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "discs"
    args = ["--data", f"masks:{folder}", "--method", "snella-2", "--epochs", 2, "--batch-size", 4]
    run_command("train", "--task", "segmentation", *TINY, *args, "--out", out)
    return out


def test_a_run_stores_dice_and_predicted_masks(run):
    info, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
    assert info["task"] == "segmentation" and info["classes"] == ["background", "class 1", "class 2"]
    assert metrics["best_metric"] == "val_dice"
    best = max(metrics["history"], key=lambda row: (row["val_dice"], -row["val_loss"], row["epoch"]))
    assert metrics["best_epoch"] == best["epoch"] and metrics["val"]["dice"] == pytest.approx(best["val_dice"])
    measures = {"dice", "iou", "dice_pooled", "iou_pooled", "dice_gps_foreground_only", "iou_gps_foreground_only"}
    assert measures <= metrics["test"].keys()
    items = json.loads((run / "predictions.json").read_text())["items"]
    with_mask = [item for item in items if item["mask"]]
    assert len(with_mask) == min(12, len(items)) and all((run / item["mask"]).is_file() for item in with_mask)


def test_the_server_returns_masks_and_shares(run, folder):
    model = load(run)
    path = folder / "images" / "003.png"
    with served(create_app(model)) as address:
        status, answer = post(address, [(path.name, path.read_bytes())])
    (entry,) = answer["predictions"]
    (expected,) = model.predict([path])
    head, _, data = entry["mask"].partition(",")
    assert status == 200 and head == "data:image/png;base64" and entry.keys() == {"name", "text", "shares", "mask"}
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == expected.labels).all()
    assert entry["shares"] == pytest.approx(expected.shares, abs=1e-6)


def test_data_without_masks_is_rejected_before_it_is_read(run, tmp_path):
    table = tmp_path / "photos.csv"
    table.write_text("path\na.png\n")
    message = re.escape(f"data must be images with masks for task segmentation, e.g. masks:PATH, got 'csv:{table}'")
    with pytest.raises(ValueError, match=message):
        evaluate(run, data=str(table))
    with pytest.raises(ValueError, match=r"data must be images with masks .* got 'python:data'"):
        evaluate(run, data=[(Image.new("RGB", (8, 8)), 0)])


def test_stored_masks_reproduce_their_dice(run, folder):
    from snella_app.tasks.segmentation import image_scores, pixel_counts

    item = next(i for i in json.loads((run / "predictions.json").read_text())["items"] if i["dice"] is not None)
    truth = read_mask(folder / "masks" / item["name"].rpartition("/")[2]).resize((32, 32), Image.Resampling.NEAREST)
    predicted = np.asarray(read_mask(run / item["mask"]))
    assert predicted.shape == (32, 32)
    both = (torch.as_tensor(np.array(values)).long()[None] for values in (predicted, truth))
    dice, _ = image_scores(pixel_counts(*both, 3).numpy())
    assert item["dice"] == pytest.approx(np.nanmean(dice[:, 1:]), abs=0.05)  # torchvision rounds


def test_the_report_shows_curves_classes_and_overlays(run):
    page = (run / "report.html").read_text()
    for text in ("Overlap on validation", "Dice by image", "class 2", "true mask, predicted mask", "GPS"):
        assert text in page
    assert page.count(_PANELS) == sum(1 for _ in (run / "masks").iterdir()) > 0
    assert "Confusion matrix" not in page


def test_the_report_is_deterministic(run, capsys):
    before = (run / "report.html").read_text()
    run_command("inspect", run, "--report")
    assert "Dice" in capsys.readouterr().out
    assert (run / "report.html").read_text() == before


def test_evaluation_reproduces_the_test_results(run, capsys, tmp_path):
    run_command("evaluate", run, "--out", tmp_path / "result.json")
    result, metrics = json.loads((tmp_path / "result.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert result["dice"] == pytest.approx(metrics["test"]["dice"])
    assert result["confusion"] == metrics["test"]["confusion"]
    assert "GPS's variant, without false positives" in capsys.readouterr().out


def test_other_data_is_evaluated_in_full_and_data_without_masks_is_rejected(run, tmp_path, capsys):
    write_pairs(tmp_path / "more", 5, classes=3)
    run_command("evaluate", run, "--data", f"masks:{tmp_path / 'more'}")
    assert "(all), 5 images" in capsys.readouterr().out
    run_command("evaluate", run, "--data", "digits", status=2)
    assert "data must be images with masks for task segmentation" in capsys.readouterr().err


def test_predictions_are_masks_at_image_size_and_overlays(run, folder, tmp_path, capsys):
    out = tmp_path / "predicted"
    run_command("predict", run, folder / "images" / "000.png", folder / "images" / "001.png", "--out", out)
    assert "2 images" in capsys.readouterr().out
    mask = read_mask(out / "000.png")
    assert mask.size == read_mask(out / "overlays" / "000.png").size == (40, 32) and mask.mode == "P"
    loaded = load_run(run, "cpu")
    image = read_image(folder / "images" / "000.png")
    with torch.no_grad():
        scores = loaded.model(loaded.transform(image)[None])
    expected = torch.nn.functional.interpolate(scores, (32, 40), mode="bilinear", align_corners=False).argmax(1)[0]
    assert np.array_equal(np.asarray(mask), expected.numpy())
    run_command("predict", run, folder / "images" / "000.png", "--out", out, status=2)
    assert "is not empty; choose another folder" in capsys.readouterr().err
    run_command("predict", run, folder / "images" / "000.png")
    assert "%" in capsys.readouterr().out


def test_masks_do_not_replace_their_images(run, folder, tmp_path, capsys):
    images = shutil.copytree(folder / "images", tmp_path / "images")
    before = {file.name: file.read_bytes() for file in images.iterdir()}
    run_command("predict", run, images, "--out", images, "--overwrite", status=2)
    assert "which its mask would replace" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in images.iterdir() if file.is_file()} == before


def test_masks_of_watched_folders_are_written_to_a_folder_of_any_name(run, folder, tmp_path, monkeypatch, capsys):
    def one_file(folders, known):
        yield [folder / "images" / "000.png"]
        raise KeyboardInterrupt

    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", one_file)
    run_command("predict", run, folder / "images", "--watch", "--out", tmp_path / "masks.csv")
    run_command("predict", run, folder / "images" / "000.png", "--out", tmp_path / "plain")
    watched, plain = (np.asarray(read_mask(tmp_path / name / "000.png")) for name in ("masks.csv", "plain"))
    assert watched.shape == (32, 40) and np.array_equal(watched, plain)
    other = tmp_path / "other" / "000.png"
    other.parent.mkdir()
    shutil.copy(folder / "images" / "001.png", other)

    def two_files(folders, known):
        yield [folder / "images" / "000.png"]
        yield [other, folder / "images" / "002.png"]
        raise KeyboardInterrupt

    monkeypatch.setattr("snella_app.runs.prediction_files.new_files", two_files)
    run_command("predict", run, folder / "images", "--watch", "--out", tmp_path / "all")
    reason = f"image names must be unique, got {folder / 'images' / '000.png'} and {other}; use separate output folders"
    assert f"skipped '{other}' ({reason})" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "all").glob("*.png")) == ["000.png", "002.png"]
    assert np.array_equal(np.asarray(read_mask(tmp_path / "all" / "000.png")), plain)
    run_command("predict", run, folder / "images", "--watch", "--out", folder / "images" / "masks", status=2)
    assert "out must be outside the watched folders" in capsys.readouterr().err


def test_unsupported_prediction_outputs_are_rejected(run, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    image = folder / "images" / "000.png"
    run_command("predict", run, image, "--out", tmp_path / "file", status=2)
    assert "must be a folder for the masks, got the file" in capsys.readouterr().err
    run_command("predict", run, image, "--top-k", "2", status=2)
    assert "must be omitted for segmentation, got 2" in capsys.readouterr().err
    run_command("predict", run, image, image, "--out", tmp_path / "out", status=2)
    assert f"each image may be given only once, got {image} twice" in capsys.readouterr().err
    shutil.copy(image, tmp_path / image.name)
    run_command("predict", run, image, tmp_path / image.name, "--out", tmp_path / "out", status=2)
    assert "image names must be unique" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
def test_exported_graphs_match_the_run_and_other_formats_are_rejected(run, tmp_path):
    loaded, images = load_run(run, "cpu"), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = loaded.task.final_outputs(loaded.model(images), loaded.info.temperature)
        script = torch.jit.load(str(export(run, "torchscript", tmp_path / "model.pt").path))(images)
        graph = torch.export.load(str(export(run, "torch-export", tmp_path / "model.pt2").path)).module()(images)
    assert (script - expected).abs().max() <= 1e-5 and (graph - expected).abs().max() <= 1e-5
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(export(run, "onnx", tmp_path / "model.onnx").path))
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected.numpy()).max() <= 1e-4
    for name in ("timm", "hf", "lora"):
        with pytest.raises(ValueError, match=rf"format={name} does not support the task segmentation; use one of"):
            export(run, name, tmp_path / name)


def test_a_sparse_file_restores_the_fine_tuned_weights(run, tmp_path):
    loaded, images = load_run(run, "cpu"), torch.rand(2, 3, 32, 32)
    model = make_backbone(loaded.info.backbone, loaded.task.name).eval()
    load_sparse(model, export(run, "sparse", tmp_path / "sparse.safetensors").path)
    with torch.no_grad():
        assert torch.equal(model(images), loaded.model.merge_and_unload()(images))


def test_merged_encoder_and_decoder_give_the_same_outputs(run, tmp_path, capsys):
    path = tmp_path / "merged.safetensors"
    run_command("merge", run, "--out", path)
    out = capsys.readouterr().out
    assert "plain weights of the backbone (encoder.…) and the decoder (decoder.…)" in out and "load_merged" in out
    with safe_open(path, "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"encoder", "decoder"}  # noqa: SIM118
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_merged(path)(images), load_run(run, "cpu").model(images))


def test_a_file_not_written_by_merge_is_rejected(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"must be a file written by snella merge, got .*x.safetensors"):
        load_merged(tmp_path / "x.safetensors")


def test_mismatched_task_and_data_are_rejected(folder, tmp_path, capsys):
    run_command("train", *TINY, "--data", f"masks:{folder}", "--out", tmp_path / "a", status=2)
    assert "add --task segmentation" in capsys.readouterr().err
    run_command("train", *TINY, "--task", "segmentation", "--data", "digits", "--out", tmp_path / "b", status=2)
    assert "data must be images with masks" in capsys.readouterr().err


def test_the_decoder_learns(folder, tmp_path):
    config = TrainConfig.from_flat(
        task="segmentation", data=f"masks:{folder}", backbone="test_vit", pretrained=False, img_size=32, method="full",
        epochs=5, batch_size=4, lr=1e-3, head_lr=3e-3, device="cpu", progress=False, out=str(tmp_path / "run"),
    )  # fmt: skip
    history = train(config, Console(quiet=True), render_report=False).read_json("metrics.json")["history"]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


def test_sam_learns_polyps_with_the_settings_of_the_paper(tmp_path, capsys):
    torch.manual_seed(0)
    SamModel(tiny_config()).save_pretrained(tmp_path / "sam")
    write_pairs(tmp_path / "Kvasir-SEG", 10, ending=".jpg")
    args = ["--data", f"kvasir:{tmp_path / 'Kvasir-SEG'}", "--backbone", f"sam:{tmp_path / 'sam'}", "--epochs", 2]
    args += ["--batch-size", 1, "--lr", "1e-3", "--min-lr", "1e-7", "--warmup-ratio", 0, "--mask-loss", "iou"]
    out = tmp_path / "run"
    run_command("train", "--task", "segmentation", *args, "--method", "snella-2", "--device", "cpu", "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    history = metrics["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["lr"] == pytest.approx(1e-7, rel=1e-3)
    matrices = json.loads((out / "allocation.json").read_text())["matrices"]
    shares = [matrix["budget"] / matrix["size"] for matrix in matrices]
    # allocation by importance; by size, shares would be equal
    assert len(matrices) == 18 and max(shares) - min(shares) > 0.2
    assert json.loads((out / "run.json").read_text())["data_config"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    capsys.readouterr()
    run_command("predict", out, tmp_path / "Kvasir-SEG" / "images", "--out", tmp_path / "masks")
    assert len(list((tmp_path / "masks").glob("*.png"))) == 10


def test_the_experiment_of_table_v_matches_the_paper():
    path = Path(__file__).parents[3] / "experiments" / "polyp" / "table5.yaml"
    _, settings = parse(["train", "--config", str(path), "--out", "runs/polyp"])
    config = TrainConfig.from_flat(**settings).resolved()
    assert (config.optim.epochs, config.optim.batch_size, config.optim.lr, config.optim.min_lr) == (20, 1, 1e-3, 1e-7)
    assert config.data.task == "segmentation" and config.method.all_options()["r"] == 8
    _, settings = parse(["train", "--config", str(path), "--out", "o", "--method", "lora-8", "--scaling", "null"])
    assert TrainConfig.from_flat(**settings).resolved().method.all_options() == {"r": 8}


def test_sam_merges_and_trains_on_all_images(tmp_path):
    torch.manual_seed(0)
    SamModel(tiny_config()).save_pretrained(tmp_path / "sam")
    config = TrainConfig.from_flat(
        task="segmentation", data=f"masks:{write_pairs(tmp_path / 'm', 8)}", backbone=f"sam:{tmp_path / 'sam'}",
        protocol="final", method="lora-2", epochs=1, batch_size=2, img_size=32, device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    run = train(config, Console(quiet=True), render_report=False)
    assert run.read_json("run.json")["data"]["sizes"] == {"train": 6, "val": 0, "test": 2}
    run_command("merge", run.path, "--out", tmp_path / "m.safetensors")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        merged, adapted = load_merged(tmp_path / "m.safetensors")(images), load_run(run.path, "cpu").model(images)
    assert torch.allclose(merged, adapted, atol=1e-5)
