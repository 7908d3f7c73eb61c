"""Instruction fine-tuning with the Hugging Face Trainer.

Each entry of the data is encoded as token IDs and labels; see `encode`.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from snella import SnellaCallback
from snella_app.console import counted, make_console, print_line, print_rows
from snella_app.device import choose_device
from snella_app.files import expand_user, sha256_of
from snella_app.methods.registry import matrices_of
from snella_app.records.generators import LossRow
from snella_app.records.record import record_from
from snella_app.records.run import BackboneInfo, DataInfo, RunInfo
from snella_app.training.checkpoints import base_training_arguments
from snella_app.training.plan import describe_method
from snella_app.training.session import lock_run, record_status
from snella_lab.recipes.instruct.config import LanguageConfig, LanguageFolder
from snella_lab.recipes.instruct.data import IGNORED, Template, encode, read_instructions
from snella_lab.recipes.pretrained import load_pretrained
from snella_lab.recipes.trainer import RecipeTrainer, adapt_headless, describe_run

_PACKAGES = ("snella", "torch", "peft", "transformers", "accelerate")
_Item = dict[str, list[int]]


def load_model(name: str, precision: str = "fp32") -> nn.Module:
    """Load a causal language model onto the CPU. See `load_pretrained` for errors.

    Args:
        name: Local folder in transformers format, or hub name.
        precision: Dtype of the weights: fp32 or bf16.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model: nn.Module = load_pretrained(AutoModelForCausalLM, name, "model", dtype=dtype)
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model. See `load_pretrained` for errors.

    A tokenizer without a padding token pads with its unknown token or, if it has none, with its EOS token. The choice
    does not matter, because padding is masked. Training batches are padded on the right.
    """
    tokenizer = load_pretrained(AutoTokenizer, name, "model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def fine_tune(config: LanguageConfig, console: Console | None = None) -> LanguageFolder:
    """Fine-tune a causal language model on instructions and write the run folder.

    The adapter of the last epoch is saved.

    Args:
        config: Settings. `resume` continues the stored run, with its settings, from the last checkpoint.
        console: Output console, or None for stdout.

    Returns:
        The folder of the finished run.

    Raises:
        FileExistsError: If the folder contains a run, and neither `resume` nor `overwrite` is set; if it has other
            contents; or if `out` is a file.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If the data file does not exist, or the model's folder contains no model.
        ConnectionError: If the model is not a local folder and cannot be loaded from the hub or its cache.
        ValueError: If the data is invalid, settings conflict, or a resumed run's data or template has changed.
        TrainingInterrupted: If the run is interrupted. The message names the last checkpoint, if any.
        NonFiniteLossError: If the loss or gradient becomes infinite or NaN. The last checkpoint is kept.
        CheckpointError: If the disk is full, in which case the last checkpoint is kept, or if the resumed checkpoint is
            damaged.
    """
    console = console or make_console(survives_closed_output=True)
    run = LanguageFolder(str(config.run.out))
    with lock_run(run):
        config, resumed = run.resolve_resume(config)
        if resumed is not None and resumed.is_finished:
            print_line(console, f"{run.path} is already finished; adapter {run.adapter}")
        else:
            _fine_tune(config, run, console, resumed)
    return run


def _fine_tune(config: LanguageConfig, run: LanguageFolder, console: Console, resumed: RunInfo | None) -> None:
    """Train a new or resumed run."""
    data = expand_user(str(config.data))
    device = choose_device(config.run.device)
    tokenizer = load_tokenizer(str(config.model))
    train, val, notes = _encode_data(config, tokenizer)
    digest = sha256_of(data)
    if resumed is not None and resumed.data.digest != digest:
        raise ValueError(
            f"data must be the file that {run.path} was started with, but the content of {data} has "
            "changed; restore the file, or start a new run"
        )
    contents = {} if config.template is None else {"template": sha256_of(expand_user(config.template))}
    if resumed is not None and resumed.data.contents != contents:
        raise ValueError(
            f"template must be the file that {run.path} was started with, but the content of {config.template} has "
            "changed; restore the file, or start a new run"
        )
    base: Any = load_model(str(config.model), config.base)
    num_weights = sum(parameter.numel() for parameter in base.parameters())
    if config.optim.gradient_checkpointing:
        # transformers 5.24 renamed this method and warns about the old name
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    torch.manual_seed(config.run.seed)
    model = adapt_headless(config.method.name, base, config.method.all_options()).to(device)
    run.prepare(config, is_resumed=resumed is not None)
    data_info = DataInfo(
        spec=str(config.data),
        seed=config.run.seed,
        description=counted(len(train), "instruction"),
        sizes={"train": len(train), "val": len(val)},
        digest=digest,
        contents=contents,
        notes=notes,
    )
    run.write(describe_run(config, "language", BackboneInfo(name=str(config.model)), data_info, _PACKAGES))
    per_step = config.optim.batch_size * config.optim.accumulation
    rows = [
        ("data", f"{data}, {counted(len(train), 'instruction')}, {len(val)} held out"),
        *(("note", note) for note in notes),
        ("model", f"{config.model}, {num_weights:,} weights"),
        ("method", describe_method(config.method.name, model)),
        ("training", f"{counted(config.epochs, 'epoch')}, {counted(per_step, 'instruction')} per step, on {device}"),
    ]
    print_rows(console, rows)
    with record_status(run, "language"):
        callback = SnellaCallback() if matrices_of(model) else None
        args = base_training_arguments(
            run.checkpoints,
            device,
            seed=config.run.seed,
            precision=config.optim.precision,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.optim.batch_size,
            per_device_eval_batch_size=config.optim.batch_size,
            gradient_accumulation_steps=config.optim.accumulation,
            lr_scheduler_type="linear",
            warmup_steps=config.warmup_steps,
            max_grad_norm=config.optim.max_grad_norm,
            eval_strategy="epoch" if config.val_size else "no",
            save_strategy="epoch",
            logging_strategy="epoch",
            prediction_loss_only=True,
        )
        trainer = RecipeTrainer(
            model,
            config,
            run,
            console,
            callback,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=train,
            eval_dataset=val or None,
            args=args,
        )
        trainer.fit()
        history = trainer.state.log_history
        loss_history = [record_from(LossRow, row) for row in history if "loss" in row or "eval_loss" in row]
        trainer.save_results(loss_history=loss_history)
        run.finish()
        print_line(console, f"adapter {run.adapter}")


def _encode_data(config: LanguageConfig, tokenizer: Any) -> tuple[list[_Item], list[_Item], list[str]]:
    """Return the encoded training entries and held-out entries, and notes on skipped entries."""
    entries = read_instructions(str(config.data))
    template = Template(config.template)
    items = [
        encode(tokenizer, template.fill(entry), entry.output, config.max_length, learn_prompt=config.learn_prompt)
        for entry in entries
    ]
    usable = [item for item in items if _has_targets(item)]
    notes = []
    if len(usable) < len(items):
        skipped = len(items) - len(usable)
        notes.append(f"skipped entries with a prompt of at least max_length={config.max_length} tokens: {skipped}")
    if len(usable) <= config.val_size:
        remedy = f" ({notes[0]}; increase max_length)" if notes else ""
        raise ValueError(
            f"data must have more entries than val_size={config.val_size}, got {len(usable)} usable entries of "
            f"{len(items)} in {config.data}{remedy}"
        )
    generator = torch.Generator().manual_seed(config.run.seed)
    order = torch.randperm(len(usable), generator=generator).tolist()
    held_out = set(order[: config.val_size])
    train = [item for index, item in enumerate(usable) if index not in held_out]
    val = [usable[index] for index in sorted(held_out)]
    return train, val, notes


def _has_targets(item: _Item) -> bool:
    """Return True if the loss uses any of the item's labels.

    The loss ignores the first label, because no token precedes it.
    """
    return any(label != IGNORED for label in item["labels"][1:])
