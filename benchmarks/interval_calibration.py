"""False-positive rate of Student's t over tasks with Holm's correction, compared with a percentile bootstrap.

python benchmarks/interval_calibration.py              eight minutes on one core; replaces interval_calibration.jsonl
python benchmarks/interval_calibration.py --count 500  fewer simulations; writes nothing
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from documents import markdown_table

from snella_lab.bench.rows import append_rows
from snella_lab.comparison.statistics import LEVEL, difference_of, with_holm
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
COUNT = 10_000
TASK, SEED = 0.02, 0.02
"""Standard deviations of differences between tasks and between seeds, similar to the bundled suite."""
HEAVY = 3
"""Degrees of freedom of the heavy-tailed task effects."""

Pairs = np.ndarray
"""Differences, `[comparisons, tasks, seeds]`."""


def independent(generator: np.random.Generator, comparisons: int, tasks: int, seeds: int) -> Pairs:
    """Sample independent comparisons with mean zero, without a task effect for a single task."""
    effects = generator.normal(0, TASK if tasks > 1 else 0, (comparisons, tasks, 1))
    return effects + generator.normal(0, SEED, (comparisons, tasks, seeds))


def shared_reference(generator: np.random.Generator, comparisons: int, tasks: int, seeds: int) -> Pairs:
    """Sample comparisons with a shared reference method, as in a table."""
    methods = independent(generator, comparisons + 1, tasks, seeds) / np.sqrt(2)
    return methods[1:] - methods[:1]


def heavy_tailed(generator: np.random.Generator, comparisons: int, tasks: int, seeds: int) -> Pairs:
    """Sample independent comparisons with heavy-tailed task effects."""
    effects = TASK * generator.standard_t(HEAVY, (comparisons, tasks, 1)) / np.sqrt(HEAVY / (HEAVY - 2))
    return effects + generator.normal(0, SEED, (comparisons, tasks, seeds))


def is_significant(values: Pairs) -> bool:
    """Return True if `snella_lab.comparison.statistics` finds a significant difference."""
    differences = with_holm({number: difference_of(pairs.tolist()) for number, pairs in enumerate(values)})
    return any(value is not None and value.direction != 0 for value in differences.values())


def bootstrap_is_significant(values: Pairs, generator: np.random.Generator, resamples: int = 1000) -> bool:
    """Return True if a percentile bootstrap interval (over tasks, then seeds) excludes zero for any comparison."""
    _, tasks, seeds = values.shape
    task_indices = generator.integers(0, tasks, (resamples, tasks, 1))
    seed_indices = generator.integers(0, seeds, (resamples, tasks, seeds))
    for pairs in values:
        low, high = np.quantile(pairs[task_indices, seed_indices].mean(axis=(1, 2)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if low > 0 or high < 0:
            return True
    return False


def measure(count: int) -> list[dict[str, Any]]:
    """Return, for each setting, the fraction of simulations in which at least one zero difference is significant."""
    samplers: dict[str, Callable[..., Pairs]] = {
        "independent": independent,
        "shared reference": shared_reference,
        "heavy-tailed tasks": heavy_tailed,
    }
    settings = [
        *((name, 1, 6, 3) for name in ("independent", "heavy-tailed tasks")),
        *((name, 12, 6, 3) for name in samplers),
        *(("independent", 1, tasks, seeds) for tasks, seeds in ((1, 5), (1, 3), (4, 3), (6, 5), (19, 3))),
    ]
    rows = []
    for name, comparisons, tasks, seeds in settings:
        generator = np.random.default_rng(0)
        significant = bootstrapped = 0
        for _ in range(count):
            values = samplers[name](generator, comparisons, tasks, seeds)
            significant += is_significant(values)
            bootstrapped += comparisons == 1 and bootstrap_is_significant(values, generator)
        row: dict[str, Any] = {"differences": name, "comparisons": comparisons, "tasks": tasks, "seeds": seeds}
        row |= {"count": count, "called_clear": significant / count}
        rows.append(row | ({"bootstrap_called_clear": bootstrapped / count} if comparisons == 1 else {}))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = []
    for row in rows:
        bootstrap = row.get("bootstrap_called_clear")
        cells = [row["differences"], *(str(row[key]) for key in ("comparisons", "tasks", "seeds"))]
        cells += [f"{100 * row['called_clear']:.1f}%", "" if bootstrap is None else f"{100 * bootstrap:.1f}%"]
        lines.append(cells)
    head = ("differences", "comparisons", "tasks", "seeds", "t and Holm", "percentile bootstrap")
    return markdown_table(head, lines, left=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    options = parser.parse_args()
    measured_with = conditions("cpu")
    results = measure(options.count)
    if options.count == COUNT:
        ROWS.unlink(missing_ok=True)
        append_rows(ROWS, [{"benchmark": "interval_calibration", **row, **measured_with} for row in results])
    print(table(results))
