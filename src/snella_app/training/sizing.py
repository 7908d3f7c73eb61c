"""Fit the batch size to memory, and the image size and the epochs to a time budget, using trial steps."""

import bisect
import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snella_app.config.sections import OptimConfig, budget_seconds
from snella_app.config.train import TrainConfig
from snella_app.console import counted, print_line
from snella_app.data.datasets import ImageDataset
from snella_app.data.protocol import PROTOCOLS
from snella_app.device import autocast, move_to, synchronized_time
from snella_app.methods import find_method
from snella_app.methods.registry import matrices_of
from snella_app.text import first_line, seconds_text
from snella_app.training.build import RunComponents
from snella_app.training.distributed import process_count
from snella_app.training.final_head import fits_last_epoch, layer_fit_seconds, trained_head
from snella_app.training.linear_probe import (
    MAX_PROBE_IMAGES,
    can_cache_features,
    can_skip_training,
    evaluates_initial_model,
    probe_indices,
)
from snella_app.training.memory import predict_step_memory, preserve_state

MIN_SIZE = 48
"""Smallest image size that is tried or suggested, in pixels."""
_MAX_BATCH = 256
"""Largest batch size that `--batch-size auto` tries."""
_MIN_STEPS = 10
"""Smallest number of steps per epoch that `--batch-size auto` allows."""
_MEMORY_SHARE = 0.8
"""Maximum predicted step memory as a fraction of free memory; the prediction excludes libraries and workspaces."""
_TIMED_STEPS = 4
"""Largest number of steps that are timed after the first one."""
_MIN_TIMED = 3
"""Smallest number of timed steps, including the first, even if they exceed `_MEASURED_SHARE`.

If only reading is timed, a small split may have fewer batches.
"""
_RESERVED_SHARE = 0.05
"""Fraction of the time budget reserved for optimizer updates, checkpoints, and reports."""
_RESERVED_S = 4.0
"""Seconds reserved in addition. Together, both take at most a tenth of the budget."""
_MAX_EPOCHS = 100
"""Largest number of epochs that is chosen for a time budget."""
_MEASURED_SHARE = 0.02
"""Fraction of the time budget after which the timing of one kind of step ends. The first step does not count."""
_SIZE_RATIO = 1.15
"""The size search ends when the smallest size that does not fit is at most this factor times the largest that does."""
_SMALL_SIDE = 112
"""Image size that is tried even if the images are smaller."""
_MEASURED_SIDES = 16
"""Minimum number of images whose size is read, if there are that many."""
_NEVER_S = 1e12
"""Seconds assigned to a step that runs out of memory, more than any time budget."""
_MIN_STEP_S = 0.01
"""Seconds of a step on cached features, and lower bound for any step."""
_CACHED_EPOCH_S = 0.5
"""Seconds for the evaluation and the checkpoint of an epoch on cached features."""
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")
"""Parts of torch's out-of-memory messages for GPUs and CPUs."""
_SIZE_ERRORS = (ValueError, TypeError, RuntimeError, AssertionError, IndexError)
"""Errors that models raise if they do not support an image size."""
_CGROUP = "/sys/fs/cgroup"
"""Folder with the memory limit and the memory use of a container."""


def fit_batch_size(parts: RunComponents, optim: OptimConfig, console: Console) -> int | None:
    """Return the total batch size over all processes. If it is `"auto"`, choose the largest that fits in memory.

    Returns None if `optim.batch_size` is None.

    Candidates per process are 1 and the powers of two up to 256 with at least 10 steps per epoch. The largest candidate
    whose predicted memory is at most 0.8 of the free memory is tested with a trial step, and halved while this step
    runs out of memory. A batch size of 1 is not tested. The model is unchanged.
    """
    if optim.batch_size != "auto":
        return optim.batch_size
    free = free_memory(next(parts.model.parameters()).device)
    epoch_size = optim.images_per_epoch(len(parts.splits.train))
    max_for_min_steps = epoch_size // (_MIN_STEPS * optim.accumulate * process_count())
    largest = max(1, min(_MAX_BATCH, max_for_min_steps))
    batch_size = 1 << largest.bit_length() - 1  # the largest power of two up to `largest`
    while batch_size > 1 and predicted_memory(parts, optim.precision, batch_size) > _MEMORY_SHARE * free:
        batch_size //= 2
    while batch_size > 1 and _runs_out_of_memory(parts, optim.precision, batch_size):
        batch_size //= 2
    memory = predicted_memory(parts, optim.precision, batch_size) / 2**20
    total_batch_size = batch_size * process_count()
    step = f"a step uses about {memory:,.0f} of {free / 2**20:,.0f} MiB of free memory"
    print_line(console, f"batch size {total_batch_size}: {step}")
    return total_batch_size


