"""Model, optimizer, trainer, and run record that the recipes (DreamBooth and instruction fine-tuning) share.

SNELLA limits the number of weights that the update of a matrix may change. This limit is the budget of the matrix.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella import BudgetAllocator, SnellaCallback, create_snella_optimizer
from snella.layer import SnellaLayer
from snella.targets import default_targets
from snella_app.config.train import RunSettings, command_line
from snella_app.console import print_line
from snella_app.methods import find_method, save_trained
from snella_app.methods.partial import FULL
from snella_app.methods.registry import check_method, matrices_of, trainable_parameters, with_spec
from snella_app.records.generators import GeneratorMetrics
from snella_app.records.run import BackboneInfo, DataInfo, RunInfo
from snella_app.runs.folder import BaseRunFolder
from snella_app.training.checkpoints import (
    CheckpointingTrainer,
    checkpoint_to_resume,
    convert_write_errors,
    latest_checkpoint,
)
from snella_app.training.finish import describe_allocation, folder_bytes, sparsity_summary
from snella_app.training.memory import peak_rss_mib
from snella_app.training.plan import versions_of
from snella_app.training.session import InterruptCallback, NonFiniteLossError


def adapt_headless(method: str, model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Prepare a model without a classifier head for training, so that `load_trained` can restore the result.

    Args:
        method: A PEFT adapter (`snella`, `snell`, `lora`, `dora`; `lora-8` sets the rank), or `full`.
        model: Freshly loaded model, which is changed in place, so that a pipeline that contains it uses the adapter.
        options: Options of the method. `target_modules` defaults to `to_q`, `to_k`, `to_v`, and `to_out.0` in Stable
            Diffusion 3, as in the paper, and to all linear layers in language models.

    Returns:
        A `PeftModel` around the model, or the model itself for `full`.

    Raises:
        ValueError: If the method, an option, or a value is invalid, or if the method needs a classifier head.
    """
    options = check_method(method, options)
    definition = find_method(method)
    if definition is FULL:
        return with_spec(model.requires_grad_(True), method, options, head="")
    if definition.config is None:
        raise ValueError(f"method must be a PEFT adapter or full for a model without a head, got {method!r}")
    model.requires_grad_(False)
    targets = options.get("target_modules") or default_targets(model)
    config = definition.config("", {**options, "target_modules": targets})
    config.modules_to_save = None  # type: ignore[attr-defined]
    return with_spec(get_peft_model(model, config), method, options, head="")


def build_low_bit_optimizer(
    model: nn.Module, requested: str, device: torch.device, *, lr: float, scalar_lr: float | None, weight_decay: float
) -> tuple[Optimizer, str]:
    """Build AdamW or 8-bit AdamW for all trainable parameters.

    Args:
        model: Model from `adapt_headless`, on its device.
        requested: `auto`, `adamw`, or `adamw8bit`.
        device: Training device.
        lr: Learning rate of the factors of SNELLA and SNELL, or of all trainable parameters for other methods.
        scalar_lr: Learning rate of the scalar kernel parameters of SNELLA and SNELL. None selects the default of
            `create_snella_optimizer`.
        weight_decay: Decoupled weight decay, which is not applied to the scalar kernel parameters.

    Returns:
        The optimizer and its name. If `auto` falls back to AdamW, the name includes the reason.

    Raises:
        ImportError: If `requested` is `adamw8bit` and bitsandbytes is missing or does not run on the device.
    """
    optimizer_cls, name = _choose_adamw(requested, device)
    if any(isinstance(module, SnellaLayer) for module in model.modules()):
        scalar_options: dict[str, Any] = {} if scalar_lr is None else {"scalar_lr": scalar_lr}
        return create_snella_optimizer(model, optimizer_cls, lr=lr, weight_decay=weight_decay, **scalar_options), name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return optimizer_cls(trained, lr=lr, weight_decay=weight_decay), name  # type: ignore[call-arg]


def _choose_adamw(requested: str, device: torch.device) -> tuple[type[Optimizer], str]:
    """Return the optimizer class for `auto`, `adamw`, or `adamw8bit`, and its human-readable name.

    8-bit AdamW must complete a test step on the device. Otherwise, `auto` falls back to AdamW, and `adamw8bit` raises
    an ImportError.
    """
    if requested == "adamw":
        return AdamW, "AdamW"
    try:
        optimizer_cls: type[Optimizer] = importlib.import_module("bitsandbytes").optim.AdamW8bit
        parameter = nn.Parameter(torch.zeros(64, 128, device=device))  # large enough for 8-bit state
        parameter.grad = torch.ones_like(parameter)
        optimizer_cls([parameter], lr=1.0).step()  # type: ignore[call-arg]
        if not bool((parameter != 0).all()):
            raise RuntimeError("its step leaves parameters unchanged")
        return optimizer_cls, "8-bit AdamW (bitsandbytes)"
    except Exception as error:
        # any exception, because bitsandbytes can be missing or outdated, or have no kernel for this device
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if requested == "adamw8bit":
            raise ImportError(
                f"optimizer=adamw8bit needs bitsandbytes to run on {device}, but {reason}; "
                "pip install bitsandbytes, or set optimizer to auto"
            ) from error
        return AdamW, f"AdamW, because 8-bit AdamW does not run on {device} ({reason})"


