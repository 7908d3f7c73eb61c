"""Statistics of a comparison: means, standard deviations, and paired differences with Student's t intervals.

Scores and costs are those of final runs, which are evaluated on test images. A task is a dataset with its settings.
"""

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from snella_lab.comparison.rows import CellRow

LEVEL = 0.95
"""Level of the confidence intervals. A significant difference has an adjusted p-value of at most 1 - `LEVEL`."""
MIN_UNITS = 5
"""Minimum number of tasks (or seeds of a single task) for a significant difference."""

Rows = Sequence[CellRow]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over `count` seeds. The deviation is NaN for a single seed."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean paired difference between two methods, with the interval and p-value of Student's t test.

    The units of the test are tasks, each averaged over seeds. For a single task, the units are its seeds.

    Args:
        mean: Mean over units.
        low: Lower end of the 95% interval, not corrected for multiple comparisons. NaN for a single unit,
            and for fewer than `MIN_UNITS` units with equal differences.
        high: Upper end of the interval.
        pairs: Number of pairs of runs with the same task and seed.
        tasks: Number of tasks.
        p: Two-sided p-value of the t test. NaN if `low` is NaN.
        above: Number of units whose difference is positive.
        below: Number of units whose difference is negative.
        adjusted_p: `p` after Holm's correction. NaN until `with_holm` sets it.
        comparisons: Number of comparisons that the correction covers.
    """

    mean: float
    low: float
    high: float
    pairs: int
    tasks: int
    p: float = math.nan
    above: int = 0
    below: int = 0
    adjusted_p: float = math.nan
    comparisons: int = 0

    @property
    def units(self) -> int:
        """Number of units in the test: tasks, or seeds of a single task."""
        return self.tasks if self.tasks > 1 else self.pairs

    @property
    def sign_p(self) -> float:
        """Two-sided p-value of the sign test, without correction. It is 1 if all differences are zero."""
        from scipy.stats import binomtest  # slow import

        differing = self.above + self.below
        return float(binomtest(self.above, differing).pvalue) if differing else 1.0

    @property
    def direction(self) -> int:
        """Sign of a significant difference, else 0.

        A difference is significant if it has at least `MIN_UNITS` units and an adjusted p-value of at most 1 - `LEVEL`.
        """
        if self.units < MIN_UNITS or not self.adjusted_p <= 1 - LEVEL:
            return 0
        return 1 if self.mean > 0 else -1


def final_rows(rows: Rows) -> list[CellRow]:
    """Return the rows of finished final runs."""
    return [row for row in rows if row.purpose == "final" and row.status == "success"]


class FinalRuns:
    """Finished final runs by method, task, and seed.

    Requesting a metric that a run lacks raises a ValueError, except in `average`.

    Args:
        rows: Rows of a comparison. Only those of finished final runs are used.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows: dict[tuple[str, str], dict[int, CellRow]] = {}
        for row in final_rows(rows):
            self._rows.setdefault((row.experiment_name, row.task_name), {})[row.seed] = row

    def rows(self, method: str, task: str) -> list[CellRow]:
        """Return the rows of a method on one task, one per seed."""
        return list(self._rows.get((method, task), {}).values())

    def scores(self, method: str, task: str, metric: str) -> dict[int, float]:
        """Return a method's scores on one task, by seed."""
        return {row.seed: _value(row, metric) for row in self.rows(method, task)}

    def seeds(self, method: str, tasks: Sequence[str]) -> frozenset[int]:
        """Return the seeds with a run of a method on every task."""
        seeds = [frozenset(self._rows.get((method, task), {})) for task in tasks]
        return frozenset.intersection(*seeds) if seeds else frozenset()

    def spread(self, method: str, task: str, metric: str) -> Spread | None:
        """Return the mean and standard deviation over seeds of a method's scores on one task.

        Returns None if there are no runs.
        """
        scores = self.scores(method, task, metric)
        return _spread(list(scores.values())) if scores else None

    def mean(self, method: str, groups: Sequence[Sequence[str]], metric: str) -> Spread | None:
        """Average over the tasks of each group, then over groups; return the mean and standard deviation over seeds.

        Uses only seeds with a run on every task. Returns None if there are no such seeds. If each group has one task,
        this is the mean over tasks. The mean usually reported for the VTAB benchmark is over groups of several tasks.
        """
        scores = {task: self.scores(method, task, metric) for group in groups for task in group}
        means: list[float] = []
        for seed in sorted(self.seeds(method, list(scores))):
            group_means = [statistics.fmean(scores[task][seed] for task in group) for group in groups]
            means.append(statistics.fmean(group_means))
        return _spread(means) if means else None

    def difference(self, method: str, reference: str, tasks: Sequence[str], metric: str) -> Difference | None:
        """Compute the difference from the reference, paired by task and seed, with its Student's t interval.

        The p-value is uncorrected (see `with_holm`). Returns None if the methods have no task and seed in common.
        """
        pairs: list[list[float]] = []
        for task in tasks:
            scores = self.scores(method, task, metric)
            reference_scores = self.scores(reference, task, metric)
            common_seeds = sorted(scores.keys() & reference_scores.keys())
            if common_seeds:
                pairs.append([scores[seed] - reference_scores[seed] for seed in common_seeds])
        return difference_of(pairs) if pairs else None

    def average(self, method: str, column: str) -> float | None:
        """Average a column over a method's seeds, then over tasks. Missing values are ignored."""
        rows_by_task = [seeds.values() for (name, _), seeds in self._rows.items() if name == method]
        return mean_of_measured(mean_of_measured(row.column(column) for row in rows) for rows in rows_by_task)


