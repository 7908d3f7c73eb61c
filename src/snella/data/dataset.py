"""Labelled images as a torch data set whose augmentation does not depend on workers, prefetching or resuming."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from snella.data.sources import ImageSource

__all__ = ["ImageDataset"]


class ImageDataset(Dataset[tuple[Any, int]]):
    """A selection of a source's images with labels, names and a transform.

    The transform of item `i` runs with torch's generator seeded by (seed, epoch, i) and leaves the generator as it was:
    what is drawn depends neither on the worker, nor on the order, nor on what was drawn before.

    Args:
        source: Where the images come from.
        rows: Which images of the source, in order.
        labels: Class index of each selected image.
        names: Name of each selected image.
        transform: From RGB image to tensor; without one, items are images.
        seed: Of the augmentation.

    Raises:
        ValueError: `rows`, `labels` and `names` differ in length.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: Sequence[int],
        labels: Sequence[int],
        names: Sequence[str],
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        seed: int = 0,
    ) -> None:
        if not len(rows) == len(labels) == len(names):
            raise ValueError(
                f"rows, labels and names must be equally many, got {len(rows)}, {len(labels)} and {len(names)}"
            )
        self.source = source
        self.rows = list(rows)
        self.labels = list(labels)
        self.names = list(names)
        self.transform = transform
        self.seed = seed
        # in shared memory: persistent workers, which hold a copy of this object, see a new epoch too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Transformed image (the RGB image itself without a transform) and class index."""
        index = self._position(index)
        if self.transform is None:
            return self._item(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_item_seed(self.seed, self.epoch, index))
            return self._item(index)

    @property
    def epoch(self) -> int:
        """Epoch that the augmentation is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw another augmentation from here on; Accelerate's loaders call this at each epoch's start."""
        self._epoch.fill_(epoch)

    def image(self, index: int) -> Image.Image:
        """The image as it is, RGB; a copy to draw on."""
        return self.source.load(self.rows[self._position(index)]).copy()

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> "ImageDataset":
        """The same images with another transform, in the same epoch; decoded images are shared."""
        return self._selected(range(len(self)), transform)

    def subset(self, positions: Sequence[int]) -> "ImageDataset":
        """The images at these positions, in this order."""
        return self._selected([self._position(position) for position in positions], self.transform)

    def _selected(self, positions: Sequence[int], transform: Callable[[Image.Image], Any] | None) -> "ImageDataset":
        """A copy with some of the items."""
        selected = self._made(
            [self.rows[position] for position in positions],
            [self.labels[position] for position in positions],
            [self.names[position] for position in positions],
            transform,
        )
        selected.set_epoch(self.epoch)
        return selected

    def _item(self, index: int) -> tuple[Any, Any]:
        """Transformed image and class index; what is random in it is seeded already."""
        image = self.source.load(self.rows[index])
        return image.copy() if self.transform is None else self.transform(image), self.labels[index]

    def _made(self, rows: list[int], labels: list[int], names: list[str], transform: Any) -> "ImageDataset":
        """A data set of the same source."""
        return ImageDataset(self.source, rows, labels, names, transform=transform, seed=self.seed)

    def _position(self, index: int) -> int:
        """`index` counted from the front."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)


def _item_seed(seed: int, epoch: int, index: int) -> int:
    """64 bits that differ for every (seed, epoch, index)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
