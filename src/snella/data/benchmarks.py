"""The data sets of a benchmark: names, folders and checks of their lists."""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from snella.data.datasets import FileImages, ImageDataset
from snella.data.folder import listed

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
    mine, theirs = _sizes(one), _sizes(other)
    common = set(mine.values()) & set(theirs.values())
    known: dict[bytes, str] = {}
    for file in one.files:
        if mine.get(file) in common:
            known.setdefault(_digest(one.root / file), file)
    found = []
    for file in other.files:
        if theirs.get(file) in common and (original := known.get(_digest(other.root / file))):
            found.append(f"{file} = {original}")
    return found


def _sizes(part: ListedPart) -> dict[str, int]:
    """Bytes of every listed file that exists; each folder is read once."""
    folders: dict[str, dict[str, int]] = {}
    sizes = {}
    for file in part.files:
        parent, _, name = file.rpartition("/")
        if parent not in folders:
            folders[parent] = _folder_sizes(part.root / parent)
        if name in folders[parent]:
            sizes[file] = folders[parent][name]
    return sizes


def _folder_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder by name; none where there is no folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _digest(file: Path) -> bytes:
    """BLAKE2 digest of a file."""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).digest()


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
            near = difflib.get_close_matches(wanted.name, self.members, n=3, cutoff=0.4)
            hint = f"nearest: {', '.join(near)}" if near else f"{self.kind}s are {', '.join(self.members)}"
            raise ValueError(f"{spec} must end with the name of a {self.kind}, got {wanted.name!r}; {hint}")
        folder = self.place(wanted.parent, member)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{spec}: there is no folder '{folder}'; `snella data check {wanted.parent}` says what belongs there"
            )
        found = self.read(folder, member)
        found.check(spec, strict_sizes=strict_sizes)
        return member, found


__all__ = [
    "BenchmarkFamily",
    "Inspection",
    "ListedPart",
    "Member",
    "class_errors",
    "dataset_of",
    "file_errors",
    "overlap_errors",
]
