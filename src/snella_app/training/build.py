"""Build the components of a training run: data and task (`load`), model (`build`), sampler, and optimizer.

Some methods first use images to select the parameters to train. This selection is stored in the run folder, and a
resumed run reuses it.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import timm.data
import torch
from peft import PeftModel
from rich.console import Console
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from snella_app.backbones.create import build_sized
from snella_app.backbones.local_files import with_local_files
from snella_app.config.sections import DEFAULT_BATCH_SIZE, MethodConfig, ModelConfig, OptimConfig, RunConfig
from snella_app.console import print_line, track_progress
from snella_app.data.datasets import ImageDataset, MaskDataset, read_at_side
from snella_app.data.load import DataSplits
from snella_app.data.options import DataConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.data.sources import show_reading
from snella_app.data.transforms import build_transform
from snella_app.methods import (
    SelectionData,
    build_method,
    find_method,
    load_trained,
    load_trained_into,
    method_of,
    save_trained,
    spec_of,
)
from snella_app.methods.model_parts import base_model, find_blocks, find_head, is_inside
from snella_app.methods.saving import METHOD_FILE
from snella_app.records.record import read
from snella_app.records.run import BackboneInfo, RunInfo
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import encode_targets, load_splits, splits_digest
from snella_app.runs.model import make_backbone
from snella_app.tasks import Task, create_task
from snella_app.text import listed
from snella_app.training.distributed import process_count

SELECTION = "selection"
"""Subfolder of a run for the selected parameters and their initial values."""
_READ_MARGIN = 4
"""Minimum length of the shorter side of decoded images, relative to the input size, so that square crops of 1/16 of the
area are not upsampled."""


@dataclass(frozen=True)
class LoadedData:
    """Images and task of a run.

    Attributes:
        config: Data configuration.
        seed: Seed of the run.
        splits: Images without transforms. Their targets are encoded, i.e. converted to the form that the loss needs.
        task: Task fitted to the training images.
        started_at: `time.monotonic()` at the start of loading.
        source: Dataset object that `config.spec` names; None if the data is loaded from the specification.
        batch_size: Batch size for passes over the images before training.
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


def mix_seed(*parts: int) -> int:
    """Combine several numbers into one seed.

    The seed is a multiplicative hash, with the constants of SplitMix64, so that neighboring inputs give unrelated
    seeds. It is less than 2⁶³.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63


class EpochSampler(Sampler[int]):
    """Sampler over `range(length)` in an order that depends only on the arguments and the epoch.

    Without weights, a sequence of random permutations is cut into epochs of `size` items. After any number of epochs,
    the numbers of occurrences of the items therefore differ by at most one. With weights, each epoch samples `size`
    items with replacement, with probabilities proportional to the weights.

    Args:
        length: Number of items.
        seed: Seed of the run.
        weights: Nonnegative weight per item. Without weights, the items are permuted.
        size: Number of items per epoch. Defaults to `length`.
    """

    def __init__(self, length: int, seed: int, weights: Sequence[float] | None = None, size: int | None = None) -> None:
        self.length = length
        self.size = length if size is None else size
        self.seed = seed
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.weights is not None:
            generator = self._generator(self.epoch)
            return iter(torch.multinomial(self.weights, self.size, replacement=True, generator=generator).tolist())
        start = self.epoch * self.size
        stop = (self.epoch + 1) * self.size
        # the permutations that overlap the epoch
        numbers = range(start // self.length, -(-stop // self.length))
        permutations = [torch.randperm(self.length, generator=self._generator(number)) for number in numbers]
        offset = numbers.start * self.length
        return iter(torch.cat(permutations)[start - offset : stop - offset].tolist())

    def _generator(self, number: int) -> torch.Generator:
        """Return the generator for the epoch or, if there are no weights, the permutation with this number."""
        return torch.Generator().manual_seed(mix_seed(self.seed, number))

    def __len__(self) -> int:
        return self.size


def epoch_sampler(train: ImageDataset, task: Task, sampler: str, seed: int, size: int | None = None) -> EpochSampler:
    """Return the sampler for the training images.

    `sampler` is the value of `DataConfig.sampler`. `size` is the number of images per epoch, by default all.
    """
    weights = task.sample_weights(train) if sampler == "weighted" else None
    return EpochSampler(len(train), seed, weights, size)


def selection_data(
    train: ImageDataset, val: ImageDataset | None, data: LoadedData, console: Console | None = None
) -> SelectionData:
    """Return the training and validation batches from which a method selects parameters.

    The batches are reproducible from the seed and never contain test images. Pass `k` over the training images uses the
    order and augmentation of epoch `k` of a run without `epoch_images`. Validation images keep their order. `console`,
    if given, shows messages and, with `data.shows_progress`, a progress bar.
    """
    pass_numbers = count()
    task = data.task
    seed = data.seed

    def batches(images: ImageDataset, order: EpochSampler | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of each batch; without `order`, the images keep their order."""
        loader = DataLoader(
            images,
            data.batch_size,
            sampler=order,
            collate_fn=task.collate,
            num_workers=data.config.workers,
            generator=torch.Generator().manual_seed(seed),  # leaves torch's global generator unchanged
        )
        progress_console = console if data.shows_progress else None
        tracked_loader = track_progress(loader, "selecting trainable weights", len(loader), progress_console)
        yield from ((batch["images"], batch["labels"]) for batch in tracked_loader)

    def train_pass() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = next(pass_numbers)
        images = train.with_transform(train.transform)  # a copy, so that the epoch of `train` does not change
        order = epoch_sampler(images, task, data.config.sampler, seed)
        images.set_epoch(epoch)
        order.set_epoch(epoch)
        return batches(images, order)

    def log(text: str) -> None:
        if console is not None:
            print_line(console, text)

    validation = None if val is None else partial(batches, val, None)
    return SelectionData(train_pass, validation, task.loss, log, task.has_class_scores)


