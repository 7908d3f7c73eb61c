"""Profiles of methods: scores by task group in a radar chart, and memory during training steps.

Figure numbers refer to the SNELLA paper (arXiv 2510.24037).
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snella_app.report.style import DASHED, GRID, INK, MUTED, add_legend, new_figure, shortened
from snella_app.runs.model import load_single_run
from snella_app.text import decimal_text
from snella_lab.analysis.plot import Plot, Row, grouped, run_labels
from snella_lab.comparison.experiment import FILE as EXPERIMENT_FILE
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.store import FILE as ROWS_FILE
from snella_lab.comparison.store import read_lines
from snella_lab.comparison.summary import summarize
from snella_lab.style import style_of

_MIN_SPAN = 0.02
"""Minimum range of a radar axis, so that small differences look small."""
_MAX_POINTS = 120
"""Maximum number of memory measurements per phase that are drawn."""
_PHASES = ("forward", "backward", "optimizer")


def radar(folders: Sequence[str | Path]) -> list[Plot]:
    """Plot the scores of methods by task group in a radar chart, one axis per group and comparison (Figure 2).

    A score is the mean of the comparison's main metric over the tasks of a group. Each axis has its own scale, with the
    highest mean at the rim. The table contains the unscaled scores and the radii.

    Args:
        folders: Folders written by `snella compare`. Only methods with results on all tasks of all folders are drawn.

    Raises:
        FileNotFoundError: If a folder contains no comparison.
        ValueError: If no method has results on all tasks of all folders, or the chart has fewer than three axes.
    """
    labels = run_labels(folders)
    results: dict[str, dict[str, tuple[float, float, int]]] = {}
    metrics: dict[str, tuple[str, bool]] = {}
    for label, folder in zip(labels, map(Path, folders), strict=True):
        if not (folder / EXPERIMENT_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} contains no comparison: {EXPERIMENT_FILE} is missing; run snella compare"
            )
        rows, _ = read_lines(folder / ROWS_FILE)
        summary = summarize(read_experiment(str(folder / EXPERIMENT_FILE)), list(rows.values()))
        for group in dict.fromkeys(entry.group for entry in summary.experiment.data):
            tasks = [entry.name for entry in summary.experiment.data if entry.group == group]
            axis = group if len(folders) == 1 else f"{label}: {group}"
            results.setdefault(axis, {})
            metrics[axis] = (summary.measure, summary.is_fraction)
            for method in summary.methods:
                spread = summary.runs.mean(method.name, [[task] for task in tasks], summary.column)
                if spread is not None:
                    results[axis][method.name] = (spread.mean, spread.std, len(tasks))
    first_axis: Mapping[str, tuple[float, float, int]] = next(iter(results.values()), {})
    methods = [name for name in first_axis if all(name in values for values in results.values())]
    if not methods:
        raise ValueError(f"no method has results on all tasks of all folders: {', '.join(labels)}")
    if len(results) < 3:
        raise ValueError(f"a radar chart needs at least 3 axes, got {', '.join(results)}; add comparisons or groups")
    table = []
    for axis, values in results.items():
        means = [values[name][0] for name in methods]
        for name in methods:
            mean, deviation, num_tasks = values[name]
            radius = scaled_radius(mean, min(means), max(means))
            row = {"axis": axis, "metric": metrics[axis][0], "method": name, "mean": mean, "std": deviation}
            table.append({**row, "tasks": num_tasks, "radius": radius})
    in_percent = {axis: is_fraction for axis, (_, is_fraction) in metrics.items()}
    return [Plot("radar", table, partial(_draw_radar, table, in_percent))]


def scaled_radius(value: float, low: float, high: float) -> float:
    """Scale a value to a radius between 0.3 at `low` and 1 at `high`.

    If the range is smaller than `_MIN_SPAN`, the radius at `low` is greater than 0.3.
    """
    span = max(high - low, _MIN_SPAN)
    return 1 - 0.7 * (high - value) / span


def memory(runs: Sequence[str | Path], *, steps: int = 2, batch_size: int | None = None) -> list[Plot]:
    """Plot the memory of live tensors during training steps of each run (Figure 7b).

    Each model takes `steps` training steps with AdamW on random images, on the CPU. After every torch operation, the
    total size of all live tensors, including weights, is recorded. An allocator reserves more memory than that. Results
    are comparable only for the same backbone and batch size. The batch size of all runs defaults to the first run's.

    Returns:
        One plot. Its table has at most 120 rows per phase, each with the peak of an interval. The additional table
        `memory-peaks` contains the peak of each phase of the last step.

    Raises:
        FileNotFoundError: If a folder contains no run with an adapter.
    """
    rows: list[Row] = []
    peaks: list[Row] = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        loaded = load_single_run(run, device="cpu")
        batch_size = batch_size or loaded.folder.read_config().optim.effective_batch_size
        channels, height, width = loaded.info.data_config["input_size"]
        images = torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(0))
        points = record_memory(loaded.model, images, steps)
        rows += [{"run": label, "batch_size": batch_size, **point} for point in _downsample(points)]
        last_step = [point for point in points if point["step"] == steps]
        for phase in _PHASES:
            peak = max(point["mib"] for point in last_step if point["phase"] == phase)
            peaks.append({"run": label, "batch_size": batch_size, "phase": phase, "peak_mib": peak})
    return [Plot("memory", rows, partial(_draw_memory, rows), (), {"peaks": peaks})]


class LiveTensors(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages created by torch operations.

    Args:
        existing: Tensors to count from the start, such as a model's weights.

    Attributes:
        live: Current number of bytes.
        points: Step, phase, and number of bytes after each operation.
        step_phase: Current step and phase, which the caller sets.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.points: list[tuple[int, str, int]] = []
        self.step_phase = (1, _PHASES[0])
        self._seen: set[int] = set()
        for tensor in existing:
            self._track(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and track its outputs."""
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        self.points.append((*self.step_phase, self.live))
        return outputs

    def _track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until the storage is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # the same for all views of a tensor
        size = storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        """Subtract the size of a freed storage."""
        self._seen.discard(key)
        self.live -= size


