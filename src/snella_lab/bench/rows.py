"""Benchmark rows: storage as JSON Lines, and figures."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from snella_app.files import write_text
from snella_app.report.style import FIGURE_SIZE, add_legend, new_figure
from snella_lab.bench.baselines import REFERENCE
from snella_lab.style import save_figure, style_of


def append_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSON Lines file, after removing a truncated last line."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        write_text(file, "".join(json.dumps(row) + "\n" for row in read_rows(file)))
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file. The last line is skipped if it is invalid JSON, e.g. truncated.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If any other line is invalid JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: {error}; remove it") from None
    return rows


_COMMON = ("dtype", "r", "sparsity", "device")
"""Fields that the rows of a figure share."""
_ORDER = (
    *("lora", "snella", "full", "paper", "frozen", "dora", "shira", "snella-keep-delta"),
    *("klora", "spt-lora", "spt-adapter", "snell"),
)
"""Methods in legend order. The position of a method also selects its line style."""


_MEMORY_LABELS = {
    "peak_gpu_mib": "peak memory (MiB)",
    "peak_step_mib": "memory growth during steps (MiB)",
    "counted_mib": "estimated memory (MiB)",
}
"""Axis labels of the memory measures, the preferred measure first."""


def is_step_time(row: dict[str, Any]) -> bool:
    """Return True for a row of step times that is drawn in figures. `snella-keep-delta` is drawn only for GPUs."""
    is_hidden = row.get("method") == "snella-keep-delta" and row["device"].startswith("cpu")
    return row.get("benchmark") == "step_time" and not is_hidden


def draw_figures(rows_file: str | Path, folder: str | Path) -> list[Path]:
    """Plot step time versus batch size and memory versus model size as SVG, and return the paths.

    For each method and setting, only the row with the most rounds on the latest day is drawn. A time figure needs at
    least two batch sizes, and a memory figure needs at least two models.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = sorted(filter(is_step_time, read_rows(rows_file)), key=lambda row: (row["date"][:10], row["rounds"]))
    latest = {setting_key(row): row for row in shown}
    rows = [row | {"million": row["weights"] / 1e6, "counted_mib": _counted_mib(row)} for row in latest.values()]
    paths = []
    for (backbone, *common), figure_rows in grouped(rows, "backbone", *_COMMON).items():
        if len({row["batch"] for row in figure_rows}) > 1:
            path = folder / f"time-{backbone}{_suffix(*common)}.svg"
            title = f"{backbone}, {_settings_text(*common)}"
            paths.append(_draw_lines(path, figure_rows, "batch", "step_s", title, "batch size", "seconds per step"))
    for (batch, *common), figure_rows in grouped(rows, "batch", *_COMMON).items():
        measure = next(key for key in _MEMORY_LABELS if all(key in row for row in figure_rows))
        if len({row["backbone"] for row in figure_rows}) > 1:
            path = folder / f"memory-batch{batch}{_suffix(*common)}.svg"
            label = _MEMORY_LABELS[measure]
            title = f"batch {batch}, {_settings_text(*common)}"
            paths.append(_draw_lines(path, figure_rows, "million", measure, title, "weights (millions)", label))
    return paths


def _counted_mib(row: dict[str, Any]) -> float:
    """Estimate the memory of a step: weights, saved tensors, gradients, and AdamW's two moments of trained parameters.

    SNELLA's importance scores add two float32 averages per trainable parameter.
    """
    itemsize = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    importance = 2 * 4 * row["trainable"] if row["method"].startswith("snella") else 0
    return float(row["saved_mib"] + ((row["weights"] + 3 * row["trainable"]) * itemsize + importance) / 2**20)


def setting_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the method and setting of a row."""
    return tuple(row.get(name) for name in ("method", "backbone", "r", "sparsity", "dtype", "batch", "device"))


def grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Group rows by the fields in `names`."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def _draw_lines(path: Path, rows: list[dict[str, Any]], x: str, y: str, title: str, x_label: str, y_label: str) -> Path:
    """Plot the field `y` versus the field `x` with one line per method, and return the path."""
    figure, axes = new_figure(*FIGURE_SIZE, title)
    names = sorted({row["method"] for row in rows}, key=sort_key)
    other_names = [name for name in names if name not in _ORDER]
    numbers = {name: number for number, name in enumerate([*_ORDER, *other_names])}
    for name in names:
        points = sorted((row[x], row[y]) for row in rows if row["method"] == name)
        color, marker = style_of(numbers[name])
        # dashed and on top, so that a line below it with the same values remains visible
        style: dict[str, Any] = {"linestyle": "--", "zorder": 3} if name == REFERENCE else {}
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=name, **style)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    add_legend(figure, handles, labels)
    save_figure(figure, path)
    return path


def sort_key(name: str) -> tuple[int, str]:
    """Return a key that sorts methods as in `_ORDER`, followed by all others in alphabetical order."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), name


def _settings_text(dtype: str, r: int, sparsity: float, device: str) -> str:
    """Format the settings that a figure's rows share. CPU names are shortened to "CPU"."""
    device_text = device.partition(",")[0].upper() if device.startswith("cpu") else device
    return f"{dtype}, r {r}, sparsity {sparsity}, {device_text}"


def _suffix(dtype: str, r: int, sparsity: float, device: str) -> str:
    """Format the settings that a figure's rows share as a file name suffix."""
    device_text = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"-{dtype}-r{r}-sparsity{sparsity}-{device_text}"
