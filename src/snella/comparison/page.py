"""`comparison.html`: the table and the pictures of a comparison in one file that asks the network for nothing."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from snella._text import count_text, plain_text, seconds_text
from snella.comparison import figures
from snella.comparison.beside_paper import published_rows
from snella.comparison.experiment import Experiment
from snella.comparison.statistics import LEVEL, RESAMPLES, Rows, final_rows
from snella.comparison.summary import (
    METRICS,
    Summary,
    cost_texts,
    difference_text,
    outcome_text,
    spread_text,
    summarise,
)
from snella.report.style import inline_svg, shortened, write_whole
from snella.runs.protocol import protocol_of

FILE = "comparison.html"
_NARROW = 310  # pixels that a phone's screen leaves for a figure
_KEPT = {
    "standard": "with the epoch that was best on validation",
    "final": "with the last epoch, after learning from the validation images too",
    "official": "with the epoch that was best on these same test images",
}
"""Which epoch a final run measures, by protocol."""


def write_page(root: Path, experiment: Experiment, rows: Rows) -> Path:
    """Write the page, whole or not at all.

    Args:
        root: Folder of the comparison.
        experiment: What was compared.
        rows: All rows there are.

    Returns:
        The page's path.
    """
    summary = summarise(experiment, rows)
    context = {
        "experiment": experiment,
        "summary": summary,
        "tables": [_table(summary, metric, title) for metric, title in METRICS.items()] if summary.finals else [],
        "published": [row.texts for row in published_rows(experiment, summary)],
        "kept": _KEPT[experiment.settings.get("protocol", "standard")],
        "warning": protocol_of(experiment.settings.get("protocol", "standard")).warning,
        "costs": _costs(summary),
        "pareto": _pareto(summary),
        "rates": _rates(summary, rows),
        "choices": _choices(summary, rows),
        "outcome": outcome_text(summary),
        "forest": _forest(summary, False),
        "forests": _forest(summary, True) if len(summary.tasks) > 1 else Markup(""),
        "shown_points": f"{100 * figures.SHOWN_RANGE:g}",
        "on_gpu": any(row.get("accelerator_memory_max") for row in rows),
        "pairs": max((d.pairs for m in summary.methods if (d := m.to_reference["test_accuracy"])), default=0),
        "level": f"{LEVEL:.0%}",
        "resamples": RESAMPLES,
        "machines": _machines(rows),
        "trials": sum(row["purpose"] == "trial" for row in rows),
        "hours": seconds_text(sum(row["total_time"] for row in rows) - _counted_twice(rows)),
        "settings": yaml.safe_dump(experiment.as_dict(), sort_keys=False, allow_unicode=True),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=count_text, plain=plain_text)
    template = resources.files("snella.comparison").joinpath("comparison.html.jinja").read_text(encoding="utf-8")
    style = resources.files("snella.report").joinpath("report.css").read_text(encoding="utf-8")
    page = environment.from_string(template).render(context, style=Markup(style))
    write_whole(root / FILE, page.encode("utf-8"))
    return root / FILE


def _counted_twice(rows: Rows) -> float:
    """Seconds of trials that are in the rows of the final cells which they became, too."""
    times = {row["cell"]: row["total_time"] for row in rows}
    return sum(times.get(row.get("trained_as"), 0.0) for row in rows)


def _table(summary: Summary, metric: str, title: str) -> dict[str, Any]:
    """Headings and lines of one measure, the best of each column marked."""
    columns, headings, lines = [], [], []
    if len(summary.tasks) > 1:
        columns.append([m.over_tasks[metric] for m in summary.methods])
        headings.append("mean over tasks")
    if summary.has_groups:
        columns.append([m.over_groups[metric] for m in summary.methods])
        headings.append("mean over groups")
    means = len(headings)
    for task in summary.tasks:
        columns.append([m.per_task[metric][task] for m in summary.methods])
        headings.append(task)
    best = [max((value.mean for value in column if value), default=None) for column in columns]
    for number, method in enumerate(summary.methods):
        cells = []
        for column, top in zip(columns, best, strict=True):
            value = column[number]
            is_best = value is not None and value.mean == top
            cells.append({"text": spread_text(value), "is_best": is_best})
        difference = method.to_reference[metric]
        lines.append(
            {"name": method.name, "cells": cells, "difference": difference_text(difference, len(summary.tasks))}
        )
    is_main = metric == "test_accuracy"
    return {"title": title, "headings": headings, "means": means, "lines": lines, "is_main": is_main}


def _costs(summary: Summary) -> dict[str, Any]:
    """Headings and lines of the costs; columns that nobody has are left out."""
    titles = {
        "trainable": "trainable",
        "changed": "changed weights",
        "file": "file",
        "step": "median step",
        "time": "training",
        "memory": "peak memory",
        "forgetting": "forgetting",
    }
    texts = [(method.name, cost_texts(method.costs)) for method in summary.methods]
    shown = [key for key in titles if any(line[key] != "–" for _, line in texts)]
    return {
        "headings": [titles[key] for key in shown],
        "lines": [{"name": name, "cells": [line[key] for key in shown]} for name, line in texts],
        "has_memory": "memory" in shown,
        "has_forgetting": "forgetting" in shown,
        "has_changed": "changed" in shown,
    }


def _pareto(summary: Summary) -> list[Markup]:
    """Accuracy against each cost that was measured."""
    has_gpu = any(method.costs["accelerator_memory_max"] for method in summary.methods)
    axes = [
        ("accelerator_memory_max", "peak memory on the GPU, bytes", "Accuracy against memory", False)
        if has_gpu
        else ("training_mib", "peak memory beyond the libraries, MiB", "Accuracy against memory", False),
        ("num_trainable_params", "trainable parameters", "Accuracy against trainable parameters", True),
        ("step_time", "median seconds of a step", "Accuracy against step time", False),
    ]
    pictures = []
    for name, label, title, is_log in axes:
        figure = figures.pareto(summary, name, label, title, is_log)
        if figure is not None:
            pictures.append(_picture(figure, f"pareto-{name}", f"{title}, a point a method."))
    return pictures


def _forest(summary: Summary, with_tasks: bool) -> Markup:
    """The differences in two widths, of which the style sheet shows the one that fits the screen."""
    text = "Paired differences on each task." if with_tasks else "Mean paired differences to the reference."
    parts = []
    for place, width in (("roomy", 640), ("narrow", _NARROW)):
        picture = _picture(figures.forest(summary, with_tasks, width), f"forest-{place}-{with_tasks:d}", text)
        if picture:
            parts.append(Markup('<div class="{}">{}</div>').format(place, picture))
    return Markup("").join(parts)


def _rates(summary: Summary, rows: Rows) -> list[Markup]:
    """Accuracy against learning rate: the mean over tasks, then each task."""
    tasks = summary.tasks or sorted({row["task_name"] for row in rows})
    wanted = [("Mean over tasks", tasks)] if len(tasks) > 1 else []
    pictures = []
    for number, (title, several) in enumerate([*wanted, *((task, [task]) for task in tasks)]):
        figure = figures.learning_rate_curves(summary, rows, several, shortened(title, 40))
        if figure is not None:
            text = f"{title}: validation accuracy against the learning rate, a line a method."
            pictures.append(_picture(figure, f"rates-{number}", text))
    return pictures


def _choices(summary: Summary, rows: Rows) -> list[dict[str, Any]]:
    """The chosen rates of every pair of task and method."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for final in final_rows(rows):
        found.setdefault((final["task_name"], final["experiment_name"]), final)
    lines = []
    for task in summary.tasks:
        for method in summary.methods:
            row = found.get((task, method.name))
            if row is not None:
                search = row["search"] or {}
                lines.append(
                    {
                        "task": task,
                        "method": method.name,
                        "factor": f"×{row['lr_factor']:g}",
                        "lr": plain_text(float(row["lr"])),
                        "head_lr": plain_text(float(row["head_lr"])),
                        "weight_decay": plain_text(float(row["weight_decay"])),
                        "trials": len(search.get("trials", ())),
                        "edge": ", ".join(
                            name
                            for name, key in (("rate", "lr_on_edge"), ("decay", "weight_decay_on_edge"))
                            if search.get(key)
                        ),
                    }
                )
    return lines


def _machines(rows: Rows) -> list[dict[str, Any]]:
    """The distinct machines and versions that rows come from, with how many rows each."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        packages = {key.removesuffix("-version"): value for key, value in row["package_info"].items() if value}
        key = repr((row["system_info"], packages))
        entry = found.setdefault(key, {"rows": 0, "dates": [], "system": row["system_info"], "packages": packages})
        entry["rows"] += 1
        entry["dates"].append(row["created_at"][:10])
    for entry in found.values():
        first, last = min(entry["dates"]), max(entry["dates"])
        entry["dates"] = first if first == last else f"{first} to {last}"
    return list(found.values())


def _picture(figure: Figure | None, name: str, description: str) -> Markup:
    """A figure as markup, empty for none; `inline_svg` escapes what comes from the rows."""
    return Markup("" if figure is None else inline_svg(figure, name, description))
