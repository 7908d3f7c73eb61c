"""Validation of VTAB-1k and FGVC folders."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snella.data.benchmarks import BenchmarkFamily, Inspection
from snella.data.datasets import broken_images
from snella.data.fgvc import FGVC, FGVC_DATASETS
from snella.data.folder import listed
from snella.data.vtab import VTAB, VTAB_TASKS

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
            f"Tasks are {', '.join(VTAB_TASKS)}; data sets are {', '.join(FGVC_DATASETS)}"
        )
    if decode:
        for inspection in (inspection for check in checks for inspection in check.found):
            _decode(inspection)
    return checks


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


__all__ = [
    "BenchmarkCheck",
    "check_benchmarks",
]
