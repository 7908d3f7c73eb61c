"""Check data before training, and validate the folders of the benchmarks VTAB-1k and FGVC."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table

from snella_app.console import counted, make_table, print_line, print_rows
from snella_app.data.benchmarks import FGVC, VTAB, BenchmarkFamily, Inspection
from snella_app.data.copies import duplicates_text, find_duplicates
from snella_app.data.datasets import MaskDataset, file_paths, known_metadata
from snella_app.data.load import DataSplits, load_data
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import broken_images
from snella_app.files import expand_user
from snella_app.text import listed, similar_paths

_FAMILIES = (VTAB, FGVC)


@dataclass
class BenchmarkCheck:
    """Validation result of a benchmark folder or one of its datasets.

    Attributes:
        title: Name of the benchmark.
        folder: Folder of the datasets.
        inspections: Results for the existing datasets.
        missing: Names of missing datasets.
        layout: Expected folder layout.
        unexpected: Unknown folders whose name resembles that of a missing dataset; each entry contains both names.
    """

    title: str
    folder: Path
    inspections: list[Inspection]
    missing: list[str] = field(default_factory=list)
    layout: str = ""
    unexpected: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Messages for all errors, including deviations from the benchmarks and missing datasets."""
        messages = [
            f"{inspection.name}: {error}"
            for inspection in self.inspections
            for error in (*inspection.errors, *inspection.deviations)
        ]
        if self.missing:
            total = len(self.missing) + len(self.inspections)
            hint = f" (unknown folders: {', '.join(self.unexpected)})" if self.unexpected else ""
            messages.append(
                f"{len(self.missing)} of {total} datasets of {self.title} are missing: {', '.join(self.missing)}; "
                f"put each into '{self.folder}' as {self.layout}{hint}"
            )
        return messages

    def table(self) -> Table:
        """Return a table with one row per dataset: images per split, classes and status."""
        parts = list(dict.fromkeys(name for dataset in self.inspections for name in dataset.parts))
        table = make_table(("dataset", *parts, "classes", ""), (), title=f"{self.title} in {self.folder}")
        table.columns[-1].justify = "left"
        for dataset in self.inspections:
            sizes: list[str] = []
            for name in parts:
                images = dataset.parts.get(name)
                sizes.append("–" if images is None else f"{len(images):,}")
            num_errors = len(dataset.errors) + len(dataset.deviations)
            state = counted(num_errors, "error") if num_errors else "; note: ".join(("OK", *dataset.notes))
            table.add_row(dataset.name, *sizes, str(len(dataset.classes)), state)
        for name in self.missing:
            table.add_row(name, *("–" for _ in parts), "–", "missing")
        return table


def check_benchmarks(folder: str | Path, *, decode: bool = False) -> list[BenchmarkCheck]:
    """Validate a benchmark folder, one of its datasets, or a folder that directly contains benchmark folders.

    Args:
        folder: Folder to validate.
        decode: Also decode every image (slow); unreadable files become errors.

    Returns:
        One entry per benchmark folder with at least one dataset.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If `folder` is a file or contains no benchmark data.
    """
    root = expand_user(folder)
    if root.is_file():
        raise ValueError(f"data must be a dataset or benchmark folder, got the file {str(folder)!r}")
    layouts = "; ".join(f"{family.title} as {family.layout}" for family in _FAMILIES)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data must be an existing dataset or benchmark folder, got {str(folder)!r}, which does not exist"
            f"{similar_paths(root)}; benchmark layouts: {layouts}"
        )
    checks = []
    for family in _FAMILIES:
        dataset = family.find(root.resolve().name)
        if dataset is not None and family.is_dataset(root) and not _benchmarks_in(root):
            checks.append(BenchmarkCheck(family.title, root.resolve().parent, [family.read(root, dataset)]))
    if not checks:
        checks = [_check_benchmark(family, path) for family, path in _benchmarks_in(root, *_subfolders(root))]
    if not checks:
        children = sorted(child.name for child in root.iterdir())
        members = "; ".join(f"{family.title} {family.kind}s: {', '.join(family.members)}" for family in _FAMILIES)
        contents = f"it contains {listed(children)}" if children else "it is empty"
        raise ValueError(
            f"'{root}' contains no dataset ({contents}); use class folders, {root}/CLASS/image.jpg, a table, or a "
            f"benchmark: {layouts}. {members}"
        )
    if decode:
        for inspection in (inspection for check in checks for inspection in check.inspections):
            _decode(inspection)
    return checks


