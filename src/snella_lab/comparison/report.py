"""Comparison reports: a self-contained HTML page, Markdown tables, and comparisons with numbers in a paper."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from snella_app.console import counted, make_table
from snella_app.data.protocol import PROTOCOLS
from snella_app.report.report import write_page as write_template
from snella_app.report.style import inline_svg, shortened
from snella_app.text import decimal_text, measure_text, percent_text, plain_text, points_text, seconds_text
from snella_lab.comparison import figures
from snella_lab.comparison.experiment import OVER_GROUPS, OVER_TASKS, Experiment
from snella_lab.comparison.rows import SearchChoice
from snella_lab.comparison.statistics import (
    LEVEL,
    MIN_UNITS,
    Difference,
    FinalRuns,
    Rows,
    complete_mean,
    final_rows,
    with_holm,
)
from snella_lab.comparison.summary import (
    FRACTIONS,
    NO_RESULTS,
    MethodSummary,
    Summary,
    caption,
    cost_texts,
    difference_text,
    failure_text,
    interval_text,
    mixed_text,
    outcome_text,
    part_text,
    recommendation_text,
    score_text,
    significance_texts,
    spread_text,
    table_cells,
    unit_text,
)


@dataclass(frozen=True)
class PaperComparison:
    """A number reported in a paper and the measured result, both in percent.

    `column` is a task, a group of tasks, or a mean.
    """

    method: str
    column: str
    reported: float
    measured: float | None

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Method, column, reported and measured result, and difference in percentage points, as strings."""
        if self.measured is None:
            return self.method, self.column, f"{self.reported:.1f}", "–", "–"
        difference = points_text((self.measured - self.reported) / 100)
        return self.method, self.column, f"{self.reported:.1f}", f"{self.measured:.1f}", difference


def paper_comparison(summary: Summary) -> list[PaperComparison]:
    """Pair the reported numbers of the experiment's methods with the measured results."""
    measured_methods = {method.name: method for method in summary.methods}
    pairs = []
    for name, reported in summary.experiment.published.get("values", {}).items():
        method = measured_methods.get(name)
        if method is None:
            continue
        for column, value in reported.items():
            pairs.append(PaperComparison(name, column, float(value), _measured_result(column, method, summary)))
    return pairs


