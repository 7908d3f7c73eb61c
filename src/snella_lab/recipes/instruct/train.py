"""Instruction fine-tuning with the Hugging Face Trainer."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from snella import BudgetAllocator, SnellaCallback
from snella_app.console import counted, make_console, print_line, print_rows
from snella_app.device import choose_device
from snella_app.methods import save_trained
from snella_app.methods.registry import adapt_headless
from snella_app.records import BackboneInfo, DataInfo, LossRow, RunInfo, read, record_from
from snella_app.training.checkpoints import (
    CheckpointingTrainer,
    base_training_arguments,
    checkpoint_to_resume,
    convert_write_errors,
)
from snella_app.training.results import (
    describe_allocation,
    describe_generator,
    matrices_of,
    sparsity_summary,
    trainable_parameters,
)
from snella_app.training.session import (
    InterruptCallback,
    NonFiniteLossError,
    lock_run,
    record_status,
)
from snella_lab.recipes.instruct.config import LanguageConfig, LanguageFolder
from snella_lab.recipes.instruct.data import IGNORED, Template, encode, pad_right, read_instructions
from snella_lab.recipes.run import build_optimizer, describe_run, load_pretrained, progress_bar


def load_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Load a model onto the CPU.

    Args:
        name: Local folder in transformers format, or hub name; see `load_pretrained` for errors.
        dtype: Dtype of the weights.
    """
    model: nn.Module = load_pretrained(AutoModelForCausalLM, name, "model", dtype=dtype)
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model; see `load_pretrained` for errors.

    A tokenizer without a padding token pads with its unknown token, else with its end token; padding is masked.
    """
    tokenizer = load_pretrained(AutoTokenizer, name, "model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


class LanguageTrainer(CheckpointingTrainer):
    """Trainer for instruction fine-tuning."""

    def _not_finite(self, what: str, value: float) -> NonFiniteLossError:
        """Return the error for a non-finite loss or gradient."""
        return NonFiniteLossError(
            f"{what} became {value} in step {self.state.global_step + 1} of {self.state.max_steps}; the "
            f"last checkpoint in {self.run_folder.checkpoints} is kept; start a new run with a lower --lr (now "
            f"{self.args.learning_rate:g})"
        )


class LanguageProgress(TrainerCallback):
    """Progress bar and per-epoch log lines with training loss, held-out loss and budget.

    Args:
        console: Output console; the progress bar appears only on a terminal.
        allocation: Callback with the allocator; None without budgets.
        show_bar: Show a progress bar.
    """

    def __init__(self, console: Console, allocation: SnellaCallback | None, show_bar: bool) -> None:
        self.console, self.allocation = console, allocation
        self._bar = progress_bar(console, is_shown=show_bar)
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the progress bar at the current step."""
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the progress bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the training or held-out loss of the epoch."""
        shown = [
            f"{name} {logs[key]:.4f}" for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")) if key in logs
        ]
        if shown:
            budget = "" if self.budget() is None or "loss" not in logs else f"  budget {self.budget():,}"
            epoch = f"epoch {state.epoch:>5.2f}/{state.num_train_epochs}"
            print_line(self.console, f"{epoch}  {'  '.join(shown)}{budget}")

    def budget(self) -> int | None:
        """Return the current total budget; None without budgets."""
        return None if self.allocator is None else sum(self.allocator.budgets.values())

    @property
    def allocator(self) -> BudgetAllocator | None:
        """Budget allocator, available once training has started; None without budgets."""
        return None if self.allocation is None else self.allocation.allocator

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.stop()


def training_arguments(config: LanguageConfig, checkpoints: Path) -> TrainingArguments:
    """Return Trainer arguments: one checkpoint per epoch, warmup and linear decay."""
    return base_training_arguments(
        checkpoints,
        choose_device(config.run.device),
        seed=config.run.seed,
        precision=config.optim.precision,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.optim.batch_size,
        per_device_eval_batch_size=config.optim.batch_size,
        gradient_accumulation_steps=config.optim.accumulation,
        learning_rate=config.optim.lr or 0.0,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.optim.max_grad_norm,
        eval_strategy="epoch" if config.val_size else "no",
        save_strategy="epoch",
        logging_strategy="epoch",
        prediction_loss_only=True,
    )


_PACKAGES = ("snella", "torch", "peft", "transformers", "accelerate")
_Item = dict[str, list[int]]


def fine_tune(config: LanguageConfig, console: Console | None = None) -> LanguageFolder:
    """Fine-tune a causal language model on instructions and write the run folder.

    The adapter of the last epoch is saved.

    Args:
        config: Settings. `resume` continues the stored run, with its settings, from the last checkpoint.
        console: Output console; stdout if None.

    Returns:
        The folder of the finished run.

    Raises:
        FileExistsError: If the folder contains a run, and neither `resume` nor `overwrite` is set.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If data or model do not exist.
        ValueError: If the data are invalid, settings conflict, or a resumed run's data have changed.
        TrainingInterrupted: If training was interrupted; a checkpoint is saved.
        NonFiniteLossError: If the loss became infinite or NaN; the last checkpoint is kept.
        CheckpointError: If the disk is full (the last checkpoint is kept), or the resumed checkpoint is damaged.
    """
    console = console or make_console(survives_closed_output=True)
    run = LanguageFolder(str(config.run.out))
    with lock_run(run):
        return _fine_tune(config, run, console)


def _fine_tune(config: LanguageConfig, run: LanguageFolder, console: Console) -> LanguageFolder:
    """Run `fine_tune` with the folder locked."""
    config, status = run.resolve_resume(config)
    if status == "finished":
        print_line(console, f"{run.path} is already finished; adapter {run.adapter}")
        return run
    is_resumed = status is not None
    data = Path(str(config.data)).expanduser()
    tokenizer = load_tokenizer(str(config.model))
    train, val, notes = _encode_data(config, tokenizer)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    if is_resumed and read(RunInfo, run.path).data.digest != digest:
        raise ValueError(
            f"data must be the file that {run.path} was started with, got changed content in {data}; "
            "restore the file, or start a new run"
        )
    device = choose_device(config.run.device)
    base: Any = load_model(str(config.model), torch.bfloat16 if config.base == "bf16" else torch.float32)
    weights = sum(parameter.numel() for parameter in base.parameters())
    if config.optim.gradient_checkpointing:
        # transformers 5.24 renamed this method and warns about the old name
        enable_checkpointing = (
            getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        )
        enable_checkpointing({"use_reentrant": False})
    torch.manual_seed(config.run.seed)
    model = adapt_headless(config.method.name, base, config.method.all_options()).to(device)
    run.prepare(config, is_resumed=is_resumed)
    data_info = DataInfo(
        spec=str(config.data),
        seed=config.run.seed,
        description=counted(len(train), "instruction"),
        sizes={"train": len(train), "val": len(val)},
        digest=digest,
        notes=notes,
    )
    run.write(describe_run(config, "language", BackboneInfo(name=str(config.model)), data_info, _PACKAGES))
    matrices = matrices_of(model)
    adapted = f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""
    per_step = config.optim.batch_size * config.optim.accumulation
    rows = [
        ("data", f"{data}, {counted(len(train), 'instruction')}, {len(val)} held out"),
        *(("note", note) for note in notes),
        ("model", f"{config.model}, {weights:,} weights"),
        ("method", f"{config.method.name}, {trainable_parameters(model):,} trainable parameters{adapted}"),
        ("training", f"{counted(config.epochs, 'epoch')}, {per_step} per step, on {device}"),
    ]
    print_rows(console, rows)
    with record_status(run, "language"):
        optimizer, optimizer_name = build_optimizer(model, config.optim, device)
        allocation = SnellaCallback() if matrices else None
        progress = LanguageProgress(console, allocation, config.run.progress)
        with InterruptCallback() as interrupt:
            trainer = LanguageTrainer(
                model,
                run,
                args=training_arguments(config, run.checkpoints),
                data_collator=partial(pad_right, pad_id=tokenizer.pad_token_id),
                train_dataset=train,
                eval_dataset=val or None,
                callbacks=[*([allocation] if allocation else []), interrupt, progress],
                optimizers=(optimizer, None),
            )
            checkpoint = checkpoint_to_resume(run, console)
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                progress.close()
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        _finish(trainer, progress.allocator, optimizer_name, model, run, console)
    return run


def _encode_data(config: LanguageConfig, tokenizer: Any) -> tuple[list[_Item], list[_Item], list[str]]:
    """Return the encoded training entries, held-out entries, and notes for the user."""
    entries = read_instructions(str(config.data))
    template = Template(config.template)
    items = [
        encode(tokenizer, template.fill(entry), entry.output, config.max_length, learn_prompt=config.learn_prompt)
        for entry in entries
    ]
    usable = [item for item in items if any(label != IGNORED for label in item["labels"][1:])]
    notes = []
    if len(usable) < len(items):
        skipped = len(items) - len(usable)
        notes.append(f"skipped entries with a prompt of at least max_length={config.max_length} tokens: {skipped}")
    if len(usable) <= config.val_size:
        raise ValueError(
            f"data must have more entries than val_size={config.val_size}, got {len(usable)} usable entries of "
            f"{len(items)} in {config.data}" + (f" ({notes[0]}; raise it)" if notes else "")
        )
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    held_out = set(order[: config.val_size])
    train = [item for index, item in enumerate(usable) if index not in held_out]
    return train, [usable[index] for index in sorted(held_out)], notes


def _finish(
    trainer: LanguageTrainer,
    allocator: BudgetAllocator | None,
    optimizer: str,
    model: nn.Module,
    run: LanguageFolder,
    console: Console,
) -> None:
    """Save the adapter and write the results."""
    with convert_write_errors(run.adapter):
        save_trained(model, run.adapter)
    matrices = matrices_of(model)
    if allocator is not None:
        run.write(describe_allocation(model, allocator))
    history = [record_from(LossRow, row) for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    elapsed_s = round(trainer.elapsed_s, 3)
    run.write(describe_generator(model, run.adapter, train_s=elapsed_s, optimizer=optimizer, loss_history=history))
    run.finish()
    if matrices:
        print_line(console, f"the update {sparsity_summary(matrices)}")
    print_line(console, f"adapter {run.adapter}")
