"""Multilabel, ordinal, regression and imbalanced runs, from data to report."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from snella_app.config.train import TrainConfig
from snella_app.runs import load_run
from snella_app.runs.evaluate import evaluate
from snella_app.runs.export import export
from snella_app.runs.merge import merge
from snella_app.runs.predict import load
from snella_app.runs.serve import create_app
from snella_app.tasks import RegressionTask, task_class
from snella_app.tasks.predictions import write_predictions
from snella_app.training.build import EpochSampler
from snella_app.training.session import InterruptCallback, TrainingInterrupted
from snella_app.training.train import train

from .test_serve import post, served

QUIET = Console(file=io.StringIO(), width=200)
TINY = {
    **{"backbone": "test_vit", "pretrained": False, "img_size": 32, "method": "bias", "epochs": 2, "batch_size": 8},
    **{"device": "cpu", "progress": False, "head_init": "probe", "lr": 1e-3},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """40 images with up to three bright colors: names in `colors`, number in `count`, brightness in `light`."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(40):
        is_bright = rng.random(3) < (0.6, 0.5, 0.3)
        light = rng.uniform(60, 200)
        pixels = rng.integers(0, 40, (32, 32, 3)) + (is_bright * light)[None, None]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02}.png")
        names = "|".join(
            name for name, is_present in zip(("red", "green", "blue"), is_bright, strict=True) if is_present
        )
        part = "train" if index < 24 else "val" if index < 32 else "test"
        rows.append(
            [
                f"{index:02}.png",
                names,
                int(is_bright.sum()),
                f"{light:.2f}",
                f"{pixels.mean():.2f}",
                part,
                1 + index % 2,
            ]
        )
    with (folder / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "colors", "count", "light", "mean", "split", "weight"], *rows])
    return folder / "images.csv"


@pytest.fixture(scope="module")
def make_run(table, tmp_path_factory):
    """Train a tiny run of a task on the table, shared by tests that only read it."""
    runs = {}

    def make(task, label):
        if task not in runs:
            out = str(tmp_path_factory.mktemp(task) / "run")
            runs[task] = train(
                TrainConfig.from_flat(**TINY, task=task, data=f"csv:{table}", columns=f"label={label}", out=out), QUIET
            )
        return runs[task]

    return make


def read_csv(path):
    return [line.split(",") for line in path.read_text().splitlines()]


TASKS = {"multilabel": "colors", "ordinal": "count", "regression": "light+mean"}


@pytest.mark.parametrize(("task", "label"), TASKS.items())
def test_evaluation_reproduces_the_results_of_the_run(make_run, task, label):
    run = make_run(task, label)
    test, result = run.read_json("metrics.json")["test"], evaluate(run.path)
    assert result["images"] == 8
    for name in task_class(task).monitors:
        assert result[name] == pytest.approx(test[name], abs=1e-5)


@pytest.mark.parametrize(("task", "label"), TASKS.items())
def test_a_merged_model_with_its_decoding_comment_matches_predict(make_run, table, task, label, tmp_path):
    run = make_run(task, label)
    path = table.parent / "03.png"
    prediction = load(run.path).predict([path])[0]
    *lines, use = merge(run.path, tmp_path / "model").snippet.splitlines()
    assert lines[-1] == "# convert() clips 16-bit gray values at 255; multiply them by 255 / 65535 first"
    scope = {"image": Image.open(path)}
    exec("\n".join(lines), scope)
    with torch.no_grad():
        result = eval(use.removeprefix("# "), scope)
    if task == "multilabel":
        assert sorted(result) == sorted(prediction.labels)
    elif task == "ordinal":
        assert result == prediction.label
    else:
        assert result.tolist() == pytest.approx(list(prediction.values.values()), rel=1e-4)
    assert use in merge(run.path, tmp_path / "model.safetensors").snippet


