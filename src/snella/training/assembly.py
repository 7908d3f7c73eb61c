"""From settings to data, model and task."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from snella.data import DataSplits, ImageDataset, build_transform, load_data
from snella.methods import build_method, find_method
from snella.tasks import Task, create_task, task_class
from snella.training.config import DEFAULT_BATCH_SIZE, TrainConfig
from snella.training.console import counted
from snella.training.protocol import protocol_of
from snella.training.selection import has_selection, restore_selection, selection_data


@dataclass
class Assembly:
    """All parts of a run, ready to train."""

    splits: DataSplits
    model: nn.Module
    task: Task
    backbone: dict[str, Any]
    data_config: dict[str, Any]


def assemble(config: TrainConfig, resumed: Path | None = None, console: Console | None = None) -> Assembly:
    """Load the data, create the backbone and make it trainable.

    Args:
        config: Resolved settings.
        resumed: Folder of the run that goes on: what its method has chosen from data is not chosen again.
        console: Where the progress of such a choice is shown; None for nowhere.

    Raises:
        ValueError: Fewer training images than a batch, or whatever the parts refuse.
    """
    device = choose_device(config.device)
    splits = load_splits(config)
    task = create_task(config.task, splits.classes, **config.as_dict())
    task.check_data(splits.train, str(config.data))
    if config.batch_size is None and len(splits.train) < DEFAULT_BATCH_SIZE:
        splits.notes.append(
            f"all {counted(len(splits.train), 'training image')} in one batch, instead of {DEFAULT_BATCH_SIZE} images"
        )
    elif len(splits.train) < config.images_per_step:
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(splits.train)} in {config.data}, "
            f"got {config.batch_size}; "
            f"pass --batch-size {len(splits.train)} or less, or add images"
        )
    wanted = {
        "name": config.backbone,
        "weights": config.weights,
        "pretrained": config.pretrained,
        "img_size": config.img_size,
        "num_classes": len(splits.classes),
        "seed": config.seed,
    }
    backbone = make_backbone(wanted, config.task)
    data_config = protocol_of(config.protocol).data_config(
        data_config_of(backbone, config.img_size), is_resized_whole=splits.is_resized_whole
    )
    described = {**wanted, "architecture": architecture_of(backbone)}
    train_transform = build_transform(data_config, train=True, augment=config.augment)
    transform = build_transform(data_config, train=False, augment="none")
    splits.train = splits.train.with_transform(train_transform)
    splits.val = None if splits.val is None else splits.val.with_transform(transform)
    splits.test = None if splits.test is None else splits.test.with_transform(transform)
    torch.manual_seed(config.seed)
    if resumed is not None and has_selection(resumed):
        model = restore_selection(resumed, backbone).to(device)
    else:
        data = None
        if find_method(config.method).needs_batches:
            train, val = _images_to_choose_from(config, splits, transform)
            data = selection_data(train, val, task, config, console)
            backbone.to(device)
        model = build_method(config.method, backbone, head=task.head, batches=data, **config.options_of_method())
        model = model.to(device)
    return Assembly(splits, model, task, described, data_config)


def _images_to_choose_from(
    config: TrainConfig, splits: DataSplits, transform: Callable[[Image.Image], Any]
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images for a method that chooses what is trained.

    A protocol that learns from the validation images too leaves none to compare candidates on. They are then compared
    on those of the standard protocol, and with training images that these are no part of; never on test images.
    """
    if splits.val is not None or not find_method(config.method).needs_validation:
        return splits.train, splits.val
    apart = load_splits(dataclasses.replace(config, protocol="standard"))
    val = None if apart.val is None else apart.val.with_transform(transform)
    return apart.train.with_transform(splits.train.transform), val


def load_splits(config: TrainConfig) -> DataSplits:
    """The images that settings name, split as they say; the same ones every time while the files are the same."""
    return load_data(
        str(config.data),
        seed=config.seed,
        test_seed=config.test_seed,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        train_size=config.train_size,
        val_size=config.val_size,
        test_size=config.test_size,
        skip_broken=config.skip_broken,
        check_sizes=config.check_sizes,
        protocol=config.protocol,
    )


def make_backbone(backbone: dict[str, Any], task: str = "classification") -> nn.Module:
    """Create the model that `run.json` describes; what is not pre-trained in it comes from the run's seed."""
    torch.manual_seed(backbone["seed"])
    return task_class(task).build_model(
        backbone["name"],
        num_classes=backbone["num_classes"],
        weights=backbone["weights"],
        pretrained=backbone["pretrained"],
        img_size=backbone["img_size"],
    )


def data_config_of(model: nn.Module, img_size: int | None) -> dict[str, Any]:
    """The model's own mean, std, size and interpolation as plain values, with the size that was asked for."""
    config = dict(timm.data.resolve_model_data_config(model))
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def architecture_of(model: nn.Module) -> str | None:
    """The name under which timm creates such a model; None for models of other origin."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    return str(name) if name else None


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here.

    Raises:
        ValueError: `cuda` without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be usable here, got {name!r}, but torch {torch.__version__} sees no GPU; leave it at auto"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
