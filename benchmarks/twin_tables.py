"""Markdown tables that test the paper's orderings on the twins of its Tables VII to XII.

make twins                                   train the twins: many hours on two cores
python benchmarks/twin_tables.py runs/twins  print the tables from the existing rows
"""

from __future__ import annotations

import argparse
from pathlib import Path

from documents import markdown_table

from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.report import ORDERING_HEADINGS, paper_orderings
from snella_lab.comparison.rows import CellRow
from snella_lab.comparison.statistics import Rows
from snella_lab.comparison.store import FILE as ROWS_FILE
from snella_lab.comparison.store import read_lines

TABLES = {"VII": 7, "VIII": 8, "IX": 9, "X": 10, "XI": 11, "XII": 12}


def twin_tables(rows: Rows) -> str:
    """Format one table of claims per table of the paper; Holm's correction is per table.

    Args:
        rows: Rows of the twin experiments.
    """
    parts = []
    for name, number in TABLES.items():
        experiment = read_experiment(f"twin-table{number}")
        lines = [result.texts for result in paper_orderings(experiment, rows)]
        parts.append(f"**Table {name}**\n\n{markdown_table(ORDERING_HEADINGS, lines, left=1)}")
    return "\n\n".join(parts)


def read_cells(file: Path) -> list[CellRow]:
    """Read the rows of a comparison.

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/twins"))
    print(twin_tables(read_cells(parser.parse_args().folder / ROWS_FILE)))
