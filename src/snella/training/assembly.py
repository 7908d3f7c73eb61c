"""From settings to data, model and task."""

from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from torch import nn

from snella.backbones import create_backbone
from snella.data import DataSplits, build_transform, load_data
from snella.methods import build_method
from snella.tasks import ClassificationTask
from snella.training.config import DEFAULT_BATCH_SIZE, TrainConfig
from snella.training.console import counted


@dataclass
class Assembly:
    """All parts of a run, ready to train."""

    splits: DataSplits
    model: nn.Module
    task: ClassificationTask
    backbone: dict[str, Any]
    data_config: dict[str, Any]


def assemble(config: TrainConfig) -> Assembly:
    """Load the data, create the backbone and make it trainable.

    Args:
        config: Resolved settings.

    Raises:
        ValueError: Fewer training images than a batch, or whatever the parts refuse.
    """
    device = choose_device(config.device)
    splits = load_splits(config)
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
    backbone = make_backbone(wanted)
    data_config = data_config_of(backbone, config.img_size)
    described = {**wanted, "architecture": architecture_of(backbone)}
    torch.manual_seed(config.seed)
    model = build_method(config.method, backbone, **config.options_of_method()).to(device)
    train_transform = build_transform(data_config, train=True, augment=config.augment)
    transform = build_transform(data_config, train=False, augment="none")
    splits.train = splits.train.with_transform(train_transform)
    splits.val = splits.val.with_transform(transform)
    splits.test = None if splits.test is None else splits.test.with_transform(transform)
    task = ClassificationTask(len(splits.classes), config.label_smoothing)
    return Assembly(splits, model, task, described, data_config)


def load_splits(config: TrainConfig) -> DataSplits:
    """The images that settings name, split as they say; the same ones every time while the files are the same."""
    return load_data(
        str(config.data),
        seed=config.seed,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        train_size=config.train_size,
        val_size=config.val_size,
        test_size=config.test_size,
        skip_broken=config.skip_broken,
    )


def make_backbone(backbone: dict[str, Any]) -> nn.Module:
    """Create the backbone that `run.json` describes; what is not pre-trained in it comes from the run's seed."""
    torch.manual_seed(backbone["seed"])
    return create_backbone(
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
