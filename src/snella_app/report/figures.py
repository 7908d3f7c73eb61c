"""Figures and report sections: learning curves, confusion matrix, method comparison, calibration, and ranking.

The drawing functions create a `matplotlib.figure.Figure` without using Matplotlib's global state. The `*_section`
functions return the template variables of a section, which are None or empty if the run has no data for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snella_app.records.generators import MethodResult
from snella_app.records.predictions import Predictions
from snella_app.records.results import RegressionScores, Scores
from snella_app.records.run import Calibration, Metrics, Reliability, RunInfo
from snella_app.report.style import (
    ACCENT,
    COLORS,
    DASHED,
    FIGURE_SIZE,
    GRID,
    INK,
    MUTED,
    PANEL,
    WARM,
    accent_map,
    add_legend,
    inline_svg,
    integer_axis,
    new_figure,
    percent_axis,
    plot_line,
    scale_bar,
    shortened,
    text_on,
)
from snella_app.text import measure_text, percent_text, split_text

MAX_NUMBERED_CLASSES = 50
"""Maximum number of classes for which a confusion matrix shows counts."""
_MAX_CURVES = 6  # maximum number of classes in the figure of precision-recall curves
_MAX_CONFUSED = 5  # maximum number of confused class pairs listed
_SQUARE = (FIGURE_SIZE[1], FIGURE_SIZE[1])


def loss_curves(metrics: Metrics) -> Figure:
    """Draw the training loss by epoch, and the loss on the images used for epoch selection, if any."""
    lines = [("training", "train_loss", WARM)]
    if metrics.selected_on is not None:
        lines.append((metrics.selection, "val_loss", ACCENT))
    return _curves(metrics, "Loss", lines)


class _Curves(NamedTuple):
    """Title, description, and lines of `score_curves`.

    A line is a tuple `(label, field of EpochRow, color)`. `is_share` is True if the scores are fractions.
    """

    title: str
    description: str
    lines: tuple[tuple[str, str, str], ...]
    is_share: bool = False


_DICE = (("Dice", "val_dice", ACCENT), ("IoU", "val_iou", COLORS[2]))
_MAP = (("mAP", "val_map", ACCENT), ("macro F1", "val_macro_f1", COLORS[2]), ("micro F1", "val_micro_f1", COLORS[3]))
_KAPPA = (("kappa", "val_kappa", ACCENT), ("accuracy", "val_accuracy", COLORS[2]), ("mean rank error", "val_mae", WARM))
_ERROR = (("MAE", "val_mae", ACCENT), ("RMSE", "val_rmse", COLORS[2]))
_R2 = (("R², mean over targets", "val_r2", ACCENT),)
_ACCURACY = (("accuracy", "val_accuracy", ACCENT), ("balanced accuracy", "val_balanced_accuracy", COLORS[2]))
_SCORE_CURVES = {
    "dice": _Curves("Overlap on {}, mean over images", "Dice", _DICE, is_share=True),
    "map": _Curves("Precision and F1 on {}", "mean average precision", _MAP, is_share=True),
    "kappa": _Curves("Agreement on {}", "quadratic weighted kappa", _KAPPA),
    "error": _Curves("Errors on {}", "mean absolute error", _ERROR),
    "r2": _Curves("R² on {}", "R², mean over targets,", _R2),
    "accuracy": _Curves("Accuracy on {}", "accuracy", _ACCURACY, is_share=True),
}
"""Score curves by metric, in order of preference."""


def score_curves(metrics: Metrics, name: str) -> Figure:
    """Draw scores by epoch on the images used for epoch selection. `name` is a key of `_SCORE_CURVES`."""
    curves = _SCORE_CURVES[name]
    figure = _curves(metrics, curves.title.format(metrics.selection), curves.lines)
    if curves.is_share:
        percent_axis(figure.axes[0])
    return figure


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, colored by fraction of the true class (row), with counts for up to 50 classes.

    Args:
        confusion: `confusion[i][j]` is the number of images of class i predicted as class j.
        classes: One name per row.

    Raises:
        ValueError: If the numbers of rows and names differ.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    n = len(classes)
    if counts.shape != (n, n):
        raise ValueError(
            f"confusion must be [{n}, {n}] for {n} classes, got {list(counts.shape)}; pass one name per row"
        )
    row_sums = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(row_sums, 1)
    names = [shortened(name) for name in classes]
    label_width = 7.5 * max(map(len, names))
    if n > MAX_NUMBERED_CLASSES:
        side = 560 / n  # large matrices have a fixed size
    else:
        count_width = 14 + 8 * len(str(counts.max()))
        min_side = 28 if n > 12 else 44
        side = max(count_width, min_side)
    is_rotated = n > 3  # tick labels of the columns
    if not is_rotated:
        side = max(side, label_width + 12, 200 / n)
    label_height = label_width if is_rotated else 20
    figure, axes = new_figure(110 + side * n + label_width, 130 + side * n + label_height)
    axes.grid(False)
    if n <= MAX_NUMBERED_CLASSES:
        edges = np.arange(n + 1) - 0.5
        axes.pcolormesh(edges, edges, shares, cmap=accent_map(), vmin=0, vmax=1, edgecolors=PANEL, linewidth=1.5)
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = text_on(shares[i, j])
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=color, fontsize=11)
        tick_step = 1
    else:
        axes.imshow(shares, cmap=accent_map(), vmin=0, vmax=1, interpolation="none", aspect="auto")
        tick_step = math.ceil(n * 15 / 560)  # at least 15 px per tick label
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
    ticks = range(0, n, tick_step)
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90 if is_rotated else 0)
    axes.set_yticks(ticks, [names[i] for i in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(n > MAX_NUMBERED_CLASSES)
    scale_bar(figure, axes, "fraction of the true class", {0.0: "0%", 0.5: "50%", 1.0: "100%"})
    return figure


def comparison_bars(rows: Sequence[MethodResult]) -> Figure:
    """Draw accuracy and balanced accuracy of several methods."""
    figure, axes = _bar_axes(rows, "Accuracy")
    accuracies = [row.accuracy for row in rows]
    balanced_accuracies = [row.balanced_accuracy for row in rows]
    for offset, color, values in ((-0.2, ACCENT, accuracies), (0.2, COLORS[2], balanced_accuracies)):
        positions = np.arange(len(rows)) + offset
        axes.barh(positions, np.nan_to_num(values), height=0.36, color=color)
        for position, value in zip(positions, values, strict=True):
            text = "not measured" if math.isnan(value) else percent_text(value)
            axes.text(np.nan_to_num(value) + 0.01, position, text, va="center", color=INK, fontsize=11)
    axes.set_xlim(0, 1.19)
    axes.set_xticks(np.linspace(0, 1, 5), [f"{p}%" for p in (0, 25, 50, 75, 100)])
    add_legend(figure, axes.containers, ["accuracy", "balanced accuracy"])  # type: ignore[arg-type]
    return figure


def cost_bars(rows: Sequence[MethodResult], title: str, unit: str, costs: Sequence[float]) -> Figure:
    """Draw one cost per method; a cost of NaN is unknown."""
    figure, axes = _bar_axes(rows, title)
    lengths = np.nan_to_num(costs)
    longest = float(lengths.max(initial=0.0)) or 1.0  # 1 if no cost is known
    axes.barh(np.arange(len(rows)), lengths, height=0.5, color=ACCENT)
    for position, (length, cost) in enumerate(zip(lengths, costs, strict=True)):
        text = "–" if math.isnan(cost) else f"{cost:,.0f} {unit}"
        axes.text(length + longest / 60, position, text, va="center", color=INK, fontsize=11)
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xlabel(unit)
    return figure


def _curves(metrics: Metrics, title: str, lines: Sequence[tuple[str, str, str]]) -> Figure:
    """Draw lines `(label, field of EpochRow, color)` over the epochs.

    The saved epoch is marked, unless the saved weights are an average of epochs.
    """
    figure, axes = new_figure(*FIGURE_SIZE, title)
    epochs = [row.epoch for row in metrics.history]
    handles = []
    labels = [label for label, _, _ in lines]
    for _, field, color in lines:
        measured = [row for row in metrics.history if not math.isnan(getattr(row, field))]
        measured_epochs = [row.epoch for row in measured]
        values = [getattr(row, field) for row in measured]
        handles += plot_line(axes, measured_epochs, values, color)
    is_averaged = metrics.averaged is not None and metrics.averaged.is_saved
    if metrics.best_epoch is not None and not is_averaged:
        handles.append(axes.axvline(metrics.best_epoch, color=MUTED, linewidth=1.2, linestyle=DASHED, zorder=1))
        labels.append("saved epoch")
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    integer_axis(axes, "epoch")
    add_legend(figure, handles, labels)
    return figure


def _bar_axes(rows: Sequence[MethodResult], title: str) -> tuple[Figure, Axes]:
    """Return a figure and its axes for horizontal bars, with the first row at the top."""
    figure, axes = new_figure(FIGURE_SIZE[0], 120 + 46 * len(rows), title)
    axes.set_yticks(range(len(rows)), [shortened(row.method) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def curves_section(metrics: Metrics) -> list[Markup]:
    """Return curves over the epochs: the loss and, if an epoch was selected, one entry of `_SCORE_CURVES`.

    This is the first entry that was measured, but `r2` for regression with several targets.
    """
    if not metrics.history:
        return []
    last = metrics.history[-1]
    losses = f"training {measure_text(last.train_loss)}"
    if metrics.selected_on is not None:
        losses += f", {metrics.selection} {measure_text(last.val_loss)}"
    svgs = [inline_svg(loss_curves(metrics), "curve-loss", f"Loss by epoch; last epoch {last.epoch}: {losses}.")]
    if metrics.selected_on is None:
        return svgs
    fields = {name: curves.lines[0][1] for name, curves in _SCORE_CURVES.items()}
    names = [name for name, field in fields.items() if _is_measured(metrics, field)]
    name = names[0] if names else "accuracy"
    _, scores = metrics.measured
    if name == "error" and isinstance(scores, RegressionScores) and len(scores.per_target) > 1:
        name = "r2"  # R² has no unit, while errors of the targets can have different units
    value = getattr(last, fields[name])
    curves = _SCORE_CURVES[name]
    text = percent_text(value) if curves.is_share else measure_text(value)
    label = f"{metrics.selection.capitalize()} {curves.description}"
    description = f"{label} by epoch; last epoch {last.epoch}: {text}."
    return [*svgs, inline_svg(score_curves(metrics, name), f"curve-{name}", description)]


def _is_measured(metrics: Metrics, field: str) -> bool:
    """Return whether any epoch has a value for this field of EpochRow."""
    return any(not math.isnan(getattr(row, field)) for row in metrics.history)


def comparison_section(rows: Sequence[MethodResult]) -> dict[str, Any] | None:
    """Return the accuracy, memory, and training time of the compared methods."""
    if not rows:
        return None
    mib = [math.nan if row.step_memory is None else row.step_memory / 2**20 for row in rows]
    memory = cost_bars(rows, "Memory of a training step (estimate)", "MiB", mib)
    time = cost_bars(rows, "Training time", "s", [row.train_s for row in rows])
    charts = {"accuracy": comparison_bars(rows), "step memory": memory, "training time": time}
    svgs = [
        inline_svg(chart, f"comparison-{name.replace(' ', '-')}", f"Bar chart of the {name} of each method.")
        for name, chart in charts.items()
    ]
    return {"rows": rows, "figures": svgs}


def confusion_section(info: RunInfo, metrics: Metrics) -> dict[str, Any] | None:
    """Return the confusion matrix and per-class scores, on the test split if present."""
    split, scores = metrics.measured
    if not isinstance(scores, Scores) or not scores.confusion:
        return None
    return {
        "split": split,
        "count": scores.images,
        "numbered": len(info.classes) <= MAX_NUMBERED_CLASSES,
        "figure": inline_svg(
            confusion_matrix(scores.confusion, info.classes),
            "confusion-matrix",
            f"Confusion matrix of {len(info.classes)} classes on the {split} images; recall and precision by class are "
            "in the table below.",
        ),
        "rows": _class_rows(info, scores),
        "pairs": _confused_pairs(info, scores),
    }


def _confused_pairs(info: RunInfo, scores: Scores) -> list[dict[str, Any]]:
    """Return the most frequently confused pairs of classes, with image counts."""
    pairs: list[dict[str, Any]] = [
        {"label": info.classes[i], "predicted": info.classes[j], "count": count, "images": sum(row)}
        for i, row in enumerate(scores.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:_MAX_CONFUSED]


def _class_rows(info: RunInfo, scores: Scores) -> list[dict[str, Any]]:
    """Return image count, recall, and precision by class: lowest recall first, classes without images last."""
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(info.classes):
        images = sum(scores.confusion[i])
        predicted = sum(row[i] for row in scores.confusion)
        correct = scores.confusion[i][i]
        recall = correct / images if images else math.nan
        precision = correct / predicted if predicted else math.nan
        rows.append({"name": name, "images": images, "recall": recall, "precision": precision})
    return sorted(rows, key=lambda row: (math.isnan(row["recall"]), row["recall"]))


def calibration_section(info: RunInfo, predictions: Predictions) -> dict[str, Any] | None:
    """Return the reliability curve of a calibrated run and, for validation predictions, the coverage curve.

    `predictions` are the stored predictions, to which the temperature has not been applied.
    """
    calibration = info.calibration
    if calibration is None or not calibration.reliability:
        return None
    shown = calibration.reliability[-1]  # the test split if present, because nothing is fitted to it
    svgs = [
        inline_svg(
            reliability_curve(shown),
            "reliability",
            f"Fraction correct against probability; expected calibration error {percent_text(shown.ece)}.",
        )
    ]
    if predictions.split == "val" and predictions.items:
        svgs.append(
            inline_svg(
                coverage_curve(predictions.with_temperature(calibration.temperature), calibration),
                "coverage",
                "Accuracy among the images with the highest probabilities, against coverage.",
            )
        )
    bins = calibration.reliability[0].bins_before  # of the validation images, to which the temperature is fitted
    count = sum(b.count for b in bins)
    rows = [{"split": split_text(reliability.split), "values": reliability} for reliability in calibration.reliability]
    return {
        "temperature": f"{calibration.temperature:.3g}",
        "summary": calibration.summary,
        "mean_confidence": sum(b.count * b.confidence for b in bins) / count,
        "mean_accuracy": sum(b.count * b.accuracy for b in bins) / count,
        "rows": rows,
        "threshold": calibration.threshold,
        "coverage": calibration.coverage,
        "accuracy": calibration.accuracy,
        "figures": svgs,
    }


def ranking_section(info: RunInfo, predictions: Predictions) -> dict[str, Any] | None:
    """Return precision-recall curves over all thresholds and, for two classes, the ROC curve.

    Returns None if the labels of the predicted images contain fewer than two classes.
    """
    labels = np.array([item.label for item in predictions.items])
    scores = np.array([item.probabilities for item in predictions.items])
    if len(set(labels.tolist())) < 2:
        return None
    svgs = []
    if len(info.classes) == 2:
        figure, area = roc_curve(labels, scores[:, 1], info.classes[1])
        svgs.append(inline_svg(figure, "roc", f"True positive against false positive rate, area {area:.3f}."))
    figure, precisions = precision_recall_curves(labels, scores, info.classes)
    drawn = "the classes with the lowest average precision" if len(precisions) > _MAX_CURVES else "each class"
    svgs.append(inline_svg(figure, "precision-recall", f"Precision against recall for {drawn}."))
    return {
        "split": predictions.split_name,
        "mean": float(np.mean(list(precisions.values()))),
        "is_partial": len(precisions) > _MAX_CURVES,
        "figures": svgs,
    }


def reliability_curve(reliability: Reliability) -> Figure:
    """Plot accuracy against confidence with and without temperature scaling. Dot areas grow with image counts."""
    figure, axes = new_figure(*_SQUARE, f"Reliability on {split_text(reliability.split)}")
    handles = [axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=DASHED)[0]]
    labels = ["perfectly calibrated"]
    for name, bins, color in (
        ("without temperature", reliability.bins_before, WARM),
        ("with temperature", reliability.bins, ACCENT),
    ):
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        handles += axes.plot(x, y, color=color, linewidth=2)
        sizes = [8 + 120 * b.count / reliability.count for b in bins]
        axes.scatter(x, y, s=sizes, color=color, zorder=3, clip_on=False)  # most dots are near 1 and would be cut off
        labels.append(name)
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.05), xlabel="mean probability", ylabel="fraction correct")
    percent_axis(axes, "both")
    add_legend(figure, handles, labels, columns=2)
    return figure


def coverage_curve(predictions: Predictions, calibration: Calibration) -> Figure:
    """Plot the accuracy of the most confident predictions against coverage, and mark any suggested threshold.

    Coverage is the fraction of images that are kept when the least confident predictions are dropped first.
    """
    figure, axes = new_figure(*_SQUARE, "Coverage on validation")
    ranked = sorted(predictions.items, key=lambda item: -item.probability)
    counts = np.arange(1, len(ranked) + 1)
    accuracy = np.cumsum([item.is_correct for item in ranked]) / counts
    handles = axes.plot(counts / len(ranked), accuracy, color=ACCENT, linewidth=2)
    labels = ["accuracy"]
    if calibration.threshold is not None:
        handles.append(axes.axvline(calibration.coverage, color=WARM, linewidth=1.5, linestyle=DASHED))
        labels.append(f"probability ≥ {percent_text(calibration.threshold)}")
    axes.set(xlim=(0, 1.02), xlabel="coverage: fraction of images", ylabel="accuracy")
    bottom = max(0.0, min(0.9, float(accuracy.min())) - 0.05)
    axes.set_ylim(bottom, 1 + 0.04 * (1 - bottom))
    percent_axis(axes, "both")
    add_legend(figure, handles, labels, columns=2)
    return figure


def roc_curve(labels: np.ndarray, scores: np.ndarray, name: str) -> tuple[Figure, float]:
    """Draw the ROC curve of class 1 against class 0.

    Args:
        labels: `[images]`, 0 or 1.
        scores: `[images]`, probability of class 1.
        name: Name of class 1.

    Returns:
        The figure and the area under the curve.
    """
    from sklearn import metrics

    false_rate, true_rate, _ = metrics.roc_curve(labels, scores)
    area = float(metrics.roc_auc_score(labels, scores))
    figure, axes = new_figure(*_SQUARE, f"ROC, area {area:.3f}")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=DASHED)
    axes.plot(false_rate, true_rate, color=ACCENT, linewidth=2)
    axes.set(
        xlim=(-0.01, 1.01),
        ylim=(-0.02, 1.02),
        xlabel="false positive rate",
        ylabel=f"true positive rate: {shortened(name)}",
    )
    percent_axis(axes, "both")
    return figure, area


def precision_recall_curves(
    labels: np.ndarray, scores: np.ndarray, classes: list[str]
) -> tuple[Figure, dict[str, float]]:
    """Plot one-vs-rest precision against recall for each class.

    Args:
        labels: `[images]`, class indices.
        scores: `[images, classes]`, probabilities.
        classes: Class names. Classes without images are omitted, and only the six with the lowest average precision
            are drawn.

    Returns:
        The figure and the average precision by class name.
    """
    from sklearn import metrics

    present = sorted(set(labels.tolist()))
    precisions = {c: float(metrics.average_precision_score(labels == c, scores[:, c])) for c in present}
    lowest = sorted(present, key=precisions.__getitem__)[:_MAX_CURVES]
    drawn = sorted(lowest)
    longest_name = max(len(shortened(classes[c])) for c in drawn)
    columns = 2 if longest_name < 12 else 1
    legend_rows = math.ceil(len(drawn) / columns)
    height = FIGURE_SIZE[1] + 18 * max(0, legend_rows - 1)
    figure, axes = new_figure(_SQUARE[0], height, "Precision and recall")
    handles = []
    for color, c in zip(COLORS, drawn, strict=False):
        precision, recall, _ = metrics.precision_recall_curve(labels == c, scores[:, c])
        handles += axes.plot(recall, precision, color=color, linewidth=2, drawstyle="steps-post")
    axes.set(xlim=(-0.01, 1.02), ylim=(-0.02, 1.05), xlabel="recall", ylabel="precision")
    percent_axis(axes, "both")
    legend = [f"{shortened(classes[c])} {percent_text(precisions[c])}" for c in drawn]
    add_legend(figure, handles, legend, columns=columns)
    return figure, {classes[c]: value for c, value in precisions.items()}
