"""Kvasir-SEG: 1,000 photographs from inside the bowel with the outlines of polyps, 880 to train and 120 to test."""

import hashlib
from pathlib import Path

from snella.data.collection import Collection
from snella.data.folder import existing_folder, listed
from snella.data.masks import MaskPair, collect_masks, find_pairs
from snella.data.overlap import overlap_note

__all__ = ["load_kvasir"]

CLASSES = ["background", "polyp"]
_SPLIT_FILES = {"train": "train.txt", "test": "val.txt"}
_TEST_SHARE = 0.12


def load_kvasir(path: str, *, skip_broken: bool = False) -> Collection:
    """Collect Kvasir-SEG as its authors distribute it: `images/NAME.jpg`, `masks/NAME.jpg` (cut at 128).

    The official split is in `train.txt` (880 names) and `val.txt` (120), one name a line; the latter is the test part,
    and validation is split off the training part. Without these files, the names are ordered by their SHA-256 and the
    first 12 % are the test part: 120 of 1,000, the same ones everywhere, but not the official ones.

    Args:
        path: The folder.
        skip_broken: Leave pairs with an unreadable file out and note them instead of refusing.

    Raises:
        FileNotFoundError: There is no such folder; near names are given.
        ValueError: As `load_masks`; one split file without the other; names in both of them, or without a file.
    """
    root = existing_folder(path, "kvasir", "with images/ and masks/ inside")
    faults: list[str] = []
    pairs = {pair.image.stem: pair for pair in find_pairs(root, root, faults)}
    names = _official_split(root, pairs, faults)
    notes = []
    if names is None:
        names = _own_split(list(pairs))
        notes.append(
            f"kvasir: no {' and '.join(_SPLIT_FILES.values())} in the folder: {len(names['test'])} test images chosen "
            "by the SHA-256 of their names, which is not the official split"
        )
    parts = {part: [pairs[name] for name in chosen if name in pairs] for part, chosen in names.items()}
    collection = collect_masks(
        f"kvasir:{path}", root, parts, faults, class_names=CLASSES, has_parts=True, skip_broken=skip_broken
    )
    collection.name = "kvasir"
    if collection.test is not None:
        notes += overlap_note(collection.train, collection.test)
    collection.notes += notes
    return collection


def _official_split(root: Path, pairs: dict[str, MaskPair], faults: list[str]) -> dict[str, list[str]] | None:
    """Names of the training and the test part from the split files, None where neither is there."""
    files = {part: root / name for part, name in _SPLIT_FILES.items()}
    present = [file for file in files.values() if file.is_file()]
    if not present:
        return None
    if len(present) < len(files):
        absent = next(file.name for file in files.values() if not file.is_file())
        faults.append(f"{present[0].name} is there but {absent} is not; add it, or remove both for our own split")
        return {"train": list(pairs)}
    names = {part: _names(file) for part, file in files.items()}
    for part, chosen in names.items():
        unknown = [name for name in chosen if name not in pairs]
        if unknown:
            faults.append(f"{len(unknown)} names in {_SPLIT_FILES[part]} without image and mask: {listed(unknown)}")
    both = sorted(set(names["train"]) & set(names["test"]))
    if both:
        faults.append(f"{len(both)} names stand in {' and in '.join(_SPLIT_FILES.values())}: {listed(both)}")
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
