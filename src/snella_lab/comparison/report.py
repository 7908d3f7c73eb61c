"""Reports of a comparison: a self-contained HTML file, Markdown tables, and the comparison with a paper's numbers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from snella_app.console import counted, make_table
from snella_app.data.protocol import get_protocol
from snella_app.files import write_text
from snella_app.records import CellRow, SearchChoice
from snella_app.report.report import write_page as write_template
from snella_app.report.style import inline_svg, shortened
from snella_app.text import decimal_text, measure_text, percent_text, plain_text, points_text, seconds_text
from snella_lab.comparison import figures
from snella_lab.comparison.experiment import MEASURES, OVER_GROUPS, OVER_TASKS, Experiment
from snella_lab.comparison.statistics import LEVEL, MIN_UNITS, Difference, Rows, difference, final_rows, with_holm
from snella_lab.comparison.summary import (
    MethodSummary,
    Summary,
    caption,
    cost_texts,
    difference_text,
    interval_text,
    outcome_text,
    recommend,
    recommendation_text,
    significance_texts,
    spread_text,
    summarize,
    table_cells,
)

_METRIC = "test_accuracy"  # which the papers report
_SHARES = {f"test_{metric}" for measures in MEASURES.values() for metric in measures}


@dataclass(frozen=True)
class PaperComparison:
    """A number reported by the paper and the result here.

    Args:
        method: The method's label.
        column: A task, a group, or one of the two means.
        paper: In percent.
        ours: In percent; None where a run is missing.
    """

    method: str
    column: str
    paper: float
    ours: float | None

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Method, column, paper's, ours and the difference in points, human-readable."""
        if self.ours is None:
            return self.method, self.column, f"{self.paper:.1f}", "–", "–"
        difference = points_text((self.ours - self.paper) / 100)
        return self.method, self.column, f"{self.paper:.1f}", f"{self.ours:.1f}", difference


def paper_comparison(experiment: Experiment, summary: Summary) -> list[PaperComparison]:
    """Every reported number whose method is in the experiment, with the result here; empty without reported ones."""
    lines = {line.name: line for line in summary.methods}
    return [
        PaperComparison(method, column, float(value), _own_result(column, lines[method], summary))
        for method, values in experiment.published.get("values", {}).items()
        if method in lines
        for column, value in values.items()
    ]


def print_paper_comparison(console: Console, experiment: Experiment, summary: Summary) -> None:
    """Print the table, if the experiment has reported numbers."""
    rows = paper_comparison(experiment, summary)
    if not rows:
        return
    title = f"compared with the paper: {experiment.published.get('source', '')}"
    headings = ("method", "", "paper", "ours", "difference")
    console.print(make_table(headings, (row.texts for row in rows), title=title, left=2))


@dataclass(frozen=True)
class OrderingResult:
    """An ordering that the paper claims, and what the runs here say of it.

    Attributes:
        claim: Human-readable, such as `cubic above linear`.
        verdict: `holds` or `contradicted` where the difference is decided, else `not decided`, or `not run`.
        difference: Of the one that is to be higher to the other, in pairs of the same task and seed, with Holm's
            correction over the claims; None without.
        is_share: Whether the difference is one of shares (accuracy).
    """

    claim: str
    verdict: str
    difference: Difference | None
    is_share: bool

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Claim, verdict, difference with its interval, and its tests, human-readable."""
        found = self.difference
        if found is None:
            return self.claim, self.verdict, "–", "–", "–"
        if self.is_share:
            text = difference_text(found, found.tasks)
        else:
            mean, *ends = (measure_text(value, signed=True) for value in (found.mean, found.low, found.high))
            text = mean if math.isnan(found.low) else f"{mean} [{', '.join(ends)}]"
        return self.claim, self.verdict, f"{text}, {counted(found.pairs, 'pair')}", *significance_texts(found)


ORDERING_HEADINGS = ("the paper's claim", "here", f"difference, {percent_text(LEVEL, 0)} interval", "p", "above")


def paper_orderings(experiment: Experiment, rows: Rows) -> list[OrderingResult]:
    """Which of the paper's orderings hold here; those of methods that are not in the experiment are left out."""
    names = [method.name for method in experiment.methods]
    finals = final_rows(rows)
    claims: list[tuple[str, Difference | None, bool]] = []
    for claim in experiment.published.get("orderings", []):
        higher, lower, metric = claim["higher"], claim["lower"], claim.get("metric", _METRIC)
        if higher not in names or lower not in names:
            continue
        tasks = [claim["task"]] if claim.get("task") else [entry.name for entry in experiment.data]
        measured = [row for row in finals if row.column(metric) is not None]
        found = difference(measured, higher, lower, tasks, metric)
        words = f"{higher} above {lower}" + (f" on {claim['task']}" if claim.get("task") else "")
        words += "" if metric == _METRIC else f" in {metric.replace('_', ' ')}"
        claims.append((words, found, metric in _SHARES))
    corrected = with_holm(dict(enumerate(found for _, found, _ in claims)))
    return [
        OrderingResult(words, _verdict(corrected[number]), corrected[number], is_share)
        for number, (words, _, is_share) in enumerate(claims)
    ]


