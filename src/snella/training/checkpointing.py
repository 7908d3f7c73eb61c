"""The Hugging Face Trainer with checkpoints that hold what was trained and are complete or not there."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from snella.methods import load_trained_into, save_trained
from snella.training.atomic_files import write_json
from snella.training.checkpoints import reading, remove_incomplete, staged
from snella.training.run_folder import RunFolderOf
from snella.training.stopping import NonFiniteLossError

_PROGRESS_FILE = "progress.json"


class CheckpointingTrainer(Trainer):
    """What training has in common, whatever a batch is.

    Differs from its base class in that
    - a checkpoint holds what was trained, not the model around it, and appears under its name only when it is complete;
    - a loss or gradient that is not finite ends the run before it reaches the weights;
    - the time spent before an interruption counts.

    Args:
        trained: The model with what is trained, from `build_method` or `adapt_headless`.
        run: Where checkpoints go.
        start: When this session's work began, as `time.monotonic()` counts; now if None.
        **options: As for transformers' Trainer; `model` is `trained` if it is not given.

    Attributes:
        last_loss: Of the latest forward pass.
    """

    def __init__(self, trained: nn.Module, run: RunFolderOf[Any], start: float | None = None, **options: Any) -> None:
        self.trained_model = trained
        self.run_folder = run
        self.last_loss = math.nan
        self._earlier_s = 0.0
        self._session_start = time.monotonic() if start is None else start
        self._staging: Path | None = None
        super().__init__(**{"model": trained, **options})
        self.remove_callback(PrinterCallback)

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self._earlier_s + time.monotonic() - self._session_start

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch.

        Raises:
            NonFiniteLossError: The loss is not finite; nothing of this step is kept.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite("the loss", value)
        self.last_loss = value
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of the gradient before clipping, checked before the optimiser uses it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            raise self._not_finite("the gradient", float(norm))
        return norm

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error that says where, what is left, and what to try."""
        raise NotImplementedError

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
                self._write_state(self._staging / name)
            finally:
                self._staging = None
        remove_incomplete(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what was trained."""
        save_trained(self.trained_model, output_dir or str(self.run_folder.adapter))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read what was trained, and our share of the state."""
        checkpoint = Path(resume_from_checkpoint)
        with reading(checkpoint):
            load_trained_into(self.trained_model, checkpoint)
            self._read_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read their states."""
        with nullcontext() if checkpoint is None else reading(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Read the states of the generators of random numbers."""
        with nullcontext() if checkpoint is None else reading(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _write_state(self, checkpoint: Path, **values: Any) -> None:
        """Write what the Trainer's own state lacks, `values` with it."""
        write_json(checkpoint / _PROGRESS_FILE, {"elapsed_s": self.elapsed_s, **values})

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Read what `_write_state` wrote."""
        values: dict[str, Any] = json.loads((checkpoint / _PROGRESS_FILE).read_text(encoding="utf-8"))
        self._earlier_s = values["elapsed_s"]
        return values


def quiet_arguments(
    checkpoints: Path, device: torch.device, *, seed: int, precision: str, **own: Any
) -> TrainingArguments:
    """The Trainer's settings that all kinds of runs share: quiet, on one device, our own batches.

    Args:
        checkpoints: Where they go.
        device: Where to train.
        seed: Of the run.
        precision: fp32, or bf16 for autocast.
        **own: Those of this kind of run.
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        **own,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
