"""A folder of images and masks: `images/` and `masks/`, or `train|val|test/` with both inside."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snella_app.data.datasets import Collection, FileImages, FileMasks, ImageDataset, MaskDataset
from snella_app.data.folder import existing_folder
from snella_app.data.images import IMAGE_SUFFIXES, THRESHOLD, read_image, read_label_map
from snella_app.text import listed

_OVERLAP_THREADS = 4  # decoding and hashing release the interpreter lock
_SHOWN = 3


def same_images(first: ImageDataset, second: ImageDataset) -> list[tuple[str, str]]:
    """Pairs of names whose decoded pixels are equal, one from each data set.

    A picture that was compressed or resized again has other pixels and is not found.
    """
    known = dict(zip(_digests(first), first.names, strict=True))
    return [
        (known[digest], name) for digest, name in zip(_digests(second), second.names, strict=True) if digest in known
    ]


def overlap_note(train: ImageDataset, test: ImageDataset, part: str = "test") -> list[str]:
    """One note where test images are training images as well, none where all differ."""
    both = same_images(train, test)
    if not both:
        return []
    shown = listed((f"{mine} = {theirs}" for mine, theirs in both), _SHOWN)
    return [
        f"{len(both)} of {len(test)} {part} images are training images too, by their pixels: {shown}; "
        f"results on {part} are optimistic by as much"
    ]


def _digests(images: ImageDataset) -> Sequence[str]:
    """SHA-256 of the size and the pixels of each image."""

    def digest(index: int) -> str:
        image = images.image(index)
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()

    with ThreadPoolExecutor(min(_OVERLAP_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(digest, range(len(images))))


BINARY_CLASSES = ["background", "foreground"]
MASK_STRATA = ["image with a mask"]
"""What a split of images with masks is stratified by: they are all of one kind."""
_LAYOUT = "it must hold images/NAME.jpg and masks/NAME.png, or train, val and test folders with both inside"
_PARTS = ("train", "val", "test")
_CLASS_FILE = "classes.txt"
_THREADS = 4  # decoding releases the interpreter lock
_MAX_LABELS = 256


@dataclass(frozen=True)
class MaskPair:
    """An image file and its mask file."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class _PairCheck:
    """A decoded pair: the error if it cannot be read, both sizes (width, height), and the labels that occur."""

    broken: str = ""
    image_size: tuple[int, int] = (0, 0)
    mask_size: tuple[int, int] = (0, 0)
    labels: tuple[int, ...] = ()
    is_thresholded: bool = False


def load_masks(path: str, *, skip_corrupt: bool = False) -> Collection:
    """Collect the images of a folder with their masks; an image and its mask have the same name but for the ending.

    A mask's values are class numbers: palette indices or gray values 0, 1, 2 … without gaps; 0 is the background. Masks
    of 0 and 255 are binary, and JPEG masks are cut at 128 to become so. `classes.txt` in the folder names the classes,
    one a line, the background first, and may name more than occur. Every file is decoded once.

    Args:
        path: The folder.
        skip_corrupt: Leave pairs with an unreadable file out and note them instead of refusing.

    Raises:
        FileNotFoundError: There is no such folder; near names are given.
        ValueError: Everything that is wrong with the files, in one message: images without masks and masks without
            images, sizes that differ, labels out of range, unreadable files.
    """
    root = existing_folder(path, "masks", "with images/ and masks/ inside")
    divided = (root / "train" / "images").is_dir()
    folders = {part: root / part for part in _PARTS if (root / part).is_dir()} if divided else {"train": root}
    errors: list[str] = []
    pairs = {part: find_pairs(folder, root, errors) for part, folder in folders.items()}
    collection = collect_masks(
        f"masks:{path}",
        root,
        pairs,
        errors,
        class_names=_class_names(root),
        has_parts=divided,
        skip_corrupt=skip_corrupt,
    )
    for part in (collection.val, collection.test):
        if part is not None:
            collection.notes += overlap_note(collection.train, part, "val" if part is collection.val else "test")
    return collection


