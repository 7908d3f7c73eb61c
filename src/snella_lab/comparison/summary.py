"""Result tables of a comparison for the report and the terminal.

Each task, a dataset with its settings, belongs to a group. A row contains the settings and results of one run. Scores
are those of final runs, which are evaluated on test images; tuning runs only select hyperparameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from snella_app.console import counted, make_table, print_line
from snella_app.text import bytes_text, count_text, decimal_text, percent_text, points_text, seconds_text, signed_text
from snella_lab.comparison.experiment import MEASURES, OVER_GROUPS, OVER_TASKS, Experiment
from snella_lab.comparison.rows import CellRow
from snella_lab.comparison.statistics import (
    LEVEL,
    MIN_UNITS,
    Difference,
    FinalRuns,
    Rows,
    Spread,
    final_rows,
    with_holm,
)

COSTS = (
    *("num_trainable_params", "changed_weights", "file_size", "step_time", "train_time"),
    *("training_mib", "peak_rss_mib", "accelerator_memory_max", "forgetting"),
)
"""Row columns with the costs of a run."""
FRACTIONS = {f"test_{metric}" for measures in MEASURES.values() for metric in measures} - {"test_kappa", "test_r2"}
"""Row columns formatted as percentages. Kappa and R² are formatted as decimals, because they can be negative."""
NO_RESULTS = "no final run is finished yet"


@dataclass(frozen=True)
class MethodSummary:
    """Results of one method: one line of the table.

    Args:
        name: Method label.
        per_task: Mean and standard deviation by metric and task. None if there are no finished final runs.
        over_tasks: Mean over tasks, by metric. None if no seed has a run on every task.
        over_groups: Mean over groups, by metric. None in the same case.
        to_reference: Paired difference from the reference over the common tasks, by metric, with Holm's correction over
            the methods. None for the reference, and for methods that have no task and seed in common with it.
        to_reference_on: Paired difference in the main metric on each task, without correction.
        costs: Mean over tasks of each column in `COSTS`. None for a column that was not measured.
    """

    name: str
    per_task: Mapping[str, Mapping[str, Spread | None]]
    over_tasks: Mapping[str, Spread | None]
    over_groups: Mapping[str, Spread | None]
    to_reference: Mapping[str, Difference | None]
    to_reference_on: Mapping[str, Difference | None]
    costs: Mapping[str, float | None]


@dataclass(frozen=True)
class Summary:
    """Results of a comparison.

    Args:
        experiment: The experiment.
        rows: All rows of the comparison, including those of methods and tasks outside the experiment.
        runs: Finished final runs of the experiment.
        methods: Results of each method, in the order of the experiment.
        tasks: Tasks with finished final runs, in the order of the experiment.
        groups: Tasks by group.
        finals: Number of finished final runs.
        failed: Rows of failed runs of the experiment.
        metrics: Metric titles by row column. The first metric is the main one.
    """

    experiment: Experiment
    rows: Rows
    runs: FinalRuns
    methods: list[MethodSummary]
    tasks: list[str]
    groups: dict[str, list[str]]
    finals: int
    failed: list[CellRow]
    metrics: Mapping[str, str]

    @property
    def reference(self) -> str:
        """Label of the reference method."""
        return self.experiment.reference_name

    @property
    def expected(self) -> int:
        """Number of final runs in the experiment."""
        return len(self.experiment.methods) * len(self.experiment.data) * self.experiment.seeds

    @cached_property
    def trials(self) -> dict[tuple[str, str], list[CellRow]]:
        """Rows of tuning runs by method and task."""
        trials: dict[tuple[str, str], list[CellRow]] = {}
        for row in self.rows:
            if row.purpose == "trial":
                trials.setdefault((row.experiment_name, row.task_name), []).append(row)
        return trials

    @property
    def column(self) -> str:
        """Row column of the main metric, e.g. `test_accuracy`."""
        return next(iter(self.metrics))

    @property
    def measure(self) -> str:
        """Title of the main metric, e.g. accuracy."""
        return self.metrics[self.column]

    @property
    def is_fraction(self) -> bool:
        """True if the main metric is formatted as a percentage."""
        return self.column in FRACTIONS

    @property
    def has_groups(self) -> bool:
        """True if there are several groups and at least one has several tasks."""
        return 1 < len(self.groups) < len(self.tasks)

    @cached_property
    def means(self) -> dict[str, Spread]:
        """Mean of the main metric over tasks, by method, for the methods that can be ranked.

        These methods have runs with the same seeds on every task. If the seeds differ between methods, the group of at
        least two methods with the most runs is ranked.
        """
        groups: dict[frozenset[int], dict[str, Spread]] = {}
        for method in self.methods:
            mean = method.over_tasks[self.column]
            if mean is not None:
                groups.setdefault(self.runs.seeds(method.name, self.tasks), {})[method.name] = mean
        if len(groups) > 1:
            groups = {seeds: means for seeds, means in groups.items() if len(means) > 1}
        _, ranked = max(groups.items(), key=lambda group: len(group[0]) * len(group[1]), default=(frozenset(), {}))
        return ranked

    @cached_property
    def mixed_tasks(self) -> list[str]:
        """Tasks on which final runs with the same seed have different splits."""
        splits: dict[tuple[str, int], set[str | None]] = {}
        for method in self.methods:
            for task in self.tasks:
                for row in self.runs.rows(method.name, task):
                    splits.setdefault((task, row.seed), set()).add(None if row.results is None else row.results.split)
        mixed = {task for (task, _), digests in splits.items() if len(digests - {None}) > 1}
        return [task for task in self.tasks if task in mixed]

    def scores(self, metric: str) -> dict[str, list[Spread | None]]:
        """Return the scores of all methods by column: the tasks, then any means over tasks and groups."""
        columns: dict[str, list[Spread | None]] = {}
        for task in self.tasks:
            columns[task] = [method.per_task[metric][task] for method in self.methods]
        if len(self.tasks) > 1:
            columns[OVER_TASKS] = [method.over_tasks[metric] for method in self.methods]
        if self.has_groups:
            columns[OVER_GROUPS] = [method.over_groups[metric] for method in self.methods]
        return columns

    @property
    def recommendation(self) -> tuple[str, str]:
        """Recommended method and an explanation. At least one method must have a mean over all tasks."""
        costs = {method.name: method.costs for method in self.methods}
        return recommend(self.means, costs, self.measure, self.is_fraction)


def summarize(experiment: Experiment, rows: Rows) -> Summary:
    """Compute the results of all methods, ignoring rows of methods and tasks outside the experiment."""
    names = [method.name for method in experiment.methods]
    task_names = {entry.name for entry in experiment.data}
    known = [row for row in rows if row.experiment_name in names and row.task_name in task_names]
    finals = final_rows(known)
    runs = FinalRuns(finals)
    seen = {row.task_name for row in finals}
    tasks = [entry.name for entry in experiment.data if entry.name in seen]
    groups: dict[str, list[str]] = {}
    for entry in experiment.data:
        if entry.name in seen:
            groups.setdefault(entry.group, []).append(entry.name)
    reference = experiment.reference_name
    metrics = {f"test_{metric}": title for metric, title in experiment.measures.items()}
    others = [name for name in names if name != reference]
    differences: dict[str, dict[str, Difference | None]] = {}
    for metric in metrics:
        differences[metric] = with_holm({name: runs.difference(name, reference, tasks, metric) for name in others})
    main_metric = next(iter(metrics))
    task_differences = {
        (name, task): runs.difference(name, reference, [task], main_metric) for name in others for task in tasks
    }
    single_tasks = [[task] for task in tasks]
    grouped_tasks = list(groups.values())
    methods: list[MethodSummary] = []
    for name in names:
        per_task: dict[str, dict[str, Spread | None]] = {}
        for metric in metrics:
            per_task[metric] = {task: runs.spread(name, task, metric) for task in tasks}
        methods.append(
            MethodSummary(
                name,
                per_task=per_task,
                over_tasks={metric: runs.mean(name, single_tasks, metric) for metric in metrics},
                over_groups={metric: runs.mean(name, grouped_tasks, metric) for metric in metrics},
                to_reference={metric: differences[metric].get(name) for metric in metrics},
                to_reference_on={task: task_differences.get((name, task)) for task in tasks},
                costs={column: runs.average(name, column) for column in COSTS},
            )
        )
    return Summary(
        experiment=experiment,
        rows=rows,
        runs=runs,
        methods=methods,
        tasks=tasks,
        groups=groups,
        finals=len(finals),
        failed=[row for row in known if row.status == "failed"],
        metrics=metrics,
    )


def score_text(value: float, is_fraction: bool) -> str:
    """Format a score: 85.2% for a fraction, else 0.852."""
    return percent_text(value) if is_fraction else decimal_text(value, 3)


def spread_text(value: Spread | None, is_fraction: bool = True, seeds: int = 1) -> str:
    """Format a score and its standard deviation: 85.2 ± 0.4 for a fraction, else 0.852 ± 0.004.

    The text ends with the number of seeds if there are fewer than `seeds`.
    """
    if value is None:
        return "–"
    mean, deviation = (score_text(part, is_fraction).rstrip("%") for part in (value.mean, value.std))
    part = f" ({value.count} of {seeds} seeds)" if value.count < seeds else ""
    return f"{mean}{part}" if math.isnan(value.std) else f"{mean} ± {deviation}{part}"


def change_text(value: float, is_fraction: bool) -> str:
    """Format a difference with its sign: +2.9 (percentage points) for a fraction, else +0.029."""
    return points_text(value) if is_fraction else signed_text(value, 3)


def size_text(value: float, is_fraction: bool) -> str:
    """Format the size of a difference: 2.9 percentage points for a fraction, else 0.029."""
    return f"{decimal_text(100 * value, 1)} percentage points" if is_fraction else decimal_text(value, 3)


def difference_text(value: Difference | None, tasks: int, is_fraction: bool = True) -> str:
    """Format a difference and its interval: −0.8 [−1.9, +0.2] for a fraction, else −0.008 [−0.019, +0.002].

    The numbers for a fraction are percentage points. The text ends with the number of tasks that the difference covers,
    unless it covers all `tasks`.
    """
    if value is None:
        return "–"
    mean, low, high = (change_text(end, is_fraction) for end in (value.mean, value.low, value.high))
    interval = "" if math.isnan(value.low) else f" [{low}, {high}]"
    return f"{mean}{interval}{part_text(value, tasks)}"


def p_text(value: float) -> str:
    """Format a p-value: 0.66, 0.031, < 0.001."""
    if math.isnan(value):
        return "–"
    if value >= 0.0995:  # three decimals would show 0.100
        return f"{value:.2f}"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def significance_texts(value: Difference | None) -> tuple[str, str]:
    """Format the adjusted p-value, and the number of units above zero with the p-value of the sign test."""
    if value is None:
        return "–", "–"
    return p_text(value.adjusted_p), f"{value.above} of {value.units} ({p_text(value.sign_p)})"


def outcome_text(summary: Summary) -> str:
    """Summarize the outcome: the best mean, its lead over the reference, and other significant differences.

    Only the methods in `Summary.means` are ranked. The text is empty if there are none.
    """
    means = summary.means
    if not means:
        return ""
    best = max(means, key=lambda name: means[name].mean)
    where = f" in the mean over {counted(len(summary.tasks), 'task')}" if len(summary.tasks) > 1 else ""
    equal = [name for name, value in means.items() if math.isclose(value.mean, means[best].mean)]
    verb = "has" if len(equal) == 1 else "have"
    leaders = f"{', '.join(equal)} {verb} the highest test {summary.measure}"
    text = f"{leaders}, {score_text(means[best].mean, summary.is_fraction)}{where}"
    differences = _main_differences(summary)
    lead = differences.get(best)
    if lead is not None and lead.mean > 0 and len(equal) == 1:
        text += f": {size_text(lead.mean, summary.is_fraction)} above {summary.reference}"
        text += part_text(lead, len(summary.tasks))
        if not math.isnan(lead.low):
            reason = "" if lead.direction else f"; {insignificance_text(lead)}"
            low, high = (change_text(end, summary.is_fraction) for end in (lead.low, lead.high))
            text += f" ({percent_text(LEVEL, 0)} interval {low} to {high}{reason})"
    complete = {name: value for name, value in differences.items() if value.tasks == len(summary.tasks)}
    above = [name for name, value in complete.items() if value.direction > 0 and name not in equal]
    below = [name for name, value in complete.items() if value.direction < 0]
    clauses: list[str] = []
    for names, side in ((above, "above"), (below, "below")):
        if names:
            verb = "is" if len(names) == 1 else "are"
            clauses.append(f"{', '.join(names)} {verb} significantly {side} {summary.reference}")
    return f"{text}. Among the others, {' and '.join(clauses)}." if clauses else f"{text}."


def _main_differences(summary: Summary) -> dict[str, Difference]:
    """Return the differences from the reference in the main metric, by method, omitting those that are None."""
    differences: dict[str, Difference] = {}
    for method in summary.methods:
        difference = method.to_reference[summary.column]
        if difference is not None:
            differences[method.name] = difference
    return differences


def insignificance_text(value: Difference) -> str:
    """Return why a difference is not significant: too few tasks or seeds, or its adjusted p-value."""
    if value.units < MIN_UNITS:
        unit = counted(value.units, "task" if value.tasks > 1 else "seed")
        return f"not significant, {unit}, at least {MIN_UNITS} required"
    return f"not significant, p {p_text(value.adjusted_p)} after Holm's correction"


def recommendation_text(summary: Summary) -> str:
    """Recommend the method with the least memory, then time, among all within one standard error of the best.

    The standard error is over the seeds of the best method. Memory within 5% of the minimum counts as a tie. The
    text also lists the methods that are not in `Summary.means`. It is empty if no method is.
    """
    if not summary.means:
        return ""
    text = summary.recommendation[1]
    others = [method.name for method in summary.methods if method.name not in summary.means]
    return f"{text} Not ranked (missing results or other seeds): {', '.join(others)}." if others else text


def recommend(
    means: Mapping[str, Spread], costs: Mapping[str, Mapping[str, float | None]], measure: str, is_fraction: bool
) -> tuple[str, str]:
    """Return the recommended method and an explanation, following the rule of `recommendation_text`.

    `means` contains scores, which are formatted as percentages if `is_fraction`. `costs` contains
    `accelerator_memory_max`, `training_mib`, and `train_time`.
    """
    best = max(means, key=lambda name: means[name].mean)
    top = means[best]
    error = 0.0 if math.isnan(top.std) else top.std / math.sqrt(top.count)
    error_text = "only one seed; standard error unknown" if math.isnan(top.std) else size_text(error, is_fraction)
    near = [name for name, value in means.items() if value.mean >= top.mean - error]
    if len(near) == 1 and math.isnan(top.std):
        reason = f"No other method has the same {measure}; with only one seed, the standard error is unknown"
        return best, f"Recommended: {best}. {reason}."
    if len(near) == 1:
        reason = f"No other method is within one standard error of its {measure} ({error_text})"
        return best, f"Recommended: {best}. {reason}."
    chosen, reason = _cheapest(near, costs)
    texts = cost_texts(costs[chosen])
    return chosen, (
        f"Recommended: {chosen}. {len(near)} methods are within one standard error ({error_text}) "
        f"of the best {measure}, {score_text(top.mean, is_fraction)} for {best}; {reason} "
        f"(memory {texts['memory']}, time {texts['time']})."
    )


def _cheapest(names: Sequence[str], costs: Mapping[str, Mapping[str, float | None]]) -> tuple[str, str]:
    """Return the fastest of the methods within 5% of the least memory, and the reason as part of a sentence."""

    def memory(name: str) -> float:
        used = _memory_bytes(costs[name])
        return math.inf if used is None else used

    def time(name: str) -> float:
        seconds = costs[name]["train_time"]
        return math.inf if seconds is None else seconds

    min_memory = min(map(memory, names))
    smallest = [name for name in names if memory(name) <= 1.05 * min_memory or math.isinf(min_memory)]
    chosen = min(smallest, key=time)
    if len(smallest) == 1:
        return chosen, f"{chosen} needs the least memory"
    is_timed = not math.isinf(time(chosen))
    if math.isinf(min_memory):
        reason = "memory was not measured"
        return chosen, f"{reason}, and {chosen} needs the least time" if is_timed else reason
    reason = f"{chosen} needs the least memory (within 5%)"
    return chosen, f"{reason} and the least time" if is_timed else reason


def _memory_bytes(costs: Mapping[str, float | None]) -> float | None:
    """Return the peak GPU memory, or else the peak process memory without libraries; None if neither was measured."""
    peak = costs.get("accelerator_memory_max")
    if peak:
        return peak
    mib = costs.get("training_mib")
    return None if mib is None else mib * 2**20


def part_text(value: Difference, tasks: int) -> str:
    """Format the number of tasks that a difference covers. The text is empty if it covers all `tasks`."""
    return "" if value.tasks == tasks else f" ({value.tasks} of {counted(tasks, 'task')})"


def cost_texts(costs: Mapping[str, float | None]) -> dict[str, str]:
    """Format costs by name, where a dash stands for a missing cost."""
    memory = _memory_bytes(costs)
    formats: dict[str, tuple[float | None, Callable[[float], str]]] = {
        "trainable": (costs.get("num_trainable_params"), lambda value: count_text(round(value))),
        "changed": (costs.get("changed_weights"), lambda value: count_text(round(value))),
        "file": (costs.get("file_size"), bytes_text),
        "step": (costs.get("step_time"), lambda value: f"{1000 * value:.1f} ms"),
        "time": (costs.get("train_time"), seconds_text),
        "memory": (memory, bytes_text),
        "forgetting": (costs.get("forgetting"), points_text),
    }
    texts: dict[str, str] = {}
    for name, (cost, format_cost) in formats.items():
        texts[name] = "–" if cost is None else format_cost(cost)
    return texts


def caption(summary: Summary) -> str:
    """Return the caption of the tables."""
    return (
        f"test {'/'.join(summary.metrics.values())}{unit_text(summary, 'percent')}, mean ± standard deviation over "
        f"seeds; {interval_text(summary)}"
    )


def unit_text(summary: Summary, unit: str) -> str:
    """Return the unit of the metrics in `FRACTIONS`: " in percent", " (accuracy in percent)", or an empty string."""
    fractions = [title for metric, title in summary.metrics.items() if metric in FRACTIONS]
    if len(fractions) == len(summary.metrics):
        return f" in {unit}"
    return f" ({', '.join(fractions)} in {unit})" if fractions else ""


def interval_text(summary: Summary) -> str:
    """Describe how differences from the reference are tested."""
    differences = list(_main_differences(summary).values())
    units = "seeds"
    averaging = ""
    if any(difference.tasks > 1 for difference in differences):
        units = "tasks"
        averaging = " (seeds averaged per task)"
    num_corrected = max((difference.comparisons for difference in differences), default=0)
    compared = num_corrected or len(differences)  # without any p-value, nothing was corrected
    text = (
        f"differences from {summary.reference}{unit_text(summary, 'percentage points')}, with {percent_text(LEVEL, 0)} "
        f"Student's t intervals over {units}{averaging}; p after Holm's correction over "
        f"{counted(compared, 'comparison')}; above: number of {units} above {summary.reference}, with p of the "
        f"sign test"
    )
    if differences and all(difference.units < MIN_UNITS for difference in differences):
        text += f"; no difference is significant with fewer than {MIN_UNITS} tasks or seeds"
    return text


def print_summary(console: Console, summary: Summary) -> None:
    """Print the result tables, the outcome, the recommendation, and the failed runs."""
    if summary.finals:
        for metric, title in summary.metrics.items():
            headings, *lines = table_cells(summary, metric, with_costs=metric == summary.column)
            console.print(make_table(headings, lines, title=f"test {title}"))
        for text in filter(None, (outcome_text(summary), recommendation_text(summary), caption(summary))):
            print_line(console, text)
    else:
        print_line(console, NO_RESULTS)
    for task in summary.mixed_tasks:
        print_line(console, f"warning: {mixed_text(task)}")
    for row in summary.failed:
        print_line(console, f"FAILED {row.cell}: {failure_text(row)}")
    if not all(row.is_diverged_trial for row in summary.failed):
        print_line(console, "add --retry-failed to train failed runs again")


def mixed_text(task: str) -> str:
    """Return the warning for a task in `Summary.mixed_tasks`."""
    return (
        f"the runs on {task!r} used different images because files or labels changed between the runs; their scores "
        "are not comparable"
    )


def failure_text(row: CellRow) -> str:
    """Return the error of a failed run. A diverged tuning run is only an excluded candidate."""
    return "the loss diverged, so this candidate is excluded" if row.is_diverged_trial else str(row.error)


def table_cells(summary: Summary, metric: str, *, with_costs: bool) -> list[list[str]]:
    """Return the lines of the table as strings, headings first.

    The columns are the tasks, the means, the difference from the reference, its tests, and, if `with_costs`, the costs.
    Costs that were not measured for any method are omitted.
    """
    texts = [cost_texts(method.costs) for method in summary.methods]
    names = ("trainable", "changed", "file", "step", "memory", "forgetting") if with_costs else ()
    costs = [name for name in names if any(line[name] != "–" for line in texts)]
    scores = summary.scores(metric)
    is_fraction = metric in FRACTIONS
    lines = [["method", *scores, f"difference from {summary.reference}", "p", "above", *costs]]
    for number, method in enumerate(summary.methods):
        seeds = summary.experiment.seeds
        cells = [spread_text(column[number], is_fraction, seeds) for column in scores.values()]
        cells.append(difference_text(method.to_reference[metric], len(summary.tasks), is_fraction))
        cells += significance_texts(method.to_reference[metric])
        lines.append([method.name, *cells, *(texts[number][key] for key in costs)])
    return lines
