"""Report sections for multi-label, regression, and segmentation targets.

The `*_section` functions return None for runs of other tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from snella_app.console import counted
from snella_app.records.predictions import LabelSetPredictions, MaskPredictions, NumberPredictions
from snella_app.records.record import read_if_present
from snella_app.records.results import LabelSetScores, MaskScores, RegressionScores
from snella_app.records.run import Metrics, RunInfo
from snella_app.report.examples import EmbeddedImage, ImageLoader, embed_image, mask_colors
from snella_app.report.style import (
    ACCENT,
    COLORS,
    DASHED,
    FIGURE_SIZE,
    GRID,
    INK,
    MUTED,
    add_legend,
    inline_svg,
    new_figure,
    percent_axis,
    shortened,
)
from snella_app.text import measure_text, percent_text

_SHOWN = 12
"""Maximum number of cards per group."""
_MAX_SIDE = 800  # maximum width and height of an image with masks, in pixels
_MAX_POINTS = 2_000  # maximum number of points in a scatter plot
_MAX_RANGES = 5  # maximum number of box plots in a figure
_MIN_IN_RANGE = 5  # minimum number of images per box plot, on average
_TINY = 1e-6  # probabilities are kept this far from 0 and 1, where the cross-entropy can be infinite


@dataclass(frozen=True)
class Card:
    """Image with its true and predicted values. `is_correct` is None for regression."""

    name: str
    is_correct: bool | None
    predicted: str
    truth: str
    picture: EmbeddedImage


def precision_recall_curves(predictions: LabelSetPredictions, classes: Sequence[str], scores: LabelSetScores) -> Figure:
    """Plot precision against recall for each label.

    The most frequent labels are colored, with a dot at the threshold of each. `scores` must come from the same split as
    `predictions`.
    """
    figure, axes = new_figure(FIGURE_SIZE[0], FIGURE_SIZE[1] + 80, "Precision and recall")
    probabilities, truth = _label_arrays(predictions, len(classes))
    support = truth.sum(0)
    present = [int(c) for c in np.argsort(-support, kind="stable") if support[c]]
    handles, labels = [], []
    # the most frequent label is drawn last, on top of the others
    for rank, c in reversed(list(enumerate(present))):
        precision, recall, _ = precision_recall_curve(truth[:, c], probabilities[:, c])
        is_colored = rank < len(COLORS)
        color, width = (COLORS[rank], 1.8) if is_colored else (GRID, 1.0)
        line = axes.step(recall, precision, where="post", color=color, linewidth=width, zorder=3 if is_colored else 1)
        if is_colored:
            label_scores = scores.per_class[c]
            axes.plot(label_scores.recall, label_scores.precision, "o", color=color, markersize=6, zorder=4)
            handles.append(line[0])
            labels.append(f"{shortened(classes[c])} {percent_text(label_scores.average_precision)}")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05), xlabel="recall", ylabel="precision")
    percent_axis(axes, "both")
    add_legend(figure, handles[::-1], labels[::-1], 2)
    return figure


def true_and_predicted(predictions: NumberPredictions, target: int, name: str) -> Figure:
    """Plot predicted against true values of a target for at most 2,000 images, with the identity line."""
    truth, predicted = _number_arrays(predictions)
    num_points = min(len(truth), _MAX_POINTS)
    positions = np.linspace(0, len(truth) - 1, num_points)
    chosen = np.unique(positions.round().astype(int))
    x, y = truth[chosen, target], predicted[chosen, target]
    figure, axes = new_figure(*FIGURE_SIZE, f"{shortened(name, 30)}: predicted and true")
    low = float(min(x.min(), y.min()))
    high = float(max(x.max(), y.max()))
    margin = 0.04 * (high - low) or 1.0  # 1 if all values are equal
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color=MUTED, linewidth=1.2, linestyle=DASHED, zorder=1)
    opacity = float(np.clip(12 / math.sqrt(len(x)), 0.25, 0.8))
    axes.plot(x, y, "o", color=ACCENT, markersize=4.5, alpha=opacity, markeredgewidth=0)
    axes.set(xlim=ends, ylim=ends, xlabel="true", ylabel="predicted")
    return figure


def errors_by_range(predictions: NumberPredictions, target: int, name: str) -> Figure:
    """Draw box plots of a target's errors, grouped by range of the true value (whiskers: 5th to 95th percentile)."""
    truth, predicted = (values[:, target] for values in _number_arrays(predictions))
    errors = predicted - truth
    num_ranges = max(1, min(_MAX_RANGES, len(truth) // _MIN_IN_RANGE))
    edges = np.unique(np.quantile(truth, np.linspace(0, 1, num_ranges + 1)))
    bins = np.clip(np.digitize(truth, edges[1:-1]), 0, max(len(edges) - 2, 0))
    present = sorted(set(bins.tolist()))
    groups = [errors[bins == b] for b in present]
    figure, axes = new_figure(*FIGURE_SIZE, f"{shortened(name, 30)}: error by true value")
    axes.axhline(0, color=MUTED, linewidth=1.2, linestyle=DASHED, zorder=1)
    drawn = axes.boxplot(groups, whis=(5, 95), showfliers=False, widths=0.55, patch_artist=True)
    for box in drawn["boxes"]:
        box.set(facecolor=ACCENT, alpha=0.35, edgecolor=ACCENT)
    for element in ("whiskers", "caps"):
        for line in drawn[element]:
            line.set(color=ACCENT, linewidth=1.2)
    for line in drawn["medians"]:
        line.set(color=INK, linewidth=1.8)
    names: list[str] = []
    for b in present:
        in_range = truth[bins == b]
        names.append(f"{in_range.min():.3g}\nto {in_range.max():.3g}")
    axes.set_xticks(range(1, len(present) + 1), names)
    axes.grid(False, axis="x")
    axes.set(xlabel="true value", ylabel="predicted − true")
    return figure


def label_set_verdict(scores: LabelSetScores, split: str) -> str:
    """Describe how the result compares with a random ranking."""
    present = [row for row in scores.per_class if row.support]
    if not present:
        return f"No label occurs in the {scores.images:,} {split} images, so the average precision is undefined."
    shares = [row.support / scores.images for row in present]
    chance = sum(shares) / len(shares)
    text = (
        f"The mean average precision over {len(shares)} labels is {percent_text(scores.map)} on {scores.images:,} "
        f"{split} images; a random ranking scores {percent_text(chance)}, the mean frequency of the labels."
    )
    if len(present) < 2:
        return text
    worst = min(present, key=lambda row: row.average_precision)
    return f"{text} The lowest average precision is {percent_text(worst.average_precision)}, for {worst.name!r}."


def regression_verdict(scores: RegressionScores, split: str) -> str:
    """Describe how the result compares with always predicting the training median.

    Return an empty string if there are no targets.
    """
    sentences = []
    for row in scores.per_target:
        reduction = 1 - row.mae / row.baseline_mae if row.baseline_mae else math.nan
        compared = f"{percent_text(reduction)} lower than" if reduction > 0 else "no lower than"
        sentences.append(
            f"the mean absolute error of {row.name} is {measure_text(row.mae)}, {compared} "
            f"that of always predicting the median of the training targets ({measure_text(row.baseline_mae)})"
        )
    return f"On {scores.images:,} {split} images, {'; '.join(sentences)}." if sentences else ""


def label_cards(
    predictions: LabelSetPredictions, classes: Sequence[str], images: ImageLoader | None
) -> list[dict[str, Any]]:
    """Return cards for the images with the highest binary cross-entropy, and for a sample of the rest."""
    probabilities, truth = _label_arrays(predictions, len(classes))
    clipped = probabilities.clip(_TINY, 1 - _TINY)
    losses = -(truth * np.log(clipped) + (1 - truth) * np.log(1 - clipped)).mean(1)
    predicted = probabilities >= np.asarray(predictions.thresholds)
    is_wrong = (predicted != truth.astype(bool)).any(1).tolist()

    def card(row: int) -> Card:
        item = predictions.items[row]
        percentages = [percent_text(probability) for probability in item.probabilities]
        predicted_labels = [f"{classes[c]} {percentages[c]}" for c in np.flatnonzero(predicted[row]).tolist()]
        true_labels: list[str] = []
        for c in item.labels:
            is_missed = not predicted[row, c]
            true_labels.append(f"{classes[c]} ({percentages[c]})" if is_missed else classes[c])
        predicted_text = ", ".join(predicted_labels) or "no label"
        true_text = ", ".join(true_labels) or "no label"
        return Card(item.name, not is_wrong[row], predicted_text, true_text, embed_image(item.index, images))

    num_wrong = sum(is_wrong)
    count = len(losses)
    note = f"of {count} images, worst first; {num_wrong} of the {count} have a wrong or missing predicted label"
    return _groups(losses, card, note)


def number_cards(
    predictions: NumberPredictions, names: Sequence[str], images: ImageLoader | None
) -> list[dict[str, Any]]:
    """Return cards for the images with the largest errors, and for an evenly spaced sample of the rest.

    The error of an image is the mean absolute error over the targets, in standard deviations of each target.
    """
    truth, predicted = _number_arrays(predictions)
    is_varying = np.ptp(truth, 0) > 0  # the standard deviation of equal values need not be exactly 0
    scales = np.where(is_varying, truth.std(0), 1.0)
    errors = (np.abs(predicted - truth) / scales).mean(1)
    is_single = len(names) == 1

    def text(values: Sequence[float]) -> str:
        texts: list[str] = []
        for name, value in zip(names, values, strict=True):
            number = measure_text(value)
            texts.append(number if is_single else f"{name} {number}")
        return ", ".join(texts)

    def card(row: int) -> Card:
        item = predictions.items[row]
        return Card(item.name, None, text(item.predicted), text(item.values), embed_image(item.index, images))

    return _groups(errors, card, f"of {len(errors)} images, largest errors first")


def labels_section(folder: Path, info: RunInfo, metrics: Metrics, images: ImageLoader | None) -> dict[str, Any] | None:
    """Return the table of labels, the precision-recall curves, and the images.

    The table shows the test split if present. The curves and images show the split in `predictions.json`.
    """
    split, scores = metrics.measured
    if not isinstance(scores, LabelSetScores):
        return None
    predictions = read_if_present(LabelSetPredictions, folder)
    rows = sorted(scores.per_class, key=lambda row: (math.isnan(row.average_precision), row.average_precision))
    section: dict[str, Any] = {"split": split, "count": scores.images, "rows": rows}
    if predictions is None or not predictions.items:
        return {**section, "figures": [], "figure_split": "", "groups": []}
    figures = []
    split_name = predictions.split_name
    split_scores = metrics.test if predictions.split == "test" else metrics.val
    if isinstance(split_scores, LabelSetScores):
        figure = precision_recall_curves(predictions, info.classes, split_scores)
        num_present = len({c for item in predictions.items for c in item.labels})  # the others have no curve
        description = f"Precision against recall for {counted(num_present, 'label')} on the {split_name} images"
        figures.append(inline_svg(figure, "precision-recall", f"{description}."))
    groups = label_cards(predictions, info.classes, images)
    return {**section, "figures": figures, "figure_split": split_name, "groups": groups}


def numbers_section(folder: Path, info: RunInfo, metrics: Metrics, images: ImageLoader | None) -> dict[str, Any] | None:
    """Return the table of targets, the scatter plots, the errors by range, and the images.

    The table shows the test split if present. The plots and images show the split in `predictions.json`.
    """
    split, scores = metrics.measured
    if not isinstance(scores, RegressionScores):
        return None
    predictions = read_if_present(NumberPredictions, folder)
    section: dict[str, Any] = {"split": split, "count": scores.images, "rows": scores.per_target}
    if predictions is None or not predictions.items:
        return {**section, "figures": [], "figure_split": "", "groups": []}
    figures = []
    split_name = predictions.split_name
    for target, name in enumerate(info.classes):
        scatter = true_and_predicted(predictions, target, name)
        boxes = errors_by_range(predictions, target, name)
        points = min(len(predictions.items), _MAX_POINTS)
        description = f"Predicted against true {name} for {points} {split_name} images."
        figures.append(inline_svg(scatter, f"scatter-{target}", description))
        description = f"Error of {name} by range of its true value on the {split_name} images."
        figures.append(inline_svg(boxes, f"residuals-{target}", description))
    groups = number_cards(predictions, info.classes, images)
    return {**section, "figures": figures, "figure_split": split_name, "groups": groups}


def classes_section(metrics: Metrics) -> dict[str, Any] | None:
    """Return Dice and IoU by class, on the test split if present."""
    split, scores = metrics.measured
    if not isinstance(scores, MaskScores):
        return None
    return {"split": split, "count": scores.images, "rows": scores.per_class}


def masks_section(folder: Path, info: RunInfo, images: ImageLoader | None) -> dict[str, Any] | None:
    """Return sample images with true and predicted masks, worst first, or None if no masks are stored."""
    if info.task != "segmentation":
        return None
    predictions = read_if_present(MaskPredictions, folder)
    if predictions is None or not any(item.mask for item in predictions.items):
        return None
    shown = [item for item in predictions.items if item.mask]
    shown.sort(key=lambda item: (math.isnan(item.dice), item.dice))
    colors = (mask_colors(len(info.classes)) / 255)[1:]
    legend = [{"name": name, "color": to_hex(color)} for name, color in zip(info.classes[1:], colors, strict=True)]
    items: list[dict[str, Any]] = []
    for item in shown:
        picture = embed_image(item.index, images, _MAX_SIDE)
        items.append({"name": item.name, "dice": item.dice, "iou": item.iou, "picture": picture})
    return {
        "split": predictions.split_name,
        "note": f"{len(shown)} of {len(predictions.items)} images: the worst, then a sample of the rest.",
        "legend": legend,
        "items": items,
    }


def _groups(errors: np.ndarray, card: Any, note: str) -> list[dict[str, Any]]:
    """Return cards for the worst images, and for an evenly spaced sample of the rest.

    Args:
        errors: Error of each image, `[images]`.
        card: Function that returns the card of an image by its position in `errors`.
        note: Continuation of the note on the worst images, after their number.
    """
    order = np.argsort(-errors, kind="stable").tolist()
    worst, rest = order[:_SHOWN], order[_SHOWN:]
    others = rest
    others_note = f"the {counted(len(rest), 'remaining image')}, worst first"
    if len(rest) > _SHOWN:
        others = [rest[i * len(rest) // _SHOWN] for i in range(_SHOWN)]
        others_note = f"{len(others)} of the remaining images, evenly spaced from worst to best"
    return [
        {"title": "Worst", "note": f"{len(worst)} {note}", "cards": [card(row) for row in worst]},
        {"title": "Others", "note": others_note, "cards": [card(row) for row in others]},
    ]


def _label_arrays(predictions: LabelSetPredictions, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities and the binary labels, `[images, classes]` each."""
    probabilities = np.asarray([item.probabilities for item in predictions.items])
    truth = np.zeros((len(predictions.items), num_classes))
    for row, item in enumerate(predictions.items):
        truth[row, item.labels] = 1
    return probabilities, truth


def _number_arrays(predictions: NumberPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Return the true and the predicted values, `[images, targets]` each."""
    truth = [item.values for item in predictions.items]
    predicted = [item.predicted for item in predictions.items]
    return np.asarray(truth), np.asarray(predicted)
