"""Components of a training: data, model and task, from a configuration."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snella_app.config import DEFAULT_BATCH_SIZE, TrainConfig
from snella_app.console import counted, print_line
from snella_app.data import DataSplits, ImageDataset, build_transform
from snella_app.data.datasets import MaskDataset, read_at_side, show_reading
from snella_app.data.protocol import get_protocol
from snella_app.device import choose_device
from snella_app.methods import SelectionData, build_method, find_method, load_trained, load_trained_into, save_trained
from snella_app.methods.model_parts import find_head
from snella_app.methods.saving import METHOD_FILE
from snella_app.records import BackboneInfo, RunInfo, read
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import encoded, is_same_split, load_splits, parts_of
from snella_app.runs.model import make_backbone
from snella_app.tasks import Task, create_task
from snella_app.training.distributed import process_count
from snella_app.training.optimizer import checkpoint_gradients, set_drop_path
from snella_app.training.sampler import EpochSampler

FOLDER = "selection"
"""Subfolder of a run for the selected parameters and their initial values."""
_READ_MARGIN = 4
"""Minimum shorter side when reading an image, in input sizes; a crop of 1/16 of its area then needs no upsampling."""


def epoch_sampler(train: ImageDataset, task: Task, config: TrainConfig) -> EpochSampler:
    """Return the sampler of the training images."""
    weights = task.sample_weights(train) if config.sampler == "weighted" else None
    return EpochSampler(len(train), config.seed, weights)


def selection_data(
    train: ImageDataset, val: ImageDataset | None, task: Task, config: TrainConfig, console: Console | None = None
) -> SelectionData:
    """Return training and validation batches for parameter selection, reproducible from the seed; never test images.

    Pass `k` over the training images uses the order and augmentation of epoch `k` of the run. Validation images keep
    their order.

    Args:
        train: Training images with the run's transform.
        val: Validation images with the evaluation transform, if available.
        task: Task with collate function and loss.
        config: Settings with batch size, seed and number of workers.
        console: Output console for progress; None shows none.
    """
    passes = count()
    show = config.progress and console is not None and console.is_terminal

    def batches(images: ImageDataset, order: EpochSampler | None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            images,
            config.effective_batch_size,
            sampler=order,
            collate_fn=task.collate,
            num_workers=config.workers,
            generator=torch.Generator().manual_seed(config.seed),  # leaves torch's global generator unchanged
        )
        steps = track(loader, "selecting trainable weights", console=console, transient=True) if show else loader
        yield from ((batch["images"], batch["labels"]) for batch in steps)

    def train_pass() -> Iterator[tuple[Tensor, Tensor]]:
        epoch, images = next(passes), train.with_transform(train.transform)
        order = epoch_sampler(images, task, config)
        images.set_epoch(epoch)
        order.set_epoch(epoch)
        return batches(images, order)

    def say(text: str) -> None:
        if console is not None:
            print_line(console, text)

    validation = None if val is None else partial(batches, val, None)
    return SelectionData(train_pass, validation, task.loss, say, task.has_one_class)


def store_selection(run: Path, method: str, model: nn.Module) -> None:
    """Save the parameters that a method selected, for resuming; no-op for methods without selection.

    Args:
        run: Run folder.
        method: Method name.
        model: Model from `build_method`.
    """
    if find_method(method).needs_batches and not has_selection(run):
        save_trained(model, run / FOLDER)


def has_selection(run: Path) -> bool:
    """Return whether a run has a complete stored selection."""
    return (run / FOLDER / METHOD_FILE).is_file()


def restore_selection(run: Path, backbone: nn.Module) -> nn.Module:
    """Apply the stored selection of a run to the backbone, with its initial values.

    Raises:
        AdapterFileError: If the stored selection is damaged.
    """
    return load_trained(run / FOLDER, backbone)


@dataclass
class RunComponents:
    """Data, model and task of a run, ready for training.

    Attributes:
        splits: Images with their transforms.
        model: Model from `build_method`.
        task: Task fitted to the training images.
        backbone: Record of the backbone.
        data_config: Preprocessing in timm's format.
        probe_features: Features of training images before training; set by `snella_app.training.linear_probe`.
        start_layers: Features of several layers for the same images; None if the run trains the model.
    """

    splits: DataSplits
    model: nn.Module
    task: Task
    backbone: BackboneInfo
    data_config: dict[str, Any]
    probe_features: Tensor | None = None
    start_layers: Tensor | None = None


def build_components(
    config: TrainConfig, resumed: Path | None = None, console: Console | None = None, data: Any = None
) -> RunComponents:
    """Load the data, create the backbone and apply the method.

    Args:
        config: Resolved settings.
        resumed: Folder of the resumed or initial run, whose stored selection is reused.
        console: Output console for selection progress; None shows none.
        data: Object named by `config.data`.

    Raises:
        ValueError: If the batch size exceeds the number of training images, or data, model and settings do not fit
            together.
    """
    device = choose_device(config.device)
    if config.precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision must be fp32 or bf16 on device {device.type!r}, got 'fp16'; fp16 requires a GPU")
    with show_reading(console, config.progress):
        splits = load_splits(config, data)
    task = create_task(config.task, splits.classes, **config.as_dict())
    task.check_data(splits.train, str(config.data))
    if config.effective_batch_size < process_count():
        raise ValueError(
            f"batch_size must be at least the number of processes, {process_count()}, since they split each batch, "
            f"got {config.effective_batch_size}"
        )
    task = task.fitted(splits.train, splits.classes)
    splits = encoded(splits, task)
    if config.batch_size is None and len(splits.train) < DEFAULT_BATCH_SIZE:
        splits.notes.append(
            f"batch size reduced from {DEFAULT_BATCH_SIZE} to {len(splits.train)}, the number of training images"
        )
    elif isinstance(config.batch_size, int) and len(splits.train) < config.effective_batch_size:
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(splits.train)} in {config.data}, "
            f"got {config.batch_size}; "
            f"pass --batch-size {len(splits.train)} or less, or add images"
        )
    if config.channels != 3:
        splits.notes.append(
            f"the first convolution of {config.backbone} is adapted from 3 to {counted(config.channels, 'channel')}"
        )
    return assemble(config, splits, task, resumed, console, data)


def assemble(
    config: TrainConfig,
    splits: DataSplits,
    task: Task,
    resumed: Path | None = None,
    console: Console | None = None,
    data: Any = None,
) -> RunComponents:
    """Create the backbone for loaded data, apply the method, and set the transforms.

    `splits` is not modified, so components for several image sizes can coexist.

    Args:
        config: Resolved settings.
        splits: Data encoded for the task.
        task: Task fitted to the data.
        resumed: See `build_components`.
        console: See `build_components`.
        data: See `build_components`.
    """
    device = choose_device(config.device)
    info = BackboneInfo(
        name=str(config.backbone),
        weights=config.weights,
        pretrained=config.pretrained,
        img_size=config.img_size,
        num_classes=task.count_outputs(splits.classes),
        seed=config.seed,
        channels=config.channels,
    )
    backbone = make_backbone(info, config.task)
    if config.drop_path:
        set_drop_path(backbone, find_head(backbone, task.head), config.drop_path)
    data_config = get_protocol(config.protocol).data_config(
        resolve_data_config(backbone, config.img_size), is_resized_whole=splits.is_resized_whole
    )
    info = dataclasses.replace(info, architecture=architecture_name(backbone))
    augment: Any = task.augment if config.augment == "auto" else config.augment
    train_transform = build_transform(data_config, train=True, augment=augment, random_erasing=config.random_erasing)
    transform = build_transform(data_config, train=False, augment="none")
    by_name = parts_of(splits)
    read = dict(zip(by_name, read_at_side(list(by_name.values()), read_side(data_config, splits.train)), strict=True))
    transforms = {"train": train_transform, "val": transform, "test": transform}
    transformed: dict[str, Any] = {name: part.with_transform(transforms[name]) for name, part in read.items()}
    splits = dataclasses.replace(splits, **transformed)
    torch.manual_seed(config.seed)
    if resumed is not None and has_selection(resumed):
        model = restore_selection(resumed, backbone).to(device)
    else:
        batches = None
        if find_method(config.method).needs_batches:
            train, val = _images_to_choose_from(config, splits, transform, data)
            batches = selection_data(train, val, task, config, console)
            backbone.to(device)
        model = build_method(config.method, backbone, head=task.head, batches=batches, **config.options_of_method())
        model = model.to(device)
    if config.grad_checkpointing:
        checkpoint_gradients(model)
    return RunComponents(splits, model, task, info, data_config)


def load_start(parts: RunComponents, config: TrainConfig, run: RunFolder) -> None:
    """Load the trained weights of another run into the model of a new run.

    Args:
        parts: Components of the new run. A note is added if its splits differ from the other run's.
        config: Settings of the new run, from `RunFolder.start_settings`.
        run: The other run.

    Raises:
        ValueError: If the other run was trained on different classes.
        AdapterFileError: If its adapter is damaged or has different shapes; names the tensor.
    """
    info = read(RunInfo, run.path)
    classes = list(parts.splits.classes)
    if list(info.classes) != classes:
        raise ValueError(
            f"data must have the classes of init_from={run.path}, {list(info.classes)[:6]}, got "
            f"{classes[:6]} in {config.data}"
        )
    load_trained_into(parts.model, run.adapter)
    if not is_same_split(info.data, parts.splits):
        parts.splits.notes.append(
            f"{run.path} has different splits; its training images may include evaluation images of this run"
        )


def _images_to_choose_from(
    config: TrainConfig, splits: DataSplits, transform: Callable[[Image.Image], Any], data: Any
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return training and validation images for a method that selects its trained parameters.

    A protocol that trains on the validation images leaves none to compare candidates. Training and validation images
    then come from the standard protocol. Test images are never used.
    """
    if splits.val is not None or not find_method(config.method).needs_validation:
        return splits.train, splits.val
    standard = load_splits(dataclasses.replace(config, protocol="standard"), data)
    standard = encoded(standard, create_task(config.task, standard.classes))
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


def architecture_name(model: nn.Module) -> str | None:
    """Return timm's name of the architecture; None for models from other libraries."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    return str(name) if name else None
