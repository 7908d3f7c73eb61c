import io
import json
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from snella import load
from snella.matrices import adapted_matrices
from snella_app.methods import build_method, load_trained
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs import RunFolder, load_run
from snella_app.runs.evaluate import evaluate, images_for_run
from snella_app.runs.model import make_backbone
from snella_app.training.finish import _adapter_card, _only_class
from snella_app.training.train import train
from snella_app.training.trainer import SnellaTrainer

from .components import build_components

training = sys.modules["snella_app.training.finish"]


def test_a_finished_run_has_all_documented_files(finished):
    names = {p.relative_to(finished.path).as_posix() for p in finished.path.rglob("*") if p.is_file()}
    expected = {"config.yaml", "run.json", "metrics.json", "allocation.json", "predictions.json", "report.html"}
    assert expected | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert not [n for n in names if ".tmp" in n or ".staging" in n]
    assert [p.name for p in finished.checkpoints.iterdir()] == ["checkpoint-12"]


def test_run_json_describes_the_run(finished):
    run = finished.read_json("run.json")
    assert run["format"] == 1 and run["status"] == "finished" and "error" not in run
    assert run["classes"] == ["cats", "dogs", "owls"]
    assert run["method"] == "snella-2" and run["method_options"]["target_sparsity"] == 0.7
    assert run["backbone"]["name"] == "test_vit" and run["backbone"]["num_classes"] == 3
    assert sum(run["data"]["sizes"].values()) == 48
    assert run["data_config"]["input_size"] == [3, 32, 32] and run["data"]["read_side"] == 4 * 32
    assert run["command"].startswith("snella train --data folder:") and "--method snella-2" in run["command"]


def test_config_yaml_is_resolved_and_reproduces_the_configuration(finished):
    values = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert values["r"] == 2 and values["lr"] is not None and values["scalar_lr"] is not None
    assert finished.read_config().stored() == values
    assert not {"overwrite", "resume", "progress"} & set(values)


def test_the_history_has_one_row_per_epoch_and_the_budget_reaches_its_target(finished):
    metrics, allocation = finished.read_json("metrics.json"), finished.read_json("allocation.json")
    assert [row["epoch"] for row in metrics["history"]] == [0, 1, 2, 3]
    assert set(metrics["history"][1]) == {
        "epoch", "train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "val_macro_f1", "lr", "budget",
    }  # fmt: skip
    budgets = [row["budget"] for row in metrics["history"]]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == allocation["target_budget"]
    assert allocation["history"][0]["step"] == 0
    assert (
        allocation["history"][-1]["budget"] == allocation["target_budget"] == round(0.3 * allocation["total_weights"])
    )


def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss(settings, console, no_report):
    metrics = train(settings(tta=1), console).read_json("metrics.json")
    ranks = [(row["val_accuracy"], -row["val_loss"]) for row in metrics["history"]]
    assert metrics["best_epoch"] == ranks.index(max(ranks))
    assert metrics["val"]["accuracy"] == max(ranks)[0]
    assert metrics["val"]["loss"] == pytest.approx(metrics["history"][metrics["best_epoch"]]["val_loss"], abs=1e-5)


