"""The Trainer of labelled images: our batches, optimiser, best epoch and randomness."""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainingArguments

from snella import SnellaCallback
from snella.data import ImageDataset
from snella.methods import method_of, save_trained
from snella.tasks import Task
from snella.training.assembly import choose_device
from snella.training.checkpointing import CheckpointingTrainer, quiet_arguments
from snella.training.checkpoints import saving
from snella.training.config import TrainConfig
from snella.training.ema import EmaCallback, WeightAverage
from snella.training.optimizer import build_optimizer
from snella.training.protocol import protocol_of
from snella.training.run_folder import RunFolder
from snella.training.sampler import EpochCallback, EpochSampler, mix_seed
from snella.training.stopping import NonFiniteLossError


@dataclass
class _Progress:
    """The running epoch's loss."""

    loss_sum: float = 0.0
    steps: int = 0


class SnellaTrainer(CheckpointingTrainer):
    """One training run over `(image, label)` data sets.

    Differs from its base class in that
    - every step draws its random numbers (dropout, drop-path) from `(seed, step)`, and every epoch its order from
      `(seed, epoch)`, so that a resumed run repeats them wherever it was cut;
    - the adapter of the best epoch (see `Task.rank`) is written when it is found;
    - an average of the weights, where one is kept, is part of a checkpoint.

    Args:
        model: From `build_method`.
        config: Resolved settings.
        task: Loss and metrics.
        train: Training items.
        val: Items that choose the best epoch, as the protocol of `config` has it; None keeps the last.
        run: Where checkpoints and the best adapter go.
        callbacks: Further callbacks.
        trained_part: The part of the model that the data sets are inputs of, where that is not the whole.
        start: When this session's work began, as `time.monotonic()` counts; now if not given.
        keep_checkpoints: Whether each epoch ends with a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        task: Task,
        train: ImageDataset,
        val: ImageDataset | None,
        run: RunFolder,
        callbacks: list[TrainerCallback],
        trained_part: nn.Module | None = None,
        start: float | None = None,
        keep_checkpoints: bool = True,
    ) -> None:
        self.config = config
        self.task = task
        self.validation_set = val
        self.protocol = protocol_of(config.protocol)
        self.average = None if config.ema is None else WeightAverage(model, config.ema)
        averaging = [] if self.average is None else [EmaCallback(self.average)]
        self.progress = _Progress()
        super().__init__(
            model,
            run,
            start,
            model=model if trained_part is None else trained_part,
            args=training_arguments(config, run.checkpoints, keep_checkpoints),
            data_collator=task.collate,
            train_dataset=train,
            eval_dataset=train if val is None else val,  # `evaluate` decides itself what is measured
            callbacks=[EpochCallback(train), *averaging, *callbacks],
        )
        self.model_accepts_loss_kwargs = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per finished epoch, as `metrics.json` holds them."""
        rows = [row for row in self.state.log_history if "budget" in row]
        return [
            {"epoch": round(row["epoch"]), **{k: v for k, v in row.items() if k not in ("step", "epoch")}}
            for row in rows
        ]

    @property
    def allocation_callback(self) -> SnellaCallback | None:
        """The callback that owns the allocator; None for methods without budgets."""
        found = [c for c in self.callback_handler.callbacks if isinstance(c, SnellaCallback)]
        return found[0] if found else None

    def score(self, dataset: Dataset[Any]) -> tuple[dict[str, Any], Tensor]:
        """Metrics on a data set, and what the task says about each of its items (class probabilities, say)."""
        output = self.evaluation_loop(self.get_eval_dataloader(dataset), "evaluation", prediction_loss_only=False)
        kept = np.asarray(output.predictions)
        return self.task.metrics(kept, np.asarray(output.label_ids)), self.task.verdicts(kept)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "val"
    ) -> dict[str, float]:
        """Measure the epoch as the protocol has it, log it, and keep its adapter if it is the best so far.

        With an average of the weights, that is what is measured and kept.

        Raises:
            NonFiniteLossError: The loss is not finite; nothing is saved then.
        """
        with nullcontext() if self.average is None else self.average.applied():
            return self._measure_epoch()

    def _measure_epoch(self) -> dict[str, float]:
        """The work of `evaluate`, with the values that are to be measured in place."""
        row: dict[str, Any] = {
            "train_loss": self.progress.loss_sum / max(self.progress.steps, 1),
            **self._selection_scores(),
            "lr": float(self._get_learning_rate()),
            "budget": self._budget(),
        }
        if self._is_denser_than_asked():
            row["is_denser"] = True
        self.progress.loss_sum, self.progress.steps = 0.0, 0
        rank = self.protocol.rank(row, self.task.rank)
        is_best = all(self.protocol.rank(past, self.task.rank) <= rank for past in self.history)
        self.log(row)
        if is_best and self.args.should_save:
            with saving(self.run_folder.adapter):
                save_trained(self.trained_model, self.run_folder.adapter)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row

    def _selection_scores(self) -> dict[str, float]:
        """Results on the images that choose the epoch, by the names of the history; none where it is not measured."""
        epoch = round(self.state.epoch or 0)
        if self.validation_set is None or not self.protocol.is_measured(epoch, self.config.epochs):
            return {}
        scores, _ = self.score(self.validation_set)
        if not math.isfinite(scores["loss"]):
            part = "test" if self.protocol.selected_on == "test" else "validation"
            raise self._not_finite(f"the {part} loss", scores["loss"])
        return self.protocol.named({"val_loss": scores["loss"], **self.task.epoch_row(scores)})

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
        penalty = None if (method := method_of(self.trained_model)) is None else method.penalty
        if penalty is not None and model.training:
            loss = loss + penalty(self.trained_model)
        return (loss, logits) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, with the step's own random numbers.

        Raises:
            NonFiniteLossError: The loss is not finite.
        """
        torch.manual_seed(mix_seed(self.config.seed, 1, self.state.global_step, self.args.process_index))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.progress.loss_sum += self.last_loss
        self.progress.steps += 1
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of one batch, and what the task keeps of it."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), *self.task.keep(logits.detach(), inputs["labels"])

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """The order of an epoch."""
        return EpochSampler(len(self.train_dataset), self.config.seed)  # type: ignore[arg-type]

    def _write_state(self, checkpoint: Path, **values: Any) -> None:
        """Write the running epoch's loss and the average of the weights too."""
        super()._write_state(checkpoint, **asdict(self.progress), **values)
        if self.average is not None:
            self.average.save(checkpoint)

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Read what `_write_state` wrote."""
        values = super()._read_state(checkpoint)
        self.progress = _Progress(values["loss_sum"], values["steps"])
        if self.average is not None:
            self.average.load(checkpoint)
        return values

    def _budget(self) -> int | None:
        """Weights kept at present, over all matrices."""
        callback = self.allocation_callback
        allocator = None if callback is None else callback.allocator
        return None if allocator is None else sum(allocator.budgets.values())

    def _is_denser_than_asked(self) -> bool:
        """Whether epochs with the target budget are still to come, of which the best is to be kept."""
        callback = self.allocation_callback
        allocator = None if callback is None else callback.allocator
        return allocator is not None and allocator.config.schedule_end < 1 and not allocator.has_reached_target

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error that says where, what is left, and what to try."""
        step = self.state.global_step + (1 if what in ("the loss", "the gradient") else 0)
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


def training_arguments(config: TrainConfig, checkpoints: Path, keep_checkpoints: bool = True) -> TrainingArguments:
    """The Trainer's own settings: quiet, an evaluation and a checkpoint each epoch, warm-up and a cosine."""
    return quiet_arguments(
        checkpoints,
        choose_device(config.device),
        seed=config.seed,
        precision=config.precision,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.images_per_step,
        per_device_eval_batch_size=config.images_per_step,
        learning_rate=config.lr or 0.0,
        lr_scheduler_type="cosine_with_min_lr" if config.final_lr else "cosine",
        lr_scheduler_kwargs={"min_lr_rate": config.final_lr / (config.lr or 1.0)} if config.final_lr else {},
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="epoch" if keep_checkpoints else "no",
        logging_strategy="no",
        dataloader_num_workers=config.workers,
    )
