"""Training loops of `many_devices.py` with the plain Trainer of transformers and with the Trainer of `snella train`."""

from __future__ import annotations

import io
import shutil
from typing import Any
from unittest import mock

import torch
from device_loops import (
    BATCH,
    COMPILER,
    LR,
    PER_EPOCH,
    RESUMED_FROM,
    SAVED_AT,
    STEPS,
    Cell,
    check_engine,
    count_bytes,
    deepspeed_config,
    digest_of,
    full_state,
    images,
    make_model,
    rank_and_count,
    reset_accelerate,
)
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import StackDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from snella import BudgetAllocator, create_snella_optimizer
from snella.callback import SnellaCallback
from snella.matrices import adapted_matrices
from snella_app.config.train import TrainConfig
from snella_app.training import trainer as app_trainer
from snella_app.training.train import train


def run_trainer(cell: Cell) -> dict[str, Tensor]:
    """Train with transformers' Trainer and return the full final state."""
    reset_accelerate()
    _, count = rank_and_count()
    X, y = images()

    class Counted(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if callback.allocator is not None:
                cell.allocator_bytes = count_bytes(callback.allocator)

    class SnellaTrainer(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = create_snella_optimizer(self.model, lr=LR)
            return self.optimizer

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            check_engine(cell, self.model_wrapped)
            loss = super().training_step(*args, **kwargs)
            micro_losses.append(float(loss))
            return loss

    micro_losses: list[float] = []
    callback = SnellaCallback()
    settings: dict[str, Any] = {}
    if cell.engine.startswith("FSDP"):
        settings["fsdp"] = "full_shard"
        settings["fsdp_config"] = {
            "version": int(cell.engine[-1]),
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["ViTLayer"],
            "state_dict_type": "FULL_STATE_DICT" if cell.engine == "FSDP1" else "SHARDED_STATE_DICT",
            "use_orig_params": True,
        }
    elif cell.engine.startswith("ZeRO"):
        settings["deepspeed"] = deepspeed_config(cell)
    shared = cell.checkpoint(RESUMED_FROM.get(count, 0) if cell.first else count)
    arguments = TrainingArguments(
        output_dir=str(cell.checkpoint(count)) + ("-resumed" if cell.first else ""),
        use_cpu=True,
        per_device_train_batch_size=BATCH // count // cell.accumulated,
        gradient_accumulation_steps=cell.accumulated,
        gradient_checkpointing=cell.option == "checkpointing",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=cell.option == "bf16",
        torch_compile=cell.option == "compile",
        torch_compile_backend=COMPILER if cell.option == "compile" else None,
        max_steps=STEPS,
        save_steps=SAVED_AT,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        train_sampling_strategy="sequential",
        **settings,
    )
    # PER_EPOCH steps per epoch, so that the callback's epochs match the other loops
    data = StackDataset(pixel_values=X[: PER_EPOCH * BATCH], labels=y[: PER_EPOCH * BATCH])
    trainer = SnellaTrainer(
        make_model(cell.has_allocator),
        arguments,
        train_dataset=data,
        callbacks=[callback, Counted()] if cell.has_allocator else [],
    )
    resume = str(shared / f"checkpoint-{SAVED_AT}") if cell.first else None
    trainer.train(resume_from_checkpoint=resume)
    groups = zip(*[iter(micro_losses)] * cell.accumulated, strict=True)
    scale = cell.accumulated  # the Trainer divides by it
    cell.losses = [sum(group) / len(group) * scale for group in groups]
    if callback.allocator is not None:
        cell.budgets = callback.allocator.budgets
    return full_state(trainer.model_wrapped)


def run_snella_train(cell: Cell) -> None:
    """Train with the application and record the losses, the budgets and the digest in the cell."""
    reset_accelerate()
    rank, count = rank_and_count()
    X, y = images()
    pixels = ((X + 4) * 32).clamp(0, 255).byte()
    items = [(Image.fromarray(image[0].numpy()), int(label)) for image, label in zip(pixels, y, strict=True)]
    training = PER_EPOCH * BATCH
    folder = cell.checkpoint(count)
    if cell.first:
        folder = folder.with_name(f"{folder.name}-resumed")
        if rank == 0:
            saved = cell.checkpoint(RESUMED_FROM[count])
            shutil.copytree(saved.with_name(f"{saved.name}-saved"), folder)
        if count > 1:
            torch.distributed.barrier()
        config = TrainConfig.from_flat(out=str(folder), resume=True, shard=cell.engine == "shard")
    else:
        config = TrainConfig.from_flat(
            data="python:noise",
            channels=1,
            backbone="test_vit",
            pretrained=False,
            img_size=32,
            method="snella-4",
            method_options={"impl": "eager"},
            epochs=STEPS // PER_EPOCH,
            batch_size=BATCH // cell.accumulated,
            accumulate=cell.accumulated,
            grad_checkpointing=cell.option == "checkpointing",
            precision="bf16" if cell.option == "bf16" else "fp32",
            shard=cell.engine == "shard",
            head_init="random",
            final_head="trained",
            device="cpu",
            progress=False,
            out=str(folder),
        )
    data = {"train": items[:training], "val": items[training : 2 * training], "test": items[2 * training :]}
    trainers: list[app_trainer.SnellaTrainer] = []
    training_step, save_trained = app_trainer.SnellaTrainer.training_step, app_trainer.save_trained

    def step(trainer: app_trainer.SnellaTrainer, *args: Any, **kwargs: Any) -> Tensor:
        is_first = trainer._micro_step == 0
        if not trainers:
            trainers.append(trainer)
            cell.allocator_bytes = count_bytes(_allocator_of(trainer))
        if is_first and trainer.state.global_step == SAVED_AT and not cell.first and trainer.is_world_process_zero():
            shutil.copytree(folder, folder.with_name(f"{folder.name}-saved"))  # as if the run had been killed here
        loss = training_step(trainer, *args, **kwargs)
        if trainer._micro_step == cell.accumulated:
            cell.losses.append(trainer.last_loss)
        return loss

    def save(*args: Any, **kwargs: Any) -> None:
        cell.saved_adapters += 1
        save_trained(*args, **kwargs)

    patch = mock.patch.object
    with patch(app_trainer.SnellaTrainer, "training_step", step), patch(app_trainer, "save_trained", save):
        train(config, Console(file=io.StringIO()), data=data, render_report=False)
    cell.budgets = _allocator_of(trainers[0]).budgets
    cell.digest = digest_of(adapted_matrices(trainers[0].trained_model))


def _allocator_of(trainer: Trainer) -> BudgetAllocator:
    """Return the allocator of the Trainer's `SnellaCallback`."""
    (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, SnellaCallback))
    if callback.allocator is None:
        raise RuntimeError("the allocator exists only after training has begun")
    return callback.allocator
