"""VTAB-1k and FGVC (fine-grained visual classification): folder layouts, loading and validation.

A list is a file that names the images of a split and their classes.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from snella_app.console import counted
from snella_app.data.copies import equal_files
from snella_app.data.datasets import Collection, ImageDataset, file_paths
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import FileImages
from snella_app.files import expand_user, sha256_of
from snella_app.text import listed, nearest

_MAX_COPIES = 0.05
"""Fraction of a split up to which copies of images in another split are accepted."""


@dataclass
class Inspection:
    """Inspection result of one benchmark dataset.

    Attributes:
        name: Name of the dataset in the benchmark.
        folder: Folder of the dataset.
        parts: Images of each existing list by name, e.g. `train800`.
        classes: Class names by index.
        errors: Problems that make the data unusable.
        deviations: Deviations from the benchmark's numbers of images or classes. The data remains usable, but results
            are not comparable.
        notes: Notes for the user.
        digest_of: `sha256_of`, cached for the compared files.
    """

    name: str
    folder: Path
    parts: dict[str, ImageDataset] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digest_of: Callable[[Path], str] = field(default_factory=lambda: cache(sha256_of))

    def add_part(self, name: str, root: Path, files: Sequence[str], labels: Sequence[int]) -> None:
        """Add the files of a list below `root` with their class indices, and record duplicate and missing files."""
        paths = [root / file for file in files]
        self.parts[name] = ImageDataset(FileImages(paths), range(len(files)), labels, files)
        duplicates = [file for file, count in Counter(files).items() if count > 1]
        if duplicates:
            self.errors.append(f"{name} has {counted(len(duplicates), 'duplicate file')}: {listed(duplicates)}")
        missing = [file for file, path in zip(files, paths, strict=True) if not path.is_file()]
        if missing:
            self.errors.append(
                f"{len(missing)} of {len(files)} files listed in {name} do not exist in '{root}': {listed(missing)}"
            )

    def check_missing(self, missing: Sequence[str], layout: str) -> None:
        """Record missing list files."""
        if missing:
            self.errors.append(f"missing in '{self.folder}': {', '.join(missing)}; the layout is {layout}")

    def check_labels(self, count: int) -> None:
        """Record labels outside 0 … `count - 1`, and classes without images."""
        for name, part in self.parts.items():
            outside = sorted({label for label in part.labels if not 0 <= label < count})
            if outside:
                self.errors.append(f"labels must be in 0 … {count - 1}; {name} has {listed(map(str, outside))}")
        present = {label for part in self.parts.values() for label in part.labels if 0 <= label < count}
        absent = [str(label) for label in range(count) if label not in present]
        if present and absent:
            self.deviations.append(f"{count} classes must have images, got {len(present)}; missing: {listed(absent)}")

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Record lists with a different number of images than in the benchmark."""
        self.deviations += [
            f"{name} must have {size:,} images, got {len(self.parts[name]):,}"
            for name, size in sizes.items()
            if name in self.parts and len(self.parts[name]) != size
        ]

    def check_overlap(self, first: str, second: str) -> None:
        """If both splits exist, record the images that they share: the same file or identical files.

        Some benchmarks contain a few identical files under different names (e.g. symmetric rendered shapes). Such files
        are recorded in a note instead of an error if they make up at most 5% of the second split.

        Args:
            first: Training or validation split.
            second: Validation or test split.
        """
        if first not in self.parts or second not in self.parts:
            return
        first_images, second_images = self.parts[first], self.parts[second]
        common = sorted(set(file_paths(first_images).values()) & set(file_paths(second_images).values()))
        if common:
            names = listed(path.name for path in common)
            self.errors.append(f"{counted(len(common), 'image')} in both {first} and {second}: {names}")
            return
        originals = equal_files(first_images, second_images, self.digest_of)
        copies = [
            f"{second_images.names[copy]} = {first_images.names[original]}" for copy, original in originals.items()
        ]
        if copies:
            total = len(second_images)
            records = self.errors if len(copies) > _MAX_COPIES * total else self.notes
            records.append(f"{len(copies)} of {total} images of {second} with copies in {first}: {listed(copies)}")


