"""Load data into training, validation and test splits.

`load_data` reads a `Collection`, holds out a cross-validation fold, creates missing splits and limits their sizes.
"""

import difflib
import functools
import inspect
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from snella_app.console import counted
from snella_app.data.benchmarks import FGVC, VTAB
from snella_app.data.columns import number_of
from snella_app.data.copies import contradiction_warnings, copy_warnings
from snella_app.data.datasets import Collection, ImageDataset, MaskDataset, Target, joined, known_metadata
from snella_app.data.folder import load_folder
from snella_app.data.hub import PYTHON_PREFIX, from_python, load_hf, load_wds
from snella_app.data.images import RGB, is_image
from snella_app.data.masks import NO_MASKS, load_kvasir, load_masks
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.splits import fold_split, grouped_split, merge_strata, stratified_sample, stratified_split
from snella_app.data.table import load_table
from snella_app.files import expand_user
from snella_app.plugins import plugins
from snella_app.text import listed, similar_paths, split_text

_DARK = 0.25
"""Largest brightness, as a fraction of white, that triggers the warning about dark 16-bit images."""
_IMBALANCE = 4
"""Minimum ratio of class sizes that triggers the imbalance warning."""
_FOLDER = "folder:"
_READERS: dict[str, Callable[[str, DataConfig, TargetKind], Collection]] = {
    _FOLDER: load_folder,
    "masks:": load_masks,
    "kvasir:": load_kvasir,
    "csv:": partial(load_table, kind="csv"),
    "parquet:": partial(load_table, kind="parquet"),
    "hf:": load_hf,
    "wds:": load_wds,
    "vtab:": VTAB.load,
    "fgvc:": FGVC.load,
}
"""Readers by prefix. Each takes the text after the colon, the settings and the target. A reader raises a
FileNotFoundError if the data is missing, a ValueError that lists all problems if the data cannot be used, an
ImportError if a package is missing, and a ConnectionError if the Hub is unreachable."""
_TABLES = {"csv:": "FILE", "parquet:": "FILE", "hf:": "NAME", "wds:": "SHARDS"}
"""Prefixes of data with columns, each with the placeholder for the text after the colon."""
_BENCHMARKS = {"vtab:": VTAB, "fgvc:": FGVC}
_PREFIXES = (*_READERS, PYTHON_PREFIX)


@dataclass
class DataSplits(Collection):
    """A collection divided into training, validation and test splits.

    Attributes:
        description: Human-readable, one-line summary.
        warnings: Problems that may invalidate results, e.g. test images in the training split, with remedies. `notes`
            contains them as well.
        fold_part: Name of the split that is the cross-validation fold, or None without cross-validation.
    """

    description: str = ""
    warnings: list[str] = field(default_factory=list)
    fold_part: str | None = None


@functools.cache
def _registered() -> dict[str, Callable[..., Collection]]:
    """Return registered data loaders by name. The names of loaders that require a path end with a colon."""
    loaders = {}
    for name, load in plugins("data", frozenset(prefix.removesuffix(":") for prefix in _PREFIXES)).items():
        needs_path = any(p.default is p.empty for p in inspect.signature(load).parameters.values())
        loaders[f"{name}:" if needs_path else name] = load
    return loaders


def data_names() -> list[str]:
    """Return the accepted forms of a data specification."""
    names = [f"{prefix}{_TABLES.get(prefix, 'PATH')}" for prefix in _READERS]
    for name in _registered():
        names.append(f"{name}PATH" if name.endswith(":") else name)
    return names


