"""What a family of data hands over before it is split."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from snella.data.dataset import ImageDataset

__all__ = ["Collection"]


@dataclass
class Collection:
    """Images with their classes, in the parts that the data itself has.

    Attributes:
        name: Short name of the data.
        classes: Class names by index.
        train: All images where the data has no parts.
        val: Validation part, if the data has one.
        test: Test part, if the data has one.
        has_parts: Whether the data is divided by itself; then no test part is split off.
        notes: What a user should know: files left out, choices made, licences.
    """

    name: str
    classes: list[str]
    train: ImageDataset
    val: ImageDataset | None = None
    test: ImageDataset | None = None
    has_parts: bool = False
    notes: list[str] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[str, ImageDataset]]:
        """The parts that there are, by name."""
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            if part is not None:
                yield name, part
