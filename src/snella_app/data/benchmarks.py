"""VTAB-1k and FGVC: folder layouts, loading and validation."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from snella_app.console import counted
from snella_app.data.datasets import Collection, FileImages, ImageDataset
from snella_app.text import listed, nearest

_MAX_COPIES = 0.05


@dataclass(frozen=True)
class ListedPart:
    """Benchmark split defined by a list file.

    Attributes:
        name: Name of the list file without suffix, e.g. `train800`.
        root: Base folder of the file names.
        files: Listed file names.
        labels: Class index of each file.
    """

    name: str
    root: Path
    files: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class Inspection:
    """Inspection result of one benchmark dataset.

    Attributes:
        name: Name of the dataset in the benchmark.
        folder: Folder of the dataset.
        parts: Readable lists by name.
        classes: Class names by index.
        errors: Problems that make the data unusable.
        deviations: Deviations from the benchmark's numbers of images or classes; usable but not comparable.
        notes: Notes for the user.
    """

    name: str
    folder: Path
    parts: dict[str, ListedPart] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, spec: str, *, strict_sizes: bool) -> None:
        """Raise all errors in one message; allowed deviations become notes.

        Args:
            spec: Data specification.
            strict_sizes: Treat deviations as errors.

        Raises:
            ValueError: If the inspection has errors.
        """
        problems = [*self.errors, *(self.deviations if strict_sizes else [])]
        if problems:
            remedy = "; to use it anyway, pass strict_sizes=False" if strict_sizes and not self.errors else ""
            raise ValueError(f"{spec} does not match the benchmark's {self.name}: {'; '.join(problems)}{remedy}")
        self.notes += [f"differs from the benchmark: {deviation}" for deviation in self.deviations]

    def check_overlap(self, first: str, second: str) -> None:
        """Record the `overlap_errors` of two splits if both exist."""
        if first in self.parts and second in self.parts:
            errors, notes = overlap_errors(self.parts[first], self.parts[second])
            self.errors += errors
            self.notes += notes

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Record splits whose number of images differs from the benchmark."""
        self.deviations += [
            f"{name} must have {size:,} images, got {len(self.parts[name]):,}"
            for name, size in sizes.items()
            if name in self.parts and len(self.parts[name]) != size
        ]


def dataset_of(part: ListedPart) -> ImageDataset:
    """Build the dataset of one split, with names as listed."""
    source = FileImages([part.root / file for file in part.files])
    return ImageDataset(source, range(len(part)), part.labels, part.files)


def file_errors(part: ListedPart) -> list[str]:
    """Return one error for duplicate files and one for missing files, if any."""
    errors = []
    duplicates = [file for file, count in Counter(part.files).items() if count > 1]
    if duplicates:
        errors.append(f"{part.name} has {counted(len(duplicates), 'duplicate file')}: {listed(duplicates)}")
    existing = _sizes(part)
    missing = [file for file in part.files if file not in existing]
    if missing:
        errors.append(
            f"{len(missing)} of {len(part)} files listed in {part.name} do not exist in '{part.root}': "
            f"{listed(missing)}"
        )
    return errors


def overlap_errors(first: ListedPart, second: ListedPart) -> tuple[list[str], list[str]]:
    """Find images shared by two splits: the same file or identical files.

    Only files whose size occurs in both splits are read. Some benchmarks contain a few copies under other names (e.g.
    symmetric rendered shapes), so copies of up to 5% of the evaluation split are notes instead of errors.

    Args:
        first: Training split.
        second: Evaluation split.

    Returns:
        Errors and notes.
    """
    common = sorted(
        {str(first.root / file) for file in first.files} & {str(second.root / file) for file in second.files}
    )
    if common:
        return [
            f"{counted(len(common), 'image')} in both {first.name} and {second.name}: "
            f"{listed([Path(file).name for file in common])}"
        ], []
    copies = _copies(first, second)
    if not copies:
        return [], []
    text = f"{len(copies)} of {len(second)} images of {second.name} with copies in {first.name}: {listed(copies)}"
    return ([text], []) if len(copies) > _MAX_COPIES * len(second) else ([], [text])


def class_errors(parts: Sequence[ListedPart], classes: int) -> tuple[list[str], list[str]]:
    """Find labels out of range and classes without images.

    Args:
        parts: All splits of the dataset.
        classes: Number of classes of the benchmark.

    Returns:
        Errors and deviations.
    """
    errors = []
    for part in parts:
        outside = sorted({label for label in part.labels if not 0 <= label < classes})
        if outside:
            errors.append(f"labels must be in 0 … {classes - 1}, {part.name} has {listed([str(o) for o in outside])}")
    present = {label for part in parts for label in part.labels if 0 <= label < classes}
    if len(present) == classes or not present:
        return errors, []
    absent = [str(label) for label in range(classes) if label not in present]
    return errors, [f"{classes} classes must have images, got {len(present)}; missing: {listed(absent)}"]


