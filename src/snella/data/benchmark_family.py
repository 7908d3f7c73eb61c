"""The data sets of one benchmark: what they are called, and where each lies."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from snella.data.listed_images import Inspection

__all__ = ["BenchmarkFamily", "Member"]


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
    """How the data sets of one benchmark are known, found and read.

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
        """Where a data set lies in the benchmark's folder: the first of its names that is there, or belongs there."""
        places = [root / name for name in (member.name, *member.aliases)]
        return next((place for place in places if place.is_dir()), places[0])

    def holds(self, folder: Path) -> bool:
        """Whether any of the data sets lies in this folder."""
        return any(self.place(folder, member).is_dir() for member in self.members.values())

    def resolve(self, path: Path) -> Path:
        """The folder that a path to a data set means: the path itself, or what lies beside it under another name."""
        member = self.known(path.name)
        return path if member is None else self.place(path.parent, member)

    def load(self, path: str, *, check_sizes: bool) -> tuple[M, Inspection]:
        """Find a data set by the path to its folder, read it and refuse faults.

        Args:
            path: The folder, under one of its names.
            check_sizes: Refuse numbers of images or classes that are not the benchmark's; otherwise they are noted.

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
                f"{spec}: there is no folder '{folder}'; `snella data check {wanted.parent}` tells what belongs there"
            )
        found = self.read(folder, member)
        found.check(spec, check_sizes=check_sizes)
        return member, found
