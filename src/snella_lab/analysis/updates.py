"""Plots of weight updates: heat maps, singular values, and overlap between tasks.

An update is the matrix that a run adds to a weight matrix of the backbone. Figure and section numbers refer to the
SNELLA paper (arXiv 2510.24037).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from snella_app.methods import merge_trained, spec_of
from snella_app.methods.model_parts import is_inside
from snella_app.records.record import read_if_present
from snella_app.records.run import Allocation, MatrixInfo
from snella_app.report.allocation import log_axis
from snella_app.report.inspect import read_adapter
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
    scale_bar,
    shortened,
)
from snella_app.report.updates import MAX_CELLS, UpdateSource, adapter_updates, deepest_query, draw_updates, part_names
from snella_app.runs.model import load_run, make_backbone
from snella_lab.analysis.plot import Plot, Row, in_order_of_depth, run_labels
from snella_lab.style import style_of

_MAX_TICKS = 12
"""Maximum number of labeled blocks on an axis."""
_NOISE_FLOOR = 1e-7
"""Singular values below this fraction of the largest one are not drawn, since they are rounding errors of float32."""


@dataclass(frozen=True)
class RunUpdates:
    """Weight updates of a run.

    Attributes:
        label: Short name of the run.
        shapes: `[out, in]` of each matrix by name.
        infos: Entries of `allocation.json` by matrix name; empty if the run has no such file.
        compute: Function that returns the scaled update of a matrix by name, `[out, in]`, float32.
    """

    label: str
    shapes: Mapping[str, tuple[int, int]]
    infos: Mapping[str, MatrixInfo]
    compute: Callable[[str], Tensor]


def read_updates(run: str | Path, label: str) -> RunUpdates:
    """Read the weight updates of a run.

    Updates of SNELLA and plain LoRA are computed from the adapter alone, so the run may have any task. Updates of other
    methods are the differences between the merged model and the backbone, which require an image task.

    Raises:
        FileNotFoundError: If the run has no adapter or the folder contains no run.
        ValueError: If the method cannot be merged (e.g. prompt tuning) or changes no matrix outside the head.
    """
    adapter = read_adapter(run)
    if adapter is None:
        raise FileNotFoundError(f"run {run} has no adapter yet; choose a run that has finished an epoch")
    allocation = read_if_present(Allocation, run)
    infos = {} if allocation is None else {matrix.name: matrix for matrix in allocation.matrices}
    shapes, compute = adapter_updates(adapter, infos) or _backbone_differences(run)
    return RunUpdates(label, shapes, infos, compute)


def _backbone_differences(run: str | Path) -> UpdateSource:
    """Return the differences between the merged model and the backbone in all changed matrices outside the head."""
    loaded = load_run(run, device="cpu")
    head = spec_of(loaded.model).head
    merged = merge_trained(loaded.model).state_dict()
    before = make_backbone(loaded.info.backbone, loaded.task.name).state_dict()
    changed: dict[str, Tensor] = {}
    for key, value in before.items():
        is_matrix = key.endswith(".weight") and value.ndim >= 2 and not is_inside(key, head)
        if is_matrix and not torch.equal(value, merged[key]):
            difference = (merged[key].float() - value.float()).flatten(1)
            module = key.removesuffix(".weight")
            is_fused = module.endswith("qkv") and len(difference) % 3 == 0
            names = part_names(module, 3 if is_fused else 1, {})
            changed |= dict(zip(names, difference.chunk(len(names)), strict=True))
    if not changed:
        raise ValueError(f"run {run} changes no backbone matrix (method {loaded.info.method!r})")
    return {name: (len(value), value.shape[1]) for name, value in changed.items()}, changed.__getitem__


def choose_matrix(run_updates: Sequence[RunUpdates], name: str | None) -> str:
    """Return `name` if given; otherwise, the deepest query projection that all runs change.

    If the runs share no query projection, the deepest common matrix is returned.

    Raises:
        ValueError: If the runs share no matrix, or some run does not change `name`.
    """
    common = [matrix for matrix in run_updates[0].shapes if all(matrix in run.shapes for run in run_updates)]
    if not common:
        raise ValueError(f"no matrix is changed by all runs: {', '.join(run.label for run in run_updates)}")
    if name is not None:
        if name not in common:
            raise ValueError(f"matrix must be one that all runs change, e.g. {common[0]!r}, got {name!r}")
        return name
    return deepest_query(common)


def effective_rank(values: Tensor) -> float:
    """Return the effective rank `exp(−Σ p_i log p_i)`, `p_i = σ_i / Σ σ`, of singular values; 0 for a zero matrix.

    Source: Roy and Vetterli, 2007.
    """
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def rank_row(update: Tensor, values: Tensor | None = None) -> dict[str, Any]:
    """Return the size, density, Frobenius norm, largest entry, and ranks of an update.

    `rank` counts the singular values above the float32 rounding error of the largest one.

    Args:
        update: Update, `[m, n]`.
        values: Singular values of the update in descending order, float64; None to compute them.
    """
    values = torch.linalg.svdvals(update.double()) if values is None else values
    largest = float(values[0])
    tolerance = largest * max(update.shape) * torch.finfo(torch.float32).eps
    nonzeros = int(update.count_nonzero())
    squared_norm = values.square().sum()
    rank = 0
    stable_rank = 0.0
    if largest:
        rank = int((values > tolerance).sum())
        stable_rank = float(squared_norm / largest**2)
    return {
        "rows": len(update),
        "columns": update.shape[1],
        "nonzeros": nonzeros,
        "density": nonzeros / update.numel(),
        "norm": float(squared_norm.sqrt()),
        "largest_entry": float(update.abs().max()),
        "rank": rank,
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank,
    }


def update(runs: Sequence[str | Path], *, matrix: str | None = None) -> list[Plot]:
    """Plot each run's update of one matrix (Figure 12a), with singular values and effective ranks.

    Runs must use SNELLA or plain LoRA on any task, or another weight-changing method on an image task. `matrix`
    defaults to the deepest query projection (see `choose_matrix`).

    Returns:
        Two plots. The table of `update` has one row per run, with size, density, and ranks. The table of
        `update-spectrum` has one row per singular value; its additional table `update-spectrum-ranks` contains the
        ranks of the corresponding matrices of all blocks.

    Raises:
        FileNotFoundError: If a run has no adapter.
        ValueError: If a run changes no weight matrix or does not change `matrix`, or no matrix is changed by all runs.
    """
    run_updates = [read_updates(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    name = choose_matrix(run_updates, matrix)
    updates = {run.label: run.compute(name) for run in run_updates}
    singular_values = {label: torch.linalg.svdvals(value.double()) for label, value in updates.items()}
    rank_rows = {label: rank_row(value, singular_values[label]) for label, value in updates.items()}
    rows = [{"run": label, "matrix": name, **row} for label, row in rank_rows.items()]
    spectrum = [
        {"run": label, "matrix": name, "index": index, "singular_value": value}
        for label, values in singular_values.items()
        for index, value in enumerate(values.tolist(), start=1)
    ]
    type_name = _without_numbers(name)
    same_type = [matrix_name for matrix_name in run_updates[0].shapes if _without_numbers(matrix_name) == type_name]
    ranks: list[Row] = []
    for run in run_updates:
        for position, matrix_name in enumerate(same_type):
            if matrix_name not in run.shapes:
                continue
            row = rank_rows[run.label] if matrix_name == name else rank_row(run.compute(matrix_name))
            ranks.append({"run": run.label, "matrix": matrix_name, "position": position, **row})
    return [
        Plot("update", rows, partial(draw_updates, updates, name)),
        Plot("update-spectrum", spectrum, partial(_draw_spectrum, spectrum, rows, ranks, name), (), {"ranks": ranks}),
    ]


def overlap(runs: Sequence[str | Path], *, matrix: str | None = None) -> list[Plot]:
    """Plot the overlap between the updates of several tasks, by block and by weight (Figures 12b and 12c, Section 4.5).

    Each run stands for one task. Chance levels are expected values after random permutations of each update's entries.
    All runs must use the same backbone. The weight plots show `matrix`, by default the deepest query projection.

    Returns:
        Three plots. `overlap`: mean cosine similarity over pairs of tasks that change the block, one row per block.
        `overlap-frequency`: number of weights changed by 0, 1, … tasks, in the matrix and in all matrices.
        `overlap-map`: number of tasks that change each weight of the matrix; its table lists the rows and the columns,
        the most frequently changed first.

    Raises:
        FileNotFoundError: If a run has no adapter.
        ValueError: If there are fewer than two runs, a run changes no weight matrix or does not change `matrix`, no
            matrix is changed by all runs, or the shapes of `matrix` differ between runs.
    """
    if len(runs) < 2:
        raise ValueError(f"overlap needs at least 2 runs, got {len(runs)}")
    run_updates = [read_updates(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    name = choose_matrix(run_updates, matrix)
    names_by_block = _group_by_block(run_updates)
    if not any(name in names for names in names_by_block.values()):  # its shape differs between runs
        shapes = ", ".join(str(list(run.shapes[name])) for run in run_updates)
        raise ValueError(f"runs must have the same backbone, but {name!r} has shapes {shapes}")
    rows: list[Row] = []
    all_observed = np.zeros(len(runs) + 1)
    all_expected = np.zeros(len(runs) + 1)
    for position, (block, names) in enumerate(names_by_block.items()):
        total = _Similarity(len(runs))
        for matrix_name in names:
            stacked = torch.stack([run.compute(matrix_name).flatten() for run in run_updates])
            total.add(stacked)
            all_observed += update_frequencies(stacked)
            all_expected += _expected_frequencies(stacked)
        rows.append({"layer": block, "position": position, "matrices": len(names), **total.row()})
    stacked = torch.stack([run.compute(name).flatten() for run in run_updates])
    observed = update_frequencies(stacked)
    expected = _expected_frequencies(stacked)
    frequencies = [
        {
            "tasks": tasks,
            "weights": int(observed[tasks]),
            "expected_by_chance": float(expected[tasks]),
            "weights_of_all_matrices": int(all_observed[tasks]),
            "expected_by_chance_of_all": float(all_expected[tasks]),
        }
        for tasks in range(len(runs) + 1)
    ]
    changed = (stacked != 0).sum(0).view(run_updates[0].shapes[name])
    return [
        Plot("overlap", rows, partial(_draw_similarity, rows)),
        Plot("overlap-frequency", frequencies, partial(_draw_frequencies, frequencies, name)),
        Plot("overlap-map", _axis_means(changed), partial(_draw_map, changed, name, len(runs))),
    ]


class _Similarity:
    """Cosine similarities between the updates of `count` tasks, over the concatenated matrices of a block."""

    def __init__(self, count: int) -> None:
        self._products, self._chance, self._intersections = torch.zeros(3, count, count, dtype=torch.float64)

    def add(self, stacked: Tensor) -> None:
        """Add the updates of one matrix, `[tasks, weights]`."""
        sums = stacked.double().sum(1)
        self._products += stacked.double() @ stacked.double().T
        self._chance += torch.outer(sums, sums) / stacked.shape[1]  # mean over all permutations of the entries
        support = (stacked != 0).double()
        self._intersections += support @ support.T

    def row(self) -> dict[str, Any]:
        """Return the cosine's mean and range over pairs of nonzero updates, its chance level, and the Jaccard index.

        The Jaccard index compares the sets of changed weights.
        """
        norms = self._products.diagonal().sqrt()
        nonzero_updates = [index for index, norm in enumerate(norms.tolist()) if norm]
        pairs = list(combinations(nonzero_updates, 2))
        if not pairs:
            return {"pairs": 0, "cosine": float("nan"), "chance": float("nan")}  # other columns stay empty in the table
        sizes = self._intersections.diagonal()
        cosines: list[float] = []
        chance: list[float] = []
        jaccard: list[float] = []
        for i, j in pairs:
            norm_product = norms[i] * norms[j]
            cosines.append(float(self._products[i, j] / norm_product))
            chance.append(float(self._chance[i, j] / norm_product))
            intersection = self._intersections[i, j]
            union = sizes[i] + sizes[j] - intersection
            jaccard.append(float(intersection / union))
        return {
            "pairs": len(pairs),
            "cosine": float(np.mean(cosines)),
            "least": min(cosines),
            "greatest": max(cosines),
            "chance": float(np.mean(chance)),
            "jaccard": float(np.mean(jaccard)),
        }


def update_frequencies(stacked: Tensor) -> np.ndarray:
    """Count the weights changed by 0, 1, … tasks, `[tasks + 1]`, from updates `[tasks, weights]`."""
    return torch.bincount((stacked != 0).sum(0), minlength=len(stacked) + 1).double().numpy()


def chance_frequencies(fractions: Iterable[float]) -> np.ndarray:
    """Compute the probabilities that 0, 1, … independent tasks change a weight (Poisson binomial distribution).

    `fractions` contains the fraction of weights that each task changes.
    """
    distribution = np.ones(1)
    for fraction in fractions:
        distribution = np.convolve(distribution, [1 - fraction, fraction])
    return distribution


def _expected_frequencies(stacked: Tensor) -> np.ndarray:
    """Return the expected `update_frequencies` for independent tasks."""
    return chance_frequencies((stacked != 0).double().mean(1).tolist()) * stacked.shape[1]


def _axis_means(changed: Tensor) -> list[Row]:
    """Return the mean number of tasks that change a weight of each row (output) and column (input), highest first."""
    entries = [
        {"axis": axis, "index": index, "mean_tasks": float(value)}
        for axis, means in (("row", changed.double().mean(1)), ("column", changed.double().mean(0)))
        for index, value in enumerate(means.tolist())
    ]
    return sorted(entries, key=lambda row: -float(row["mean_tasks"]))


def _group_by_block(run_updates: Sequence[RunUpdates]) -> dict[str, list[str]]:
    """Group matrix names by block, in order of depth.

    Only matrices that all runs change are included, and only if their shapes are equal. A block's number is the depth
    in `allocation.json` or, for matrices that no such file lists, the number in the name. If the names contain several
    stages, their blocks are numbered consecutively across stages.
    """
    infos = {name: info for run in run_updates for name, info in run.infos.items()}
    shapes = run_updates[0].shapes.items()
    names = [name for name, shape in shapes if all(run.shapes.get(name) == shape for run in run_updates)]
    matches = {name: re.match(r"(.*\.)(\d+)\.", name) for name in names}
    blocks = list(dict.fromkeys(match.groups() for match in matches.values() if match is not None))
    has_stages = len({stage for stage, _ in blocks}) > 1
    names_by_block: dict[str, list[str]] = {}
    for name in names:
        depth: int | None = None
        if name in infos:
            depth = infos[name].depth
        elif (match := matches[name]) is not None:
            depth = blocks.index(match.groups()) if has_stages else int(match[2])
        block = "–" if depth is None else str(depth)
        names_by_block.setdefault(block, []).append(name)
    return in_order_of_depth(names_by_block)


def _without_numbers(name: str) -> str:
    """Mask the block and stage numbers in a matrix name."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _draw_spectrum(spectrum: Sequence[Row], rows: Sequence[Row], ranks: Sequence[Row], name: str) -> Figure:
    """Draw the singular values relative to the largest one, and the effective rank of each matrix in model order."""
    titles = [f"Singular values of {shortened(name, 26)}", "Effective rank by depth"]
    figure, (left, right) = new_panels(860, 380, titles, 2)
    handles = []
    for number, row in enumerate(rows):
        color, marker = style_of(number)
        values = np.array([entry["singular_value"] for entry in spectrum if entry["run"] == row["run"]])
        values = values[values > _NOISE_FLOOR * values.max()]  # empty for a zero update
        if len(values):
            left.plot(np.arange(1, len(values) + 1), values / values[0], color=color, linewidth=2)
        run_ranks = [entry for entry in ranks if entry["run"] == row["run"]]
        positions = [entry["position"] for entry in run_ranks]
        heights = [entry["effective_rank"] for entry in run_ranks]
        handles += right.plot(positions, heights, color=color, linewidth=2, marker=marker, markersize=5)
    left.set_yscale("log")
    left.set(xlabel="index", ylabel="relative to the largest")
    right.set_ylabel("effective rank")
    right.set_ylim(bottom=0)
    integer_axis(right, "matrix (in model order)")
    labels = [f"{shortened(row['run'], 20)}: {row['effective_rank']:.1f}, rank {row['rank']}" for row in rows]
    add_legend(figure, handles, labels)
    return figure


