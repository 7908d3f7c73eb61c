"""Validation of data before training: counts, sizes, broken files, copies; and of VTAB-1k and FGVC folders."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from snella_app.data.benchmarks import FGVC, FGVC_DATASETS, VTAB, VTAB_TASKS, BenchmarkFamily, Inspection
from snella_app.data.datasets import MaskDataset, broken_images, known_facts
from snella_app.data.load import DataSplits, load_data, repeated_images
from snella_app.data.table import TargetKind
from snella_app.text import listed

_FAMILIES: tuple[BenchmarkFamily[Any], ...] = (VTAB, FGVC)


@dataclass
class BenchmarkCheck:
    """The result of checking the folder of a benchmark, or of one of its data sets.

    Attributes:
        title: Name of the benchmark.
        folder: Folder of its data sets.
        found: Those that are there.
        missing: Names of those that are not.
        layout: What belongs where.
        strangers: Folders that are none of its data sets, with the name that may have been meant.
    """

    title: str
    folder: Path
    found: list[Inspection]
    missing: list[str] = field(default_factory=list)
    layout: str = ""
    unexpected: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Everything that is wrong, one text for each error."""
        texts = [
            f"{inspection.name}: {error}"
            for inspection in self.found
            for error in (*inspection.errors, *inspection.deviations)
        ]
        if self.missing:
            total = len(self.missing) + len(self.found)
            hint = f" (there are folders {', '.join(self.unexpected)})" if self.unexpected else ""
            texts.append(
                f"{len(self.missing)} of {total} data sets of {self.title} are missing: {', '.join(self.missing)}; "
                f"put each into '{self.folder}' as {self.layout}{hint}"
            )
        return texts


def check_benchmarks(folder: str | Path, *, decode: bool = False) -> list[BenchmarkCheck]:
    """Validate a benchmark's folder, one data set of it, or a folder with `vtab-1k` and `fgvc` inside.

    Args:
        folder: The folder.
        decode: Also decode every image, which takes minutes; files that cannot be read become errors.

    Returns:
        One entry a benchmark that is there, in part at least.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds nothing of either benchmark; says what belongs there.
    """
    root = Path(folder).expanduser()
    wanted = "; ".join(f"{family.title} as {family.layout}" for family in _FAMILIES)
    if not root.is_dir():
        raise FileNotFoundError(
            f"folder must be the folder of a benchmark, got {str(folder)!r}, which does not exist; put there {wanted}"
        )
    checks = _single(root) or _all(root)
    if not checks:
        inside = sorted(child.name for child in root.iterdir())
        there = f"it holds {listed(inside)}" if inside else "it is empty"
        raise ValueError(
            f"folder must hold a benchmark, got '{root}', where nothing of one is ({there}); put there {wanted}. "
            f"Tasks are {', '.join(VTAB_TASKS)}; data sets are {', '.join(FGVC_DATASETS)}. "
            f"Images of your own are in class folders, {root}/CLASS/image.jpg, or named by a table"
        )
    if decode:
        for inspection in (inspection for check in checks for inspection in check.found):
            _decode(inspection)
    return checks