def contains_benchmark(folder: str | Path) -> bool:
    """Return whether a folder is a benchmark or one of its datasets, or directly contains benchmarks."""
    root = expand_user(folder)
    if not root.is_dir():
        return False
    is_dataset = any(family.find(root.resolve().name) and family.is_dataset(root) for family in _FAMILIES)
    return is_dataset or bool(_benchmarks_in(root, *_subfolders(root)))


def _subfolders(root: Path) -> list[Path]:
    """Return the direct subfolders, sorted by name."""
    return sorted(child for child in root.iterdir() if child.is_dir())


def _benchmarks_in(*folders: Path) -> list[tuple[BenchmarkFamily, Path]]:
    """Return all pairs of a benchmark and one of the folders that contains at least one of its datasets."""
    return [(family, path) for family in _FAMILIES for path in folders if family.has_datasets(path)]


def _check_benchmark(family: BenchmarkFamily, root: Path) -> BenchmarkCheck:
    """Check the datasets of a benchmark in its folder, and record missing ones."""
    inspections = []
    missing = []
    for name, member in family.members.items():
        folder = family.locate(root, member)
        if folder.is_dir():
            inspections.append(family.read(folder, member))
        else:
            missing.append(name)
    unexpected = []
    for child in _subfolders(root):
        near = difflib.get_close_matches(child.name.lower(), missing, n=1, cutoff=0.6)
        if near and not any(family.find(child.name) for family in _FAMILIES):
            unexpected.append(f"{child.name!r}, nearest: {near[0]!r}")
    return BenchmarkCheck(family.title, root, inspections, missing, family.layout, unexpected)


def _decode(inspection: Inspection) -> None:
    """Decode all images and record unreadable ones as errors."""
    files = {
        path: part.names[position]
        for part in inspection.parts.values()
        for position, path in file_paths(part).items()
        if path.is_file()
    }
    names = list(files.values())
    broken = [f"{names[index]} ({reason})" for index, reason in broken_images(list(files)).items()]
    if broken:
        inspection.errors.append(f"{len(broken)} of {counted(len(names), 'image')} cannot be read: {listed(broken)}")


_GENERIC = (
    *("new folder", "untitled folder", "untitled", "neuer ordner", "unsorted", "misc", "temp", "tmp", "backup", "old"),
    *("thumbs", "thumbnails", "images", "photos", "pictures", "__macosx", "train", "val", "test", "validation"),
)
"""Lowercase names of folders that are probably not classes."""
_COPY = re.compile(r"(\bcopy\b|\(\d+\)$|- kopie$)", re.IGNORECASE)
"""Pattern of names that file managers give to copies."""
_BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_])[\s_-]+(?=[^\W\d_])")
"""Pattern of separators in which two spellings of a class name may differ."""
# contact sheet: images per class, classes, lengths in pixels, and colors
_COLUMNS = 10
_MAX_ROWS = 20
_TILE = 96
_GAP = 4
_HEADING = 20
_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)


NO_LABEL = "(none)"
"""Name of the row for images without a label."""