def predicted_memory(parts: RunComponents, precision: str, batch_size: int) -> int:
    """Predict the peak memory of one training step, in bytes."""
    channels, height, width = parts.data_config["input_size"]
    with autocast(next(parts.model.parameters()).device, precision):
        return predict_step_memory(parts.model, (channels, height, width), batch_size).total


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or this process's share of the free bytes of the machine or container."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # otherwise, memory from earlier trial steps would not count as free
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    free = int(psutil.virtual_memory().available)
    group = Path(_CGROUP)
    with contextlib.suppress(OSError, ValueError):  # missing files, or the value "max" if there is no limit
        statistics_text = (group / "memory.stat").read_text()
        cached_files = re.findall(r"^(?:active|inactive)_file (\d+)$", statistics_text, re.MULTILINE)
        # the kernel frees cached files on demand
        in_use = int((group / "memory.current").read_text()) - sum(map(int, cached_files))
        limit = int((group / "memory.max").read_text())
        free = min(free, max(limit - in_use, 0))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def fit_image_size(
    parts: RunComponents,
    config: TrainConfig,
    at_size: Callable[[int], RunComponents],
    console: Console,
    started_at: float,
) -> int | None:
    """Choose the largest image size at which the run fits in `time_budget`.

    A run consists of `epochs` epochs and the final evaluation. If it may have 0 epochs and fits a final head, i.e. a
    head that is fitted to several layers after training, this head takes priority, since a head at high resolution is
    usually better than a few epochs at a much lower one. Let S be the largest size at which the head alone fits. The
    result is the largest size of at least S/2 at which the epochs also fit, or S if there is none. To leave time for
    epochs, S is limited to the median shorter side of the images or 112 pixels, whichever is larger, rounded up to a
    candidate. If such a run has 0 epochs or a method that trains only the head, S is not limited and is the result.

    Candidates are the backbone's default and all smaller multiples of `size_step` from 48 pixels. The search stops
    within 15% of the largest size that fits. If no size fits, the result is the smallest. The default is kept if the
    model does not support other sizes, for runs with folds or `init_from`, and for methods that select parameters.

    `at_size` builds the components for an image size. `started_at` is `time.monotonic()` at the start of the budget.

    Returns:
        Image size, or None for the backbone's default.
    """
    optim = config.optim
    budget = str(config.optim.time_budget)
    default = int(parts.data_config["input_size"][-1])
    step = size_step(parts.model)
    smallest = -(-MIN_SIZE // step) * step  # `MIN_SIZE`, rounded up to a multiple
    sizes = [*range(smallest, default, step), default]
    reason = _reason_to_keep_size(config)
    if reason is not None:
        print_line(console, f"image size stays {default} px: {reason}")
    if reason is not None or len(sizes) == 1:
        return None

    def measure(size: int, with_training: bool) -> _Times:
        """Estimate the times at a size. If a step runs out of memory, they exceed any budget."""
        try:
            return _measure_times(parts if size == default else at_size(size), config, with_training)
        except _SIZE_ERRORS as error:
            if is_out_of_memory(error):
                return _Times(steps=1, step_s=_NEVER_S, selection_s=_NEVER_S, final_s=_NEVER_S)
            raise _SizeError(f"{size} px ({first_line(error.__cause__ or error)})") from error

    def epoch_seconds(size: int) -> float:
        """Return the seconds of an epoch at a size, including its share of the final evaluation."""
        times = measure(size, with_training=True)
        evaluation_s = times.selection_s * _evaluations(config, optim.epochs)
        return times.steps * times.step_s + (evaluation_s + times.final_s) / optim.epochs

    left_s = partial(_seconds_left, budget, started_at)
    search = None
    epochs = counted(optim.epochs, "epoch")
    has_head = can_skip_training(optim, config.data.protocol) and optim.final_head == "layers"
    trains = optim.epochs > 0 and not (has_head and find_method(config.method.name).is_head_only)
    last_part = "the final head" if has_head else "the final evaluation"
    print_line(console, f"measuring step times to fit {epochs if trains else last_part} into {budget}")
    try:
        if has_head or not trains:
            largest_side = max(_SMALL_SIDE, _median_side(parts.splits.train)) if trains else default
            # up to the first size that is not smaller than the limit
            head_sizes = [size for size in sizes if size - step < largest_side] or sizes[:1]
            search = _largest_size(head_sizes, lambda size: measure(size, with_training=False).final_s, left_s)
            work = last_part
            unit = "it"
            sizes = [size for size in sizes if 2 * size >= search.size]
        if search is None or (trains and search.fits):
            epoch_search = _largest_size(sizes, epoch_seconds, lambda: left_s() / optim.epochs)
            if search is None or epoch_search.fits:
                search = epoch_search
                work = epochs
                unit = "one epoch"
    except _SizeError as error:
        print_line(console, f"image size stays {default} px: {config.model.backbone} does not support {error}")
        return None
    if search.size == default:
        return None
    seconds = {size: time_s for size, time_s in search.seconds.items() if time_s < _NEVER_S}
    if search.size not in seconds:
        print_line(console, f"image size {search.size} px, the smallest: a step does not fit into memory at any size")
        return search.size
    default_s = seconds.get(default, seconds[max(seconds)] * (default / max(seconds)) ** 2)
    is_singular = unit == "it" or optim.epochs == 1
    outcome = f"{'fits' if is_singular else 'fit'} into {budget}"
    if not search.fits:
        outcome = f"{'exceeds' if is_singular else 'exceed'} {budget} even at the smallest size"
    origin = "" if default in seconds else ", estimated from the number of pixels"
    print_line(
        console,
        f"image size {search.size} px: {work} {outcome}; {unit} takes about {seconds_text(seconds[search.size])} "
        f"(at {default} px, the backbone's default size: about {seconds_text(default_s)}{origin}); "
        "use --img-size to set the size",
    )
    return search.size


def size_step(model: nn.Module) -> int:
    """Return the step between supported image sizes, from the patch size and the feature stride; 32 if unknown."""
    modules = list(model.modules())
    patch_sizes = [size for module in modules if isinstance(size := getattr(module, "patch_size", None), tuple)]
    infos = [info for module in modules if isinstance(info := getattr(module, "feature_info", None), list)]
    divisors: list[int] = []
    if patch_sizes:
        divisors.append(int(patch_sizes[0][0]))
    if infos and infos[0]:
        divisors.append(int(infos[0][-1]["reduction"]))  # of the last stage
    return math.lcm(*divisors) if divisors else 32


class _SizeError(Exception):
    """Raised when a model does not support an image size."""


@dataclass
class _LargestSize:
    """Result of a search: the size, whether it fits, and the seconds by size."""

    size: int
    fits: bool
    seconds: dict[int, float]


def _largest_size(
    sizes: Sequence[int], seconds_at: Callable[[int], float], allowed_s: Callable[[], float]
) -> _LargestSize:
    """Find the largest of the ascending sizes that fits in the allowed time, to within 15%."""
    seconds: dict[int, float] = {}
    last_fitting = -1  # index of the largest size that fits so far
    first_failing = len(sizes)  # index of the smallest size that does not
    index = 0  # begin with the smallest size, since a step at the largest may exceed the budget
    while last_fitting + 1 < first_failing:
        is_bracketed = last_fitting >= 0 and first_failing < len(sizes)
        if is_bracketed and sizes[first_failing] <= _SIZE_RATIO * sizes[last_fitting]:
            break
        size = sizes[index]
        seconds[size] = seconds_at(size)
        allowed = max(allowed_s(), 0.0)
        if seconds[size] <= allowed:
            last_fitting = index
        else:
            first_failing = index
        # next is the largest size that would fit if time were proportional to the number of pixels
        estimated_largest = size * math.sqrt(allowed / max(seconds[size], 1e-9))
        index = max(bisect.bisect_right(sizes, estimated_largest) - 1, last_fitting + 1)
        if index >= first_failing or first_failing < len(sizes):  # once a size has failed, bisect
            index = (last_fitting + first_failing) // 2
    # the search itself takes time, so a size that fit earlier may no longer fit
    measured_sizes = sorted(seconds)
    pixels = [size**2 for size in measured_sizes]
    times = [seconds[size] for size in measured_sizes]
    candidates = sizes[: max(last_fitting, 0) + 1]
    estimates = {size: float(np.interp(size**2, pixels, times)) for size in candidates}
    allowed = allowed_s()
    fitting = [size for size, needed in estimates.items() if needed <= allowed]
    size = max(fitting, default=sizes[0])
    return _LargestSize(size, estimates[size] <= allowed, {**estimates, **seconds})


def _median_side(images: ImageDataset) -> float:
    """Return the median of the shorter sides of evenly spaced images, in pixels."""
    indices = range(0, len(images), max(1, len(images) // _MEASURED_SIDES))
    return statistics.median(min(images.image(index).size) for index in indices)


def _reason_to_keep_size(config: TrainConfig) -> str | None:
    """Return the reason to keep the image size, or None if other sizes can be tried."""
    if config.model.init_from is not None:
        return f"{config.model.init_from} uses this size"
    if config.data.folds is not None:
        return "all folds use the same size"
    if find_method(config.method.name).needs_batches:
        return f"{config.method.name} selects parameters at this size"
    return None


def fit_epochs(
    parts: RunComponents, config: TrainConfig, console: Console, started_at: float
) -> tuple[int, int | None]:
    """Choose `epochs`, at most 100, and `epoch_images` to fit in `time_budget`, from a few timed steps.

    If between n and n + 1 epochs fit, the result is n epochs, or n + 1 shorter epochs if they have more steps in total.
    The minimum is one epoch of 10 steps (fewer if all images take fewer), or no epochs for a probe-initialized head
    that is evaluated on validation images.

    Returns:
        `epochs`, and `epoch_images`, which is None if an epoch has all images or there are no epochs.
    """
    optim = config.optim
    num_images = len(parts.splits.train)
    times = _measure_times(parts, config)
    left_s = _seconds_left(str(optim.time_budget), started_at) - times.final_s

    def steps_in_time(epochs: int) -> int:
        seconds = left_s - times.selection_s * _evaluations(config, epochs)
        return min(times.steps, int(seconds / epochs / times.step_s))

    whole_epochs = max((count for count in range(1, _MAX_EPOCHS + 1) if steps_in_time(count) == times.steps), default=0)
    candidates = (max(whole_epochs, 1), min(whole_epochs + 1, _MAX_EPOCHS))
    epochs = max(candidates, key=lambda count: count * steps_in_time(count))
    min_steps = min(times.steps, _MIN_STEPS) if epochs == 1 else 1
    fits = steps_in_time(epochs) >= min_steps
    steps = max(steps_in_time(epochs), min_steps)
    epoch_images = min(num_images, steps * optim.images_per_step)
    epoch_s = steps * times.step_s + times.selection_s * _evaluations(config, epochs) / epochs
    if not fits and can_skip_training(optim, config.data.protocol):
        epochs = 0
    of_images = f"of {counted(epoch_images, 'image')}"
    if epochs:
        text = f"{counted(epochs, 'epoch')} {of_images} in {optim.time_budget}: one takes about {seconds_text(epoch_s)}"
    else:
        text = f"no epochs: an epoch {of_images} takes about {seconds_text(epoch_s)}"
    if not fits:
        text += f", more than the time left in the budget of {optim.time_budget}"
    if not epochs:
        head = "the final head is fitted" if optim.final_head == "layers" else "the head from the linear probe is saved"
        text += f"; {head} without training the backbone"
    elif not fits:
        text += "; reduce --img-size"
    elif whole_epochs == _MAX_EPOCHS:
        text += f"; {_MAX_EPOCHS} is the maximum; for more, use --epochs without --time-budget"
    print_line(console, text)
    return epochs, epoch_images if epochs and epoch_images < num_images else None


def _evaluations(config: TrainConfig, epochs: int) -> int:
    """Return the number of epochs that are evaluated on the selection split."""
    protocol = PROTOCOLS[config.data.protocol]
    return sum(protocol.is_measured(epoch, epochs) for epoch in range(1, epochs + 1))


def _seconds_left(budget: str, started_at: float) -> float:
    """Return the seconds of a time budget that remain for steps and evaluation."""
    total = budget_seconds(budget)
    reserved = min(0.1 * total, _RESERVED_SHARE * total + _RESERVED_S)
    return total - reserved - (time.monotonic() - started_at)


@dataclass(frozen=True)
class _Times:
    """Number of steps per epoch, and times of parts of a run in seconds.

    Attributes:
        steps: Number of optimizer steps per epoch.
        step_s: One optimizer step.
        selection_s: Evaluation of an epoch on the selection split.
        final_s: Fit of the final head, caching of features, and evaluations before the first epoch and after the last.
    """

    steps: int
    step_s: float
    selection_s: float
    final_s: float


def _measure_times(parts: RunComponents, config: TrainConfig, with_training: bool = True) -> _Times:
    """Estimate times from a few steps. If `with_training` is False, no training step is timed."""
    data = config.data
    batch_size = fit_batch_size(parts, config.optim, Console(file=io.StringIO()))
    optim = dataclasses.replace(config.optim, batch_size=batch_size)
    process_batch_size = max(optim.effective_batch_size // process_count(), 1)
    train_s = 0.0
    is_cached = can_cache_features(data, parts.model)
    if with_training and not is_cached:
        with _reduced_budgets(parts.model):
            train_s = _step_seconds(parts, optim, parts.splits.train, process_batch_size, _trial_step)
    evaluated = {name: dataset for name, dataset in parts.splits.parts.items() if name != "train"}
    timed_split = next(reversed(evaluated.values()), parts.splits.train)
    # the first pass reads from disk; later passes may read from memory
    first_read_s, read_s = (_step_seconds(parts, optim, timed_split, process_batch_size, _only_read) for _ in range(2))
    views = 2 if data.tta == "auto" else data.views  # auto may select two views

    def evaluation_seconds(timed_optim: OptimConfig) -> tuple[float, float]:
        """Return the time to read a batch and evaluate one view, and the time to read it and evaluate all views."""
        once_s = _step_seconds(parts, timed_optim, timed_split, process_batch_size, _trial_evaluation)
        return once_s, once_s + (views - 1) * max(once_s - read_s, 0.0)

    once_s, views_s = evaluation_seconds(dataclasses.replace(optim, precision="fp32"))
    timed_images = min(process_batch_size, len(timed_split)) * process_count()
    num_batches = {name: len(dataset) / timed_images for name, dataset in evaluated.items()}
    selection_s = num_batches.get(str(PROTOCOLS[data.protocol].selected_on), 0) * once_s
    fits_layers = optim.final_head == "layers"
    needs_evaluation = not (fits_layers and trained_head(parts)) or (with_training and fits_last_epoch(config))
    final_s = sum(num_batches.values()) * max(first_read_s - read_s, 0.0) + num_batches.get("test", 0) * views_s
    if needs_evaluation:  # of the trained head; otherwise, its outputs come from the features of the fit
        final_s += num_batches.get("val", 0) * views_s
    if is_cached:
        selection_s = _CACHED_EPOCH_S
        final_s += sum(map(len, parts.splits.parts.values())) / timed_images * once_s
    if evaluates_initial_model(config):
        final_s += selection_s
    final_s += selection_s * ((optim.soup or 0) + (optim.swa is not None))  # evaluation of averages
    if fits_layers:
        num_val = len(evaluated.get("val", ()))
        num_fitted = len(probe_indices(parts)) + min(num_val, MAX_PROBE_IMAGES)
        num_read = num_fitted + (num_val if num_val > MAX_PROBE_IMAGES else 0)
        features_s = views_s if optim.precision == "fp32" else evaluation_seconds(optim)[1]
        final_s += num_read / timed_images * features_s + layer_fit_seconds(parts, num_fitted, views)
    steps = optim.steps_per_epoch(len(parts.splits.train))
    return _Times(steps, max(train_s * optim.accumulate, _MIN_STEP_S), selection_s, final_s)


def _trial_step(parts: RunComponents, precision: str, batch: dict[str, Tensor]) -> None:
    """Run a forward and a backward pass, with memory allocated for the optimizer states, and restore the model."""
    model = parts.model
    device = next(parts.model.parameters()).device
    images = batch["images"].to(device)
    labels = move_to(batch["labels"], device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
    try:
        with preserve_state(model, images):
            model.train()
            with torch.no_grad():
                for parameter in trained:
                    parameter.mul_(1.0)  # invalidates cached updates, as an optimizer step does
            with autocast(device, precision):
                loss = parts.task.loss(model(images), labels)
            loss.backward()
    finally:
        moments.clear()
        model.zero_grad(set_to_none=True)


@contextmanager
def _reduced_budgets(model: nn.Module) -> Iterator[None]:
    """Inside the context, reduce the budget of each matrix, i.e. the number of entries that its update may change.

    With full budgets, a step would not search for magnitude thresholds and would be too fast. Each budget is multiplied
    by 1 minus half the target sparsity.
    """
    adapter_names = {matrix.layer: matrix.adapter_name for matrix in matrices_of(model)}
    budgets = {layer: layer.budgets(name) for layer, name in adapter_names.items()}
    try:
        for layer, name in adapter_names.items():
            share = 1 - layer.snella_config[name].target_sparsity / 2
            layer.set_budget(name, (int(share * budget) for budget in budgets[layer]))
        yield
    finally:
        for layer, name in adapter_names.items():
            layer.set_budget(name, budgets[layer])


@torch.no_grad()
def _trial_evaluation(parts: RunComponents, precision: str, batch: dict[str, Tensor]) -> None:
    """Run a forward pass."""
    device = next(parts.model.parameters()).device
    with autocast(device, precision):
        parts.model(batch["images"].to(device))


def _only_read(parts: RunComponents, precision: str, batch: dict[str, Tensor]) -> None:
    """Do nothing, so that only data loading is timed."""


def _step_seconds(
    parts: RunComponents,
    optim: OptimConfig,
    dataset: torch.utils.data.Dataset[object],
    batch_size: int,
    step: Callable[[RunComponents, str, dict[str, Tensor]], None],
) -> float:
    """Return the median time in seconds of a step, including data loading.

    Warm-up steps and smaller last batches do not count. The model is in evaluation mode, except in `_trial_step`.
    """
    loader = DataLoader(
        dataset,
        batch_size,
        collate_fn=parts.task.collate,
        num_workers=parts.workers,
        generator=torch.Generator().manual_seed(parts.seed),  # leaves torch's global generator unchanged
    )
    limit_s = _MEASURED_SHARE * budget_seconds(str(optim.time_budget))
    spans: list[float] = []
    sizes: list[int] = []
    was_training = parts.model.training
    device = next(parts.model.parameters()).device
    parts.model.eval()  # once: every change of the mode discards merged weights
    start = time.perf_counter()
    # small splits are repeated, except to time reading, which may be faster in a second pass
    passes = 1 if step is _only_read else _MIN_TIMED
    batches = itertools.chain.from_iterable(itertools.repeat(loader, passes))
    for number, items in enumerate(batches):
        step(parts, optim.precision, items)
        spans.append(synchronized_time(device) - start)
        sizes.append(len(items["labels"]))
        if number == _TIMED_STEPS or (number >= _MIN_TIMED - 1 and sum(spans[1:]) > limit_s):
            break
        start = time.perf_counter()
    parts.model.train(was_training)
    # the first step, and sometimes the second, compiles kernels
    warmup = 0 if step is _only_read else 1
    full_batch_spans = [span for span, size in zip(spans[warmup:], sizes[warmup:], strict=True) if size == max(sizes)]
    return statistics.median_low(full_batch_spans or spans[warmup:] or spans)


def _runs_out_of_memory(parts: RunComponents, precision: str, batch_size: int) -> bool:
    """Return whether a trial step runs out of memory; other errors propagate."""
    train = parts.splits.train
    items = [train[index % len(train)] for index in range(batch_size)]
    try:
        _trial_step(parts, precision, parts.task.collate(items))
    except RuntimeError as error:  # base class of torch.OutOfMemoryError
        if not is_out_of_memory(error):
            raise
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is an out-of-memory error of the GPU or the machine; if so, free cached GPU memory."""
    has_sign = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
    is_oom = has_sign or isinstance(error, torch.OutOfMemoryError)
    if is_oom and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return is_oom
