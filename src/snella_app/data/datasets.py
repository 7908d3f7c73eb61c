"""Torch data sets of labeled images, whose augmentation depends on seed, epoch and image alone; collections of them."""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

from snella_app.data.images import (
    RGB,
    ImageFacts,
    Reading,
    facts_of,
    first_channels,
    inspect_image,
    read_image,
    read_label_map,
    to_rgb,
)

if TYPE_CHECKING:
    from rich.console import Console

_THREADS = 4  # decoding releases the interpreter lock
_BUDGET_BYTES = 512 * 2**20


class ImageSource(Protocol):
    """Images by row; picklable, so that loader workers can have it."""

    def load(self, row: int) -> Image.Image:
        """The image as RGB; it may be shared, so it is not changed in place."""

    def content(self, row: int) -> bytes:
        """What the image is made of: the bytes of its file, or its pixels."""


class ArrayImages:
    """Gray images in one array.

    Args:
        pixels: `[n, height, width]`, uint8.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def load(self, row: int) -> Image.Image:
        """The image as RGB."""
        return Image.fromarray(self.pixels[row]).convert("RGB")

    def content(self, row: int) -> bytes:
        """The pixels."""
        return self.pixels[row].tobytes()


class CachedImages:
    """Images that are decoded when they are asked for, and kept in memory up to a budget for later epochs.

    A subclass has `read` and `content`.

    Args:
        budget_bytes: Of all decoded images together, one byte a pixel and channel; loader workers share it out. Images
            beyond it are decoded every time.
        reading: As for `read_image`.

    Attributes:
        facts: What is known of images that were inspected, by row.
    """

    def __init__(self, *, budget_bytes: int = _BUDGET_BYTES, reading: Reading = RGB) -> None:
        self.budget_bytes = budget_bytes
        self.reading = reading
        self.facts: dict[int, ImageFacts] = {}
        self.kept_bytes = 0
        self._kept: dict[int, Any] = {}

    def load(self, row: int) -> Any:
        """The image with its channels.

        Raises:
            ValueError: The file is gone or broken by now.
        """
        if (kept := self._kept.get(row)) is not None:
            return kept
        image = self.read(row)
        worker = get_worker_info()
        budget = self.budget_bytes // (1 if worker is None else worker.num_workers)
        size = image.nbytes if isinstance(image, Tensor) else len(image.getbands()) * image.width * image.height
        if self.kept_bytes + size <= budget:
            self._kept[row] = image
            self.kept_bytes += size
        return image

    def read(self, row: int) -> Any:
        """Decode one image; a ValueError where it is broken."""
        raise NotImplementedError

    def inspect(self, row: int) -> ImageFacts:
        """Decode one image and say what it is; a ValueError where it is broken."""
        return facts_of(self.read(row))

    def content(self, row: int) -> bytes:
        """What one image is made of."""
        raise NotImplementedError

    def at_side(self, side: int | None) -> Self:
        """The same images, read as `Reading.side` says; nothing is kept in memory yet."""
        source = copy(self)
        source.reading, source._kept, source.kept_bytes = replace(self.reading, side=side), {}, 0
        return source

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: a worker starts with none."""
        return {**self.__dict__, "_kept": {}, "kept_bytes": 0, "facts": {}}


class FileImages(CachedImages):
    """Image files; the other arguments are those of `CachedImages`."""

    def __init__(self, paths: Sequence[Path], *, budget_bytes: int = _BUDGET_BYTES, reading: Reading = RGB) -> None:
        super().__init__(budget_bytes=budget_bytes, reading=reading)
        self.paths = list(paths)

    def read(self, row: int) -> Any:
        """Decode one file."""
        return read_image(self.paths[row], self.reading)

    def inspect(self, row: int) -> ImageFacts:
        """Decode one file and say what it is."""
        path = self.paths[row]
        return inspect_image(path, str(path), self.reading)

    def content(self, row: int) -> bytes:
        """The bytes of one file."""
        return self.paths[row].read_bytes()


def broken_images(paths: Sequence[Path]) -> dict[int, str]:
    """Decode every file once and tell which ones cannot be.

    Args:
        paths: Image files.

    Returns:
        From the position in `paths` to the reason, in order.
    """
    return broken_rows(FileImages(paths), range(len(paths)))