def difference_of(pairs: Sequence[Sequence[float]]) -> Difference:
    """Compute Student's t interval and test for paired differences.

    mean ± t(0.975, n - 1) · s / sqrt(n)

    The n values are the mean differences of the tasks or, for a single task, the differences of its seeds. s is their
    standard deviation.

    Args:
        pairs: Differences by task, one per seed. At least one task with one seed is required.
    """
    task_means = [statistics.fmean(differences) for differences in pairs]
    values = task_means if len(task_means) > 1 else list(pairs[0])
    num_pairs = sum(map(len, pairs))
    num_tasks = len(pairs)
    mean = statistics.fmean(values)
    above = sum(value > _TOLERANCE for value in values)
    below = sum(value < -_TOLERANCE for value in values)
    is_constant = len(values) == 1 or statistics.stdev(values) / math.sqrt(len(values)) <= _TOLERANCE
    if is_constant and len(values) < MIN_UNITS:  # a few equal differences do not show how much others would vary
        return Difference(mean, math.nan, math.nan, num_pairs, num_tasks, math.nan, above, below)
    if is_constant:  # t is infinite or undefined
        p = 1.0 if abs(mean) <= _TOLERANCE else 0.0
        return Difference(mean, mean, mean, num_pairs, num_tasks, p, above, below)
    from scipy.stats import ttest_1samp  # slow import

    test = ttest_1samp(values, 0)
    low, high = map(float, test.confidence_interval(LEVEL))
    return Difference(mean, low, high, num_pairs, num_tasks, float(test.pvalue), above, below)


def with_holm(differences: Mapping[Key, Difference | None]) -> dict[Key, Difference | None]:
    """Apply Holm's correction to a family of comparisons.

    The k-th smallest of m p-values becomes max over i <= k of (m - i + 1) · p_i, but at most 1.

    Args:
        differences: Differences by any key. None and differences without a p-value remain unchanged.

    Returns:
        Differences with `adjusted_p` and `comparisons`, under the same keys in the same order.
    """
    tested = {key: value for key, value in differences.items() if value is not None and not math.isnan(value.p)}
    adjusted: dict[Key, Difference | None] = {}
    highest = 0.0
    for index, key in enumerate(sorted(tested, key=lambda key: tested[key].p)):
        highest = max(highest, min(1.0, (len(tested) - index) * tested[key].p))
        adjusted[key] = replace(tested[key], adjusted_p=highest, comparisons=len(tested))
    return {key: adjusted.get(key, value) for key, value in differences.items()}


def mean_of_measured(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are no such values."""
    measured = [value for value in values if value is not None]
    return statistics.fmean(measured) if measured else None


def complete_mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of a nonempty sequence, or None if one of its values is None."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


_TOLERANCE = 1e-12  # rounding errors of sums must not count as differences


def _value(row: CellRow, metric: str) -> float:
    """Return a metric of a final run, or raise a ValueError if the run lacks it."""
    value = row.column(metric)
    if value is None:
        raise ValueError(f"the row of {row.cell!r} has no {metric}; delete its folder and its line in results.jsonl")
    return value


def _spread(values: Sequence[float]) -> Spread:
    """Return the mean and the standard deviation, which is NaN for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))