def test_the_adapter_card_has_base_model_classes_and_preprocessing(finished):
    card = (finished.adapter / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    for phrase in ("`test_vit`, fine-tuned", '["cats", "dogs", "owls"]', r"input\_size: 3, 32, 32", "`snella-2`"):
        assert phrase in card, phrase


@pytest.mark.parametrize(
    ("method", "library", "loading", "can_merge"),
    [
        ("lora-2", "peft", "an adapter in PEFT format", True),
        ("linear", "snella", "`snella_app.methods.load_trained`", True),
        ("mlp-2", "snella", "`snella_app.methods.load_trained`", False),
    ],
)
def test_the_adapter_card_names_only_commands_that_accept_the_adapter(method, library, loading, can_merge, finished):
    model = build_method(method, timm.create_model("test_vit", num_classes=3, img_size=32))
    card = _adapter_card(finished.path, model)
    use = card.split("## How to use")[1].split("##")[0]
    assert yaml.safe_load(card.split("---")[1])["library_name"] == library
    assert loading in use and ("PEFT" in use) == (library == "peft") and "`snella predict RUN IMAGES`" in use
    assert ("snella merge" in use) == can_merge


def test_every_matrix_of_the_saved_adapter_matches_its_budget(finished):
    allocation = finished.read_json("allocation.json")
    matrices = adapted_matrices(load_run(finished.path).model)
    assert [m.nonzeros() for m in matrices] == [m.budget for m in matrices]
    assert [m["budget"] for m in allocation["matrices"]] == [m.budget for m in matrices]
    assert [m["nonzeros"] for m in allocation["matrices"]] == [m.budget for m in matrices]
    best = finished.read_json("metrics.json")["best_epoch"]
    best_budget = finished.read_json("metrics.json")["history"][best]["budget"]
    assert sum(m.budget for m in matrices) == best_budget


def test_predictions_cover_the_validation_images_and_match_the_metrics(finished):
    predictions, metrics = finished.read_json("predictions.json"), finished.read_json("metrics.json")
    assert predictions["split"] == "val"
    assert len(predictions["items"]) == sum(map(sum, metrics["val"]["confusion"]))
    right = [max(range(3), key=i["probabilities"].__getitem__) == i["label"] for i in predictions["items"]]
    assert sum(right) / len(right) == pytest.approx(metrics["val"]["accuracy"])
    assert all(sum(i["probabilities"]) == pytest.approx(1, abs=1e-5) for i in predictions["items"])


def test_metrics_count_parameters_and_bytes(finished):
    metrics = finished.read_json("metrics.json")
    model = load_run(finished.path).model
    assert metrics["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert metrics["adapted_weights"] == sum(m.size for m in adapted_matrices(model))
    assert metrics["adapter_bytes"] == (finished.adapter / "adapter_model.safetensors").stat().st_size
    assert metrics["train_s"] > 0 and metrics["peak_rss_mib"] > 50


def test_a_summary_is_printed_before_training(finished):
    before = finished.printed.split("epoch   1/3")[0]
    allocation = finished.read_json("allocation.json")
    description = finished.read_json("run.json")["data"]["description"]
    for text in (description, "36 matrices", "cats, dogs, owls", "3 epochs of"):
        assert text in before
    assert f"{allocation['total_weights']:,}" in before and f"{allocation['target_budget']:,}" in before
    assert "MiB" in before and "(estimate for weights" in before


def test_a_default_run_predicts_with_a_head_on_several_layers(finished_default):
    assert load_run(finished_default.path).probe is not None
    assert finished_default.read_json("metrics.json")["final_head"]["kind"] == "mixed"


def test_a_run_on_a_terminal_shows_its_progress(settings, no_report, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, force_interactive=True, width=120)
    run = train(settings(progress=True, epochs=1, final_head="auto"), console)
    assert run.status == "finished" and "evaluating the saved model" in output.getvalue()


@pytest.mark.parametrize("method", ["lora-2", "snell-2"])
def test_methods_with_and_without_budgets_train_and_reload(method, settings, console, no_report):
    run = train(settings(method=method, epochs=1), console)
    metrics = run.read_json("metrics.json")
    assert run.status == "finished" and metrics["test"]["accuracy"] == evaluate(run.path)["accuracy"]
    assert (run.path / "allocation.json").exists() == method.startswith("snell")
    assert (metrics["adapted_weights"] is None) == (not method.startswith("snell"))
    assert load_run(run.path).model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_training_learns(settings, console, no_report):
    history = train(settings(method="full", epochs=6, lr=1e-3), console).read_json("metrics.json")["history"]
    assert history[-1]["train_loss"] < 0.8 * history[1]["train_loss"]


def test_the_test_images_are_evaluated_once_with_the_best_adapter(settings, console, no_report, monkeypatch):
    seen = []
    outputs = SnellaTrainer.outputs

    def record(self, dataset, views=1):
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        seen.append((list(dataset.names), weights))
        return outputs(self, dataset, views)

    monkeypatch.setattr(SnellaTrainer, "outputs", record)
    run = train(settings(), console)
    test_names = seen[-1][0]
    assert [names for names, _ in seen].count(test_names) == 1
    best = load_trained(run.adapter, make_backbone(read(RunInfo, run.path).backbone))
    weights, saved = seen[-1][1], dict(best.named_parameters())
    assert weights and weights.keys() <= saved.keys()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_the_test_images_are_evaluated_once_with_the_final_head(settings, console, no_report, monkeypatch):
    by_trained, by_final = [], []
    outputs, compute_probe_outputs = SnellaTrainer.outputs, training.compute_probe_outputs

    def record_trained(self, dataset, views=1):
        by_trained.append(set(dataset.names))
        return outputs(self, dataset, views)

    def record_final(parts, probe, images, *others):
        by_final.append(set(images.names))
        return compute_probe_outputs(parts, probe, images, *others)

    monkeypatch.setattr(SnellaTrainer, "outputs", record_trained)
    monkeypatch.setattr(training, "compute_probe_outputs", record_final)
    config = settings(final_head="layers")
    train(config, console)
    test_names = set(build_components(config.resolved()).splits.test.names)
    assert by_final == [test_names] and by_trained and not any(names & test_names for names in by_trained)


def test_runs_are_bit_identical_for_equal_settings_and_differ_by_seed(settings, console, no_report, tmp_path):
    first = train(settings(epochs=1), console)
    second = train(settings(epochs=1, out=str(tmp_path / "two")), console)
    third = train(settings(epochs=1, out=str(tmp_path / "three"), seed=1), console)
    a, b, c = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second, third))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_workers_do_not_change_the_result(settings, console, no_report, tmp_path):
    first = train(settings(epochs=1), console)
    second = train(settings(epochs=1, out=str(tmp_path / "two"), workers=1), console)
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("final_head", ["trained", "layers"])
def test_bf16_training_is_evaluated_in_float32(final_head, settings, console, no_report):
    run = train(settings(epochs=1, precision="bf16", final_head=final_head), console)
    metrics = run.read_json("metrics.json")
    assert 0 < metrics["history"][1]["train_loss"] < 3
    again = evaluate(run.path, split="test", batch_size=8, console=console)
    assert again["loss"] == pytest.approx(metrics["test"]["loss"], rel=1e-6)


