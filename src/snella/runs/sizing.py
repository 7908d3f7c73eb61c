"""What fits: the batch size by memory, and the number of epochs by time, each from a trial step."""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from snella._text import seconds_text
from snella.runs.build import RunComponents
from snella.runs.config import TrainConfig, budget_seconds
from snella.runs.console import counted, print_line
from snella.runs.distributed import process_count
from snella.runs.memory import predict_step_memory, restored_state
from snella.runs.protocol import get_protocol
from snella.runs.results import free_memory

_LARGEST_BATCH, _FEWEST_STEPS = 256, 10
_MEMORY_SHARE = 0.8
"""Of the free memory that a step may take by its prediction: libraries and workspaces come on top."""
_TIMED_STEPS = 4
_TIME_SHARE = 0.9
"""Of the time budget that steps and evaluations may take: checkpoints, results and report take the rest."""
_MOST_EPOCHS = 100
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fit_batch_size(parts: RunComponents, config: TrainConfig, console: Console) -> TrainConfig:
    """The settings with the largest batch that fits, where `batch_size` is auto.

    Tried are powers of two up to 256, of which an epoch has at least 10 steps: the largest whose predicted memory is
    at most 0.8 of what is free, confirmed by a real step, and halved while that runs out of memory. The model stays as
    it is.

    Args:
        parts: Data and model.
        config: Resolved settings.
        console: Where the choice is written.
    """
    if config.batch_size != "auto":
        return config
    device = next(parts.model.parameters()).device
    channels, height, width = parts.data_config["input_size"]
    free = free_memory(device)
    largest = max(1, min(_LARGEST_BATCH, len(parts.splits.train) // _FEWEST_STEPS // process_count()))
    batch = 1 << largest.bit_length() - 1
    while batch > 1 and _predicted(parts, (channels, height, width), batch) > _MEMORY_SHARE * free:
        batch //= 2
    while batch > 1 and _runs_out_of_memory(lambda: _trial_step(parts, config, _first_images(parts, batch))):  # noqa: B023
        batch //= 2
    memory = _predicted(parts, (channels, height, width), batch) / 2**20
    whole = batch * process_count()
    print_line(
        console,
        f"batch size {whole}: a step takes about {memory:,.0f} of {free / 2**20:,.0f} MiB free; one was tried",
    )
    return dataclasses.replace(config, batch_size=whole)


def fit_epochs(parts: RunComponents, config: TrainConfig, console: Console) -> TrainConfig:
    """The settings with as many epochs as fit into `time_budget`, at least 1 and at most 100, from a few timed steps.

    Args:
        parts: Data and model.
        config: Resolved settings with a batch size.
        console: Where the choice is written.
    """
    if config.time_budget is None:
        return config
    budget = budget_seconds(config.time_budget)
    per_batch = max(config.effective_batch_size // process_count(), 1)
    train_s = _step_seconds(parts, config, parts.splits.train, per_batch, _trial_step)
    steps = config.steps_per_epoch(len(parts.splits.train)) * config.accumulate
    epoch_s = steps * train_s
    selection = get_protocol(config.protocol).selection_part(parts.splits)
    if selection is not None:
        batches = -(-len(selection) // config.effective_batch_size)
        epoch_s += batches * _step_seconds(parts, config, selection, per_batch, _trial_evaluation)
    epochs = max(1, min(_MOST_EPOCHS, int(_TIME_SHARE * budget / epoch_s)))
    text = f"{counted(epochs, 'epoch')} in {config.time_budget}: one takes about {seconds_text(epoch_s)}"
    if epoch_s > budget:
        text += ", which is more than the budget; --train-size or a smaller --img-size make it shorter"
    elif epochs == _MOST_EPOCHS:
        text += f", and {_MOST_EPOCHS} are enough; --epochs without --time-budget sets more"
    print_line(console, text)
    return dataclasses.replace(config, epochs=epochs)


def _predicted(parts: RunComponents, shape: tuple[int, int, int], batch: int) -> int:
    """Bytes of a step."""
    return predict_step_memory(parts.model, shape, batch).total


def _first_images(parts: RunComponents, count: int) -> dict[str, Tensor]:
    """A batch of training images, the first ones."""
    train = parts.splits.train
    return parts.task.collate([train[index % len(train)] for index in range(count)])


def _trial_step(parts: RunComponents, config: TrainConfig, batch: dict[str, Tensor]) -> None:
    """Forward and backward, with memory for the optimizer's moments; everything is as before afterwards."""
    model, device = parts.model, next(parts.model.parameters()).device
    images, labels = batch["images"].to(device), batch["labels"].to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
    try:
        with restored_state(model, images):
            model.train()
            with _autocast(device, config):
                loss = parts.task.loss(model(images), labels)
            loss.backward()
    finally:
        moments.clear()
        model.zero_grad(set_to_none=True)


@torch.no_grad()
def _trial_evaluation(parts: RunComponents, config: TrainConfig, batch: dict[str, Tensor]) -> None:
    """Forward in evaluation mode."""
    model, device = parts.model, next(parts.model.parameters()).device
    images = batch["images"].to(device)
    with restored_state(model, images), _autocast(device, config):
        model.eval()
        model(images)


def _autocast(device: torch.device, config: TrainConfig) -> torch.autocast | nullcontext[None]:
    """Autocast as training has it."""
    dtype = _DTYPES.get(config.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _step_seconds(
    parts: RunComponents,
    config: TrainConfig,
    dataset: torch.utils.data.Dataset[object],
    batch: int,
    step: Callable[[RunComponents, TrainConfig, dict[str, Tensor]], None],
) -> float:
    """Median seconds of a step with the loading of its images; the first step, which compiles, is left out."""
    generator = torch.Generator().manual_seed(config.seed)  # or a loader would draw from torch's own numbers
    loader = DataLoader(dataset, batch, collate_fn=parts.task.collate, num_workers=config.workers, generator=generator)
    spans: list[float] = []
    start = time.perf_counter()
    for number, items in enumerate(loader):
        step(parts, config, items)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - start)
        if number == _TIMED_STEPS:
            break
        start = time.perf_counter()
    return statistics.median(spans[1:] or spans)


def _runs_out_of_memory(step: Callable[[], None]) -> bool:
    """Whether a step does; other errors pass."""
    try:
        step()
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("memory", str(error)):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
    return False