def _draw_similarity(rows: Sequence[Row]) -> Figure:
    """Draw the mean and range of the cosine similarity by block, and the chance level."""
    figure, axes = new_figure(560, 340, "Cosine similarity of updates between tasks")
    drawn_rows = [row for row in rows if row["pairs"]]
    positions = [row["position"] for row in drawn_rows]
    lowest, highest = [row["least"] for row in drawn_rows], [row["greatest"] for row in drawn_rows]
    stride = max(1, math.ceil(len(positions) / _MAX_TICKS))
    band = axes.fill_between(positions, lowest, highest, color=ACCENT, alpha=0.18, linewidth=0)
    means = [row["cosine"] for row in drawn_rows]
    (mean_line,) = axes.plot(positions, means, color=ACCENT, linewidth=2.2, marker="o", markersize=5)
    chance = [row["chance"] for row in drawn_rows]
    (chance_line,) = axes.plot(positions, chance, color=WARM, linewidth=1.6, linestyle=DASHED, marker="s", markersize=4)
    axes.set_ylim(min([0, *lowest]) - 0.02, max([0.5, *highest]) + 0.05)
    axes.set_xticks(positions[::stride], [row["layer"] for row in drawn_rows][::stride])
    axes.set(xlabel="block", ylabel="cosine similarity")
    add_legend(figure, [mean_line, band, chance_line], ["mean of all pairs", "range of all pairs", "chance level"])
    return figure