def broken_rows(source: "CachedImages", rows: Sequence[int]) -> dict[int, str]:
    """Decode images of a source once and tell which ones cannot be; its `facts` note what is known of the others.

    Args:
        source: Images.
        rows: Which of them.

    Returns:
        From the row to the reason, in the order of `rows`.
    """

    def reason(row: int) -> str | None:
        try:
            source.facts[row] = source.inspect(row)
        except ValueError as error:
            return str(error).partition("image: ")[2] or str(error)
        return None

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        reasons = _WATCH.get()(threads.map(reason, rows), len(rows))
        return {row: text for row, text in zip(rows, reasons, strict=True) if text is not None}


Watch = Callable[[Iterable[str | None], int], Iterable[str | None]]
"""Passes items on, of which there are so many, and shows how far it is."""
_WATCH: ContextVar[Watch] = ContextVar("watch", default=lambda items, total: items)


@contextmanager
def watched_reading(watch: Watch) -> Iterator[None]:
    """Show how far the first decoding of all images is, which takes minutes for thousands of photographs."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


@contextmanager
def show_reading(console: "Console | None", is_wanted: bool = True) -> Iterator[None]:
    """On a terminal, show how far the first decoding of all images is, inside.

    Args:
        console: Where to draw the bar, which is gone afterwards; None for nowhere.
        is_wanted: False for no bar.
    """
    if console is None or not is_wanted or not console.is_terminal:
        yield
        return
    from snella_app.console import tracked

    def watch(items: Iterable[str | None], total: int) -> Iterable[str | None]:
        return tracked(items, "reading images", total, console)

    with watched_reading(watch):
        yield


Target = str | float | tuple[str, ...] | tuple[float, ...]
"""What a label column says of an image: a class name, a number, several labels, or several numbers."""


@dataclass(frozen=True)
class Annotations:
    """What a table says of images besides their class; each list has an entry an image, None is for no such column.

    Attributes:
        targets: Of the label column: a class name (`str`), a number, any number of label names (a tuple of `str`), or
            the numbers of several columns (a tuple of `float`), as `load_data(target=...)` reads it.
        weights: Sample weights, at least 0; how much an image counts in the loss.
        groups: Name of what an image shares with others, such as a patient, a site or a video.
    """

    targets: list[Target] | None = None
    weights: list[float] | None = None
    groups: list[str] | None = None

    def subset(self, positions: Sequence[int]) -> "Annotations":
        """Those of the images at these positions."""
        columns = (self.targets, self.weights, self.groups)
        return Annotations(*(None if c is None else [c[p] for p in positions] for c in columns))  # type: ignore[arg-type]

    def joined(self, other: "Annotations") -> "Annotations":
        """Those of both, one after the other; a column that one of them lacks is left out."""
        pairs = zip(
            (self.targets, self.weights, self.groups), (other.targets, other.weights, other.groups), strict=True
        )
        return Annotations(*(None if a is None or b is None else [*a, *b] for a, b in pairs))

    def plain(self) -> dict[str, Any]:
        """The columns that there are, for a digest."""
        columns = {"targets": self.targets, "weights": self.weights, "groups": self.groups}
        return {name: column for name, column in columns.items() if column is not None}


class ImageDataset(Dataset[tuple[Any, ...]]):
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
        annotations: What else is known of each selected image: raw targets, sample weights, groups.

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
        annotations: Annotations | None = None,
    ) -> None:
        if not len(rows) == len(labels) == len(names):
            raise ValueError(
                f"rows, labels and names must be equally many, got {len(rows)}, {len(labels)} and {len(names)}"
            )
        self.source, self.rows, self.labels, self.names = source, list(rows), list(labels), list(names)
        self.transform, self.seed = transform, seed
        self.annotations = annotations or Annotations()
        self._encode: Callable[[Target], Any] | None = None
        self._is_weighted = False
        # in shared memory: persistent workers, which hold a copy of this object, see a new epoch too
        self._epoch = _shared_zero()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Transformed image (the RGB image itself without a transform) and class index; see `with_targets`."""
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
        """The image as it is, RGB; a copy to draw on. Of many channels the first three."""
        image: Any = self.source.load(self.rows[self._position(index)])
        if isinstance(image, Tensor):
            return to_pil_image(first_channels(image))
        return image.copy() if image.mode == "RGB" else to_rgb(image)

    def content_digest(self) -> str:
        """SHA-256 of what the images are made of (files' bytes, or pixels), in order; changes with any pixel."""
        total = hashlib.sha256()
        for row in self.rows:
            for source in self._sources():
                total.update(hashlib.sha256(source.content(row)).digest())
        return total.hexdigest()

    def _sources(self) -> list[ImageSource]:
        """Where the content of an item comes from."""
        return [self.source]

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> "ImageDataset":
        """The same images with another transform, in the same epoch; decoded images are shared."""
        return self._selected(range(len(self)), transform)

    def with_source(self, source: ImageSource) -> "ImageDataset":
        """The same items of another source of the same rows."""
        changed = self.with_transform(self.transform)
        changed.source = source
        return changed

    def with_targets(
        self, encode: Callable[[Target], Any] | None = None, *, is_weighted: bool = False
    ) -> "ImageDataset":
        """The same images with other items.

        Args:
            encode: From what the label column says to an item's second part; None for the class index. Picklable.
            is_weighted: Whether items have their sample weight as a third part, where there are weights.
        """
        changed = self._selected(range(len(self)), self.transform)
        changed._encode, changed._is_weighted = encode, is_weighted and self.annotations.weights is not None
        return changed

    def target_and_weight(self, index: int) -> tuple[Any, ...]:
        """What follows the image in an item: class index or encoded target, and the sample weight where it counts."""
        target: Any = self.labels[index]
        if self._encode is not None:
            if self.annotations.targets is None:
                raise RuntimeError(
                    "targets can be encoded where a label column was read, got images with classes alone"
                )
            target = self._encode(self.annotations.targets[index])
        if not self._is_weighted or self.annotations.weights is None:
            return (target,)
        return target, self.annotations.weights[index]

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
        selected.annotations = self.annotations.subset(positions)
        selected._encode, selected._is_weighted = self._encode, self._is_weighted
        selected.set_epoch(self.epoch)
        return selected

    def _item(self, index: int) -> tuple[Any, ...]:
        """Transformed image and what follows it; what is random in it is seeded already."""
        image: Any = self.source.load(self.rows[index])
        if self.transform is not None:
            image = self.transform(image)
        else:
            image = image.clone() if isinstance(image, Tensor) else image.copy()
        return image, *self.target_and_weight(index)

    def _made(self, rows: list[int], labels: list[int], names: list[str], transform: Any) -> "ImageDataset":
        """A data set of the same source."""
        return ImageDataset(self.source, rows, labels, names, transform=transform, seed=self.seed)

    def _position(self, index: int) -> int:
        """`index` counted from the front."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)


def _shared_zero() -> Tensor:
    """A zero that processes share.

    Raises:
        OSError: There is no room for it in shared memory (`/dev/shm`), or a limit on the size of files is met.
    """
    try:
        return torch.zeros((), dtype=torch.int64).share_memory_()
    except RuntimeError as error:
        raise OSError(f"no room for eight bytes in shared memory: {error}; make room in /dev/shm") from None


def _item_seed(seed: int, epoch: int, index: int) -> int:
    """64 bits that differ for every (seed, epoch, index)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def known_facts(images: ImageDataset) -> dict[int, ImageFacts]:
    """What is known of those images of a data set that were inspected, by position."""
    known = images.source.facts if isinstance(images.source, CachedImages) else {}
    return {position: known[row] for position, row in enumerate(images.rows) if row in known}


