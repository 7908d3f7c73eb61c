"""Comparison figures: score versus cost, score versus learning rate, and paired differences."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from snella_app.report.style import (
    ACCENT,
    COLORS,
    FIGURE_SIZE,
    INK,
    MUTED,
    WARM,
    add_legend,
    new_figure,
    percent_axis,
    shortened,
)
from snella_lab.comparison.statistics import Rows, complete_mean
from snella_lab.comparison.summary import Summary, part_text
from snella_lab.style import style_of

SHOWN_RANGE = 0.3
"""Maximum plotted range below the best validation score."""


def pareto(summary: Summary, cost: str, label: str, title: str, is_log: bool) -> Figure | None:
    """Plot the mean of the main metric versus a cost, with the Pareto front.

    Args:
        summary: Results of the comparison.
        cost: A column of `MethodSummary.costs`.
        label: Label of the cost axis, with the unit.
        title: Figure title.
        is_log: True for a logarithmic cost axis.

    Returns:
        The figure, or None if fewer than two methods have both a score and a cost. On a logarithmic axis, only positive
        costs count.
    """
    points = []
    for number, method in enumerate(summary.methods):
        score = method.over_tasks[summary.column]
        value = method.costs[cost]
        if score is not None and value is not None and (value > 0 or not is_log):
            points.append((value, score.mean, score.std, number, method.name))
    if len(points) < 2:
        return None
    height = FIGURE_SIZE[1] + 70 + _legend_height(len(points))
    figure, axes = new_figure(FIGURE_SIZE[0], height, title)
    handles = []
    for value, mean, std, number, _ in points:
        color, marker = style_of(number)
        if not math.isnan(std):
            axes.errorbar(value, mean, std, color=color, linewidth=1.2, capsize=0, alpha=0.6)
        handles += axes.plot(value, mean, marker=marker, color=color, markersize=8, linestyle="none")
    front = pareto_front([(value, mean) for value, mean, *_ in points])
    axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    axes.margins(0.08)
    axes.set_xlabel(label)
    axes.set_ylabel(f"test {summary.measure}" + (", mean over tasks" if len(summary.tasks) > 1 else ""))
    if summary.is_fraction:
        percent_axis(axes)
    add_legend(figure, handles, [shortened(name) for *_, name in points])
    return figure


def _legend_height(entries: int) -> int:
    """Return the height in pixels of a legend with three entries per row."""
    return 17 * math.ceil(entries / 3)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto-optimal points `(cost, gain)` by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def learning_rate_curves(summary: Summary, tasks: Sequence[str], title: str) -> Figure | None:
    """Plot the validation score versus the learning rate, one line per method, averaged over `tasks`.

    Learning rates are relative to each method's default, so that all methods share an axis. A filled marker shows the
    selected learning rate or, if there is none (several tasks, or no final runs), the best one. Crosses at the bottom
    mark learning rates with a failed run. Returns None if no method was tried with several learning rates on all
    `tasks`.
    """
    curves = [(number, m.name, _mean_curve(summary, m.name, tasks)) for number, m in enumerate(summary.methods)]
    curves = [curve for curve in curves if len(curve[2]) > 1]
    if not curves:
        return None
    height = FIGURE_SIZE[1] + 40 + _legend_height(len(curves))
    figure, axes = new_figure(FIGURE_SIZE[0], height, title)
    handles = [
        _draw_curve(axes, number, points, _selected_factor(summary, name, tasks)) for number, name, points in curves
    ]
    _factor_axis(axes, sorted({factor for *_, points in curves for factor, _ in points}))
    scores = [score for *_, points in curves for _, score in points if score is not None]
    if scores:
        axes.set_ylim(bottom=max(axes.get_ylim()[0], max(scores) - SHOWN_RANGE))
    axes.set_ylabel(f"validation {summary.measure}")
    if summary.is_fraction:
        percent_axis(axes)
    add_legend(figure, handles, [shortened(name) for _, name, _ in curves])
    return figure


def _selected_factor(summary: Summary, method: str, tasks: Sequence[str]) -> float | None:
    """Return the learning-rate factor of a method's final runs, or None for several tasks or without final runs."""
    finals = summary.runs.rows(method, tasks[0]) if len(tasks) == 1 else []
    return finals[0].lr_factor if finals else None


