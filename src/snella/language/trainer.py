"""The Hugging Face Trainer with checkpoints that hold what was trained and are complete or not there."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella import SnellaCallback
from snella.language.config import LanguageConfig
from snella.language.folder import LanguageFolder
from snella.methods import load_trained_into, save_trained
from snella.training.assembly import choose_device
from snella.training.atomic_files import write_json
from snella.training.checkpoints import remove_incomplete, staged
from snella.training.stopping import NonFiniteLossError

_TIME_FILE = "time.json"


class LanguageTrainer(Trainer):
    """Instruction fine-tuning.

    Args:
        trained: The model, from `adapt_headless`.
        run: Where checkpoints go.
        **options: As for transformers' Trainer.

    Attributes:
        last_loss: Of the latest forward pass.
    """

    def __init__(self, trained: nn.Module, run: LanguageFolder, **options: Any) -> None:
        self.trained_model, self.run_folder = trained, run
        self.last_loss = math.nan
        self._earlier_s, self._start = 0.0, time.monotonic()
        self._staging: Path | None = None
        super().__init__(model=trained, **options)

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self._earlier_s + time.monotonic() - self._start

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch.

        Raises:
            NonFiniteLossError: The loss is not finite; nothing of this step is kept.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.last_loss = loss.item()
        if not math.isfinite(self.last_loss):
            raise NonFiniteLossError(
                f"the loss became {self.last_loss} in step {self.state.global_step + 1} of {self.state.max_steps}; the "
                f"last checkpoint in {self.run_folder.checkpoints} is kept; start a new run with a lower --lr (now "
                f"{self.args.learning_rate:g})"
            )
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        """Where the base class writes a checkpoint: the staging folder while one is open."""
        return str(self._staging or self.run_folder.checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all, and then remove the older ones."""
        folder, name = self.run_folder.checkpoints, f"checkpoint-{self.state.global_step}"
        if (folder / name).is_dir():
            return
        with staged(folder, name) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
                write_json(self._staging / name / _TIME_FILE, {"elapsed_s": self.elapsed_s})
            finally:
                self._staging = None
        remove_incomplete(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what was trained."""
        save_trained(self.trained_model, output_dir or str(self.run_folder.adapter))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read what was trained."""
        load_trained_into(self.trained_model, resume_from_checkpoint)
        self._earlier_s = json.loads((Path(resume_from_checkpoint) / _TIME_FILE).read_text())["elapsed_s"]


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
    device = choose_device(config.device)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
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
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=config.seed,
        use_cpu=device.type == "cpu",
        bf16=config.precision == "bf16",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
