"""Figures of the weight budget: final allocation, history, and importance.

The budget of a matrix is the number of entries of its update that can be nonzero, and its sparsity is the fraction of
entries that must be zero. A matrix with budget 0 is frozen. By default, the total budget is distributed among the
matrices by importance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from snella_app.records.run import Allocation, AllocationStep, MatrixInfo, Metrics
from snella_app.report.style import (
    ACCENT,
    COLORS,
    DASHED,
    FIGURE_SIZE,
    PANEL,
    WARM,
    accent_map,
    add_legend,
    integer_axis,
    new_figure,
    percent_axis,
    plot_line,
    scale_bar,
    shortened,
    text_on,
)
from snella_app.text import points_text

MAX_NUMBERED_BLOCKS = 48
"""Maximum number of blocks for which the sparsity map shows numbers."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """Totals of the matrices with the same type and block index.

    A cell contains several matrices if a block has several of the same type.

    Attributes:
        size: Number of weights.
        budget: Number of update entries that can be nonzero.
        frozen: Number of matrices with budget 0.
        count: Number of matrices.
    """

    size: int
    budget: int
    frozen: int
    count: int

    @property
    def density(self) -> float:
        """Fraction of update entries that can be nonzero."""
        return self.budget / self.size if self.size else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of update entries that must be zero."""
        return 1.0 - self.density

    @property
    def is_frozen(self) -> bool:
        """True if all matrices are frozen."""
        return self.frozen == self.count


@dataclass(frozen=True)
class MatrixGrid:
    """Cells by `(kind, depth)`: the matrix type, and the index of the block, or None for matrices outside the blocks.

    Kinds are in forward order. Depths are in ascending order, with None last.
    """

    kinds: list[str]
    depths: list[int | None]
    cells: dict[tuple[str, int | None], Cell]

    @property
    def frozen_count(self) -> int:
        """Number of matrices with budget 0."""
        return sum(cell.frozen for cell in self.cells.values())


def group_matrices(matrices: Sequence[MatrixInfo], budgets: Mapping[str, int]) -> MatrixGrid:
    """Group matrices and their budgets by type and block index."""
    groups: dict[tuple[str, int | None], list[MatrixInfo]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.kind, matrix.depth), []).append(matrix)
    cells: dict[tuple[str, int | None], Cell] = {}
    for key, group in groups.items():
        group_budgets = [budgets[matrix.name] for matrix in group]
        cells[key] = Cell(
            size=sum(matrix.size for matrix in group),
            budget=sum(group_budgets),
            frozen=group_budgets.count(0),
            count=len(group),
        )
    depths = {depth for _, depth in groups}
    numbered: list[int | None] = list(sorted(depth for depth in depths if depth is not None))
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    return MatrixGrid(kinds, numbered + ([None] if None in depths else []), cells)


def schedule_epochs(allocation: Allocation, metrics: Metrics | None, is_finished: bool) -> float | None:
    """Return the length of the budget schedule in epochs, or None if it is unknown.

    `AllocationStep.t` and `total` count epochs, or optimizer steps if `realloc_every` is a number of steps. In the
    latter case, the length is unknown before the run is finished.
    """
    if not allocation.history or metrics is None or not metrics.history:
        return None
    last = allocation.history[-1]
    epochs = metrics.history[-1].epoch
    if last.t == epochs:
        return last.total
    return epochs * last.total / last.t if is_finished and last.t else None


def adapter_step(allocation: Allocation, metrics: Metrics | None) -> AllocationStep | None:
    """Return the allocation in effect when the saved adapter was evaluated.

    This is the last allocation with the total budget recorded for the adapter's epoch. If several allocations have this
    total (constant schedule), allocations after that epoch are excluded. Without a recorded budget, the last allocation
    is returned.
    """
    if not allocation.history:
        return None
    rows = {} if metrics is None else {row.epoch: row for row in metrics.history}
    best = None if metrics is None or metrics.adapter_epoch is None else rows.get(metrics.adapter_epoch)
    if best is None or best.budget is None:
        return allocation.history[-1]
    matching = [entry for entry in allocation.history if entry.budget == best.budget]
    last_epoch = max(1, *rows)  # at least 1, because rows may contain only epoch 0, before the first step
    last_step = allocation.history[-1].step
    reached = [entry for entry in matching if entry.step * last_epoch <= best.epoch * last_step]
    return (reached or matching or allocation.history)[-1]


