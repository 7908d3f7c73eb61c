"""Loading of data into training, validation and test splits."""

import difflib
import functools
import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor

from snella_app.console import counted
from snella_app.data.benchmarks import FGVC, VTAB, load_fgvc, load_vtab
from snella_app.data.datasets import Collection, ImageDataset, Target, file_paths, joined, known_metadata
from snella_app.data.folder import load_folder
from snella_app.data.hub import PYTHON_PREFIX, from_python, load_hf, load_wds
from snella_app.data.images import FULL_WHITE, RGB, Reading
from snella_app.data.masks import load_kvasir, load_masks
from snella_app.data.splits import fold_split, grouped_split, stratified_sample, stratified_split
from snella_app.data.table import Columns, RowOptions, TargetKind, load_table
from snella_app.files import sha256_of
from snella_app.plugins import plugins
from snella_app.text import listed, similar_paths

_FOLDER = "folder:"
_MIN_CORRELATION, _MAX_DISTANCE = 0.995, 3.0
_FLAT, _DARK = 2.0, 0.25
_CHUNK, _MAX_PAIRS = 1024, 2_000_000_000
_IMBALANCE = 4
"""Ratio of class sizes that triggers the imbalance note."""
_FOLDER_FORMATS: dict[str, Callable[..., Collection]] = {
    _FOLDER: load_folder,
    "masks:": load_masks,
    "kvasir:": load_kvasir,
}
"""Folder formats by prefix; each function takes the path and `skip_corrupt`."""
_TABLE_FORMATS: dict[str, Callable[..., Collection]] = {
    "csv:": partial(load_table, kind="csv"),
    "parquet:": partial(load_table, kind="parquet"),
    "hf:": load_hf,
    "wds:": load_wds,
}
"""Table formats by prefix; each function takes the text after the colon and `RowOptions`."""
_BENCHMARKS: dict[str, Callable[..., Collection]] = {"vtab:": load_vtab, "fgvc:": load_fgvc}
"""Benchmarks by prefix; each function takes the path of one dataset and `strict_sizes`."""
_PREFIXES = (*_FOLDER_FORMATS, *_TABLE_FORMATS, *_BENCHMARKS, PYTHON_PREFIX)
_BENCHMARK_FOLDERS: dict[str, Callable[[Path], Path]] = {"vtab:": VTAB.resolve, "fgvc:": FGVC.resolve}
"""Functions that resolve alternative folder names, by benchmark prefix."""


Protocol = Literal["standard", "final", "official"]
"""Use of splits for training and epoch selection; see `load_data`."""


@dataclass
class DataSplits:
    """Data split for training.

    Attributes:
        train: Training images.
        val: Images for epoch selection; None without validation split.
        test: Images for the final evaluation; None without test split.
        classes: Class names by index.
        name: Short name of the data.
        description: One-line summary, human-readable.
        notes: Notes for the user (skipped files, choices, licenses), including `warnings`.
        warnings: Problems that may invalidate results, e.g. test images in the training split, with remedies.
        is_resized_whole: If True, images are resized without a center crop.
        broken: Reason by name of each skipped image.
        fold_part: Split that is the cross-validation fold.
    """

    train: ImageDataset
    val: ImageDataset | None
    test: ImageDataset | None
    classes: list[str]
    name: str
    description: str
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_resized_whole: bool = False
    broken: dict[str, str] = field(default_factory=dict)
    fold_part: str | None = None

    @property
    def parts(self) -> dict[str, ImageDataset]:
        """Existing splits by name."""
        splits = (("train", self.train), ("val", self.val), ("test", self.test))
        return {name: part for name, part in splits if part is not None}


@functools.cache
def _registered() -> dict[str, Callable[..., Collection]]:
    """Return registered data loaders by name; names of loaders that take a path end with a colon."""
    reserved = frozenset(prefix.removesuffix(":") for prefix in _PREFIXES)
    loaders = {}
    for name, load in plugins("data", reserved).items():
        needs_path = any(p.default is p.empty for p in inspect.signature(load).parameters.values())
        loaders[f"{name}:" if needs_path else name] = load
    return loaders


