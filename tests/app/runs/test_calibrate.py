"""Temperature, reliability and the threshold for unsure predictions."""

import shutil

import numpy as np
import pytest
import torch

from snella_app.cli.main import main
from snella_app.files import sealed, write_json
from snella_app.records.predictions import Predictions, StoredPrediction
from snella_app.records.record import read
from snella_app.records.run import ReliabilityBin, RunInfo
from snella_app.runs.calibrate import (
    calibrate,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
    unsure_threshold,
)
from snella_app.runs.evaluate import calibrate_run
from snella_app.runs.folder import RunFolder


def sample(temperature, images=20_000, classes=4):
    """Return logits, and labels drawn from their softmax with a temperature."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 3, (images, classes)))
    gumbel = torch.from_numpy(random.gumbel(size=(images, classes)))
    return logits, (logits / temperature + gumbel).argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_true_temperature_is_recovered(temperature):
    assert fit_temperature(*sample(temperature)) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_has_a_lower_loss():
    logits, labels = sample(2.0, images=200)
    best = fit_temperature(logits, labels)
    loss = lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels, label_smoothing=1 / 202))  # noqa: E731
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.95, 1.05, 2.0))


def test_perfect_predictions_keep_a_finite_confidence():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0]] * 10), torch.tensor([0, 1] * 10)
    temperature = fit_temperature(logits, labels)
    right = float((logits[0] / temperature).softmax(0)[0])
    assert right == pytest.approx(1 - 0.5 / 22, abs=1e-4)  # equals the smoothed target


def test_calibration_lowers_the_error_on_every_split():
    logits, labels = sample(3.0, images=4000)
    measured = {"val": (logits[:2000].softmax(1), labels[:2000]), "test": (logits[2000:].softmax(1), labels[2000:])}
    calibration = calibrate(measured)
    assert [r.split for r in calibration.reliability] == ["val", "test"]
    for reliability in calibration.reliability:
        assert reliability.ece < 0.05 < 0.2 < reliability.ece_before
        assert reliability.loss < reliability.loss_before
        assert sum(b.count for b in reliability.bins) == sum(b.count for b in reliability.bins_before) == 2000
    assert (
        calibration.coverage < 1
        and 1 - calibration.accuracy <= (1 - float((logits[:2000].argmax(1) == labels[:2000]).double().mean())) / 2
    )
    assert calibrate({"test": measured["test"]}) is None


def test_the_calibration_error_is_the_mean_distance_weighted_by_images():
    bins = [ReliabilityBin(0.575, 0.5, 2), ReliabilityBin(0.95, 1.0, 2)]
    assert expected_calibration_error(bins) == pytest.approx(0.5 * 0.075 + 0.5 * 0.05)


@pytest.mark.parametrize(("images", "bins"), [(5, 1), (48, 4), (100, 8), (1000, 15)])
def test_bins_have_equal_sizes_and_few_images_have_few_bins(images, bins):
    confidence = torch.linspace(0.99, 0.3, images)
    result = reliability_bins(confidence, confidence > 0.6)
    counts = [b.count for b in result]
    assert len(result) == bins and sum(counts) == images and max(counts) - min(counts) <= 1
    assert [b.confidence for b in result] == sorted(b.confidence for b in result)
    assert sum(b.accuracy * b.count for b in result) == pytest.approx(int((confidence > 0.6).sum()), abs=1e-2)


def test_images_of_equal_probability_share_a_bin():
    confidence = torch.cat([torch.full((30,), 1.0), torch.linspace(0.5, 0.9, 12)])
    right = torch.arange(42) % 2 == 0
    bins = reliability_bins(confidence, right)
    assert bins[-1] == ReliabilityBin(1.0, 0.5, 30) and sum(b.count for b in bins) == 42
    assert min(b.count for b in bins) >= 12
    shuffled = torch.randperm(42, generator=torch.Generator().manual_seed(0))
    assert reliability_bins(confidence[shuffled], right[shuffled]) == bins


@pytest.mark.parametrize(
    ("groups", "counts"), [([1, 23], [24]), ([12, 2, 34], [12, 36]), ([30, 6], [36]), ([12, 12], [12, 12])]
)
def test_bins_of_equal_probabilities_hold_at_least_twelve_images(groups, counts):
    confidence = torch.cat([torch.full((size,), 0.5 + 0.1 * place) for place, size in enumerate(groups)])
    assert [b.count for b in reliability_bins(confidence, confidence > 0.5)] == counts


def test_bins_of_any_ties_hold_at_least_twelve_images():
    random = np.random.default_rng(0)
    for images in range(12, 200):
        confidence = torch.from_numpy(random.integers(0, random.integers(1, 30), images) / 30)
        counts = [b.count for b in reliability_bins(confidence, confidence > 0.5)]
        assert min(counts) >= 12 and sum(counts) == images and len(counts) <= 15


def test_zero_images_have_zero_bins():
    assert reliability_bins(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == []


def test_a_temperature_that_worsens_the_test_split_is_reported():
    confident = torch.tensor([[4.0, 0.0], [0.0, 4.0]] * 40).softmax(1)
    labels = torch.tensor([0, 1] * 40)
    wrong = labels.clone()
    wrong[:12] = 1 - wrong[:12]
    calibration = calibrate({"val": (confident, wrong), "test": (confident, labels)})
    assert calibration.temperature > 1 and calibration.reliability[1].ece >= calibration.reliability[1].ece_before
    assert calibration.summary.startswith(
        "Temperature scaling did not reduce the calibration error on the 80 test images: expected calibration error "
        "1.8% without it, "
    )
    good = calibrate({"val": (confident, wrong), "test": (confident, wrong)})
    assert good.summary.startswith(
        "Temperature scaling reduced the calibration error on the 80 test images: expected calibration error 13.2%"
    )


def test_the_threshold_is_the_lowest_threshold_that_halves_the_errors():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    right = torch.tensor([True, True, True, False, True, False, False, False])
    threshold, coverage, accuracy = unsure_threshold(confidence, right)
    assert (threshold, coverage, accuracy) == (pytest.approx(0.5), 5 / 8, pytest.approx(4 / 5))
    assert unsure_threshold(confidence, torch.ones(8, dtype=torch.bool)) == (None, 1.0, 1.0)
    assert unsure_threshold(confidence, ~right)[0] is None
    assert unsure_threshold(torch.full((4,), 0.5), torch.tensor([True, False, True, True]))[0] is None


def test_a_run_is_calibrated_on_its_validation_images_and_measured_on_test(finished):
    calibration, metrics = read(RunInfo, finished.path).calibration, finished.read_json("metrics.json")
    val, test = calibration.reliability
    assert (val.split, test.split) == ("val", "test")
    assert val.loss_before == pytest.approx(metrics["val"]["loss"], abs=1e-5)
    assert test.loss_before == pytest.approx(metrics["test"]["loss"], abs=1e-5)
    assert test.count == sum(map(sum, metrics["test"]["confusion"]))


def test_calibrating_a_run_reproduces_the_temperature_of_training(finished, tmp_path, capsys):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    stored = read(RunInfo, run.path).calibration
    values = run.read_json("run.json")
    del values["calibration"]
    write_json(run.path / "run.json", sealed(values))
    assert read(RunInfo, run.path).temperature == 1.0
    assert main(["evaluate", str(run.path), "--calibrate"]) == 0
    info = read(RunInfo, run.path)
    assert info.is_finished and info.temperature == pytest.approx(stored.temperature, rel=1e-3)
    assert [r.split for r in info.calibration.reliability] == ["val", "test"]
    assert info.calibration.reliability[1].ece == pytest.approx(stored.reliability[1].ece, abs=1e-3)
    printed = capsys.readouterr().out
    assert f"stored temperature {info.temperature:.4g}" in printed and info.calibration.summary in printed
    page = run.report.read_text()
    assert 'id="calibration"' in page and info.calibration.summary in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sizes": {"train": 9, "val": 0, "test": 3}}}, "has no validation images to fit a temperature on"),
        ({"status": "running"}, "must be a finished classification run to be calibrated, got status 'running'"),
    ],
)
def test_unsupported_runs_are_rejected(changes, message, finished, tmp_path):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    values = run.read_json("run.json")
    data = values["data"] | changes.pop("data", {})
    write_json(run.path / "run.json", sealed({**values, "data": data, **changes}))
    with pytest.raises(ValueError, match=message):
        calibrate_run(run.path)


def test_temperature_can_be_applied_to_stored_probabilities():
    items = [StoredPrediction(0, "a", 0, [0.9, 0.1])]
    (changed,) = Predictions(items=items).with_temperature(2.0).items
    assert changed.probabilities == pytest.approx([0.75, 0.25])
    assert Predictions(items=items).with_temperature(1.0).items == items


def test_a_batch_size_below_one_is_rejected(finished):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        calibrate_run(finished.path, batch_size=0)
