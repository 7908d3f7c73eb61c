"""Tables and figures of the bundled suite and tables of the twins, for docs/notes/comparisons.md.

`snella compare --out` on a copy of `benchmarks/bundled-suite` resumes from its rows.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
from pathlib import Path

from documents import markdown_table, put_between
from interval_calibration import ROWS as CALIBRATION_ROWS
from interval_calibration import table as calibration_table
from twin_tables import COMMITTED, finished_tables, read_cells, twin_tables

from snella_lab.bench.rows import read_rows
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.figures import forest, learning_rate_curves, pareto
from snella_lab.comparison.report import table_cells
from snella_lab.comparison.rows import CellRow
from snella_lab.comparison.statistics import Difference, FinalRuns, Rows, final_rows, with_holm
from snella_lab.comparison.summary import (
    Summary,
    cost_texts,
    difference_text,
    p_text,
    significance_texts,
    spread_text,
    summarize,
)
from snella_lab.style import save_figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "bundled-suite"
UNTUNED = ROOT / "benchmarks" / "untuned" / "suite.jsonl"
PAGE = ROOT / "docs" / "notes" / "comparisons.md"
FIGURES = ROOT / "docs" / "images" / "suite"
BEGIN, END = "<!-- rows of benchmarks/bundled-suite begin -->", "<!-- rows end -->"
TWINS_BEGIN = "<!-- rows of benchmarks/twins/complete.jsonl.xz begin -->"
PAIRS_BEGIN, PAIRS_END = "<!-- leads in benchmarks/bundled-suite begin -->", "<!-- leads end -->"
DEFAULTS_BEGIN, DEFAULTS_END = "<!-- defaults in benchmarks/untuned begin -->", "<!-- defaults end -->"
CALIBRATION_BEGIN, CALIBRATION_END = "<!-- rows of benchmarks/interval_calibration.jsonl begin -->", "<!-- rows end -->"
LEADERS, HELD_OUT = ("snella-matched-8", "snella-8"), "mri-regions"
METRIC = "test_accuracy"
IN_OVERVIEW = {"mean over tasks", "mean over groups", "difference from lora-8", "p", "above", "trainable", "file"}
OVERVIEW_BEGIN, OVERVIEW_END = "<!-- overview of benchmarks/bundled-suite begins -->", "<!-- overview ends -->"


def read_suite() -> tuple[Experiment, list[CellRow]]:
    """Read the experiment and the rows of the suite."""
    return read_experiment(str(RESULTS / "experiment.yaml")), read_cells(RESULTS / "results.jsonl")


def update_suite(page: Path = PAGE) -> bool:
    """Write the tables of the suite into the page; return True if it changed."""
    experiment, rows = read_suite()
    changed = [
        put_between(page, OVERVIEW_BEGIN, OVERVIEW_END, overview(experiment, rows)),
        put_between(page, BEGIN, END, accuracy_table(experiment, rows)),
        put_between(page, PAIRS_BEGIN, PAIRS_END, leads_table(experiment, rows)),
        put_between(page, DEFAULTS_BEGIN, DEFAULTS_END, defaults_table(experiment, rows, read_cells(UNTUNED))),
        put_between(page, CALIBRATION_BEGIN, CALIBRATION_END, calibration_table(read_rows(CALIBRATION_ROWS))),
    ]
    return any(changed)


def accuracy_table(experiment: Experiment, rows: Rows) -> str:
    """Format accuracies by task and costs, except for the columns of `overview`."""
    headings, *lines = table_cells(summarize(experiment, rows), METRIC, with_costs=True)
    shown = [column for column, heading in enumerate(headings) if heading not in IN_OVERVIEW]
    head, *body = ([line[column] for column in shown] for line in (headings, *lines))
    return markdown_table(head, body, left=1)


def leads(rows: Rows, leader: str, names: list[str], tasks: list[str]) -> dict[str, Difference | None]:
    """Return the differences between the leader and all other methods, with Holm's correction."""
    runs = FinalRuns(rows)
    return with_holm({n: runs.difference(leader, n, tasks, METRIC) for n in names if n != leader})


def leads_table(experiment: Experiment, rows: Rows) -> str:
    """Format the differences between each leader and all other methods, with and without `HELD_OUT`."""
    names, tasks = [entry.name for entry in experiment.methods], [entry.name for entry in experiment.data]
    fewer = [task for task in tasks if task != HELD_OUT]
    chosen = [(leader, part) for leader in LEADERS for part in (tasks, fewer)]
    differences = [leads(rows, leader, names, part) for leader, part in chosen]
    titles = [f"{leader} minus{f', without {HELD_OUT}' if part is fewer else ''}" for leader, part in chosen]
    lines = []
    for name in names:
        cells = [
            _lead_texts(difference_by_name.get(name), len(part))[:2]
            for difference_by_name, (_, part) in zip(differences, chosen, strict=True)
        ]
        lines.append([name, *(text for texts in cells for text in texts)])
    return markdown_table(["", *(text for title in titles for text in (title, "p"))], lines, left=1)