def _copies(first: ListedPart, second: ListedPart) -> list[str]:
    """Return `SECOND = FIRST` for each pair of identical files."""

    def digest(file: Path) -> bytes:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).digest()

    sizes, other_sizes = _sizes(first), _sizes(second)
    common = set(sizes.values()) & set(other_sizes.values())
    by_digest: dict[bytes, str] = {}
    for file in first.files:
        if sizes.get(file) in common:
            by_digest.setdefault(digest(first.root / file), file)
    copies = []
    for file in second.files:
        if other_sizes.get(file) in common and (original := by_digest.get(digest(second.root / file))):
            copies.append(f"{file} = {original}")
    return copies


def _sizes(part: ListedPart) -> dict[str, int]:
    """Return the size in bytes of every existing listed file; each folder is read once."""
    folders: dict[str, dict[str, int]] = {}
    sizes = {}
    for file in part.files:
        parent, _, name = file.rpartition("/")
        if parent not in folders:
            folders[parent] = {}
            if (part.root / parent).is_dir():
                with os.scandir(part.root / parent) as entries:
                    folders[parent] = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        if name in folders[parent]:
            sizes[file] = folders[parent][name]
    return sizes


class Member(Protocol):
    """One dataset of a benchmark."""

    @property
    def name(self) -> str:
        """Folder name."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Alternative folder names."""


M = TypeVar("M", bound=Member)


@dataclass(frozen=True)
class BenchmarkFamily(Generic[M]):
    """Benchmark: names, folders and reader of its datasets.

    Attributes:
        prefix: Prefix of data specifications, as in `vtab:PATH`.
        title: Name of the benchmark.
        kind: The benchmark's term for a dataset.
        members: Datasets by name.
        layout: Expected folder layout.
        read: Function that reads and checks a dataset folder.
    """

    prefix: str
    title: str
    kind: str
    members: Mapping[str, M]
    layout: str
    read: Callable[[Path, M], Inspection]

    def find(self, name: str) -> M | None:
        """Return the dataset for a folder name, or None."""
        return next((member for member in self.members.values() if name in (member.name, *member.aliases)), None)

    def locate(self, root: Path, member: M) -> Path:
        """Return the folder of a dataset: the first name that exists, else the main name."""
        folders = [root / name for name in (member.name, *member.aliases)]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def has_datasets(self, folder: Path) -> bool:
        """Return whether the folder contains any of the datasets."""
        return any(self.locate(folder, member).is_dir() for member in self.members.values())

    def resolve(self, path: Path) -> Path:
        """Resolve a dataset path, allowing alternative folder names."""
        member = self.find(path.name)
        return path if member is None else self.locate(path.parent, member)

    def load(self, path: str, *, strict_sizes: bool) -> tuple[M, Inspection]:
        """Read and check the dataset at a folder path.

        Args:
            path: Dataset folder, under any of its names.
            strict_sizes: Reject deviations from the benchmark's numbers of images or classes; if False, add notes.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If the name is not a dataset, or `read` finds errors; one message lists all.
        """
        spec, requested = f"{self.prefix}:{path}", Path(path).expanduser()
        member = self.find(requested.name)
        if member is None:
            names = f"; {self.kind}s are {', '.join(self.members)}"
            hint = nearest(requested.name, self.members, most=3, cutoff=0.4) or names
            raise ValueError(f"{spec} must end with the name of a {self.kind}, got {requested.name!r}{hint}")
        folder = self.locate(requested.parent, member)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{spec}: no folder '{folder}'; see the expected layout with `snella data check {requested.parent}`"
            )
        inspection = self.read(folder, member)
        inspection.check(spec, strict_sizes=strict_sizes)
        return member, inspection


_VTAB_LAYOUT = "TASK/{train800,val200,train800val200,test}.txt and TASK/images/{train800,val200,train800val200,test}/"
_VTAB_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}
_JOINED = "train800val200"


@dataclass(frozen=True)
class VtabTask:
    """One VTAB-1k task.

    Attributes:
        name: Folder name used by most repositories.
        group: natural, specialised or structured.
        classes: Number of classes.
        test_size: Number of test images.
        aliases: Alternative folder names.
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
"""VTAB-1k tasks in the order of the paper's Table XIII."""