@dataclass(frozen=True)
class BenchmarkDataset:
    """One dataset of a benchmark.

    Attributes:
        name: Folder name used by most repositories.
        classes: Number of classes.
        sizes: Numbers of training, validation and test images.
        group: Group of a VTAB-1k task: natural, specialized or structured.
        images: Subfolder that the image paths are relative to, or empty for the dataset folder.
        aliases: Alternative folder names.
    """

    name: str
    classes: int
    sizes: tuple[int, int, int]
    group: str = ""
    images: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkFamily:
    """Benchmark, with the names, folders and reader of its datasets.

    Attributes:
        prefix: Prefix of data specifications, as in `vtab:PATH`.
        title: Name of the benchmark.
        kind: The benchmark's term for a dataset.
        members: Datasets by name.
        layout: Expected folder layout.
        read: Function that reads and checks a dataset folder.
        parts: Names of the training, validation and test lists.
        lists: File names of the lists.
        is_resized_whole: See `Collection`.
        official_joins_val: See `Collection`.
    """

    prefix: str
    title: str
    kind: str
    members: Mapping[str, BenchmarkDataset]
    layout: str
    read: Callable[[Path, BenchmarkDataset], Inspection]
    parts: tuple[str, str, str]
    lists: tuple[str, ...]
    is_resized_whole: bool = False
    official_joins_val: bool = False

    def find(self, name: str) -> BenchmarkDataset | None:
        """Return the dataset for a folder name, or None."""
        return next((member for member in self.members.values() if name in (member.name, *member.aliases)), None)

    def locate(self, root: Path, member: BenchmarkDataset) -> Path:
        """Return the first existing folder among a dataset's names, or the folder of the main name if none exists."""
        folders = [root / name for name in (member.name, *member.aliases)]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def is_dataset(self, folder: Path) -> bool:
        """Return whether a folder contains an image list of the benchmark."""
        return any((folder / name).is_file() for name in self.lists)

    def has_datasets(self, folder: Path) -> bool:
        """Return whether the folder contains any of the datasets."""
        return any(self.is_dataset(self.locate(folder, member)) for member in self.members.values())

    def resolve(self, path: Path) -> Path:
        """Resolve a dataset path, allowing alternative folder names."""
        member = self.find(path.name)
        return path if member is None else self.locate(path.parent, member)

    def load(self, path: str, config: DataConfig, target: TargetKind) -> Collection:
        """Read and check the dataset at a folder path.

        Args:
            path: Dataset folder, under any of its names.
            config: Only `strict_sizes` applies.
            target: Ignored.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If the name is not that of a dataset, or `read` finds errors or, with `strict_sizes`,
                deviations. One message lists all of them.
        """
        spec = f"{self.prefix}:{path}"
        requested = expand_user(path)
        member = self.find(requested.name)
        if member is None:
            names = f"; {self.kind}s are {', '.join(self.members)}"
            hint = nearest(requested.name, self.members, most=3, cutoff=0.4) or names
            raise ValueError(f"{spec} must end with the name of a {self.kind}, got {requested.name!r}{hint}")
        folder = self.locate(requested.parent, member)
        if not folder.is_dir():
            raise FileNotFoundError(f"{spec}: no folder '{folder}'; the layout is {self.layout}")
        inspection = self.read(folder, member)
        is_strict = config.strict_sizes
        problems = [*inspection.errors, *(inspection.deviations if is_strict else [])]
        if problems:
            remedy = "; to use it anyway, pass strict_sizes=False" if is_strict and not inspection.errors else ""
            raise ValueError(f"{spec} does not match the benchmark's {member.name}: {'; '.join(problems)}{remedy}")
        inspection.notes += [f"differs from the benchmark: {deviation}" for deviation in inspection.deviations]
        train, val, test = (inspection.parts.get(name) for name in self.parts)
        return Collection(
            inspection.name,
            inspection.classes,
            cast(ImageDataset, train),
            val,
            test,
            has_parts=True,
            notes=inspection.notes,
            is_resized_whole=self.is_resized_whole,
            official_joins_val=self.official_joins_val,
        )


