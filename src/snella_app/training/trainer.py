"""Trainer for labeled images.

The selection split contains the images on which the best epoch is selected; some protocols have none. An optimizer step
processes one or several micro-batches. The budget is the number of weights that SNELLA's updates may change.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from transformers import TrainerCallback, TrainerState, TrainingArguments

from snella import BudgetAllocator, SnellaCallback
from snella.ops import widest_dtype
from snella_app.config.train import TrainConfig
from snella_app.data.datasets import ImageDataset
from snella_app.data.protocol import PROTOCOLS
from snella_app.device import autocast, choose_device
from snella_app.methods import method_of, save_trained
from snella_app.methods.peft_methods import check_gradients
from snella_app.records.run import AveragedEpochs
from snella_app.runs.folder import RunFolder
from snella_app.tasks.task import Task
from snella_app.text import split_text
from snella_app.training.build import RunComponents, build_optimizer, epoch_sampler, mix_seed
from snella_app.training.callbacks import EpochCallback, EpochSnapshots, StepTimeCallback, WeightAverage
from snella_app.training.checkpoints import BEST, CheckpointingTrainer, base_training_arguments, convert_write_errors
from snella_app.training.distributed import (
    ShardedBatches,
    average_gradients,
    is_sharded,
    process_count,
    process_index,
)
from snella_app.training.linear_probe import FeatureNorm, evaluates_initial_model
from snella_app.training.session import NonFiniteLossError


class _StoppedEarlyError(Exception):
    """Raised when the resumed run has already stopped early."""


class StartCallback(TrainerCallback):
    """Callback that acts before the first step.

    It evaluates the initial model if it may be the best one, and ends a resumed run that has already stopped early.
    """

    def __init__(self, trainer: SnellaTrainer) -> None:
        self.trainer = trainer
        self.evaluate_initial = evaluates_initial_model(trainer.plan)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluate the initial model, or end the run."""
        if self.evaluate_initial and state.global_step == 0 and not self.trainer.history:
            state.epoch = 0
            self.trainer.evaluate()
        if self.trainer.has_stopped_early:
            raise _StoppedEarlyError


