"""What runs changed in the weights: updates as pictures, their singular values, and what tasks have in common."""

from __future__ import annotations

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
from snella_app.records import Allocation, MatrixInfo, read_if_present
from snella_app.report.allocation import log_axis
from snella_app.report.inspect import read_adapter
from snella_app.report.style import (
    ACCENT,
    MUTED,
    WARM,
    accent_map,
    add_legend,
    new_figure,
    new_panels,
    scale_bar,
    shortened,
    style_of,
)
from snella_app.report.updates import MOST_CELLS, UpdateSource, adapter_updates, deepest_query, draw_updates, part_names
from snella_app.runs.model import load_run, make_backbone
from snella_lab.analysis.plot import Plot, Row, in_order_of_depth, run_labels


@dataclass(frozen=True)
class RunUpdates:
    """The updates of a run, made when they are asked for.

    Attributes:
        label: Short name of the run.
        shapes: `[out, in]` of each matrix, by name.
        infos: What `allocation.json` says of matrices; nothing where there is none.
        make: From a matrix's name to its update `[out, in]`, with its scaling, float32.
    """

    label: str
    shapes: Mapping[str, tuple[int, int]]
    infos: Mapping[str, MatrixInfo]
    make: Callable[[str], Tensor]


def read_updates(run: str | Path, label: str) -> RunUpdates:
    """Read what a run changed: from the adapter's file alone for SNELLA and LoRA, of any task, without the backbone.

    The changes of other methods are the differences between the merged model's weights and the backbone's.

    Raises:
        FileNotFoundError: The run has no adapter, or the folder no run.
        ValueError: The method changes no weights, such as prompts.
    """
    adapter = read_adapter(run)
    if adapter is None:
        raise FileNotFoundError(f"run {run} has no adapter yet; give a run that finished an epoch")
    allocation = read_if_present(Allocation, run)
    infos = {} if allocation is None else {matrix.name: matrix for matrix in allocation.matrices}
    shapes, make = adapter_updates(adapter, infos) or _of_differences(run)
    return RunUpdates(label, shapes, infos, make)


def _of_differences(run: str | Path) -> UpdateSource:
    """Differences between the merged model's matrices and the backbone's, the head aside."""
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
            names = part_names(module, 3 if module.endswith("qkv") and len(difference) % 3 == 0 else 1, {})
            changed |= dict(zip(names, difference.chunk(len(names)), strict=True))
    if not changed:
        raise ValueError(f"run must have changed matrices of its backbone, got {run} of {loaded.info.method!r}")
    return {name: (len(value), value.shape[1]) for name, value in changed.items()}, changed.__getitem__


def choose_matrix(several: Sequence[RunUpdates], name: str | None) -> str:
    """The matrix of this name, or the deepest query projection (else the deepest matrix) that all runs have.

    Raises:
        ValueError: No matrix is common to all runs, or not the named one.
    """
    common = [name for name in several[0].shapes if all(name in run.shapes for run in several)]
    if not common:
        raise ValueError(f"runs must share a matrix to compare, got none in {', '.join(run.label for run in several)}")
    if name is not None:
        if name not in common:
            raise ValueError(f"matrix must be one that all runs changed, e.g. {common[0]!r}, got {name!r}")
        return name
    return deepest_query(common)