_VTAB_LAYOUT = "TASK/{train800,val200,train800val200,test}.txt and TASK/images/{train800,val200,train800val200,test}/"
_JOINED = "train800val200"
_VTAB_PARTS = ("train800", "val200", "test")
_VTAB_LISTS = tuple(f"{name}.txt" for name in (*_VTAB_PARTS, _JOINED))
VTAB_TASKS: dict[str, BenchmarkDataset] = {
    task.name: task
    for task in (
        BenchmarkDataset("cifar", 100, (800, 200, 10_000), group="natural", aliases=("cifar100",)),
        BenchmarkDataset("caltech101", 102, (800, 200, 6_084), group="natural"),
        BenchmarkDataset("dtd", 47, (800, 200, 1_880), group="natural"),
        BenchmarkDataset("oxford_flowers102", 102, (800, 200, 6_149), group="natural", aliases=("flowers102",)),
        BenchmarkDataset("svhn", 10, (800, 200, 26_032), group="natural"),
        BenchmarkDataset("sun397", 397, (800, 200, 21_750), group="natural"),
        BenchmarkDataset("oxford_iiit_pet", 37, (800, 200, 3_669), group="natural", aliases=("pets",)),
        BenchmarkDataset("patch_camelyon", 2, (800, 200, 32_768), group="specialized"),
        BenchmarkDataset("eurosat", 10, (800, 200, 5_400), group="specialized"),
        BenchmarkDataset("resisc45", 45, (800, 200, 6_300), group="specialized"),
        BenchmarkDataset("diabetic_retinopathy", 5, (800, 200, 42_670), group="specialized"),
        BenchmarkDataset("clevr_count", 8, (800, 200, 15_000), group="structured"),
        BenchmarkDataset("clevr_dist", 6, (800, 200, 15_000), group="structured"),
        BenchmarkDataset("dmlab", 6, (800, 200, 22_735), group="structured"),
        BenchmarkDataset("kitti", 4, (800, 200, 711), group="structured"),
        BenchmarkDataset("dsprites_loc", 16, (800, 200, 73_728), group="structured"),
        BenchmarkDataset("dsprites_ori", 16, (800, 200, 73_728), group="structured"),
        BenchmarkDataset("smallnorb_azi", 18, (800, 200, 12_150), group="structured"),
        BenchmarkDataset("smallnorb_ele", 9, (800, 200, 12_150), group="structured"),
    )
}
"""VTAB-1k tasks in the order of Table XIII of the SNELLA paper."""


def inspect_vtab(folder: Path, task: BenchmarkDataset) -> Inspection:
    """Read and check the lists of one task in its folder."""
    inspection = Inspection(task.name, folder, classes=[str(label) for label in range(task.classes)])
    parts = inspection.parts
    for name in ("train800", "val200", _JOINED, "test"):
        if (folder / f"{name}.txt").is_file():
            _read_list(inspection, name)
    joined = parts.get(_JOINED)
    if joined is not None and "train800" not in parts and "val200" not in parts and len(joined) == 1000:
        parts["train800"], parts["val200"] = joined.subset(range(800)), joined.subset(range(800, 1000))
        inspection.notes.append(
            f"{inspection.name}: train800 and val200 are the first 800 and the last 200 of {_JOINED}.txt"
        )
    missing = [f"{name}.txt" for name in _VTAB_PARTS if name not in parts]
    inspection.check_missing(missing, _VTAB_LAYOUT)
    if joined is not None and not missing and joined.labels != parts["train800"].labels + parts["val200"].labels:
        inspection.errors.append(f"{_JOINED}.txt must list the labels of train800.txt, then those of val200.txt")
    inspection.check_labels(task.classes)
    train, val, test = task.sizes
    inspection.check_sizes({"train800": train, "val200": val, _JOINED: train + val, "test": test})
    for first, second in itertools.combinations(_VTAB_PARTS, 2):
        inspection.check_overlap(first, second)
    return inspection


def _read_list(inspection: Inspection, name: str) -> None:
    """Add a list with lines of the form `images/SPLIT/NAME LABEL`, and record malformed lines as an error."""
    content = (inspection.folder / f"{name}.txt").read_text(encoding="utf-8-sig", errors="replace")
    files = []
    labels = []
    malformed = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if file and label.removeprefix("-").isdecimal():
            files.append(file.strip())
            labels.append(int(label))
        else:
            malformed.append(f"line {number} is {line.strip()!r}")
    if malformed:
        inspection.errors.append(
            f"{name}.txt must have lines such as 'images/test/000000.jpg 3'; malformed lines ({len(malformed)}): "
            f"{listed(malformed)}"
        )
    elif not files:
        inspection.errors.append(f"{name}.txt is empty")
    inspection.add_part(name, inspection.folder, files, labels)


VTAB = BenchmarkFamily(
    "vtab",
    "VTAB-1k",
    "task",
    VTAB_TASKS,
    _VTAB_LAYOUT,
    inspect_vtab,
    _VTAB_PARTS,
    _VTAB_LISTS,
    is_resized_whole=True,
    official_joins_val=True,
)
"""Benchmark VTAB-1k."""