def load_vtab(path: str, *, strict_sizes: bool = True) -> Collection:
    """Load one VTAB-1k task: `train800` for training, `val200` for validation, and the test images.

    Args:
        path: Task folder, with a name in `VTAB_TASKS` or one of its aliases.
        strict_sizes: Reject deviations from the benchmark's numbers of images or classes; if False, add notes.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the name is not a task, or `inspect_vtab` finds errors; one message lists all.
    """
    task, inspection = VTAB.load(path, strict_sizes=strict_sizes)
    return Collection(
        task.name,
        inspection.classes,
        dataset_of(inspection.parts["train800"]),
        dataset_of(inspection.parts["val200"]),
        dataset_of(inspection.parts["test"]),
        has_parts=True,
        notes=inspection.notes,
        is_resized_whole=True,
        official_joins_val=True,
    )


def inspect_vtab(folder: Path, task: VtabTask) -> Inspection:
    """Read and check the lists of one task.

    Args:
        folder: Existing task folder.
        task: Task in the folder.

    Returns:
        Splits, and errors: missing or malformed lists, labels out of range, missing files, images in two splits, and
        deviations from the benchmark's numbers of images or classes.
    """
    inspection = Inspection(task.name, folder, classes=[str(label) for label in range(task.classes)])
    for name in (*_VTAB_SIZES, "test"):
        list_file = folder / f"{name}.txt"
        if list_file.is_file():
            part, errors = _read_list(list_file, folder)
            inspection.parts[name] = part
            inspection.errors += errors
    is_joined = _complete_vtab(inspection)
    parts = inspection.parts
    for part in parts.values():
        inspection.errors += file_errors(part)
    errors, deviations = class_errors(list(parts.values()), task.classes)
    inspection.errors += errors
    inspection.deviations += deviations
    inspection.check_sizes({**_VTAB_SIZES, "test": task.test_size})
    inspection.check_overlap("train800", "val200")
    firsts: tuple[str, ...] = (_JOINED, "train800", "val200")
    if is_joined:  # the union covers both lists, except for files that are listed twice
        listed_twice = {*parts["train800"].files, *parts["val200"].files} & {*parts["test"].files}
        firsts = firsts[1:] if listed_twice else firsts[:1]
    for first in firsts:
        inspection.check_overlap(first, "test")
    return inspection


def _complete_vtab(inspection: Inspection) -> bool:
    """Derive `train800` and `val200` from their union if necessary; return whether a union exists and agrees."""
    parts = inspection.parts
    joined = parts.get(_JOINED)
    if joined is not None and "train800" not in parts and "val200" not in parts and len(joined) == 1000:
        for name, rows in (("train800", slice(800)), ("val200", slice(800, None))):
            parts[name] = ListedPart(name, joined.root, joined.files[rows], joined.labels[rows])
        inspection.notes.append(
            f"{inspection.name}: train800 and val200 are the first 800 and the last 200 of {_JOINED}.txt"
        )
    missing = [f"{name}.txt" for name in ("train800", "val200", "test") if name not in parts]
    if missing:
        inspection.errors.append(
            f"missing in '{inspection.folder}': {', '.join(missing)}; the layout is {_VTAB_LAYOUT}"
        )
    elif joined is not None:
        if joined.labels == parts["train800"].labels + parts["val200"].labels:
            return True
        inspection.errors.append(f"{_JOINED}.txt must list the labels of train800.txt followed by those of val200.txt")
    return False


def _read_list(list_file: Path, folder: Path) -> tuple[ListedPart, list[str]]:
    """Read the lines `images/SPLIT/NAME LABEL` of a list; return the split and errors for malformed lines."""
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
            f"{list_file.name} must have lines like 'images/test/000000.jpg 3', malformed lines ({len(malformed)}): "
            f"{listed(malformed)}"
        )
    elif not files:
        errors.append(f"{list_file.name} is empty")
    return ListedPart(list_file.stem, folder, files, labels), errors


VTAB = BenchmarkFamily("vtab", "VTAB-1k", "task", VTAB_TASKS, _VTAB_LAYOUT, inspect_vtab)
"""VTAB-1k."""


_FGVC_LAYOUT = "DATASET/{train,val,test}.json, each one object {image path: class}, next to the images"
_FGVC_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class FgvcDataset:
    """One FGVC dataset.

    Attributes:
        name: Folder name used by the authors' scripts.
        classes: Number of classes.
        sizes: Numbers of train, val and test images.
        images: Subfolder of the image paths; empty for the dataset folder.
        aliases: Alternative folder names.
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
"""FGVC datasets in the order of the paper's Table I."""