class RecipeTrainer(CheckpointingTrainer):
    """Trainer with a progress bar, a log line per checkpoint, and graceful interruption.

    Args:
        trained: Model from `adapt_headless`, on its device.
        config: Resolved settings, a `DreamBoothConfig` or `LanguageConfig`.
        run: Run folder.
        console: Output console.
        allocation: Callback that attaches the budget allocator, or None for methods without budgets.
        **options: Options of transformers' Trainer.

    Attributes:
        optimizer_name: Name of the optimizer, as returned by `build_low_bit_optimizer`.
    """

    def __init__(
        self,
        trained: nn.Module,
        config: Any,
        run: BaseRunFolder[Any],
        console: Console,
        allocation: SnellaCallback | None,
        **options: Any,
    ) -> None:
        self.config = config
        self.console = console
        self.allocation = allocation
        self.interrupt = InterruptCallback()
        self.progress = ProgressCallback(self)
        optim = config.optim
        device = next(trained.parameters()).device
        optimizer, self.optimizer_name = build_low_bit_optimizer(
            trained,
            optim.optimizer,
            device,
            lr=optim.lr or 0.0,
            scalar_lr=optim.scalar_lr,
            weight_decay=optim.weight_decay or 0.0,
        )
        callbacks: list[TrainerCallback] = [self.interrupt, self.progress]
        if allocation is not None:
            callbacks.insert(0, allocation)
        super().__init__(trained, run, callbacks=callbacks, optimizers=(optimizer, None), **options)

    @property
    def allocator(self) -> BudgetAllocator | None:
        """Budget allocator. None for methods without budgets, and possibly until training starts."""
        return None if self.allocation is None else self.allocation.allocator

    def fit(self) -> None:
        """Train, starting from the latest checkpoint of the run if it has one.

        Raises:
            KeyboardInterrupt: If training was interrupted. After the first signal, a checkpoint is saved.
        """
        checkpoint = checkpoint_to_resume(self.run_folder, self.console)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)
        with self.interrupt, self.progress.bar:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.state.global_step < self.state.max_steps:  # `train` returns normally after the first signal
            raise KeyboardInterrupt

    def save_results(self, **measured: Any) -> None:
        """Save the adapter, `metrics.json` with the `measured` fields and, if there are budgets, `allocation.json`."""
        model = self.trained_model
        run = self.run_folder
        device = self.args.device
        with convert_write_errors(run.adapter):
            save_trained(model, run.adapter)
        matrices = matrices_of(model)
        if self.allocator is not None:
            run.write(describe_allocation(model, self.allocator))
            print_line(self.console, f"the update {sparsity_summary(matrices)}")
        adapted_weights = sum(matrix.size for matrix in matrices) if matrices else None
        peak_gpu_mib = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        run.write(
            GeneratorMetrics(
                trainable_parameters=trainable_parameters(model),
                adapted_weights=adapted_weights,
                adapter_bytes=folder_bytes(run.adapter),
                peak_rss_mib=peak_rss_mib(),
                train_s=round(self.elapsed_s, 3),
                peak_gpu_mib=peak_gpu_mib,
                optimizer=self.optimizer_name,
                **measured,
            )
        )

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """Return the error for a non-finite loss or gradient, with a message that suggests which settings to lower."""
        optim = self.config.optim
        scaling = self.config.method.scaling
        options = {"lr": optim.lr, "scalar-lr": optim.scalar_lr, "scaling": scaling}
        suggestions = ", ".join(f"--{option} (now {current:g})" for option, current in options.items() if current)
        checkpoint = latest_checkpoint(self.run_folder.checkpoints)
        saved = "no checkpoint has been written yet" if checkpoint is None else f"checkpoint {checkpoint} is kept"
        return NonFiniteLossError(
            f"{what} became {value} in step {self.state.global_step + 1} of {self.state.max_steps}; {saved}; start a "
            f"new run with a lower {suggestions}"
        )


class ProgressCallback(TrainerCallback):
    """Progress bar, and a log line per checkpoint with the mean loss since the last line.

    Args:
        trainer: The trainer. Its `console` and `config` must be set, but its base class need not be initialized.
    """

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer
        is_shown = trainer.console.is_terminal and trainer.config.run.progress
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=trainer.console, transient=True, disable=not is_shown)
        self._losses: list[float] = []  # since the last line
        self._held_out_text = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the progress bar at the current step."""
        self._task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the progress bar."""
        self.bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Collect the training and held-out losses."""
        if "loss" in logs:
            self._losses.append(logs["loss"])
            self.bar.update(self._task, description=f"loss {logs['loss']:.4f}")
        if "eval_loss" in logs:
            self._held_out_text = f"  held-out loss {logs['eval_loss']:.4f}"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the log line of a checkpoint."""
        text = f"step {state.global_step:>5}/{state.max_steps}"
        if self._losses:
            text += f"  loss {sum(self._losses) / len(self._losses):.5f}{self._held_out_text}"
        if (allocator := self.trainer.allocator) is not None:
            text += f"  budget {sum(allocator.budgets.values()) / allocator.total_weights:.1%}"
        self._losses = []
        self._held_out_text = ""
        print_line(self.trainer.console, text)


def describe_run(
    config: RunSettings, command: str, backbone: BackboneInfo, data: DataInfo, packages: Iterable[str]
) -> RunInfo:
    """Build the record of a run, with status `running`.

    Args:
        config: Resolved settings.
        command: Command name.
        backbone: The pre-trained model.
        data: The training data.
        packages: Packages whose versions are recorded.
    """
    return RunInfo(
        status="running",
        task=config.purpose,
        method=config.method.name,
        method_options=config.method.all_options(),
        backbone=backbone,
        classes=[],
        data=data,
        versions=versions_of(packages),
        command=command_line(config, command),
    )
