"""Components of a run: data, model and task, built from a configuration or loaded from a run folder."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from snella.data import (
    DataSplits,
    ImageDataset,
    build_transform,
    data_folder,
    load_data,
    split_spec,
    with_class_order,
)
from snella.data.datasets import MaskDataset, read_at_side
from snella.data.images import FULL_WHITE, Reading
from snella.data.table import TABLE_SUFFIXES
from snella.methods import SelectionData, build_method, find_method, load_trained, load_trained_into, save_trained
from snella.methods.model_parts import find_head
from snella.methods.saving import METHOD_FILE
from snella.records import BackboneInfo, DataInfo, FoldResults, RunInfo, read, read_if_present
from snella.runs.config import DEFAULT_BATCH_SIZE, TrainConfig
from snella.runs.console import counted, print_line, show_reading
from snella.runs.distributed import process_count
from snella.runs.folder import RunFolder
from snella.runs.optimizer import checkpoint_gradients, set_drop_path
from snella.runs.protocol import get_protocol
from snella.runs.sampler import EpochSampler
from snella.tasks import Task, create_task, task_class, task_names

PARTS = ("train", "val", "test")
_READ_MARGIN = 4
"""Sides of the model's input that an image is read at, at least: a crop of a sixteenth of it is still as large."""


def splits_digest(splits: DataSplits) -> str:
    """SHA-256 of the classes and of the ordered names and labels of all splits; independent of the folder's path."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    named = {key: None if part is None else [part.names, part.labels] for key, part in parts.items()}
    known = {key: part.annotations.plain() for key, part in parts.items() if part is not None}
    if any(known.values()):
        return hashlib.sha256(json.dumps([splits.classes, named, known]).encode()).hexdigest()
    return hashlib.sha256(json.dumps([splits.classes, named]).encode()).hexdigest()


def contents_of(splits: DataSplits, names: Collection[str] = PARTS) -> dict[str, str]:
    """SHA-256 of the images of each split; missing splits are left out."""
    return {name: part.content_digest() for name, part in parts_of(splits).items() if name in names}


def parts_of(splits: DataSplits) -> dict[str, ImageDataset]:
    """The existing splits, by name."""
    return {name: part for name in PARTS if (part := getattr(splits, name)) is not None}


def split_sizes(splits: DataSplits) -> dict[str, int]:
    """Number of images in each split."""
    return {
        "train": len(splits.train),
        "val": 0 if splits.val is None else len(splits.val),
        "test": 0 if splits.test is None else len(splits.test),
    }


def absolute_folder(spec: str) -> str | None:
    """The absolute path of `folder:PATH` and the like; None for other data."""
    folder = data_folder(spec)
    return None if folder is None else str(folder.resolve())


def is_same_split(data: DataInfo, splits: DataSplits) -> bool:
    """Whether these are the splits of a run's data; True for old runs, which have no digest."""
    return data.digest in (None, splits_digest(splits))


def changed_parts(data: DataInfo, splits: DataSplits, names: Collection[str] = PARTS) -> list[str]:
    """The parts whose images have other contents than a run says of its data; none for old runs."""
    stored = data.contents
    return [name for name, digest in contents_of(splits, set(names) & set(stored)).items() if digest != stored[name]]


def check_splits(run: Path, data: DataInfo | None, splits: DataSplits, names: Collection[str] = PARTS) -> None:
    """Compare the images as they are now with those that the run was split from.

    Args:
        run: The run's folder, for the message.
        data: What the run says of its data; None, and old runs, which do not tell, pass.
        splits: From the run's own settings.
        names: The parts whose contents are compared, as those of all parts would have to be read.

    Raises:
        ValueError: They differ; names both sizes and the remedy.
    """
    if data is None:
        return
    if not is_same_split(data, splits):
        then, now = _counts(data.sizes), _counts(split_sizes(splits))
        files = "the same numbers of other files" if then == now else now
        raise ValueError(
            f"data must hold the images that {run} was split from, {then}, got {files} in {data.spec}: "
            "files were added, removed or renamed, and a new split would evaluate on training images; restore "
            "them, evaluate on other images with --data, or train a new run"
        )
    changed = changed_parts(data, splits, names)
    if changed:
        raise ValueError(
            f"data must hold the images that {run} was split from, got files of the same names with other contents in "
            f"{data.spec} ({', '.join(changed)}): images were replaced or saved again; restore them, measure on "
            "images of your own with evaluate --data, or train a new run"
        )