@dataclass(frozen=True)
class OrderingResult:
    """An ordering of methods claimed in a paper, tested on the measured runs.

    Attributes:
        claim: Human-readable claim, e.g. `cubic above linear`.
        verdict: `holds` or `contradicted` for a significant difference, else `inconclusive` or `not run`.
        difference: Paired difference with Holm's correction over the claims. None if there are no runs to compare.
        is_fraction: True if the metric, such as accuracy, is formatted in percent.
        tasks: Number of tasks in the claim. If only some of them have paired runs, the verdict is `inconclusive`.
    """

    claim: str
    verdict: str
    difference: Difference | None
    is_fraction: bool
    tasks: int

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Claim, verdict, difference with interval, and test statistics as strings."""
        difference = self.difference
        if difference is None:
            return self.claim, self.verdict, "–", "–", "–"
        if self.is_fraction:
            text = difference_text(difference, self.tasks)
        else:
            values = (difference.mean, difference.low, difference.high)
            mean, *ends = (measure_text(value, signed=True) for value in values)
            text = mean if math.isnan(difference.low) else f"{mean} [{', '.join(ends)}]"
            text += part_text(difference, self.tasks)
        text += f", {counted(difference.pairs, 'pair')}"
        return self.claim, self.verdict, text, *significance_texts(difference)


ORDERING_HEADINGS = ("claim in the paper", "result", f"difference, {percent_text(LEVEL, 0)} interval", "p", "above")


def paper_orderings(experiment: Experiment, rows: Rows) -> list[OrderingResult]:
    """Test the orderings claimed in the paper whose methods are both part of the experiment."""
    names = [method.name for method in experiment.methods]
    claims: list[tuple[str, Difference | None, bool, int]] = []
    for claim in experiment.published.get("orderings", []):
        higher = claim["higher"]
        lower = claim["lower"]
        metric = claim.get("metric", experiment.published_metric)
        if higher not in names or lower not in names:
            continue
        tasks = [claim["task"]] if claim.get("task") else [entry.name for entry in experiment.data]
        runs = FinalRuns([row for row in rows if row.column(metric) is not None])
        difference = runs.difference(higher, lower, tasks, metric)
        text = f"{higher} above {lower}"
        if claim.get("task"):
            text += f" on {claim['task']}"
        if metric != experiment.published_metric:
            text += f" in {metric.replace('_', ' ')}"
        claims.append((text, difference, metric in FRACTIONS, len(tasks)))
    corrected = with_holm(dict(enumerate(difference for _, difference, *_ in claims)))
    results = []
    for number, (text, _, is_fraction, num_tasks) in enumerate(claims):
        difference = corrected[number]
        if difference is None:
            verdict = "not run"
        elif difference.tasks < num_tasks or not difference.direction:
            verdict = "inconclusive"
        else:
            verdict = "holds" if difference.direction > 0 else "contradicted"
        results.append(OrderingResult(text, verdict, difference, is_fraction, num_tasks))
    return results


def print_paper(console: Console, summary: Summary) -> None:
    """Print the paper's numbers and orderings, if the experiment has any, with the measured results."""
    source = summary.experiment.published.get("source", "")
    numbers = [pair.texts for pair in paper_comparison(summary)]
    claims = [result.texts for result in paper_orderings(summary.experiment, summary.rows)]
    for title, headings, rows, left in (
        ("compared with the paper", ("method", "", "paper", "measured", "difference"), numbers, 2),
        ("orderings in the paper", ORDERING_HEADINGS, claims, 3),
    ):
        if rows:
            console.print(make_table(headings, rows, title=f"{title}: {source}", left=left))


def _measured_result(column: str, method: MethodSummary, summary: Summary) -> float | None:
    """Return a method's measured result in one column, in percent, or None if a task in the column has no result."""
    metric = summary.experiment.published_metric
    entries = summary.experiment.data
    spreads = method.per_task[metric]
    group = [entry.name for entry in entries if entry.group == column]
    if column not in spreads and group:
        group_spreads = [spreads.get(task) for task in group]
        mean = complete_mean([None if spread is None else spread.mean for spread in group_spreads])
        return None if mean is None else 100 * mean
    means = {OVER_TASKS: method.over_tasks[metric], OVER_GROUPS: method.over_groups[metric]}
    if column in means and len(summary.tasks) < len(entries):  # the paper's mean is over all tasks
        return None
    value = means[column] if column in means else spreads.get(column)
    return None if value is None else 100 * value.mean


MARKDOWN_FILE = "comparison.md"


def markdown_tables(summary: Summary) -> str:
    """Format the results as Markdown: tables, recommendation, caption, provenance, tested orderings, and failures."""
    paragraphs = _markdown_results(summary) if summary.finals else [f"{NO_RESULTS.capitalize()}."]
    paragraphs += [f"**Warning:** {mixed_text(task)}." for task in summary.mixed_tasks]
    if summary.failed:
        failures = [f"`{row.cell}`, {failure_text(row)}" for row in summary.failed]
        paragraphs.append(f"Failed: {'; '.join(failures)}")
    return "\n\n".join(paragraphs) + "\n"