def load_fgvc(path: str, *, strict_sizes: bool = True) -> Collection:
    """Load one FGVC dataset.

    Args:
        path: Dataset folder, with a name in `FGVC_DATASETS` or one of its aliases.
        strict_sizes: Reject deviations from the benchmark's numbers of images or classes; if False, add notes.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the name is not a dataset, or `inspect_fgvc` finds errors; one message lists all.
    """
    dataset, inspection = FGVC.load(path, strict_sizes=strict_sizes)
    parts = {name: dataset_of(inspection.parts[name]) for name in _FGVC_PARTS if name in inspection.parts}
    return Collection(
        dataset.name,
        inspection.classes,
        parts["train"],
        parts.get("val"),
        parts["test"],
        has_parts=True,
        notes=inspection.notes,
    )


def inspect_fgvc(folder: Path, dataset: FgvcDataset) -> Inspection:
    """Read and check the lists of one dataset.

    Class indices follow from the IDs of all lists, because a list without a class would shift later indices.
    Without `train.json`, `trainval.json` is used and a validation split is created from it.

    Args:
        folder: Existing dataset folder.
        dataset: Dataset in the folder.

    Returns:
        Splits, and errors: missing or malformed lists, missing files, images in two splits, and deviations from the
        benchmark's numbers of images or classes.
    """
    inspection = Inspection(dataset.name, folder)
    lists = _fgvc_lists(inspection)
    ids = sorted({label for entries in lists.values() for label in entries.values()})
    indices = {label: number for number, label in enumerate(ids)}
    root = folder / dataset.images
    for name, entries in lists.items():
        labels = [indices[label] for label in entries.values()]
        inspection.parts[name] = ListedPart(name, root, list(entries), labels)
    inspection.classes = _folder_names(ids, list(inspection.parts.values()))
    for part in inspection.parts.values():
        inspection.errors += file_errors(part)
    _check_fgvc_numbers(inspection, dataset)
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        inspection.check_overlap(first, second)
    return inspection


def _fgvc_lists(inspection: Inspection) -> dict[str, dict[str, int]]:
    """Return class ids by image path for every existing list."""
    lists = {}
    files = {name: inspection.folder / f"{name}.json" for name in _FGVC_PARTS}
    joined = inspection.folder / "trainval.json"
    if not files["train"].is_file() and joined.is_file():
        del files["val"]
        files["train"] = joined
        inspection.notes.append(
            f"{inspection.name}: no train.json; trainval.json is split into training and validation"
        )
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        inspection.errors.append(
            f"missing in '{inspection.folder}': {', '.join(missing)}; the layout is {_FGVC_LAYOUT}"
        )
    for name, file in files.items():
        if file.is_file():
            entries, error = _read_object(file)
            if error:
                inspection.errors.append(error)
            else:
                lists[name] = entries
    return lists


def _read_object(file: Path) -> tuple[dict[str, int], str]:
    """Read one list; return class ids, converted to integers, and an error message."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"{file.name} must be a JSON file: {error}"
    if not isinstance(content, dict) or not content:
        return {}, f"{file.name} must contain an object {{image path: class}}, got {str(content)[:40]!r}"
    invalid = [f"{path!r}: {label!r}" for path, label in content.items() if not _is_class_id(label)]
    if invalid:
        return {}, f"{file.name} must map each image to an integer, invalid entries ({len(invalid)}): {listed(invalid)}"
    return {path: int(label) for path, label in content.items()}, ""


def _is_class_id(label: Any) -> bool:
    """Return whether a value is a class ID: an integer or a string of digits."""
    return not isinstance(label, bool) and (isinstance(label, int) or (isinstance(label, str) and label.isdigit()))


def _folder_names(ids: list[int], parts: list[ListedPart]) -> list[str]:
    """Return the image folder names if each class has a separate folder, else the IDs."""
    folders: list[set[str]] = [set() for _ in ids]
    for part in parts:
        for file, label in zip(part.files, part.labels, strict=True):
            folders[label].add(Path(file).parent.name)
    names = [next(iter(members)) for members in folders if len(members) == 1]
    if len(names) == len(ids) == len(set(names)) and all(names):
        return names
    return [str(label) for label in ids]


def _check_fgvc_numbers(inspection: Inspection, dataset: FgvcDataset) -> None:
    """Compare the numbers of classes and images with the benchmark."""
    if len(inspection.classes) > dataset.classes:
        inspection.errors.append(f"lists must have {dataset.classes} classes, got {len(inspection.classes)}")
    elif inspection.parts:
        inspection.deviations += class_errors(list(inspection.parts.values()), dataset.classes)[1]
    sizes = dict(zip(_FGVC_PARTS, dataset.sizes, strict=True))
    if "val" not in inspection.parts and inspection.notes:
        sizes["train"] += sizes["val"]
    inspection.check_sizes(sizes)


FGVC = BenchmarkFamily("fgvc", "FGVC", "dataset", FGVC_DATASETS, _FGVC_LAYOUT, inspect_fgvc)
"""FGVC."""
