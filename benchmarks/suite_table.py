"""What the bundled suite and the twins found, from their rows: tables in docs/ and README.md, and pictures.

`snella compare --out` on a copy of either folder goes on where its rows end.
"""

from __future__ import annotations

from pathlib import Path

from snella.benchmark.rows import put_between
from snella.comparison.experiment import Experiment
from snella.comparison.experiment_files import read_experiment
from snella.comparison.figures import forest, learning_rate_curves, pareto
from snella.comparison.report import markdown_tables, paper_orderings, table_cells
from snella.comparison.statistics import Rows
from snella.comparison.store import read_lines
from snella.comparison.summary import MethodSummary, Summary, cost_texts, difference_text, spread_text, summarize
from snella.records import CellRow
from snella.report.style import save_figure, write_figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "bundled-suite"
TWINS = ROOT / "benchmarks" / "twins"
PAGE, README = ROOT / "docs" / "compare.md", ROOT / "README.md"
PICTURES = ROOT / "docs" / "images" / "suite"
TWINS_PAGE, TWINS_PICTURES = ROOT / "docs" / "plots.md", ROOT / "docs" / "images" / "twins"
BEGIN, END = "<!-- rows of benchmarks/bundled-suite begin -->", "<!-- rows end -->"
TWINS_BEGIN = "<!-- rows of benchmarks/twins begin -->"
OVERVIEW_BEGIN, OVERVIEW_END = "<!-- overview of benchmarks/bundled-suite begins -->", "<!-- overview ends -->"


def read_suite(folder: Path = RESULTS) -> tuple[Experiment, list[CellRow]]:
    """The experiment of a folder, the suite's or the twins', and its rows.

    Raises:
        ValueError: A line of the rows is damaged.
    """
    rows, notes = read_lines(folder / "results.jsonl")
    if notes:
        raise ValueError("; ".join(notes))
    return read_experiment(str(folder / "experiment.yaml")), list(rows.values())


def update_suite(page: Path = PAGE) -> bool:
    """Put the tables into the page; whether it changed.

    Raises:
        ValueError: A line of the rows is damaged, or the page has no marks.
    """
    experiment, rows = read_suite()
    return put_between(page, BEGIN, END, markdown_tables(experiment, rows).strip())


def update_twins(page: Path = TWINS_PAGE) -> bool:
    """Put the twins' tables and which orderings hold into the page; whether it changed.

    Raises:
        ValueError: A line of the rows is damaged, or the page has no marks.
    """
    experiment, rows = read_suite(TWINS)
    summary = summarize(experiment, rows)
    accuracies = table_cells(summary, summary.column, with_costs=False)
    claims = [("the paper's claim", "here", "difference, 95 % interval")]
    claims += [result.texts for result in paper_orderings(experiment, rows)]
    tables = [_markdown_table(list(map(list, table))) for table in (accuracies, claims)]
    return put_between(page, TWINS_BEGIN, END, "\n\n".join(tables))


def _markdown_table(lines: list[list[str]]) -> str:
    """Cells as a table; what stands behind the first column is numbers or short."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def draw_twins(folder: Path = TWINS_PICTURES) -> list[Path]:
    """Draw the twins' differences to SNELLA, for light and for dark pages; the pictures' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = forest(summarize(*read_suite(TWINS)), False)
    if figure is None:
        return []
    paths = write_figure(figure, folder, "differences")
    for path in paths:
        if path.suffix == ".png":
            path.unlink()
    return [path for path in paths if path.suffix == ".svg"]


def update_overview(readme: Path = README) -> bool:
    """Put the means over all tasks into the README; whether it changed.

    Raises:
        ValueError: A line of the rows is damaged, or the README has no marks.
    """
    experiment, rows = read_suite()
    return put_between(readme, OVERVIEW_BEGIN, OVERVIEW_END, overview(experiment, rows))


def overview(experiment: Experiment, rows: Rows) -> str:
    """The means of the methods that have been on every task with every seed."""
    finished = _finished(experiment, rows)
    if finished is None:
        return "No method has been on every task with every seed yet."
    summary = summarize(finished, rows)
    lines = [
        f"| method | mean over {len(summary.tasks)} tasks | minus {summary.reference} | trainable | adapter |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in sorted(summary.methods, key=_mean, reverse=True):
        costs, difference = cost_texts(method.costs), method.to_reference["test_accuracy"]
        cells = (
            method.name,
            spread_text(method.over_tasks["test_accuracy"]),
            difference_text(difference, len(summary.tasks)),
            costs["trainable"],
            costs["file"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(method: MethodSummary) -> float:
    """The method's mean accuracy over tasks."""
    mean = method.over_tasks["test_accuracy"]
    return 0.0 if mean is None else mean.mean


def draw_suite(folder: Path = PICTURES) -> list[Path]:
    """Draw differences, accuracy against memory and accuracy against the learning rate; the pictures' paths."""
    experiment, rows = read_suite()
    finished = _finished(experiment, rows)
    if finished is None:
        return []
    summary = summarize(finished, rows)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "differences": forest(summary, False),
        "memory": pareto(
            summary, "training_mib", "peak memory beyond the libraries, MiB", "Accuracy against memory", False
        ),
        "learning-rates": learning_rate_curves(summary, rows, summary.tasks, "Mean over tasks"),
    }
    return [save_figure(figure, folder / f"{name}.svg") for name, figure in figures.items() if figure is not None]


def _finished(experiment: Experiment, rows: Rows) -> Experiment | None:
    """The experiment with the methods alone that have been on every task with every seed; None without any."""
    summary: Summary = summarize(experiment, rows)
    wanted = [entry.name for entry in experiment.data]
    names = {
        method.name
        for method in summary.methods
        if all(
            (value := method.per_task["test_accuracy"].get(task)) is not None and value.count == experiment.seeds
            for task in wanted
        )
    }
    values = experiment.as_dict()
    if not names:
        return None
    return Experiment.from_dict({**values, "methods": [entry for entry in values["methods"] if entry["name"] in names]})
