"""Folders of images and masks: `images/` and `masks/`, or `train|val|test/` with both."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella_app.console import counted
from snella_app.data.collection import rarest_label_strata
from snella_app.data.datasets import Annotations, Collection, MaskDataset
from snella_app.data.folder import PARTS, existing_folder
from snella_app.data.images import (
    HEIC_HINT,
    THRESHOLD,
    ImageMetadata,
    is_heic,
    is_image,
    metadata_of,
    read_image,
    read_label_map,
)
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import FileImages, FileMasks, decode_all
from snella_app.text import listed

BINARY_CLASSES = ["background", "foreground"]
NO_MASKS = (
    "data must be images with masks for task segmentation, e.g. masks:PATH, got {!r}; labeled images need another task"
)
"""Error for data without masks, with a placeholder for the specification."""
_LAYOUT = "the expected layout is images/NAME.jpg and masks/NAME.png, or train, val and test folders with both"
_CLASS_FILE = "classes.txt"
_MAX_LABELS = 256
"""Maximum number of classes, since `FileMasks` returns labels as uint8."""


@dataclass(frozen=True)
class MaskPair:
    """An image file and its mask file."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class _PairCheck:
    """Properties of a decoded pair.

    Attributes:
        metadata: Metadata of the upright image.
        mask_size: Width and height of the mask.
        labels: Labels that occur in the mask.
        is_thresholded: True if the mask is in a lossy format and was thresholded.
    """

    metadata: ImageMetadata
    mask_size: tuple[int, int]
    labels: tuple[int, ...]
    is_thresholded: bool


def load_masks(path: str, config: DataConfig, target: TargetKind) -> Collection:
    """Load a folder of images and masks, paired by file stem.

    Mask values are class indices: palette indices or gray values 0, 1, 2 … without gaps, where 0 is the background.
    If all masks contain only 0 and 255, they are binary. JPEG, WebP and AVIF masks are thresholded at 128. An optional
    `classes.txt` lists the class names, one per line, background first, and may include absent classes. Every file is
    decoded once.
    """
    root = existing_folder(path, "masks", "with images/ and masks/ inside")
    split_folders = [folder for folder in root.iterdir() if folder.is_dir() and folder.name.lower() in PARTS]
    named: dict[str, Path] = {}
    for folder in sorted(split_folders):
        if (other := named.setdefault(PARTS[folder.name.lower()], folder)) is not folder:
            raise ValueError(f"folder '{root}' has two splits of the same kind: {other.name!r} and {folder.name!r}")
    has_parts = "train" in named and (named["train"] / "images").is_dir()
    folders = {"train": root}
    if has_parts:
        folders = {part: named[part] for part in ("train", "val", "test") if part in named}
    errors: list[str] = []
    pairs = {part: find_pairs(folder, root, errors) for part, folder in folders.items()}
    collection = collect_masks(f"masks:{path}", root, pairs, errors, _class_names(root), config.skip_corrupt)
    collection.has_parts = has_parts
    if named and not has_parts:
        unused = listed([repr(folder.name) for folder in named.values()])
        collection.notes.append(f"skipped {unused}: split folders are used only with 'train/images' and 'train/masks'")
    return collection