_FGVC_LAYOUT = "DATASET/{train,val,test}.json, each an object {image path: class}, next to the images"
_FGVC_PARTS = ("train", "val", "test")
_FGVC_LISTS = tuple(f"{name}.json" for name in (*_FGVC_PARTS, "trainval"))
FGVC_DATASETS: dict[str, BenchmarkDataset] = {
    dataset.name: dataset
    for dataset in (
        BenchmarkDataset("cub", 200, (5394, 600, 5794), images="images", aliases=("CUB_200_2011",)),
        BenchmarkDataset("nabirds", 555, (21536, 2393, 24633), images="images"),
        BenchmarkDataset("oxfordflower", 102, (1020, 1020, 6149), aliases=("oxfordflowers", "OxfordFlower")),
        BenchmarkDataset(
            "stanforddog", 120, (10800, 1200, 8580), images="Images", aliases=("stanforddogs", "StanfordDogs")
        ),
        BenchmarkDataset("stanfordcar", 196, (7329, 815, 8041), aliases=("stanfordcars", "StanfordCars")),
    )
}
"""FGVC datasets in the order of Table I of the SNELLA paper."""


def inspect_fgvc(folder: Path, dataset: BenchmarkDataset) -> Inspection:
    """Read and check the lists of one dataset in its folder.

    Class indices are assigned over all lists together, because a class missing from one list would otherwise shift the
    indices of that list. If there is no `train.json`, `trainval.json` replaces `train.json` and `val.json`.
    """
    inspection = Inspection(dataset.name, folder)
    files = {name: folder / f"{name}.json" for name in _FGVC_PARTS}
    sizes = dict(zip(_FGVC_PARTS, dataset.sizes, strict=True))
    joined = folder / "trainval.json"
    if not files["train"].is_file() and joined.is_file():
        del files["val"]
        files["train"] = joined
        sizes["train"] += sizes.pop("val")
        inspection.notes.append(f"{inspection.name}: no train.json; trainval.json replaces train.json and val.json")
    inspection.check_missing([file.name for file in files.values() if not file.is_file()], _FGVC_LAYOUT)
    lists = {name: _read_object(file, inspection.errors) for name, file in files.items() if file.is_file()}
    ids = sorted({label for entries in lists.values() for label in entries.values()})
    indices = {label: index for index, label in enumerate(ids)}
    for name, entries in lists.items():
        if entries:
            labels = [indices[label] for label in entries.values()]
            inspection.add_part(name, folder / dataset.images, list(entries), labels)
    inspection.classes = _folder_names(ids, list(inspection.parts.values()))
    if len(ids) > dataset.classes:
        inspection.errors.append(f"lists must have {dataset.classes} classes, got {len(ids)}")
    elif 0 < len(ids) < dataset.classes:
        inspection.deviations.append(f"{dataset.classes} classes must have images, got {len(ids)}")
    inspection.check_sizes(sizes)
    for first, second in itertools.combinations(_FGVC_PARTS, 2):
        inspection.check_overlap(first, second)
    return inspection


def _read_object(file: Path, errors: list[str]) -> dict[str, int]:
    """Return the class ID of each image in a list. After an error, which is added to `errors`, the result is empty."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        errors.append(f"{file.name} must be a JSON file: {error}")
        return {}
    if not isinstance(content, dict) or not content:
        errors.append(f"{file.name} must contain an object {{image path: class}}, got {str(content)[:40]!r}")
        return {}
    # neither an integer nor a string of digits
    invalid = [
        f"{path!r}: {label!r}"
        for path, label in content.items()
        if type(label) is not int and not (isinstance(label, str) and label.isdecimal())
    ]
    if invalid:
        errors.append(
            f"{file.name} must map each image to an integer; invalid entries ({len(invalid)}): {listed(invalid)}"
        )
        return {}
    return {path: int(label) for path, label in content.items()}


def _folder_names(ids: list[int], parts: list[ImageDataset]) -> list[str]:
    """Return the names of the image folders if each class has a separate folder; otherwise, the IDs."""
    folders: list[set[str]] = [set() for _ in ids]
    for part in parts:
        for file, label in zip(part.names, part.labels, strict=True):
            folders[label].add(Path(file).parent.name)
    names = [next(iter(members)) for members in folders if len(members) == 1]
    if len(names) == len(ids) == len(set(names)) and all(names):
        return names
    return [str(label) for label in ids]


FGVC = BenchmarkFamily("fgvc", "FGVC", "dataset", FGVC_DATASETS, _FGVC_LAYOUT, inspect_fgvc, _FGVC_PARTS, _FGVC_LISTS)
"""Benchmark FGVC."""