def _draw_frequencies(rows: Sequence[Row], name: str) -> Figure:
    """Draw a histogram of the number of tasks that change a weight, and its expectation for independent tasks."""
    figure, axes = new_figure(560, 340, f"Tasks that change a weight of {shortened(name, 20)}")
    positions = [row["tasks"] for row in rows]
    bars = axes.bar(positions, [row["weights"] for row in rows], width=0.75, color=ACCENT)
    chance = [row["expected_by_chance"] for row in rows]
    marks = axes.plot(positions, chance, color=WARM, marker="D", markersize=6, linestyle=":")
    axes.set_ylim(0.5, 2 * max(row["weights"] for row in rows))
    log_axis(axes)
    axes.grid(False, axis="x")
    integer_axis(axes, "number of tasks")
    axes.set_ylabel("weights (log scale)")
    add_legend(figure, [bars, *marks], ["observed", "expected if independent"])  # type: ignore[list-item]
    return figure


def _draw_map(changed: Tensor, name: str, tasks: int) -> Figure:
    """Draw the number of tasks that change each weight as a heat map."""
    rows, columns = changed.shape
    figure, axes = new_figure(
        420, min(max(330 * rows / columns, 150), 560) + 130, f"Tasks that change {shortened(name, 26)}"
    )
    axes.grid(False)
    cells = (min(rows, MAX_CELLS), min(columns, MAX_CELLS))
    means = torch.nn.functional.adaptive_avg_pool2d(changed.double()[None], cells)[0]
    axes.imshow(
        means.numpy() / tasks, cmap=accent_map(), vmin=0, vmax=1, extent=(0, columns, rows, 0), interpolation="none"
    )
    axes.set(xlabel="input", ylabel="output")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set(visible=True, color=MUTED)
    scale_bar(figure, axes, "tasks", {0.0: "0", 0.5: f"{tasks / 2:g}", 1.0: str(tasks)})
    return figure