def find_data(run: Path, spec: str, absolute: str | None) -> str:
    """The specification under which a run's images are found now.

    Args:
        run: The run's folder, for the message.
        spec: As training had it.
        absolute: The folder that it stood for then; None for other data.

    Returns:
        `spec`, or with `absolute` in place of its folder.

    Raises:
        FileNotFoundError: The folder is in neither place.
    """
    prefix, path = split_spec(spec)
    folder = data_folder(spec)
    if folder is None or folder.exists():
        return spec
    if absolute and Path(absolute).exists():
        return f"{prefix}{absolute}"
    kind = "file" if folder.suffix in TABLE_SUFFIXES else "folder"
    places = spec if absolute in (None, path) else f"{spec} (then {absolute})"
    raise FileNotFoundError(
        f"data must be where {run} had it, {places}, but no {kind} is there; pass its new place with --data {prefix}NEW"
    )


def _counts(sizes: Mapping[str, int]) -> str:
    """Sizes, human-readable."""
    return ", ".join(f"{name} {count}" for name, count in sizes.items())


def epoch_sampler(train: ImageDataset, task: Task, config: TrainConfig) -> EpochSampler:
    """The order of a run's training images."""
    weights = task.sample_weights(train) if config.sampler == "weighted" else None
    return EpochSampler(len(train), config.seed, weights)


FOLDER = "selection"
"""Folder of a run with the selected structure and its initial values."""


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

    validation: Callable[[], Iterator[tuple[Tensor, Tensor]]] | None = None
    if val is not None:
        validation = lambda: batches(val, None)  # noqa: E731
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
    """All parts of a run, ready to train."""

    splits: DataSplits
    model: nn.Module
    task: Task
    backbone: BackboneInfo
    data_config: dict[str, Any]


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
    train_transform = build_transform(
        data_config, train=True, augment=config.augment, random_erasing=config.random_erasing
    )
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


def load_splits(config: TrainConfig, data: Any = None) -> DataSplits:
    """The splits of a configuration, or of the object it names; the same every time while the files are the same."""
    task = task_class(config.task)
    splits = load_data(
        str(config.data) if data is None else data,
        seed=config.seed,
        test_seed=config.test_seed,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        train_size=config.train_size,
        val_size=config.val_size,
        test_size=config.test_size,
        skip_corrupt=config.skip_corrupt,
        strict_sizes=config.strict_sizes,
        protocol=config.protocol,
        columns=config.columns,
        channels=config.channels,
        white=config.white,
        folds=config.folds,
        fold=config.fold,
        target=task.target,
    )
    return with_class_order(splits, task.order_classes(splits.classes, config.class_order))


def encoded(splits: DataSplits, task: Task) -> DataSplits:
    """The same splits with targets as the task's loss takes them, training images with their sample weights."""
    encode = None if task.target == "class" else task.encode
    parts: dict[str, Any] = {
        name: part.with_targets(encode, is_weighted=name == "train") for name, part in parts_of(splits).items()
    }
    return dataclasses.replace(splits, **parts)


def make_backbone(backbone: BackboneInfo, task: str = "classification") -> nn.Module:
    """Create the model that a run began with; what is not pre-trained in it comes from the run's seed."""
    torch.manual_seed(backbone.seed or 0)
    return task_class(task).build_model(
        backbone.name,
        num_classes=backbone.num_classes,
        weights=backbone.weights,
        pretrained=backbone.pretrained is not False,
        img_size=backbone.img_size,
        **({} if backbone.channels == 3 else {"channels": backbone.channels}),
    )


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