def store_selection(run: Path, method: str, model: nn.Module) -> None:
    """Save the parameters that a method selected, so that a resumed run reuses them.

    Does nothing if the method selects no parameters, or if they are already stored.
    """
    if find_method(method).needs_batches and not has_selection(run):
        save_trained(model, run / SELECTION)


def has_selection(run: Path) -> bool:
    """Return whether a run has a stored selection."""
    return (run / SELECTION / METHOD_FILE).is_file()


@dataclass
class RunComponents:
    """Data, model, and task of a run, ready for training.

    Attributes:
        splits: Images with their transforms.
        model: Backbone with the method applied.
        task: Task fitted to the training images.
        backbone: Record of the backbone.
        data_config: Preprocessing in timm's format.
        seed: Seed of the run.
        workers: Number of data loading processes.
        trained_part: The head, if the splits contain its precomputed inputs; None if training runs the whole model.
        probe_features: Pooled features of the images for a linear probe, computed before training. Set by
            `snella_app.training.linear_probe`.
        initial_layer_features: Features of several layers for the same images. Reset to None before the model is
            trained, because training changes them.
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
        ValueError: If the batch size exceeds the number of training images or is below the number of processes, or if
            the data does not fit the task.

    Other errors as for `snella_app.data.load.load_data`.
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
    if isinstance(optim.batch_size, int) and len(splits.train) < optim.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(splits.train)} in {config.spec}, "
            f"got {optim.batch_size}; pass --batch-size {len(splits.train)} or less, or add images"
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

    `data` is not modified, so components for several image sizes can coexist. `resumed` is the folder of the run to
    resume or to start from. If it has a stored selection, this selection is reused.

    Raises:
        ValueError: If the data, the model, and the method do not fit together.
        AdapterFileError: If the stored selection is damaged.

    Other errors as for `snella_app.backbones.create.create_backbone`.
    """
    config = data.config
    task = data.task
    seed = data.seed
    info = BackboneInfo(
        name=str(model.backbone),
        weights=model.weights,
        pretrained=model.pretrained,
        img_size=model.img_size,
        num_classes=task.count_outputs(data.splits.classes),
        seed=seed,
        channels=config.channels,
    )
    backbone = build_sized(partial(make_backbone, info, config.task), info.name, model.img_size)
    if model.drop_path:
        set_drop_path(backbone, find_head(backbone, task.head), model.drop_path)
    data_config = PROTOCOLS[config.protocol].data_config(
        resolve_data_config(backbone, model.img_size), is_resized_whole=data.splits.is_resized_whole
    )
    pretrained_config = getattr(backbone, "pretrained_cfg", None) or {}  # only timm models have one
    info = dataclasses.replace(with_local_files(info), architecture=pretrained_config.get("architecture") or None)
    augment: Any = task.augment if config.augment == "auto" else config.augment
    train_transform = build_transform(data_config, augment=augment, random_erasing=config.random_erasing)
    transform = build_transform(data_config)
    datasets = data.splits.parts
    resized_datasets = read_at_side(list(datasets.values()), read_side(data_config, data.splits.train))
    transformed: dict[str, Any] = {}
    for name, dataset in zip(datasets, resized_datasets, strict=True):
        dataset_transform = train_transform if name == "train" else transform
        transformed[name] = dataset.with_transform(dataset_transform)
    splits = dataclasses.replace(data.splits, **transformed)
    torch.manual_seed(seed)
    if resumed is not None and has_selection(resumed):
        adapted = load_trained(resumed / SELECTION, backbone).to(device)
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


