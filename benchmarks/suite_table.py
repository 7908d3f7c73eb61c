"""The table of the bundled suite in docs/compare.md, from the rows in benchmarks/bundled-suite.

`snella compare --out` on a copy of that folder goes on where its rows end.
"""

from __future__ import annotations

from pathlib import Path

from snella.benchmark.summary import put_between
from snella.comparison.experiment_files import read_experiment
from snella.comparison.markdown import markdown_tables
from snella.comparison.results_file import read_lines

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "bundled-suite"
PAGE = ROOT / "docs" / "compare.md"
BEGIN, END = "<!-- rows of benchmarks/bundled-suite begin -->", "<!-- rows end -->"


def update_suite(page: Path = PAGE) -> bool:
    """Put the table into the page.

    Returns:
        Whether the page changed.

    Raises:
        ValueError: A line of the rows is damaged, or the page has no marks.
    """
    rows, notes = read_lines(RESULTS / "results.jsonl")
    if notes:
        raise ValueError("; ".join(notes))
    experiment = read_experiment(str(RESULTS / "experiment.yaml"))
    return put_between(page, BEGIN, END, markdown_tables(experiment, list(rows.values())).strip())