class FileMasks(FileImages):
    """Mask files, kept in memory like images.

    Args:
        paths: Files that `read_label_map` reads.
        is_white_foreground: Whether 255 stands for label 1.
    """

    def __init__(self, paths: Sequence[Path], *, is_white_foreground: bool = False) -> None:
        super().__init__(paths)
        self.is_white_foreground = is_white_foreground

    def read(self, row: int) -> Image.Image:
        """Labels as the gray values of a picture."""
        labels, _ = read_label_map(self.paths[row])
        if self.is_white_foreground:
            labels = labels > 0
        return Image.fromarray(labels.astype(np.uint8))


class ArrayMasks(ArrayImages):
    """Masks in one array, whose values are the labels."""

    def load(self, row: int) -> Image.Image:
        """Labels as the gray values of a picture."""
        return Image.fromarray(self.pixels[row])


class MaskDataset(ImageDataset):
    """A selection of images with their masks; see `ImageDataset` for what is drawn at random.

    Args:
        source: Where the images come from.
        masks: Where their masks come from, under the same rows.
        rows: Which images of the source, in order.
        names: Name of each selected image.
        transform: From (RGB image, mask) to two tensors; without one, items are an image and a label array.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        source: ImageSource,
        masks: ImageSource,
        rows: Sequence[int],
        names: Sequence[str],
        *,
        transform: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(source, rows, [0] * len(rows), names, transform=transform, seed=seed)
        self.masks = masks

    def mask(self, index: int) -> np.ndarray:
        """Labels of the image as it is, `[height, width]`, uint8."""
        return np.array(self.masks.load(self.rows[self._position(index)]))

    def _sources(self) -> list[ImageSource]:
        """Where the content of an item comes from."""
        return [self.source, self.masks]

    def _item(self, index: int) -> tuple[Any, Any]:
        """Image and labels, transformed together: `[3, height, width]` and `[height, width]`, int64."""
        image, labels = self.source.load(self.rows[index]), torch.from_numpy(self.mask(index))
        if self.transform is None:
            return image.copy(), labels.numpy()
        moved, mask = cast(Callable[..., Any], self.transform)(image, tv_tensors.Mask(labels))
        return moved, mask.as_subclass(Tensor).long()

    def _made(self, rows: list[int], labels: list[int], names: list[str], transform: Any) -> "MaskDataset":
        """A data set of the same sources."""
        return MaskDataset(self.source, self.masks, rows, names, transform=transform, seed=self.seed)


def read_at_side(parts: Sequence[ImageDataset], side: int | None) -> list[ImageDataset]:
    """The same parts, their images read as `Reading.side` says; images with masks, which must fit, stay as they are.

    Args:
        parts: Of one source or several; those that share one still do.
        side: What the shorter side keeps at least.
    """
    sources: dict[int, ImageSource] = {}
    changed = []
    for part in parts:
        if not isinstance(part, MaskDataset):
            if id(part.source) not in sources:
                sources[id(part.source)] = _at_side(part.source, side)
            part = part.with_source(sources[id(part.source)])
        changed.append(part)
    return changed


def _at_side(source: ImageSource, side: int | None) -> ImageSource:
    """The same source of files, read as `Reading.side` says; one of pixels in memory as it is."""
    return source.at_side(side) if isinstance(source, CachedImages | _JoinedSource) else source


class _JoinedSource:
    """Rows below a boundary from one source, the others from another."""

    def __init__(self, first: ImageSource, second: ImageSource, boundary: int) -> None:
        self.first, self.second, self.boundary = first, second, boundary

    def load(self, row: int) -> Image.Image:
        """The image of either source."""
        return self.first.load(row) if row < self.boundary else self.second.load(row - self.boundary)

    def content(self, row: int) -> bytes:
        """What the image of either source is made of."""
        return self.first.content(row) if row < self.boundary else self.second.content(row - self.boundary)

    def at_side(self, side: int | None) -> "_JoinedSource":
        """The same images, read as `Reading.side` says."""
        return _JoinedSource(_at_side(self.first, side), _at_side(self.second, side), self.boundary)


def joined(first: ImageDataset, second: ImageDataset) -> ImageDataset:
    """The images of both, without transform, with the seed of the first.

    Args:
        first: Of the same kind as `second`: images, or images with masks.
        second: Follows.
    """
    boundary = 1 + max(first.rows, default=-1)
    rows = [*first.rows, *(boundary + row for row in second.rows)]
    names = [*first.names, *second.names]
    source = _JoinedSource(first.source, second.source, boundary)
    if isinstance(first, MaskDataset) and isinstance(second, MaskDataset):
        return MaskDataset(source, _JoinedSource(first.masks, second.masks, boundary), rows, names, seed=first.seed)
    labels = [*first.labels, *second.labels]
    annotations = first.annotations.joined(second.annotations)
    return ImageDataset(source, rows, labels, names, seed=first.seed, annotations=annotations)


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