def _lead_texts(lead: Difference | None, tasks: int) -> tuple[str, str, str]:
    """Format a difference with its interval and tests."""
    return difference_text(lead, tasks), *significance_texts(lead)


def defaults_rows(rows: Rows, untuned: Rows) -> list[CellRow]:
    """Return the final rows at default learning rates: the untuned row if there is one, else the suite's."""
    by_cell = {row.cell: row for row in final_rows(untuned)}
    names = {row.experiment_name for row in by_cell.values()}
    chosen = [row for row in final_rows(rows) if row.experiment_name in names]
    return [by_cell.get(row.cell, row) for row in chosen]


def defaults_table(experiment: Experiment, rows: Rows, untuned: Rows) -> str:
    """Format means at default learning rates, and differences from the reference at its default."""
    finals = defaults_rows(rows, untuned)
    tasks, reference = [entry.name for entry in experiment.data], experiment.reference_name
    names, runs = list(dict.fromkeys(row.experiment_name for row in finals)), FinalRuns(finals)
    differences = with_holm({n: runs.difference(n, reference, tasks, METRIC) for n in names if n != reference})
    lines = []
    for name in names:
        single = [runs.difference(name, reference, [task], METRIC) for task in tasks]
        by_task = [difference_text(d and replace(d, low=math.nan), 1) if name != reference else "–" for d in single]
        mean = spread_text(runs.mean(name, [[task] for task in tasks], METRIC))
        lines.append([name, mean, *_lead_texts(differences.get(name), len(tasks)), *by_task])
    head = ["at default learning rates", "mean over tasks", f"minus {reference}", "p", "above", *tasks]
    return markdown_table(head, lines, left=1)


def update_twins(page: Path = PAGE) -> bool:
    """Write the orderings of the twins that have been run into the page; return True if it changed."""
    rows = read_cells(COMMITTED)
    return put_between(page, TWINS_BEGIN, END, twin_tables(rows, finished_tables(rows)))


def overview(experiment: Experiment, rows: Rows) -> str:
    """Format the means of methods that are finished on every task and seed."""
    finished = _finished(experiment, rows)
    if finished is None:
        return "No method is finished on every task and seed."
    summary = summarize(finished, rows)
    head = ["method", f"mean over {len(summary.tasks)} tasks", f"minus {summary.reference}", "p", "above"]
    lines = []
    for method in sorted(summary.methods, key=lambda method: summary.means[method.name].mean, reverse=True):
        costs, lead = cost_texts(method.costs), method.to_reference[METRIC]
        mean = spread_text(method.over_tasks[METRIC])
        lines.append([method.name, mean, *_lead_texts(lead, len(summary.tasks)), costs["trainable"], costs["file"]])
    return f"{markdown_table([*head, 'trainable', 'adapter'], lines, left=1)}\n\n{significance_text(summary)}"


def significance_text(summary: Summary) -> str:
    """Describe the tests and the significant differences."""
    differences = {m.name: d for m in summary.methods if (d := m.to_reference[METRIC]) is not None}
    significant = [name for name, value in differences.items() if value.direction]
    smallest = p_text(min(difference.adjusted_p for difference in differences.values()))
    outcome = (
        f"Significant: {', '.join(significant)}."
        if significant
        else f"No difference is significant; the smallest p is {smallest}."
    )
    scope = f"Intervals are over {len(summary.tasks)} tasks; p is corrected over {len(differences)} comparisons."
    return textwrap.fill(f"{scope} {outcome}", 120, break_long_words=False, break_on_hyphens=False)


def draw_suite(folder: Path = FIGURES) -> list[Path]:
    """Draw differences, accuracy versus memory and accuracy versus learning rate, and return the paths."""
    experiment, rows = read_suite()
    finished = _finished(experiment, rows)
    if finished is None:
        return []
    summary = summarize(finished, rows)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "differences": forest(summary, False),
        "memory": pareto(summary, "training_mib", "peak memory without libraries, MiB", "Accuracy and memory", False),
        "learning-rates": learning_rate_curves(summary, summary.tasks, "Mean over tasks"),
    }
    return [save_figure(figure, folder / f"{name}.svg") for name, figure in figures.items() if figure is not None]


def _finished(experiment: Experiment, rows: Rows) -> Experiment | None:
    """Reduce the experiment to methods that are finished on every task and seed; None without any."""
    summary: Summary = summarize(experiment, rows)
    tasks = [entry.name for entry in experiment.data]
    names = {
        method.name
        for method in summary.methods
        if all(
            (value := method.per_task[METRIC].get(task)) is not None and value.count == experiment.seeds
            for task in tasks
        )
    }
    values = experiment.as_dict()
    if not names:
        return None
    return Experiment.from_dict({**values, "methods": [entry for entry in values["methods"] if entry["name"] in names]})