@pytest.mark.parametrize("is_supported", [True, False])
def test_precision_follows_the_hardware(is_supported, settings, console, no_report, monkeypatch):
    monkeypatch.setattr("snella_app.device.has_bfloat16_instructions", lambda: is_supported)
    seen = []
    method = SnellaTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return method(self, model, *args, **kwargs)

    monkeypatch.setattr(SnellaTrainer, "compute_loss", compute_loss)
    run = train(settings(epochs=1, precision="auto"), console)
    assert run.read_config().optim.precision == ("bf16" if is_supported else "fp32")
    assert ("on cpu in bf16" in console.file.getvalue()) is is_supported
    assert set(seen) == {is_supported}


def test_a_batch_size_above_the_number_of_images_is_rejected_with_both_numbers(settings, console):
    with pytest.raises(
        ValueError, match=r"batch_size must be at most the number of training images, \d\d in folder:.*, got 100"
    ):
        train(settings(batch_size=100), console)
    assert not RunFolder(settings().run.out).path.exists()


@pytest.mark.parametrize(
    ("changes", "size", "images"),
    [
        ({"train_size": 9}, 9, "the number of training images"),
        ({"epoch_images": 5}, 5, "the number of images per epoch"),
    ],
)
def test_the_default_batch_size_is_reduced_to_the_images_of_an_epoch(
    changes, size, images, settings, console, no_report
):
    run = train(settings(batch_size=None, epochs=1, **changes), console)
    assert run.read_config().optim.batch_size == size
    text = console.file.getvalue()
    assert text.count("batch size reduced") == 1 and f"batch size reduced from 32 to {size}, {images}\n" in text
    assert f"1 epoch of 1 step, {size} images each" in text


@pytest.mark.parametrize(("best", "is_reported"), [(0, True), (1, True), (3, False)])
def test_a_best_epoch_before_the_target_budget_is_noted(best, is_reported, settings, console, no_report, monkeypatch):
    selection_scores = SnellaTrainer._selection_scores

    def scores(self):
        epoch = round(self.state.epoch)
        return {**selection_scores(self), "val_accuracy": 0.5, "val_loss": abs(epoch - best) + 1.0}

    monkeypatch.setattr(SnellaTrainer, "_selection_scores", scores)
    run = train(settings(head_init="probe"), console)
    target = run.read_json("allocation.json")["target_budget"]
    sentence = f"epoch {best} was selected before the budget reached its target, {target:,} weights"
    assert run.read_json("metrics.json")["best_epoch"] == best
    assert (sentence in console.file.getvalue()) == is_reported
    budget = sum(matrix["budget"] for matrix in run.read_json("allocation.json")["matrices"])
    assert (budget > target) == is_reported


