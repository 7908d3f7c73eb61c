"""Load the images of a run, find their folder, and compare them with the digests that the run stored."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from snella_app.data.load import DataSplits, data_folder, load_data, split_spec, with_class_order
from snella_app.data.options import DataConfig
from snella_app.data.table import TABLE_SUFFIXES
from snella_app.files import current_path, expand_user
from snella_app.records.run import DataInfo
from snella_app.runs.folder import RunFolder
from snella_app.tasks import Task, task_class

SPLITS = ("train", "val", "test")


def splits_digest(splits: DataSplits) -> str:
    """Return the SHA-256 of the classes, and of the image names, labels, and annotations of each split.

    The digest does not depend on the path of the data, so the data may be moved.
    """
    parts = splits.parts
    names_and_labels: dict[str, Any] = dict.fromkeys(SPLITS)
    for name in SPLITS:
        if name in parts:
            names_and_labels[name] = [parts[name].names, parts[name].labels]
    content: list[Any] = [splits.classes, names_and_labels]
    annotations = {name: dataset.annotations.plain() for name, dataset in parts.items()}
    if any(annotations.values()):
        content.append(annotations)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def content_digests(splits: DataSplits, names: Collection[str]) -> dict[str, str]:
    """Return the SHA-256 of the images and masks of each existing split in `names`."""
    return {name: dataset.content_digest() for name, dataset in splits.parts.items() if name in names}


def split_sizes(splits: DataSplits) -> dict[str, int]:
    """Return the number of images in each split."""
    return {name: len(splits.parts.get(name, ())) for name in SPLITS}


def absolute_folder(spec: str) -> str | None:
    """Return the absolute path of a specification such as `folder:PATH`, or None if it refers to no path."""
    folder = data_folder(spec)
    return None if folder is None else str(folder.resolve())


def changed_splits(data: DataInfo, splits: DataSplits, names: Collection[str]) -> list[str]:
    """Return the splits in `names` whose images do not match the digest that the run stored, if it stored one."""
    digests = content_digests(splits, set(names) & set(data.contents))
    return [name for name, digest in digests.items() if digest != data.contents[name]]


def check_splits(run: Path, data: DataInfo, splits: DataSplits, names: Collection[str] = SPLITS) -> None:
    """Check that the splits of a run, and the images of the splits in `names`, have not changed since training.

    Images are checked only in splits whose digest the run stored.

    Raises:
        ValueError: If the splits or images differ. The message suggests remedies.
    """
    if data.digest != splits_digest(splits):
        raise ValueError(
            f"data must contain the images of {run}, {sizes_text(data.sizes)} in {data.folder or data.spec}, got "
            f"{changed_sizes_text(data.sizes, splits)}: files were added, removed or renamed, or labels were changed, "
            "and a new split would evaluate on training images; restore the files and labels, evaluate on other images "
            "with --data, or train a new run"
        )
    if changed := changed_splits(data, splits, names):
        raise ValueError(
            f"data must contain the images of {run}, got files with the same names but different contents in "
            f"{data.spec} ({', '.join(changed)}): images were replaced or re-encoded; restore the files, evaluate on "
            "other images with --data, or train a new run"
        )


def find_data(run: Path, spec: str, absolute: str | None) -> str:
    """Return the data specification of a run with its current path (see `current_path`).

    Args:
        run: Folder of the run, for the error message.
        spec: Data specification used for training.
        absolute: Absolute path of the data at training time, or None for data without a path.

    Raises:
        FileNotFoundError: If the data exists at neither path.
    """
    prefix, path = split_spec(spec)
    folder = data_folder(spec)
    # a pattern of shards is stored as the folder of the shards
    is_pattern = False
    if absolute and path is not None:
        is_pattern = prefix == "wds:" and Path(path).name != Path(absolute).name
        if prefix == "hf:" or (prefix == "wds:" and not is_pattern):
            # a folder at training time; if it is missing now, `data_folder` takes it for a Hub name or a pattern
            folder = expand_user(path)
    if folder is None:
        return spec
    current = current_path(folder, absolute)
    if current is not folder and path is not None:
        return f"{prefix}{current / Path(path).name if is_pattern else current}"
    if folder.exists():
        return spec
    kind = "file" if folder.suffix in TABLE_SUFFIXES else "folder"
    locations = spec if absolute in (None, path) else f"{spec} or {absolute}"
    raise FileNotFoundError(
        f"the data of {run} no longer exists: no {kind} at {locations}; pass its new location with --data {prefix}NEW "
        "to snella evaluate or snella train --resume, or move it back"
    )


def changed_sizes_text(stored: Mapping[str, int], splits: DataSplits) -> str:
    """Format the sizes of changed splits, or describe the change if all sizes are as stored."""
    current = sizes_text(split_sizes(splits))
    is_equal = current == sizes_text(stored)
    return "the same numbers of images, but different names or labels" if is_equal else current


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Format the sizes of splits as `train 100, val 20, test 0`."""
    return ", ".join(f"{name} {count}" for name, count in sizes.items())


def load_splits(config: DataConfig, seed: int, data: Any = None) -> DataSplits:
    """Load the splits of a configuration, which are reproducible if the files are unchanged.

    Args:
        config: Images, labels, and splits.
        seed: Seed of the run, which determines the splits.
        data: Dataset object to load instead of `config.spec`.
    """
    task = task_class(config.task)
    splits = load_data(str(config.spec) if data is None else data, config, seed=seed, target=task.target)
    return with_class_order(splits, task.order_classes(splits.classes, config.class_order))


def load_run_splits(run: RunFolder, data: DataInfo, **changes: Any) -> DataSplits:
    """Load the splits of a run; `changes` replace fields of its `DataConfig`.

    Raises:
        FileNotFoundError: If the data no longer exists, or the run has no `config.yaml`.
        ValueError: If the data cannot be split as in training, or `config.yaml` is damaged or was altered.
        ImportError: If the data needs a package that is not installed.
    """
    config = run.read_config()
    spec = find_data(run.path, str(config.data.spec), data.folder)
    return load_splits(dataclasses.replace(config.data, spec=spec, **changes), config.run.seed)


def encode_targets(splits: DataSplits, task: Task) -> DataSplits:
    """Return the splits with targets encoded for the task's loss, and with sample weights for the training images."""
    has_annotations = task.target in ("labels", "numbers")  # class indices and masks need no encoding
    encode = task.encode if has_annotations else None
    parts: dict[str, Any] = {}
    for name, dataset in splits.parts.items():
        parts[name] = dataset.with_targets(encode, is_weighted=name == "train")
    return dataclasses.replace(splits, **parts)
