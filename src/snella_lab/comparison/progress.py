"""Console progress of a comparison, whose individual runs are called cells."""

import math
import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from snella_app.console import counted, print_line
from snella_app.text import seconds_text
from snella_lab.comparison.cells import Cell, Plan
from snella_lab.comparison.rows import CellRow


class ComparisonProgress:
    """Console progress of a comparison: one line per run and, on a terminal, a progress bar.

    `rows` contains the results of finished runs, whose durations are used to estimate the remaining time.
    """

    def __init__(self, console: Console, plan: Plan, rows: Iterable[CellRow]) -> None:
        self._console = console
        self._plan = plan
        self._is_waiting = False
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
        )
        self._task = self._bar.add_task("", total=1)
        self._running: list[str] = []
        self._durations: dict[tuple[str, ...], tuple[float, int]] = {}
        self._estimated_at = -math.inf
        self._estimate_s = 0.0
        for row in rows:
            self._add_duration(row)

    def __enter__(self) -> "ComparisonProgress":
        left = self._plan.left
        done = self._plan.done
        if left:
            already = f", {done:,} already done" if done else ""
            print_line(self._console, f"{counted(left, 'run')} to train{already}")
        if self._console.is_terminal:
            self._bar.start()
        self._refresh()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def started(self, cell: Cell) -> None:
        """Add a run to the bar."""
        self._is_waiting = False
        self._running.append(cell.title)
        self._refresh()

    def ended(self, cell: Cell, row: CellRow, slots: int, is_local: bool = True) -> None:
        """Print the result of a run and, once a run has succeeded, the estimated time left with `slots` parallel runs.

        `is_local` is False if another process trained the run.
        """
        self._add_duration(row)
        left = self._plan.left
        done = self._plan.done
        if row.status == "success":
            scores = {"validation": row.score("val"), "test": row.score("test")}
            result = ", ".join(f"{split} {score:.4f}" for split, score in scores.items() if score is not None)
        else:
            result = f"FAILED, {row.error}"
        has_estimate = left and self._durations
        remaining = f"; about {seconds_text(self._remaining_s() / slots)} left" if has_estimate else ""
        author = "" if is_local else " by another process"
        origin = ", reused from the selected tuning run" if row.results and row.results.trained_as else ""
        text = f"{cell.title}: {result} ({seconds_text(row.total_time)}{author}{origin}){remaining}"
        print_line(self._console, f"[{done}/{done + left}] {text}")
        self.removed(cell)

    def removed(self, cell: Cell) -> None:
        """Remove a run from the bar, because it has ended or another process has claimed it."""
        if cell.title in self._running:
            self._running.remove(cell.title)
        self._refresh()

    def waiting(self, count: int) -> None:
        """Print that other processes have claimed all `count` runs that could start.

        Repeated calls print nothing until this process starts a run.
        """
        if not self._is_waiting:
            print_line(self._console, f"waiting for {counted(count, 'run')} in other processes")
        self._is_waiting = True

    def _refresh(self) -> None:
        """Show the number of finished runs, the total number of runs, and the names of running ones in the bar."""
        left = self._plan.left
        done = self._plan.done
        self._bar.update(self._task, completed=done, total=done + left, description=" | ".join(self._running) or "runs")

    def _add_duration(self, row: CellRow) -> None:
        """Add the duration of a successful run to the totals of its task and method, its task, and all runs."""
        if row.status == "success":
            for key in ((row.task_name, row.experiment_name), (row.task_name,), ()):
                total, count = self._durations.get(key, (0.0, 0))
                self._durations[key] = total + row.total_time, count + 1

    def _remaining_s(self) -> float:
        """Estimate the total time of the remaining runs.

        Each run is expected to take the mean time of the successful runs of its task and method. If there are none, the
        mean over its task or else over all runs is used. The estimate depends on every unfinished pair of task and
        method, so it is updated at most once per second.
        """
        if time.monotonic() - self._estimated_at > 1:
            self._estimated_at = time.monotonic()
            self._estimate_s = 0.0
            for task, method, left in self._plan.remaining():
                keys = ((task, method), (task,), ())
                known = (self._durations[key] for key in keys if key in self._durations)
                total, count = next(known, (0.0, 1))
                self._estimate_s += left * total / count
        return self._estimate_s