class SnellaTrainer(CheckpointingTrainer):
    """Trainer for `(image, label)` datasets.

    Differences from `CheckpointingTrainer`:
    - Epochs are evaluated without test-time augmentation, which would take one forward pass per view.
    - Random numbers (dropout, drop path) depend only on `(seed, step, rank, micro-batch)`, and the data order only
      on `(seed, epoch)`, so a resumed run reproduces both.
    - The adapter of the best epoch (see `RunProtocol.selection_score`) is saved immediately.
    - Checkpoints also include the weight average, the weights of the last epochs, and the feature statistics, if used.
    - `last_loss` is the loss of the step so far, summed over its micro-batches.

    Args:
        parts: Model, task, training images, and the protocol's selection split. If there is no selection split, the
            last epoch is saved.
        plan: Settings of the run, resolved by `snella_app.training.plan.resolve`.
        run: Run folder for checkpoints and the best adapter.
        callbacks: Additional callbacks.
        feature_norm: Normalization of the head's inputs, folded into the saved head; None for no normalization.
        keep_checkpoints: If True, save a checkpoint after each epoch.

    Attributes:
        step_timer: Callback that times the steps, for the results.
    """

    step_timer: StepTimeCallback

    def __init__(
        self,
        parts: RunComponents,
        plan: TrainConfig,
        run: RunFolder,
        callbacks: list[TrainerCallback],
        feature_norm: FeatureNorm | None = None,
        keep_checkpoints: bool = True,
    ) -> None:
        model = parts.model
        train = parts.splits.train
        optim = plan.optim
        self.parts = parts
        self.plan = plan
        self.task = parts.task
        self.protocol = PROTOCOLS[plan.data.protocol]
        self.validation_set = self.protocol.selection_part(parts.splits)
        self.feature_norm = feature_norm
        statistics = None if feature_norm is None else feature_norm.statistics
        self.average = None if optim.ema is None else WeightAverage(model, optim.ema, statistics)
        num_snapshots = optim.swa or optim.soup
        self.snapshots = EpochSnapshots(model, num_snapshots, statistics) if num_snapshots else None
        self._stored_parts = [part for part in (self.average, self.snapshots, feature_norm) if part is not None]
        self._epoch_loss = 0.0
        self._epoch_steps = 0
        self._step_loss = 0.0
        self._micro_step = 0
        self._weights = [1.0]  # loss weights of the step's micro-batches
        self._views = 1  # set by `outputs` for `prediction_step`
        epoch_size = optim.images_per_epoch(len(train))
        self._sampler = epoch_sampler(train, self.task, plan.data.sampler, parts.seed, epoch_size)
        self._shards = ShardedBatches(self._sampler, optim.effective_batch_size, process_index(), process_count())
        self._is_sharded = is_sharded(model) and parts.trained_part is None
        args = training_arguments(plan, run.checkpoints, keep_checkpoints)
        trained_part = model if parts.trained_part is None else parts.trained_part
        # required by the Trainer, although `evaluate` selects the data itself
        eval_dataset = train if self.validation_set is None else self.validation_set
        own_callbacks: list[TrainerCallback] = [EpochCallback(train, self._sampler)]
        if feature_norm is not None:
            own_callbacks.append(feature_norm)
        if self.average is not None:
            own_callbacks.append(self.average)  # after the norm, because the average includes its statistics
        super().__init__(
            model,
            run,
            model=trained_part,
            args=args,
            data_collator=partial(_collate, self.task, widest_dtype(args.device.type)),
            train_dataset=train,
            eval_dataset=eval_dataset,
            callbacks=[*own_callbacks, *callbacks],
        )
        self.model_accepts_loss_kwargs = False  # the Trainer then divides the loss by the number of micro-batches

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, unless a resumed run has already stopped early."""
        try:
            return super().train(*args, **kwargs)
        except _StoppedEarlyError:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return None

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per finished epoch, as in `metrics.json`. Epoch 0 is an evaluation before training."""
        rows: list[dict[str, Any]] = []
        for entry in self.state.log_history:
            if "budget" not in entry:  # not from `evaluate`
                continue
            values = {name: value for name, value in entry.items() if name not in ("step", "epoch")}
            rows.append({"epoch": round(entry["epoch"]), **values})
        return rows

    @property
    def best_epoch(self) -> int:
        """Epoch with the highest `RunProtocol.selection_score`, or the latest of several such epochs."""
        return int(max(self.history, key=lambda row: (self.selection_score(row), row["epoch"]))["epoch"])

    @property
    def has_stopped_early(self) -> bool:
        """True if at least `early_stopping` evaluated epochs follow the best one.

        Only epochs within the target budget count, so a run does not stop before it reaches the target sparsity.
        """
        patience = self.plan.optim.early_stopping
        allocator = self.allocator
        if patience is None:
            return False
        rows = (row for row in self.history if allocator is None or row["budget"] <= allocator.target_budget)
        scores = map(self.selection_score, rows)
        evaluated = [score for score in scores if math.isfinite(score[0])]
        return bool(evaluated) and len(evaluated) - 1 - evaluated.index(max(evaluated)) >= patience

    @property
    def allocator(self) -> BudgetAllocator | None:
        """Budget allocator. None before training starts, and for methods without budgets."""
        callbacks = self.callback_handler.callbacks
        allocators = [callback.allocator for callback in callbacks if isinstance(callback, SnellaCallback)]
        return allocators[0] if allocators else None

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Return the context of a training step.

        Evaluation does not enter it and therefore uses float32, except in fp16 runs.
        """
        return autocast(self.args.device, self.plan.optim.precision)

    def selection_score(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Return the selection score of a history row."""
        return self.protocol.selection_score(row, self.task.selection_score)

    def outputs(self, dataset: Dataset[Any], views: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the outputs on a dataset, averaged over views and reduced by `Task.reduce`, and the labels."""
        self._views = views
        output = self.evaluation_loop(self.get_eval_dataloader(dataset), "evaluation", prediction_loss_only=False)
        return np.asarray(output.predictions), np.asarray(output.label_ids)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "val"
    ) -> dict[str, float]:
        """Evaluate an epoch as the protocol requires, log it, and save the adapter if the epoch is the best so far.

        With `ema`, the average is evaluated and saved. The arguments are ignored.

        Raises:
            NonFiniteLossError: If the loss is not finite. Nothing is saved in this case.
        """
        allocator = self.allocator
        with self.average_parameters():
            train_loss = self._epoch_loss / self._epoch_steps if self._epoch_steps else math.nan
            scores = self._selection_scores()
            budget = None if allocator is None else sum(allocator.budgets.values())
            row: dict[str, Any] = {
                "train_loss": train_loss,
                **scores,
                "lr": float(self._get_learning_rate()),
                "budget": budget,
            }
            if allocator is not None:
                ends_early = (allocator.config.schedule_end or 1.0) < 1
                if ends_early and not allocator.has_reached_target:
                    row["is_denser"] = True  # only epochs that reached the target budget can be the best
            self._epoch_loss = 0.0
            self._epoch_steps = 0
            score = self.selection_score(row)
            is_best = all(self.selection_score(past_row) <= score for past_row in self.history)
            self.log(row)
            if self.snapshots is not None and self.state.global_step > 0:
                self.snapshots.add(round(self.state.epoch or 0))
            if self.has_stopped_early:
                self.control.should_training_stop = True
            if is_best:
                # if this run is restarted from the first epoch, an earlier `finish` may have left this folder
                shutil.rmtree(self.run_folder.checkpoints / BEST, ignore_errors=True)
                self.save_adapter()
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row

    def average_parameters(self) -> AbstractContextManager[None]:
        """Use the averaged weights in the model inside the context, if `ema` is set."""
        return nullcontext() if self.average is None else self.average.average_parameters()

    def average_epochs(self) -> AveragedEpochs | None:
        """Average the trained weights of the last epochs and save the average unless the best epoch is better.

        `swa` averages all of these epochs. `soup` starts with the best one and adds the others in descending order of
        their scores, except those that lower the score of the mean. Both use the budgets of the last step.

        Returns:
            Record of the average. None if the settings do not request an average, or if no epoch is stored.

        Raises:
            NonFiniteLossError: If the loss of an average is not finite.

        Sources:
            Izmailov et al., Averaging Weights Leads to Wider Optima (arXiv 1803.05407); Wortsman et al., Model Soups
            (arXiv 2203.05482).
        """
        snapshots = self.snapshots
        if snapshots is None or not snapshots.epochs:
            return None
        epoch_scores = {row["epoch"]: self.selection_score(row) for row in self.history}
        averaged = snapshots.epochs
        candidates: list[int] = []
        if self.plan.optim.soup is not None:
            best, *candidates = sorted(snapshots.epochs, key=lambda epoch: (epoch_scores[epoch], epoch), reverse=True)
            averaged = [best]
        score, metrics = self._evaluate_mean(averaged)
        for epoch in candidates:
            extended = sorted([*averaged, epoch])
            extended_score, extended_metrics = self._evaluate_mean(extended)
            if extended_score >= score:
                averaged = extended
                score = extended_score
                metrics = extended_metrics
        is_saved = score >= max(epoch_scores.values())
        if is_saved:
            with snapshots.average_parameters(averaged):
                self.save_adapter()
        kind: Literal["swa", "soup"] = "swa" if self.plan.optim.soup is None else "soup"
        return AveragedEpochs(kind, averaged, snapshots.epochs, is_saved, metrics)

    def _evaluate_mean(self, epochs: Sequence[int]) -> tuple[tuple[float, float], dict[str, float]]:
        """Return the selection score and the metrics of the mean over epochs.

        Without a selection split, the score is constant and there are no metrics.
        """
        if self.snapshots is None or self.validation_set is None:
            return self.selection_score({}), {}
        with self.snapshots.average_parameters(epochs):
            scores = self._evaluate_split(self.validation_set)
        return self.selection_score(scores), scores

    def save_adapter(self, folder: Path | None = None) -> None:
        """Write the trained weights to `folder`, by default the run's adapter folder, in the main process."""
        if not self.args.should_save:
            return
        run = self.run_folder
        folded = nullcontext() if self.feature_norm is None else self.feature_norm.folded()
        recorded = run.writing_adapter() if folder is None else nullcontext()
        with convert_write_errors(folder or run.adapter), folded, recorded:
            save_trained(self.trained_model, folder or run.adapter)

    def _selection_scores(self) -> dict[str, float]:
        """Return the scores of the selection split, named as in the history; empty if the epoch is not evaluated."""
        epoch = round(self.state.epoch or 0)
        if self.validation_set is None or not self.protocol.is_measured(epoch, self.plan.optim.epochs):
            return {}
        return self._evaluate_split(self.validation_set)

    def _evaluate_split(self, images: ImageDataset) -> dict[str, float]:
        """Evaluate images of the selection split, and return their scores, named as in the history."""
        scores = self.task.metrics(*self.outputs(images))
        if not math.isfinite(scores["loss"]):
            raise self._not_finite(f"the {split_text(self.protocol.selected_on or 'val')} loss", scores["loss"])
        return self.protocol.with_split_prefix({"val_loss": scores["loss"], **self.task.epoch_row(scores)})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with its parameter groups."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.trained_model, **self.plan.optim.optimizer_options())
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute a batch's loss, with the method's penalty in training mode; `return_outputs` also returns logits."""
        logits = model(inputs["images"])
        weights = inputs.get("weights")
        loss = self.task.loss(logits, inputs["labels"], weights)
        if "share" in inputs:
            share = inputs["share"]
            other_weights = None if weights is None else weights.roll(1, 0)
            loss = share * loss + (1 - share) * self.task.loss(logits, inputs["other_labels"], other_weights)
        penalty = None if (method := method_of(self.trained_model)) is None else method.penalty
        if penalty is not None and model.training:
            loss = loss + penalty(self.trained_model)
        if model.training:
            loss = loss * self._weights[self._micro_step]
        return (loss, logits) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of one batch with random numbers seeded by the step.

        Raises:
            NonFiniteLossError: If the loss is not finite.
            ValueError: If a PEFT adapter receives no gradient.
        """
        # the first seed of a step is the same with and without gradient accumulation
        micro_step = [self._micro_step] if self._micro_step else []
        torch.manual_seed(mix_seed(self.args.seed, 1, self.state.global_step, self.args.process_index, *micro_step))
        loss = super().training_step(model, self._mix(inputs), num_items_in_batch)
        if self.feature_norm is not None and not self._weights[self._micro_step]:
            self.feature_norm.discard_batch()  # its only image is counted by another process
        self._micro_step += 1
        self._step_loss += self.last_loss
        self.last_loss = self._step_loss
        if self.state.global_step == 0:
            check_gradients(self.trained_model, self.plan.method.name)
        if self._micro_step == self.current_gradient_accumulation_steps:
            if self._is_sharded:
                average_gradients(self.trained_model)
            self._epoch_loss += self._step_loss
            self._epoch_steps += 1
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *others: Any) -> Any:
        """Return the batches of one step and set their loss weights, so that all images of the step count equally.

        The weights compensate for two divisions: the Trainer divides the loss by the number of batches, and DDP divides
        the gradients by the number of processes.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *others)
        self._micro_step = 0
        self._step_loss = 0.0
        shards = self._shards
        count = len(batches)
        steps_per_epoch = self.plan.optim.steps_per_epoch(len(self._sampler))
        first = self.state.global_step % steps_per_epoch * self.plan.optim.accumulate
        numbers = range(first, first + count)  # indices of the batches in the epoch
        step_images = min(len(self._sampler), numbers.stop * shards.batch_size) - first * shards.batch_size
        self._weights = [shards.weight(number) * count * shards.count / step_images for number in numbers]
        return batches, items

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator so that it neither moves a sharded model nor wraps it in DDP."""
        super().create_accelerator_and_postprocess()
        if self._is_sharded:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, *_, **__: prepare(
                model, device_placement=False, evaluation_mode=True
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move the model, unless it is sharded and therefore already on its devices."""
        if not self._is_sharded:
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training data loader. With several processes, it yields this process's part of each batch."""
        if self._shards.count == 1:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self._shards,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def _mix(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Apply MixUp or CutMix, if enabled, and add the labels of the other images and the mixing weight."""
        alphas = {v2.MixUp: self.plan.data.mixup, v2.CutMix: self.plan.data.cutmix}
        size = len(inputs["labels"])
        mixers = [kind(alpha=float(alpha), num_classes=size) for kind, alpha in alphas.items() if alpha]
        if not mixers or size == 1:
            return inputs
        # torchvision mixes one-hot labels; with indices as labels, entry [0, 0] is the mixing weight
        indices = torch.arange(size, device=inputs["images"].device)
        images, mixed_labels = v2.RandomChoice(mixers)(inputs["images"], indices)
        other_labels = inputs["labels"].roll(1, 0)  # torchvision mixes each image with the previous one
        return {**inputs, "images": images, "other_labels": other_labels, "share": float(mixed_labels[0, 0])}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the reduced outputs and labels of a batch, without a loss, which `Task.metrics` computes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = self.task.outputs(model, inputs["images"], self._views)
        return None, *self.task.reduce(outputs, inputs["labels"])

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """Return the epoch sampler."""
        return self._sampler

    def _write_state(self, checkpoint: Path, **values: Any) -> None:
        """Also write the epoch's loss and, if used, the weight average, epoch snapshots, and feature statistics."""
        super()._write_state(checkpoint, loss_sum=self._epoch_loss, steps=self._epoch_steps, **values)
        for part in self._stored_parts:
            part.save(checkpoint)

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Load the state written by `_write_state`."""
        values = super()._read_state(checkpoint)
        self._epoch_loss = values["loss_sum"]
        self._epoch_steps = values["steps"]
        for part in self._stored_parts:
            part.load(checkpoint)
        return values

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """Build the error, which reports the step, the last saved state, and the remedy."""
        is_in_step = what in ("the loss", "the gradient")  # otherwise, the loss of an evaluation
        step = self.state.global_step + (1 if is_in_step else 0)
        steps_per_epoch = max(1, self.state.max_steps // max(1, int(self.state.num_train_epochs)))
        epoch = (step - 1) // steps_per_epoch + 1
        num_trained = sum(row["epoch"] > 0 for row in self.history)
        if not num_trained:
            saved = "no trained epoch is saved"
        elif self.args.save_strategy == "no":
            saved = "the best adapter is saved"
        else:
            saved = f"the state after epoch {num_trained} and the best adapter are saved"
        optim = self.plan.optim
        scaling = self.plan.method.scaling
        options = {"lr": optim.lr, "scalar-lr": optim.scalar_lr, "head-lr": optim.head_lr, "scaling": scaling}
        named = ", ".join(f"--{name} (now {value:g})" for name, value in options.items() if value is not None)
        return NonFiniteLossError(
            f"{what} became {value} in epoch {epoch}, step {step} of {self.state.max_steps}; "
            f"{saved} in {self.run_folder.path}; "
            f"start a new run with a lower {named} or a larger --warmup-ratio"
        )


def _collate(task: Task, widest: torch.dtype, items: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Collate a batch, and cast float64 labels to the widest dtype of the device.

    Accelerate would move them to the device without a cast.
    """
    batch = task.collate(items)
    if batch["labels"].dtype == torch.float64:
        return batch | {"labels": batch["labels"].to(widest)}
    return batch


def training_arguments(plan: TrainConfig, checkpoints: Path, keep_checkpoints: bool = True) -> TrainingArguments:
    """Return Trainer arguments with warmup, cosine decay, and an evaluation per epoch.

    If `keep_checkpoints` is True, a checkpoint is saved after each epoch.
    """
    optim = plan.optim
    device = choose_device(plan.run.device)
    batch_per_process = -(-optim.effective_batch_size // process_count())
    scheduler = "cosine"
    scheduler_options: dict[str, Any] = {}
    if optim.min_lr:
        scheduler = "cosine_with_min_lr"
        scheduler_options["min_lr_rate"] = optim.min_lr / (optim.lr or 1.0)
    return base_training_arguments(
        checkpoints,
        device,
        seed=plan.run.seed,
        precision="fp16" if optim.precision == "fp16" else "fp32",  # `SnellaTrainer` enters bfloat16 autocast
        num_train_epochs=optim.epochs,
        per_device_train_batch_size=batch_per_process,
        per_device_eval_batch_size=optim.effective_batch_size,
        learning_rate=optim.lr or 0.0,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=scheduler_options,
        warmup_steps=optim.warmup_ratio,  # a value below 1 is a fraction of all steps
        max_grad_norm=optim.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="epoch" if keep_checkpoints else "no",
        logging_strategy="no",
        dataloader_num_workers=plan.data.workers,
        gradient_accumulation_steps=optim.accumulate,
        report_to=plan.run.trackers or "none",
        run_name=str(plan.run.out),
    )
