"""Trainers: `SnellaTrainer` for labeled images, `CheckpointingTrainer` for all runs, and their optimizers."""

from __future__ import annotations

import importlib
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from snella import SnellaCallback, create_snella_optimizer
from snella._files import write_json
from snella.data import ImageDataset
from snella.methods import load_trained_into, method_of, save_trained, spec_of
from snella.methods.model_parts import is_inside
from snella.runs.build import choose_device
from snella.runs.callbacks import EmaCallback, WeightAverage
from snella.runs.checkpoints import reading_checkpoint, remove_incomplete, reporting_write_errors, staged
from snella.runs.config import TrainConfig
from snella.runs.folder import RunFolder, RunFolderOf
from snella.runs.protocol import get_protocol
from snella.runs.sampler import EpochCallback, EpochSampler, mix_seed
from snella.runs.session import NonFiniteLossError
from snella.tasks import Task
from snella.tuner.layer import SnellaLayer

_PACKAGE = "bitsandbytes"


def build_low_bit_optimizer(
    model: nn.Module, wanted: str, device: torch.device, *, lr: float, scalar_lr: float | None, weight_decay: float
) -> tuple[Optimizer, str]:
    """Make the optimizer for whatever is trainable.

    Args:
        model: From `adapt_headless`, on its device.
        wanted: `auto`, `adamw` or `adamw8bit`.
        device: Where it trains.
        lr: Learning rate of the factors, or of all weights that are trained.
        scalar_lr: Learning rate of the kernels' scalars (SNELLA, SNELL); the optimizer's default if None.
        weight_decay: Decoupled weight decay; none on the scalars.

    Returns:
        The optimizer, and its name, with the reason for a fallback.

    Raises:
        ImportError: `adamw8bit` was asked for and bitsandbytes is missing or does not run here.
    """
    kind, name = _choose(wanted, device)
    if any(isinstance(module, SnellaLayer) for module in model.modules()):
        scalars: dict[str, Any] = {} if scalar_lr is None else {"scalar_lr": scalar_lr}
        return create_snella_optimizer(model, kind, lr=lr, weight_decay=weight_decay, **scalars), name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=lr, weight_decay=weight_decay), name  # type: ignore[call-arg]


def _choose(wanted: str, device: torch.device) -> tuple[type[Optimizer], str]:
    """The class that `auto`, `adamw` or `adamw8bit` means here, and its human-readable name."""
    if wanted == "adamw":
        return AdamW, "AdamW"
    try:
        kind: type[Optimizer] = importlib.import_module(_PACKAGE).optim.AdamW8bit
        _try_out(kind, device)
        return kind, "8-bit AdamW of bitsandbytes"
    except Exception as error:
        # a library for accelerators fails in ways of its own: missing, without a kernel for this device, too old
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted == "adamw8bit":
            raise ImportError(
                f"optimizer=adamw8bit needs bitsandbytes to run on {device}, but {reason}; "
                "pip install bitsandbytes, or leave it at auto"
            ) from error
        return AdamW, f"AdamW, since 8-bit AdamW does not run here ({reason})"