def _verdict(found: Difference | None) -> str:
    """What a difference says of the claim that it is positive."""
    return "not run" if found is None else ("not decided", "holds", "contradicted")[found.direction]


def print_paper_orderings(console: Console, experiment: Experiment, rows: Rows) -> None:
    """Print which of the paper's orderings hold, if the experiment has any."""
    results = paper_orderings(experiment, rows)
    if not results:
        return
    title = f"orderings of the paper: {experiment.published.get('source', '')}"
    console.print(make_table(ORDERING_HEADINGS, (result.texts for result in results), title=title, left=3))


def _own_result(column: str, line: MethodSummary, summary: Summary) -> float | None:
    """The result here of one column, in percent."""
    spreads = line.per_task[_METRIC]
    if column == OVER_TASKS:
        found = line.over_tasks[_METRIC]
    elif column == OVER_GROUPS:
        found = line.over_groups[_METRIC]
    elif column in summary.groups and column not in spreads:
        means = [spreads[task] for task in summary.groups[column]]
        known = [mean.mean for mean in means if mean is not None]
        return 100 * sum(known) / len(known) if len(known) == len(means) else None
    else:
        found = spreads.get(column)
    return None if found is None else 100 * found.mean


MARKDOWN_FILE = "comparison.md"


def markdown_tables(experiment: Experiment, rows: Rows) -> str:
    """The tables of accuracy and balanced accuracy, with what they are, the command, the machine and the dates.

    Args:
        experiment: Order, groups and reference.
        rows: All rows.

    Returns:
        Markdown; says so where no final run is finished.
    """
    summary = summarize(experiment, rows)
    if not summary.finals:
        return "No final run is finished yet.\n"
    parts = []
    for metric, title in summary.metrics.items():
        headings, *lines = table_cells(summary, metric, with_costs=metric == summary.column)
        rule = [" --- " if heading == "method" else " ---: " for heading in headings]
        table = [_markdown_line(headings), f"|{'|'.join(rule)}|", *map(_markdown_line, lines)]
        parts.append(f"**Test {title}**\n\n" + "\n".join(table))
    parts.append(recommendation_text(summary))
    done = f"{summary.finals} of {summary.expected} final runs"
    parts.append(f"{caption(summary)[0].upper()}{caption(summary)[1:]}. {done}. {_provenance(experiment, rows)}")
    orderings = paper_orderings(experiment, rows)
    if orderings:
        first = _markdown_line(list(ORDERING_HEADINGS)) + "\n| --- | --- | ---: | ---: | ---: |"
        claims = [_markdown_line(list(result.texts)) for result in orderings]
        parts.append("**Orderings of the paper**\n\n" + "\n".join([first, *claims]))
    warning = get_protocol(experiment.settings.get("protocol", "standard")).warning
    parts += [f"Official protocol: {warning}"] if warning else []
    if summary.failed:
        parts.append("Failed: " + "; ".join(f"`{row.cell}`, {row.error}" for row in summary.failed))
    return "\n\n".join(parts) + "\n"


def write_markdown(root: Path, experiment: Experiment, rows: Rows) -> Path:
    """Write the tables next to the report."""
    write_text(root / MARKDOWN_FILE, markdown_tables(experiment, rows))
    return root / MARKDOWN_FILE


