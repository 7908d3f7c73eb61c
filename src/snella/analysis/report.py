"""The report page of a run: one HTML file that opens anywhere and asks the network for nothing."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from snella.analysis.adapter_file import read_adapter, saved_budgets
from snella.analysis.examples import ImageSource
from snella.analysis.figure_style import write_whole
from snella.analysis.formats import bytes_text, count_text, percent_text, plain_text, seconds_text
from snella.analysis.mask_sections import classes_section, masks_section
from snella.analysis.matrix_grid import adapter_budgets
from snella.analysis.report_sections import (
    allocation_section,
    comparison_section,
    confusion_section,
    curves_section,
    examples_section,
    results_section,
)
from snella.analysis.run_files import Metrics, read_allocation, read_comparison, read_if_present, read_metrics, read_run

__all__ = ["write_report"]

_USES = {
    "classification": ("Classify images", "photo.jpg another.png", "Write plain weights that need nothing of snella"),
    "segmentation": (
        "Segment images: masks and overlays",
        "photo.jpg another.png --out masks",
        "Write the whole model with the update folded in",
    ),
}
"""How a run of each task is used: what `predict` does, its arguments, and what `merge` gives."""


def write_report(run: str | Path, images: ImageSource | None = None) -> Path:
    """Write `RUN/report.html` from the files of the run, whole or not at all.

    Sections without material (budgets of a method that has none, results of a run that has only begun) are left out.

    Args:
        run: Folder of the run.
        images: Pictures of the split in `predictions.json`, by index: a mapping, or a function such as the
            validation set's `image`.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: The folder holds no `run.json`, or the run is finished and has no `metrics.json`.
        ValueError: A file of the run is damaged.
    """
    folder = Path(run)
    page = _render(folder, images)
    write_whole(folder / "report.html", page.encode("utf-8"))
    return folder / "report.html"


def _warning(metrics: Metrics | None) -> str:
    """What the results must not be mistaken for; empty where there is nothing to warn of."""
    if metrics is None or metrics.selected_on != "test":
        return ""
    return (
        f"Protocol {metrics.protocol}: the best epoch was chosen on the test images, so that the test results are too "
        "good, and not comparable with those of runs that chose on validation."
    )


def _render(folder: Path, images: ImageSource | None) -> str:
    """The page as a text."""
    info = read_run(folder)
    metrics = read_metrics(folder) if info.is_finished else read_if_present(read_metrics, folder, "metrics.json")
    allocation = read_if_present(read_allocation, folder, "allocation.json")
    adapter = read_adapter(folder)
    saved = saved_budgets(adapter, allocation.matrices) if adapter and allocation else {}
    budgets = adapter_budgets(allocation, metrics) | saved if allocation else {}
    comparison = read_if_present(read_comparison, folder, "comparison.json")
    config = folder / "config.yaml"
    context: dict[str, Any] = {
        "run": info,
        "folder": str(folder),
        "quoted": shlex.quote(str(folder)),
        "metrics": metrics,
        "warning": _warning(metrics),
        "results": results_section(metrics, allocation, budgets),
        "curves": curves_section(metrics),
        "confusion": confusion_section(info, metrics),
        "allocation": allocation_section(info, metrics, allocation, budgets),
        "has_adapter": adapter is not None,
        "comparison": comparison_section(comparison),
        "examples": examples_section(folder, info, images),
        "classes": classes_section(metrics),
        "masks": masks_section(folder, info, images),
        "use": _USES.get(info.task, _USES["classification"]),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "test_name": "test" if metrics is None or metrics.test else "validation",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        count=count_text, percent=percent_text, seconds=seconds_text, bytes=bytes_text, plain=plain_text
    )
    texts = resources.files("snella.analysis")
    template = environment.from_string(texts.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    style = texts.joinpath("report.css").read_text(encoding="utf-8")
    return template.render(context, style=Markup(style))
