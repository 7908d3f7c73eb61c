"""Plots, their output files, and the registry of plot kinds."""

from __future__ import annotations

import csv
import importlib
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from snella_app.files import create_folder, write_text
from snella_app.settings import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""Row of a table: values by column. Missing columns, None, and NaN become empty cells."""
T = TypeVar("T")

Kind = Literal[
    "allocation",
    "evolution",
    "update",
    "overlap",
    "features",
    "radar",
    "memory",
    "samples",
    "masks",
    "gradcam",
    "images",
]
_MODULES: dict[str, tuple[Kind, ...]] = {
    "budgets": ("allocation", "evolution"),
    "updates": ("update", "overlap"),
    "profiles": ("radar", "memory"),
    "images": ("features", "samples", "masks", "gradcam", "images"),
}
"""Names of the plot functions by module of `snella_lab.analysis`."""


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Config):
    """Options of `snella plot`; None selects the default of the plot function.

    Args:
        kind: allocation, evolution, update, overlap, features, radar, memory, samples, masks, gradcam or images.
        runs: Run folders; comparison folders (radar), image folders (images), or datasets or experiments (samples).
        out: Output folder; created if missing.
        by: Layer granularity (allocation, evolution): block or matrix; default block.
        matrix: Matrix to plot (update, overlap), e.g. blocks.11.attn.qkv.q; defaults to the deepest query projection.
        data: Dataset (features, gradcam), as for snella train; defaults to the first run's data.
        split: Data split (features, masks, gradcam); defaults to the test images (validation if there are none), or to
            all images of --data.
        limit: Maximum number of images in total (features; default 500) or per row (samples, masks, gradcam, images;
            default 6).
        seed: Seed for image selection and embedding (features, samples, gradcam; default 0).
        steps: Training steps (memory; default 2).
        batch_size: Batch size (memory, features); defaults to the first run's (memory) or 32 (features).
        device: auto, or a torch device such as cpu, cuda:1 or mps (features, masks, gradcam).
        overwrite: Overwrite existing files.
    """

    positional: ClassVar = ("kind", "runs")
    minimums: ClassVar = {"limit": 1, "steps": 1, "batch_size": 1}

    kind: Kind
    runs: list[str]
    out: str
    by: Literal["block", "matrix"] | None = None
    matrix: str | None = None
    data: str | None = None
    split: Literal["auto", "train", "val", "test", "all"] | None = None
    limit: int | None = None
    seed: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    device: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure and its data.

    Attributes:
        name: Stem of the file names.
        rows: Table with the data of the figure.
        draw: Function that creates the figure.
        notes: Notes to print, one line each.
        tables: Additional tables, by the suffix of their file names.
    """

    name: str
    rows: Sequence[Row]
    draw: Callable[[], Figure]
    notes: Sequence[str] = ()
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)


def write_plots(plots: Sequence[Plot], out: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write each plot as light and dark SVG and PNG, and its data as CSV.

    Args:
        plots: Plots from `make_plots` or a plot function.
        out: Output folder, which is created if missing.
        overwrite: If True, replace existing files.

    Returns:
        Paths of `NAME.svg`, `NAME.png`, `NAME-dark.svg`, `NAME-dark.png` and `NAME.csv` for each plot, and of
        `NAME-TABLE.csv` for its additional tables.

    Raises:
        FileExistsError: If a file exists and `overwrite` is False. No file is written in this case.
    """
    from snella_lab.style import write_figure

    folder = Path(out)
    tables = {}
    figures = []
    for plot in plots:
        tables[folder / f"{plot.name}.csv"] = plot.rows
        tables |= {folder / f"{plot.name}-{name}.csv": rows for name, rows in plot.tables.items()}
        figures += [folder / f"{plot.name}{ending}" for ending in (".svg", ".png", "-dark.svg", "-dark.png")]
    existing = [path for path in (*tables, *figures) if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"out={folder} already contains {existing[0].name!r}; choose another folder, or pass --overwrite "
            "(overwrite=True)"
        )
    with create_folder(folder):
        paths = [path for plot in plots for path in write_figure(plot.draw(), folder, plot.name)]
        for path, rows in tables.items():
            write_text(path, csv_text(rows))
    return [*paths, *tables]


def csv_text(rows: Sequence[Row]) -> str:
    """Format rows as CSV, with the union of their columns and with empty cells for NaN and None."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells: dict[str, Any] = {}
        for name, value in row.items():
            is_nan = value != value  # only NaN is unequal to itself
            cells[name] = "" if is_nan else value
        writer.writerow(cells)
    return text.getvalue()


def plot_function(kind: Kind) -> Callable[..., list[Plot]]:
    """Import and return the function that computes the plots of a kind."""
    module = next(module for module, kinds in _MODULES.items() if kind in kinds)
    function: Callable[..., list[Plot]] = getattr(importlib.import_module(f"snella_lab.analysis.{module}"), kind)
    return function


def make_plots(options: PlotOptions) -> list[Plot]:
    """Compute the plots of `options.kind`.

    Raises:
        ValueError: If an option does not apply to the kind.
    """
    function = plot_function(options.kind)
    values = {
        name: value
        for name, value in options.flat().items()
        if value is not None and name not in ("kind", "runs", "out", "overwrite")
    }
    unsupported = sorted(set(values) - set(inspect.signature(function).parameters))
    if unsupported:
        names = ", ".join(f"--{name.replace('_', '-')} {values[name]}" for name in unsupported)
        raise ValueError(f"{names}: not an option of snella plot {options.kind}; see snella plot --help")
    return function(options.runs, **values)


def grouped(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    """Group the rows by a column, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def in_order_of_depth(layers: Mapping[str, list[T]]) -> dict[str, list[T]]:
    """Sort layers by block number, with matrices outside blocks (`–`) at the end."""
    return dict(sorted(layers.items(), key=lambda item: math.inf if item[0] == "–" else int(item[0])))


def run_labels(runs: Sequence[str | Path]) -> list[str]:
    """Return the shortest path suffixes, all with the same number of components, that distinguish the folders.

    Raises:
        ValueError: If a folder occurs twice.
    """
    paths = [Path(run).resolve().parts for run in runs]
    if repeated := [str(run) for index, run in enumerate(runs) if paths[index] in paths[:index]]:
        raise ValueError(f"runs must be different folders, got {', '.join(repeated)} twice; pass each folder once")
    for length in range(1, max(map(len, paths), default=1) + 1):
        labels = ["/".join(path[-length:]) for path in paths]
        if len(set(labels)) == len(paths):
            break
    return labels if runs else []
