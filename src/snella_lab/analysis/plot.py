"""Plots: a figure with its data, file output, and the registry of plot kinds."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from snella_app.files import ensure_folder, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
T = TypeVar("T")

KINDS = {
    "allocation": "budgets",
    "evolution": "budgets",
    "update": "updates",
    "overlap": "updates",
    "features": "pictures",
    "radar": "profiles",
    "memory": "profiles",
    "samples": "pictures",
    "masks": "pictures",
    "gradcam": "pictures",
    "images": "pictures",
}
"""Module in `snella_lab.analysis` of each plot function."""


@dataclass(frozen=True)
class Plot:
    """A figure and its data.

    Attributes:
        name: Stem of the file names.
        rows: Data, one mapping from column to value per CSV row.
        draw: Function that creates the figure.
        notes: Notes for the reader, one per line.
        tables: Additional tables by file name suffix.
    """

    name: str
    rows: Sequence[Row]
    draw: Callable[[], Figure]
    notes: Sequence[str] = ()
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)


def write_plots(plots: Sequence[Plot], out: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write each plot as SVG and PNG, light and dark, and its data as CSV.

    Args:
        plots: Plots from a function in `KINDS`.
        out: Output folder; created if missing.
        overwrite: Replace existing files.

    Returns:
        Paths of `NAME.svg`, `NAME.png`, `NAME-dark.svg`, `NAME-dark.png` and `NAME.csv` of each plot, and
        `NAME-TABLE.csv` of its additional tables.

    Raises:
        FileExistsError: If a file exists; nothing is written.
    """
    from snella_app.report.style import write_figure

    folder = Path(out)
    tables = {
        folder / f"{plot.name}{ending}.csv": rows
        for plot in plots
        for ending, rows in {"": plot.rows, **{f"-{name}": rows for name, rows in plot.tables.items()}}.items()
    }
    figures = (
        folder / f"{plot.name}{dark}.{kind}" for plot in plots for dark in ("", "-dark") for kind in ("svg", "png")
    )
    existing = [path for path in (*tables, *figures) if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"out={folder} already contains {existing[0].name!r}; choose another folder, or pass --overwrite "
            "(overwrite=True)"
        )
    with ensure_folder(folder):
        paths = [path for plot in plots for path in write_figure(plot.draw(), folder, plot.name)]
        for path, rows in tables.items():
            write_text(path, csv_text(rows))
    return [*paths, *tables]


def csv_text(rows: Sequence[Row]) -> str:
    """Format a table as CSV with the union of all columns; NaN and None become empty cells."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(row.get(name)) for name in columns] for row in rows)
    return out.getvalue()


def _plain(value: Any) -> Any:
    """Convert a cell to CSV; floats keep full precision."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else value


def plot_function(kind: str) -> Callable[..., list[Plot]]:
    """Import and return the function of a plot kind.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    module = importlib.import_module(f"snella_lab.analysis.{KINDS[kind]}")
    function: Callable[..., list[Plot]] = getattr(module, kind)
    return function


def grouped(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    """Group rows by a column, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def in_order_of_depth(layers: Mapping[str, list[T]]) -> dict[str, list[T]]:
    """Sort layers by block number; matrices outside blocks (`–`) come last."""
    return dict(sorted(layers.items(), key=lambda item: math.inf if item[0] == "–" else int(item[0])))


def run_labels(runs: Sequence[str | Path]) -> list[str]:
    """Return the shortest unique path suffix of each folder."""
    parts = [Path(run).resolve().parts for run in runs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels if runs else []