def _markdown_results(summary: Summary) -> list[str]:
    """Return the paragraphs of `markdown_tables` that describe finished runs."""
    paragraphs = []
    for metric, title in summary.metrics.items():
        headings, *lines = table_cells(summary, metric, with_costs=metric == summary.column)
        rule = [" --- " if heading == "method" else " ---: " for heading in headings]  # right-aligned, except names
        table = [_markdown_line(headings), f"|{'|'.join(rule)}|", *map(_markdown_line, lines)]
        paragraphs.append(f"**Test {title}**\n\n" + "\n".join(table))
    paragraphs.append(recommendation_text(summary))
    progress = f"{summary.finals} of {summary.expected} final runs"
    text = caption(summary)
    paragraphs.append(f"{text[0].upper()}{text[1:]}. {progress}. {_provenance(summary)}")
    orderings = paper_orderings(summary.experiment, summary.rows)
    if orderings:
        heading_line = _markdown_line(list(ORDERING_HEADINGS))
        claims = [_markdown_line(list(result.texts)) for result in orderings]
        table = [heading_line, "| --- | --- | ---: | ---: | ---: |", *claims]
        paragraphs.append("**Orderings in the paper**\n\n" + "\n".join(table))
    warning = PROTOCOLS[summary.experiment.settings.get("protocol", "standard")].warning
    if warning:
        paragraphs.append(f"Official protocol: {warning}")
    return paragraphs