def collect_masks(
    spec: str,
    root: Path,
    pairs: Mapping[str, Sequence[MaskPair]],
    errors: list[str],
    class_names: list[str] | None,
    skip_corrupt: bool,
) -> Collection:
    """Decode all pairs once and build a collection, stratified by the rarest foreground class of each mask.

    Masks without a foreground class form the stratum `background`.

    Args:
        spec: Data specification, for messages.
        root: Folder to which the names of images and masks are relative.
        pairs: Pairs by split.
        errors: Errors found so far. Further errors are appended.
        class_names: Class names by label, or None to infer them from the labels.
        skip_corrupt: Skip unreadable pairs with a note.

    Raises:
        ValueError: If there are earlier errors, unreadable pairs without `skip_corrupt`, masks of a different size than
            their images, labels out of range, a split without readable pairs, or only one label.
    """
    all_pairs = [pair for split_pairs in pairs.values() for pair in split_pairs]
    checks = dict(zip(all_pairs, decode_all(_check_pair, all_pairs), strict=True))
    good = {pair: check for pair, check in checks.items() if not isinstance(check, str)}
    broken = {
        pair.image.relative_to(root).as_posix(): check for pair, check in checks.items() if isinstance(check, str)
    }
    notes: list[str] = []
    if broken:
        named = listed(f"{name} ({reason})" for name, reason in broken.items())
        text = f"{counted(len(broken), 'pair')} with an unreadable file: {named}"
        if skip_corrupt:
            notes.append(f"skipped {text}")
        else:
            errors.append(f"{text} (skip them with --skip-corrupt (skip_corrupt=True))")
    labels = {label for check in good.values() for label in check.labels}
    is_binary = all(check.is_thresholded or set(check.labels) <= {0, 255} for check in good.values())
    is_white_foreground = (class_names is None or len(class_names) == 2) and is_binary
    classes = class_names or (BINARY_CLASSES if is_white_foreground else _default_class_names(labels))
    errors += _size_errors(good, root)
    if not is_white_foreground:
        errors += _label_errors(good, root, classes, are_named=class_names is not None)
    readable = {part: [pair for pair in split_pairs if pair in good] for part, split_pairs in pairs.items()}
    if not errors:
        empty = [part for part, split_pairs in readable.items() if not split_pairs]
        errors += [f"no readable pair of image and mask in the split '{part}'" for part in empty]
    if not errors and len(labels) < 2 and class_names is None:
        errors.append(
            f"masks must have at least two labels, got only {next(iter(labels))}; list absent classes in {_CLASS_FILE}"
        )
    if errors:
        raise ValueError(f"{spec} cannot be used: {'; '.join(errors)}")
    thresholded = sum(check.is_thresholded for check in good.values())
    if thresholded:
        notes.append(
            f"{counted(thresholded, 'mask')} in a lossy format (JPEG, WebP, AVIF), which does not preserve labels: "
            f"values of at least {THRESHOLD} become {classes[1]!r}"
        )
    present: dict[MaskPair, tuple[str, ...]] = {}
    foreground: dict[MaskPair, tuple[str, ...]] = {}
    for pair, check in good.items():
        indices = sorted({min(label, 1) if is_white_foreground else label for label in check.labels})
        present[pair] = tuple(classes[index] for index in indices)
        foreground[pair] = tuple(classes[index] for index in indices if index > 0) or present[pair]
    stratum_indices, strata = rarest_label_strata(foreground)
    parts: dict[str, Any] = {}
    for part, split_pairs in readable.items():
        images = FileImages([pair.image for pair in split_pairs])
        images.metadata = {row: good[pair].metadata for row, pair in enumerate(split_pairs)}
        part_masks = FileMasks([pair.mask for pair in split_pairs], is_white_foreground=is_white_foreground)
        names = [pair.image.relative_to(root).as_posix() for pair in split_pairs]
        stratum_of_row = [stratum_indices[pair] for pair in split_pairs]
        annotations = Annotations([present[pair] for pair in split_pairs])
        parts[part] = MaskDataset(images, part_masks, range(len(names)), names, stratum_of_row, annotations)
    return Collection(root.name, classes, **parts, notes=notes, strata=strata, broken=broken)


def _size_errors(checks: Mapping[MaskPair, _PairCheck], root: Path) -> list[str]:
    """Return an error about masks of a different size than their images, if there are any."""
    mismatched = [
        f"{pair.mask.relative_to(root).as_posix()} is {_size(check.mask_size)}, its image {_size(check.metadata.size)}"
        for pair, check in checks.items()
        if check.metadata.size != check.mask_size
    ]
    if not mismatched:
        return []
    return [f"{counted(len(mismatched), 'mask')} with a different size than the image: {listed(mismatched)}"]


