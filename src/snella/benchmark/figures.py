"""Pictures of the rows: time against batch, memory against model size (the paper's Figure 7 b, c)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from snella.analysis.figure_style import COLOURS, CURVE, add_legend, new_figure, save_figure
from snella.benchmark.config import PEER
from snella.benchmark.rows import read_rows

_COMMON = ("dtype", "r", "sparsity", "device")
_ORDER = ("lora", "snella", "full", "paper", "frozen", "dora", "shira", "snella-keep-delta")


def draw_figures(rows_file: str | Path, folder: str | Path) -> list[Path]:
    """Draw every picture that the rows allow.

    Args:
        rows_file: JSON lines of `bench`. Of several rows of one setting the last one counts.
        folder: Where the SVG files go.

    Returns:
        Their paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    latest = {_key(row): row for row in read_rows(rows_file) if row.get("benchmark") == "step_time"}
    rows = [row | {"million": row["weights"] / 1e6, "counted_mib": _counted_mib(row)} for row in latest.values()]
    drawn = []
    for (backbone, *common), part in _grouped(rows, "backbone", *_COMMON).items():
        if len({row["batch"] for row in part}) > 1:
            path = folder / f"time-{backbone}{_suffix(*common)}.svg"
            title = f"{backbone}, {_words(*common)}"
            drawn.append(_lines(path, part, "batch", "step_s", title, "images per step", "seconds per step"))
    for (batch, *common), part in _grouped(rows, "batch", *_COMMON).items():
        memory = next((key for key in ("peak_gpu_mib", "peak_step_mib", "counted_mib") if key in part[0]), None)
        if memory is not None and len({row["backbone"] for row in part}) > 1:
            path = folder / f"memory-batch{batch}{_suffix(*common)}.svg"
            label = {"counted_mib": "memory by count (MiB)"}.get(memory, "peak memory (MiB)")
            title = f"batch {batch}, {_words(*common)}"
            drawn.append(_lines(path, part, "million", memory, title, "weights (millions)", label))
    return drawn


def _counted_mib(row: dict[str, Any]) -> float:
    """What a step needs by count: weights, kept activations, and of what is trained gradients and AdamW's two moments.

    SNELLA's importance is two more averages, in float32.
    """
    bytes_each = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    importance = 2 * 4 * row["trainable"] if row["contender"].startswith("snella") else 0
    return float(row["saved_mib"] + ((row["weights"] + 3 * row["trainable"]) * bytes_each + importance) / 2**20)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    return tuple(row.get(name) for name in ("contender", "backbone", "r", "sparsity", "dtype", "batch", "device"))


def _grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that share some values."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def _lines(path: Path, rows: list[dict[str, Any]], x: str, y: str, title: str, x_label: str, y_label: str) -> Path:
    """One line a contender."""
    figure, axes = new_figure(*CURVE, title)
    names = sorted({row["contender"] for row in rows}, key=_place)
    for name in names:
        points = sorted((row[x], row[y]) for row in rows if row["contender"] == name and y in row)
        colour = COLOURS[_place(name)[0] % len(COLOURS)]
        # the peer is dashed and on top: where another's line is the same, both are seen
        style: dict[str, Any] = {"linestyle": "--", "zorder": 3} if name == PEER else {}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name, **style)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    add_legend(figure, handles, labels)
    save_figure(figure, path)
    return path


def _place(name: str) -> tuple[int, str]:
    """Where a contender stands among the others, so that it keeps its colour."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), name


def _words(dtype: str, r: int, sparsity: float, device: str) -> str:
    """What a picture's rows have in common; a CPU says that it is one."""
    where = device.partition(",")[0].upper() if device.startswith("cpu") else device
    return f"{dtype}, r {r}, sparsity {sparsity}, {where}"


def _suffix(dtype: str, r: int, sparsity: float, device: str) -> str:
    """The same for a file's name."""
    where = "cpu" if device.startswith("cpu") else "".join(c if c.isalnum() else "-" for c in device.lower())
    return f"-{dtype}-r{r}-sparsity{sparsity}-{where}"
