"""Markdown tables that test the paper's orderings on the twins of its Tables VII to XII.

make twins                                          train the twins: many hours on two cores
python benchmarks/twin_tables.py runs/twins         print the tables from the existing rows
python benchmarks/twin_tables.py --save runs/twins  also write the rows to benchmarks/twins/complete.jsonl.xz
python benchmarks/train_twins.py --restore          train only the runs that are missing from that file
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterable
from pathlib import Path

from documents import markdown_table

from snella_app.files import write_bytes
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.report import ORDERING_HEADINGS, paper_orderings
from snella_lab.comparison.rows import CellRow
from snella_lab.comparison.statistics import FinalRuns, Rows
from snella_lab.comparison.store import FILE as ROWS_FILE
from snella_lab.comparison.store import read_lines
from snella_lab.comparison.summary import spread_text

COMMITTED = Path(__file__).with_name("twins") / "complete.jsonl.xz"
TABLES = {"VII": 7, "VIII": 8, "IX": 9, "X": 10, "XI": 11, "XII": 12}


def twin_tables(rows: Rows, tables: Iterable[str] = TABLES) -> str:
    """Format claims and accuracies for each table of the paper; Holm's correction is per table.

    Args:
        rows: Rows of the twin experiments.
        tables: Roman numerals of the tables.
    """
    parts = []
    for table in tables:
        experiment = read_experiment(f"twin-table{TABLES[table]}")
        claims = [result.texts for result in paper_orderings(experiment, rows)]
        parts.append(f"**Table {table}**\n\n{markdown_table(ORDERING_HEADINGS, claims, left=1)}")
        if accuracies := _accuracies(experiment, rows):
            parts.append(accuracies)
    return "\n\n".join(parts)


def _accuracies(experiment: Experiment, rows: Rows) -> str:
    """Format the test accuracy of each method by task, in percent, averaged over the seeds; empty without runs."""
    runs, tasks = FinalRuns(rows), [entry.name for entry in experiment.data]
    groups = [*([task] for task in tasks), tasks]
    lines = []
    for method in experiment.methods:
        means = [runs.mean(method.name, [[task] for task in group], experiment.published_metric) for group in groups]
        if any(mean is not None for mean in means):
            lines.append([method.name, *(spread_text(mean) for mean in means)])
    return markdown_table(["test accuracy", *tasks, "mean"], lines, left=1) if lines else ""


def finished_tables(rows: Rows) -> list[str]:
    """Return the Roman numerals of the tables with results for every claim on every task."""
    finished = []
    for table, number in TABLES.items():
        results = paper_orderings(read_experiment(f"twin-table{number}"), rows)
        if all(result.difference is not None and result.difference.tasks == result.tasks for result in results):
            finished.append(table)
    return finished


def read_cells(file: Path) -> list[CellRow]:
    """Read the rows of a comparison; the file may be compressed (`.xz`).

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a row is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} contains no {file.name}; run `snella compare --out {file.parent}` or `make twins`"
        )
    rows, notes = read_lines(file)
    if notes:
        raise ValueError(f"{'; '.join(notes)}; run `snella compare --out {file.parent}` to complete the rows")
    return list(rows.values())


def restore(folder: Path) -> None:
    """Write the committed rows to a new folder of a comparison."""
    folder.mkdir(parents=True)
    write_bytes(folder / ROWS_FILE, lzma.decompress(COMMITTED.read_bytes()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/twins"))
    parser.add_argument("--save", action="store_true", help="write the rows of the folder to benchmarks/twins")
    args = parser.parse_args()
    print(twin_tables(read_cells(args.folder / ROWS_FILE)))
    if args.save:
        write_bytes(COMMITTED, lzma.compress((args.folder / ROWS_FILE).read_bytes()))
