"""One instruction fine-tuning, from settings to adapter."""

from __future__ import annotations

import hashlib
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snella import SnellaCallback
from snella.data.instructions import read_instructions
from snella.language.config import LanguageConfig
from snella.language.folder import LanguageFolder
from snella.language.models import load_model, load_tokenizer
from snella.language.prompting import IGNORED, Template, encode, pad_right
from snella.language.trainer import LanguageProgress, LanguageTrainer, training_arguments
from snella.methods import save_trained
from snella.methods.headless import adapt_headless
from snella.training.assembly import choose_device
from snella.training.checkpoints import saving
from snella.training.console import counted, make_console, print_rows
from snella.training.low_bit_optimizer import build_low_bit_optimizer
from snella.training.results import (
    describe_allocation,
    folder_bytes,
    kept_text,
    matrices_of,
    peak_rss_mib,
    trainable_parameters,
)
from snella.training.session import checkpoint_to_continue, outcome_recorded, run_owned, settle_unfinished
from snella.training.settings import command_line
from snella.training.stopping import InterruptCallback

_PACKAGES = ("snella", "torch", "peft", "transformers", "accelerate")
_Item = dict[str, list[int]]


def fine_tune(config: LanguageConfig, console: Console | None = None) -> LanguageFolder:
    """Fine-tune a causal language model on instructions, and leave a complete run folder behind.

    The adapter of the last epoch is kept.

    Args:
        config: What to do. With `resume` a stored run goes on from its last checkpoint, with its own settings.
        console: Where to write; standard output if None.

    Returns:
        The folder, its run finished.

    Raises:
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` was asked for.
        RunInUseError: Another process is writing into the folder.
        FileNotFoundError: Data or model are not there.
        ValueError: Faulty data, settings that contradict each other, or a resumed run whose data have changed.
        TrainingInterrupted: Ctrl-C; a checkpoint is saved.
        NonFiniteLossError: The loss became infinite or NaN; the last checkpoint is kept.
        CheckpointError: The disk is full, and the last checkpoint is kept; or that of a resumed run is damaged.
    """
    console = console or make_console()
    run = LanguageFolder(str(config.out))
    with run_owned(run):
        return _fine_tune(config, run, console)


def _fine_tune(config: LanguageConfig, run: LanguageFolder, console: Console) -> LanguageFolder:
    """The work of `fine_tune`, in a folder that no other process writes into."""
    settled = settle_unfinished(run, config, console, f"its adapter is {run.adapter}")
    if settled is None:
        return run
    config, is_resumed = settled
    data = Path(str(config.data)).expanduser()
    tokenizer = load_tokenizer(str(config.model))
    train, val, notes = _items(config, tokenizer)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    if is_resumed and run.read_json("run.json")["data"]["digest"] != digest:
        raise ValueError(f"data must be the file that {run.path} began with, got other content in {data}; restore it")
    device = choose_device(config.device)
    base: Any = load_model(str(config.model), torch.bfloat16 if config.base == "bf16" else torch.float32)
    weights = sum(parameter.numel() for parameter in base.parameters())
    if config.gradient_checkpointing:
        # transformers 5.24 gave it another name, and warns of the old one
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    torch.manual_seed(config.seed)
    model = adapt_headless(config.method, base, config.options_of_method()).to(device)
    run.begin(config, is_resumed=is_resumed)
    described = {
        "spec": config.data,
        "seed": config.seed,
        "description": counted(len(train), "instruction"),
        "sizes": {"train": len(train), "val": len(val)},
        "digest": digest,
        "notes": notes,
    }
    run.update("running", **_describe(config, described))
    matrices = matrices_of(model)
    adapted = f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""
    rows = [
        ("data", f"{data}, {counted(len(train), 'instruction')}, {len(val)} held out"),
        *(("note", note) for note in notes),
        ("model", f"{config.model}, {weights:,} weights"),
        ("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{adapted}"),
        (
            "training",
            f"{counted(config.epochs, 'epoch')}, {config.batch_size * config.accumulation} a step, on {device}",
        ),
    ]
    print_rows(console, rows)
    with outcome_recorded(run, "language"):
        with InterruptCallback() as interrupt:
            trainer, progress, optimizer = _fit(config, model, tokenizer, train, val, run, interrupt, console, device)
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        _finish(trainer, progress, optimizer, model, run, console)
    return run