@pytest.mark.parametrize(
    ("confusion", "only"), [([[0, 3], [0, 9]], "b"), ([[1, 2], [0, 9]], None), ([[0, 3], [0, 0]], None), (None, None)]
)
def test_a_single_predicted_class_is_detected(confusion, only):
    assert _only_class({"confusion": confusion}, ["a", "b"]) == only


def test_a_run_that_predicts_a_single_class_prints_a_note(settings, console, no_report, monkeypatch):
    monkeypatch.setattr(
        "snella_app.training.finish._only_class", lambda scores, classes: classes[len(scores["confusion"]) - 1]
    )
    train(settings(method="linear", epochs=1), console)
    assert "note: every validation image is predicted as 'owls'; the model did not learn" in console.file.getvalue()


def test_large_images_are_read_at_one_resolution_in_training_evaluation_and_prediction(
    settings, console, no_report, tmp_path
):
    rng = np.random.default_rng(0)
    for name in ("bright", "dark"):
        (tmp_path / "large" / name).mkdir(parents=True)
        for index in range(5):
            pixels = rng.integers(0, 130, (40, 60, 3)) + 120 * (name == "bright")
            picture = Image.fromarray(pixels.astype(np.uint8)).resize((900, 600))
            picture.save(tmp_path / "large" / name / f"{index}.jpg")
    config = settings(data=f"folder:{tmp_path / 'large'}", method="linear", epochs=1, batch_size=4)
    model = load(train(config, console).path)
    trained = build_components(config.resolved()).splits.val
    measured = images_for_run(model.loaded, split="val")[2][0]
    for index, name in enumerate(trained.names):
        prepared_image = model.preprocess([tmp_path / "large" / name])[0]
        assert torch.equal(trained[index][0], prepared_image) and torch.equal(measured[index][0], prepared_image)
    assert trained.image(0).size == measured.image(0).size == (225, 150)  # by 4: at least 4 times 32 pixels


def test_run_json_records_a_failure(settings, console, monkeypatch):
    def fail(self, dataset):
        raise RuntimeError("the sensor melted")

    monkeypatch.setattr(SnellaTrainer, "outputs", fail)
    with pytest.raises(RuntimeError, match="the sensor melted"):
        train(settings(epochs=1), console)
    run = json.loads((RunFolder(settings().run.out).path / "run.json").read_text())
    assert (run["status"], run["error"]) == ("failed", "the sensor melted")


def test_the_live_report_refreshes_without_affecting_the_run(settings, finished, monkeypatch):
    pages, write_report = [], training.write_report

    def record(run, images=None, **so_far):
        path = write_report(run, images, **so_far)
        pages.append(path.read_text())
        assert "metrics" not in so_far or not (run / "metrics.json").is_file()
        return path

    monkeypatch.setattr(training, "write_report", record)
    monkeypatch.setattr(training, "_REPORT_INTERVAL_S", 0.0)
    run = train(settings(method_options={}), Console(file=io.StringIO()))

    *live, last = pages
    assert live and all('http-equiv="refresh"' in page and 'id="curves"' in page for page in live)
    assert 'http-equiv="refresh"' not in last and ">finished<" in last
    adapters = [load_file(r.adapter / "adapter_model.safetensors") for r in (run, finished)]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_epochs_are_validated_without_test_time_augmentation(settings, console, no_report):
    one, two = (
        train(settings(epochs=1, tta=tta, out=f"{settings().run.out}{tta}"), console).read_json("metrics.json")
        for tta in (1, 2)
    )
    scores = [[row["val_loss"] for row in metrics["history"]] for metrics in (one, two)]
    assert scores[0] == scores[1] and one["val"]["loss"] != pytest.approx(two["val"]["loss"], rel=1e-4)
