"""Components of a training run: `load` loads data and task, `build` creates the model."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import timm.data
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snella_app.config import DEFAULT_BATCH_SIZE, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from snella_app.console import print_line
from snella_app.data import DataSplits, ImageDataset, build_transform
from snella_app.data.datasets import MaskDataset, read_at_side
from snella_app.data.protocol import get_protocol
from snella_app.data.sources import show_reading
from snella_app.methods import SelectionData, build_method, find_method, load_trained, load_trained_into, save_trained
from snella_app.methods.model_parts import find_head
from snella_app.methods.saving import METHOD_FILE
from snella_app.records import BackboneInfo, RunInfo, read
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import encode_targets, is_same_split, load_splits
from snella_app.runs.model import make_backbone
from snella_app.tasks import Task, create_task
from snella_app.training.distributed import process_count
from snella_app.training.optimizer import checkpoint_gradients, set_drop_path
from snella_app.training.sampler import EpochSampler

FOLDER = "selection"
"""Subfolder of a run for the selected parameters and their initial values."""
_READ_MARGIN = 4
"""Minimum shorter side when reading images, relative to the input size; crops of 1/16 area need no upsampling."""


@dataclass(frozen=True)
class LoadedData:
    """Images and task of a run.

    Attributes:
        config: Data configuration.
        seed: Seed of the run.
        splits: Images with targets encoded for the task, without transforms.
        task: Task fitted to the training images.
        started_at: `time.monotonic()` at the start of loading.
        source: Dataset object named by `config.spec`, if any.
        batch_size: Batch size of passes over the images before training.
        shows_progress: True to show progress bars on a terminal.
    """

    config: DataConfig
    seed: int
    splits: DataSplits
    task: Task
    started_at: float
    source: Any = None
    batch_size: int = DEFAULT_BATCH_SIZE
    shows_progress: bool = True


def epoch_sampler(train: ImageDataset, task: Task, sampler: str, seed: int) -> EpochSampler:
    """Return the sampler of the training images; `sampler` is `DataConfig.sampler`."""
    weights = task.sample_weights(train) if sampler == "weighted" else None
    return EpochSampler(len(train), seed, weights)


def selection_data(
    train: ImageDataset, val: ImageDataset | None, data: LoadedData, console: Console | None = None
) -> SelectionData:
    """Return training and validation batches for parameter selection, reproducible from the seed; never test images.

    Pass `k` over the training images uses the order and augmentation of epoch `k` of the run. Validation images keep
    their order. `console` shows the progress.
    """
    passes, task, seed = count(), data.task, data.seed
    show = data.shows_progress and console is not None and console.is_terminal

    def batches(images: ImageDataset, order: EpochSampler | None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            images,
            data.batch_size,
            sampler=order,
            collate_fn=task.collate,
            num_workers=data.config.workers,
            generator=torch.Generator().manual_seed(seed),  # leaves torch's global generator unchanged
        )
        steps = track(loader, "selecting trainable weights", console=console, transient=True) if show else loader
        yield from ((batch["images"], batch["labels"]) for batch in steps)

    def train_pass() -> Iterator[tuple[Tensor, Tensor]]:
        epoch, images = next(passes), train.with_transform(train.transform)
        order = epoch_sampler(images, task, data.config.sampler, seed)
        images.set_epoch(epoch)
        order.set_epoch(epoch)
        return batches(images, order)

    def log(text: str) -> None:
        if console is not None:
            print_line(console, text)

    validation = None if val is None else partial(batches, val, None)
    return SelectionData(train_pass, validation, task.loss, log, task.has_one_class)


def store_selection(run: Path, method: str, model: nn.Module) -> None:
    """Save the parameters that a method selected, for resuming; no-op for methods without selection."""
    if find_method(method).needs_batches and not has_selection(run):
        save_trained(model, run / FOLDER)


def has_selection(run: Path) -> bool:
    """Return whether a run has a complete stored selection."""
    return (run / FOLDER / METHOD_FILE).is_file()


@dataclass
class RunComponents:
    """Data, model and task of a run, ready for training.

    Attributes:
        splits: Images with their transforms.
        model: Model from `build_method`.
        task: Task fitted to the training images.
        backbone: Record of the backbone.
        data_config: Preprocessing in timm's format.
        seed: Seed of the run.
        workers: Number of data loading processes.
        trained_part: The head, if the splits contain its precomputed inputs; None if the whole model is trained.
        probe_features: Pooled features of the probe images before training; set by `snella_app.training.linear_probe`.
        initial_layer_features: Features of several layers for the same images; None once the run trains the model.
    """

    splits: DataSplits
    model: nn.Module
    task: Task
    backbone: BackboneInfo
    data_config: dict[str, Any]
    seed: int = 0
    workers: int = 0
    trained_part: nn.Module | None = None
    probe_features: Tensor | None = None
    initial_layer_features: Tensor | None = None


def load(
    config: DataConfig, optim: OptimConfig, run: RunConfig, console: Console | None = None, source: Any = None
) -> LoadedData:
    """Load the images, from the dataset object `source` if given, and create the task.

    Raises:
        ValueError: If the batch size exceeds the number of training images, or data and task do not fit together.
    """
    started_at = time.monotonic()
    with show_reading(console if run.progress else None):
        splits = load_splits(config, run.seed, source)
    task = create_task(config.task, splits.classes, **optim.task_options())
    task.check_data(splits.train, str(config.spec))
    if optim.effective_batch_size < process_count():
        raise ValueError(
            f"batch_size must be at least the number of processes, {process_count()}, since they split each batch, "
            f"got {optim.effective_batch_size}"
        )
    task = task.fitted(splits.train)
    splits = encode_targets(splits, task)
    if optim.batch_size is None and len(splits.train) < DEFAULT_BATCH_SIZE:
        splits.notes.append(
            f"batch size reduced from {DEFAULT_BATCH_SIZE} to {len(splits.train)}, the number of training images"
        )
    elif isinstance(optim.batch_size, int) and len(splits.train) < optim.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(splits.train)} in {config.spec}, "
            f"got {optim.batch_size}; "
            f"pass --batch-size {len(splits.train)} or less, or add images"
        )
    return LoadedData(config, run.seed, splits, task, started_at, source, optim.effective_batch_size, run.progress)


def build(
    model: ModelConfig,
    method: MethodConfig,
    data: LoadedData,
    device: torch.device,
    resumed: Path | None = None,
    console: Console | None = None,
) -> RunComponents:
    """Create the backbone for loaded data, apply the method, and set the transforms.

    `data` is not modified, so components for several image sizes can coexist. `resumed` is the folder of the resumed or
    initial run; its stored selection is reused.

    Raises:
        ValueError: If data, model and method do not fit together.
        AdapterFileError: If the stored selection is damaged.
    """
    config, task, seed = data.config, data.task, data.seed
    info = BackboneInfo(
        name=str(model.backbone),
        weights=model.weights,
        pretrained=model.pretrained,
        img_size=model.img_size,
        num_classes=task.count_outputs(data.splits.classes),
        seed=seed,
        channels=config.channels,
    )
    backbone = make_backbone(info, config.task)
    if model.drop_path:
        set_drop_path(backbone, find_head(backbone, task.head), model.drop_path)
    data_config = get_protocol(config.protocol).data_config(
        resolve_data_config(backbone, model.img_size), is_resized_whole=data.splits.is_resized_whole
    )
    pretrained_config = getattr(backbone, "pretrained_cfg", None) or {}  # only timm models have one
    info = dataclasses.replace(info, architecture=pretrained_config.get("architecture") or None)
    augment: Any = task.augment if config.augment == "auto" else config.augment
    train_transform = build_transform(data_config, train=True, augment=augment, random_erasing=config.random_erasing)
    transform = build_transform(data_config, train=False, augment="none")
    parts = data.splits.parts
    sized = read_at_side(list(parts.values()), read_side(data_config, data.splits.train))
    transformed: dict[str, Any] = {
        name: part.with_transform(train_transform if name == "train" else transform)
        for name, part in zip(parts, sized, strict=True)
    }
    splits = dataclasses.replace(data.splits, **transformed)
    torch.manual_seed(seed)
    if resumed is not None and has_selection(resumed):
        adapted = load_trained(resumed / FOLDER, backbone).to(device)
    else:
        batches = None
        if find_method(method.name).needs_batches:
            train, val = _selection_images(method.name, data, splits, data_config)
            batches = selection_data(train, val, data, console)
            backbone.to(device)
        adapted = build_method(method.name, backbone, head=task.head, batches=batches, **method.all_options())
        adapted = adapted.to(device)
    if model.grad_checkpointing:
        checkpoint_gradients(adapted)
    return RunComponents(splits, adapted, task, info, data_config, seed, config.workers)


def load_initial_weights(parts: RunComponents, spec: str, run: RunFolder) -> None:
    """Load the trained weights of another run into the model of a new run; note different splits.

    Raises:
        ValueError: If the other run was trained on different classes.
        AdapterFileError: If its adapter is damaged or has different shapes.
    """
    info = read(RunInfo, run.path)
    classes = list(parts.splits.classes)
    if list(info.classes) != classes:
        raise ValueError(
            f"data must have the classes of init_from={run.path}, {list(info.classes)[:6]}, got {classes[:6]} in {spec}"
        )
    load_trained_into(parts.model, run.adapter)
    if not is_same_split(info.data, parts.splits):
        parts.splits.notes.append(
            f"{run.path} has different splits; its training images may include evaluation images of this run"
        )


def _selection_images(
    method: str, data: LoadedData, splits: DataSplits, data_config: dict[str, Any]
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return training and validation images for selection; if the protocol has none, of the standard protocol."""
    if splits.val is not None or not find_method(method).needs_validation:
        return splits.train, splits.val
    config = dataclasses.replace(data.config, protocol="standard")
    standard = load_splits(config, data.seed, data.source)
    standard = encode_targets(standard, create_task(config.task, standard.classes))
    transform = build_transform(data_config, train=False, augment="none")
    val = None if standard.val is None else standard.val.with_transform(transform)
    return standard.train.with_transform(splits.train.transform), val


def resolve_data_config(model: nn.Module, img_size: int | None) -> dict[str, Any]:
    """Return the model's mean, std, input size and interpolation as plain values; `img_size` overrides the size."""
    config = dict(timm.data.resolve_model_data_config(model))
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def read_side(data_config: Mapping[str, Any], images: ImageDataset) -> int | None:
    """Return the minimum shorter side of the images when read, for crops; None for images with masks."""
    return None if isinstance(images, MaskDataset) else _READ_MARGIN * int(data_config["input_size"][-1])
