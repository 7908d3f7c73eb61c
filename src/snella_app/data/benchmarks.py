"""VTAB-1k and FGVC: names and folders of their data sets, how they are listed, and checks of these lists."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from snella_app.data.datasets import Collection, FileImages, ImageDataset
from snella_app.text import listed, nearest

_MOST_COPIES = 0.05


@dataclass(frozen=True)
class ListedPart:
    """One part: image files relative to a folder, with class numbers.

    Attributes:
        name: Of the list file, without its suffix: `train800`.
        root: What the file names are relative to.
        files: As listed.
        labels: One class number a file.
    """

    name: str
    root: Path
    files: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class Inspection:
    """What was found in the folder of one data set of a benchmark.

    Attributes:
        name: The benchmark's own name of the data set.
        folder: Its folder.
        parts: The lists that could be read, by name.
        classes: Class names by index.
        errors: What makes the data unusable.
        deviations: Where numbers of images or classes differ from the benchmark's: usable, but not comparable.
        notes: What a user should know.
    """

    name: str
    folder: Path
    parts: dict[str, ListedPart] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, spec: str, *, strict_sizes: bool) -> None:
        """Refuse data with errors, all of them in one message; deviations become notes where they are allowed.

        Args:
            spec: The data specification.
            strict_sizes: Whether deviations are errors too.

        Raises:
            ValueError: There are any.
        """
        wrong = [*self.errors, *(self.deviations if strict_sizes else [])]
        if wrong:
            remedy = "; to use it anyway, pass strict_sizes=False" if strict_sizes and not self.errors else ""
            raise ValueError(f"{spec} is not {self.name} as the benchmark has it: {'; '.join(wrong)}{remedy}")
        self.notes += [f"not the benchmark's own data: {deviation}" for deviation in self.deviations]

    def compare(self, one: str, other: str) -> None:
        """Note `overlap_errors` of two parts, where both are there."""
        if one in self.parts and other in self.parts:
            errors, notes = overlap_errors(self.parts[one], self.parts[other])
            self.errors += errors
            self.notes += notes

    def count(self, sizes: Mapping[str, int]) -> None:
        """Note parts that have other numbers of images than the benchmark's."""
        self.deviations += [
            f"{name} must have {size:,} images, got {len(self.parts[name]):,}"
            for name, size in sizes.items()
            if name in self.parts and len(self.parts[name]) != size
        ]


def dataset_of(part: ListedPart) -> ImageDataset:
    """The images of one part, named as they are listed."""
    source = FileImages([part.root / file for file in part.files])
    return ImageDataset(source, range(len(part)), part.labels, part.files)


def file_errors(part: ListedPart) -> list[str]:
    """Files that a list names twice or that do not exist, one text for each kind."""
    errors = []
    twice = [file for file, count in Counter(part.files).items() if count > 1]
    if twice:
        errors.append(f"{part.name} lists {len(twice)} files more than once: {listed(twice)}")
    there = _sizes(part)
    missing = [file for file in part.files if file not in there]
    if missing:
        errors.append(
            f"{part.name} names {len(missing)} of {len(part)} files that are not in '{part.root}': {listed(missing)}"
        )
    return errors


def overlap_errors(one: ListedPart, other: ListedPart) -> tuple[list[str], list[str]]:
    """Images of one part that are in another one too: the same file, or a file with the same bytes.

    Files are only read where their size in bytes occurs on both sides. A few copies under other names belong to some
    benchmarks (rendered shapes that look alike after half a turn), so they are noted and not refused, up to 5 % of
    the other part.

    Args:
        one: What is trained on.
        other: What is measured on.

    Returns:
        Errors and notes.
    """
    common = sorted({str(one.root / file) for file in one.files} & {str(other.root / file) for file in other.files})
    if common:
        return [
            f"{len(common)} images are both in {one.name} and in {other.name}: "
            f"{listed([Path(file).name for file in common])}"
        ], []
    copies = _copies(one, other)
    if not copies:
        return [], []
    text = f"{len(copies)} of {len(other)} images of {other.name} are copies of images of {one.name}: {listed(copies)}"
    return ([text], []) if len(copies) > _MOST_COPIES * len(other) else ([], [text])


