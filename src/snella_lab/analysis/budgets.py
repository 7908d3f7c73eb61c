"""Budget plots: sparsity by layer in the saved adapter, and sparsity and importance by layer during training.

The budget of a matrix is the number of its weights that an update may change. Figure and equation numbers refer to
the SNELLA paper (arXiv 2510.24037).
"""

from __future__ import annotations

import math
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
    integer_axis,
    new_figure,
    new_panels,
    percent_axis,
    shortened,
)
from snella_lab.analysis.plot import Plot, Row, grouped, in_order_of_depth, run_labels
from snella_lab.style import style_of

Layers = Literal["block", "matrix"]
"""Layer granularity: backbone blocks or single matrices."""
METRIC_NAMES = {
    "sensitivity": "Sensitivity",
    "magnitude": "Magnitude",
    "delta_magnitude": "W-Magnitude",
    "delta_mean_magnitude": "mean W-Magnitude",
}
"""The paper's names for importance metrics."""
_MAX_STEPS = 6
"""Maximum number of allocations drawn per run."""


@dataclass(frozen=True)
class BudgetedRun:
    """Budgets of a run.

    Attributes:
        label: Short name.
        allocation: Contents of `allocation.json`.
        budgets: Budget of each matrix, from the saved adapter if it has budgets; otherwise, from `allocation.json`.
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
        return METRIC_NAMES.get(name, name)

    def layers(self, by: Layers) -> dict[str, list[MatrixInfo]]:
        """Return the matrices of each layer (a block or a single matrix) in model order.

        Matrices outside blocks form the last block, `–`.
        """
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
            f"run {run} (method {info.method!r}) has no weight budgets in allocation.json; the methods snella, "
            "snella-matched and snell write them at the end of training"
        )
    adapter = read_adapter(run)
    budgets = current_budgets(adapter, allocation)
    return BudgetedRun(label, allocation, budgets, adapter.config if adapter else {})


def allocation(runs: Sequence[str | Path], *, by: Layers = "block") -> list[Plot]:
    """Plot the sparsity of each layer's update and the linear trend over layers, one panel per run (Figure 10).

        sparsity[l] = 1 − budget[l] / weights[l],   trend[l] = intercept + slope·l by least squares over the layers

    Layers are numbered consecutively, whatever the indices of their blocks.

    Returns:
        One plot. Its table has one row per layer and run. The additional table `allocation-trend` contains the slope
        and intercept of each run.

    Raises:
        FileNotFoundError: If a folder contains no run.
        ValueError: If a run has no budgets.
    """
    budgeted_runs = [read_budgeted_run(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    rows: list[Row] = []
    trends: list[Row] = []
    for run in budgeted_runs:
        layer_rows = layer_sparsities(run, run.budgets, by)
        positions = [row["position"] for row in layer_rows]
        slope, intercept = linear_trend(positions, [row["sparsity"] for row in layer_rows])
        rows += [{**row, "trend": intercept + slope * row["position"]} for row in layer_rows]
        trends.append({"run": run.label, "layers": len(layer_rows), "intercept": intercept, "slope": slope})
    notes = [f"{row['run']}: {100 * row['slope']:+.2f} percentage points of sparsity per layer" for row in trends]
    return [Plot("allocation", rows, partial(_draw_allocation, rows, by), notes, {"trend": trends})]


def layer_sparsities(run: BudgetedRun, budgets: Mapping[str, int], by: Layers) -> list[dict[str, Any]]:
    """Return the number of weights, the budget and the sparsity of each layer, given the budget of each matrix."""
    rows = []
    for position, (layer, matrices) in enumerate(run.layers(by).items()):
        weights = sum(matrix.size for matrix in matrices)
        budget = sum(budgets[matrix.name] for matrix in matrices)
        row = {"run": run.label, "layer": layer, "position": position, "weights": weights, "budget": budget}
        rows.append({**row, "sparsity": 1 - budget / weights})
    return rows


def evolution(runs: Sequence[str | Path], *, by: Layers = "block") -> list[Plot]:
    """Plot the importance and sparsity of each layer (Figure 16) and the total budget (Figure 6) during training.

    The importance of a layer is the mean importance of its matrices.

    Returns:
        Two plots. The table of `evolution` has one row per layer and recorded allocation. The figure shows at most six
        allocations per run, and each run in a separate column of panels. The table of `budget` has one row per
        allocation, with the scheduled budget.

    Raises:
        FileNotFoundError: If a folder contains no run.
        ValueError: If a run has no budgets or no recorded allocations.
    """
    budgeted_runs = [read_budgeted_run(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    for run in budgeted_runs:
        if not run.allocation.history:
            raise ValueError(f"run {run.label} has no recorded allocations in allocation.json")
    rows: list[Row] = []
    totals: list[Row] = []
    for run in budgeted_runs:
        for step in run.allocation.history:
            rows += _layer_rows(run, step, by)
        totals += budget_rows(run)
    metrics = {run.label: run.metric for run in budgeted_runs}
    return [
        Plot("evolution", rows, partial(_draw_evolution, rows, metrics, by)),
        Plot("budget", totals, partial(_draw_budgets, totals, budgeted_runs)),
    ]


def _layer_rows(run: BudgetedRun, step: AllocationStep, by: Layers) -> list[Row]:
    """Return the sparsity and importance of each layer after an allocation."""
    layers = run.layers(by)
    rows: list[Row] = []
    for layer_row in layer_sparsities(run, step.budgets, by):
        matrices = layers[layer_row["layer"]]
        importances = [step.importance.get(matrix.name, np.nan) for matrix in matrices]  # NaN if not recorded
        rows.append(
            {
                "run": run.label,
                "metric": run.metric,
                "step": step.step,
                "layer": layer_row["layer"],
                "position": layer_row["position"],
                "sparsity": layer_row["sparsity"],
                "importance": float(np.mean(importances)),
            }
        )
    return rows


def budget_rows(run: BudgetedRun) -> list[Row]:
    """Return the total budget after each allocation, and the scheduled budget `b_t` (eq. 12)."""
    total_weights = run.allocation.total_weights
    target = run.allocation.target_budget
    initial_budget = run.allocation.history[0].budget
    schedule = str(run.settings.get("schedule", "cubic"))
    return [
        {
            "run": run.label,
            "step": step.step,
            "t": step.t,
            "total": step.total,
            "budget": step.budget,
            "share": step.budget / total_weights,
            "scheduled": budget_at(step.t, step.total, initial_budget, target, schedule),
        }
        for step in run.allocation.history
    ]


def _draw_allocation(rows: Sequence[Row], by: Layers) -> Figure:
    """Draw one panel per run: a bar for the sparsity of each layer, and the linear trend."""
    runs = grouped(rows, "run")
    columns = min(len(runs), 3)
    max_layers = max(map(len, runs.values()))
    pixels_per_layer = 16 if max_layers <= 32 else 5
    width = max(260, 60 + pixels_per_layer * max_layers)
    panel_rows = math.ceil(len(runs) / columns)
    titles = [shortened(label, width // 9) for label in runs]  # about 9 pixels per character
    figure, panels = new_panels(width * columns, 200 * panel_rows + 50, titles, columns, sharey=True)
    for axes, run_rows in zip(panels, runs.values(), strict=True):
        positions = [row["position"] for row in run_rows]
        axes.bar(positions, [row["sparsity"] for row in run_rows], width=0.8, color=ACCENT)
        axes.plot(positions, [row["trend"] for row in run_rows], color=WARM, linewidth=2.2)
        axes.grid(False, axis="x")
        axes.set_ylim(0, 1.02)
        percent_axis(axes)
        _layer_axis(axes, run_rows, by)
    for axes in panels[::columns]:
        axes.set_ylabel("sparsity")
    bar, line = panels[0].containers[0], panels[0].lines[0]
    add_legend(figure, [bar, line], ["fraction of unchanged weights", "linear trend"])  # type: ignore[list-item]
    return figure


def _draw_evolution(rows: Sequence[Row], metrics: Mapping[str, str], by: Layers) -> Figure:
    """Draw one column per run, importance above sparsity, with one line per allocation, from light to dark."""
    columns = len(metrics)
    titles = [f"{shortened(label, 20)}: {metric}" for label, metric in metrics.items()]
    no_titles = [""] * columns
    figure, panels = new_panels(
        max(300 * columns, 430), 470, [*titles, *no_titles], columns, sharex="col", sharey=False
    )
    handles: list[Line2D] = []
    step_names: list[str] = []
    for column, run_rows in enumerate(grouped(rows, "run").values()):
        steps = sorted({row["step"] for row in run_rows})
        if len(steps) > _MAX_STEPS:
            steps = [steps[index] for index in np.linspace(0, len(steps) - 1, _MAX_STEPS).round().astype(int)]
        importance_axes = panels[column]
        sparsity_axes = panels[column + columns]
        for number, step in enumerate(steps):
            step_rows = [row for row in run_rows if row["step"] == step]
            shade = 0.18 + 0.82 * number / max(len(steps) - 1, 1)  # the color map starts transparent
            color = to_hex(accent_map()(shade), keep_alpha=True)
            positions = [row["position"] for row in step_rows]
            # a log scale cannot show 0
            importance = [row["importance"] if row["importance"] > 0 else np.nan for row in step_rows]
            style: dict[str, Any] = {"color": color, "linewidth": 1.8, "marker": "o", "markersize": 3}
            importance_axes.plot(positions, importance, **style)
            (line,) = sparsity_axes.plot(positions, [row["sparsity"] for row in step_rows], **style)
            if column == 0:
                handles.append(line)
                step_names.append("start" if step == 0 else f"step {step}")
        if any(np.isfinite(line.get_ydata()).any() for line in importance_axes.lines):
            log_axis(importance_axes)
        sparsity_axes.set_ylim(-0.02, 1.02)
        percent_axis(sparsity_axes)
        _layer_axis(sparsity_axes, [row for row in run_rows if row["step"] == steps[-1]], by)
        importance_axes.tick_params(labelbottom=False)
    panels[0].set_ylabel("importance (log scale)")
    panels[columns].set_ylabel("sparsity")
    if columns > 1 and len(step_names) > 1:  # the steps of other runs may differ
        step_names = ["first", *[""] * (len(step_names) - 2), "last"]
    add_legend(figure, handles, step_names, columns=min(3 * columns, _MAX_STEPS))
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
        initial_budget = run_rows[0]["budget"]
        schedule = str(run.settings.get("schedule", "cubic"))
        last = run_rows[-1]
        times = np.linspace(0, last["total"], 201)
        steps_per_time = last["step"] / last["t"] if last["t"] else 1.0
        curve: list[float] = []
        for t in times:  # in thousandths, because `budget_at` takes integers
            budget = budget_at(int(1000 * t), 1000 * last["total"], initial_budget, target, schedule)
            curve.append(budget / total_weights)
        axes.plot(times * steps_per_time, curve, color=color, linewidth=1, linestyle=DASHED)
        style: dict[str, Any] = {"color": color, "linewidth": 2, "marker": marker if len(run_rows) <= 30 else ""}
        steps = [row["step"] for row in run_rows]
        fractions = [row["share"] for row in run_rows]
        handles += axes.step(steps, fractions, where="post", markersize=5, **style)
    axes.set_ylim(0, 1.05)
    percent_axis(axes)
    axes.set(xlabel="optimizer step", ylabel="budget / adapted weights")
    handles.append(Line2D([], [], color=MUTED, linewidth=1, linestyle=DASHED))
    add_legend(figure, handles, [*(shortened(run.label, 24) for run in runs), "schedule"])
    return figure


def _layer_axis(axes: Axes, rows: Sequence[Row], by: Layers) -> None:
    """Set the ticks and label of the layer axis."""
    integer_axis(axes, "block" if by == "block" else "matrix (in model order)")
    if by == "block":
        names = {row["position"]: row["layer"] for row in rows}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(round(value), "")))
