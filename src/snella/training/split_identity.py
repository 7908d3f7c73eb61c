"""Which images a run was trained, chosen and tested on, so that a later command measures on the same ones."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella.data import DataSplits, data_folder, split_spec


def digest_of(splits: DataSplits) -> str:
    """SHA-256 of the classes and of the ordered names and labels of all parts; the folder's place does not count."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    named = {key: None if part is None else [part.names, part.labels] for key, part in parts.items()}
    return hashlib.sha256(json.dumps([splits.classes, named]).encode()).hexdigest()


def sizes_of(splits: DataSplits) -> dict[str, int]:
    """How many images each part has."""
    return {
        "train": len(splits.train),
        "val": 0 if splits.val is None else len(splits.val),
        "test": 0 if splits.test is None else len(splits.test),
    }


def folder_of(spec: str) -> str | None:
    """The absolute place of `folder:PATH` and the like; None for other data."""
    folder = data_folder(spec)
    return None if folder is None else str(folder.resolve())


def same_splits(data: Mapping[str, Any], splits: DataSplits) -> bool:
    """Whether these are the splits in `run.json`'s entry `data`; True for old runs, which do not tell."""
    return data.get("digest") in (None, digest_of(splits))


def check_splits(run: Path, data: Mapping[str, Any], splits: DataSplits) -> None:
    """Compare the images as they are now with those that the run was split from.

    Args:
        run: The run's folder, for the message.
        data: The entry of `run.json`; old runs, which do not tell, pass.
        splits: From the run's own settings.

    Raises:
        ValueError: They differ; says how many there were and are, and what to do.
    """
    if same_splits(data, splits):
        return
    then, now = _counts(data["sizes"]), _counts(sizes_of(splits))
    files = "the same numbers of other files" if then == now else now
    raise ValueError(
        f"data must hold the images that {run} was split from, {then}, got {files} in {data['spec']}: "
        "files were added, removed or renamed, and a new split would measure on training images; restore them, "
        "measure on images of your own with evaluate --data, or train a new run"
    )


def find_data(run: Path, spec: str, data: Mapping[str, Any]) -> str:
    """The specification under which a run's images are found now: `spec`, or the absolute folder it stood for.

    Raises:
        FileNotFoundError: The folder is in neither place.
    """
    prefix, path = split_spec(spec)
    folder = data_folder(spec)
    if folder is None or folder.is_dir():
        return spec
    absolute = data.get("folder")
    if absolute and Path(absolute).is_dir():
        return f"{prefix}{absolute}"
    places = spec if absolute in (None, path) else f"{spec} (then {absolute})"
    raise FileNotFoundError(
        f"data must be where {run} had it, {places}, but no folder is there; pass its new place with --data {prefix}NEW"
    )


def _counts(sizes: Mapping[str, int]) -> str:
    """Sizes for people."""
    return ", ".join(f"{name} {count}" for name, count in sizes.items())