def singular_values(update: Tensor) -> Tensor:
    """Singular values of a matrix, descending, float64."""
    return torch.linalg.svdvals(update.double())


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p_i log p_i) with p_i = σ_i / Σ σ (Roy and Vetterli 2007); 0 for a matrix of zeros.

    Args:
        values: Singular values.
    """
    if not values.sum():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def rank_row(update: Tensor) -> dict[str, Any]:
    """Size, entries and ranks of one update; `rank` counts singular values that float32 can tell from zero."""
    values = singular_values(update)
    largest = float(values[0])
    tolerance = largest * max(update.shape) * torch.finfo(torch.float32).eps
    return {
        "rows": len(update),
        "columns": update.shape[1],
        "nonzeros": int(update.count_nonzero()),
        "density": float(update.count_nonzero()) / update.numel(),
        "norm": float(values.square().sum().sqrt()),
        "largest_entry": float(update.abs().max()),
        "rank": int((values > tolerance).sum()) if largest else 0,
        "effective_rank": effective_rank(values),
        "stable_rank": float(values.square().sum() / largest**2) if largest else 0.0,
    }


def update(runs: Sequence[str | Path], *, matrix: str | None = None) -> list[Plot]:
    """The update of one matrix as a picture, a panel a run (Figure 12a), its singular values and effective ranks.

    Args:
        runs: Folders of runs whose method changes weights: SNELLA and LoRA of any task, others of images.
        matrix: Name of the matrix; the deepest query projection if None.

    Returns:
        Two plots. `update`: a row of its table is a run, with size, density and ranks of the matrix. `update-spectrum`:
        a row is a singular value; `update-spectrum-ranks` has the ranks of all matrices of the same kind.

    Raises:
        FileNotFoundError: A run has no adapter.
        ValueError: The runs have no matrix in common, or a method changes no weights.
    """
    several = [read_updates(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    name = choose_matrix(several, matrix)
    updates = {run.label: run.make(name) for run in several}
    rows = [{"run": label, "matrix": name, **rank_row(value)} for label, value in updates.items()]
    spectrum = [
        {"run": label, "matrix": name, "index": index, "singular_value": value}
        for label, matrix_update in updates.items()
        for index, value in enumerate(singular_values(matrix_update).tolist(), start=1)
    ]
    alike = [other for other in several[0].shapes if _without_numbers(other) == _without_numbers(name)]
    ranks = [
        {"run": run.label, "matrix": other, "position": position, **rank_row(run.make(other))}
        for run in several
        for position, other in enumerate(alike)
        if other in run.shapes
    ]
    return [
        Plot("update", rows, partial(draw_updates, updates, name)),
        Plot("update-spectrum", spectrum, partial(_draw_spectrum, spectrum, rows, ranks, name), (), {"ranks": ranks}),
    ]


def overlap(runs: Sequence[str | Path], *, matrix: str | None = None) -> list[Plot]:
    """What the updates of several tasks have in common, by layer and by weight (Figures 12b, 12c, section 4.5).

    Beside each number stands what chance alone would give: the same updates with their entries at random places of each
    matrix.

    Args:
        runs: Folders of two runs or more, on one backbone.
        matrix: Whose weights are counted one by one; the deepest query projection if None.

    Returns:
        Three plots. `overlap`: mean cosine similarity over all pairs of tasks, a row a layer. `overlap-frequency`: how
        many weights are changed by 0, 1, … tasks, of the matrix and of all. `overlap-map`: by how many tasks each
        weight of the matrix is changed; rows and columns in its table, the most frequent first.

    Raises:
        FileNotFoundError: A run has no adapter.
        ValueError: Fewer than two runs, no matrix in common, or a method that changes no weights.
    """
    if len(runs) < 2:
        raise ValueError(f"overlap must compare at least 2 runs, got {len(runs)}")
    several = [read_updates(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    name = choose_matrix(several, matrix)
    common = [
        other for other, shape in several[0].shapes.items() if all(run.shapes.get(other) == shape for run in several)
    ]
    layers = _layers(common, several)
    rows: list[Row] = []
    counts, expected = np.zeros(len(runs) + 1), np.zeros(len(runs) + 1)
    for position, (layer, names) in enumerate(layers.items()):
        total = _Similarity(len(runs))
        for other in names:
            stacked = torch.stack([run.make(other).flatten() for run in several])
            total.add(stacked)
            counts += update_frequencies(stacked)
            expected += _expected_frequencies(stacked)
        rows.append({"layer": layer, "position": position, "matrices": len(names), **total.row()})
    stacked = torch.stack([run.make(name).flatten() for run in several])
    own, chance = update_frequencies(stacked), _expected_frequencies(stacked)
    frequencies = [
        {
            "tasks": tasks,
            "weights": int(own[tasks]),
            "expected_by_chance": float(chance[tasks]),
            "weights_of_all_matrices": int(counts[tasks]),
            "expected_by_chance_of_all": float(expected[tasks]),
        }
        for tasks in range(len(runs) + 1)
    ]
    changed = (stacked != 0).sum(0).view(several[0].shapes[name])
    return [
        Plot("overlap", rows, partial(_draw_similarity, rows)),
        Plot("overlap-frequency", frequencies, partial(_draw_frequencies, frequencies, name)),
        Plot("overlap-map", _lines(changed), partial(_draw_map, changed, name, len(runs))),
    ]


class _Similarity:
    """Cosine similarities between the updates of `count` tasks, of several matrices as if they were one vector."""

    def __init__(self, count: int) -> None:
        self._products, self._chance, self._both = torch.zeros(3, count, count, dtype=torch.float64)

    def add(self, stacked: Tensor) -> None:
        """Add a matrix, `[tasks, weights]`."""
        sums = stacked.double().sum(1)
        self._products += stacked.double() @ stacked.double().T
        self._chance += torch.outer(sums, sums) / stacked.shape[1]  # the mean over all permutations of the entries
        support = (stacked != 0).double()
        self._both += support @ support.T

    def row(self) -> dict[str, Any]:
        """Mean, least and greatest similarity of the pairs, that by chance, and the overlap of the supports."""
        norms = self._products.diagonal().sqrt()
        pairs = [(i, j) for i, j in combinations(range(len(norms)), 2) if norms[i] and norms[j]]
        if not pairs:
            return {"pairs": 0, "cosine": float("nan"), "chance": float("nan")}
        cosines = [float(self._products[i, j] / (norms[i] * norms[j])) for i, j in pairs]
        chance = [float(self._chance[i, j] / (norms[i] * norms[j])) for i, j in pairs]
        sizes = self._both.diagonal()
        shared = [float(self._both[i, j] / (sizes[i] + sizes[j] - self._both[i, j])) for i, j in pairs]
        return {
            "pairs": len(pairs),
            "cosine": float(np.mean(cosines)),
            "least": min(cosines),
            "greatest": max(cosines),
            "chance": float(np.mean(chance)),
            "jaccard": float(np.mean(shared)),
        }


def update_frequencies(stacked: Tensor) -> np.ndarray:
    """How many weights are changed by 0, 1, …, all tasks, `[tasks + 1]`, from updates `[tasks, weights]`."""
    return torch.bincount((stacked != 0).sum(0), minlength=len(stacked) + 1).double().numpy()


def chance_frequencies(shares: Iterable[float]) -> np.ndarray:
    """Chances that 0, 1, … of independent tasks change a weight, each of which changes some share of all.

        The distribution of a sum of independent Bernoulli variables (Poisson binomial).

    Args:
        shares: One a task.
    """
    distribution = np.ones(1)
    for share in shares:
        distribution = np.convolve(distribution, [1 - share, share])
    return distribution


def _expected_frequencies(stacked: Tensor) -> np.ndarray:
    """What `update_frequencies` would be if the tasks chose their weights independently."""
    return chance_frequencies((stacked != 0).double().mean(1).tolist()) * stacked.shape[1]


def _lines(changed: Tensor) -> list[Row]:
    """Rows (outputs) and columns (inputs) of a matrix by the mean number of tasks that change their weights."""
    found = [
        {"axis": axis, "index": index, "mean_tasks": float(value)}
        for axis, means in (("row", changed.double().mean(1)), ("column", changed.double().mean(0)))
        for index, value in enumerate(means.tolist())
    ]
    return sorted(found, key=lambda row: -float(row["mean_tasks"]))


def _layers(names: Sequence[str], several: Sequence[RunUpdates]) -> dict[str, list[str]]:
    """The matrices by block, in order."""
    infos = {name: info for run in several for name, info in run.infos.items()}
    layers: dict[str, list[str]] = {}
    for name in names:
        if name in infos:
            depth = infos[name].depth
        else:
            numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
            depth = int(numbers[-1]) if numbers else None
        layers.setdefault("–" if depth is None else str(depth), []).append(name)
    return in_order_of_depth(layers)


def _without_numbers(name: str) -> str:
    """A matrix's name without the numbers of blocks and stages."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _draw_spectrum(spectrum: Sequence[Row], rows: Sequence[Row], ranks: Sequence[Row], name: str) -> Figure:
    """Singular values relative to the largest one, and effective rank along the depth."""
    titles = [f"Singular values of {shortened(name, 26)}", "Effective rank of each such matrix"]
    figure, (left, right) = new_panels(860, 380, titles, 2)
    handles = []
    for number, row in enumerate(rows):
        color, marker = style_of(number)
        values = np.array([entry["singular_value"] for entry in spectrum if entry["run"] == row["run"]])
        values = values[values > values.max() * 1e-7] if values.max() > 0 else values[:0]
        if len(values):
            left.plot(np.arange(1, len(values) + 1), values / values[0], color=color, linewidth=2)
        own = [entry for entry in ranks if entry["run"] == row["run"]]
        places, heights = [entry["position"] for entry in own], [entry["effective_rank"] for entry in own]
        handles += right.plot(places, heights, color=color, linewidth=2, marker=marker, markersize=5)
    left.set_yscale("log")
    left.set(xlabel="index", ylabel="relative to the largest")
    right.set(xlabel="matrix, in the order of the model", ylabel="effective rank")
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = [f"{shortened(row['run'], 20)}: {row['effective_rank']:.1f}, rank {row['rank']}" for row in rows]
    add_legend(figure, handles, labels)
    return figure


