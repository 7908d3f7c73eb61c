"""What fits: the batch size by memory, image size and number of epochs by time, each from trial steps."""

import bisect
import dataclasses
import io
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from snella_app.config import TrainConfig, budget_seconds
from snella_app.console import counted, print_line
from snella_app.data import ImageDataset
from snella_app.data.protocol import get_protocol
from snella_app.methods import find_method
from snella_app.runs.images import parts_of
from snella_app.text import seconds_text
from snella_app.training.build import RunComponents
from snella_app.training.distributed import process_count
from snella_app.training.final_head import layer_fit_seconds
from snella_app.training.linear_probe import probe_rows
from snella_app.training.memory import predict_step_memory, restored_state
from snella_app.training.results import MIN_SIZE, free_memory, size_step

_LARGEST_BATCH, _FEWEST_STEPS = 256, 10
_MEMORY_SHARE = 0.8
"""Of the free memory that a step may take by its prediction: libraries and workspaces come on top."""
_TIMED_STEPS, _FEWEST_TIMED = 4, 3
_TIME_SHARE = 0.9
"""Of the time budget that steps and evaluations may take: checkpoints, results and report take the rest."""
_MOST_EPOCHS = 100
_MEASURED_SHARE = 0.02
"""Of the time budget, after which no further step is timed once the fewest have been."""
_SIZE_RATIO = 1.15
"""Of an image size that is too large to one that is not, from which none between them is tried."""
_SIZE_ERRORS = (ValueError, TypeError, RuntimeError, AssertionError, IndexError)
"""What models raise that cannot be built for, or take, images of another size."""
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
    free = free_memory(device)
    largest = max(1, min(_LARGEST_BATCH, len(parts.splits.train) // _FEWEST_STEPS // process_count()))
    batch = 1 << largest.bit_length() - 1
    while batch > 1 and _predicted(parts, batch) > _MEMORY_SHARE * free:
        batch //= 2
    while batch > 1 and _runs_out_of_memory(lambda: _trial_step(parts, config, _first_images(parts, batch))):  # noqa: B023
        batch //= 2
    memory = _predicted(parts, batch) / 2**20
    whole = batch * process_count()
    print_line(
        console,
        f"batch size {whole}: a step takes about {memory:,.0f} of {free / 2**20:,.0f} MiB free; one was tried",
    )
    return dataclasses.replace(config, batch_size=whole)


def fit_image_size(
    parts: RunComponents, config: TrainConfig, at_size: Callable[[int], RunComponents], console: Console
) -> TrainConfig:
    """The settings with smaller images, where `time_budget` has no room for all epochs at the backbone's own size.

    Chosen is the largest multiple of the model's patch, or of its reduction, at which `epochs` fit, by measured steps
    and to within 15 %; the smallest, 48 pixels or the next multiple, where they fit at none. The search begins there:
    a step at the own size may take longer than the budget. Each next size is the largest at which the epochs fit if
    time grows as the pixels do. A size that is given stays, and so does that of a model that cannot take another one.

    Args:
        parts: Data and model, at the backbone's own size.
        config: Resolved settings.
        at_size: Builds the same for images of another size.
        console: Where the choice is written.
    """
    if config.time_budget is None or config.img_size is not None:
        return config
    own, step = int(parts.data_config["input_size"][-1]), size_step(parts.model)
    sizes = [*range(-(-MIN_SIZE // step) * step, own, step), own]
    kept = _reason_to_keep_size(config)
    if kept is not None:
        print_line(console, f"image size stays {own} px, since {kept}")
    if kept is not None or len(sizes) == 1:
        return config
    epochs = counted(config.epochs, "epoch")
    print_line(console, f"measuring steps, to fit {epochs} into {config.time_budget}")
    allowed = _TIME_SHARE * budget_seconds(config.time_budget) / config.epochs
    seconds: dict[int, float] = {}
    fits, too_large, number = -1, len(sizes), 0
    while fits + 1 < too_large and not (
        0 <= fits < too_large < len(sizes) and sizes[too_large] <= _SIZE_RATIO * sizes[fits]
    ):
        size = sizes[number]
        try:
            seconds[size] = _measure_times(parts if size == own else at_size(size), config).epoch_s
        except _SIZE_ERRORS as error:
            text = str(error).strip().partition("\n")[0]
            print_line(console, f"image size stays {own} px, since {config.backbone} cannot take {size} px ({text})")
            return config
        fits, too_large = (number, too_large) if seconds[size] <= allowed else (fits, number)
        largest = size * math.sqrt(allowed / seconds[size])
        number = max(bisect.bisect_right(sizes, largest) - 1, fits + 1)
        if number >= too_large or too_large < len(sizes):
            number = (fits + too_large) // 2
    chosen = sizes[max(fits, 0)]
    if chosen == own:
        return config
    own_s = seconds.get(own, seconds[max(seconds)] * (own / max(seconds)) ** 2)
    fit = "fit into" if fits >= 0 else "do not fit there either, the smallest size that is tried, into"
    print_line(
        console,
        f"image size {chosen} px: {epochs} {fit} {config.time_budget}, one takes about "
        f"{seconds_text(seconds[chosen])}; at {own} px, the backbone's own size, it takes about "
        f"{seconds_text(own_s)}{'' if own in seconds else ' if time grows as the pixels do'}; --img-size sets it",
    )
    return dataclasses.replace(config, img_size=chosen)


def _reason_to_keep_size(config: TrainConfig) -> str | None:
    """Why no other image size is tried; None where some are."""
    if config.init_from is not None:
        return f"{config.init_from} has it"
    if config.folds is not None:
        return "all folds have the same"
    if find_method(config.method).needs_batches:
        return f"{config.method} chooses what it trains at one size"
    return None


def fit_epochs(parts: RunComponents, config: TrainConfig, console: Console, begun: float | None = None) -> TrainConfig:
    """The settings with as many epochs as fit into `time_budget`, at most 100, from a few timed steps.

    There is at least one, or none if the head starts from a probe, which is then what is saved.

    Args:
        parts: Data and model.
        config: Resolved settings with a batch size.
        console: Where the choice is written.
        begun: When loading of data and model began, as `time.monotonic()` counts; now if None.
    """
    if config.time_budget is None:
        return config
    begun = time.monotonic() if begun is None else begun
    times = _measure_times(parts, config)
    spent_s = time.monotonic() - begun
    budget_s = budget_seconds(config.time_budget)
    left_s = _TIME_SHARE * budget_s - spent_s - times.final_s
    fewest = 0 if config.head_init == "probe" and get_protocol(config.protocol).selected_on == "val" else 1
    epochs = max(fewest, min(_MOST_EPOCHS, int(left_s / times.epoch_s)))
    text = f"{counted(epochs, 'epoch')} in {config.time_budget}: one takes about {seconds_text(times.epoch_s)}"
    if not epochs:
        text += "; the probe that the head starts from is what is saved"
    elif times.epoch_s > left_s:
        text += ", which is more than the budget; --train-size or a smaller --img-size make it shorter"
    elif epochs == _MOST_EPOCHS:
        text += f", and {_MOST_EPOCHS} are enough; --epochs without --time-budget sets more"
    print_line(console, text)
    return dataclasses.replace(config, epochs=epochs)


@dataclass(frozen=True)
class _Times:
    """Seconds of an epoch with its evaluation, and of the evaluation of what is saved on all parts."""

    epoch_s: float
    final_s: float


def _measure_times(parts: RunComponents, config: TrainConfig) -> _Times:
    """Times from a few steps of training and evaluation."""
    config = fit_batch_size(parts, config, Console(file=io.StringIO()))
    per_batch = max(config.effective_batch_size // process_count(), 1)
    train_s = _step_seconds(parts, config, parts.splits.train, per_batch, _trial_step)
    steps = config.steps_per_epoch(len(parts.splits.train)) * config.accumulate
    selection = get_protocol(config.protocol).selection_part(parts.splits)
    measured = [part for name, part in parts_of(parts.splits).items() if name != "train"]
    if not measured:
        return _Times(steps * train_s, 0.0)
    # images that fit into memory are read from there later
    first_read_s = _step_seconds(parts, config, measured[-1], per_batch, _only_read)
    evaluation_s = config.views * _step_seconds(parts, config, measured[-1], per_batch, _trial_evaluation)

    def batches_of(part: ImageDataset) -> int:
        return -(-len(part) // config.effective_batch_size)

    def seconds_of(part: ImageDataset) -> float:
        return batches_of(part) * evaluation_s

    epoch_s = steps * train_s + (0.0 if selection is None else seconds_of(selection))
    final_s = sum(batches_of(part) * first_read_s + seconds_of(part) for part in measured)
    if config.final_head == "layers":
        rows = len(probe_rows(parts, config))
        final_s += -(-rows // config.effective_batch_size) * evaluation_s + layer_fit_seconds(
            parts, config.views * rows
        )
    return _Times(epoch_s, final_s)


def _predicted(parts: RunComponents, batch: int) -> int:
    """Bytes of a step."""
    channels, height, width = parts.data_config["input_size"]
    return predict_step_memory(parts.model, (channels, height, width), batch).total


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


def _only_read(parts: RunComponents, config: TrainConfig, batch: dict[str, Tensor]) -> None:
    """Nothing: what is timed is the loading."""


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
    """Median seconds of a step with the loading of its images.

    The first step compiles and is left out. The second may compile as well, so that at least two steps are timed after
    the first, and of an even number of times the lower median counts.
    """
    generator = torch.Generator().manual_seed(config.seed)  # or a loader would draw from torch's own numbers
    loader = DataLoader(dataset, batch, collate_fn=parts.task.collate, num_workers=config.workers, generator=generator)
    limit_s = _MEASURED_SHARE * budget_seconds(str(config.time_budget))
    spans: list[float] = []
    start = time.perf_counter()
    passes = 1 if step is _only_read else _FEWEST_TIMED  # a part may be one batch, and is read once
    batches = itertools.chain.from_iterable(itertools.repeat(loader, passes))
    for number, items in enumerate(batches):
        step(parts, config, items)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - start)
        if number == _TIMED_STEPS or (number >= _FEWEST_TIMED - 1 and sum(spans[1:]) > limit_s):
            break
        start = time.perf_counter()
    return statistics.median_low(spans[1:] or spans)


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
