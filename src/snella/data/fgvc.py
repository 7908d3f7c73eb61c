"""FGVC: five fine-grained data sets, as JSON lists next to the images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snella.data.benchmarks import (
    BenchmarkFamily,
    Inspection,
    ListedPart,
    class_errors,
    dataset_of,
    file_errors,
    overlap_errors,
)
from snella.data.datasets import Collection
from snella.data.folder import listed

__all__ = ["FGVC", "FGVC_DATASETS", "FgvcDataset", "inspect_fgvc", "load_fgvc"]

_LAYOUT = "DATASET/{train,val,test}.json, each one object {image path: class}, beside the images"
_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class FgvcDataset:
    """One data set.

    Attributes:
        name: Of its folder, as in the authors' scripts.
        classes: How many classes.
        sizes: How many images in train, val and test.
        images: Folder inside it that image paths are relative to; empty for its own.
        aliases: Other names of its folder.
    """

    name: str
    classes: int
    sizes: tuple[int, int, int]
    images: str = ""
    aliases: tuple[str, ...] = ()


FGVC_DATASETS: dict[str, FgvcDataset] = {
    dataset.name: dataset
    for dataset in (
        FgvcDataset("cub", 200, (5394, 600, 5794), "images", ("CUB_200_2011",)),
        FgvcDataset("nabirds", 555, (21536, 2393, 24633), "images"),
        FgvcDataset("oxfordflower", 102, (1020, 1020, 6149), "", ("oxfordflowers", "OxfordFlower")),
        FgvcDataset("stanforddog", 120, (10800, 1200, 8580), "Images", ("stanforddogs", "StanfordDogs")),
        FgvcDataset("stanfordcar", 196, (7329, 815, 8041), "", ("stanfordcars", "StanfordCars")),
    )
}
"""The data sets in the order of the paper's Table I."""


def load_fgvc(path: str, *, strict_sizes: bool = True) -> Collection:
    """Collect one data set.

    Args:
        path: Its folder, named as in `FGVC_DATASETS` or by another of its names.
        strict_sizes: Refuse numbers of images or classes that are not the benchmark's; otherwise they are noted.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Not a data set's name, or whatever `inspect_fgvc` finds, all in one message.
    """
    dataset, found = FGVC.load(path, strict_sizes=strict_sizes)
    parts = {name: dataset_of(found.parts[name]) for name in _PARTS if name in found.parts}
    return Collection(
        dataset.name,
        found.classes,
        parts["train"],
        parts.get("val"),
        parts["test"],
        has_parts=True,
        notes=found.notes,
    )


def inspect_fgvc(folder: Path, dataset: FgvcDataset) -> Inspection:
    """Read and check the lists of one data set.

    Classes are numbered by their ids over all lists together: a list that lacks a class would shift the numbers of
    the classes behind it. Without `train.json`, `trainval.json` is read in its place, and a validation part is split
    off it.

    Args:
        folder: The data set's folder; exists.
        dataset: Which one it is.

    Returns:
        What is there and what is wrong: lists that are missing or malformed, files that do not exist, images that are
        in two parts, other numbers of images or classes than the benchmark's.
    """
    found = Inspection(dataset.name, folder)
    lists = _lists(found)
    ids = sorted({label for entries in lists.values() for label in entries.values()})
    numbers = {label: number for number, label in enumerate(ids)}
    root = folder / dataset.images
    for name, entries in lists.items():
        labels = [numbers[label] for label in entries.values()]
        found.parts[name] = ListedPart(name, root, list(entries), labels)
    found.classes = _class_names(ids, list(found.parts.values()))
    for part in found.parts.values():
        found.errors += file_errors(part)
    _check_numbers(found, dataset)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if one in found.parts and other in found.parts:
            errors, notes = overlap_errors(found.parts[one], found.parts[other])
            found.errors += errors
            found.notes += notes
    return found


def _lists(found: Inspection) -> dict[str, dict[str, int]]:
    """From image path to class id, for every list that there is."""
    lists = {}
    files = {name: found.folder / f"{name}.json" for name in _PARTS}
    joined = found.folder / "trainval.json"
    if not files["train"].is_file() and joined.is_file():
        del files["val"]
        files["train"] = joined
        found.notes.append(f"{found.name}: no train.json; trainval.json is divided into training and validation")
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        found.errors.append(f"missing in '{found.folder}': {', '.join(missing)}; the layout is {_LAYOUT}")
    for name, file in files.items():
        if file.is_file():
            entries, error = _read(file)
            if error:
                found.errors.append(error)
            else:
                lists[name] = entries
    return lists


def _read(file: Path) -> tuple[dict[str, int], str]:
    """One list, and what is wrong with it; ids written as text count as numbers."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"{file.name} must be a JSON file: {error}"
    if not isinstance(content, dict) or not content:
        return {}, f"{file.name} must hold an object {{image path: class}}, got {str(content)[:40]!r}"
    wrong = [f"{path!r}: {label!r}" for path, label in content.items() if not _is_number(label)]
    if wrong:
        return {}, f"{file.name} must give each image an integer, but {len(wrong)} have none: {listed(wrong)}"
    return {path: int(label) for path, label in content.items()}, ""


def _is_number(label: Any) -> bool:
    """Whether a class id is an integer, or a string of digits."""
    return not isinstance(label, bool) and (isinstance(label, int) or (isinstance(label, str) and label.isdigit()))


def _class_names(ids: list[int], parts: list[ListedPart]) -> list[str]:
    """Names of the images' folders where each class has one of its own, else the ids."""
    folders: list[set[str]] = [set() for _ in ids]
    for part in parts:
        for file, label in zip(part.files, part.labels, strict=True):
            folders[label].add(Path(file).parent.name)
    names = [next(iter(found)) for found in folders if len(found) == 1]
    if len(names) == len(ids) == len(set(names)) and all(names):
        return names
    return [str(label) for label in ids]


def _check_numbers(found: Inspection, dataset: FgvcDataset) -> None:
    """Compare the numbers of classes and images with the benchmark's."""
    if len(found.classes) > dataset.classes:
        found.errors.append(f"{dataset.classes} classes are required, the lists name {len(found.classes)}")
    elif found.parts:
        found.deviations += class_errors(list(found.parts.values()), dataset.classes)[1]
    sizes = dict(zip(_PARTS, dataset.sizes, strict=True))
    if "val" not in found.parts and found.notes:
        sizes["train"] += sizes["val"]
    for name, part in found.parts.items():
        if len(part) != sizes[name]:
            found.deviations.append(f"{name} must have {sizes[name]:,} images, got {len(part):,}")


FGVC = BenchmarkFamily("fgvc", "FGVC", "data set", FGVC_DATASETS, _LAYOUT, inspect_fgvc)
"""The benchmark: how its data sets are known, found and read."""