def collect_masks(
    spec: str,
    root: Path,
    pairs: Mapping[str, Sequence[MaskPair]],
    errors: list[str],
    *,
    class_names: list[str] | None = None,
    has_parts: bool = False,
    skip_corrupt: bool = False,
) -> Collection:
    """Decode all pairs once and make a collection of them.

    Args:
        spec: What the user typed, for messages.
        root: Folder that names are relative to.
        pairs: Files of each part.
        errors: What is known to be wrong already.
        class_names: Names by label; found from the labels where None.
        has_parts: Whether the data is divided by itself.
        skip_corrupt: Leave pairs with an unreadable file out and note them.

    Raises:
        ValueError: As `load_masks`.
    """
    everything = [pair for found in pairs.values() for pair in found]
    checks = dict(zip(everything, _check_pairs(everything), strict=True))
    names = {pair: pair.image.relative_to(root).as_posix() for pair in everything}
    masks = {pair: pair.mask.relative_to(root).as_posix() for pair in everything}
    broken = {pair: check.broken for pair, check in checks.items() if check.broken}
    notes: list[str] = []
    if broken:
        text = f"{_many(len(broken), 'pair')} with an unreadable file: {listed(list(broken.values()))}"
        if skip_corrupt:
            notes.append(f"left out {text}")
        else:
            errors.append(f"{text} (leave them out with --skip-corrupt (skip_corrupt=True))")
    good = {pair: check for pair, check in checks.items() if not check.broken}
    unlike = [
        f"{masks[pair]} is {_size(check.mask_size)}, its image {_size(check.image_size)}"
        for pair, check in good.items()
        if check.image_size != check.mask_size
    ]
    if unlike:
        errors.append(f"{_many(len(unlike), 'mask')} of another size than the image: {listed(unlike)}")
    thresholded = sum(check.is_thresholded for check in good.values())
    labels = Counter(label for check in good.values() for label in check.labels)
    is_white = class_names is None or len(class_names) == 2
    is_white = is_white and set(labels) <= {0, 255}
    classes = class_names or _found_classes(1 if is_white else _without_gaps(labels))
    if good and not is_white:
        errors += _out_of_range({masks[pair]: check.labels for pair, check in good.items()}, classes, class_names)
    if not errors:
        errors += _unusable(labels, pairs, broken)
    if errors:
        raise ValueError(f"{spec} cannot be used: {'; '.join(errors)}")
    if thresholded:
        notes.append(
            f"{_many(thresholded, 'mask')} in a lossy format (JPEG), which does not preserve labels: "
            f"values from {THRESHOLD} count as {classes[1]!r}"
        )
    parts = {
        part: _dataset([pair for pair in found if pair not in broken], names, is_white) for part, found in pairs.items()
    }
    return Collection(
        root.name,
        classes,
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        has_parts,
        notes,
        strata=MASK_STRATA,
    )


def find_pairs(folder: Path, root: Path, errors: list[str]) -> list[MaskPair]:
    """Find the images and masks of one part by name; what has no partner is added to the errors.

    Args:
        folder: Holds `images/` and `masks/`.
        root: Folder that messages name files relative to.
        errors: What is wrong is added here.
    """
    where = "" if folder == root else f" in {folder.relative_to(root)}"
    found = {kind: _files(folder / kind, root, errors) for kind in ("images", "masks")}
    images, masks = found["images"], found["masks"]
    for kind, files in found.items():
        if not files:
            errors.append(f"no image files in {(folder / kind).relative_to(root)}/; {_LAYOUT}")
    if not images or not masks:
        return []
    without_mask = [images[stem].name for stem in images if stem not in masks]
    without_image = [masks[stem].name for stem in masks if stem not in images]
    if without_mask:
        errors.append(f"{_many(len(without_mask), 'image')} without a mask{where}: {listed(without_mask)}")
    if without_image:
        errors.append(f"{_many(len(without_image), 'mask')} without an image{where}: {listed(without_image)}")
    return [MaskPair(images[stem], masks[stem]) for stem in images if stem in masks]


def _files(folder: Path, root: Path, errors: list[str]) -> dict[str, Path]:
    """Image files of a folder by their name without ending."""
    if not folder.is_dir():
        return {}
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith("."):
            continue
        if file.stem in files:
            errors.append(f"two files of one name in {folder.relative_to(root)}/: {files[file.stem].name}, {file.name}")
        files[file.stem] = file
    return files


