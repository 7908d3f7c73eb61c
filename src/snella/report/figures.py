"""Figures of a run: learning curves, confusion matrix, comparison of methods, and those of `allocation_figures`.

Every function returns a `matplotlib.figure.Figure`, free of global state, for `save_figure` or `inline_svg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snella.records import EpochRow, MethodResult, Metrics
from snella.report.allocation import (
    block_trend,
    budget_curve,
    budget_shares,
    frozen_curve,
    importance_curves,
    sparsity_map,
)
from snella.report.style import (
    ACCENT,
    COLORS,
    CURVE,
    GRID,
    INK,
    MUTED,
    PANEL,
    WARM,
    accent_map,
    add_legend,
    epoch_axis,
    inline_svg,
    new_figure,
    percent_axis,
    save_figure,
    scale_bar,
    shortened,
    text_on,
)

NUMBERED_CLASSES = 50
"""Confusion matrices of more classes are drawn without numbers."""


def loss_curves(metrics: Metrics) -> Figure:
    """Draw the training loss of each epoch, and that on the images that the best epoch was chosen on."""
    lines: list[tuple[str, Callable[[EpochRow], float], str]] = [("training", lambda row: row.train_loss, WARM)]
    if metrics.selected_on is not None:
        lines.append((metrics.selection, lambda row: row.val_loss, ACCENT))
    return _curves(metrics, "Loss", lines)


def accuracy_curves(metrics: Metrics) -> Figure:
    """Draw the validation accuracy and balanced accuracy of each epoch."""
    figure = _curves(
        metrics,
        f"Accuracy on {metrics.selection}",
        [
            ("accuracy", lambda row: row.val_accuracy, ACCENT),
            ("balanced accuracy", lambda row: row.val_balanced_accuracy, COLORS[2]),
        ],
    )
    percent_axis(figure.axes[0])
    return figure


def dice_curves(metrics: Metrics) -> Figure:
    """Draw the validation Dice and IoU of each epoch."""
    lines: list[tuple[str, Callable[[EpochRow], float], str]] = [
        ("Dice", lambda row: row.val_dice, ACCENT),
        ("IoU", lambda row: row.val_iou, COLORS[2]),
    ]
    figure = _curves(metrics, f"Overlap on {metrics.selection}, mean of the images", lines)
    percent_axis(figure.axes[0])
    return figure


def label_curves(metrics: Metrics) -> Figure:
    """Draw the validation mAP and F1 of each epoch."""
    lines: list[tuple[str, Callable[[EpochRow], float], str]] = [
        ("mAP", lambda row: row.val_map, ACCENT),
        ("macro F1", lambda row: row.val_macro_f1, COLORS[2]),
        ("micro F1", lambda row: row.val_micro_f1, COLORS[3]),
    ]
    figure = _curves(metrics, f"Precision and F1 on {metrics.selection}", lines)
    percent_axis(figure.axes[0])
    return figure


def rank_curves(metrics: Metrics) -> Figure:
    """Draw the validation kappa and accuracy of each epoch."""
    lines: list[tuple[str, Callable[[EpochRow], float], str]] = [
        ("kappa", lambda row: row.val_kappa, ACCENT),
        ("accuracy", lambda row: row.val_accuracy, COLORS[2]),
        ("mean error in ranks", lambda row: row.val_mae, WARM),
    ]
    return _curves(metrics, f"Agreement on {metrics.selection}", lines)


def error_curves(metrics: Metrics) -> Figure:
    """Draw the validation errors of a regression in each epoch."""
    lines: list[tuple[str, Callable[[EpochRow], float], str]] = [
        ("MAE", lambda row: row.val_mae, ACCENT),
        ("RMSE", lambda row: row.val_rmse, COLORS[2]),
    ]
    return _curves(metrics, f"Errors on {metrics.selection}", lines)


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw counts, colored by their share of the true class (row), with numbers up to 50 classes.

    Args:
        confusion: `confusion[i][j]` images of class i were taken for class j.
        classes: One name for each row.

    Raises:
        ValueError: The numbers of rows and of names differ.
    """
    counts = np.asarray(confusion, dtype=np.int64).reshape(len(confusion), -1)
    n = len(classes)
    if counts.shape != (n, n):
        raise ValueError(f"confusion must be [{n}, {n}] for {n} classes, got {list(counts.shape)}; give one name a row")
    rows = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(rows, 1)
    names = [shortened(name) for name in classes]
    label = 7.5 * max(map(len, names), default=0)
    side = max(14 + 8 * len(str(counts.max(initial=0))), 28 if n > 12 else 44) if n <= NUMBERED_CLASSES else 560 / n
    if n <= 3:  # the names stand side by side
        side = max(side, label + 12, 200 / max(n, 1))
    figure, axes = new_figure(110 + side * n + label, 130 + side * n + (label if n > 3 else 20))
    axes.grid(False)
    if n <= NUMBERED_CLASSES:
        edges = np.arange(n + 1) - 0.5
        axes.pcolormesh(edges, edges, share, cmap=accent_map(), vmin=0, vmax=1, edgecolors=PANEL, linewidth=1.5)
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = text_on(share[i, j])
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=color, fontsize=11)
        every = 1
    else:
        axes.imshow(share, cmap=accent_map(), vmin=0, vmax=1, interpolation="none", aspect="auto")
        every = math.ceil(n * 15 / 560)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
    ticks = range(0, n, every)
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90 if n > 3 else 0)
    axes.set_yticks(ticks, [names[i] for i in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(n > NUMBERED_CLASSES)
    scale_bar(figure, axes, "share of the true class", {0.0: "0 %", 0.5: "50 %", 1.0: "100 %"})
    return figure


def comparison_bars(rows: Sequence[MethodResult]) -> Figure:
    """Draw accuracy and balanced accuracy of several methods."""
    figure, axes = _bar_axes(rows, "Accuracy")
    for offset, color, value in (
        (-0.2, ACCENT, [row.accuracy for row in rows]),
        (0.2, COLORS[2], [row.balanced_accuracy for row in rows]),
    ):
        places = np.arange(len(rows)) + offset
        axes.barh(places, np.nan_to_num(value), height=0.36, color=color)
        for place, number in zip(places, value, strict=True):
            text = "not measured" if math.isnan(number) else f"{100 * number:.1f} %"
            axes.text(np.nan_to_num(number) + 0.01, place, text, va="center", color=INK, fontsize=11)
    axes.set_xlim(0, 1.19)
    axes.set_xticks(np.linspace(0, 1, 5), [f"{p} %" for p in (0, 25, 50, 75, 100)])
    add_legend(figure, axes.containers, ["accuracy", "balanced accuracy"])  # type: ignore[arg-type]
    return figure


def cost_bars(rows: Sequence[MethodResult]) -> Figure:
    """Draw the seconds of training of several methods, with their trainable parameters as text."""
    figure, axes = _bar_axes(rows, "Cost of training")
    seconds = np.nan_to_num([row.train_s for row in rows])
    longest = float(seconds.max(initial=0.0)) or 1.0
    axes.barh(np.arange(len(rows)), seconds, height=0.5, color=ACCENT)
    for place, row in enumerate(rows):
        time = "not measured" if math.isnan(row.train_s) else f"{row.train_s:,.0f} s"
        count = "" if row.trainable_parameters is None else f" · {_short_count(row.trainable_parameters)}"
        axes.text(seconds[place] + longest / 60, place, time + count, va="center", color=INK, fontsize=11)
    axes.set_xlim(0, 1.75 * longest)
    axes.set_xlabel("seconds · trainable parameters")
    return figure


def _curves(metrics: Metrics, title: str, lines: list[tuple[str, Callable[[EpochRow], float], str]]) -> Figure:
    """Lines over the epochs, the best epoch marked."""
    figure, axes = new_figure(*CURVE, title)
    epochs = [row.epoch for row in metrics.history]
    handles = []
    labels = []
    for label, value, color in lines:
        measured = [row for row in metrics.history if not math.isnan(value(row))]  # not every protocol measures each
        marker = "o" if len(measured) <= 30 else ""
        places, numbers = [row.epoch for row in measured], [value(row) for row in measured]
        handles += axes.plot(places, numbers, color=color, linewidth=2, marker=marker, markersize=4)
        labels.append(label)
    if metrics.best_epoch is not None:
        handles.append(axes.axvline(metrics.best_epoch, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1))
        labels.append("best epoch")
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    epoch_axis(axes)
    add_legend(figure, handles, labels)
    return figure


def _bar_axes(rows: Sequence[MethodResult], title: str) -> tuple[Figure, Axes]:
    """Axes for horizontal bars, the first row on top."""
    figure, axes = new_figure(CURVE[0], 120 + 46 * len(rows), title)
    axes.set_yticks(range(len(rows)), [shortened(row.method) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _short_count(count: int) -> str:
    """A count in three digits: 768, 1.33 M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


__all__ = [
    "accuracy_curves",
    "block_trend",
    "budget_curve",
    "budget_shares",
    "comparison_bars",
    "confusion_matrix",
    "cost_bars",
    "dice_curves",
    "error_curves",
    "frozen_curve",
    "importance_curves",
    "inline_svg",
    "label_curves",
    "loss_curves",
    "rank_curves",
    "save_figure",
    "sparsity_map",
]