def _markdown_line(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _provenance(experiment: Experiment, rows: Rows) -> str:
    """Command, machines, dates and commits."""
    finals = final_rows(rows)
    dates = sorted({row.created_at[:10] for row in finals})
    machines = sorted({str(row.system_info.get("processor") or row.system_info.get("machine")) for row in finals})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    command = f"`{experiment.command}`, " if experiment.command else ""
    commits = dict.fromkeys(str(row.package_info.get("snella-commit-hash") or "")[:8] for row in finals)
    code = ", ".join(commit for commit in commits if commit)
    return f"{command}{', '.join(machines)}, {when}{f', snella {code}' if code else ''}."


FILE = "comparison.html"
_NARROW = 310  # pixels that a phone's screen leaves for a figure
_KEPT = {
    "standard": "with the best epoch on validation",
    "final": "with the last epoch, after learning from the validation images too",
    "official": "with the best epoch on these same test images",
}
"""Which epoch a final run evaluates, by protocol."""


def write_page(root: Path, experiment: Experiment, rows: Rows) -> Path:
    """Write the page atomically.

    Args:
        root: Folder of the comparison.
        experiment: What was compared.
        rows: All rows there are.

    Returns:
        The page's path.
    """
    summary = summarize(experiment, rows)
    context = {
        "experiment": experiment,
        "title": _title(experiment),
        "summary": summary,
        "tables": [_table(summary, metric, title) for metric, title in summary.metrics.items()]
        if summary.finals
        else [],
        "published": [row.texts for row in paper_comparison(experiment, summary)],
        "orderings": [result.texts for result in paper_orderings(experiment, rows)],
        "kept": _KEPT[experiment.settings.get("protocol", "standard")],
        "warning": get_protocol(experiment.settings.get("protocol", "standard")).warning,
        "costs": _costs(summary),
        "pareto": _pareto(summary),
        "rates": _rates(summary, rows),
        "choices": _choices(summary, rows),
        "outcome": outcome_text(summary),
        "recommendation": recommendation_text(summary),
        "headline": _headline(summary),
        "forest": _forest(summary, False),
        "forests": _forest(summary, True) if len(summary.tasks) > 1 else Markup(""),
        "shown_points": f"{100 * figures.SHOWN_RANGE:g}",
        "on_gpu": any(row.column("accelerator_memory_max") for row in rows),
        "tested": interval_text(summary),
        "level": percent_text(LEVEL, 0),
        "most_p": decimal_text(1 - LEVEL, 2),
        "least_units": MIN_UNITS,
        "machines": _machines(rows),
        "tuned": "Learning rate and weight decay" if experiment.grid.weight_decays else "The learning rate",
        "trials": sum(row.purpose == "trial" for row in rows),
        "hours": seconds_text(sum(row.total_time for row in rows) - _counted_twice(rows)),
        "settings": yaml.safe_dump(experiment.as_dict(), sort_keys=False, allow_unicode=True),
    }
    return write_template(root, "snella_lab.comparison", context, FILE)


def _title(experiment: Experiment) -> str:
    """The experiment's name, with its tasks where it was given none."""
    if experiment.name != Experiment.name:
        return experiment.name
    return f"{experiment.name} on {', '.join(entry.name for entry in experiment.data)}"


def _headline(summary: Summary) -> dict[str, Any] | None:
    """The recommended method, and the one with the highest measure if that is another; None if none is done."""
    means = {m.name: value for m in summary.methods if (value := m.over_tasks[summary.column]) is not None}
    if not means:
        return None
    name = recommend(means, {m.name: m.costs for m in summary.methods}, summary.measure)[0]
    best = max(means, key=lambda method: means[method].mean)
    return {
        "name": name,
        "score": _score_text(means[name].mean, summary),
        "best": best,
        "best_score": _score_text(means[best].mean, summary),
        "is_best": math.isclose(means[name].mean, means[best].mean),
    }


def _score_text(mean: float, summary: Summary) -> str:
    """A mean, as a share in percent or as a number."""
    return percent_text(mean) if summary.column in _SHARES else decimal_text(mean, 3)


def _counted_twice(rows: Rows) -> float:
    """Seconds of tuning runs that are also in the rows of the final runs made from them."""
    times = {row.cell: row.total_time for row in rows}
    return sum(times.get(row.results.trained_as or "", 0.0) for row in rows if row.results is not None)


def _table(summary: Summary, metric: str, title: str) -> dict[str, Any]:
    """Headings and lines of one measure, the best of each column marked."""
    columns, headings, lines = [], [], []
    if len(summary.tasks) > 1:
        columns.append([m.over_tasks[metric] for m in summary.methods])
        headings.append("mean over tasks")
    if summary.has_groups:
        columns.append([m.over_groups[metric] for m in summary.methods])
        headings.append("mean over groups")
    means = max(len(headings), 1)  # before the difference; of a single task its score
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
        text, tests = difference_text(difference, len(summary.tasks)), significance_texts(difference)
        lines.append({"name": method.name, "cells": cells, "difference": text, "tests": tests})
    is_main = metric == summary.column
    return {"title": title, "headings": headings, "means": means, "lines": lines, "is_main": is_main}


def _costs(summary: Summary) -> dict[str, Any]:
    """Headings and lines of the costs; empty columns are left out."""
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
    """The measure against each cost that was measured."""
    has_gpu = any(method.costs["accelerator_memory_max"] for method in summary.methods)
    axes = [
        ("accelerator_memory_max", "peak memory on the GPU, bytes", "Memory", False)
        if has_gpu
        else ("training_mib", "peak memory beyond the libraries, MiB", "Memory", False),
        ("num_trainable_params", "trainable parameters", "Trainable parameters", True),
        ("step_time", "median seconds of a step", "Step time", False),
    ]
    pictures = []
    for name, label, title, is_log in axes:
        figure = figures.pareto(summary, name, label, title, is_log)
        if figure is not None:
            text = f"Test {summary.measure} against {title.lower()}, a point a method."
            pictures.append(_picture(figure, f"pareto-{name}", text))
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
    tasks = summary.tasks or sorted({row.task_name for row in rows})
    wanted = [("Mean over tasks", tasks)] if len(tasks) > 1 else []
    pictures = []
    for number, (title, several) in enumerate([*wanted, *((task, [task]) for task in tasks)]):
        figure = figures.learning_rate_curves(summary, rows, several, shortened(title, 40))
        if figure is not None:
            text = f"{title}: validation {summary.measure} against the learning rate, a line a method."
            pictures.append(_picture(figure, f"rates-{number}", text))
    return pictures


def _choices(summary: Summary, rows: Rows) -> list[dict[str, Any]]:
    """The chosen hyperparameters of every pair of task and method."""
    found: dict[tuple[str, str], CellRow] = {}
    for final in final_rows(rows):
        found.setdefault((final.task_name, final.experiment_name), final)
    lines = []
    for task in summary.tasks:
        for method in summary.methods:
            row = found.get((task, method.name))
            if row is not None:
                search = row.search or SearchChoice(lr_factor=None)
                lines.append(
                    {
                        "task": task,
                        "method": method.name,
                        "factor": f"×{row.lr_factor:g}",
                        "lr": plain_text(row.lr),
                        "head_lr": plain_text(row.head_lr),
                        "weight_decay": plain_text(row.weight_decay),
                        "trials": len(search.trials),
                        "edge": ", ".join(["rate"] * search.lr_on_edge + ["decay"] * search.weight_decay_on_edge),
                    }
                )
    return lines


def _machines(rows: Rows) -> list[dict[str, Any]]:
    """The distinct machines and versions that rows come from, with how many rows each."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        packages = {key.removesuffix("-version"): value for key, value in row.package_info.items() if value}
        key = repr((row.system_info, packages))
        entry = found.setdefault(key, {"rows": 0, "dates": [], "system": row.system_info, "packages": packages})
        entry["rows"] += 1
        entry["dates"].append(row.created_at[:10])
    for entry in found.values():
        first, last = min(entry["dates"]), max(entry["dates"])
        entry["dates"] = first if first == last else f"{first} to {last}"
    return list(found.values())


def _picture(figure: Figure | None, name: str, description: str) -> Markup:
    """A figure as markup, empty for none; `inline_svg` escapes what comes from the rows."""
    return Markup("" if figure is None else inline_svg(figure, name, description))
