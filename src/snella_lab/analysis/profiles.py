"""Profiles of methods: accuracy over benchmarks and models as a radar, memory over the phases of a training step."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snella_app.report.style import GRID, INK, MUTED, add_legend, new_figure, shortened, style_of
from snella_app.runs.model import load_run
from snella_lab.analysis.plot import Plot, Row, grouped, run_labels
from snella_lab.comparison.experiment import FILE as EXPERIMENT_FILE
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.store import FILE as ROWS_FILE
from snella_lab.comparison.store import read_lines
from snella_lab.comparison.summary import summarize

_LEAST_SPAN = 0.02
_MOST_POINTS = 120
_PHASES = ("forward", "backward", "optimizer")


def radar(folders: Sequence[str | Path]) -> list[Plot]:
    """Accuracy of the methods of comparisons over their groups of tasks, an axis a group of a comparison (Figure 2).

    Each axis is scaled by itself, from below its lowest mean to its highest, which lies on the rim; the table has the
    accuracies themselves.

    Args:
        folders: Of comparisons, as `snella compare` writes them; methods that all of them have are drawn.

    Returns:
        One plot: a row of its table is a method on an axis.

    Raises:
        FileNotFoundError: A folder holds no comparison.
        ValueError: No method is common to all, or there are fewer than three axes.
    """
    labels = run_labels(folders)
    found: dict[str, dict[str, tuple[float, float, int]]] = {}
    for label, folder in zip(labels, map(Path, folders), strict=True):
        if not (folder / EXPERIMENT_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no comparison: {EXPERIMENT_FILE} is missing; run snella compare")
        rows, _ = read_lines(folder / ROWS_FILE)
        summary = summarize(read_experiment(str(folder / EXPERIMENT_FILE)), list(rows.values()))
        for group, tasks in summary.groups.items():
            axis = group if len(folders) == 1 else f"{label}: {group}"
            for method in summary.methods:
                spreads = [method.per_task[summary.column][task] for task in tasks]
                known = [spread for spread in spreads if spread is not None]
                if len(known) == len(tasks):
                    mean = float(np.mean([spread.mean for spread in known]))
                    deviation = float(np.mean([spread.std for spread in known]))
                    found.setdefault(axis, {})[method.name] = (mean, deviation, len(tasks))
    methods = [name for name in next(iter(found.values()), {}) if all(name in of_axis for of_axis in found.values())]
    if not methods:
        raise ValueError(f"folders must have a method that is finished on all tasks, got none in {', '.join(labels)}")
    if len(found) < 3:
        raise ValueError(f"a radar must have at least 3 axes, got {', '.join(found)}; give more comparisons or groups")
    table = []
    for axis, values in found.items():
        means = [values[name][0] for name in methods]
        for name in methods:
            mean, deviation, tasks_of = values[name]
            scaled = scaled_radius(mean, min(means), max(means))
            table.append(
                {"axis": axis, "method": name, "accuracy": mean, "std": deviation, "tasks": tasks_of, "radius": scaled}
            )
    return [Plot("radar", table, partial(_draw_radar, table))]


def scaled_radius(value: float, low: float, high: float) -> float:
    """Place between the center and the rim: the highest value at 1, the lowest at 0.3, close ones close."""
    span = max(high - low, _LEAST_SPAN)
    return 1 - 0.7 * (high - value) / span


def memory(runs: Sequence[str | Path], *, steps: int = 2, batch_size: int | None = None) -> list[Plot]:
    """Memory of living tensors over the first steps of each run's training (Figure 7b).

    The run's model takes `steps` training steps on random images with AdamW, and every operation of torch is followed:
    the bytes of all tensors that it made and that still live, weights included. This counts what the program keeps; an
    allocator keeps more.

    Args:
        runs: Folders of runs; those of one backbone and batch size can be compared.
        steps: Steps.
        batch_size: Images in a batch; that of the first run if None.

    Returns:
        One plot: a row of its table is a point in time, `memory-peaks` has the peak of each phase of the last step.

    Raises:
        FileNotFoundError: A folder holds no run with an adapter.
        ValueError: `steps` or `batch_size` is below 1.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rows: list[Row] = []
    peaks: list[Row] = []
    size = batch_size
    for label, run in zip(run_labels(runs), runs, strict=True):
        loaded = load_run(run, device="cpu")
        size = size or loaded.folder.read_config().effective_batch_size
        channels, height, width = loaded.info.data_config["input_size"]
        images = torch.randn(size, channels, height, width, generator=torch.Generator().manual_seed(0))
        points = follow_memory(loaded.model, images, steps)
        rows += [{"run": label, "batch_size": size, **point} for point in _thinned(points)]
        last = [point for point in points if point["step"] == steps]
        for phase in _PHASES:
            most = max(point["mib"] for point in last if point["phase"] == phase)
            peaks.append({"run": label, "batch_size": size, "phase": phase, "peak_mib": most})
    return [Plot("memory", rows, partial(_draw_memory, rows), (), {"peaks": peaks})]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that still live.

    Args:
        known: Tensors that are there already, such as a model's weights.

    Attributes:
        live: Bytes now.
        points: After each operation, the phase that was set and the bytes.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.points: list[tuple[int, str, int]] = []
        self.place = (1, _PHASES[0])
        self._seen: set[int] = set()
        for tensor in known:
            self._track(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        self.points.append((*self.place, self.live))
        return made

    def _track(self, tensor: Tensor) -> None:
        """Count a storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        """A storage was freed."""
        self._seen.discard(key)
        self.live -= size


def follow_memory(model: nn.Module, images: Tensor, steps: int) -> list[dict[str, Any]]:
    """Memory after each operation of some training steps of a model, in MiB, with the place within its phase.

    Args:
        model: From `build_method` or `load_trained`; trained, with random labels.
        images: A batch.
        steps: Steps.

    Returns:
        `step`, `phase`, `position` (phases have length 1) and `mib`; the first point is the model alone.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    live = LiveTensors([*model.parameters(), *model.buffers(), images])
    start = live.live
    with live, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* no budget allocator is attached")  # these steps are no training
        for step in range(1, steps + 1):
            live.place = (step, "forward")
            outputs = model(images)
            loss = outputs.float().square().mean()
            del outputs
            live.place = (step, "backward")
            loss.backward()
            live.place = (step, "optimizer")
            optimizer.step()
            optimizer.zero_grad()
            del loss
            torch.zeros(())  # a point after the gradients are gone
    found = [{"step": 0, "phase": "start", "position": 0.0, "mib": start / 2**20}]
    for step in range(1, steps + 1):
        for number, phase in enumerate(_PHASES):
            own = [size for at, name, size in live.points if (at, name) == (step, phase)]
            begin = (step - 1) * len(_PHASES) + number
            found += [
                {"step": step, "phase": phase, "position": begin + (k + 1) / len(own), "mib": size / 2**20}
                for k, size in enumerate(own)
            ]
    return found


def _thinned(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most so many points of each phase, the greatest of its neighbors each."""
    kept: list[dict[str, Any]] = []
    for place in dict.fromkeys((point["step"], point["phase"]) for point in points):
        own = [point for point in points if (point["step"], point["phase"]) == place]
        width = math.ceil(len(own) / _MOST_POINTS)
        kept += [max(own[i : i + width], key=lambda point: point["mib"]) for i in range(0, len(own), width)]
    return kept


def _draw_radar(rows: Sequence[Row]) -> Figure:
    """Polygons on axes that leave one center, with the highest accuracy at each axis's end."""
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    methods = grouped(rows, "method")
    figure, axes = new_figure(560, 410 + 20 * -(-len(methods) // 4))
    axes.set_axis_off()
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.3, 1.3), aspect="equal")
    angles = np.pi / 2 - np.arange(len(axes_names)) * 2 * np.pi / len(axes_names)
    for radius in (0.3, 0.65, 1.0):
        ring = np.append(angles, angles[0])
        axes.plot(radius * np.cos(ring), radius * np.sin(ring), color=GRID, linewidth=1)
    for angle, name in zip(angles, axes_names, strict=True):
        axes.plot([0, np.cos(angle)], [0, np.sin(angle)], color=GRID, linewidth=1)
        best = max(row["accuracy"] for row in rows if row["axis"] == name)
        side = "center" if abs(np.cos(angle)) < 0.1 else "left" if np.cos(angle) > 0 else "right"
        place = (1.1 * np.cos(angle), 1.14 * np.sin(angle))
        axes.text(*place, shortened(name, 22), ha=side, va="bottom", color=INK, fontsize=12)
        axes.text(*place, f"{100 * best:.1f} %", ha=side, va="top", color=MUTED, fontsize=11)
    handles = []
    for number, own in enumerate(methods.values()):
        color, marker = style_of(number)
        radii = np.array([row["radius"] for row in own])
        closed, turn = np.append(radii, radii[0]), np.append(angles, angles[0])
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.8}
        handles += axes.plot(closed * np.cos(turn), closed * np.sin(turn), **look)
    add_legend(figure, handles, [shortened(method) for method in methods], columns=4)
    return figure


def _draw_memory(rows: Sequence[Row]) -> Figure:
    """A line a run over the phases of the steps."""
    figure, axes = new_figure(640, 380, f"Living tensors in training, batch {rows[0]['batch_size']}")
    handles, runs = [], grouped(rows, "run")
    for number, own in enumerate(runs.values()):
        handles += axes.plot(
            [row["position"] for row in own], [row["mib"] for row in own], color=style_of(number)[0], linewidth=1.8
        )
    last = math.ceil(max(row["position"] for row in rows))
    for place in range(0, last + 1, len(_PHASES)):
        axes.axvline(place, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks([place + 0.5 for place in range(last)], [_PHASES[place % 3] for place in range(last)])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    add_legend(figure, handles, [shortened(label, 24) for label in runs])
    return figure