def _draw_curve(
    axes: Axes, number: int, points: Sequence[tuple[float, float | None]], selected: float | None
) -> Line2D:
    """Draw and return the line of one method, with a filled marker at the selected factor, or else at the best one."""
    color, marker = style_of(number)
    dashes: Any = "-" if number < len(COLORS) else (0, (5, 2))
    finished = [(factor, score) for factor, score in points if score is not None]
    x = [factor for factor, _ in finished]
    y = [score for _, score in finished]
    style: dict[str, Any] = {"color": color, "marker": marker}
    line = axes.plot(x, y, **style, markersize=5, linewidth=1.6, linestyle=dashes, markerfacecolor="none")[0]
    if finished:
        marked = max(finished, key=lambda point: (point[0] == selected, point[1]))
        axes.plot(*marked, **style, markersize=8)
    for factor, score in points:
        if score is None:
            axes.plot(factor, 0.02, color=color, marker="x", transform=axes.get_xaxis_transform(), clip_on=False)
    return line


def _mean_curve(summary: Summary, method: str, tasks: Sequence[str]) -> list[tuple[float, float | None]]:
    """Average the curves of several tasks at their common factors.

    The mean at a factor is None if a run on one of the tasks failed.
    """
    curves = [dict(lr_curve(summary.trials.get((method, task), ()))) for task in tasks]
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(factor, complete_mean([curve[factor] for curve in curves])) for factor in common]


def lr_curve(trials: Rows) -> list[tuple[float, float | None]]:
    """Return the mean validation score for each learning-rate factor, at the default weight decay.

    `trials` are the tuning runs of one method on one task. The mean is None if a run with this factor failed.
    """
    scores: dict[float, list[float | None]] = {}
    for row in trials:
        if row.tried_weight_decay is None:
            scores.setdefault(row.lr_factor, []).append(row.score("val"))
    return [(factor, complete_mean(values)) for factor, values in sorted(scores.items())]


def forest(summary: Summary, with_tasks: bool, width: int = 640) -> Figure | None:
    """Plot the paired differences from the reference with their intervals, over all tasks and, optionally, by task.

    Figures narrower than 600 pixels shorten names to fewer characters. Returns None if no method can be compared
    with the reference.
    """
    longest = 30 if width >= 600 else 16
    lines: list[tuple[str, Any, bool]] = []
    for method in summary.methods:
        overall = method.to_reference[summary.column]
        if overall is None:
            continue
        lines.append((f"{method.name}{part_text(overall, len(summary.tasks))}", overall, True))
        if with_tasks:
            lines += [(task, method.to_reference_on[task], False) for task in summary.tasks]
    if not lines:
        return None
    line_height = 19 if with_tasks else 26
    height = 110 + line_height * len(lines)
    figure, axes = new_figure(width, height, f"Difference from {shortened(summary.reference, longest)}")
    for position, (_, value, is_overall) in enumerate(lines):
        if value is None:
            continue
        if is_overall:
            color = (INK, ACCENT, WARM)[value.direction]  # direction -1 selects the last color
            linewidth = 2.4
            marker = "D"
            markersize = 7
        else:
            color = MUTED
            linewidth = 1.2
            marker = "o"
            markersize = 4
        axes.plot([value.low, value.high], [position, position], color=color, linewidth=linewidth)
        axes.plot(value.mean, position, color=color, marker=marker, markersize=markersize)
    axes.axvline(0, color=MUTED, linewidth=1.2)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_yticks(range(len(lines)), [shortened(name, longest) for name, *_ in lines])
    for text, (_, _, is_overall) in zip(axes.get_yticklabels(), lines, strict=True):
        text.set(fontweight="bold" if is_overall else "normal", color=INK if is_overall else MUTED)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if width < 600:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if summary.is_fraction:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _percentage_points(v)))
    label = f"difference in test {summary.measure}"
    if summary.is_fraction:
        label += " (percentage points)" if width >= 600 else "\n(percentage points)"
    axes.set_xlabel(label)
    return figure


def _factor_axis(axes: Axes, factors: Sequence[float]) -> None:
    """Set up a logarithmic x-axis with ticks at the tried factors, or at some of them if there are more than eight."""
    axes.set_xscale("log")
    step = max(1, math.ceil(len(factors) / 8))
    shown = factors[::step]
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"×{v:g}"))
    axes.set_xlabel("learning rate relative to the method's default")


def _percentage_points(fraction: float) -> str:
    """Format a difference of fractions in percentage points: 0, +2."""
    points = round(100 * fraction, 3)
    return "0" if points == 0 else f"{points:+g}".replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    """Format a number with three significant digits: 768, 1.33 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # with three digits, larger values round to at least 1 of this unit
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