def sparsity_map(matrices: Sequence[MatrixInfo], budgets: Mapping[str, int]) -> Figure:
    """Draw the sparsity of each matrix by block (x) and type (y). A cross marks frozen matrices.

    sparsity = 1 - budget / size, in percent. Stronger colors mean lower sparsity.
    """
    grid = group_matrices(matrices, budgets)
    columns, rows = len(grid.depths), len(grid.kinds)
    numbered = columns <= MAX_NUMBERED_BLOCKS
    side = 42 if numbered else 14
    names = [shortened(kind, 24) for kind in grid.kinds]
    width = max(60 + 7.5 * max(map(len, names), default=1) + side * columns, 360)
    figure, axes = new_figure(width, 130 + 34 * rows)
    axes.grid(False)
    densities = np.full((rows, columns), np.nan)
    for (kind, depth), cell in grid.cells.items():
        i, j = grid.kinds.index(kind), grid.depths.index(depth)
        densities[i, j] = cell.density
        if cell.is_frozen:
            axes.add_patch(
                Rectangle((j - 0.44, i - 0.42), 0.88, 0.84, fill=False, edgecolor=WARM, linewidth=1.6, zorder=3)
            )
            axes.text(j, i, "×", ha="center", va="center", color=WARM, fontsize=15, fontweight="bold")
        elif numbered:
            axes.text(j, i, _percent(cell.sparsity), ha="center", va="center", color=text_on(cell.density), fontsize=12)
    axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(densities),
        cmap=accent_map(),
        vmin=0,
        vmax=1,
        edgecolors=PANEL,
        linewidth=1.5,
    )
    tick_step = 1 if numbered else math.ceil(24 / side)
    ticks = range(0, columns, tick_step)
    axes.set_xticks(ticks, [_group_name(grid.depths[j]) for j in ticks])
    axes.set_yticks(range(rows), names)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel="block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    scale_bar(figure, axes, "sparsity  (× = frozen, budget 0)", {0.0: "100%", 0.5: "50%", 1.0: "0%"})
    return figure


def _group_name(group: str | int | None) -> str:
    """Return the label of a matrix type or block index, or a dash for matrices outside the blocks (None)."""
    return "–" if group is None else str(group)


