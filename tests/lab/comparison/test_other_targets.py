"""Multilabel and regression comparisons, and method selection by a small comparison."""

import csv
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import snella
from snella_app.cli.main import main
from snella_app.config.train import TrainConfig
from snella_app.methods import check_method, find_method
from snella_app.methods.defaults import CHOICE_METHODS
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs import RunFolder
from snella_app.text import decimal_text, percent_text
from snella_app.training.session import TrainingInterrupted
from snella_lab.comparison import compare as module
from snella_lab.comparison.compare import CellsFailedError, choose_method, compare
from snella_lab.comparison.executors import InThisProcess
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.experiment_files import experiment_from_options
from snella_lab.comparison.options import CompareOptions

from .conftest import rows_of


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Write images labeled with their brightness and their bright color channels."""
    folder, random = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "tags", "level", "kind"])
        for index in range(36):
            means = random.choice([60, 180], 3)
            pixels = np.clip(random.normal(means, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            tags = "|".join(name for name, mean in zip("rgb", means, strict=True) if mean > 100)
            kind = ["bright", "dark"][int(means.sum() < 360)]
            writer.writerow([f"{index}.png", tags, int(means.sum()), kind])
    return folder / "t.csv"


@pytest.mark.parametrize(
    ("task", "label", "metric", "title"),
    [("multilabel", "tags", "map", "mean average precision"), ("regression", "level", "r2", "R²")],
)
def test_methods_are_compared_by_the_metric_of_the_task(task, label, metric, title, table, tmp_path, console):
    options = CompareOptions.from_flat(
        **{"out": str(tmp_path / "c"), "methods": "linear,lora-2", "data": f"csv:{table}", "backbone": "test_vit"},
        **{"seeds": 1, "lr_factors": "1", "weight_decays": "none", "forgetting": "none", "workers": 0, "task": task},
        **{"columns": f"path=photo,label={label}", "img_size": 32, "epochs": 1, "device": "cpu", "pretrained": False},
    )
    page = compare(experiment_from_options(options), options.out, options.execution, console).read_text()
    rows = list(rows_of(tmp_path / "c").values())
    assert {row["metric"] for row in rows} == {metric} and [row["status"] for row in rows] == ["success"] * 2
    scores = {row["experiment_name"]: row[f"test_{metric}"] for row in rows}
    best = [name for name, score in scores.items() if score == max(scores.values())]
    leaders = f"{', '.join(best)} {'has' if len(best) == 1 else 'have'}"
    printed = console.file.getvalue()
    score = decimal_text(scores[best[0]], 3) if metric == "r2" else percent_text(scores[best[0]])
    assert f"{leaders} the highest test {title}, {score}" in printed
    assert "Recommended: " in printed and f" {title}" in printed.partition("Recommended: ")[2].partition(chr(10))[0]
    assert f"<h2>{title[0].upper()}{title[1:]} on test</h2>" in page and "ccuracy on test" not in page


@pytest.fixture
def parts(tmp_path):
    """Write a table of forty images, five of them in the smaller class, and a row with a missing file."""
    lines, random = ["photo,label"], np.random.default_rng(0)
    for index in range(40):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,{'scratch' if index % 8 == 0 else 'good'}")
    (tmp_path / "parts.csv").write_text("\n".join([*lines, "missing.png,good"]) + "\n")
    return f"csv:{tmp_path / 'parts.csv'}"


def test_notes_about_the_data_are_printed_before_training(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("snella_lab.comparison.compare._train_all", lambda *arguments: None)
    args = ["compare", "--methods", "linear", "--data", parts, "--backbone", "test_vit", "--pretrained", "false"]
    args += ["--img-size", "32", "--epochs", "1", "--device", "cpu", "--forgetting", "none"]
    assert main([*args, "--out", str(tmp_path / "refused")]) == 2
    error = capsys.readouterr().err
    assert error.count("parts.csv") == 1 and "skip them with --skip-corrupt\n" in error
    assert main([*args, "--skip-corrupt", "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert f"note: skipped 1 of 41 rows of {parts}, 1 no such file: missing.png (no such file)\n" in printed
    assert "note: classes are imbalanced: " in printed
    assert (
        "note: classes are imbalanced, and methods are compared by accuracy; consider --monitor balanced_accuracy\n"
        in printed
    )
    assert main([*args, "--skip-corrupt", "--monitor", "balanced_accuracy", "--out", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "classes are imbalanced" in printed and "compared by accuracy" not in printed


def test_unsupported_task_is_rejected():
    values = {"methods": ["linear"], "data": ["digits"], "backbone": "test_vit"}
    with pytest.raises(ValueError, match=r"task must be one of classification, .* in a comparison, got 'segmentation'"):
        Experiment.from_dict({**values, "train": {"task": "segmentation"}})
    experiment = Experiment.from_dict({**values, "train": {"monitor": "balanced_accuracy"}})
    assert experiment.metric == "balanced_accuracy" and list(experiment.measures) == ["balanced_accuracy", "accuracy"]


@pytest.mark.parametrize("name", CHOICE_METHODS)
def test_every_candidate_of_method_auto_is_a_method_without_required_options(name):
    check_method(name, {})
    assert not find_method(name).needs_batches


@pytest.fixture
def small_choice(monkeypatch):
    monkeypatch.setattr(module, "CHOICE_METHODS", ("linear", "lora-2"))
    monkeypatch.setattr(module, "_executor", lambda root, experiment, *others: InThisProcess(root, experiment))


def test_auto_selects_the_method_recommended_on_validation_images(
    small_choice, table, tmp_path, console, capsys, monkeypatch
):
    values = {
        **{"data": f"csv:{table}", "columns": "path=photo,label=kind", "backbone": "test_vit", "pretrained": False},
        **{"img_size": 32, "epochs": 2, "device": "cpu", "seed": 3, "out": str(tmp_path / "run"), "progress": False},
    }
    config = TrainConfig.from_flat(**values, method="auto")
    chosen = choose_method(config, console)
    rows = list(rows_of(tmp_path / "run-choice").values())
    assert [row["experiment_name"] for row in rows] == ["linear", "linear", "lora-2", "lora-2"]
    assert all(row["test_accuracy"] is None and row["train_config"]["test_seed"] == 3 for row in rows)
    means = {
        name: np.mean([r["val_accuracy"] for r in rows if r["experiment_name"] == name])
        for name in ("linear", "lora-2")
    }
    printed = console.file.getvalue()
    assert f"Recommended: {chosen.method.name}" in printed and f"{100 * max(means.values()):.1f}" in printed
    assert chosen.method.name in means and chosen.run.seed == 3 and chosen.optim.epochs == 2
    monkeypatch.setattr("snella_lab.comparison.run_cell.train", None)  # the selection is stored in its folder
    args = [
        f"--{name.replace('_', '-')}={str(value).lower() if value is False else value}"
        for name, value in values.items()
    ]
    assert main(["train", *args, "--method", "auto"]) == 0
    assert read(RunInfo, tmp_path / "run").method == chosen.method.name
    assert main(["train", *args, "--method", "auto"]) == 2
    assert "contains a finished run" in capsys.readouterr().err


def test_auto_keeps_the_method_of_a_resumed_run(tmp_path):
    values = {"data": "digits", "backbone": "test_vit", "out": str(tmp_path / "run")}
    run = RunFolder(tmp_path / "run")
    run.prepare(TrainConfig.from_flat(**values, method="lora-8").resolved(), is_resumed=False)
    run.update("interrupted")
    assert choose_method(TrainConfig.from_flat(**values, method="auto", resume=True)).method.name == "lora-8"


def test_auto_keeps_a_folder_that_it_did_not_write(small_choice, table, tmp_path, console):
    (tmp_path / "run-choice").mkdir()
    (tmp_path / "run-choice" / "notes.txt").write_text("mine")
    config = TrainConfig.from_flat(
        **{"data": f"csv:{table}", "columns": "path=photo,label=kind", "backbone": "test_vit", "pretrained": False},
        **{"img_size": 32, "device": "cpu", "out": str(tmp_path / "run"), "method": "auto", "overwrite": True},
    )
    with pytest.raises(FileExistsError, match="contains files but no comparison; choose an empty or new folder"):
        choose_method(config, console)
    assert (tmp_path / "run-choice" / "notes.txt").read_text() == "mine"


def test_equal_targets_fail_with_the_reason(table, tmp_path, console):
    lines = table.read_text().splitlines()
    rows = [lines[0], *(",".join([*line.split(",")[:2], "5", line.split(",")[3]]) for line in lines[1:])]
    equal = table.with_name("equal.csv")
    equal.write_text("\n".join(rows))
    options = CompareOptions.from_flat(
        **{"out": str(tmp_path / "c"), "methods": "linear", "data": f"csv:{equal}", "backbone": "test_vit"},
        **{"seeds": 1, "lr_factors": "1", "weight_decays": "none", "forgetting": "none", "workers": 0},
        **{"columns": "path=photo,label=level", "img_size": 32, "epochs": 1, "device": "cpu", "pretrained": False},
        task="regression",
    )
    with pytest.raises(CellsFailedError, match="R² is undefined on the test images, for example because all targets"):
        compare(experiment_from_options(options), options.out, options.execution, console)


def test_auto_rejects_folds_and_options_of_single_methods(tmp_path):
    values = {"data": "digits", "backbone": "test_vit", "out": str(tmp_path), "method": "auto"}
    with pytest.raises(ValueError, match=r"r 4 needs a specific method, got method 'auto'; .*folds 3 needs"):
        TrainConfig.from_flat(**values, r=4, folds=3)
    with pytest.raises(ValueError, match="method must be a specific method for a dataset object, got 'auto'"):
        snella.train(data=[], backbone="test_vit", out=str(tmp_path), method="auto")
    with pytest.raises(ValueError, match=r"train\(method='auto'\) and the command line"):
        TrainConfig.from_flat(**values).resolved()


def test_sigterm_interrupts_the_selection_and_stops_its_run(tmp_path, console, monkeypatch):
    calls = []

    def wait(timeout_s):
        calls.append("wait")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not interrupted")

    executor = SimpleNamespace(start=lambda cell: calls.append("start"), wait=wait, close=lambda: calls.append("close"))
    monkeypatch.setattr(module, "_executor", lambda *arguments: executor)
    values = {"data": "digits", "backbone": "test_vit", "pretrained": False, "img_size": 32, "device": "cpu"}
    config = TrainConfig.from_flat(**values, out=str(tmp_path / "run"), method="auto")
    previous = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        with pytest.raises(TrainingInterrupted, match=r"interrupted while selecting a method in .*run-choice; resume"):
            choose_method(config, console)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert calls == ["start", "wait", "close"]


def test_auto_reports_methods_without_validation_scores(small_choice, tmp_path, console, monkeypatch):
    row = SimpleNamespace(status="success", error=None, cell="digits/x", score=lambda part: None)
    monkeypatch.setattr(
        module,
        "_trained_row",
        lambda root, experiment, cell: SimpleNamespace(**vars(row), experiment_name=cell.method.name),
    )
    values = {"data": "digits", "backbone": "test_vit", "pretrained": False, "img_size": 32, "device": "cpu"}
    config = TrainConfig.from_flat(**values, out=str(tmp_path / "run"), method="auto")
    message = r"every method failed in .*: no validation score; fix the cause, then delete .*/run-choice$"
    with pytest.raises(CellsFailedError, match=message):
        choose_method(config, console)
    assert "linear: FAILED, no validation accuracy" in console.file.getvalue()
