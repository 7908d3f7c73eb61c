"""Report sections for multilabel, ordinal and regression runs."""

import dataclasses

import numpy as np
import pytest
import torch

from snella_app.records.record import read, write
from snella_app.records.results import LabelScores, LabelSetScores, scores_from
from snella_app.records.run import BackboneInfo, DataInfo, EpochRow, Metrics, RunInfo
from snella_app.report.report import write_report
from snella_app.report.targets import label_cards, label_set_verdict, number_cards
from snella_app.tasks import create_task
from snella_app.text import percent_text
from tests.browser import CLIPPED_OR_OVERLAPPING_TEXT, MIN_FONT_SIZE

NAMES = {
    "multilabel": ["sand", "sea and a rather long name of a label", "person"],
    "ordinal": ["0 new", "1 used", "2 worn", "3 broken"],
    "regression": ["age", "height in centimeters"],
}


class Images:
    """Dataset stub with the attributes that predictions read."""

    def __init__(self, labels, targets):
        self.labels, self.names = labels, [f"image{row:03}.png" for row in range(len(targets))]
        self.annotations = type("Annotations", (), {"targets": targets, "groups": None})

    def __len__(self):
        return len(self.names)


def write_run(folder, name):
    """Write a finished run of a task with random outputs around the targets."""
    rng, classes = np.random.default_rng(0), NAMES[name]
    task = create_task(name, classes, mean=(40.0, 170.0), std=(20.0, 10.0), median=(38.0, 170.0))
    count = 60
    if name == "multilabel":
        truth = rng.random((count, 3)) < (0.5, 0.3, 0.1)
        targets = [tuple(np.array(classes)[row]) for row in truth]
        outputs = np.where(truth, 1.0, -1.0) + rng.normal(size=truth.shape)
        labels: np.ndarray = truth.astype(float)
    elif name == "ordinal":
        labels = rng.integers(0, 4, count)
        targets = [classes[label] for label in labels]
        outputs = np.where(labels[:, None] > np.arange(3), 1.5, -1.5) + rng.normal(size=(count, 3))
    else:
        labels = rng.normal((40, 170), (20, 10), (count, 2))
        targets = [tuple(row) for row in labels.tolist()]
        outputs = (labels - (40, 170)) / (20, 10) + rng.normal(scale=0.4, size=(count, 2))
    task = task.calibrated(outputs, labels)
    scores = task.metrics(outputs, labels)
    folder.mkdir()
    write(
        RunInfo(
            task=name,
            method="lora-8",
            status="finished",
            backbone=BackboneInfo("test_vit", num_classes=3),
            classes=classes,
            task_state=task.state() or None,
            data=DataInfo("csv:photos.csv", description="photos", sizes={"train": 60, "val": 60, "test": 60}),
        ),
        folder,
    )
    history = [
        EpochRow(epoch=e, train_loss=1 / e, val_loss=scores["loss"], **task.epoch_row(scores)) for e in (1, 2, 3)
    ]
    write(
        Metrics(
            best_epoch=2,
            best_metric=f"val_{task.monitor}",
            trainable_parameters=10_000,
            history=history,
            val=scores_from(scores),
            test=scores_from(scores),
        ),
        folder,
    )
    numbers = labels.tolist() if name == "ordinal" else [0] * count
    shown = task.sample_outputs(torch.from_numpy(outputs))
    write(task.predictions(Images(numbers, targets), shown, "val", folder), folder)
    return folder, scores


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    runs_by_name = {name: write_run(root / name, name) for name in NAMES}
    for folder, _ in runs_by_name.values():
        write_report(folder)
    return runs_by_name


@pytest.mark.parametrize("name", NAMES)
def test_results_round_trip_through_files(runs, name):
    folder, scores = runs[name]
    stored = read(Metrics, folder).test
    assert stored == scores_from(scores)
    for metric in ("map", "macro_f1", "mae", "rmse", "kappa", "accuracy"):
        if metric in scores:
            assert getattr(stored, metric) == pytest.approx(scores[metric])


def test_the_multilabel_page_has_all_scores(runs):
    folder, scores = runs["multilabel"]
    page = (folder / "report.html").read_text()
    for row in scores["per_class"]:
        assert percent_text(row["threshold"]) in page and percent_text(row["average_precision"]) in page
    assert 'aria-label="Precision against recall for 3 labels on the validation images' in page
    assert 'id="confusion"' not in page
    table = page.partition('aria-label="Table of labels"')[2].partition("</section>")[0]
    assert "scroll sideways" in table  # the last columns are off a phone's screen


def test_a_split_without_any_label_has_no_average_precision():
    scores = LabelSetScores(float("nan"), 0.0, images=20, per_class=[LabelScores("sand"), LabelScores("sea")])
    expected = "No label occurs in the 20 test images, so the average precision is undefined."
    assert label_set_verdict(scores, "test") == expected


def test_the_regression_page_compares_with_the_baseline(runs):
    folder, scores = runs["regression"]
    page = (folder / "report.html").read_text()
    for row in scores["per_target"]:
        for key in ("mae", "rmse", "baseline_mae", "baseline_rmse"):
            assert f">{row[key]:.4g}<" in page
    assert page.count("<svg") == 6  # two curves, and a scatter plot and box plot per target
    headline = page.partition('<div class="hero">')[2].partition("</div>")[0]
    assert "test R²" in headline and f">{scores['r2']:.3f}<" in headline  # errors in years and centimeters have no mean
    assert f"{scores['mae']:.4g}" not in page and f"{scores['rmse']:.4g}" not in page
    assert "R², mean over targets, by epoch" in page and "MAE by epoch" not in page
    better = 1 - scores["per_target"][0]["mae"] / scores["per_target"][0]["baseline_mae"]
    assert f"{100 * better:.1f}" in page


def test_the_worst_images_come_first(runs):
    from snella_app.records.predictions import LabelSetPredictions, NumberPredictions

    predictions = read(NumberPredictions, runs["regression"][0])
    groups = number_cards(predictions, NAMES["regression"], None)
    values = np.array([item.values for item in predictions.items])
    errors = (np.abs(np.array([item.predicted for item in predictions.items]) - values) / values.std(0)).mean(1)
    assert groups[0]["cards"][0].name == predictions.items[int(errors.argmax())].name
    assert len(groups[0]["cards"]) == 12 and len(groups[1]["cards"]) == 12
    constant = dataclasses.replace(
        predictions, items=[dataclasses.replace(item, values=[0.1] * len(item.values)) for item in predictions.items]
    )
    errors = np.abs(np.array([item.predicted for item in constant.items]) - 0.1).mean(1)
    groups = number_cards(constant, NAMES["regression"], None)
    assert groups[0]["cards"][0].name == constant.items[int(errors.argmax())].name
    labels = read(LabelSetPredictions, runs["multilabel"][0])
    cards = label_cards(labels, NAMES["multilabel"], None)
    assert not cards[0]["cards"][0].is_correct


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1200, 390])
def test_text_of_these_pages_is_readable(browser, runs, name, width):
    browser.open(runs[name][0] / "report.html", width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CLIPPED_OR_OVERLAPPING_TEXT) == []
    assert browser.evaluate(MIN_FONT_SIZE) >= 8.5
    assert browser.issues() == []
