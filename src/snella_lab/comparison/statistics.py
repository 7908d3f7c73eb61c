"""Statistics of a comparison: means, standard deviations, paired differences with Student's t intervals."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from snella_app.records import CellRow

LEVEL = 0.95
MIN_UNITS = 5
"""Tasks, or seeds of a single task, below which no difference is decided."""

Rows = Sequence[CellRow]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over `count` seeds; the deviation is NaN for a single one."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences between two methods, with the interval and the p-value of Student's t test.

    The test's units are tasks: each counts with its mean over seeds. With a single task they are its seeds.

    Args:
        mean: Mean over units.
        low: Lower end of the 95 % interval of this comparison alone; NaN for a single unit, which has none.
        high: Upper end.
        pairs: Pairs of the same task and seed.
        tasks: Tasks they come from.
        p: Two-sided p-value of the t test; NaN for a single unit.
        above: Units above zero.
        below: Units below zero.
        adjusted_p: `p` after Holm's correction; NaN before `with_holm`.
        comparisons: Comparisons that the correction is over.
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
        """How many values the test has: tasks, or seeds of a single task."""
        return self.tasks if self.tasks > 1 else self.pairs

    @property
    def sign_p(self) -> float:
        """Two-sided p-value of the sign test, without a correction; 1 where no unit differs from zero."""
        from scipy.stats import binomtest  # a second, and only to test

        differing = self.above + self.below
        return float(binomtest(self.above, differing).pvalue) if differing else 1.0

    @property
    def direction(self) -> int:
        """1 or -1 where the difference is decided, else 0.

        Decided is what has at least `MIN_UNITS` units and an adjusted p-value of at most 1 - `LEVEL`.
        """
        if self.units < MIN_UNITS or not self.adjusted_p <= 1 - LEVEL:
            return 0
        return 1 if self.mean > 0 else -1


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
    """Differences to the reference in pairs of the same task and seed, with Student's t interval.

    Args:
        rows: Final rows.
        method: The method.
        reference: The method it is compared to.
        tasks: Which tasks count.
        metric: A column.

    Returns:
        Not corrected for other comparisons, which `with_holm` does. None where there is no pair.
    """
    pairs = [found for task in tasks if (found := _paired(rows, method, reference, task, metric))]
    return difference_of(pairs) if pairs else None


def difference_of(pairs: Sequence[Sequence[float]]) -> Difference:
    """Student's t interval and test of paired differences.

    mean ± t(0.975, n - 1) · s / sqrt(n)

    over the n tasks' means, or over the n differences of a single task.

    Args:
        pairs: Differences of each task, a number a seed; at least one of each.
    """
    values = [statistics.fmean(found) for found in pairs] if len(pairs) > 1 else list(pairs[0])
    count, tasks = sum(map(len, pairs)), len(pairs)
    mean = statistics.fmean(values)
    above, below = sum(value > _EQUAL for value in values), sum(value < -_EQUAL for value in values)
    if len(values) == 1:
        return Difference(mean, math.nan, math.nan, count, tasks, math.nan, above, below)
    if statistics.stdev(values) / math.sqrt(len(values)) <= _EQUAL:  # equal differences
        return Difference(mean, mean, mean, count, tasks, 1.0 if abs(mean) <= _EQUAL else 0.0, above, below)
    from scipy.stats import ttest_1samp  # a second, and only to test

    test = ttest_1samp(values, 0)
    low, high = map(float, test.confidence_interval(LEVEL))
    return Difference(mean, low, high, count, tasks, float(test.pvalue), above, below)


def with_holm(found: Mapping[Key, Difference | None]) -> dict[Key, Difference | None]:
    """Set the p-values of comparisons that are shown together by Holm's correction.

    Of m p-values in ascending order, the k-th becomes the maximum of (m - i + 1) · p_i over i <= k, at most 1.

    Args:
        found: Differences by any key; None and single units, which have no p-value, stay as they are.

    Returns:
        The same keys in the same order.
    """
    tested = {key: value for key, value in found.items() if value is not None and not math.isnan(value.p)}
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for place, key in enumerate(sorted(tested, key=lambda key: tested[key].p)):
        highest = max(highest, min(1.0, (len(tested) - place) * tested[key].p))
        adjusted[key] = highest
    changed = {key: replace(value, adjusted_p=adjusted[key], comparisons=len(tested)) for key, value in tested.items()}
    return {key: changed.get(key, value) for key, value in found.items()}


def average(rows: Rows, method: str, column: str) -> float | None:
    """The mean of a column over a method's rows that have it: first over seeds, then over tasks."""
    tasks: dict[str, list[float]] = {}
    for row in rows:
        value = row.column(column)
        if row.experiment_name == method and value is not None:
            tasks.setdefault(row.task_name, []).append(value)
    return statistics.fmean(statistics.fmean(values) for values in tasks.values()) if tasks else None


_EQUAL = 1e-12  # shares are sums of a few rounded numbers


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