@pytest.mark.parametrize(("task", "label"), TASKS.items())
def test_the_server_returns_the_values_of_predict(make_run, table, task, label):
    model = load(make_run(task, label).path)
    path = table.parent / "03.png"
    (expected,) = model.predict([path])
    with served(create_app(model)) as address:
        status, answer = post(address, [(path.name, path.read_bytes())])
    (entry,) = answer["predictions"]
    assert status == 200 and entry.pop("name") == "03.png" and entry.pop("text") == expected.text()
    numbers = expected.values if task == "regression" else expected.probabilities
    assert entry.pop("values" if task == "regression" else "probabilities") == pytest.approx(
        numbers, rel=1e-5, abs=1e-5
    )
    if task == "ordinal":
        assert entry.pop("probability") == pytest.approx(expected.probability, abs=1e-5)
    remaining = {"multilabel": ("labels",), "ordinal": ("label",), "regression": ()}[task]
    assert entry == {name: getattr(expected, name) for name in remaining}


@pytest.mark.parametrize(("task", "label"), TASKS.items())
@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
def test_an_exported_graph_gives_the_outputs_of_the_run(make_run, table, task, label, tmp_path):
    run, path = make_run(task, label), table.parent / "03.png"
    loaded = load_run(run.path, "cpu")
    image = loaded.transform(Image.open(path))[None]
    with torch.no_grad():
        expected = loaded.task.final_outputs(loaded.network(image), loaded.info.temperature)
        script = torch.jit.load(str(export(run.path, "torchscript", tmp_path / "model.pt").path))(image)
        graph = torch.export.load(str(export(run.path, "torch-export", tmp_path / "model.pt2").path)).module()(image)
    assert (script - expected).abs().max() <= 1e-5 and (graph - expected).abs().max() <= 1e-5
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(export(run.path, "onnx", tmp_path / "model.onnx").path))
    assert np.abs(session.run(None, {"images": image.numpy()})[0] - expected.numpy()).max() <= 1e-4
    (prediction,) = load(run.path).predict([path])
    actual = prediction.values if task == "regression" else dict(prediction.ranking)
    assert dict(zip(loaded.classes, expected[0].tolist(), strict=True)) == pytest.approx(actual, rel=1e-4, abs=1e-5)
    for name in ("timm", "hf"):
        with pytest.raises(ValueError, match=rf"format={name} does not support the task {task}; use one of sparse, "):
            export(run.path, name, tmp_path / name)
    snippet = export(run.path, "sparse", tmp_path / "model.sparse").snippet
    assert loaded.task.decoding_comment("outputs") in snippet


def test_thresholds_are_chosen_on_validation_and_used_by_predict(make_run, table, tmp_path):
    run = make_run("multilabel", "colors")
    thresholds = run.read_json("run.json")["task_state"]["thresholds"]
    val = run.read_json("metrics.json")["val"]
    assert [row["threshold"] for row in val["per_class"]] == thresholds and val["map"] > 0.8
    predictions = load(run.path).predict([table.parent])
    classes = run.read_json("run.json")["classes"]
    for prediction in predictions:
        above = {name for name, t in zip(classes, thresholds, strict=True) if prediction.probabilities[name] >= t}
        assert set(prediction.labels) == above
    stored = run.read_json("predictions.json")
    assert stored["thresholds"] == thresholds and len(stored["items"]) == 8
    rows = read_csv(write_predictions(predictions, tmp_path / "labels.csv"))
    assert rows[0] == ["image", "labels", *classes]
    assert rows[1][1] == "|".join(predictions[0].labels)
    assert float(rows[1][2]) == pytest.approx(predictions[0].probabilities[classes[0]], abs=1e-6)
    ranked = read_csv(write_predictions(predictions, tmp_path / "top.csv", 1))
    assert ranked[0] == ["image", "labels", "label_1", "probability_1"]
    assert ranked[1][2] == predictions[0].ranking[0][0]


def test_numbers_are_predicted_in_their_unit(make_run, table, tmp_path):
    run = make_run("regression", "light+mean")
    predictions = load(run.path).predict([table.parent])
    names, *rows = read_csv(table)
    means = [float(row[names.index("mean")]) for row in rows]
    errors = [abs(p.values["mean"] - mean) for p, mean in zip(predictions, means, strict=True)]
    assert np.mean(errors) < 0.5 * np.std(means)
    written = read_csv(write_predictions(predictions, tmp_path / "numbers.csv"))
    assert written[0] == ["image", "light", "mean"]
    assert float(written[1][2]) == pytest.approx(predictions[0].values["mean"], rel=1e-5)
    with pytest.raises(ValueError, match="top_k must be omitted for regression, got 2"):
        RegressionTask.check_output(tmp_path / "again.csv", 2, overwrite=False)