def _label_errors(
    checks: Mapping[MaskPair, _PairCheck], root: Path, classes: Sequence[str], *, are_named: bool
) -> list[str]:
    """Return an error about masks with labels out of range, if there are any.

    `are_named` is True if the class names come from `classes.txt`.
    """
    out_of_range: list[str] = []
    for pair, check in checks.items():
        if invalid := [str(label) for label in check.labels if label >= len(classes)]:
            out_of_range.append(f"{pair.mask.relative_to(root).as_posix()} has {', '.join(invalid[:5])}")
    if not out_of_range:
        return []
    reason = f"labels must be 0, 1, 2 … without gaps, or 0 and 255; list absent classes in {_CLASS_FILE}"
    if are_named:
        reason = f"the classes are {listed(classes)}"
    return [
        f"{counted(len(out_of_range), 'mask')} with labels out of range 0 to {len(classes) - 1} ({reason}): "
        f"{listed(out_of_range)}"
    ]


def find_pairs(folder: Path, root: Path, errors: list[str]) -> list[MaskPair]:
    """Pair the images and masks of one split by name, and report missing and duplicate files in `errors`."""
    where = "" if folder == root else f" in {folder.relative_to(root)}"
    by_kind = {kind: _files(folder / kind, root, errors) for kind in ("images", "masks")}
    images, masks = by_kind["images"], by_kind["masks"]
    empty = [f"{(folder / kind).relative_to(root)}/" for kind, files in by_kind.items() if not files]
    if empty:
        errors.append(f"no image files in {' and '.join(empty)}; {_LAYOUT}")
    if not images or not masks:
        return []
    without_mask = [images[stem].name for stem in images if stem not in masks]
    without_image = [masks[stem].name for stem in masks if stem not in images]
    if without_mask:
        errors.append(f"{counted(len(without_mask), 'image')} without a mask{where}: {listed(without_mask)}")
    if without_image:
        errors.append(f"{counted(len(without_image), 'mask')} without an image{where}: {listed(without_image)}")
    return [MaskPair(images[stem], masks[stem]) for stem in images if stem in masks]


def _files(folder: Path, root: Path, errors: list[str]) -> dict[str, Path]:
    """Return the image files of a folder by name without suffix, and report duplicate names in `errors`."""
    if not folder.is_dir():
        return {}
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if not is_image(file):
            if is_heic(file) and not file.name.startswith("."):
                errors.append(f"{file.relative_to(root)} is an HEIC image; {HEIC_HINT}")
            continue
        if file.stem in files:
            errors.append(f"duplicate name in {folder.relative_to(root)}/: {files[file.stem].name}, {file.name}")
        files[file.stem] = file
    return files


def _check_pair(pair: MaskPair) -> _PairCheck | str:
    """Decode one image and its mask, or return the reason why one of them is unreadable."""
    try:
        metadata = metadata_of(read_image(pair.image))
        values, is_thresholded = read_label_map(pair.mask)
    except ValueError as error:
        return str(error)
    labels = tuple(np.flatnonzero(np.bincount(values.reshape(-1))).tolist())
    return _PairCheck(metadata, (values.shape[1], values.shape[0]), labels, is_thresholded)


def _class_names(root: Path) -> list[str] | None:
    """Read `classes.txt`, or return None if it does not exist."""
    file = root / _CLASS_FILE
    if not file.is_file():
        return None
    names = _lines(file)
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > _MAX_LABELS:
        raise ValueError(
            f"{file} must list 2 to {_MAX_LABELS} different classes, one per line, background first, got {names}"
        )
    return names


