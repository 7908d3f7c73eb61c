"""Our numbers beside those that a paper has printed."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from snella.comparison.experiment import Experiment
from snella.comparison.published import OVER_GROUPS, OVER_TASKS
from snella.comparison.summary import METRICS, MethodSummary, Summary

_METRIC = next(iter(METRICS))


@dataclass(frozen=True)
class PublishedRow:
    """One number of the paper and ours.

    Args:
        method: The method's label.
        column: A task, a group, or one of the two means.
        paper: In percent.
        ours: In percent; None where a run is missing.
    """

    method: str
    column: str
    paper: float
    ours: float | None

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """Method, column, paper's, ours and the difference in points, for people."""
        if self.ours is None:
            return self.method, self.column, f"{self.paper:.1f}", "–", "–"
        return self.method, self.column, f"{self.paper:.1f}", f"{self.ours:.1f}", f"{self.ours - self.paper:+.1f}"


def published_rows(experiment: Experiment, summary: Summary) -> list[PublishedRow]:
    """Every published number whose method is in the experiment, with ours; empty without published ones."""
    lines = {line.name: line for line in summary.methods}
    return [
        PublishedRow(method, column, float(value), _ours(column, lines[method], summary))
        for method, values in experiment.published.get("values", {}).items()
        if method in lines
        for column, value in values.items()
    ]


def print_published(console: Console, experiment: Experiment, summary: Summary) -> None:
    """Print the table, if the experiment has published numbers."""
    rows = published_rows(experiment, summary)
    if not rows:
        return
    table = Table(title=f"beside the paper's: {experiment.published.get('source', '')}", title_justify="left")
    for heading in ("method", "", "paper", "ours", "difference"):
        table.add_column(heading, justify="left" if heading in ("method", "") else "right")
    for row in rows:
        table.add_row(*row.texts)
    console.print(table)


def _ours(column: str, line: MethodSummary, summary: Summary) -> float | None:
    """Our number of one column, in percent."""
    spreads = line.per_task[_METRIC]
    if column == OVER_TASKS:
        found = line.over_tasks[_METRIC]
    elif column == OVER_GROUPS:
        found = line.over_groups[_METRIC]
    elif column in summary.groups and column not in spreads:
        means = [spreads[task] for task in summary.groups[column]]
        known = [mean.mean for mean in means if mean is not None]
        return 100 * sum(known) / len(known) if len(known) == len(means) else None
    else:
        found = spreads.get(column)
    return None if found is None else 100 * found.mean