def _check_pairs(pairs: Sequence[MaskPair]) -> list[_PairCheck]:
    """Decode all files."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(_check_pair, pairs))


def _check_pair(pair: MaskPair) -> _PairCheck:
    """Decode one image and its mask."""
    try:
        image = read_image(pair.image)
        values, is_thresholded = read_label_map(pair.mask)
    except ValueError as error:
        return _PairCheck(broken=str(error))
    labels = tuple(np.flatnonzero(np.bincount(values.reshape(-1))).tolist())
    return _PairCheck("", image.size, (values.shape[1], values.shape[0]), labels, is_thresholded)


def _class_names(root: Path) -> list[str] | None:
    """The lines of `classes.txt`, None where there is no such file."""
    file = root / _CLASS_FILE
    if not file.is_file():
        return None
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > _MAX_LABELS:
        raise ValueError(
            f"{file} must name 2 to {_MAX_LABELS} different classes, one a line, the background first, got {names}"
        )
    return names


def _without_gaps(labels: Mapping[int, int]) -> int:
    """The last of the labels 0, 1, 2 … that occur one after the other."""
    last = 0
    while last + 1 in labels:
        last += 1
    return max(last, 1)


def _found_classes(last: int) -> list[str]:
    """Default class names."""
    return BINARY_CLASSES if last == 1 else ["background", *(f"class {label}" for label in range(1, last + 1))]


def _out_of_range(
    labels: Mapping[str, tuple[int, ...]], classes: list[str], class_names: list[str] | None
) -> list[str]:
    """The error of masks with labels that no class has."""
    strange = {mask: [label for label in found if label >= len(classes)] for mask, found in labels.items()}
    texts = [f"{mask} has {', '.join(map(str, found[:5]))}" for mask, found in strange.items() if found]
    if not texts:
        return []
    why = (
        f"{_CLASS_FILE} names {len(classes)} classes"
        if class_names
        else f"labels count up from 0 without gaps, or are 0 and 255; {_CLASS_FILE} may name rare ones"
    )
    return [f"{_many(len(texts), 'mask')} with labels out of range 0 to {len(classes) - 1} ({why}): {listed(texts)}"]


def _unusable(
    labels: Mapping[int, int], pairs: Mapping[str, Sequence[MaskPair]], broken: Mapping[MaskPair, str]
) -> list[str]:
    """Errors of the files together."""
    errors = [
        f"no readable pair of image and mask in the part '{part}'"
        for part, found in pairs.items()
        if all(pair in broken for pair in found)
    ]
    if not errors and len(labels) < 2:
        errors.append(f"all masks hold one label only, {next(iter(labels))}; there is nothing to learn")
    return errors


def _dataset(pairs: Sequence[MaskPair], names: Mapping[MaskPair, str], is_white: bool) -> MaskDataset:
    """The images of one part."""
    images, masks = (
        FileImages([p.image for p in pairs]),
        FileMasks([p.mask for p in pairs], is_white_foreground=is_white),
    )
    return MaskDataset(images, masks, range(len(pairs)), [names[pair] for pair in pairs])


def _size(size: tuple[int, int]) -> str:
    """Width × height."""
    return f"{size[0]}×{size[1]}"


def _many(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


CLASSES = ["background", "polyp"]
_SPLIT_FILES = {"train": "train.txt", "test": "val.txt"}
_TEST_SHARE = 0.12


def load_kvasir(path: str, *, skip_corrupt: bool = False) -> Collection:
    """Collect Kvasir-SEG as its authors distribute it: `images/NAME.jpg`, `masks/NAME.jpg` (cut at 128).

    The official split is in `train.txt` (880 names) and `val.txt` (120), one name a line; the latter is the test part,
    and validation is split off the training part. Without these files, the names are ordered by their SHA-256 and the
    first 12 % are the test part: 120 of 1,000, the same ones everywhere, but not the official ones.

    Args:
        path: The folder.
        skip_corrupt: Leave pairs with an unreadable file out and note them instead of refusing.

    Raises:
        FileNotFoundError: There is no such folder; near names are given.
        ValueError: As `load_masks`; one split file without the other; names in both of them, or without a file.
    """
    root = existing_folder(path, "kvasir", "with images/ and masks/ inside")
    errors: list[str] = []
    pairs = {pair.image.stem: pair for pair in find_pairs(root, root, errors)}
    names = _official_split(root, pairs, errors)
    notes = []
    if names is None:
        names = _own_split(list(pairs))
        notes.append(
            f"kvasir: no {' and '.join(_SPLIT_FILES.values())} in the folder: {len(names['test'])} test images chosen "
            "by the SHA-256 of their names, which is not the official split"
        )
    parts = {part: [pairs[name] for name in chosen if name in pairs] for part, chosen in names.items()}
    collection = collect_masks(
        f"kvasir:{path}", root, parts, errors, class_names=CLASSES, has_parts=True, skip_corrupt=skip_corrupt
    )
    collection.name = "kvasir"
    if collection.test is not None:
        notes += overlap_note(collection.train, collection.test)
    collection.notes += notes
    return collection


def _official_split(root: Path, pairs: dict[str, MaskPair], errors: list[str]) -> dict[str, list[str]] | None:
    """Names of the training and the test part from the split files, None where neither is there."""
    files = {part: root / name for part, name in _SPLIT_FILES.items()}
    present = [file for file in files.values() if file.is_file()]
    if not present:
        return None
    if len(present) < len(files):
        absent = next(file.name for file in files.values() if not file.is_file())
        errors.append(f"{present[0].name} is there but {absent} is not; add it, or remove both for a split by name")
        return {"train": list(pairs)}
    names = {part: _names(file) for part, file in files.items()}
    for part, chosen in names.items():
        unknown = [name for name in chosen if name not in pairs]
        if unknown:
            errors.append(f"{len(unknown)} names in {_SPLIT_FILES[part]} without image and mask: {listed(unknown)}")
    both = sorted(set(names["train"]) & set(names["test"]))
    if both:
        errors.append(f"{len(both)} names stand in {' and in '.join(_SPLIT_FILES.values())}: {listed(both)}")
    return names


def _names(file: Path) -> list[str]:
    """Names in a split file, without folders and endings."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(Path(line).stem if "." in line else Path(line).name for line in lines if line))


def _own_split(names: list[str]) -> dict[str, list[str]]:
    """The same 12 % for the test everywhere, whatever the folder's order."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    test = set(ordered[: max(1, round(_TEST_SHARE * len(ordered)))])
    return {"train": [n for n in names if n not in test], "test": [n for n in names if n in test]}