def test_ordered_classes_are_numbered_by_rank(make_run, table):
    run = make_run("ordinal", "count")
    info = run.read_json("run.json")
    assert info["classes"] == ["0", "1", "2", "3"] and info["backbone"]["num_classes"] == 3
    assert len(run.read_json("metrics.json")["test"]["confusion"]) == 4
    prediction = load(run.path).predict([table.parent / "00.png"])[0]
    assert sum(p for _, p in prediction.ranking) == pytest.approx(1.0, abs=1e-5)
    assert prediction.label in info["classes"]


@pytest.mark.parametrize(("task", "label"), TASKS.items())
def test_the_report_has_the_sections_of_its_task(make_run, task, label):
    page = make_run(task, label).report.read_text()
    sections = set(re.findall(r'<section id="([a-z]+)">', page))
    specific = {"multilabel": "labels", "ordinal": "confusion", "regression": "numbers"}
    assert specific[task] in sections and not (set(specific.values()) - {specific[task]}) & sections
    assert "examples" in sections and page.count("data:image/png") >= 8
    assert {
        "multilabel": "a random ranking scores",
        "ordinal": "the most frequent class",
        "regression": "always predicting the median of the training targets",
    }[task] in page


def test_a_linear_head_is_trained_on_cached_features(table, tmp_path):
    settings = {**TINY, "method": "linear", "augment": "none", "epochs": 1}
    for task, label in TASKS.items():
        config = TrainConfig.from_flat(
            **settings, task=task, data=f"csv:{table}", columns=f"label={label}", out=str(tmp_path / task)
        )
        row = train(config, QUIET, render_report=False).read_json("metrics.json")["history"][0]
        assert np.isfinite(row["val_loss"])


def balanced_settings(photos, out, **changes):
    values = {
        **{"class_weights": "balanced", "sampler": "weighted", "loss": "focal", "monitor": "macro_f1"},
        **{"data": f"folder:{photos}", "out": str(out), "epochs": 3, "head_init": "random", **changes},
    }
    return TrainConfig.from_flat(**{**TINY, **values})


def test_a_balanced_run_resumes_bit_for_bit(make_photos, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "few", {"cats": 20, "dogs": 10})
    uninterrupted = train(balanced_settings(photos, tmp_path / "uninterrupted"), QUIET, render_report=False)
    stopped = InterruptCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return stopped(self, args, state, control, **kwargs)

    monkeypatch.setattr(InterruptCallback, "on_step_end", stop)
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        train(balanced_settings(photos, tmp_path / "cut"), QUIET, render_report=False)
    monkeypatch.undo()
    again = train(TrainConfig.from_flat(out=str(tmp_path / "cut"), resume=True), QUIET, render_report=False)
    for name in ("history", "val", "test", "best_epoch"):
        assert again.read_json("metrics.json")[name] == uninterrupted.read_json("metrics.json")[name]
    notes = uninterrupted.read_json("run.json")["data"]["notes"]
    assert (
        "class_weights balanced and sampler weighted both compensate for class imbalance; use only one of them" in notes
    )


@pytest.mark.parametrize(("loss", "class_weights"), [("focal", "balanced"), ("logit-adjusted", None)])
def test_the_epoch_is_selected_by_the_monitored_metric(loss, class_weights, make_photos, tmp_path):
    photos = make_photos(tmp_path / "few", {"cats": 20, "dogs": 10})
    changes = {"lr": 0.01, "sampler": "shuffle", "loss": loss, "class_weights": class_weights}
    run = train(balanced_settings(photos, tmp_path / "run", **changes), QUIET, render_report=False)
    metrics = run.read_json("metrics.json")
    assert metrics["best_metric"] == "val_macro_f1"
    best = max(metrics["history"], key=lambda row: (row["val_macro_f1"], -row["val_loss"], row["epoch"]))
    assert metrics["best_epoch"] == best["epoch"]
    assert (run.read_config().optim.loss, run.read_config().optim.class_weights) == (loss, class_weights)