@dataclass
class DataCheck:
    """Validation result of a dataset.

    Attributes:
        splits: Data as split for training; only the existing splits if splitting fails.
        counts: Number of images by class (or label) and split. Empty for regression.
        pixel_shares: Share of all mask pixels by class. Empty for images without masks.
        ranges: Minimum, median and maximum of each regression target. Empty for other tasks.
        sizes: Width and height of the images with the smallest, median and largest area. None if no image was
            inspected.
        kinds: Number of images by format and mode, e.g. `JPEG RGB`.
        errors: Problems that make training fail.
        warnings: Problems that may invalidate results, with remedies.
        notes: Other notes for the user.
    """

    splits: DataSplits
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    pixel_shares: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print_summary(self, console: Console, target: TargetKind) -> None:
        """Print the images by class and split, sizes, formats, target ranges, notes and warnings."""
        parts = self.splits.parts
        print_line(console, self.splits.description)
        heading = "class" if self.counts else ""
        if target == "labels":
            heading = "label"
        cells: list[list[str]] = []
        for name, counts in self.counts.items():
            numbers = [*(counts[part] for part in parts), sum(counts.values())]
            row = [name, *(f"{number:,}" for number in numbers)]
            if self.pixel_shares:
                row.append(f"{self.pixel_shares[name]:.2%}" if name in self.pixel_shares else "–")
            cells.append(row)
        last = ("pixels",) if self.pixel_shares else ()
        table = make_table((heading, *parts, "all", *last), cells)
        if self.counts:
            table.add_section()
        sizes = [len(images) for images in parts.values()]
        has_several_classes = target == "labels" or isinstance(self.splits.train, MaskDataset)  # per image
        total_name = "images" if has_several_classes else "all"
        table.add_row(total_name, *(f"{size:,}" for size in (*sizes, sum(sizes))))
        console.print(table)
        rows: list[tuple[str, str]] = []
        if self.sizes is not None:
            named_sizes = zip(("smallest", "median", "largest"), self.sizes, strict=True)
            sizes_text = ", ".join(f"{name} {width}×{height}" for name, (width, height) in named_sizes)
            kinds = ", ".join(f"{kind} ({count:,})" for kind, count in self.kinds.items())
            rows += [("sizes", f"{sizes_text} px"), ("formats", kinds)]
        for name, (low, median, high) in self.ranges.items():
            rows.append(("numbers", f"{name} from {low:g} to {high:g}, median {median:g}"))
        rows += [("note", note) for note in self.notes]
        rows += [("warning", warning) for warning in self.warnings]
        if rows:
            print_rows(console, rows)