def _draw_similarity(rows: Sequence[Row]) -> Figure:
    """Mean cosine similarity by layer with the range of the pairs, beside that by chance."""
    figure, axes = new_figure(560, 340, "Similarity of the updates of different tasks")
    known = [row for row in rows if row["pairs"]]
    places = [row["position"] for row in known]
    least, greatest = [row["least"] for row in known], [row["greatest"] for row in known]
    band = axes.fill_between(places, least, greatest, color=ACCENT, alpha=0.18, linewidth=0)
    (mean,) = axes.plot(places, [row["cosine"] for row in known], color=ACCENT, linewidth=2.2, marker="o", markersize=5)
    chance = [row["chance"] for row in known]
    (random,) = axes.plot(places, chance, color=WARM, linewidth=1.6, linestyle=(0, (4, 3)), marker="s", markersize=4)
    axes.set_ylim(min(0, *least, 0) - 0.02, max(0.5, *greatest) + 0.05)
    axes.set_xticks(places[:: -(-len(places) // 12)], [row["layer"] for row in known][:: -(-len(places) // 12)])
    axes.set(xlabel="block", ylabel="cosine similarity")
    add_legend(figure, [mean, band, random], ["mean of all pairs", "all pairs", "the same at random places"])
    return figure


def _draw_frequencies(rows: Sequence[Row], name: str) -> Figure:
    """Bars: shares of the weights changed by so many tasks; marks: what independent tasks would give."""
    figure, axes = new_figure(560, 340, f"How many tasks change a weight of {shortened(name, 28)}")
    places = [row["tasks"] for row in rows]
    bars = axes.bar(places, [row["weights"] for row in rows], width=0.75, color=ACCENT)
    chance = [row["expected_by_chance"] for row in rows]
    marks = axes.plot(places, chance, color=WARM, marker="D", markersize=6, linestyle=":")
    axes.set_ylim(0.5, 2 * max(row["weights"] for row in rows))
    log_axis(axes)
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="tasks that change it", ylabel="weights (log scale)")
    add_legend(figure, [bars, *marks], ["observed", "if tasks chose independently"])  # type: ignore[list-item]
    return figure


def _draw_map(changed: Tensor, name: str, tasks: int) -> Figure:
    """By how many tasks each weight is changed; what all share is strongest."""
    rows, columns = changed.shape
    figure, axes = new_figure(
        420, min(max(330 * rows / columns, 150), 560) + 130, f"Tasks that change {shortened(name, 26)}"
    )
    axes.grid(False)
    cells = (min(rows, MOST_CELLS), min(columns, MOST_CELLS))
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