def record_memory(model: nn.Module, images: Tensor, steps: int) -> list[dict[str, Any]]:
    """Record the memory after each operation of several training steps, in MiB.

    Args:
        model: Model from `build_method` or `load_trained`. Training on a dummy loss changes its parameters.
        images: A batch of images.
        steps: Number of training steps.

    Returns:
        Points with `step`, `phase`, `position`, and `mib`. The positions in each phase cover an interval of length 1.
        The first point is the memory before training.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    live = LiveTensors([*model.parameters(), *model.buffers(), images])
    start_size = live.live
    with live, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* no budget allocator is attached")  # dummy steps need no allocator
        for step in range(1, steps + 1):
            live.step_phase = (step, "forward")
            outputs = model(images)
            loss = outputs.float().square().mean()
            del outputs
            live.step_phase = (step, "backward")
            loss.backward()
            live.step_phase = (step, "optimizer")
            optimizer.step()
            optimizer.zero_grad()
            del loss
            torch.zeros(())  # records a point after gradients are freed
    points = [{"step": 0, "phase": "start", "position": 0.0, "mib": start_size / 2**20}]
    for step in range(1, steps + 1):
        for number, phase in enumerate(_PHASES):
            sizes = [size for at_step, at_phase, size in live.points if (at_step, at_phase) == (step, phase)]
            begin = (step - 1) * len(_PHASES) + number
            for index, size in enumerate(sizes, start=1):
                position = begin + index / len(sizes)
                points.append({"step": step, "phase": phase, "position": position, "mib": size / 2**20})
    return points


def _downsample(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reduce each phase to the maxima of at most `_MAX_POINTS` intervals."""
    maxima: list[dict[str, Any]] = []
    for step_phase in dict.fromkeys((point["step"], point["phase"]) for point in points):
        group = [point for point in points if (point["step"], point["phase"]) == step_phase]
        width = math.ceil(len(group) / _MAX_POINTS)
        for start in range(0, len(group), width):
            interval = group[start : start + width]
            maxima.append(max(interval, key=lambda point: point["mib"]))
    return maxima


def _draw_radar(rows: Sequence[Row], in_percent: Mapping[str, bool]) -> Figure:
    """Draw one polygon per method. Label each axis with its highest mean, in percent if `in_percent` is True for it."""
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    methods = grouped(rows, "method")
    legend_columns = 4
    figure, axes = new_figure(560, 410 + 20 * math.ceil(len(methods) / legend_columns))
    axes.set_axis_off()
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.3, 1.3), aspect="equal")
    angles = np.pi / 2 - np.arange(len(axes_names)) * 2 * np.pi / len(axes_names)
    for radius in (0.3, 0.65, 1.0):  # from `scaled_radius` of the lowest mean to that of the highest
        ring = np.append(angles, angles[0])
        axes.plot(radius * np.cos(ring), radius * np.sin(ring), color=GRID, linewidth=1)
    for angle, name in zip(angles, axes_names, strict=True):
        x = np.cos(angle)
        y = np.sin(angle)
        axes.plot([0, x], [0, y], color=GRID, linewidth=1)
        best = max(row["mean"] for row in rows if row["axis"] == name)
        best_text = f"{100 * best:.1f}%" if in_percent[name] else decimal_text(best, 3)
        if abs(x) < 0.1:
            side = "center"
        elif x > 0:
            side = "left"
        else:
            side = "right"
        anchor = (1.1 * x, 1.14 * y)
        axes.text(*anchor, shortened(name, 22), ha=side, va="bottom", color=INK, fontsize=12)
        axes.text(*anchor, best_text, ha=side, va="top", color=MUTED, fontsize=11)
    handles = []
    for number, points in enumerate(methods.values()):
        color, marker = style_of(number)
        radii = np.array([row["radius"] for row in points])
        closed_radii = np.append(radii, radii[0])
        closed_angles = np.append(angles, angles[0])
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.8}
        handles += axes.plot(closed_radii * np.cos(closed_angles), closed_radii * np.sin(closed_angles), **style)
    add_legend(figure, handles, [shortened(method) for method in methods], columns=legend_columns)
    return figure


def _draw_memory(rows: Sequence[Row]) -> Figure:
    """Draw one line per run, with ticks for the phases of each step."""
    figure, axes = new_figure(640, 380, f"Live tensors during training, batch size {rows[0]['batch_size']}")
    handles = []
    runs = grouped(rows, "run")
    for number, points in enumerate(runs.values()):
        color, _ = style_of(number)
        positions = [row["position"] for row in points]
        sizes = [row["mib"] for row in points]
        handles += axes.plot(positions, sizes, color=color, linewidth=1.8)
    num_phases = math.ceil(max(row["position"] for row in rows))
    for step_start in range(0, num_phases + 1, len(_PHASES)):
        axes.axvline(step_start, color=MUTED, linewidth=1, linestyle=DASHED)
    phase_names = [_PHASES[phase % len(_PHASES)] for phase in range(num_phases)]
    axes.set_xticks([phase + 0.5 for phase in range(num_phases)], phase_names)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    add_legend(figure, handles, [shortened(label, 24) for label in runs])
    return figure