def full_spec(spec: str) -> str:
    """Add the prefix to a bare path: `folder:photos` for class folders, `csv:t.csv` for a table.

    Folders with other contents get a different prefix:

    - `masks:` for a folder with `images` and `masks`, or with a subfolder `train` that has both
    - `hf:` for a folder written by Hugging Face datasets, or with `metadata.csv` in it or in a subfolder
    - `wds:` for a folder with tar files and no subfolders
    - `hf:` for a folder with Parquet files and no images, such as a repository downloaded from the Hub. The folder may
      have no subfolder except `data`, which is searched as well.

    Names of registered datasets take precedence over folders. Any other text, such as the path of a missing folder, is
    returned unchanged.
    """
    path = expand_user(spec)
    if split_spec(spec)[1] is not None or spec in _registered() or not spec.strip() or not os.path.exists(path):
        return spec
    if not path.is_dir():
        prefix = {".csv": "csv:", ".tsv": "csv:", ".parquet": "parquet:", ".tar": "wds:"}.get(path.suffix.lower())
        return spec if prefix is None else prefix + spec
    if any((path / part / "masks").is_dir() and (path / part / "images").is_dir() for part in ("", "train")):
        return f"masks:{spec}"
    files = ("dataset_dict.json", "state.json", "metadata.csv")
    if any((path / name).is_file() for name in files) or any(path.glob("*/metadata.csv")):
        return f"hf:{spec}"
    children = [child for child in path.iterdir() if not child.name.startswith(".")]
    folders = {child.name for child in children if child.is_dir()}
    if not folders and any(child.suffix == ".tar" for child in children):
        return f"wds:{spec}"
    if folders <= {"data"}:
        contents = [*children, *(child for child in path.glob("data/**/*") if not child.name.startswith("."))]
        if any(child.suffix == ".parquet" for child in contents) and not any(map(is_image, contents)):
            return f"hf:{spec}"
    return f"{_FOLDER}{spec}"


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split `folder:PATH` into `("folder:", "PATH")`, and a text without a known prefix into `(text, None)`."""
    prefix = next((prefix for prefix in _PREFIXES if spec.startswith(prefix)), None)
    if prefix is None:  # import plugins only if needed
        prefix = next((name for name in _registered() if name.endswith(":") and spec.startswith(name)), None)
    return (spec, None) if prefix is None else (prefix, spec.removeprefix(prefix))


def has_columns(data: Any) -> bool:
    """Return whether a specification or data object may have columns."""
    return not isinstance(data, str) or split_spec(full_spec(data))[0] in _TABLES


def data_folder(spec: str) -> Path | None:
    """Return the local folder or file that a specification refers to, or None if it refers to none.

    The path need not exist. However, a missing path after `hf:` is treated as a name on the Hub, which has no folder.
    A missing path after `wds:` is treated as a pattern of shards, whose folder is returned.
    """
    prefix, path = split_spec(spec)
    if path is None or prefix == PYTHON_PREFIX:
        return None
    folder = expand_user(path)
    if prefix in _BENCHMARKS:
        return _BENCHMARKS[prefix].resolve(folder)
    if prefix == "hf:" and not folder.exists():  # a name on the Hub
        return None
    if prefix == "wds:" and not folder.exists():  # a pattern or range of shards
        return folder.parent
    return folder


def load_data(
    spec: Any, config: DataConfig | None = None, *, seed: int = 0, target: TargetKind = "class", divide: bool = True
) -> DataSplits:
    """Load data and create stratified, seeded splits, which keep the images of a group together.

    Existing splits are preserved. A test split is created only for data without splits; a validation split is
    created if it is missing and the protocol is `standard`. Fractions refer to all images to be split. Splits are then
    subsampled to the configured sizes, so the test images are independent of the number of training images.

    A cross-validation fold is held out from the combined training and validation images. It is the test split, or the
    validation split if the data has a test split. Protocols `final` and `official` hold out no validation images: an
    existing validation split is used for training under `final` and, on VTAB, `official`, and ignored otherwise.

    Args:
        spec: Folder or table (see `full_spec`); one of `data_names()`, e.g. `folder:PATH` (`class/image` or
            `train|val|test/class/image`); or a dataset object (see `snella_app.data.hub.from_python`).
        config: Columns, image format, handling of broken images, splits and their sizes; other fields do not apply.
        seed: Seed for splitting, subsampling and augmentation, in [0, 2^32); test images use `config.test_seed` if set.
        target: Content of the label column: one class (`class`), any number of labels (`labels`) or numbers
            (`numbers`, with column names as `classes`); `masks` requires images with masks. `ImageDataset.labels`
            contains class indices for `class`, and strata otherwise (see `build_collection` and `collect_masks`);
            `ImageDataset.annotations` contains raw values, weights and groups.
        divide: If False, create no splits except a fold, and accept data that cannot be used for training.

    Raises:
        ValueError: If the specification is unknown, a setting does not apply to the data, or there are too few images.
        FileNotFoundError: If a file or folder of the data does not exist.
        ImportError: If a required package is not installed.
        TypeError: If the dataset object is not supported.
        ConnectionError: If a dataset on the Hugging Face Hub is not cached and the Hub is unreachable.
    """
    config = config or DataConfig()
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    seeds = {"train": seed, "val": seed, "test": seed if config.test_seed is None else config.test_seed}
    splits = DataSplits(**vars(_read(spec, config, target)))
    if divide and splits.problems:
        raise ValueError("; ".join(splits.problems))
    total = sum(map(len, splits.parts.values()))
    if config.folds is not None and config.fold is not None:
        _hold_out(splits, config.folds, config.fold, seeds["test"])
    is_benchmark = isinstance(spec, str) and spec.startswith(tuple(_BENCHMARKS))
    # the benchmark's reader has already searched its splits for copies
    compared = set(splits.parts) - {splits.fold_part} if is_benchmark else set()
    if divide:
        _divide(splits, config, seeds, target)
    _subsample(splits, config, seeds)
    counts = " · ".join(f"{name} {len(part):,}" for name, part in splits.parts.items())
    content = f"with {' and '.join(splits.classes)}" if target == "numbers" else f"in {len(splits.classes)} classes"
    splits.description = f"{splits.name}: {total:,} images {content}; {counts}"
    splits.warnings = [
        *_missing_class_warnings(splits, target),
        *_dark_image_warnings(splits),
        *_shared_group_warnings(splits),
        *copy_warnings(splits.parts, [name for name in ("val", "test") if name not in compared]),
        *contradiction_warnings(splits.parts),
        *_imbalance_warnings(splits),
    ]
    splits.notes = [*splits.notes, *_page_notes(splits), *splits.warnings]
    return splits


def with_class_order(splits: DataSplits, classes: list[str]) -> DataSplits:
    """Return the splits with reordered class indices. The labels are replaced in place, so `splits` changes, too.

    Args:
        splits: Splits with one class per image.
        classes: The same class names in the new order.
    """
    if classes == splits.classes:
        return splits
    new_indices = [classes.index(name) for name in splits.classes]
    for part in splits.parts.values():
        part.labels = [new_indices[label] for label in part.labels]
    return replace(splits, classes=classes)


def _read(spec: Any, config: DataConfig, target: TargetKind) -> Collection:
    """Read the data with its existing splits."""
    if not isinstance(spec, str | Path):
        if target == "masks":
            raise ValueError(NO_MASKS.format(f"{PYTHON_PREFIX}data"))
        return from_python(spec, config, target)
    spec = full_spec(str(spec))
    prefix, path = split_spec(spec)
    if target == "masks" and prefix in (_FOLDER, *_TABLES):
        raise ValueError(NO_MASKS.format(spec))
    if prefix == PYTHON_PREFIX:
        raise ValueError(f"data {spec} is a Python object; pass it to train or evaluate with data=...")
    if config.columns is not None and prefix not in _TABLES:
        raise ValueError(
            f"columns applies only to data with columns ({', '.join(_TABLES)}), got {config.columns!r} with {spec}"
        )
    is_known = prefix in _READERS or prefix in _registered()
    if config.reading != RGB and is_known and prefix not in (_FOLDER, *_TABLES):
        given = [f"{name}={value}" for name, value in (("channels", config.channels), ("white", config.white)) if value]
        raise ValueError(
            f"channels and white apply only to {', '.join((_FOLDER, *_TABLES))}, got {' and '.join(given)} with {spec}"
        )
    if path is not None and prefix in _READERS:
        collection = _READERS[prefix](path, config, target)
    elif prefix in _registered():
        load = _registered()[prefix]
        collection = load() if path is None else load(path)
    else:
        known = ", ".join(data_names())
        raise ValueError(f"data must be a folder, a table or one of {known}, got {spec!r}{_data_hint(spec)}")
    if target == "masks" and not isinstance(collection.train, MaskDataset):
        raise ValueError(NO_MASKS.format(spec))
    return collection if target in ("class", "masks") else _as_target(collection, target, spec)


def _data_hint(spec: str) -> str:
    """Return a suggestion for an unknown specification."""
    name, colon, rest = spec.partition(":")
    if colon:
        prefixes = [prefix[:-1] for prefix in (*_PREFIXES, *_registered()) if prefix.endswith(":")]
        is_drive = len(name) == 1  # C: of a Windows path
        near = [] if is_drive else difflib.get_close_matches(name.lower(), prefixes, n=1, cutoff=0.5)
        return f"; did you mean '{near[0]}:{rest}'?" if near else ""
    path = expand_user(spec)
    if os.path.exists(path):
        return ", which is not a CSV, TSV, Parquet or tar file"
    near = difflib.get_close_matches(spec, _registered(), n=2, cutoff=0.4)
    if near:
        return f"; nearest: {', '.join(map(repr, near))}"
    return f", which does not exist{similar_paths(path)}"


def _as_target(collection: Collection, target: TargetKind, spec: str) -> Collection:
    """Convert class labels to one-label sets (`labels`) or to the numbers that the class names spell (`numbers`).

    Collections with strata are returned unchanged, because they have their own targets or masks.
    """
    if collection.strata is not None:
        return collection
    if target == "labels":
        values: list[Target] = [(name,) for name in collection.classes]
        note = "every image has exactly one label, its class; images with several labels need a table"
    else:
        numbers = [number_of(name) for name in collection.classes]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"data must have a column of numbers for the regression task, e.g. csv:FILE with --columns label=NAME, "
                f"or class names that are numbers, got {spec} with classes "
                f"{', '.join(map(repr, collection.classes[:3]))}"
            )
        values = [*numbers]
        note = "regression targets are the class names"
    for part in collection.parts.values():
        part.annotations = replace(part.annotations, targets=[values[label] for label in part.labels])
    return replace(
        collection,
        classes=["value"] if target == "numbers" else collection.classes,
        strata=collection.classes,
        notes=[*collection.notes, note],
    )


def _hold_out(splits: DataSplits, folds: int, fold: int, seed: int) -> None:
    """Hold out a fold of the training and validation images for testing, or for validation if a test split exists."""
    images = splits.train if splits.val is None else joined(splits.train, splits.val)
    groups = images.annotations.groups
    # without groups, `fold_split` needs an image of each stratum for every fold
    minimum = folds if groups is None else 1
    labels, classes = _strata(splits, images, minimum)
    rest, selected = fold_split(labels, groups, folds, fold, seed=seed, classes=classes)
    splits.train = images.subset(rest)
    splits.val = None
    splits.has_parts = True
    if splits.test is None:
        splits.test = images.subset(selected)
        splits.fold_part = "test"
        splits.notes.append(f"fold {fold} of {folds} is the test split")
    else:
        splits.val = images.subset(selected)
        splits.fold_part = "val"
        splits.notes.append(f"fold {fold} of {folds} is the validation split; the test split comes from the data")


def _divide(splits: DataSplits, config: DataConfig, seeds: Mapping[str, int], target: TargetKind) -> None:
    """Create missing splits, and merge or drop the validation split if the protocol has none."""
    total = len(splits.train)
    if not splits.has_parts and config.test_fraction > 0:
        splits.train, splits.test = _split_off(splits, "test", config.test_fraction, seeds["test"], target)
    if config.protocol == "official" and splits.test is None:
        raise ValueError(
            f"protocol=official needs test images for epoch selection, but {splits.name!r} has none; use another "
            "protocol"
        )
    if config.protocol == "standard" and splits.val is None:
        # val_fraction refers to the number of images before the test split was taken out
        fraction = config.val_fraction * total / len(splits.train)
        splits.train, splits.val = _split_off(splits, "val", fraction, seeds["val"], target)
    elif config.protocol != "standard" and splits.val is not None:
        if config.protocol == "final" or splits.official_joins_val:
            splits.train = joined(splits.train, splits.val)
        splits.val = None


def _split_off(
    splits: DataSplits, part: str, fraction: float, seed: int, target: TargetKind
) -> tuple[ImageDataset, ImageDataset]:
    """Split off a fraction of the training images, keeping groups together.

    Returns:
        The remaining images, and the selected images.
    """
    images = splits.train
    groups = images.annotations.groups
    if groups is None:
        # keep an image of each class for training and, when the test split is taken out, another one for validation
        reserve = 2 if part == "test" else 1
        minimum = reserve + 1
        labels, classes = _strata(splits, images, minimum)
        # each stratum contributes at least one image, so many small strata would make the new split too large
        while splits.strata is not None and len(set(labels)) > max(1, round(fraction * len(images))):
            minimum += 1
            labels, classes = _strata(splits, images, minimum)
        rest, selected = stratified_split(labels, fraction, seed=seed, classes=classes, reserve=reserve, part=part)
    else:
        keeps_classes = target != "numbers"
        rest, selected = grouped_split(
            images.labels, groups, fraction, seed=seed, part=part, keeps_classes=keeps_classes
        )
    return images.subset(rest), images.subset(selected)


def _strata(splits: DataSplits, images: ImageDataset, minimum: int) -> tuple[Sequence[int], list[str]]:
    """Return labels and their names for stratification.

    Strata with fewer than `minimum` images are merged. Classes are never merged.
    """
    if splits.strata is None:
        return images.labels, splits.classes
    return merge_strata(images.labels, splits.strata, minimum)


def _subsample(splits: DataSplits, config: DataConfig, seeds: Mapping[str, int]) -> None:
    """Subsample the splits to the configured sizes, and set the seed for the augmentation."""
    reasons = {name: f"{splits.name!r} has no {name} split" for name in ("val", "test")}
    if config.protocol != "standard":
        reasons["val"] = f"protocol={config.protocol} has no val split"
    for name, size in config.sizes.items():
        images = splits.parts.get(name)
        if images is None and size is not None:
            raise ValueError(f"{name}_size must be omitted because {reasons[name]}, got {size}")
        if images is not None and size is not None:
            # if the size is too small for an image of each stratum, merge all strata
            is_small = size < len(set(images.labels))
            minimum = len(images) + 1 if is_small else 1
            labels, classes = _strata(splits, images, minimum)
            chosen = stratified_sample(labels, size, seed=seeds[name], classes=classes, argument=f"{name}_size")
            setattr(splits, name, images.subset(chosen))
    for images in splits.parts.values():
        images.seed = seeds["train"]


def _missing_class_warnings(splits: DataSplits, target: TargetKind) -> list[str]:
    """Return warnings about classes or labels that are missing from the training split or only from another split."""
    if target == "numbers":
        return []
    messages = []
    has_one_class = target == "class" and not isinstance(splits.train, MaskDataset)
    names = splits.label_names if has_one_class else splits.classes
    expected = names
    noun, plural = ("label", "labels") if target == "labels" else ("class", "classes")
    remedies = {
        "train": f"add training images or remove the {noun}",
        "val": f"add validation images, or epoch selection will ignore missing {plural}",
        "test": f"add test images, or test scores will ignore missing {plural}",
    }
    for part, images in splits.parts.items():
        if has_one_class:
            present = {names[label] for label in images.labels}
        elif images.annotations.targets is None:
            continue
        else:
            present = {name for labels in images.annotations.targets for name in cast(tuple[str, ...], labels)}
        absent = [repr(name) for name in expected if name not in present]
        if part == "train":
            expected = [name for name in names if name in present]
        if not absent:
            continue
        missing = f"no {split_text(part)} images"
        if len(absent) == 1:
            problem = f"{noun} {absent[0]} has {missing}"
        else:
            problem = f"{len(absent)} {plural} have {missing}: {listed(absent)}"
        messages.append(f"{problem}; {remedies[part]}")
    return messages


def _shared_group_warnings(splits: DataSplits) -> list[str]:
    """Return warnings about groups that occur in several splits of the data."""
    messages = []
    groups = {name: set(part.annotations.groups or []) for name, part in splits.parts.items()}
    for seen, name in itertools.combinations(groups, 2):
        if shared := sorted(groups[seen] & groups[name]):
            messages.append(
                f"{len(shared)} of {len(groups[name])} groups in {name} are also in {seen}, e.g. {shared[0]!r}; "
                f"results on {name} are optimistic; --columns split=none creates new splits that keep groups together"
            )
    return messages


def is_imbalanced(labels: Iterable[int]) -> bool:
    """Return whether the most frequent label has at least four times as many images as the rarest one."""
    counts = Counter(labels).values()
    return bool(counts) and max(counts) >= _IMBALANCE * min(counts)


def _imbalance_warnings(splits: DataSplits) -> list[str]:
    """Return a warning about class imbalance."""
    if splits.strata is not None or not is_imbalanced(splits.train.labels):
        return []
    counts = Counter(splits.train.labels)
    most, fewest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    return [
        f"classes are imbalanced: {counts[most]} training images of {splits.classes[most]!r}, {counts[fewest]} of "
        f"{splits.classes[fewest]!r}; set --monitor balanced_accuracy, which weights all classes equally"
    ]


def _page_notes(splits: DataSplits) -> list[str]:
    """Return a note about images with several pages or frames."""
    paged = [
        images.names[position]
        for images in splits.parts.values()
        for position, entry in known_metadata(images).items()
        if entry.has_pages
    ]
    if not paged:
        return []
    return [f"only the first page or frame of {counted(len(paged), 'image')} is used: {listed(paged)}"]


def _dark_image_warnings(splits: DataSplits) -> list[str]:
    """Return a warning about dark 16-bit images."""
    metadata = [entry for images in splits.parts.values() for entry in known_metadata(images).values()]
    shares = [entry.brightest for entry in metadata if entry.brightest is not None]
    if not shares or not 0 < max(shares) <= _DARK:
        return []
    return [
        f"the values of {counted(len(shares), '16-bit image')} reach only {max(shares):.1%} of the range; set the "
        "white value with --white (white=), e.g. 4095 for 12-bit cameras"
    ]
