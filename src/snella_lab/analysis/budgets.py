"""Budget plots: sparsity by layer in the saved adapter, and sparsity and importance by layer during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from snella.allocation import budget_at
from snella_app.records.record import read, read_if_present
from snella_app.records.run import Allocation, AllocationStep, MatrixInfo, RunInfo
from snella_app.report.allocation import linear_trend, log_axis
from snella_app.report.inspect import current_budgets, read_adapter
from snella_app.report.style import (
    ACCENT,
    DASHED,
    MUTED,
    WARM,
    accent_map,
    add_legend,
    epoch_axis,
    new_figure,
    new_panels,
    percent_axis,
    shortened,
)
from snella_lab.analysis.plot import Plot, Row, grouped, in_order_of_depth, run_labels
from snella_lab.style import style_of

Layers = Literal["block", "matrix"]
"""Layer granularity: backbone blocks or single matrices."""
_METRIC_NAMES = {
    "sensitivity": "Sensitivity",
    "magnitude": "Magnitude",
    "delta_magnitude": "W-Magnitude",
    "delta_mean_magnitude": "mean W-Magnitude",
}
_MAX_STEPS = 6


@dataclass(frozen=True)
class BudgetedRun:
    """Budgets of a run.

    Attributes:
        label: Short name.
        allocation: Contents of `allocation.json`.
        budgets: Budget of each matrix, from the saved adapter or else `allocation.json`.
        settings: Adapter settings, such as `importance` and `schedule`.
    """

    label: str
    allocation: Allocation
    budgets: Mapping[str, int]
    settings: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """The paper's name for the importance metric."""
        name = str(self.settings.get("importance", "sensitivity"))
        return _METRIC_NAMES.get(name, name)

    def layers(self, by: Layers) -> dict[str, list[MatrixInfo]]:
        """Group the matrices by block or matrix, in model order; the last block, `–`, holds those outside blocks."""
        layers: dict[str, list[MatrixInfo]] = {}
        for matrix in self.allocation.matrices:
            block = "–" if matrix.depth is None else str(matrix.depth)
            layers.setdefault(block if by == "block" else matrix.name, []).append(matrix)
        return in_order_of_depth(layers) if by == "block" else layers


def read_budgeted_run(run: str | Path, label: str) -> BudgetedRun:
    """Read the budgets of a run.

    Raises:
        FileNotFoundError: If the folder contains no run.
        ValueError: If the method has no budgets or a file is damaged.
    """
    info = read(RunInfo, run)
    allocation = read_if_present(Allocation, run)
    if allocation is None or not allocation.matrices:
        raise ValueError(
            f"run must have weight budgets (methods snella, snella-matched and snell), got {run} with method "
            f"{info.method!r} and no budgets in allocation.json, which is written at the end of training"
        )
    adapter = read_adapter(run)
    budgets = current_budgets(adapter, allocation)
    return BudgetedRun(label, allocation, budgets, adapter.config if adapter else {})


