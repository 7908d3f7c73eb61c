"""Images of a run: loading, locating, and comparison with stored digests."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from snella_app.config import DataConfig
from snella_app.data import DataSplits, ImageDataset, LoadOptions, data_folder, load_data, split_spec, with_class_order
from snella_app.data.table import TABLE_SUFFIXES
from snella_app.records import DataInfo
from snella_app.tasks import Task, task_class

SPLITS = ("train", "val", "test")


def splits_digest(splits: DataSplits) -> str:
    """Return the SHA-256 of classes, names and labels of all splits, in order; independent of the folder's path."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    names_and_labels = {key: None if part is None else [part.names, part.labels] for key, part in parts.items()}
    annotations = {key: part.annotations.plain() for key, part in parts.items() if part is not None}
    if any(annotations.values()):
        return hashlib.sha256(json.dumps([splits.classes, names_and_labels, annotations]).encode()).hexdigest()
    return hashlib.sha256(json.dumps([splits.classes, names_and_labels]).encode()).hexdigest()


def content_digests(splits: DataSplits, names: Collection[str] = SPLITS) -> dict[str, str]:
    """Return the SHA-256 of the images of each existing split."""
    return {name: part.content_digest() for name, part in existing_splits(splits).items() if name in names}


def existing_splits(splits: DataSplits) -> dict[str, ImageDataset]:
    """Return the existing splits by name."""
    return {name: part for name in SPLITS if (part := getattr(splits, name)) is not None}


def split_sizes(splits: DataSplits) -> dict[str, int]:
    """Return the number of images in each split."""
    return {
        "train": len(splits.train),
        "val": 0 if splits.val is None else len(splits.val),
        "test": 0 if splits.test is None else len(splits.test),
    }


def absolute_folder(spec: str) -> str | None:
    """Return the absolute path of a specification such as `folder:PATH`; None for other data."""
    folder = data_folder(spec)
    return None if folder is None else str(folder.resolve())


def is_same_split(data: DataInfo, splits: DataSplits) -> bool:
    """Return whether the splits match those stored by a run."""
    return data.digest == splits_digest(splits)


def changed_splits(data: DataInfo, splits: DataSplits, names: Collection[str] = SPLITS) -> list[str]:
    """Return the splits whose image contents differ from the digests stored by a run."""
    stored = data.contents
    return [
        name for name, digest in content_digests(splits, set(names) & set(stored)).items() if digest != stored[name]
    ]


def check_splits(run: Path, data: DataInfo, splits: DataSplits, names: Collection[str] = SPLITS) -> None:
    """Check that the images of a run have not changed since training.

    Args:
        run: Folder of the run, for the error message.
        data: Data record of the run.
        splits: Current splits from the settings of the run.
        names: Splits whose images are read and compared.

    Raises:
        ValueError: If the images differ; the message has both sizes and a remedy.
    """
    if not is_same_split(data, splits):
        stored_sizes, current_sizes = _counts(data.sizes), _counts(split_sizes(splits))
        files = "the same number of other files" if stored_sizes == current_sizes else current_sizes
        raise ValueError(
            f"data must contain the images of {run}, {stored_sizes}, got {files} in {data.spec}: "
            "files were added, removed or renamed, and a new split would evaluate on training images; restore "
            "the files, evaluate on other images with --data, or train a new run"
        )
    changed = changed_splits(data, splits, names)
    if changed:
        raise ValueError(
            f"data must contain the images of {run}, got files with the same names but other contents in {data.spec} "
            f"({', '.join(changed)}): images were replaced or re-encoded; restore the files, evaluate on other images "
            "with --data, or train a new run"
        )


def find_data(run: Path, spec: str, absolute: str | None) -> str:
    """Locate the data of a run.

    Args:
        run: Folder of the run, for the error message.
        spec: Data specification used for training.
        absolute: Absolute path of its folder at training time; None for other data.

    Returns:
        `spec`, or `spec` with its folder replaced by `absolute`.

    Raises:
        FileNotFoundError: If neither folder exists.
    """
    prefix, path = split_spec(spec)
    folder = data_folder(spec)
    if folder is None or folder.exists():
        return spec
    if absolute and Path(absolute).exists():
        return f"{prefix}{absolute}"
    kind = "file" if folder.suffix in TABLE_SUFFIXES else "folder"
    locations = spec if absolute in (None, path) else f"{spec} (then {absolute})"
    raise FileNotFoundError(
        f"the data of {run} must exist at {locations}; no such {kind}; pass its new location with --data {prefix}NEW"
    )


def _counts(sizes: Mapping[str, int]) -> str:
    """Format the sizes of splits."""
    return ", ".join(f"{name} {count}" for name, count in sizes.items())


def load_splits(config: DataConfig, seed: int, data: Any = None) -> DataSplits:
    """Load the splits of a configuration; deterministic if the files are unchanged.

    Args:
        config: Images, labels and splits.
        seed: Seed of the run, which determines the splits.
        data: Dataset object to load instead of `config.spec`.
    """
    task = task_class(config.task)
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(LoadOptions)
        if hasattr(config, field.name)
    }
    options = LoadOptions(**settings, seed=seed, target=task.target)
    splits = load_data(str(config.spec) if data is None else data, options)
    return with_class_order(splits, task.order_classes(splits.classes, config.class_order))


def encode_targets(splits: DataSplits, task: Task) -> DataSplits:
    """Return the splits with targets encoded for the task's loss, and sample weights for training images."""
    encode = None if task.target == "class" else task.encode
    parts: dict[str, Any] = {
        name: part.with_targets(encode, is_weighted=name == "train") for name, part in existing_splits(splits).items()
    }
    return dataclasses.replace(splits, **parts)