def linear_trend(positions: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line through the points."""
    if len(values) < 2:
        return 0.0, float(values[0])
    slope, intercept = np.polyfit(positions, values, 1)
    return float(slope), float(intercept)


def block_trend(matrices: Sequence[MatrixInfo], budgets: Mapping[str, int]) -> Figure | None:
    """Draw a bar chart of sparsity by block, with the trend over the blocks (Figure 10 of arXiv 2510.24037).

    Returns None for fewer than two blocks.
    """
    blocks: dict[int, list[MatrixInfo]] = {}
    for matrix in matrices:
        if matrix.depth is not None:
            blocks.setdefault(matrix.depth, []).append(matrix)
    if len(blocks) < 2:
        return None
    depths = sorted(blocks)
    sparsities: list[float] = []
    for depth in depths:
        budget = sum(budgets[matrix.name] for matrix in blocks[depth])
        size = sum(matrix.size for matrix in blocks[depth])
        sparsities.append(1 - budget / size)
    slope, intercept = linear_trend(depths, sparsities)
    figure, axes = new_figure(*FIGURE_SIZE, "Sparsity by block")
    bars = axes.bar(depths, sparsities, width=0.8, color=ACCENT)
    (line,) = axes.plot(depths, [intercept + slope * depth for depth in depths], color=WARM, linewidth=2.2)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 1.02)
    integer_axis(axes, "block")
    percent_axis(axes)
    labels = ["unchanged weights", f"trend, {points_text(slope, 2)} percentage points per block"]
    add_legend(figure, [bars, line], labels)  # type: ignore[list-item]
    return figure


def budget_curve(allocation: Allocation, epochs: float | None) -> Figure:
    """Draw the total budget b_t and the target b_T over the epochs, as fractions of the adapted weights.

    Args:
        allocation: The run's allocation.
        epochs: Length of the schedule in epochs. None labels the axis with the allocator's time `t`, in epochs or
            optimizer steps.
    """
    figure, axes = new_figure(*FIGURE_SIZE, "Total budget")
    times = _times(allocation, epochs)
    total = allocation.total_weights
    handles = plot_line(axes, times, [entry.budget / total for entry in allocation.history], ACCENT)
    handles.append(axes.axhline(allocation.target_budget / total, color=WARM, linewidth=1.4, linestyle=DASHED))
    axes.set_ylim(0, 1.05)
    percent_axis(axes)
    axes.set_ylabel("share of adapted weights")
    _time_axis(axes, times, epochs)
    add_legend(figure, handles, ["budget", "target"])
    return figure


def budget_shares(allocation: Allocation, epochs: float | None, *, by_block: bool = False) -> Figure:
    """Draw a stacked plot of the budget shares by matrix type or block. Arguments are as for `budget_curve`."""
    grid = group_matrices(allocation.matrices, {matrix.name: matrix.size for matrix in allocation.matrices})
    groups: list[str | int | None] = [*(grid.depths if by_block else grid.kinds)]
    group_indices: dict[str, int] = {}
    for matrix in allocation.matrices:
        group_indices[matrix.name] = groups.index(matrix.depth if by_block else matrix.kind)
    totals = np.zeros((len(groups), len(allocation.history)))
    for column, entry in enumerate(allocation.history):
        for name, budget in entry.budgets.items():
            totals[group_indices[name], column] += budget
    shares = totals / np.maximum(totals.sum(axis=0), 1)
    title = f"Budget share by {'block' if by_block else 'matrix type'}"
    figure, axes = new_figure(FIGURE_SIZE[0], FIGURE_SIZE[1] + 25, title)
    times = _times(allocation, epochs)
    colors = [COLORS[i % len(COLORS)] for i in range(len(groups))]
    if by_block:
        depth_scale = accent_map()
        last = max(len(groups) - 1, 1)
        positions = [0.12 + 0.88 * i / last for i in range(len(groups))]
        colors = [to_hex(depth_scale(position), True) for position in positions]
    if len(times) == 1:  # a stacked area needs two points
        times = [times[0], times[0] + 1]
        shares = np.repeat(shares, 2, axis=1)
    handles = axes.stackplot(times, shares, colors=colors, edgecolor=PANEL, linewidth=0.8)
    axes.grid(False)
    axes.set(xlim=(times[0], times[-1]), ylim=(0, 1))
    percent_axis(axes)
    _time_axis(axes, times, epochs)
    names = [shortened(_group_name(group), 16) for group in groups]
    if by_block and len(groups) > 16:  # colors are ordered by block, so label only the ends
        handles, names = [handles[0], handles[-1]], [names[0], names[-1]]
    add_legend(figure, handles, names, columns=8 if by_block else 3)
    return figure


def frozen_curve(allocation: Allocation, epochs: float | None) -> Figure:
    """Draw the numbers of frozen (budget 0) and full (budget = size) matrices. Arguments are as for `budget_curve`."""
    title = f"Matrices with zero and full budget (of {len(allocation.matrices)})"
    figure, axes = new_figure(FIGURE_SIZE[0], FIGURE_SIZE[1] + 25, title)
    times = _times(allocation, epochs)
    sizes = {matrix.name: matrix.size for matrix in allocation.matrices}
    frozen: list[int] = []
    full: list[int] = []
    for entry in allocation.history:
        frozen.append(sum(budget == 0 for budget in entry.budgets.values()))
        full.append(sum(budget == sizes[name] for name, budget in entry.budgets.items()))
    handles = [*plot_line(axes, times, frozen, WARM), *plot_line(axes, times, full, ACCENT)]
    axes.set_ylim(0, 1.05 * len(allocation.matrices))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_ylabel("matrices")
    _time_axis(axes, times, epochs)
    add_legend(figure, handles, ["frozen: budget 0", "full: budget = size"])
    return figure


def has_importance(allocation: Allocation) -> bool:
    """Return whether any positive importance is recorded."""
    return any(_is_drawn(value) for entry in allocation.history for value in entry.importance.values())


def importance_curves(allocation: Allocation, epochs: float | None) -> Figure:
    """Draw the importance of each matrix (faint) and the mean of each matrix type (strong) on a log scale.

    Values that are not positive and finite leave gaps. Arguments are as for `budget_curve`.
    """
    figure, axes = new_figure(760, 400, "Importance")
    times = _times(allocation, epochs)
    handles, labels = [], []
    lines_by_kind: dict[str, list[list[float]]] = {}
    for matrix in allocation.matrices:
        line: list[float] = []
        for entry in allocation.history:
            value = entry.importance.get(matrix.name, math.nan)
            line.append(value if _is_drawn(value) else math.nan)
        lines_by_kind.setdefault(matrix.kind, []).append(line)
    for i, (kind, lines) in enumerate(lines_by_kind.items()):
        color = COLORS[i % len(COLORS)]
        axes.plot(times, np.asarray(lines).T, color=color, linewidth=0.8, alpha=0.3)
        counts = np.isfinite(lines).sum(axis=0)
        mean = np.nansum(lines, axis=0) / np.where(counts, counts, math.nan)
        axes.plot(times, mean, color=color, linewidth=2.4, marker="o" if len(times) <= 30 else "", ms=4)
        handles.append(Line2D([], [], color=color, linewidth=2.4))
        labels.append(shortened(kind, 16))
    log_axis(axes)
    axes.set_ylabel("importance (log scale)")
    _time_axis(axes, times, epochs)
    add_legend(figure, handles, labels, columns=6)
    return figure


def _times(allocation: Allocation, epochs: float | None) -> list[float]:
    """Return the time of each allocation in epochs, or the schedule's time `t` if `epochs` is None."""
    if epochs is None:
        return [entry.t for entry in allocation.history]
    return [entry.t / entry.total * epochs for entry in allocation.history]


def _time_axis(axes: Axes, times: list[float], epochs: float | None) -> None:
    """Label the x-axis in the unit of `_times`."""
    if times[0] == times[-1]:
        axes.set_xlim(times[0] - 1, times[0] + 1)
    integer_axis(axes, "schedule time t" if epochs is None else "epoch")


def _is_drawn(value: float) -> bool:
    """Return whether a log scale can show the value."""
    return math.isfinite(value) and value > 0


def log_axis(axes: Axes) -> None:
    """Make the y-axis logarithmic, with ticks at powers of ten and, for small ranges, at 2 and 5 times these powers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 50 else (1, 2, 5), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))


def _power_of_ten(value: float, _: object = None) -> str:
    """Format a tick of the log axis: 10⁻³, 2·10⁻³."""
    if value <= 0:
        return ""
    exponent = math.floor(math.log10(value) + 1e-9)  # rounding can lower the logarithm of a power of ten
    factor = round(value / 10.0**exponent)
    return ("" if factor == 1 else f"{factor}·") + "10" + str(exponent).translate(_SUPERSCRIPTS)


def _percent(share: float) -> str:
    """Format a fraction in percent without decimals. Fractions below 1 give at most 99, because 100 means frozen."""
    return "100" if share == 1 else str(min(round(100 * share), 99))