def allocation(runs: Sequence[str | Path], *, by: Layers = "block") -> list[Plot]:
    """Plot the sparsity of each layer's update with its linear trend, one panel per run (Figure 10).

        sparsity[l] = 1 − budget[l] / weights[l],   trend[l] = intercept + slope·l by least squares over the layers

    Returns:
        One plot with a row for each layer and run; `allocation-trend` contains the slope and intercept of each run.

    Raises:
        FileNotFoundError: If a folder contains no run.
        ValueError: If a run has no budgets.
    """
    budgeted_runs = [read_budgeted_run(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    rows: list[Row] = []
    trends: list[Row] = []
    for run in budgeted_runs:
        layers = layer_sparsities(run, run.budgets, by)
        slope, intercept = linear_trend([row["sparsity"] for row in layers])
        rows += [{**row, "trend": intercept + slope * row["position"]} for row in layers]
        trends.append({"run": run.label, "layers": len(layers), "intercept": intercept, "slope": slope})
    notes = [f"{row['run']}: {100 * row['slope']:+.2f} points of sparsity per layer" for row in trends]
    return [Plot("allocation", rows, partial(_draw_allocation, rows, by), notes, {"trend": trends})]


def layer_sparsities(run: BudgetedRun, budgets: Mapping[str, int], by: Layers) -> list[dict[str, Any]]:
    """Return weights, budget and sparsity of each layer, given the budget of each matrix."""
    rows = []
    for position, (layer, matrices) in enumerate(run.layers(by).items()):
        weights = sum(m.size for m in matrices)
        budget = sum(budgets[m.name] for m in matrices)
        row = {"run": run.label, "layer": layer, "position": position, "weights": weights, "budget": budget}
        rows.append({**row, "sparsity": 1 - budget / weights})
    return rows


def evolution(runs: Sequence[str | Path], *, by: Layers = "block") -> list[Plot]:
    """Plot the importance and sparsity of each layer (Figure 16) and the total budget (Figure 6) during training.

    The importance of a layer is the mean importance of its matrices. Each run has its own column of panels.

    Returns:
        Two plots. `evolution` has a row for each layer and recorded allocation; its figure shows at most six
        allocations. `budget` has a row for each allocation, with the scheduled budget.

    Raises:
        FileNotFoundError: If a folder contains no run.
        ValueError: If a run has no budgets or no recorded allocations.
    """
    budgeted_runs = [read_budgeted_run(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    for run in budgeted_runs:
        if not run.allocation.history:
            raise ValueError(f"run must have recorded allocations, got none in allocation.json of {run.label}")
    rows = [row for run in budgeted_runs for step in run.allocation.history for row in _layer_rows(run, step, by)]
    totals = [row for run in budgeted_runs for row in budget_rows(run)]
    return [
        Plot("evolution", rows, partial(_draw_evolution, rows, {run.label: run.metric for run in budgeted_runs}, by)),
        Plot("budget", totals, partial(_draw_budgets, totals, budgeted_runs)),
    ]


def _layer_rows(run: BudgetedRun, step: AllocationStep, by: Layers) -> list[Row]:
    """Return the sparsity and importance of each layer after an allocation."""
    layers = run.layers(by)
    rows: list[Row] = []
    for layer in layer_sparsities(run, step.budgets, by):
        importances = [step.importance.get(m.name, np.nan) for m in layers[layer["layer"]]]
        rows.append(
            {
                "run": run.label,
                "metric": run.metric,
                "step": step.step,
                "layer": layer["layer"],
                "position": layer["position"],
                "sparsity": layer["sparsity"],
                "importance": float(np.mean(importances)),
            }
        )
    return rows


def budget_rows(run: BudgetedRun) -> list[Row]:
    """Return the total budget after each allocation, and the scheduled budget `b_t` (eq. 12)."""
    total_weights, target = run.allocation.total_weights, run.allocation.target_budget
    first = run.allocation.history[0].budget
    schedule = str(run.settings.get("schedule", "cubic"))
    return [
        {
            "run": run.label,
            "step": step.step,
            "t": step.t,
            "total": step.total,
            "budget": step.budget,
            "share": step.budget / total_weights,
            "scheduled": budget_at(step.t, step.total, first, target, schedule),
        }
        for step in run.allocation.history
    ]


def _draw_allocation(rows: Sequence[Row], by: Layers) -> Figure:
    """Draw one panel per run: a bar for the sparsity of each layer, and the linear trend."""
    runs = grouped(rows, "run")
    columns = min(len(runs), 3)
    max_layers = max(map(len, runs.values()))
    width = max(260, 60 + (16 if max_layers <= 32 else 5) * max_layers)
    panel_rows = -(-len(runs) // columns)
    titles = [shortened(label, width // 9) for label in runs]
    figure, panels = new_panels(width * columns, 200 * panel_rows + 50, titles, columns, sharey=True)
    for axes, layers in zip(panels, runs.values(), strict=True):
        positions = [row["position"] for row in layers]
        axes.bar(positions, [row["sparsity"] for row in layers], width=0.8, color=ACCENT)
        axes.plot(positions, [row["trend"] for row in layers], color=WARM, linewidth=2.2)
        axes.grid(False, axis="x")
        axes.set_ylim(0, 1.02)
        percent_axis(axes)
        _layer_axis(axes, layers, by)
    for axes in panels[::columns]:
        axes.set_ylabel("sparsity")
    bar, line = panels[0].containers[0], panels[0].lines[0]
    add_legend(figure, [bar, line], ["fraction of unchanged weights", "linear trend"])  # type: ignore[list-item]
    return figure


def _draw_evolution(rows: Sequence[Row], metrics: Mapping[str, str], by: Layers) -> Figure:
    """Draw one column per run, importance above sparsity, with one line per step from light to dark."""
    labels = list(metrics)
    titles = [f"{shortened(label, 20)}: {metrics[label]}" for label in labels]
    figure, panels = new_panels(
        max(300 * len(labels), 430), 470, [*titles, *[""] * len(labels)], len(labels), sharex="col", sharey=False
    )
    handles: list[Line2D] = []
    names: list[str] = []
    for column, run_rows in enumerate(grouped(rows, "run").values()):
        steps = sorted({row["step"] for row in run_rows})
        if len(steps) > _MAX_STEPS:
            steps = [steps[index] for index in np.linspace(0, len(steps) - 1, _MAX_STEPS).round().astype(int)]
        top = panels[column]
        bottom = panels[column + len(labels)]
        for number, step in enumerate(steps):
            step_rows = [row for row in run_rows if row["step"] == step]
            color = to_hex(accent_map()(0.18 + 0.82 * number / max(len(steps) - 1, 1)), keep_alpha=True)
            positions = [row["position"] for row in step_rows]
            importance = [row["importance"] if row["importance"] > 0 else np.nan for row in step_rows]
            style: dict[str, Any] = {"color": color, "linewidth": 1.8, "marker": "o", "markersize": 3}
            top.plot(positions, importance, **style)
            (line,) = bottom.plot(positions, [row["sparsity"] for row in step_rows], **style)
            if column == 0:
                handles.append(line)
                names.append("start" if step == 0 else f"step {step}")
        if any(np.isfinite(line.get_ydata()).any() for line in top.lines):
            log_axis(top)
        bottom.set_ylim(-0.02, 1.02)
        percent_axis(bottom)
        _layer_axis(bottom, [row for row in run_rows if row["step"] == steps[-1]], by)
        top.tick_params(labelbottom=False)
    panels[0].set_ylabel("importance (log scale)")
    panels[len(labels)].set_ylabel("sparsity")
    if len(labels) > 1:  # runs may have different steps
        names = ["first", *[""] * (len(names) - 2), "last"] if len(names) > 1 else names
    add_legend(figure, handles, names, columns=min(3 * len(labels), _MAX_STEPS))
    return figure


def _draw_budgets(rows: Sequence[Row], runs: Sequence[BudgetedRun]) -> Figure:
    """Draw the total budget of each run as a step curve and its schedule as a dashed curve."""
    figure, axes = new_figure(560, 340, "Total budget")
    handles = []
    for number, run in enumerate(runs):
        run_rows = [row for row in rows if row["run"] == run.label]
        color, marker = style_of(number)
        total_weights = run.allocation.total_weights
        target = run.allocation.target_budget
        first = run_rows[0]["budget"]
        schedule = str(run.settings.get("schedule", "cubic"))
        last = run_rows[-1]
        grid = np.linspace(0, last["total"], 201)
        scale = last["step"] / last["t"] if last["t"] else 1.0
        curve = [budget_at(int(1000 * t), 1000 * last["total"], first, target, schedule) / total_weights for t in grid]
        axes.plot(grid * scale, curve, color=color, linewidth=1, linestyle=DASHED)
        style: dict[str, Any] = {"color": color, "linewidth": 2, "marker": marker if len(run_rows) <= 30 else ""}
        steps, fractions = [row["step"] for row in run_rows], [row["share"] for row in run_rows]
        handles += axes.step(steps, fractions, where="post", markersize=5, **style)
    axes.set_ylim(0, 1.05)
    percent_axis(axes)
    axes.set(xlabel="optimizer step", ylabel="budget / adapted weights")
    handles.append(Line2D([], [], color=MUTED, linewidth=1, linestyle=DASHED))
    add_legend(figure, handles, [*(shortened(run.label, 24) for run in runs), "schedule"])
    return figure


def _layer_axis(axes: Axes, rows: Sequence[Row], by: Layers) -> None:
    """Set the ticks and label of the layer axis."""
    epoch_axis(axes, "block" if by == "block" else "matrix (in model order)")
    if by == "block":
        names = {row["position"]: row["layer"] for row in rows}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(round(value), "")))