def _try_out(kind: type[Optimizer], device: torch.device) -> None:
    """One step on a parameter that is large enough to be kept in 8 bits."""
    parameter = nn.Parameter(torch.zeros(64, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    kind([parameter], lr=1.0).step()  # type: ignore[call-arg]
    if not bool((parameter != 0).all()):
        raise RuntimeError("its step changes nothing")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make AdamW for whatever is trainable; weight decay on matrices only.

    Args:
        model: From `build_method`.
        config: Resolved settings; `lr` and `weight_decay` are set, `head_lr` falls back to `lr`.

    Raises:
        ValueError: Nothing is trainable.
    """
    lr, weight_decay = config.lr or 0.0, config.weight_decay or 0.0
    head_lr = lr if config.head_lr is None else config.head_lr
    method = method_of(model)
    if method is not None and method.optimizer is not None:
        scalars: dict[str, Any] = {} if config.scalar_lr is None else {"scalar_lr": config.scalar_lr}
        return method.optimizer(model, torch.optim.AdamW, lr=lr, head_lr=head_lr, weight_decay=weight_decay, **scalars)
    head = ("base_model.model." if isinstance(model, PeftModel) else "") + spec_of(model).head
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_inside(name, head), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError(f"method {spec_of(model).name!r} leaves nothing to train in {type(model).__name__}")
    return torch.optim.AdamW(
        [
            {"params": params, "lr": head_lr if in_head else lr, "weight_decay": weight_decay if is_matrix else 0.0}
            for (in_head, is_matrix), params in sorted(groups.items(), key=lambda item: item[0])
        ]
    )


_PROGRESS_FILE = "progress.json"


class CheckpointingTrainer(Trainer):
    """A Trainer with atomic checkpoints of the trained weights alone.

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
        """Norm of the gradient before clipping, checked before the optimizer uses it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            raise self._not_finite("the gradient", float(norm))
        return norm

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error with the step, the last good state and the remedy."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        """Where the base class writes a checkpoint: the staging folder while one is open."""
        return str(self._staging or self.run_folder.checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint atomically, then remove the older ones."""
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
        """Read the trained weights and the state of this class."""
        checkpoint = Path(resume_from_checkpoint)
        with reading_checkpoint(checkpoint):
            load_trained_into(self.trained_model, checkpoint)
            self._read_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read their states."""
        with nullcontext() if checkpoint is None else reading_checkpoint(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Read the states of the generators of random numbers."""
        with nullcontext() if checkpoint is None else reading_checkpoint(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _write_state(self, checkpoint: Path, **values: Any) -> None:
        """Write what the Trainer's own state lacks, `values` with it."""
        write_json(checkpoint / _PROGRESS_FILE, {"elapsed_s": self.elapsed_s, **values})

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Read what `_write_state` wrote."""
        values: dict[str, Any] = json.loads((checkpoint / _PROGRESS_FILE).read_text(encoding="utf-8"))
        self._earlier_s = values["elapsed_s"]
        return values


def base_training_arguments(
    checkpoints: Path, device: torch.device, *, seed: int, precision: str, **options: Any
) -> TrainingArguments:
    """The Trainer's settings that all kinds of runs share: quiet, on one device.

    Args:
        checkpoints: Where they go.
        device: Where to train.
        seed: Of the run.
        precision: fp32, or bf16 for autocast.
        **options: Those of this kind of run.
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
        **options,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@dataclass
class _Progress:
    """The running epoch's loss."""

    loss_sum: float = 0.0
    steps: int = 0


class SnellaTrainer(CheckpointingTrainer):
    """One training run over `(image, label)` data sets.

    Differs from its base class in that
    - every step draws its random numbers (dropout, drop-path) from `(seed, step)`, and every epoch its order from
      `(seed, epoch)`, so that a resumed run repeats them wherever it was interrupted;
    - the adapter of the best epoch (see `Task.selection_score`) is written when it is found;
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
        self.protocol = get_protocol(config.protocol)
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
        """Metrics on a data set, and the task's per-sample outputs (class probabilities, say)."""
        output = self.evaluation_loop(self.get_eval_dataloader(dataset), "evaluation", prediction_loss_only=False)
        kept = np.asarray(output.predictions)
        return self.task.metrics(kept, np.asarray(output.label_ids)), self.task.sample_outputs(kept)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "val"
    ) -> dict[str, float]:
        """Evaluate the epoch by the protocol, log it, and save its adapter if it is the best so far.

        With an average of the weights, the average is evaluated and saved.

        Raises:
            NonFiniteLossError: The loss is not finite; nothing is saved then.
        """
        with nullcontext() if self.average is None else self.average.applied():
            return self._measure_epoch()

    def _measure_epoch(self) -> dict[str, float]:
        """Evaluate the epoch with the current values."""
        row: dict[str, Any] = {
            "train_loss": self.progress.loss_sum / max(self.progress.steps, 1),
            **self._selection_scores(),
            "lr": float(self._get_learning_rate()),
            "budget": self._budget(),
        }
        if self._is_denser_than_asked():
            row["is_denser"] = True
        self.progress.loss_sum, self.progress.steps = 0.0, 0
        score = self.protocol.selection_score(row, self.task.selection_score)
        is_best = all(self.protocol.selection_score(past, self.task.selection_score) <= score for past in self.history)
        self.log(row)
        if is_best and self.args.should_save:
            with reporting_write_errors(self.run_folder.adapter):
                save_trained(self.trained_model, self.run_folder.adapter)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row

    def _selection_scores(self) -> dict[str, float]:
        """Results on the selection split, by the names of the history; none where it is not evaluated."""
        epoch = round(self.state.epoch or 0)
        if self.validation_set is None or not self.protocol.is_measured(epoch, self.config.epochs):
            return {}
        scores, _ = self.score(self.validation_set)
        if not math.isfinite(scores["loss"]):
            part = "test" if self.protocol.selected_on == "test" else "validation"
            raise self._not_finite(f"the {part} loss", scores["loss"])
        return self.protocol.with_split_prefix({"val_loss": scores["loss"], **self.task.epoch_row(scores)})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer with its groups."""
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
        """Loss of one batch, and the outputs that the task reduces it to."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), *self.task.reduce(logits.detach(), inputs["labels"])

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
        return allocator is not None and (allocator.config.schedule_end or 1.0) < 1 and not allocator.has_reached_target

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error with the step, the last good state and the remedy."""
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
    return base_training_arguments(
        checkpoints,
        choose_device(config.device),
        seed=config.seed,
        precision=config.precision,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.effective_batch_size,
        per_device_eval_batch_size=config.effective_batch_size,
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