def holds_benchmark(folder: str | Path) -> bool:
    """Whether a folder is a benchmark's, one data set of it, or one with benchmarks right inside it."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        return False
    places = [root, *(child for child in root.iterdir() if child.is_dir())]
    is_member = any(family.known(root.resolve().name) for family in _FAMILIES)
    return is_member or any(family.holds(place) for place in places for family in _FAMILIES)


def _single(root: Path) -> list[BenchmarkCheck]:
    """The check of a folder that is one data set itself."""
    for family in _FAMILIES:
        member = family.known(root.resolve().name)
        if member is not None and not any(other.holds(root) for other in _FAMILIES):
            return [BenchmarkCheck(family.title, root.parent, [family.read(root, member)])]
    return []


def _all(root: Path) -> list[BenchmarkCheck]:
    """The checks of all benchmarks in a folder and in the folders right inside it."""
    places = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    return [_whole(family, place) for family in _FAMILIES for place in places if family.holds(place)]


def _whole(family: BenchmarkFamily[Any], root: Path) -> BenchmarkCheck:
    """The check of a whole benchmark."""
    found, missing = [], []
    for name, member in family.members.items():
        place = family.place(root, member)
        if place.is_dir():
            found.append(family.read(place, member))
        else:
            missing.append(name)
    return BenchmarkCheck(family.title, root, found, missing, family.layout, _unexpected_folders(root, missing))


def _unexpected_folders(root: Path, missing: list[str]) -> list[str]:
    """Folders of another name than any data set has, next to the missing one of a like name."""
    texts = []
    for child in sorted(child for child in root.iterdir() if child.is_dir()):
        near = difflib.get_close_matches(child.name.lower(), missing, n=1, cutoff=0.6)
        if near and not any(family.known(child.name) for family in _FAMILIES):
            texts.append(f"{child.name!r}, nearest: {near[0]!r}")
    return texts


def _decode(inspection: Inspection) -> None:
    """Add the images that cannot be read to the errors."""
    files = {part.root / file: file for part in inspection.parts.values() for file in part.files}
    paths = [path for path in files if path.is_file()]
    broken = [f"{files[paths[index]]} ({reason})" for index, reason in broken_images(paths).items()]
    if broken:
        inspection.errors.append(f"{len(broken)} of {len(paths)} images cannot be read: {listed(broken)}")


_GENERIC = (
    *("new folder", "untitled folder", "untitled", "neuer ordner", "unsorted", "misc", "temp", "tmp", "backup", "old"),
    *("thumbs", "thumbnails", "images", "photos", "pictures", "__macosx", "train", "val", "test", "validation"),
)
_COPY = re.compile(r"(\bcopy\b|\(\d+\)$|- kopie$)", re.IGNORECASE)
_NAMED = 5
_TILE, _GAP, _HEADING = 96, 4, 20
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


NO_LABEL = "(none)"
"""Row of the images without a label."""


@dataclass
class DataCheck:
    """What is known of data before it is trained on.

    Attributes:
        splits: The data, divided as training would divide it; undivided where it cannot be.
        counts: Number of images by class (or label) and part; nothing for numbers and images with masks.
        ranges: Smallest, median and largest of each column of numbers; nothing for others.
        sizes: Smallest, median and largest width and height; None where images were not inspected.
        kinds: Number of images by format and mode, such as `JPEG RGB`.
        errors: What training would refuse, or what surely is wrong.
        warnings: What may make results wrong, and what to do about it.
        notes: What else a user should know.
    """

    splits: DataSplits
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_data(
    spec: str,
    *,
    columns: str | None = None,
    channels: int = 3,
    white: int | None = None,
    target: TargetKind = "class",
    skip_corrupt: bool = False,
    seed: int = 0,
) -> DataCheck:
    """Load data as training does, broken images left out, and say what is in it.

    Args:
        spec: As `load_data` takes it.
        columns: Of a table.
        channels: Of an image.
        white: Value of 16-bit images that becomes white.
        target: What the label column of a table holds.
        skip_corrupt: Whether images that cannot be used are a note, as for a training that leaves them out, or an
            error.
        seed: Of the splits.

    Raises:
        ValueError: What training would refuse before it is divided, such as a missing column.
        FileNotFoundError: It is not there.
        ImportError: A package that it needs is not installed.
    """
    options: dict[str, Any] = {"columns": columns, "channels": channels, "white": white, "target": target, "seed": seed}
    errors = []
    try:
        splits = load_data(spec, skip_corrupt=True, **options)
    except ValueError as error:
        splits = load_data(spec, skip_corrupt=True, divide=False, **options)  # or raises the same
        errors.append(str(error))
    notes = [note for note in splits.notes if note not in splits.warnings]
    check = DataCheck(splits, errors=errors, warnings=list(splits.warnings), notes=notes)
    if splits.broken:
        named = listed([f"{name} ({reason})" for name, reason in splits.broken.items()])
        check.notes = [note for note in check.notes if named not in note]
        count = len(splits.broken)
        text = f"{count} image{'s' if count > 1 else ''} cannot be used"
        if skip_corrupt:
            check.notes.append(f"{text}, and {'are' if count > 1 else 'is'} left out by --skip-corrupt: {named}")
        else:
            check.errors.append(f"{text}: {named}; --skip-corrupt leaves them out")
    if not isinstance(splits.train, MaskDataset) and target == "class":
        check.counts = {
            name: {part: images.labels.count(label) for part, images in splits.parts.items()}
            for label, name in enumerate(splits.classes)
        }
        check.warnings += _suspicious_names(splits.classes)
    elif target == "labels":
        check.counts = _label_counts(splits)
    elif target == "numbers":
        check.ranges = _ranges(splits)
    check.warnings += _repetitions(splits)
    facts = [fact for images in splits.parts.values() for fact in known_facts(images).values()]
    if facts:
        by_area = sorted((fact.size for fact in facts), key=lambda size: size[0] * size[1])
        check.sizes = (by_area[0], by_area[len(by_area) // 2], by_area[-1])
        check.kinds = dict(Counter(f"{fact.format} {fact.mode}".strip() for fact in facts).most_common())
    return check


def _label_counts(splits: DataSplits) -> dict[str, dict[str, int]]:
    """Number of images of each part that have a label, and of those that have none."""
    of_parts = {part: Counter[str]() for part in splits.parts}
    for part, images in splits.parts.items():
        for target in images.annotations.targets or []:
            of_parts[part].update(cast(tuple[str, ...], target) or (NO_LABEL,))
    names = [*splits.classes, *([NO_LABEL] if any(counts[NO_LABEL] for counts in of_parts.values()) else [])]
    return {name: {part: counts[name] for part, counts in of_parts.items()} for name in names}


def _ranges(splits: DataSplits) -> dict[str, tuple[float, float, float]]:
    """Smallest, median and largest value of each column, over all parts."""
    targets = [target for images in splits.parts.values() for target in images.annotations.targets or []]
    values = np.array(targets, dtype=float).reshape(len(targets), -1)
    low, median, high = np.quantile(values, (0, 0.5, 1), axis=0, method="nearest").tolist()
    return dict(zip(splits.classes, zip(low, median, high, strict=True), strict=True))


def _repetitions(splits: DataSplits) -> list[str]:
    """Warnings about the same picture several times in one part, under one class or several."""
    notes = []
    for part, images in splits.parts.items():
        groups = repeated_images(images)
        contradicting = [group for group in groups if len({images.labels[position] for position in group}) > 1]
        texts = (
            ("picture is", "pictures are", "in it more than once", "remove the copies"),
            ("picture has", "pictures have", "several labels", "keep the right one"),
        )
        for (one, many, text, remedy), chosen in zip(texts, (groups, contradicting), strict=True):
            if chosen:
                named = listed([" = ".join(images.names[position] for position in group[:3]) for group in chosen])
                count = f"{len(chosen)} {one if len(chosen) == 1 else many}"
                notes.append(f"{part}: {count} {text}: {named}; {remedy}")
    return notes


def _suspicious_names(classes: Sequence[str]) -> list[str]:
    """Warnings about class names that may be no classes, or one class written in two ways."""
    notes = []
    generic = [repr(name) for name in classes if name.strip().lower() in _GENERIC or _COPY.search(name)]
    if generic:
        notes.append(f"class names that say nothing: {listed(generic)}; rename them, or remove what is no class")
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(re.sub(r"[\W_]", "", name.lower()).rstrip("s") or name, []).append(name)
    twice = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if twice:
        notes.append(f"classes that may be the same: {listed(twice)}; put their images into one")
    return notes


def contact_sheet(splits: DataSplits, *, per_class: int = 10, most_classes: int = 20) -> Image.Image:
    """A picture of the first training images of each class, a row a class.

    Args:
        splits: The data.
        per_class: Images in a row.
        most_classes: Rows.
    """
    images = splits.train
    labels = sorted(set(images.labels))[:most_classes]
    names = splits.classes if not isinstance(images, MaskDataset) else ["images"]
    rows = [(label, [p for p, own in enumerate(images.labels) if own == label]) for label in labels]
    width = per_class * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_TILE + _HEADING + _GAP) + _GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (label, positions) in enumerate(rows):
        top = _GAP + number * (_TILE + _HEADING + _GAP)
        name = names[label] if label < len(names) else str(label)
        draw.text((_GAP, top + 2), f"{name} ({len(positions)})", _INK, font)
        for place, position in enumerate(positions[:per_class]):
            tile = ImageOps.contain(images.image(position), (_TILE, _TILE), Image.Resampling.BICUBIC)
            left = _GAP + place * (_TILE + _GAP)
            sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + _HEADING + (_TILE - tile.height) // 2))
    return sheet
