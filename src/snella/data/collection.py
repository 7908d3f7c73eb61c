"""`Collection`: images with their classes, before they are split."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from snella.data.datasets import ImageDataset

__all__ = ["Collection", "Protocol"]

Protocol = Literal["standard", "final", "official"]
"""Which images are trained on and which choose the best epoch; see `load_data`."""


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
        notes: What a user should know: files left out, choices made, licenses.
        strata: Names of the images' labels where these are not the classes: images with masks have a class a pixel.
        is_resized_whole: Whether images are resized as a whole, where others have their center cut out.
        official_joins_val: Whether the authors' scripts learn from the validation part too.
        broken: Why images were left out, by name.
    """

    name: str
    classes: list[str]
    train: ImageDataset
    val: ImageDataset | None = None
    test: ImageDataset | None = None
    has_parts: bool = False
    notes: list[str] = field(default_factory=list)
    strata: list[str] | None = None
    is_resized_whole: bool = False
    official_joins_val: bool = False
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def label_names(self) -> list[str]:
        """Names of the images' labels, which splits are stratified by."""
        return self.classes if self.strata is None else self.strata

    def parts(self) -> Iterator[tuple[str, ImageDataset]]:
        """The parts that there are, by name."""
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            if part is not None:
                yield name, part