def _markdown_line(cells: list[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _provenance(summary: Summary) -> str:
    """Format the command, the machines, the dates, and the commits of the final runs as a sentence."""
    finals = final_rows(summary.rows)
    command = summary.experiment.command
    dates = sorted({row.created_at[:10] for row in finals})
    machines = sorted({str(row.system_info.get("processor") or row.system_info.get("machine")) for row in finals})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = dict.fromkeys(str(row.package_info.get("snella-commit-hash") or "")[:8] for row in finals)
    code = ", ".join(commit for commit in commits if commit)
    facts = [*machines, when]
    if command:
        facts.insert(0, f"`{command}`")
    if code:
        facts.append(f"snella {code}")
    return f"{', '.join(facts)}."


FILE = "comparison.html"
_NARROW = 310  # figure width in pixels on a phone
MAX_TASK_FIGURES = 24
"""Maximum number of tasks for which the page contains figures of individual tasks. The tables contain all tasks."""
_TEST_EVALUATION = {
    "standard": "once on the test images, with the model selected on the validation images",
    "final": "once on the test images, after the last epoch of training on training and validation images",
    "official": "on the test images at several epochs; its result is the best of them",
}
"""Evaluation of final runs by protocol, as the end of a sentence on the page."""


def write_page(root: Path, summary: Summary) -> Path:
    """Write the HTML report atomically, and return its path."""
    experiment = summary.experiment
    rows = summary.rows
    title = experiment.name
    if title == Experiment.name:
        title += f" on {', '.join(entry.name for entry in experiment.data)}"
    times = {row.cell: row.total_time for row in rows}
    # subtracted from the total, because the time of a final run includes the tuning run that it reuses
    reused_s = sum(times.get(row.results.trained_as or "", 0.0) for row in rows if row.results is not None)
    protocol = experiment.settings.get("protocol", "standard")
    grid = experiment.grid
    tuned: list[str] = []
    if len(set(grid.lr_factors)) > 1:
        tuned.append("learning rate")
    if experiment.tunes_weight_decay:
        tuned.append("weight decay")
    tables: list[dict[str, Any]] = []
    if summary.finals:
        tables = [_table(summary, metric, measure) for metric, measure in summary.metrics.items()]
    task_forest = Markup("")
    if 1 < len(summary.tasks) <= MAX_TASK_FIGURES:
        task_forest = _forest(summary, with_tasks=True)
    shown_range = f"{figures.SHOWN_RANGE:g}"
    if summary.is_fraction:
        shown_range = f"{100 * figures.SHOWN_RANGE:g} percentage points"
    context = {
        "experiment": experiment,
        "title": title,
        "summary": summary,
        "tables": tables,
        "published": [row.texts for row in paper_comparison(summary)],
        "orderings": [result.texts for result in paper_orderings(experiment, rows)],
        "evaluated_epoch": _TEST_EVALUATION[protocol],
        "warning": PROTOCOLS[protocol].warning,
        "failure_text": failure_text,
        "mixed": [mixed_text(task) for task in summary.mixed_tasks],
        "costs": _costs(summary),
        "pareto": _pareto(summary),
        "rates": _learning_rate_figures(summary),
        "choices": _selected_hyperparameters(summary),
        "outcome": outcome_text(summary),
        "recommendation": recommendation_text(summary),
        "headline": _headline(summary),
        "forest": _forest(summary, with_tasks=False),
        "forests": task_forest,
        "max_task_figures": MAX_TASK_FIGURES,
        "in_percent": unit_text(summary, "percent"),
        "shown_range": shown_range,
        "on_gpu": any(row.column("accelerator_memory_max") for row in rows),
        "tested": interval_text(summary),
        "level": percent_text(LEVEL, 0),
        "max_p": decimal_text(1 - LEVEL, 2),
        "min_units": MIN_UNITS,
        "machines": _machines(rows),
        "tuned": " and ".join(tuned),
        "trials": sum(row.purpose == "trial" for row in rows),
        "total_time": seconds_text(sum(row.total_time for row in rows) - reused_s),
        "settings": yaml.safe_dump(experiment.as_dict(), sort_keys=False, allow_unicode=True),
    }
    return write_template(root, "snella_lab.comparison", context, FILE)


def _headline(summary: Summary) -> dict[str, Any] | None:
    """Return the recommended and the best method with their scores, or None if no method has results on all tasks."""
    means = summary.means
    if not means:
        return None
    name = summary.recommendation[0]
    best = max(means, key=lambda method: means[method].mean)
    return {
        "name": name,
        "score": score_text(means[name].mean, summary.is_fraction),
        "best": best,
        "best_score": score_text(means[best].mean, summary.is_fraction),
        "is_best": math.isclose(means[name].mean, means[best].mean),
    }


def _table(summary: Summary, metric: str, title: str) -> dict[str, Any]:
    """Return the headings and lines of the table of one metric, and mark the best ranked method of each column."""
    scores = summary.scores(metric)
    headings = [*(heading for heading in scores if heading not in summary.tasks), *summary.tasks]
    num_means = max(len(headings) - len(summary.tasks), 1)  # a single task takes the place of the means
    best: dict[str, float | None] = {}
    for heading in headings:
        column = zip(summary.methods, scores[heading], strict=True)
        ranked = [value.mean for method, value in column if value is not None and method.name in summary.means]
        best[heading] = max(ranked, default=None)
    lines = []
    is_fraction = metric in FRACTIONS
    for number, method in enumerate(summary.methods):
        cells = []
        for heading in headings:
            value = scores[heading][number]
            text = spread_text(value, is_fraction, summary.experiment.seeds)
            is_best = value is not None and method.name in summary.means and value.mean == best[heading]
            cells.append({"text": text, "is_best": is_best})
        difference = method.to_reference[metric]
        text = difference_text(difference, len(summary.tasks), is_fraction)
        tests = significance_texts(difference)
        lines.append({"name": method.name, "cells": cells, "difference": text, "tests": tests})
    is_main = metric == summary.column
    return {"title": title, "headings": headings, "means": num_means, "lines": lines, "is_main": is_main}


def _costs(summary: Summary) -> dict[str, Any]:
    """Return the headings and lines of the cost table, without columns that contain no measured cost."""
    titles = {"trainable": "trainable", "changed": "changed weights", "file": "file", "step": "median step"}
    titles |= {"time": "training", "memory": "peak memory", "forgetting": "forgetting"}
    texts_by_method = {method.name: cost_texts(method.costs) for method in summary.methods}
    measured = {key for texts in texts_by_method.values() for key, text in texts.items() if text != "–"}
    shown = [key for key in titles if key in measured]
    lines: list[dict[str, Any]] = []
    for name, texts in texts_by_method.items():
        lines.append({"name": name, "cells": [texts[key] for key in shown]})
    return {
        "headings": [titles[key] for key in shown],
        "lines": lines,
        "has_memory": "memory" in shown,
        "has_forgetting": "forgetting" in shown,
        "has_changed": "changed" in shown,
    }


def _pareto(summary: Summary) -> list[Markup]:
    """Plot the metric versus memory, trainable parameters, and step time, if measured."""
    memory = ("training_mib", "peak memory minus libraries, MiB", "Memory", False)
    if any(method.costs["accelerator_memory_max"] for method in summary.methods):
        memory = ("accelerator_memory_max", "peak GPU memory, bytes", "Memory", False)
    axes = [
        memory,
        ("num_trainable_params", "trainable parameters", "Trainable parameters", True),
        ("step_time", "median step time, seconds", "Step time", False),
    ]
    plots = []
    for name, label, title, is_log in axes:
        figure = figures.pareto(summary, name, label, title, is_log)
        if figure is not None:
            text = f"Test {summary.measure} versus {title.lower()}, one point per method."
            plots.append(_svg(figure, f"pareto-{name}", text))
    return plots


def _forest(summary: Summary, *, with_tasks: bool) -> Markup:
    """Plot the differences at two widths, of which CSS shows the one that fits the screen."""
    text = "Paired differences on each task." if with_tasks else "Mean paired differences from the reference."
    layouts = []
    for layout, width in (("roomy", 640), ("narrow", _NARROW)):
        svg = _svg(figures.forest(summary, with_tasks, width), f"forest-{layout}-{with_tasks:d}", text)
        if svg:
            layouts.append(Markup('<div class="{}">{}</div>').format(layout, svg))
    return Markup("").join(layouts)


def _learning_rate_figures(summary: Summary) -> list[Markup]:
    """Plot the validation metric versus the learning rate: the mean over tasks, then each task."""
    tasks = summary.tasks or sorted({row.task_name for row in summary.rows})
    groups = [("Mean over tasks", tasks)] if len(tasks) > 1 else []
    if len(tasks) <= MAX_TASK_FIGURES:
        groups += [(task, [task]) for task in tasks]
    plots = []
    for number, (title, names) in enumerate(groups):
        figure = figures.learning_rate_curves(summary, names, shortened(title, 40))
        if figure is not None:
            text = f"{title}: validation {summary.measure} versus learning rate, one line per method."
            plots.append(_svg(figure, f"rates-{number}", text))
    return plots


def _selected_hyperparameters(summary: Summary) -> list[dict[str, Any]]:
    """Return the selected hyperparameters of each task and method that has a finished final run."""
    lines = []
    for task, method in itertools.product(summary.tasks, (method.name for method in summary.methods)):
        finals = summary.runs.rows(method, task)
        if not finals:
            continue
        row = finals[0]
        search = row.search or SearchChoice(lr_factor=None)
        edges: list[str] = []
        if search.lr_on_edge:
            edges.append("learning rate")
        if search.weight_decay_on_edge:
            edges.append("weight decay")
        rates = {name: plain_text(getattr(row, name)) for name in ("lr", "head_lr", "weight_decay")}
        line = {"task": task, "method": method, "factor": f"×{row.lr_factor:g}", **rates}
        lines.append({**line, "trials": len(search.trials), "edge": ", ".join(edges)})
    return lines


def _machines(rows: Rows) -> list[dict[str, Any]]:
    """Group the rows by machine and package versions, and return each group with its number of rows and its dates."""
    machines: dict[str, dict[str, Any]] = {}
    for row in rows:
        packages = {key.removesuffix("-version"): value for key, value in row.package_info.items() if value}
        key = repr((row.system_info, packages))
        entry = machines.setdefault(key, {"rows": 0, "dates": [], "system": row.system_info, "packages": packages})
        entry["rows"] += 1
        entry["dates"].append(row.created_at[:10])
    for entry in machines.values():
        earliest = min(entry["dates"])
        latest = max(entry["dates"])
        entry["dates"] = earliest if earliest == latest else f"{earliest} to {latest}"
    return list(machines.values())


def _svg(figure: Figure | None, name: str, description: str) -> Markup:
    """Return a figure as markup, which is empty for None. `inline_svg` escapes text that comes from the rows."""
    return Markup("" if figure is None else inline_svg(figure, name, description))
