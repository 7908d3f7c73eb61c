"""A run's own images: loading them, finding them again, and whether they are still the same."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from snella_app.config import TrainConfig
from snella_app.data import DataSplits, ImageDataset, data_folder, load_data, split_spec, with_class_order
from snella_app.data.table import TABLE_SUFFIXES
from snella_app.records import DataInfo
from snella_app.tasks import Task, task_class

PARTS = ("train", "val", "test")


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
    """Whether these are the splits of a run's data."""
    return data.digest == splits_digest(splits)


def changed_parts(data: DataInfo, splits: DataSplits, names: Collection[str] = PARTS) -> list[str]:
    """The parts whose images have other contents than a run says of its data, among those that it read."""
    stored = data.contents
    return [name for name, digest in contents_of(splits, set(names) & set(stored)).items() if digest != stored[name]]


def check_splits(run: Path, data: DataInfo | None, splits: DataSplits, names: Collection[str] = PARTS) -> None:
    """Compare the images as they are now with those that the run was split from.

    Args:
        run: The run's folder, for the message.
        data: What the run says of its data; None passes.
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