def _lines(file: Path) -> list[str]:
    """Return the nonempty lines of a UTF-8 file without surrounding spaces."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' must be a text file in UTF-8: {error}; save it as UTF-8") from error
    return [line.strip() for line in content.splitlines() if line.strip()]


def _default_class_names(labels: set[int]) -> list[str]:
    """Return default class names for the labels 0, 1, 2, … up to the first gap, at most 256."""
    last = 0
    while last + 1 in labels and last + 1 < _MAX_LABELS:
        last += 1
    if last <= 1:
        return BINARY_CLASSES
    return ["background", *(f"class {label}" for label in range(1, last + 1))]


def _size(size: tuple[int, int]) -> str:
    """Format a size as width × height."""
    return f"{size[0]}×{size[1]}"


_KVASIR_CLASSES = ["background", "polyp"]
_SPLIT_FILES = {"train": "train.txt", "test": "val.txt"}
_TEST_FRACTION = 0.12
"""Fraction of test images in the official split, 120 of 1,000."""


def load_kvasir(path: str, config: DataConfig, target: TargetKind) -> Collection:
    """Load Kvasir-SEG in the authors' layout: `images/NAME.jpg`, `masks/NAME.jpg` (thresholded at 128).

    The official split is in `train.txt` (880 names) and `val.txt` (120 names), one name per line. `val.txt` is the test
    split; validation images are split off from the training images. Without these files, the first 12% of the names
    (120 of 1,000), ordered by SHA-256, form a reproducible but unofficial test split.
    """
    root = existing_folder(path, "kvasir", "with images/ and masks/ inside")
    errors: list[str] = []
    pairs = {pair.image.stem: pair for pair in find_pairs(root, root, errors)}
    names = _official_split(root, pairs, errors)
    notes = []
    if names is None:
        ordered = sorted(pairs, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        test = set(ordered[: max(1, round(_TEST_FRACTION * len(ordered)))])
        names = {
            "train": [name for name in pairs if name not in test],
            "test": [name for name in pairs if name in test],
        }
        notes.append(
            f"kvasir: no {' or '.join(_SPLIT_FILES.values())} in the folder; {len(names['test'])} test images are "
            "selected by SHA-256 of their names (not the official split)"
        )
    parts: dict[str, list[MaskPair]] = {}
    for part, chosen in names.items():
        parts[part] = [pairs[name] for name in chosen if name in pairs]
    collection = collect_masks(f"kvasir:{path}", root, parts, errors, _KVASIR_CLASSES, config.skip_corrupt)
    collection.name = "kvasir"
    collection.has_parts = True
    collection.notes += notes
    return collection


def _official_split(root: Path, pairs: dict[str, MaskPair], errors: list[str]) -> dict[str, list[str]] | None:
    """Return training and test names from the split files, or None if neither exists; report problems in `errors`."""
    files = {part: root / name for part, name in _SPLIT_FILES.items()}
    present = [file for file in files.values() if file.is_file()]
    if not present:
        return None
    if len(present) < len(files):
        absent = next(file.name for file in files.values() if not file.is_file())
        errors.append(
            f"{present[0].name} exists but {absent} does not; add it, or remove {present[0].name} to split by name"
        )
        return {"train": list(pairs)}
    names = {part: _names(file) for part, file in files.items()}
    for part, chosen in names.items():
        unknown = [name for name in chosen if name not in pairs]
        if unknown:
            errors.append(
                f"{counted(len(unknown), 'name')} in {_SPLIT_FILES[part]} without an image and a mask: "
                f"{listed(unknown)}"
            )
    shared = sorted(set(names["train"]) & set(names["test"]))
    if shared:
        split_files = " and ".join(_SPLIT_FILES.values())
        errors.append(f"{counted(len(shared), 'name')} in both {split_files}: {listed(shared)}")
    return names


def _names(file: Path) -> list[str]:
    """Read the unique names in a split file, without folders and suffixes."""
    return list(dict.fromkeys(Path(line).stem for line in _lines(file)))