def data_names() -> list[str]:
    """Return the accepted forms of a data specification."""
    tables = ("csv:FILE", "parquet:FILE", "hf:NAME", "wds:SHARDS")
    return [
        *(f"{prefix}PATH" for prefix in _FOLDER_FORMATS),
        *tables,
        *(f"{prefix}PATH" for prefix in _BENCHMARKS),
        *(f"{name}PATH" if name.endswith(":") else name for name in _registered()),
    ]


def full_spec(spec: str) -> str:
    """Add the prefix to a bare path: `folder:photos` for class folders, `csv:t.csv` for a table.

    A folder with `images` and `masks` becomes `masks:`; a folder written by Hugging Face datasets becomes `hf:`. A
    folder without subfolders becomes `wds:` if it has tar files, and `hf:` if all files are Parquet. Other text is
    returned unchanged. Names of registered datasets take precedence over folders.
    """
    path = Path(os.path.expanduser(spec))  # Path.expanduser raises for unknown users
    if split_spec(spec)[1] is not None or spec in _registered() or not spec.strip() or not os.path.exists(path):
        return spec
    if path.is_file():
        prefix = {".csv": "csv:", ".tsv": "csv:", ".parquet": "parquet:", ".tar": "wds:"}.get(path.suffix.lower())
        return spec if prefix is None else prefix + spec
    if any((path / part / "masks").is_dir() and (path / part / "images").is_dir() for part in ("", "train")):
        return f"masks:{spec}"
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json", "metadata.csv")):
        return f"hf:{spec}"
    children = [child for child in path.iterdir() if not child.name.startswith(".")]
    if not any(child.is_dir() for child in children):
        suffixes = {child.suffix for child in children}
        if ".tar" in suffixes:
            return f"wds:{spec}"
        if suffixes == {".parquet"}:
            return f"hf:{spec}"
    return f"{_FOLDER}{spec}"


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split `folder:PATH` into `("folder:", "PATH")`; data without a path gives `(name, None)`."""
    prefix = next((prefix for prefix in _PREFIXES if spec.startswith(prefix)), None)
    if prefix is None:  # import plugins only if needed
        prefix = next((name for name in _registered() if name.endswith(":") and spec.startswith(name)), None)
    return (spec, None) if prefix is None else (prefix, spec.removeprefix(prefix))


def has_columns(data: Any) -> bool:
    """Return whether a specification or data object may have columns."""
    return not isinstance(data, str) or split_spec(full_spec(data))[0] in _TABLE_FORMATS


def data_folder(spec: str) -> Path | None:
    """Return the folder or file of a specification, which need not exist; None for other data."""
    prefix, path = split_spec(spec)
    if path is None or prefix == PYTHON_PREFIX or (prefix == "hf:" and not Path(path).expanduser().exists()):
        return None
    if prefix == "wds:" and not Path(path).expanduser().exists():
        path = str(Path(path).parent)
    return _BENCHMARK_FOLDERS.get(prefix, Path)(Path(path).expanduser())


def load_data(
    spec: Any,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    test_seed: int | None = None,
    skip_corrupt: bool = False,
    strict_sizes: bool = True,
    protocol: Protocol = "standard",
    columns: str | None = None,
    target: TargetKind = "class",
    channels: int = 3,
    white: int | None = None,
    divide: bool = True,
    folds: int | None = None,
    fold: int | None = None,
) -> DataSplits:
    """Load data and create stratified, seeded splits. Images of a group stay in one split.

    Existing splits are preserved. A test split is created only for data without splits, a validation split if it is
    missing. Fractions refer to all images to be split. Splits are then subsampled to their sizes, so the test images
    are independent of the number of training images.

    Args:
        spec: Folder or table (see `full_spec`); one of `data_names()`, e.g. `folder:PATH` (`class/image` or
            `train|val|test/class/image`); or a dataset object (see `snella_app.data.hub.from_python`).
        seed: Seed of splits, subsampling and augmentation.
        val_fraction: Fraction of the validation split.
        test_fraction: Fraction of the test split; 0 for no test split.
        train_size: Number of training images; None uses all.
        val_size: Number of validation images; None uses all.
        test_size: Number of test images; None uses all.
        test_seed: Separate seed of the test split, to share it across seeds; None uses `seed`.
        skip_corrupt: Skip broken images of a folder with a note instead of raising an error.
        strict_sizes: Reject benchmark data whose numbers of images or classes differ from the benchmark; if False, add
            a note.
        protocol: `standard` uses a validation split. `final` trains on the validation split as well. `official`
            follows the authors' scripts, which select the epoch on test images. No images are held out; an existing
            validation split is used for training on VTAB and ignored for other data.
        columns: Column roles of a table, e.g. `path=file,label=species,group=patient`; other roles are detected by
            column name.
        target: Content of the label column: one class (`class`), any number of labels (`labels`) or numbers
            (`numbers`, with column names as `classes`). `ImageDataset.labels` contains classes, or strata for the other
            two; `ImageDataset.annotations` contains raw values, weights and groups.
        channels: Number of image channels: 3 for RGB, 1 for gray, 4 for RGBA, others for multispectral files; see
            `read_image`.
        white: Value of 16-bit images mapped to white, e.g. 4095 for 12-bit cameras; None means 65535.
        divide: If False, use only existing splits.
        folds: Number of cross-validation folds.
        fold: Held-out fold, counted from 1: the test split, or the validation split if the data has a test split.
            Training and validation images of the data are pooled before splitting.

    Raises:
        ValueError: If the specification is unknown, an argument is out of range, or there are too few images.
        FileNotFoundError: If a folder or Debian package does not exist.
        ImportError: If a Python package is not installed.
    """
    test_split_seed = seed if test_seed is None else test_seed
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    _check_numbers({"seed": seed, "test_seed": test_split_seed}, val_fraction, test_fraction, sizes)
    collection = _collect(spec, skip_corrupt, strict_sizes, columns, target, Reading(channels, white or FULL_WHITE))
    is_benchmark = isinstance(spec, str) and spec.startswith(tuple(_BENCHMARKS))
    checked = set(collection.parts) if is_benchmark else set()  # a benchmark's reader notes copies
    fold_part = None
    if folds is not None and fold is not None:
        fold_part = "test" if collection.test is None else "val"
        _hold_out(collection, folds, fold, test_split_seed)
        checked.discard(fold_part)
    splits_by_name = collection.parts
    if divide:
        splits_by_name = _divide(collection, seed, test_split_seed, val_fraction, test_fraction, protocol)
    labels = collection.label_names
    reasons = {"val": f"protocol={protocol} has no val split", "test": f"{collection.name!r} has no test split"}
    parts = {}
    for name, size in sizes.items():
        if name in splits_by_name:
            sample_seed = test_split_seed if name == "test" else seed
            parts[name] = _subsample(name, splits_by_name[name], size, sample_seed, labels)
            parts[name].seed = seed
        elif size is not None:
            raise ValueError(f"{name}_size must be omitted because {reasons[name]}, got {size}")
    counts = " · ".join(f"{name} {len(part):,}" for name, part in parts.items())
    total = sum(map(len, collection.parts.values()))
    columns_text = f"with {' and '.join(collection.classes)}"
    targets_text = columns_text if target == "numbers" else f"in {len(collection.classes)} classes"
    description = f"{collection.name}: {total:,} images {targets_text}; {counts}"
    warnings = [
        *_missing_class_warnings(parts, collection, target),
        *_dark_image_notes(parts),
        *_shared_group_warnings(parts),
        *_copy_warnings(parts, [name for name in ("val", "test") if name not in checked]),
        *(_imbalance_notes(parts["train"], labels) if collection.strata is None else []),
    ]
    return DataSplits(
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        collection.classes,
        collection.name,
        description,
        notes=[*collection.notes, *_page_notes(parts), *warnings],
        warnings=warnings,
        is_resized_whole=collection.is_resized_whole,
        broken=collection.broken,
        fold_part=fold_part,
    )


def with_class_order(splits: DataSplits, classes: list[str]) -> DataSplits:
    """Return the splits with reordered class indices.

    Args:
        splits: Splits with one class per image.
        classes: The same class names in the new order.
    """
    if classes == splits.classes:
        return splits
    new_indices = [classes.index(name) for name in splits.classes]
    for part in (splits.train, splits.val, splits.test):
        if part is not None:
            part.labels = [new_indices[label] for label in part.labels]
    return replace(splits, classes=classes)


def _collect(
    spec: Any, skip_corrupt: bool, strict_sizes: bool, columns: str | None, target: TargetKind, reading: Reading
) -> Collection:
    """Load the data in its existing splits."""
    options: dict[str, Any] = {} if reading == RGB else {"reading": reading}
    spec = full_spec(str(spec)) if isinstance(spec, str | Path) else spec
    if not isinstance(spec, str):
        return from_python(spec, RowOptions(Columns.parse(columns), target, skip_corrupt, reading))
    prefix, path = split_spec(spec)
    if prefix == PYTHON_PREFIX:
        raise ValueError(f"data {spec} is a Python object; pass it to train or evaluate with data=...")
    if prefix in _TABLE_FORMATS:
        return _TABLE_FORMATS[prefix](path, RowOptions(Columns.parse(columns), target, skip_corrupt, reading))
    if columns is not None:
        raise ValueError(
            f"columns applies only to data with columns, {', '.join(_TABLE_FORMATS)}, got {columns!r} with {spec}"
        )
    if options and prefix != _FOLDER:
        known = ", ".join((_FOLDER, *_TABLE_FORMATS))
        raise ValueError(
            f"channels and white apply only to {known}, got {reading.channels} and {reading.white} with {spec}"
        )
    if prefix in _BENCHMARKS:
        return _as_target(_BENCHMARKS[prefix](path, strict_sizes=strict_sizes), target, spec)
    if prefix in _FOLDER_FORMATS:
        return _as_target(_FOLDER_FORMATS[prefix](path, skip_corrupt=skip_corrupt, **options), target, spec)
    if prefix in _registered():
        load = _registered()[prefix]
        return _as_target(load() if path is None else load(path), target, spec)
    known = ", ".join(data_names())
    raise ValueError(f"data must be a folder, a table or one of {known}, got {spec!r}{_data_hint(spec)}")


def _data_hint(spec: str) -> str:
    """Return a suggestion for an unknown specification."""
    name, colon, rest = spec.partition(":")
    if colon:
        prefixes = [prefix[:-1] for prefix in (*_PREFIXES, *_registered()) if prefix.endswith(":")]
        near = difflib.get_close_matches(name.lower(), prefixes, n=1, cutoff=0.5)
        return f"; did you mean '{near[0]}:{rest}'?" if near else ""
    path = Path(spec).expanduser()
    if path.is_file():
        return ", which is not a table (CSV, TSV, Parquet or tar)"
    near = difflib.get_close_matches(spec, _registered(), n=2, cutoff=0.4)
    if near:
        return f"; nearest: {', '.join(map(repr, near))}"
    return f", which does not exist{similar_paths(path)}"


def _as_target(collection: Collection, target: TargetKind, spec: str) -> Collection:
    """Convert class labels to one-label sets, or to numbers if class names are numeric."""
    if target == "class" or collection.strata is not None:
        return collection
    if target == "labels":
        values: list[Target] = [(name,) for name in collection.classes]
        note = "every image has exactly one label, its class; images with several labels need a table"
    else:
        try:
            values = [float(name) for name in collection.classes]
        except ValueError:
            raise ValueError(
                f"data must have a column of numbers for task regression, e.g. csv:FILE with --columns label=NAME, or "
                f"class names that are numbers, got {spec} with classes "
                f"{', '.join(map(repr, collection.classes[:3]))}"
            ) from None
        note = "regression targets are the class names"
    for part in collection.parts.values():
        part.annotations = replace(part.annotations, targets=[values[label] for label in part.labels])
    return replace(
        collection,
        classes=["value"] if target == "numbers" else collection.classes,
        strata=collection.classes,
        notes=[*collection.notes, note],
    )


def _divide(
    collection: Collection, seed: int, test_seed: int, val_fraction: float, test_fraction: float, protocol: Protocol
) -> dict[str, ImageDataset]:
    """Create missing splits and return all splits by name."""
    train, val, test = collection.train, collection.val, collection.test
    total, classes = len(train), collection.label_names
    if not collection.has_parts and test_fraction > 0:
        train, test = _split_off(train, test_fraction, test_seed, classes, "test")
    if protocol == "official" and test is None:
        raise ValueError(
            f"protocol=official needs test images for epoch selection, but {collection.name!r} has none; use another "
            "protocol"
        )
    if protocol == "standard" and val is None:
        share = val_fraction * total / len(train)
        train, val = _split_off(train, share, seed, classes, "val")
    elif protocol != "standard" and val is not None:
        if protocol == "final" or collection.official_joins_val:
            train = joined(train, val)
        val = None
    return replace(collection, train=train, val=val, test=test).parts


def _hold_out(collection: Collection, folds: int, fold: int, seed: int) -> None:
    """Hold out one fold of the training and validation images as the test or validation split."""
    images = collection.train if collection.val is None else joined(collection.train, collection.val)
    rest, selected = fold_split(
        images.labels, images.annotations.groups, folds, fold, seed=seed, classes=collection.label_names
    )
    collection.train, collection.val, held_out = images.subset(rest), None, images.subset(selected)
    if collection.test is None:
        collection.test = held_out
        collection.notes.append(f"fold {fold} of {folds} is the test split")
    else:
        collection.val = held_out
        collection.notes.append(f"fold {fold} of {folds} is the validation split; the test split comes from the data")
    collection.has_parts = True


def _split_off(
    images: ImageDataset, fraction: float, seed: int, classes: list[str], part: str
) -> tuple[ImageDataset, ImageDataset]:
    """Split off a fraction of the images, by group if present; return remaining and selected images."""
    groups = images.annotations.groups
    if groups is None:
        reserve = 2 if part == "test" else 1
        rest, selected = stratified_split(
            images.labels, fraction, seed=seed, classes=classes, reserve=reserve, part=part
        )
    else:
        rest, selected = grouped_split(images.labels, groups, fraction, seed=seed, part=part)
    return images.subset(rest), images.subset(selected)


def _subsample(part: str, images: ImageDataset, size: int | None, seed: int, classes: list[str]) -> ImageDataset:
    """Subsample a split to `size` images; None selects all."""
    if size is None:
        return images
    return images.subset(stratified_sample(images.labels, size, seed=seed, classes=classes, argument=f"{part}_size"))


def _missing_class_warnings(parts: dict[str, ImageDataset], collection: Collection, target: TargetKind) -> list[str]:
    """Return warnings about classes or labels missing from a split."""
    notes = []
    names = {"class": collection.label_names, "labels": collection.classes}.get(target, [])
    noun, plural = ("class", "classes") if target == "class" else ("label", "labels")
    remedies = {
        "train": f"add training images or remove the {noun}",
        "val": "add validation images, or epoch selection ignores them",
        "test": "add test images, or test scores ignore them",
    }
    for part, images in parts.items():
        if target == "class":
            present = {names[label] for label in images.labels}
        else:
            targets = images.annotations.targets or []
            present = {name for labels in targets for name in cast(tuple[str, ...], labels)} if names else set()
        absent = [repr(name) for name in names if name not in present]
        if absent:
            part_name = {"train": "training", "val": "validation"}.get(part, part)
            subject = f"{noun} {absent[0]} has" if len(absent) == 1 else f"{len(absent)} {plural} have"
            named = "" if len(absent) == 1 else f": {listed(absent)}"
            notes.append(f"{subject} no {part_name} images{named}; {remedies[part]}")
    return notes


def _shared_group_warnings(parts: dict[str, ImageDataset]) -> list[str]:
    """Return warnings about groups in both the training split and another split of the data."""
    notes = []
    train_groups = set(parts["train"].annotations.groups or [])
    for name in ("val", "test"):
        groups = set(parts[name].annotations.groups or []) if name in parts else set()
        shared = sorted(train_groups & groups)
        if shared:
            notes.append(
                f"{len(shared)} of {len(groups)} groups in {name} are also in train, e.g. {shared[0]!r}; results on "
                f"{name} are optimistic; --columns split=none creates new splits that keep groups together"
            )
    return notes


def is_unbalanced(labels: Iterable[int]) -> bool:
    """Return whether the most frequent label has at least four times the images of the rarest one present."""
    counts = Counter(labels).values()
    return bool(counts) and max(counts) >= _IMBALANCE * min(counts)


def _imbalance_notes(train: ImageDataset, classes: list[str]) -> list[str]:
    """Return a note about class imbalance."""
    if not is_unbalanced(train.labels):
        return []
    counts = Counter(train.labels)
    most, fewest = max(counts, key=lambda label: counts[label]), min(counts, key=lambda label: counts[label])
    return [
        f"classes are unbalanced: {counts[most]} training images of {classes[most]!r}, {counts[fewest]} of "
        f"{classes[fewest]!r}; use balanced accuracy, which weights all classes equally"
    ]


def _page_notes(parts: dict[str, ImageDataset]) -> list[str]:
    """Return a note about images with several pages or frames."""
    names = [
        images.names[position]
        for images in parts.values()
        for position, metadata in known_metadata(images).items()
        if metadata.has_pages
    ]
    if not names:
        return []
    return [f"only the first page or frame of {counted(len(names), 'image')} is used: {listed(names)}"]


def _dark_image_notes(parts: dict[str, ImageDataset]) -> list[str]:
    """Return a note about 16-bit images that use a small fraction of the range, e.g. from 12-bit cameras."""
    metadata = [entry for images in parts.values() for entry in known_metadata(images).values()]
    shares = [entry.brightest for entry in metadata if entry.brightest is not None]
    if not shares or max(shares) > _DARK or max(shares) == 0:
        return []
    return [
        f"{counted(len(shares), '16-bit image')} with values up to {max(shares):.1%} of the range; set the "
        "white value with --white (white=), e.g. 4095 for 12-bit cameras"
    ]


def _copy_warnings(parts: dict[str, ImageDataset], names: list[str]) -> list[str]:
    """Return warnings about images of the named splits that are copies of training images, exact or re-encoded."""
    parts = {name: part for name, part in parts.items() if name in ("train", *names)}
    if len(parts) == 1:
        return []
    equal = _equal_files(parts)
    notes = []
    for name in names:
        copies = {**find_near_copies(parts["train"], parts[name]), **equal.get(name, {})} if name in parts else {}
        if copies:
            train_names, other_names = parts["train"].names, parts[name].names
            shown = listed(f"{train_names[b]!r} is {other_names[a]!r}" for a, b in sorted(copies.items()))
            reencoded = len(copies) - len(equal.get(name, {}))
            kind = f" ({reencoded} of them re-encoded or resized)" if reencoded else ""
            duplicate = "is also a training image" if len(copies) == 1 else "are also training images"
            notes.append(
                f"{len(copies)} of {len(parts[name])} {name} images {duplicate}{kind}, e.g. {shown}; "
                f"{name} results are optimistic; remove the copies from one split"
            )
    return notes


def _equal_files(parts: dict[str, ImageDataset]) -> dict[str, dict[int, int]]:
    """Return, by split, the position of the training image with equal bytes for each copy."""
    paths = {name: file_paths(images) for name, images in parts.items()}
    sizes = Counter(path.stat().st_size for group in paths.values() for path in group.values())
    digests = {
        name: {position: sha256_of(path) for position, path in group.items() if sizes[path.stat().st_size] > 1}
        for name, group in paths.items()
    }
    train_positions = {digest: position for position, digest in digests.pop("train", {}).items()}
    return {
        name: {position: train_positions[digest] for position, digest in group.items() if digest in train_positions}
        for name, group in digests.items()
    }


def find_duplicates(images: ImageDataset) -> list[list[int]]:
    """Return groups of positions with identical images, compared by size and 16×16 gray thumbnail.

    Args:
        images: Dataset; flat images and images that were not inspected are ignored.
    """
    groups: dict[Any, list[int]] = {}
    for position, metadata in known_metadata(images).items():
        if metadata.thumbnail.std() > _FLAT:
            groups.setdefault((metadata.size, metadata.thumbnail.tobytes()), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def find_equal_images(train: ImageDataset, others: ImageDataset) -> dict[int, int]:
    """Find images whose pixels equal a training image, independent of file format.

    Args:
        train: Training images.
        others: Other images, read with the same options.

    Returns:
        Position of the training image by position in `others`.
    """
    are_known = all(len(known_metadata(images)) == len(images) for images in (train, others))
    by_key = [_group_by_thumbnail(images, are_known) for images in (train, others)]
    shared = set(by_key[0]) & set(by_key[1])
    positions = [[p for key in shared for p in groups[key]] for groups in by_key]
    train_positions = {_pixel_digest(train, position): position for position in positions[0]}
    digests = {position: _pixel_digest(others, position) for position in sorted(positions[1])}
    return {position: train_positions[digest] for position, digest in digests.items() if digest in train_positions}


def _group_by_thumbnail(images: ImageDataset, are_known: bool) -> dict[Any, list[int]]:
    """Group positions by size and thumbnail; use the single key None if images were not inspected."""
    metadata = known_metadata(images)
    groups: dict[Any, list[int]] = {}
    for position in range(len(images)):
        key = (metadata[position].size, metadata[position].thumbnail.tobytes()) if are_known else None
        groups.setdefault(key, []).append(position)
    return groups


def _pixel_digest(images: ImageDataset, position: int) -> bytes:
    """Return a digest of the decoded image."""
    image: Any = images.source.load(images.rows[position])
    pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
    return hashlib.blake2b(repr((pixels.shape, str(pixels.dtype))).encode() + pixels.tobytes(), digest_size=16).digest()


def find_near_copies(train: ImageDataset, others: ImageDataset) -> dict[int, int]:
    """Find near-duplicates of training images: re-encoded, resized or compressed copies.

    Two images match if their 16×16 gray thumbnails have a correlation ≥ 0.995 and a root mean square difference
    ≤ 3 (of 255). Flat images and images that were not inspected are ignored.

    Args:
        train: Training images.
        others: Images of another split.

    Returns:
        Position of the most similar training image by position in `others`.
    """
    known = [
        {p: metadata.thumbnail for p, metadata in known_metadata(images).items() if metadata.thumbnail.std() > _FLAT}
        for images in (train, others)
    ]
    if not all(known) or len(known[0]) * len(known[1]) > _MAX_PAIRS:
        return {}
    positions = [np.array(list(thumbnails)) for thumbnails in known]
    raw = [np.stack(list(thumbnails.values())).reshape(len(thumbnails), -1).astype(np.float32) for thumbnails in known]
    centered = [values - values.mean(1, keepdims=True) for values in raw]
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in centered]
    matches = {}
    for start in range(0, len(unit[1]), _CHUNK):
        correlations = unit[1][start : start + _CHUNK] @ unit[0].T
        for offset, nearest in enumerate(correlations.argmax(1)):
            distance = np.sqrt(((raw[1][start + offset] - raw[0][nearest]) ** 2).mean())
            if correlations[offset, nearest] >= _MIN_CORRELATION and distance <= _MAX_DISTANCE:
                matches[int(positions[1][start + offset])] = int(positions[0][nearest])
    return matches


def _check_numbers(
    seeds: dict[str, int], val_fraction: float, test_fraction: float, sizes: dict[str, int | None]
) -> None:
    """Check ranges and report all errors in one message."""
    errors = [f"{name} must be in [0, 2^32), got {seed}" for name, seed in seeds.items() if not 0 <= seed < 2**32][:1]
    if not 0 < val_fraction < 1:
        errors.append(f"val_fraction must be in (0, 1), got {val_fraction}")
    if not 0 <= test_fraction < 1:
        errors.append(f"test_fraction must be in [0, 1), got {test_fraction}")
    if val_fraction + test_fraction >= 1:
        errors.append(f"val_fraction + test_fraction must leave images to train on, got {val_fraction + test_fraction}")
    errors += [
        f"{part}_size must be at least 1, got {size}" for part, size in sizes.items() if size is not None and size < 1
    ]
    if errors:
        raise ValueError("; ".join(errors))
