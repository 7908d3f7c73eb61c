"""The trainer of language models, its settings, and what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella import SnellaCallback
from snella.language.config import LanguageConfig
from snella.training.assembly import choose_device
from snella.training.checkpointing import CheckpointingTrainer, quiet_arguments
from snella.training.stopping import NonFiniteLossError


class LanguageTrainer(CheckpointingTrainer):
    """Instruction fine-tuning."""

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error that says where, what is left, and what to try."""
        return NonFiniteLossError(
            f"{what} became {value} in step {self.state.global_step + 1} of {self.state.max_steps}; the "
            f"last checkpoint in {self.run_folder.checkpoints} is kept; start a new run with a lower --lr (now "
            f"{self.args.learning_rate:g})"
        )


class LanguageProgress(TrainerCallback):
    """Progress bar, and a line an epoch with its mean loss, that of held-out entries and the budget.

    Args:
        console: Where to write; the bar appears only if it is a terminal.
        allocation: The callback that owns the allocator; None without budgets.
        show_bar: Whether a bar is wanted.
    """

    def __init__(self, console: Console, allocation: SnellaCallback | None, show_bar: bool) -> None:
        self.console, self.allocation = console, allocation
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = not (show_bar and console.is_terminal)
        self._bar = Progress(*columns, console=console, transient=True, disable=hidden)
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where the run stands."""
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the epoch's line, or that of its held-out entries."""
        shown = [
            f"{name} {logs[key]:.4f}" for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")) if key in logs
        ]
        if shown:
            budget = "" if self.budget() is None or "loss" not in logs else f"  {self.budget():,} weights kept"
            epoch = f"epoch {state.epoch:>5.2f}/{state.num_train_epochs}"
            self.console.print(f"{epoch}  {'  '.join(shown)}{budget}", highlight=False, soft_wrap=True)

    def budget(self) -> int | None:
        """Weights kept at present, over all matrices."""
        allocator = None if self.allocation is None else self.allocation.allocator
        return None if allocator is None else sum(allocator.budgets.values())

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def training_arguments(config: LanguageConfig, checkpoints: Path) -> TrainingArguments:
    """The Trainer's own settings: quiet, a checkpoint each epoch, warm-up and a linear fall."""
    return quiet_arguments(
        checkpoints,
        choose_device(config.device),
        seed=config.seed,
        precision=config.precision,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr or 0.0,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="epoch" if config.val_size else "no",
        save_strategy="epoch",
        logging_strategy="epoch",
        prediction_loss_only=True,
    )