def test_a_class_weights_file_is_stored_in_the_settings(make_photos, tmp_path):
    photos = make_photos(tmp_path / "few", {"cats": 10, "dogs": 10})
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"cats": 1, "dogs": 3}))
    settings = {"sampler": "shuffle", "epochs": 1, "class_weights": str(weights)}
    run = train(balanced_settings(photos, tmp_path / "run", **settings), QUIET, render_report=False)
    assert run.read_config().optim.class_weights == {"cats": 1.0, "dogs": 3.0}
    same = balanced_settings(photos, run.path, **settings, resume=True)
    assert run.resolve_settings(same).optim.class_weights == {"cats": 1.0, "dogs": 3.0}
    weights.write_text(json.dumps({"cats": 1, "dogs": 4}))
    with pytest.raises(ValueError, match=r"class_weights is \{.*'dogs': 3\.0\} there and \{.*'dogs': 4\.0\} here"):
        run.resolve_settings(same)
    with pytest.raises(ValueError, match=r"no class 'mice'; no weight for 'dogs'"):
        train(balanced_settings(photos, tmp_path / "other", class_weights={"cats": 1, "mice": 3}), QUIET)


def test_the_weighted_order_depends_on_seed_and_epoch_and_balances_classes():
    weights = [1 / 90] * 90 + [1 / 10] * 10
    first, second = EpochSampler(100, 3, weights), EpochSampler(100, 3, weights)
    second.set_epoch(1)
    assert list(first) == list(first) != list(second)
    drawn = []
    for epoch in range(40):
        first.set_epoch(epoch)
        drawn += list(first)
    assert abs(np.mean(np.asarray(drawn) >= 90) - 0.5) < 4 * 0.5 / np.sqrt(len(drawn))


def test_sample_weights_of_a_table_are_used_in_the_loss(table, tmp_path):
    settings = {**TINY, "epochs": 1, "augment": "none", "task": "regression", "data": f"csv:{table}"}
    settings |= {"head_init": "random", "lr": 0.0, "head_lr": 0.0}
    losses = {}
    for weight in ("weight", "none"):
        out = str(tmp_path / weight)
        config = TrainConfig.from_flat(**settings, columns=f"label=light,weight={weight}", out=out)
        losses[weight] = train(config, QUIET, render_report=False).read_json("metrics.json")["history"][0]["train_loss"]
    assert losses["weight"] > 1.2 * losses["none"]  # weights of 1 and 2, half of each


def test_folders_support_labels_and_numeric_classes(make_photos, tmp_path):
    folder = make_photos(tmp_path / "ages", {"1": 6, "2": 6, "10": 6})
    base = {**TINY, "epochs": 1, "data": f"folder:{folder}"}
    run = train(TrainConfig.from_flat(**base, task="regression", out=str(tmp_path / "n")), QUIET, render_report=False)
    assert run.read_json("run.json")["classes"] == ["value"]
    assert sorted({item["values"][0] for item in run.read_json("predictions.json")["items"]}) == [1.0, 2.0, 10.0]
    run = train(TrainConfig.from_flat(**base, task="ordinal", out=str(tmp_path / "o")), QUIET, render_report=False)
    assert run.read_json("run.json")["classes"] == ["1", "2", "10"]
    names = make_photos(tmp_path / "names", {"cats": 6, "dogs": 6})
    with pytest.raises(ValueError, match=r"column of numbers for the regression task.* with classes 'cats', 'dogs'"):
        train(
            TrainConfig.from_flat(**{**base, "data": f"folder:{names}"}, task="regression", out=str(tmp_path / "r")),
            QUIET,
        )
    with pytest.raises(ValueError, match=r"class_order must list the classes from lowest"):
        train(
            TrainConfig.from_flat(**{**base, "data": f"folder:{names}"}, task="ordinal", out=str(tmp_path / "q")), QUIET
        )