def check_data(spec: str, config: DataConfig | None = None, *, target: TargetKind = "class") -> DataCheck:
    """Load data as in training, skipping broken images, and report its contents and problems.

    Args:
        spec: As for `load_data`.
        config: As for `load_data`; with `skip_corrupt`, unusable images are a note instead of an error.
        target: As for `load_data`.

    Raises:
        ValueError: If the data cannot be loaded, e.g. because a column is missing.
        FileNotFoundError: If the data does not exist.
        ImportError: If a required package is not installed.
        ConnectionError: If a dataset on the Hugging Face Hub is not cached and the Hub is unreachable.
    """
    config = config or DataConfig()
    skipping = replace(config, skip_corrupt=True)
    errors: list[str] = []
    try:
        splits = load_data(spec, skipping, target=target)
    except ValueError as error:
        undivided = replace(skipping, train_size=None, val_size=None, test_size=None)
        splits = load_data(spec, undivided, target=target, divide=False)  # raises again if loading fails
        errors.append(str(error))
    notes = [note for note in splits.notes if note not in splits.warnings]
    check = DataCheck(splits, errors=errors, warnings=list(splits.warnings), notes=notes)
    if splits.broken:
        named = listed([f"{name} ({reason})" for name, reason in splits.broken.items()])
        # the loader's note lists the same images
        check.notes = [note for note in check.notes if named not in note]
        images = counted(len(splits.broken), "unusable image")
        if config.skip_corrupt:
            check.notes.append(f"skipped {images} (--skip-corrupt): {named}")
        else:
            check.errors.append(f"{images}: {named}; skip with --skip-corrupt")
    if isinstance(splits.train, MaskDataset):
        if splits.train.annotations.targets is not None:
            check.counts = _label_counts(splits)
            try:
                check.pixel_shares = _pixel_shares(splits)
            except ValueError as error:
                check.errors.append(str(error))
    elif target == "class":
        counters = {part: Counter(images.labels) for part, images in splits.parts.items()}
        for label, name in enumerate(splits.classes):
            check.counts[name] = {part: counts[label] for part, counts in counters.items()}
        check.warnings += _suspicious_names(splits.classes)
    elif target == "labels":
        check.counts = _label_counts(splits)
    elif target == "numbers":
        check.ranges = _ranges(splits)
    check.warnings += _duplicate_warnings(splits)
    metadata = [entry for images in splits.parts.values() for entry in known_metadata(images).values()]
    if metadata:
        by_area = sorted((entry.size for entry in metadata), key=lambda size: size[0] * size[1])
        check.sizes = (by_area[0], by_area[len(by_area) // 2], by_area[-1])
        check.kinds = dict(Counter(f"{entry.format} {entry.mode}".strip() for entry in metadata).most_common())
    return check


def _label_counts(splits: DataSplits) -> dict[str, dict[str, int]]:
    """Count images by label and split, including images without a label."""
    counters = {part: Counter[str]() for part in splits.parts}
    for part, images in splits.parts.items():
        for target in images.annotations.targets or []:
            counters[part].update(cast(tuple[str, ...], target) or (NO_LABEL,))
    names = list(splits.classes)
    if any(counts[NO_LABEL] for counts in counters.values()):
        names.append(NO_LABEL)
    return {name: {part: counts[name] for part, counts in counters.items()} for name in names}


def _pixel_shares(splits: DataSplits) -> dict[str, float]:
    """Return the share of the pixels of all masks by class; raise ValueError for a label without a class."""
    counts = np.zeros(len(splits.classes))
    for images in splits.parts.values():
        for position, name in enumerate(images.names):
            pixels = np.bincount(cast(MaskDataset, images).mask(position).ravel(), minlength=len(counts))
            if len(pixels) > len(counts):
                raise ValueError(f"the mask of {name} has label {len(pixels) - 1}, but there are {len(counts)} classes")
            counts += pixels
    return dict(zip(splits.classes, (counts / counts.sum()).tolist(), strict=True))


def _ranges(splits: DataSplits) -> dict[str, tuple[float, float, float]]:
    """Return the minimum, median and maximum of each target over all splits; empty for images with masks."""
    targets = [target for images in splits.parts.values() for target in images.annotations.targets or []]
    if not targets:
        return {}
    values = np.array(targets, dtype=float).reshape(len(targets), -1)
    low, median, high = np.quantile(values, (0, 0.5, 1), axis=0, method="nearest").tolist()
    return dict(zip(splits.classes, zip(low, median, high, strict=True), strict=True))


def _duplicate_warnings(splits: DataSplits) -> list[str]:
    """Return warnings about duplicate images within a split."""
    messages: list[str] = []
    for part, images in splits.parts.items():
        groups = find_duplicates(images)
        if groups:
            verb = "image appears" if len(groups) == 1 else "images appear"
            messages.append(
                f"{part}: {len(groups)} {verb} more than once: {duplicates_text(images, groups)}; remove the copies"
            )
    return messages


def _suspicious_names(classes: Sequence[str]) -> list[str]:
    """Return warnings about generic class names and spelling variants of a class."""
    messages = []
    generic = [repr(name) for name in classes if name.strip().lower() in _GENERIC or _COPY.search(name)]
    if generic:
        messages.append(f"generic class names: {listed(generic)}; rename them, or remove folders that are not classes")
    by_spelling: dict[str, list[str]] = {}
    for name in classes:
        # without case, separators and plural s
        spelling = _BETWEEN_LETTERS.sub("", name.strip().lower()).rstrip("s")
        by_spelling.setdefault(spelling or name, []).append(name)
    variants = [" and ".join(map(repr, names)) for names in by_spelling.values() if len(names) > 1]
    if variants:
        messages.append(f"possible duplicate classes: {listed(variants)}; merge them")
    return messages


def contact_sheet(splits: DataSplits) -> Image.Image:
    """Draw the first training images of each of the first classes (or strata, see `build_collection`), one row each."""
    images = splits.train
    labels = sorted(set(images.labels))[:_MAX_ROWS]
    rows: dict[int, list[int]] = {label: [] for label in labels}
    for position, label in enumerate(images.labels):
        if label in rows:
            rows[label].append(position)
    width = _COLUMNS * (_TILE + _GAP) + _GAP
    height = len(rows) * (_TILE + _HEADING + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, (label, positions) in enumerate(rows.items()):
        top = _GAP + row * (_TILE + _HEADING + _GAP)
        draw.text((_GAP, top + 2), f"{splits.label_names[label]} ({len(positions)})", _INK, font)
        for column, position in enumerate(positions[:_COLUMNS]):
            tile = ImageOps.contain(images.image(position), (_TILE, _TILE), Image.Resampling.BICUBIC)
            left = _GAP + column * (_TILE + _GAP)
            sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + _HEADING + (_TILE - tile.height) // 2))
    return sheet
