"""VTAB-1k: 19 tasks with 1,000 images for training, as lists of files beside the images."""

from dataclasses import dataclass
from pathlib import Path

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

__all__ = ["VTAB", "VTAB_TASKS", "VtabTask", "inspect_vtab", "load_vtab"]

_LAYOUT = "TASK/{train800,val200,train800val200,test}.txt and TASK/images/{train800,val200,train800val200,test}/"
_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}
_JOINED = "train800val200"


@dataclass(frozen=True)
class VtabTask:
    """One task.

    Attributes:
        name: Of its folder, as most repositories have it.
        group: natural, specialised or structured.
        classes: How many classes.
        test_size: How many test images.
        aliases: Other names of its folder.
    """

    name: str
    group: str
    classes: int
    test_size: int
    aliases: tuple[str, ...] = ()


VTAB_TASKS: dict[str, VtabTask] = {
    task.name: task
    for task in (
        VtabTask("cifar", "natural", 100, 10_000, ("cifar100",)),
        VtabTask("caltech101", "natural", 102, 6_084),
        VtabTask("dtd", "natural", 47, 1_880),
        VtabTask("oxford_flowers102", "natural", 102, 6_149, ("flowers102",)),
        VtabTask("svhn", "natural", 10, 26_032),
        VtabTask("sun397", "natural", 397, 21_750),
        VtabTask("oxford_iiit_pet", "natural", 37, 3_669, ("pets",)),
        VtabTask("patch_camelyon", "specialised", 2, 32_768),
        VtabTask("eurosat", "specialised", 10, 5_400),
        VtabTask("resisc45", "specialised", 45, 6_300),
        VtabTask("diabetic_retinopathy", "specialised", 5, 42_670),
        VtabTask("clevr_count", "structured", 8, 15_000),
        VtabTask("clevr_dist", "structured", 6, 15_000),
        VtabTask("dmlab", "structured", 6, 22_735),
        VtabTask("kitti", "structured", 4, 711),
        VtabTask("dsprites_loc", "structured", 16, 73_728),
        VtabTask("dsprites_ori", "structured", 16, 73_728),
        VtabTask("smallnorb_azi", "structured", 18, 12_150),
        VtabTask("smallnorb_ele", "structured", 9, 12_150),
    )
}
"""The tasks in the order of the paper's Table XIII."""


def load_vtab(path: str, *, strict_sizes: bool = True) -> Collection:
    """Collect one task: `train800` for training, `val200` to choose on, and the test images.

    Args:
        path: The task's folder, named as in `VTAB_TASKS` or by another of its names.
        strict_sizes: Refuse numbers of images or classes that are not the benchmark's; otherwise they are noted.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Not a task's name, or whatever `inspect_vtab` finds, all in one message.
    """
    task, found = VTAB.load(path, strict_sizes=strict_sizes)
    return Collection(
        task.name,
        found.classes,
        dataset_of(found.parts["train800"]),
        dataset_of(found.parts["val200"]),
        dataset_of(found.parts["test"]),
        has_parts=True,
        notes=found.notes,
        is_resized_whole=True,
        official_joins_val=True,
    )


def inspect_vtab(folder: Path, task: VtabTask) -> Inspection:
    """Read and check the lists of one task.

    Args:
        folder: The task's folder; exists.
        task: Which one it is.

    Returns:
        What is there and what is wrong: lists that are missing or malformed, labels out of range, files that do not
        exist, images that are in two parts, other numbers of images or classes than the benchmark's.
    """
    found = Inspection(task.name, folder, classes=[str(label) for label in range(task.classes)])
    for name in (*_SIZES, "test"):
        list_file = folder / f"{name}.txt"
        if list_file.is_file():
            part, errors = _read(list_file, folder)
            found.parts[name] = part
            found.errors += errors
    _complete(found)
    parts = found.parts
    for part in parts.values():
        found.errors += file_errors(part)
    errors, deviations = class_errors(list(parts.values()), task.classes)
    found.errors += errors
    found.deviations += deviations
    for name, size in {**_SIZES, "test": task.test_size}.items():
        if name in parts and len(parts[name]) != size:
            found.deviations.append(f"{name} must have {size:,} images, got {len(parts[name]):,}")
    for one, other in (("train800", "val200"), (_JOINED, "test"), ("train800", "test"), ("val200", "test")):
        is_covered = one != _JOINED and other == "test" and _JOINED in parts and not found.errors
        if one in parts and other in parts and not is_covered:
            errors, notes = overlap_errors(parts[one], parts[other])
            found.errors += errors
            found.notes += notes
    return found


def _complete(found: Inspection) -> None:
    """Derive `train800` and `val200` where only both together are listed, and check that the lists agree."""
    parts = found.parts
    joined = parts.get(_JOINED)
    if joined is not None and "train800" not in parts and "val200" not in parts and len(joined) == 1000:
        for name, rows in (("train800", slice(800)), ("val200", slice(800, None))):
            parts[name] = ListedPart(name, joined.root, joined.files[rows], joined.labels[rows])
        found.notes.append(f"{found.name}: train800 and val200 are the first 800 and the last 200 of {_JOINED}.txt")
    missing = [f"{name}.txt" for name in ("train800", "val200", "test") if name not in parts]
    if missing:
        found.errors.append(f"missing in '{found.folder}': {', '.join(missing)}; the layout is {_LAYOUT}")
    elif joined is not None and joined.labels != parts["train800"].labels + parts["val200"].labels:
        found.errors.append(f"{_JOINED}.txt must list the labels of train800.txt followed by those of val200.txt")


def _read(list_file: Path, folder: Path) -> tuple[ListedPart, list[str]]:
    """The lines `images/SPLIT/NAME LABEL` of a list, and a text about those that are not of this form."""
    files, labels, malformed = [], [], []
    for number, line in enumerate(list_file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if name and label.lstrip("-").isdigit():
            files.append(name.strip())
            labels.append(int(label))
        else:
            malformed.append(f"line {number} is {line.strip()!r}")
    errors = []
    if malformed:
        errors.append(
            f"{list_file.name} must hold lines like 'images/test/000000.jpg 3', but {len(malformed)} are not: "
            f"{listed(malformed)}"
        )
    elif not files:
        errors.append(f"{list_file.name} is empty")
    return ListedPart(list_file.stem, folder, files, labels), errors


VTAB = BenchmarkFamily("vtab", "VTAB-1k", "task", VTAB_TASKS, _LAYOUT, inspect_vtab)
"""The benchmark: how its data sets are known, found and read."""