def set_drop_path(model: nn.Module, head: str, rate: float) -> None:
    """Set stochastic depth in place: the drop rate rises linearly from 0 in the first block to `rate` in the last.

    Raises:
        ValueError: If the backbone's blocks do not support stochastic depth.
    """
    blocks = find_blocks(model, head)
    num_replaced = 0
    for index, (_, block) in enumerate(blocks):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            # the default is not None, because `drop_path` is None in blocks of timm's ResNet, where it is also replaced
            if isinstance(getattr(block, name, ""), nn.Identity | DropPath | None):
                setattr(block, name, DropPath(rate * index / max(len(blocks) - 1, 1)))
                num_replaced += 1
    if not num_replaced:
        raise ValueError(
            f"drop_path needs a backbone with stochastic depth (drop path), got {type(model).__name__}; leave it out"
        )


def checkpoint_gradients(model: nn.Module) -> None:
    """Enable gradient checkpointing: the backward pass recomputes the backbone's blocks from their saved inputs.

    Raises:
        ValueError: If the backbone does not support gradient checkpointing.
    """
    base = base_model(model)
    for module in (base, getattr(base, "encoder", None)):  # segmentation models contain the backbone as `encoder`
        if callable(set_checkpointing := getattr(module, "set_grad_checkpointing", None)):
            try:
                set_checkpointing(True)
                return
            except AssertionError:  # timm models that do not support it also have the method
                break
    raise ValueError(
        f"grad_checkpointing needs a backbone that supports it, got {type(base).__name__}; leave it out and use a "
        "smaller --batch-size with --accumulate"
    )


def load_initial_weights(parts: RunComponents, spec: str, run: RunFolder) -> None:
    """Load the trained weights of another run into the model of a new run; add a note if the splits differ.

    Raises:
        ValueError: If the other run was trained on different classes.
        AdapterFileError: If the other run's adapter is damaged, or its tensors do not fit the model.
    """
    info = read(RunInfo, run.path)
    expected = list(info.classes)
    classes = list(parts.splits.classes)
    if expected != classes:
        different = listed(map(repr, sorted({*expected} ^ {*classes}))) or "their order"
        raise ValueError(
            f"data must have the classes of init_from={run.path}, {expected[:6]}, got {classes[:6]} in {spec}; the "
            f"{len(expected)} and {len(classes)} classes differ in {different}"
        )
    load_trained_into(parts.model, run.adapter)
    if info.data.digest != splits_digest(parts.splits):
        parts.splits.notes.append(
            f"{run.path} has different splits; its training images may include evaluation images of this run"
        )


