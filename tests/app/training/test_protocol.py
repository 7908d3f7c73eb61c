"""Runs under each protocol on tiny data in the layouts of the benchmarks, started from the command line."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from snella.matrices import adapted_matrices
from snella_app.cli.main import main
from snella_app.config.train import TrainConfig
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.report.inspect import inspect_run
from snella_app.runs import RunFolder, load_run
from snella_app.runs.evaluate import _selection_note, evaluate
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train
from tests.benchmark_folders import write_fgvc, write_vtab

from .components import interrupt_before


@pytest.fixture(scope="module")
def camelyon(tmp_path_factory):
    sizes = {"train800": 12, "val200": 4, "test": 8}
    return write_vtab(tmp_path_factory.mktemp("vtab") / "patch_camelyon", 2, sizes, side=32)


@pytest.fixture(scope="module")
def args(camelyon):
    """Arguments of a tiny run on VTAB-1k, without `--out`."""
    return [
        "train", "--data", f"vtab:{camelyon}", "--strict-sizes", "false", "--backbone", "test_vit",
        "--pretrained", "false",
        "--img-size", "32", "--method", "snella-2", "--target-sparsity", "0.8", "--epochs", "3", "--batch-size", "4",
        "--device", "cpu", "--progress", "false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(args, tmp_path_factory):
    """Finished run of each protocol."""
    root = tmp_path_factory.mktemp("protocols")
    for name in PROTOCOLS:
        assert main([*args, "--protocol", name, "--out", str(root / name)]) == 0
    return {name: RunFolder(root / name) for name in PROTOCOLS}


def keys(run):
    return {key for row in run.read_json("metrics.json")["history"] for key in row}


def test_protocol_names_are_consistent():
    choices = TrainConfig.settings()["protocol"].type
    assert list(PROTOCOLS) == list(choices.__args__)


def test_the_best_epoch_has_the_target_sparsity_if_the_schedule_ends_early(args, tmp_path):
    assert main([*args, "--method-options.schedule_end", "0.5", "--epochs", "4", "--out", str(tmp_path / "run")]) == 0
    metrics = RunFolder(tmp_path / "run").read_json("metrics.json")
    assert [row.get("is_denser", False) for row in metrics["history"]] == [True, True, False, False, False]
    assert metrics["best_epoch"] >= 2
    model = load_run(tmp_path / "run").model
    matrices = adapted_matrices(model)
    assert sum(m.budget for m in matrices) == sum(m.size for m in matrices) - round(0.8 * sum(m.size for m in matrices))


def test_an_epoch_above_the_target_budget_scores_lowest():
    def task_score(row):
        return row["val_accuracy"], -row["val_loss"]

    protocol = PROTOCOLS["standard"]
    denser = {"val_accuracy": 0.9, "val_loss": 0.1, "is_denser": True}
    assert protocol.selection_score(denser, task_score) < protocol.selection_score(
        {"val_accuracy": 0.1, "val_loss": 3.0}, task_score
    )


def test_an_unknown_protocol_is_rejected():
    with pytest.raises(ValueError, match="protocol must be one of standard, final, official, got 'offical'"):
        TrainConfig.from_flat(data="digits", backbone="test_vit", out="-", protocol="offical")


def test_the_standard_protocol_selects_on_validation(runs):
    metrics = runs["standard"].read_json("metrics.json")
    assert (metrics["protocol"], metrics["selected_on"], metrics["best_metric"]) == ("standard", "val", "val_accuracy")
    assert "val_accuracy" in keys(runs["standard"]) and not any(
        key.startswith("test_") for key in keys(runs["standard"])
    )
    assert runs["standard"].read_json("run.json")["data"]["sizes"] == {"train": 12, "val": 4, "test": 8}


def test_the_final_protocol_saves_the_last_epoch_without_validation(runs):
    run = runs["final"]
    metrics, info = run.read_json("metrics.json"), run.read_json("run.json")
    assert info["data"]["sizes"] == {"train": 16, "val": 0, "test": 8} and info["protocol"] == "final"
    assert (metrics["best_epoch"], metrics["selected_on"], metrics["val"]) == (3, None, None)
    assert not any(key.startswith(("val_", "test_")) for key in keys(run))
    assert 0 <= metrics["test"]["accuracy"] <= 1 and len(run.read_json("predictions.json")["items"]) == 8
    allocation = run.read_json("allocation.json")
    assert sum(matrix["nonzeros"] for matrix in allocation["matrices"]) == allocation["target_budget"]


def test_the_final_protocol_saves_the_adapter_of_the_last_step(runs):
    run = runs["final"]
    last = next(run.checkpoints.iterdir())
    saved, state = (load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, last))
    assert last.name == "checkpoint-12" and all(
        torch.equal(saved[name], state[name])
        for name in state
        if ".head." not in name  # its inputs are normalized
    )


def test_the_official_protocol_selects_on_test_images_and_reports_it(runs):
    run = runs["official"]
    metrics = run.read_json("metrics.json")
    assert (metrics["protocol"], metrics["selected_on"], metrics["best_metric"]) == (
        "official",
        "test",
        "test_accuracy",
    )
    history = metrics["history"]
    assert "test_accuracy" in keys(run) and not any(key.startswith("val_") for key in keys(run))
    assert metrics["test"]["accuracy"] == max(row["test_accuracy"] for row in history)
    assert run.read_json("run.json")["data"]["sizes"] == {"train": 16, "val": 0, "test": 8}
    report = run.report.read_text()
    assert "Protocol official: the best epoch was selected on the test images" in report
    assert "Accuracy on test" in report and "Accuracy on validation" not in report
    printed = io.StringIO()
    Console(file=printed, width=200).print(inspect_run(run.path))
    assert "official: the epoch was selected on the test images" in printed.getvalue()


def test_evaluating_the_images_of_the_selection_is_noted(runs):
    official = evaluate(runs["official"].path)
    assert any(note.startswith("the epoch was selected on the test images") for note in official["notes"])
    notes = evaluate(runs["standard"].path, split="val")["notes"]  # the final head was fitted to these images, too
    assert [note.partition(",")[0] for note in notes if "optimistic" in note] == [
        "the final head was also fitted to these images"
    ]
    assert _selection_note(load_run(runs["standard"].path), "val").startswith(
        "the epoch was selected on the validation images"
    )
    for name in ("standard", "final"):
        assert not any("the epoch was selected" in note for note in evaluate(runs[name].path)["notes"])


def test_only_the_official_report_warns(runs):
    for name in ("standard", "final"):
        assert "optimistic" not in runs[name].report.read_text()


def test_the_official_protocol_uses_imagenet_mean_and_uncropped_images(runs):
    configs = {name: run.read_json("run.json")["data_config"] for name, run in runs.items()}
    assert configs["official"]["mean"] == [0.485, 0.456, 0.406] and configs["official"]["std"] == [0.229, 0.224, 0.225]
    assert configs["standard"]["mean"] == configs["final"]["mean"] == [0.5, 0.5, 0.5]
    assert all((config["crop_mode"], config["crop_pct"]) == ("squash", 1.0) for config in configs.values())
    other = PROTOCOLS["official"].data_config({"crop_mode": "squash", "crop_pct": 1.0}, is_resized_whole=False)
    assert (other["crop_mode"], other["crop_pct"], other["interpolation"]) == ("center", 0.875, "bilinear")


def test_the_official_protocol_evaluates_every_tenth_epoch_and_the_last_ten():
    measured = [epoch for epoch in range(1, 101) if PROTOCOLS["official"].is_measured(epoch, 100)]
    assert measured == [1, 11, 21, 31, 41, 51, 61, 71, 81, *range(91, 101)]
    assert all(PROTOCOLS["standard"].is_measured(epoch, 100) for epoch in (1, 2, 100))
    assert not any(PROTOCOLS["final"].is_measured(epoch, 100) for epoch in (1, 100))


def test_an_epoch_without_evaluation_is_not_selected(camelyon, tmp_path, no_report):
    """Epochs 2 and 3 of 13 are not evaluated; the best epoch is one of the others."""
    config = TrainConfig.from_flat(
        data=f"vtab:{camelyon}", strict_sizes=False, backbone="test_vit", pretrained=False, img_size=32,
        method="linear", epochs=13, batch_size=16, augment="none", device="cpu", progress=False, protocol="official",
        out=str(tmp_path / "run"),
    )  # fmt: skip
    run = train(config, Console(file=io.StringIO()))
    history = run.read_json("metrics.json")["history"]
    assert [row["epoch"] for row in history if "test_accuracy" in row] == [1, *range(4, 14)]
    assert run.read_json("metrics.json")["best_epoch"] not in (2, 3)


def test_the_console_names_the_selection_criterion(args, tmp_path, capsys, no_report):
    shown = {}
    for name in ("final", "official"):
        short = [*args, "--epochs", "1", "--method", "linear", "--target-sparsity", "null", "--protocol", name]
        assert main([*short, "--out", str(tmp_path / name)]) == 0
        shown[name] = capsys.readouterr().out
    assert "final: training on training and validation images; the last epoch is saved" in shown["final"]
    assert (
        "epoch 1, the last, with the final head: test accuracy" in shown["final"] and "val loss" not in shown["final"]
    )
    assert "warning" in shown["official"] and "epoch 1, the best on the test images: test accuracy" in shown["official"]
    assert (
        "official protocol: the epoch was selected on the test images" in shown["official"]
        and "test loss" in shown["official"]
    )


def test_evaluation_uses_the_test_images_of_the_run_under_every_protocol(runs):
    for run in runs.values():
        result = evaluate(run.path, device="cpu")
        assert result["split"] == "test" and result["accuracy"] == run.read_json("metrics.json")["test"]["accuracy"]
    with pytest.raises(ValueError, match=r"split must be one of train, test, all, auto for this data, got 'val'"):
        evaluate(runs["final"].path, split="val", device="cpu")


def test_the_official_protocol_needs_test_images():
    with pytest.raises(ValueError, match="official needs test images for epoch selection, but 'digits' has none"):
        load_data("digits", DataConfig(test_fraction=0, protocol="official"))


def test_the_final_protocol_needs_no_held_out_images(photos, tmp_path, settings):
    run = train(settings(protocol="final", test_fraction=0.0, method="linear", epochs=1), Console(file=io.StringIO()))
    metrics = run.read_json("metrics.json")
    assert metrics["val"] is metrics["test"] is None and run.read_json("run.json")["data"]["sizes"]["train"] == 48
    assert not (run.path / "predictions.json").exists() and run.report.is_file()


def test_fgvc_uses_the_same_command(tmp_path, no_report):
    folder = write_fgvc(tmp_path / "fgvc" / "cub", "images", [3, 17], {"train": 8, "val": 4, "test": 4}, side=32)
    args = [
        "train", "--data", f"fgvc:{folder}", "--strict-sizes", "false", "--backbone", "test_vit",
        "--pretrained", "false",
        "--img-size", "32", "--method", "snella-2", "--epochs", "1", "--batch-size", "4", "--device", "cpu",
        "--protocol", "official", "--ema", "0.9999", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(args) == 0
    run = RunFolder(tmp_path / "run")
    info = run.read_json("run.json")
    assert info["data"]["sizes"] == {"train": 8, "val": 0, "test": 4} and info["ema"] == 0.9999
    assert info["classes"] == ["003.Bird_3", "017.Bird_17"]


@pytest.mark.parametrize("ema", [0.0, 1.0, -1.0])
def test_a_decay_out_of_range_is_rejected(ema):
    with pytest.raises(ValueError, match=rf"ema must be in \(0, 1\), got {ema}; leave it out to disable it"):
        TrainConfig.from_flat(data="digits", backbone="test_vit", out="-", ema=ema)


def test_a_run_with_ema_saves_the_average_with_exact_budgets(settings, no_report):
    """The average is evaluated and saved; the reloaded adapter has exactly the sparsity of its budgets."""
    short = {"protocol": "final", "epochs": 2, "head_norm": "none"}
    plain = train(settings(**short, out=settings().run.out + "-plain"), Console(file=io.StringIO()))
    run = train(settings(**short, ema=0.9), Console(file=io.StringIO()))
    factors, values = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, plain))
    last = load_file(next(run.checkpoints.iterdir()) / "adapter_model.safetensors")
    assert all(torch.equal(last[name], values[name]) for name in last), "averaging must not change training"
    assert any(not torch.equal(factors[name], last[name]) for name in last)
    averages = load_file(next(run.checkpoints.iterdir()) / "ema.safetensors")
    assert len(averages) > 10 and any(
        torch.equal(factors["base_model.model.head.weight"], a) for a in averages.values()
    )
    loaded = load_run(run.path, "cpu")
    matrices = adapted_matrices(loaded.model)
    allocation = run.read_json("allocation.json")
    assert (
        [m.nonzeros() for m in matrices]
        == [m.budget for m in matrices]
        == [m["budget"] for m in allocation["matrices"]]
    )
    assert sum(m.budget for m in matrices) == allocation["target_budget"]
    assert run.read_json("metrics.json")["ema"] == 0.9


def test_a_run_with_ema_resumes_bit_for_bit(settings, console, no_report):
    short = {"ema": 0.9, "epochs": 2}
    uninterrupted = train(settings(**short, out=settings().run.out + "-uninterrupted"), console)
    config = settings(**short)
    with interrupt_before(5), pytest.raises(TrainingInterrupted, match="checkpoint-6"):
        train(config, console)
    run = train(TrainConfig.from_flat(out=config.run.out, resume=True), console)
    for name in ("adapter/adapter_model", "checkpoints/checkpoint-8/ema", "checkpoints/checkpoint-8/adapter_model"):
        first, second = (load_file(r.path / f"{name}.safetensors") for r in (run, uninterrupted))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert run.read_json("metrics.json")["history"] == uninterrupted.read_json("metrics.json")["history"]
