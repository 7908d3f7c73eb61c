"""Statistics of a comparison: means, standard deviations, paired differences with bootstrap intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snella.records import CellRow

RESAMPLES = 10_000
LEVEL = 0.95

Rows = Sequence[CellRow]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over `count` seeds; the deviation is NaN for a single one."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences to the reference, with a percentile bootstrap interval.

    Args:
        mean: Mean over tasks of the means over seeds.
        low: Lower end of the 95 % interval; NaN for a single pair, which has none.
        high: Upper end.
        pairs: Pairs of the same task and seed.
        tasks: Tasks they come from.
    """

    mean: float
    low: float
    high: float
    pairs: int
    tasks: int


def final_rows(rows: Rows) -> list[CellRow]:
    """The rows of the table: finished final runs."""
    return [row for row in rows if row.purpose == "final" and row.status == "success"]


def spread(rows: Rows, method: str, task: str, metric: str) -> Spread | None:
    """A method on one task, over seeds; None without a row."""
    values = [_value(row, metric) for row in rows if row.experiment_name == method and row.task_name == task]
    return _spread(values) if values else None


def mean_over_tasks(rows: Rows, method: str, tasks: Sequence[str], metric: str) -> Spread | None:
    """The mean of all tasks alike; the deviation is that of the seeds' means. None where a task has no row."""
    return _mean_of_groups(rows, method, [[task] for task in tasks], metric)


def mean_over_groups(rows: Rows, method: str, groups: Mapping[str, Sequence[str]], metric: str) -> Spread | None:
    """The mean of the groups' means, as VTAB's papers give it; None where a task has no row."""
    return _mean_of_groups(rows, method, list(groups.values()), metric)


def difference(rows: Rows, method: str, reference: str, tasks: Sequence[str], metric: str) -> Difference | None:
    """Differences to the reference in pairs of the same task and seed.

    With several tasks the bootstrap draws tasks first, then seeds within each, so that its interval holds for tasks
    like these; with one task it draws seeds.

    Args:
        rows: Final rows.
        method: The method.
        reference: The method it is compared to.
        tasks: Which tasks count.
        metric: A column.

    Returns:
        None where there is no pair.
    """
    pairs = [found for task in tasks if (found := _paired(rows, method, reference, task, metric))]
    if not pairs:
        return None
    mean, count = float(np.mean([np.mean(found) for found in pairs])), sum(map(len, pairs))
    if count == 1:
        return Difference(mean, math.nan, math.nan, 1, 1)
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(pairs), (RESAMPLES, len(pairs)))
    total = np.zeros(RESAMPLES)
    for place in range(len(pairs)):
        means = np.array([_resampled(found, generator) for found in pairs])  # [tasks, RESAMPLES]
        total += means[drawn[:, place], np.arange(RESAMPLES)]
    resamples = total / len(pairs)
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(mean, float(low), float(high), count, len(pairs))


def average(rows: Rows, method: str, column: str) -> float | None:
    """The mean of a column over a method's rows that have it: first over seeds, then over tasks."""
    tasks: dict[str, list[float]] = {}
    for row in rows:
        value = row.column(column)
        if row.experiment_name == method and value is not None:
            tasks.setdefault(row.task_name, []).append(value)
    return statistics.fmean(statistics.fmean(values) for values in tasks.values()) if tasks else None


def _value(row: CellRow, metric: str) -> float:
    """A score that methods are compared by, which every final run has."""
    value = row.column(metric)
    if value is None:
        raise ValueError(
            f"the row of {row.cell!r} must have {metric}, got none; remove its line from results.jsonl and its folder"
        )
    return value


def _spread(values: Sequence[float]) -> Spread:
    """Mean and deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))


def _mean_of_groups(rows: Rows, method: str, groups: Sequence[Sequence[str]], metric: str) -> Spread | None:
    """For every seed the mean over groups of the mean over their tasks, then the mean over seeds."""
    table: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.experiment_name == method:
            table.setdefault(row.seed, {})[row.task_name] = _value(row, metric)
    wanted = {task for group in groups for task in group}
    whole = [values for values in table.values() if wanted <= values.keys()]
    if not whole or not wanted:
        return None
    return _spread(
        [statistics.fmean(statistics.fmean(values[task] for task in group) for group in groups) for values in whole]
    )


def _paired(rows: Rows, method: str, reference: str, task: str, metric: str) -> list[float]:
    """Differences of one task, a number for every seed that both have."""
    values: dict[str, dict[int, float]] = {method: {}, reference: {}}
    for row in rows:
        if row.task_name == task and row.experiment_name in values:
            values[row.experiment_name][row.seed] = _value(row, metric)
    common = sorted(values[method].keys() & values[reference].keys())
    return [values[method][seed] - values[reference][seed] for seed in common]


def _resampled(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """Means of resamples of one task's differences, `[RESAMPLES]`."""
    drawn = generator.integers(0, len(values), (RESAMPLES, len(values)))
    return np.asarray(values)[drawn].mean(axis=1)
