"""What a comparison shows while it is under way: a line a cell, and how long it will take."""

import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from snella._text import seconds_text
from snella.comparison.cells import Cell
from snella.comparison.plan import Plan
from snella.runs.console import print_line


class ComparisonProgress:
    """Lines and, on a terminal, a bar.

    Args:
        console: Where to write.
        plan: What is done and what is left.
        slots: Cells at a time.
    """

    def __init__(self, console: Console, plan: Plan, slots: int) -> None:
        self._console, self._plan, self._slots = console, plan, slots
        self._durations: dict[tuple[str, str], list[float]] = {}
        self._is_waiting = False
        for row in plan.rows.values():
            self._note(row)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
        )
        self._task = self._bar.add_task("", total=1)
        self._running: dict[str, float] = {}

    def __enter__(self) -> "ComparisonProgress":
        if self._console.is_terminal:
            self._bar.start()
        self._refresh()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def started(self, cell: Cell) -> None:
        """A cell has begun."""
        self._is_waiting = False
        self._running[cell.title] = time.monotonic()
        self._refresh()

    def ended(self, cell: Cell, row: dict[str, Any], is_ours: bool = True) -> None:
        """A cell is done."""
        self._running.pop(cell.title, None)
        self._note(row)
        left = sum(count for _, count in self._plan.left())
        number = f"[{self._plan.done()}/{self._plan.done() + left}]"
        if row["status"] == "success":
            scores = {"validation": row["val_accuracy"], "test": row["test_accuracy"]}
            result = ", ".join(f"{part} {score:.4f}" for part, score in scores.items() if score is not None)
        else:
            result = f"FAILED, {row['error']}"
        remaining = f"; about {seconds_text(self._remaining_s())} left" if left else ""
        others = "" if is_ours else " by another process"
        origin = ", trained as the trial that was chosen" if row.get("trained_as") else ""
        text = f"{number} {cell.title}: {result} ({seconds_text(row['total_time'])}{others}{origin}){remaining}"
        print_line(self._console, text)
        self._refresh()

    def left_to_another(self, cell: Cell) -> None:
        """Another process has a cell that was to be ours."""
        self._running.pop(cell.title, None)
        self._refresh()

    def waiting(self, count: int) -> None:
        """Other processes have all that could be done now."""
        if not self._is_waiting:
            print_line(
                self._console, f"waiting for {count} cell{'s' if count != 1 else ''} that another process trains"
            )
        self._is_waiting = True

    def _note(self, row: dict[str, Any]) -> None:
        """Remember how long a cell took."""
        if row["status"] == "success":
            self._durations.setdefault((row["task_name"], row["experiment_name"]), []).append(row["total_time"])

    def _remaining_s(self) -> float:
        """An estimate: what is left of each pair, as long as its own cells took, or its task's, or all of them."""
        every = [s for found in self._durations.values() for s in found] or [0.0]
        total = 0.0
        for cell, count in self._plan.left():
            own = self._durations.get((cell.data.name, cell.method.name))
            near = [s for (task, _), found in self._durations.items() if task == cell.data.name for s in found]
            total += count * statistics.fmean(own or near or every)
        return total / self._slots

    def _refresh(self) -> None:
        """Move the bar."""
        done = self._plan.done()
        left = sum(count for _, count in self._plan.left())
        self._bar.update(
            self._task, completed=done, total=done + left, description=" | ".join(self._running) or "cells"
        )