def _items(config: LanguageConfig, tokenizer: Any) -> tuple[list[_Item], list[_Item], list[str]]:
    """Encoded entries to train on, held-out ones, and what a user should know about them."""
    entries = read_instructions(str(config.data))
    template = Template(config.template)
    items = [
        encode(tokenizer, template.fill(entry), entry.output, config.max_length, learn_prompt=config.learn_prompt)
        for entry in entries
    ]
    usable = [item for item in items if any(label != IGNORED for label in item["labels"][1:])]
    notes = []
    if len(usable) < len(items):
        lost = len(items) - len(usable)
        notes.append(f"left out {lost} entries whose prompt alone fills max_length={config.max_length} tokens")
    if len(usable) <= config.val_size:
        raise ValueError(
            f"data must have more entries than val_size={config.val_size}, got {len(usable)} usable ones of "
            f"{len(items)} in {config.data}" + (f" ({notes[0]}; raise it)" if notes else "")
        )
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = set(order[: config.val_size])
    train = [item for index, item in enumerate(usable) if index not in held]
    return train, [usable[index] for index in sorted(held)], notes


def _fit(
    config: LanguageConfig,
    model: nn.Module,
    tokenizer: Any,
    train: list[_Item],
    val: list[_Item],
    run: LanguageFolder,
    interrupt: InterruptCallback,
    console: Console,
    device: torch.device,
) -> tuple[LanguageTrainer, LanguageProgress, str]:
    """Train, from the last checkpoint if there is one."""
    checkpoint = checkpoint_to_continue(run, console)
    optimizer, name = build_low_bit_optimizer(
        model,
        config.optimizer,
        device,
        lr=config.lr or 0.0,
        scalar_lr=config.scalar_lr,
        weight_decay=config.weight_decay,
    )
    allocation = SnellaCallback() if matrices_of(model) else None
    progress = LanguageProgress(console, allocation, config.progress)
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
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()
    return trainer, progress, name


def _finish(
    trainer: LanguageTrainer,
    progress: LanguageProgress,
    optimizer: str,
    model: nn.Module,
    run: LanguageFolder,
    console: Console,
) -> None:
    """Save the adapter and write the results."""
    with saving(run.adapter):
        save_trained(model, run.adapter)
    matrices = matrices_of(model)
    if progress.allocation is not None:
        run.write_json("allocation.json", describe_allocation(model, progress.allocation))
    history = [
        {name: row[name] for name in ("epoch", "step", "loss", "eval_loss", "learning_rate") if name in row}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]
    run.write_json(
        "metrics.json",
        {
            "train_s": round(trainer.elapsed_s, 3),
            "trainable_parameters": trainable_parameters(model),
            "adapted_weights": sum(m.size for m in matrices) if matrices else None,
            "adapter_bytes": folder_bytes(run.adapter),
            "peak_rss_mib": peak_rss_mib(),
            "optimizer": optimizer,
            "loss_history": history,
        },
    )
    run.finish()
    if matrices:
        console.print(f"the update {kept_text(matrices)}", highlight=False, soft_wrap=True)
    console.print(f"adapter {run.adapter}", highlight=False, soft_wrap=True)


def _describe(config: LanguageConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The entries of `run.json` but for the status."""
    return {
        "task": "language",
        "method": config.method,
        "method_options": config.options_of_method(),
        "backbone": {"name": config.model, "weights": None, "img_size": None},
        "classes": [],
        "data": data,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "command": command_line(config, LanguageConfig(data="-", model="-", out="-"), "language"),
    }