def _selection_images(
    method: str, data: LoadedData, splits: DataSplits, data_config: dict[str, Any]
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training images and, if there are any, the validation images from which a method selects parameters.

    If the method needs validation images and the protocol provides none, both come from the `standard` protocol.
    """
    if splits.val is not None or not find_method(method).needs_validation:
        return splits.train, splits.val
    config = dataclasses.replace(data.config, protocol="standard")
    standard = load_splits(config, data.seed, data.source)
    standard = encode_targets(standard, create_task(config.task, standard.classes))
    parts = [standard.train] if standard.val is None else [standard.train, standard.val]
    train, *validation = read_at_side(parts, read_side(data_config, standard.train))
    transform = build_transform(data_config)
    val = validation[0].with_transform(transform) if validation else None
    return train.with_transform(splits.train.transform), val


def resolve_data_config(model: nn.Module, img_size: int | None) -> dict[str, Any]:
    """Return the model's preprocessing in timm's format, as values that JSON can represent.

    `img_size`, if given, replaces the model's input size.
    """
    config = dict(timm.data.resolve_model_data_config(model))
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    json_config: dict[str, Any] = {}
    for key, value in config.items():
        json_config[key] = list(value) if isinstance(value, tuple) else value
    return json_config


def read_side(data_config: Mapping[str, Any], images: ImageDataset) -> int | None:
    """Return the minimum length of the shorter side of decoded images, in pixels; see `_READ_MARGIN`.

    Returns None for images with masks, which are decoded at full resolution.
    """
    return None if isinstance(images, MaskDataset) else _READ_MARGIN * int(data_config["input_size"][-1])


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    scalar_lr: float | None = None,
    layer_decay: float | None = None,
) -> Optimizer:
    """Build AdamW for all trainable parameters.

    Weight decay applies only to parameters with two or more dimensions. A method with `Method.optimizer` builds its own
    parameter groups.

    Args:
        model: Model from `build_method`.
        lr: Learning rate of the method's parameters.
        head_lr: Learning rate of the head. Defaults to `lr`.
        weight_decay: Weight decay of matrices.
        scalar_lr: Learning rate of the scalar kernel parameters. None selects the default of `Method.optimizer`.
        layer_decay: Factor by which the learning rate is multiplied for each later layer; None for no decay.

    Raises:
        ValueError: If no parameter is trainable, or `layer_decay` is set for a model without timm's layer numbers.
    """
    head_lr = lr if head_lr is None else head_lr
    scalars = {} if scalar_lr is None else {"scalar_lr": scalar_lr}
    method = method_of(model)
    if method is not None and method.optimizer is not None:
        rates = {"lr": lr, "head_lr": head_lr, "weight_decay": weight_decay, **scalars}
        optimizer = method.optimizer(model, torch.optim.AdamW, **rates)
    else:
        optimizer = torch.optim.AdamW(_parameter_groups(model, lr, head_lr, weight_decay))
    if layer_decay is not None:
        _decay_rates(optimizer, model, layer_decay)
    return optimizer


def _parameter_groups(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by location (head or backbone) and by whether they have several dimensions."""
    head = ("base_model.model." if isinstance(model, PeftModel) else "") + spec_of(model).head
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_inside(name, head), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError(f"method {spec_of(model).name!r} has no trainable parameters in {type(model).__name__}")
    optimizer_groups: list[dict[str, Any]] = []
    for (in_head, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0]):
        group_lr = head_lr if in_head else lr
        group_decay = weight_decay if is_matrix else 0.0
        optimizer_groups.append({"params": parameters, "lr": group_lr, "weight_decay": group_decay})
    return optimizer_groups


def _decay_rates(optimizer: Optimizer, model: nn.Module, decay: float) -> None:
    """Split each parameter group by timm's layer numbers, with learning rates `lr · decay^(number of later layers)`.

    Parameters without a layer number keep the learning rate of their group.
    """
    base = base_model(model)
    if not callable(getattr(base, "group_matcher", None)):
        raise ValueError(
            f"layer_decay needs a timm model with numbered layers, got {type(base).__name__}; leave it out"
        )
    numbers = group_parameters(base, base.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(numbers.values())
    later_layers = {
        id(parameter): last - numbers[name] for name, parameter in base.named_parameters() if name in numbers
    }
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_num_later: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_num_later.setdefault(later_layers.get(id(parameter), 0), []).append(parameter)
        for num_later, parameters in sorted(by_num_later.items()):
            groups.append({**group, "params": parameters, "lr": group["lr"] * decay**num_later})
    optimizer.param_groups[:] = groups
