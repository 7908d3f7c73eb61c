"""How sure a classifier is, and how well it ranks: reliability, accuracy among the sure, ROC and precision-recall."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from snella._text import percent_text
from snella.records import Calibration, Predictions, Reliability, RunInfo
from snella.report.style import (
    ACCENT,
    COLORS,
    CURVE,
    MUTED,
    WARM,
    add_legend,
    inline_svg,
    new_figure,
    percent_axis,
    shortened,
)

__all__ = [
    "calibration_section",
    "coverage_curve",
    "precision_recall_curves",
    "ranking_section",
    "reliability_curve",
    "roc_curve",
]

_MOST_CURVES = 6
_SPLITS = {"val": "validation"}
_SQUARE = (CURVE[1], CURVE[1])


def calibration_section(info: RunInfo, predictions: Predictions | None) -> dict[str, Any] | None:
    """How far probabilities are from what is right, and what is left to answer where the model may be unsure.

    Args:
        info: The run; without a calibration there is nothing to say.
        predictions: Of the validation images, without temperature.
    """
    calibration = info.calibration
    if calibration is None or not calibration.reliability:
        return None
    shown = calibration.reliability[-1]  # test images where there are any: no number was fitted to them
    pictures = [
        _inline(
            reliability_curve(shown),
            "reliability",
            f"Share that is right against probability; expected calibration error {percent_text(shown.ece)}.",
        )
    ]
    if predictions is not None and predictions.split == "val" and predictions.items:
        pictures.append(
            _inline(
                coverage_curve(predictions.with_temperature(calibration.temperature), calibration),
                "coverage",
                "Accuracy among the images with the highest probabilities, against their share.",
            )
        )
    return {
        "temperature": f"{calibration.temperature:.3g}",
        "tendency": "too sure of itself" if calibration.temperature > 1 else "not sure enough of itself",
        "rows": [{"split": _SPLITS.get(r.split, r.split), "values": r} for r in calibration.reliability],
        "threshold": None if calibration.threshold is None else f"{calibration.threshold:.3f}",
        "coverage": calibration.coverage,
        "accuracy": calibration.accuracy,
        "figures": pictures,
    }


def ranking_section(info: RunInfo, predictions: Predictions | None) -> dict[str, Any] | None:
    """Curves that do not depend on a threshold: ROC for two classes, precision against recall for each class."""
    if predictions is None:
        return None
    labels = np.array([item.label for item in predictions.items])
    scores = np.array([item.probabilities for item in predictions.items])
    if len(set(labels.tolist())) < 2:
        return None
    pictures = []
    if len(info.classes) == 2:
        figure, area = roc_curve(labels, scores[:, 1], info.classes[1])
        pictures.append(_inline(figure, "roc", f"True positive against false positive rate, area {area:.3f}."))
    figure, precisions = precision_recall_curves(labels, scores, info.classes)
    drawn = "the classes with the lowest average precision" if len(precisions) > _MOST_CURVES else "each class"
    pictures.append(_inline(figure, "precision-recall", f"Precision against recall of {drawn}."))
    return {
        "split": _SPLITS.get(predictions.split, predictions.split),
        "mean": float(np.mean(list(precisions.values()))),
        "worst": sorted(precisions.items(), key=lambda pair: pair[1])[:_MOST_CURVES],
        "is_partial": len(precisions) > _MOST_CURVES,
        "figures": pictures,
    }


def reliability_curve(reliability: Reliability) -> Figure:
    """Draw the share that is right against the probability, with the temperature and without; areas are images."""
    figure, axes = new_figure(*_SQUARE, f"Reliability on {_SPLITS.get(reliability.split, reliability.split)}")
    handles = [axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))[0]]
    labels = ["as sure as right"]
    for name, bins, color in (
        ("without", reliability.bins_before, WARM),
        ("with temperature", reliability.bins, ACCENT),
    ):
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        handles += axes.plot(x, y, color=color, linewidth=2)
        sizes = [8 + 120 * b.count / reliability.count for b in bins]
        axes.scatter(x, y, s=sizes, color=color, zorder=3, clip_on=False)  # most lie at the upper end
        labels.append(name)
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.05), xlabel="mean probability", ylabel="share that is right")
    add_legend(figure, handles, labels, columns=2)
    return figure


def coverage_curve(predictions: Predictions, calibration: Calibration) -> Figure:
    """Draw the accuracy among the images that the model is surest of, and mark the suggested threshold."""
    figure, axes = new_figure(*_SQUARE, "Accuracy among the surest")
    confidence = np.array([item.probability for item in predictions.items])
    right = np.array([item.is_right for item in predictions.items])[np.argsort(-confidence, kind="stable")]
    shares = np.arange(1, len(right) + 1) / len(right)
    handles = axes.plot(shares, right.cumsum() / np.arange(1, len(right) + 1), color=ACCENT, linewidth=2)
    labels = ["accuracy"]
    if calibration.threshold is not None:
        handles.append(axes.axvline(calibration.coverage, color=WARM, linewidth=1.5, linestyle=(0, (4, 3))))
        labels.append(f"probability ≥ {calibration.threshold:.2f}")
    axes.set(xlim=(0, 1.02), xlabel="share of the images that are answered")
    low = min(0.9, float((right.cumsum() / np.arange(1, len(right) + 1)).min()))
    bottom = max(0.0, low - 0.05)
    axes.set_ylim(bottom, 1 + 0.04 * (1 - bottom))
    percent_axis(axes)
    add_legend(figure, handles, labels, columns=2)
    return figure


def roc_curve(labels: np.ndarray, scores: np.ndarray, name: str) -> tuple[Figure, float]:
    """Draw the receiver operating characteristic of class 1 against class 0; the figure and the area under it.

    Args:
        labels: `[images]`, 0 or 1.
        scores: `[images]`, probability of class 1.
        name: Of class 1.
    """
    from sklearn import metrics

    false_rate, true_rate, _ = metrics.roc_curve(labels, scores)
    area = float(metrics.roc_auc_score(labels, scores))
    figure, axes = new_figure(*_SQUARE, f"ROC, area {area:.3f}")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot(false_rate, true_rate, color=ACCENT, linewidth=2)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02), xlabel="others taken for it", ylabel=f"{shortened(name)} found")
    return figure, area


def precision_recall_curves(
    labels: np.ndarray, scores: np.ndarray, classes: list[str]
) -> tuple[Figure, dict[str, float]]:
    """Draw precision against recall, each class against the others; the figure and the average precision of each class.

    Args:
        labels: `[images]`, class numbers.
        scores: `[images, classes]`.
        classes: Names by number; those without an image are left out, and of many the worst are drawn.
    """
    from sklearn import metrics

    present = sorted(set(labels.tolist()))
    precisions = {c: float(metrics.average_precision_score(labels == c, scores[:, c])) for c in present}
    drawn = sorted(sorted(present, key=precisions.__getitem__)[:_MOST_CURVES])
    columns = 2 if max(len(shortened(classes[c])) for c in drawn) < 12 else 1
    height = CURVE[1] + 18 * max(0, -(-len(drawn) // columns) - 1)
    figure, axes = new_figure(_SQUARE[0], height, "Precision and recall")
    handles = []
    for color, c in zip(COLORS, drawn, strict=False):
        precision, recall, _ = metrics.precision_recall_curve(labels == c, scores[:, c])
        handles += axes.plot(recall, precision, color=color, linewidth=2, drawstyle="steps-post")
    axes.set(xlim=(-0.01, 1.02), ylim=(-0.02, 1.05), xlabel="recall", ylabel="precision")
    add_legend(figure, handles, [f"{shortened(classes[c])} {precisions[c]:.2f}" for c in drawn], columns=columns)
    return figure, {classes[c]: value for c, value in precisions.items()}


def _inline(figure: Figure, name: str, description: str) -> Markup:
    """A figure as markup; `inline_svg` escapes what comes from the run."""
    return Markup(inline_svg(figure, name, description))