def class_errors(parts: Sequence[ListedPart], classes: int) -> tuple[list[str], list[str]]:
    """Labels out of range, and classes without any image.

    Args:
        parts: All parts of the data set.
        classes: How many classes the benchmark has.

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
    return errors, [f"{classes} classes are required, {len(present)} have images; none of {listed(absent)}"]


def _copies(one: ListedPart, other: ListedPart) -> list[str]:
    """`other file = file of one` for every file with equal bytes."""

    def digest(file: Path) -> bytes:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).digest()

    mine, theirs = _sizes(one), _sizes(other)
    common = set(mine.values()) & set(theirs.values())
    known: dict[bytes, str] = {}
    for file in one.files:
        if mine.get(file) in common:
            known.setdefault(digest(one.root / file), file)
    found = []
    for file in other.files:
        if theirs.get(file) in common and (original := known.get(digest(other.root / file))):
            found.append(f"{file} = {original}")
    return found


def _sizes(part: ListedPart) -> dict[str, int]:
    """Bytes of every listed file that exists; each folder is read once."""
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
    """One data set of a benchmark."""

    @property
    def name(self) -> str:
        """Of its folder."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of its folder."""


M = TypeVar("M", bound=Member)


@dataclass(frozen=True)
class BenchmarkFamily(Generic[M]):
    """A benchmark: the names, folders and reader of its data sets.

    Attributes:
        prefix: Of data specifications, as in `vtab:PATH`.
        title: Name of the benchmark.
        kind: What the benchmark calls one of its data sets.
        members: Its data sets by name.
        layout: What belongs where.
        read: Reads and checks a data set in its folder.
    """

    prefix: str
    title: str
    kind: str
    members: Mapping[str, M]
    layout: str
    read: Callable[[Path, M], Inspection]

    def known(self, name: str) -> M | None:
        """The data set that a folder of this name holds."""
        return next((member for member in self.members.values() if name in (member.name, *member.aliases)), None)

    def place(self, root: Path, member: M) -> Path:
        """The folder of a data set: the first of its names that exists, else its own name."""
        places = [root / name for name in (member.name, *member.aliases)]
        return next((place for place in places if place.is_dir()), places[0])

    def holds(self, folder: Path) -> bool:
        """Whether the folder holds any of the data sets."""
        return any(self.place(folder, member).is_dir() for member in self.members.values())

    def resolve(self, path: Path) -> Path:
        """The folder that a path to a data set means: the path itself, or what lies beside it under another name."""
        member = self.known(path.name)
        return path if member is None else self.place(path.parent, member)

    def load(self, path: str, *, strict_sizes: bool) -> tuple[M, Inspection]:
        """Find a data set by the path to its folder, read it and refuse errors.

        Args:
            path: The folder, under one of its names.
            strict_sizes: Refuse numbers of images or classes that are not the benchmark's; otherwise they are noted.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: Not a data set's name, or whatever `read` finds, all in one message.
        """
        spec, wanted = f"{self.prefix}:{path}", Path(path).expanduser()
        member = self.known(wanted.name)
        if member is None:
            every = f"; {self.kind}s are {', '.join(self.members)}"
            hint = nearest(wanted.name, self.members, most=3, cutoff=0.4) or every
            raise ValueError(f"{spec} must end with the name of a {self.kind}, got {wanted.name!r}{hint}")
        folder = self.place(wanted.parent, member)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{spec}: there is no folder '{folder}'; `snella data check {wanted.parent}` says what belongs there"
            )
        found = self.read(folder, member)
        found.check(spec, strict_sizes=strict_sizes)
        return member, found


_VTAB_LAYOUT = "TASK/{train800,val200,train800val200,test}.txt and TASK/images/{train800,val200,train800val200,test}/"
_VTAB_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}
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
    for name in (*_VTAB_SIZES, "test"):
        list_file = folder / f"{name}.txt"
        if list_file.is_file():
            part, errors = _read_list(list_file, folder)
            found.parts[name] = part
            found.errors += errors
    _complete_vtab(found)
    parts = found.parts
    for part in parts.values():
        found.errors += file_errors(part)
    errors, deviations = class_errors(list(parts.values()), task.classes)
    found.errors += errors
    found.deviations += deviations
    found.count({**_VTAB_SIZES, "test": task.test_size})
    for one, other in (("train800", "val200"), (_JOINED, "test"), ("train800", "test"), ("val200", "test")):
        is_covered = one != _JOINED and other == "test" and _JOINED in parts and not found.errors
        if not is_covered:
            found.compare(one, other)
    return found


