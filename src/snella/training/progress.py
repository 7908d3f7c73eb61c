"""What a run shows while it is under way: a bar on a terminal, a line an epoch everywhere."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella import SnellaCallback
from snella.tasks import Task
from snella.training.protocol import RunProtocol


class ProgressDisplay(TrainerCallback):
    """Progress bar with the loss and the budget, and a line with the results of each epoch.

    Args:
        console: Where to write; the bar appears only if it is a terminal.
        task: How an epoch's results read and rank.
        protocol: What chooses the best epoch.
        total_weights: Adapted weights, to give the budget as a share; None without budgets.
        allocation: The callback that owns the allocator; None without budgets.
        show_bar: Whether a bar is wanted.
    """

    def __init__(
        self,
        console: Console,
        task: Task,
        protocol: RunProtocol,
        total_weights: int | None = None,
        allocation: SnellaCallback | None = None,
        show_bar: bool = True,
    ) -> None:
        self.console = console
        self.task, self.protocol = task, protocol
        self.total_weights = total_weights
        self.allocation = allocation
        self.show_bar = show_bar and console.is_terminal
        self.last_loss: Callable[[], float] = lambda: float("nan")
        self._bar: Progress | None = None
        self._task: Any = None
        self._best = (float("-inf"), float("-inf"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where the run stands."""
        past = [self.protocol.rank(row, self.task.rank) for row in state.log_history if "budget" in row]
        self._best = max(past, default=self._best)
        if self.show_bar and state.is_world_process_zero:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, shown="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            epoch = f"epoch {int(min(state.epoch, state.num_train_epochs - 1e-6)) + 1}/{state.num_train_epochs}"
            shown = f"loss {self.last_loss():.3f}{self._budget()}"
            self._bar.update(self._task, completed=state.global_step, description=epoch, shown=shown)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Write the epoch's line."""
        if not state.is_world_process_zero:
            return
        rank = self.protocol.rank(metrics, self.task.rank)
        self._best, is_best = max(self._best, rank), rank >= self._best
        part, shown = self.protocol.selected_on, ""
        if part is not None and f"{part}_loss" in metrics:
            text = self.task.epoch_text(self.protocol.unnamed(metrics))
            shown = f"  {part} loss {metrics[f'{part}_loss']:.4f}  {text}"
        self.console.print(
            f"epoch {round(state.epoch):>3}/{state.num_train_epochs}  loss {metrics['train_loss']:.4f}"
            f"{shown}{self._budget()}{'  best' if shown and is_best else ''}",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.close()

    def _budget(self) -> str:
        """Share of the adapted weights that the update may still change."""
        allocator = None if self.allocation is None else self.allocation.allocator
        if allocator is None or not self.total_weights:
            return ""
        return f"  budget {sum(allocator.budgets.values()) / self.total_weights:.1%}"