_COMMANDS_OF_OTHERS = {
    "generation": "snella generate and snella evaluate-generation use it",
    "language": "snella evaluate-language uses it",
}


@dataclass(frozen=True)
class LoadedRun:
    """The best model of a run, with its transform, classes and task."""

    folder: RunFolder
    model: nn.Module
    transform: Callable[..., Tensor]
    classes: list[str]
    task: Task
    info: RunInfo

    @property
    def reading(self) -> Reading:
        """How its images are read."""
        data = self.info.data
        return Reading(self.info.backbone.channels, data.white or FULL_WHITE, data.read_side)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device


def load_run(run: str | Path | RunFolder, device: str = "auto") -> LoadedRun:
    """Load the best adapter of a run onto a fresh backbone; of a cross-validation, all its models as an ensemble.

    Args:
        run: Folder of the run, or of a cross-validation.
        device: auto, cpu or cuda.

    Returns:
        Model in evaluation mode, its transform, the class names and the run's record.

    Raises:
        FileNotFoundError: Not the folder of a run, no epoch was finished yet, or the adapter is missing.
        ValueError: `run.json` is damaged, or the run is of another kind, such as a personalized generator.
        AdapterFileError: The adapter is damaged or belongs to another model; names the tensor.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    results = read_if_present(FoldResults, folder.path)
    if results is not None:
        return _load_ensemble(folder, results, device)
    info = read(RunInfo, folder.path)
    task = get_task(info)
    folder.check_adapter()
    model = load_trained(folder.adapter, make_backbone(info.backbone, task.name)).to(choose_device(device))
    transform = build_transform(info.data_config, train=False, augment="none")
    return LoadedRun(folder, model, transform, list(info.classes), task, info)


class Ensemble(nn.Module):
    """The mean of several models' outputs.

    Args:
        models: From the same images to outputs of the same shape.
        temperatures: What each model's outputs are divided by.
        average: From the models' outputs to one.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        temperatures: Sequence[float],
        average: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.temperatures, self.average = temperatures, average

    def forward(self, images: Tensor) -> Tensor:
        """The mean over the models."""
        pairs = zip(self.models, self.temperatures, strict=True)
        return self.average([model(images) / temperature for model, temperature in pairs])


def _load_ensemble(folder: RunFolder, results: FoldResults, device: str) -> LoadedRun:
    """The models of all folds as one."""
    if len(results.rows) < results.folds:
        raise FileNotFoundError(
            f"{folder.path} has {len(results.rows)} of {results.folds} folds; finish it with "
            f"snella train --out {folder.path} --resume"
        )
    loaded = [load_run(folder.path / row.folder, device) for row in results.rows]
    first, tasks = loaded[0], [one.task for one in loaded]
    task = first.task.of_ensemble(tasks)
    models, temperatures = [one.model for one in loaded], [one.info.temperature for one in loaded]
    model = Ensemble(models, temperatures, lambda outputs: task.average_outputs(outputs, tasks)).eval()
    info = dataclasses.replace(first.info, calibration=None)  # each model has its own
    return LoadedRun(first.folder, model, first.transform, first.classes, task, info)


def get_task(info: RunInfo) -> Task:
    """The task of a run.

    Args:
        info: Its record.

    Raises:
        ValueError: The run is of another kind, such as a personalized generator; names the commands that use it.
    """
    return create_task(get_task_name(info), info.classes, **(info.task_state or {}))


def get_task_name(info: RunInfo) -> str:
    """The name of a run's task. Raises as `get_task`."""
    if info.task not in task_names():
        hint = _COMMANDS_OF_OTHERS.get(info.task, "another version of snella wrote it")
        raise ValueError(f"run must be of the task {' or '.join(task_names())}, got a run of {info.task!r}; {hint}")
    return info.task
