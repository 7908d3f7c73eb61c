"""The Hugging Face Trainer with our batches, optimiser, checkpoints and randomness."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from snella import SnellaCallback
from snella.data import ImageDataset
from snella.methods import load_trained_into, save_trained
from snella.tasks import ClassificationTask
from snella.training.assembly import choose_device
from snella.training.atomic_files import write_json
from snella.training.checkpoints import remove_incomplete, saving, staged
from snella.training.config import TrainConfig
from snella.training.optimizer import build_optimizer
from snella.training.results import rank_of_epoch
from snella.training.run_folder import RunFolder
from snella.training.sampler import EpochCallback, EpochSampler, mix_seed
from snella.training.stopping import NonFiniteLossError

_PROGRESS_FILE = "progress.json"


@dataclass
class _Progress:
    """What the Trainer's own state lacks: the running epoch's loss, and the time of earlier sessions."""

    loss_sum: float = 0.0
    steps: int = 0
    elapsed_s: float = 0.0


class SnellaTrainer(Trainer):
    """One training run over `(image, label)` data sets.

    Differs from its base class in that
    - every step draws its random numbers (dropout, drop-path) from `(seed, step)`, and every epoch its order from
      `(seed, epoch)`, so that a resumed run repeats them wherever it was cut;
    - a checkpoint holds what was trained, not the backbone, and appears under its name only when it is complete;
    - the adapter of the best epoch (see `results.rank_of_epoch`) is written when it is found;
    - a loss or gradient that is not finite ends the run before it reaches the weights.

    Args:
        model: From `build_method`.
        config: Resolved settings.
        task: Loss and metrics.
        train: Training items.
        val: Validation items.
        run: Where checkpoints and the best adapter go.
        callbacks: Further callbacks.
        trained_part: The part of the model that the data sets are inputs of, where that is not the whole.
        start: When this session's work began, as `time.monotonic()` counts; now if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        task: ClassificationTask,
        train: ImageDataset,
        val: ImageDataset,
        run: RunFolder,
        callbacks: list[TrainerCallback],
        trained_part: nn.Module | None = None,
        start: float | None = None,
    ) -> None:
        self.config = config
        self.task = task
        self.trained_model = model
        self.validation_set = val
        self.run_folder = run
        self.progress = _Progress()
        self.last_loss = float("nan")
        self._session_start = time.monotonic() if start is None else start
        self._staging: Path | None = None
        super().__init__(
            model if trained_part is None else trained_part,
            training_arguments(config, run.checkpoints),
            data_collator=task.collate,
            train_dataset=train,
            eval_dataset=val,
            callbacks=[EpochCallback(train), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per finished epoch, as `metrics.json` holds them."""
        rows = [row for row in self.state.log_history if "val_accuracy" in row]
        return [
            {"epoch": round(row["epoch"]), **{k: v for k, v in row.items() if k not in ("step", "epoch")}}
            for row in rows
        ]

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self.progress.elapsed_s + time.monotonic() - self._session_start

    @property
    def allocation_callback(self) -> SnellaCallback | None:
        """The callback that owns the allocator; None for methods without budgets."""
        found = [c for c in self.callback_handler.callbacks if isinstance(c, SnellaCallback)]
        return found[0] if found else None

    def score(self, dataset: Dataset[Any]) -> tuple[dict[str, Any], Tensor]:
        """Metrics on a data set, and the class probabilities of its items `[items, classes]`."""
        output = self.evaluation_loop(self.get_eval_dataloader(dataset), "evaluation", prediction_loss_only=False)
        logits = np.asarray(output.predictions)
        return self.task.metrics(logits, np.asarray(output.label_ids)), self.task.probabilities(torch.as_tensor(logits))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "val"
    ) -> dict[str, float]:
        """Measure the epoch on validation, log it, and keep its adapter if it is the best so far.

        Raises:
            NonFiniteLossError: The loss is not finite; nothing is saved then.
        """
        scores, _ = self.score(self.validation_set)
        if not math.isfinite(scores["loss"]):
            raise self._not_finite("the validation loss", scores["loss"])
        row = {
            "train_loss": self.progress.loss_sum / max(self.progress.steps, 1),
            "val_loss": scores["loss"],
            "val_accuracy": scores["accuracy"],
            "val_balanced_accuracy": scores["balanced_accuracy"],
            "lr": float(self._get_learning_rate()),
            "budget": self._budget(),
        }
        self.progress.loss_sum, self.progress.steps = 0.0, 0
        is_best = all(rank_of_epoch(past) <= rank_of_epoch(row) for past in self.history)
        self.log(row)
        if is_best and self.args.should_save:
            with saving(self.run_folder.adapter):
                save_trained(self.trained_model, self.run_folder.adapter)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser with its groups."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.trained_model, self.config)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch; with `return_outputs` the logits too."""
        logits = model(inputs["images"])
        loss = self.task.loss(logits, inputs["labels"])
        return (loss, logits) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, with the step's own random numbers.

        Raises:
            NonFiniteLossError: The loss is not finite.
        """
        torch.manual_seed(mix_seed(self.config.seed, 1, self.state.global_step, self.args.process_index))
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite("the loss", value)
        self.last_loss = value
        self.progress.loss_sum += value
        self.progress.steps += 1
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), logits.detach().float(), inputs["labels"]

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """The order of an epoch."""
        return EpochSampler(len(self.train_dataset), self.config.seed)  # type: ignore[arg-type]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of the gradient before clipping, checked before the optimiser uses it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            raise self._not_finite("the gradient", float(norm))
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        """Where the base class writes a checkpoint: the staging folder while one is open."""
        return str(self._staging or self.run_folder.checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all, and then remove the older ones."""
        name = f"checkpoint-{self.state.global_step}"
        folder = self.run_folder.checkpoints
        if (folder / name).is_dir():
            return
        with staged(folder, name) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
                progress = _Progress(self.progress.loss_sum, self.progress.steps, self.elapsed_s)
                write_json(self._staging / name / _PROGRESS_FILE, asdict(progress))
            finally:
                self._staging = None
        remove_incomplete(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what was trained."""
        save_trained(self.trained_model, output_dir or str(self.run_folder.adapter))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read what was trained, and our share of the state."""
        load_trained_into(self.trained_model, resume_from_checkpoint)
        self.progress = _Progress(**json.loads((Path(resume_from_checkpoint) / _PROGRESS_FILE).read_text()))

    def _budget(self) -> int | None:
        """Weights kept at present, over all matrices."""
        callback = self.allocation_callback
        allocator = None if callback is None else callback.allocator
        return None if allocator is None else sum(allocator.budgets.values())

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error that says where, what is left, and what to try."""
        step = self.state.global_step + (1 if what != "the validation loss" else 0)
        per_epoch = max(1, self.state.max_steps // max(1, int(self.state.num_train_epochs)))
        epoch = (step - 1) // per_epoch + 1
        done = len(self.history)
        kept = f"the state after epoch {done} is kept, and the best adapter" if done else "no epoch was finished before"
        rates = {name: getattr(self.config, name) for name in ("lr", "scalar_lr", "head_lr", "scaling")}
        shown = ", ".join(
            f"--{name.replace('_', '-')} (now {rate:g})" for name, rate in rates.items() if rate is not None
        )
        return NonFiniteLossError(
            f"{what} became {value} in epoch {epoch}, step {step} of {self.state.max_steps}; "
            f"{kept} in {self.run_folder.path}; "
            f"start a new run with a lower {shown} or a longer --warmup"
        )


def training_arguments(config: TrainConfig, checkpoints: Path) -> TrainingArguments:
    """The Trainer's own settings: quiet, an evaluation and a checkpoint each epoch, warm-up and a cosine."""
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.images_per_step,
        per_device_eval_batch_size=config.images_per_step,
        learning_rate=config.lr or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=config.seed,
        use_cpu=choose_device(config.device).type == "cpu",
        bf16=config.precision == "bf16",
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
