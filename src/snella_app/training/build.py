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
"""Folder of a run with the selected structure and its initial values."""
_READ_MARGIN = 4
"""Sides of the model's input that an image is read at, at least: a crop of a sixteenth of it is still as large."""


def epoch_sampler(train: ImageDataset, task: Task, config: TrainConfig) -> EpochSampler:
    """The order of a run's training images."""
    weights = task.sample_weights(train) if config.sampler == "weighted" else None
    return EpochSampler(len(train), config.seed, weights)


def selection_data(
    train: ImageDataset, val: ImageDataset | None, task: Task, config: TrainConfig, console: Console | None = None
) -> SelectionData:
    """Training and validation batches, the same for the same seed, and never test images.

    Pass number `k` over the training images has the order and the augmentation of the run's own epoch `k`; validation
    images come in their order.

    Args:
        train: Training images with the run's transform.
        val: Validation images with theirs; None where there are none.
        task: Makes batches, and has the loss.
        config: Batch size, seed and workers.
        console: Where progress is shown; None for nowhere.
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
            generator=torch.Generator().manual_seed(config.seed),  # or a pass would draw from torch's own numbers
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
    """Store the structure that a method has selected, so that a resumed run reuses it; nothing for other methods.

    Args:
        run: Folder of the run.
        method: Name of the method.
        model: As `build_method` made it.
    """
    if find_method(method).needs_batches and not has_selection(run):
        save_trained(model, run / FOLDER)


def has_selection(run: Path) -> bool:
    """Whether a run has stored a complete selection."""
    return (run / FOLDER / METHOD_FILE).is_file()


def restore_selection(run: Path, backbone: nn.Module) -> nn.Module:
    """The backbone with the stored selection of a run, at its initial values.

    Raises:
        AdapterFileError: The stored selection is damaged.
    """
    return load_trained(run / FOLDER, backbone)


@dataclass
class RunComponents:
    """All parts of a run, ready to train.

    Attributes:
        splits: The images with their transforms.
        model: From `build_method`.
        task: Fitted to the training images.
        backbone: What the model was built of.
        data_config: Preprocessing, as timm names it.
        probe_features: Features of training images before training; set by `snella_app.training.linear_probe`.
        start_layers: Features of several layers of the same images; None once the model is trained.
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
    """Load the data, create the backbone and make it trainable.

    Args:
        config: Resolved settings.
        resumed: Folder of the run to resume, or to start from: its stored selection is reused.
        console: Where the progress of a selection is shown; None for nowhere.
        data: Object that `config.data` is a name of.

    Raises:
        ValueError: Fewer training images than a batch, or whatever the parts refuse.
    """
    device = choose_device(config.device)
    if config.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"precision must be fp32 or bf16 on device {device.type!r}, got 'fp16', which is for GPUs; leave it out"
        )
    with show_reading(console, config.progress):
        splits = load_splits(config, data)
    task = create_task(config.task, splits.classes, **config.as_dict())
    task.check_data(splits.train, str(config.data))
    if config.effective_batch_size < process_count():
        raise ValueError(
            f"batch_size must be at least the number of processes, {process_count()}, which share each batch, "
            f"got {config.effective_batch_size}"
        )
    task = task.fitted(splits.train, splits.classes)
    splits = encoded(splits, task)
    if config.batch_size is None and len(splits.train) < DEFAULT_BATCH_SIZE:
        splits.notes.append(
            f"all {counted(len(splits.train), 'training image')} in one batch, instead of {DEFAULT_BATCH_SIZE} images"
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
    """Create the backbone for data that is loaded, make it trainable, and give the images its transforms.

    The splits stay as they are: parts of several image sizes may stand side by side.

    Args:
        config: Resolved settings.
        splits: The data, encoded for the task.
        task: Fitted to it.
        resumed: As for `build_components`, as are the others.
        console: Where the progress of a selection is shown; None for nowhere.
        data: Object that `config.data` is a name of.
    """
    device = choose_device(config.device)
    wanted = BackboneInfo(
        name=str(config.backbone),
        weights=config.weights,
        pretrained=config.pretrained,
        img_size=config.img_size,
        num_classes=task.count_outputs(splits.classes),
        seed=config.seed,
        channels=config.channels,
    )
    backbone = make_backbone(wanted, config.task)
    if config.drop_path:
        set_drop_path(backbone, find_head(backbone, task.head), config.drop_path)
    data_config = get_protocol(config.protocol).data_config(
        resolve_data_config(backbone, config.img_size), is_resized_whole=splits.is_resized_whole
    )
    described = dataclasses.replace(wanted, architecture=architecture_name(backbone))
    augment: Any = task.augment if config.augment == "auto" else config.augment
    train_transform = build_transform(data_config, train=True, augment=augment, random_erasing=config.random_erasing)
    transform = build_transform(data_config, train=False, augment="none")
    by_name = parts_of(splits)
    read = dict(zip(by_name, read_at_side(list(by_name.values()), read_side(data_config, splits.train)), strict=True))
    transforms = {"train": train_transform, "val": transform, "test": transform}
    changed: dict[str, Any] = {name: part.with_transform(transforms[name]) for name, part in read.items()}
    splits = dataclasses.replace(splits, **changed)
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
    return RunComponents(splits, model, task, described, data_config)


def load_start(parts: RunComponents, config: TrainConfig, run: RunFolder) -> None:
    """Give a new run's model the values that another run has trained.

    Args:
        parts: Of the new run. A note says so where images of the other run may be measured on.
        config: Settings of the new run, from `RunFolder.start_settings`.
        run: The other run.

    Raises:
        ValueError: It was trained for other classes.
        AdapterFileError: Its adapter is damaged, or of other shapes; names the tensor.
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
            f"{run.path} was trained on other images than this run; what is measured here may be among them"
        )


def _images_to_choose_from(
    config: TrainConfig, splits: DataSplits, transform: Callable[[Image.Image], Any], data: Any
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images for a method that chooses what is trained.

    A protocol that learns from the validation images too leaves none to compare candidates on. They are then compared
    on those of the standard protocol, and with training images that these are no part of; never on test images.
    """
    if splits.val is not None or not find_method(config.method).needs_validation:
        return splits.train, splits.val
    apart = load_splits(dataclasses.replace(config, protocol="standard"), data)
    apart = encoded(apart, create_task(config.task, apart.classes))
    val = None if apart.val is None else apart.val.with_transform(transform)
    return apart.train.with_transform(splits.train.transform), val


def resolve_data_config(model: nn.Module, img_size: int | None) -> dict[str, Any]:
    """The model's own mean, std, size and interpolation as plain values, with `img_size` if given."""
    config = dict(timm.data.resolve_model_data_config(model))
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def read_side(data_config: Mapping[str, Any], images: ImageDataset) -> int | None:
    """What the shorter side of a run's images keeps at least, for crops; None for images with masks."""
    return None if isinstance(images, MaskDataset) else _READ_MARGIN * int(data_config["input_size"][-1])


def architecture_name(model: nn.Module) -> str | None:
    """The name under which timm creates such a model; None for models of other origin."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    return str(name) if name else None