def _complete_vtab(found: Inspection) -> None:
    """Derive `train800` and `val200` where only both together are listed, and check that the lists agree."""
    parts = found.parts
    joined = parts.get(_JOINED)
    if joined is not None and "train800" not in parts and "val200" not in parts and len(joined) == 1000:
        for name, rows in (("train800", slice(800)), ("val200", slice(800, None))):
            parts[name] = ListedPart(name, joined.root, joined.files[rows], joined.labels[rows])
        found.notes.append(f"{found.name}: train800 and val200 are the first 800 and the last 200 of {_JOINED}.txt")
    missing = [f"{name}.txt" for name in ("train800", "val200", "test") if name not in parts]
    if missing:
        found.errors.append(f"missing in '{found.folder}': {', '.join(missing)}; the layout is {_VTAB_LAYOUT}")
    elif joined is not None and joined.labels != parts["train800"].labels + parts["val200"].labels:
        found.errors.append(f"{_JOINED}.txt must list the labels of train800.txt followed by those of val200.txt")


def _read_list(list_file: Path, folder: Path) -> tuple[ListedPart, list[str]]:
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


VTAB = BenchmarkFamily("vtab", "VTAB-1k", "task", VTAB_TASKS, _VTAB_LAYOUT, inspect_vtab)
"""The benchmark: how its data sets are known, found and read."""


_FGVC_LAYOUT = "DATASET/{train,val,test}.json, each one object {image path: class}, beside the images"
_FGVC_PARTS = ("train", "val", "test")


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
    parts = {name: dataset_of(found.parts[name]) for name in _FGVC_PARTS if name in found.parts}
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
    lists = _fgvc_lists(found)
    ids = sorted({label for entries in lists.values() for label in entries.values()})
    numbers = {label: number for number, label in enumerate(ids)}
    root = folder / dataset.images
    for name, entries in lists.items():
        labels = [numbers[label] for label in entries.values()]
        found.parts[name] = ListedPart(name, root, list(entries), labels)
    found.classes = _folder_names(ids, list(found.parts.values()))
    for part in found.parts.values():
        found.errors += file_errors(part)
    _check_fgvc_numbers(found, dataset)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        found.compare(one, other)
    return found


def _fgvc_lists(found: Inspection) -> dict[str, dict[str, int]]:
    """From image path to class id, for every list that there is."""
    lists = {}
    files = {name: found.folder / f"{name}.json" for name in _FGVC_PARTS}
    joined = found.folder / "trainval.json"
    if not files["train"].is_file() and joined.is_file():
        del files["val"]
        files["train"] = joined
        found.notes.append(f"{found.name}: no train.json; trainval.json is divided into training and validation")
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        found.errors.append(f"missing in '{found.folder}': {', '.join(missing)}; the layout is {_FGVC_LAYOUT}")
    for name, file in files.items():
        if file.is_file():
            entries, error = _read_object(file)
            if error:
                found.errors.append(error)
            else:
                lists[name] = entries
    return lists


def _read_object(file: Path) -> tuple[dict[str, int], str]:
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


def _folder_names(ids: list[int], parts: list[ListedPart]) -> list[str]:
    """Names of the images' folders where each class has one of its own, else the ids."""
    folders: list[set[str]] = [set() for _ in ids]
    for part in parts:
        for file, label in zip(part.files, part.labels, strict=True):
            folders[label].add(Path(file).parent.name)
    names = [next(iter(found)) for found in folders if len(found) == 1]
    if len(names) == len(ids) == len(set(names)) and all(names):
        return names
    return [str(label) for label in ids]


def _check_fgvc_numbers(found: Inspection, dataset: FgvcDataset) -> None:
    """Compare the numbers of classes and images with the benchmark's."""
    if len(found.classes) > dataset.classes:
        found.errors.append(f"{dataset.classes} classes are required, the lists name {len(found.classes)}")
    elif found.parts:
        found.deviations += class_errors(list(found.parts.values()), dataset.classes)[1]
    sizes = dict(zip(_FGVC_PARTS, dataset.sizes, strict=True))
    if "val" not in found.parts and found.notes:
        sizes["train"] += sizes["val"]
    found.count(sizes)


FGVC = BenchmarkFamily("fgvc", "FGVC", "data set", FGVC_DATASETS, _FGVC_LAYOUT, inspect_fgvc)
"""The benchmark: how its data sets are known, found and read."""
