"""Torch datasets of labeled images with augmentation seeded by (seed, epoch, image)."""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

from snella_app.console import track_progress
from snella_app.data.images import (
    RGB,
    ImageMetadata,
    Reading,
    first_channels,
    inspect_image,
    metadata_of,
    read_image,
    read_label_map,
    to_rgb,
)

if TYPE_CHECKING:
    from rich.console import Console

_THREADS = 4  # decoding releases the GIL
_BUDGET_BYTES = 512 * 2**20
_CONSOLE: ContextVar["Console | None"] = ContextVar("console", default=None)
_T = TypeVar("_T")
_R = TypeVar("_R")


class ImageSource(Protocol):
    """Picklable source of images by row."""

    def load(self, row: int) -> Image.Image:
        """Return the image as RGB; callers must not modify it, since it may be shared."""

    def content(self, row: int) -> bytes:
        """Return the raw content of the image: file bytes or pixels."""


class ArrayImages:
    """Grayscale images in one array.

    Args:
        pixels: `[n, height, width]`, uint8.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def load(self, row: int) -> Image.Image:
        """Return the image as RGB."""
        return Image.fromarray(self.pixels[row]).convert("RGB")

    def content(self, row: int) -> bytes:
        """Return the pixels."""
        return self.pixels[row].tobytes()


class CachedImages:
    """Lazily decoded images with an in-memory cache.

    Subclasses implement `read` and `content`.

    Args:
        budget_bytes: Cache size for decoded images, one byte per pixel and channel, divided among loader workers.
            Images beyond the budget are decoded on every access.
        reading: As for `read_image`.

    Attributes:
        metadata: Metadata of the inspected images by row.
    """

    def __init__(self, *, budget_bytes: int = _BUDGET_BYTES, reading: Reading = RGB) -> None:
        self.budget_bytes = budget_bytes
        self.reading = reading
        self.metadata: dict[int, ImageMetadata] = {}
        self.cached_bytes = 0
        self._cached: dict[int, Any] = {}

    def load(self, row: int) -> Any:
        """Return the decoded image, from the cache if possible.

        Raises:
            ValueError: If the file is missing or broken.
        """
        if (cached := self._cached.get(row)) is not None:
            return cached
        image = self.read(row)
        worker = get_worker_info()
        budget = self.budget_bytes // (1 if worker is None else worker.num_workers)
        size = image.nbytes if isinstance(image, Tensor) else len(image.getbands()) * image.width * image.height
        if self.cached_bytes + size <= budget:
            self._cached[row] = image
            self.cached_bytes += size
        return image

    def read(self, row: int) -> Any:
        """Decode one image; raise ValueError if it is broken."""
        raise NotImplementedError

    def inspect(self, row: int) -> ImageMetadata:
        """Decode one image and return its metadata; raise ValueError if it is broken."""
        return metadata_of(self.read(row))

    def content(self, row: int) -> bytes:
        """Return the raw content of one image."""
        raise NotImplementedError

    def at_side(self, side: int | None) -> Self:
        """Return a copy with another `Reading.side` and an empty cache."""
        source = copy(self)
        source.reading, source._cached, source.cached_bytes = replace(self.reading, side=side), {}, 0
        return source

    def __getstate__(self) -> dict[str, Any]:
        """Exclude cached images from pickling."""
        return {**self.__dict__, "_cached": {}, "cached_bytes": 0, "metadata": {}}


class FileImages(CachedImages):
    """Image files; see `CachedImages` for other arguments."""

    def __init__(self, paths: Sequence[Path], *, budget_bytes: int = _BUDGET_BYTES, reading: Reading = RGB) -> None:
        super().__init__(budget_bytes=budget_bytes, reading=reading)
        self.paths = list(paths)

    def read(self, row: int) -> Any:
        """Decode one file."""
        return read_image(self.paths[row], self.reading)

    def inspect(self, row: int) -> ImageMetadata:
        """Decode one file and return its metadata."""
        path = self.paths[row]
        return inspect_image(path, str(path), self.reading)

    def content(self, row: int) -> bytes:
        """Return the bytes of one file."""
        return self.paths[row].read_bytes()


def broken_images(paths: Sequence[Path]) -> dict[int, str]:
    """Decode every file once and return the broken files.

    Args:
        paths: Image files.

    Returns:
        Reason by position in `paths`, in order.
    """
    return broken_rows(FileImages(paths), range(len(paths)))


def broken_rows(source: "CachedImages", rows: Sequence[int]) -> dict[int, str]:
    """Decode rows of a source once, store their `metadata`, and return the broken rows.

    Args:
        source: Images.
        rows: Rows to decode.

    Returns:
        Reason by row, in the order of `rows`.
    """

    def reason(row: int) -> str | None:
        try:
            source.metadata[row] = source.inspect(row)
        except ValueError as error:
            return str(error).partition("image: ")[2] or str(error)
        return None

    return {row: text for row, text in zip(rows, decode_all(reason, rows), strict=True) if text is not None}


def decode_all(decode: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Apply a decoding function to all items in threads; `show_reading` shows the progress."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return list(track_progress(threads.map(decode, items), "reading images", len(items), _CONSOLE.get()))


@contextmanager
def show_reading(console: "Console | None", is_enabled: bool = True) -> Iterator[None]:
    """Show a progress bar while `decode_all` runs, if the console is a terminal.

    Args:
        console: Console for the transient bar; None disables it.
        is_enabled: If False, show no bar.
    """
    token = _CONSOLE.set(console if is_enabled else None)
    try:
        yield
    finally:
        _CONSOLE.reset(token)


Target = str | float | tuple[str, ...] | tuple[float, ...]
"""Label-column value of an image: class name, number, label names, or several numbers."""


@dataclass(frozen=True)
class Annotations:
    """Table columns other than the class, one entry per image; None for absent columns.

    Attributes:
        targets: Values of the label column: class name (`str`), number, label names (tuple of `str`), or numbers of
            several columns (tuple of `float`), depending on `load_data(target=...)`.
        weights: Nonnegative sample weights in the loss.
        groups: Group of each image, e.g. a patient, site or video.
    """

    targets: list[Target] | None = None
    weights: list[float] | None = None
    groups: list[str] | None = None

    def subset(self, positions: Sequence[int]) -> "Annotations":
        """Return the annotations at these positions."""
        columns = (self.targets, self.weights, self.groups)
        return Annotations(*(None if c is None else [c[p] for p in positions] for c in columns))  # type: ignore[arg-type]

    def joined(self, other: "Annotations") -> "Annotations":
        """Concatenate two annotations; drop columns missing from either."""
        pairs = zip(
            (self.targets, self.weights, self.groups), (other.targets, other.weights, other.groups), strict=True
        )
        return Annotations(*(None if a is None or b is None else [*a, *b] for a, b in pairs))

    def plain(self) -> dict[str, Any]:
        """Return the present columns by name, for hashing."""
        columns = {"targets": self.targets, "weights": self.weights, "groups": self.groups}
        return {name: column for name, column in columns.items() if column is not None}


class ImageDataset(Dataset[tuple[Any, ...]]):
    """Dataset of selected images with labels, names and a transform.

    The transform of item `i` runs with torch's generator seeded by (seed, epoch, i), so augmentation is independent of
    workers and order. The generator is restored afterwards.

    Args:
        source: Source of the images.
        rows: Selected rows of the source, in order.
        labels: Class index of each selected image.
        names: Name of each selected image.
        transform: Maps an RGB image to a tensor; None returns images.
        seed: Seed of the augmentation.
        annotations: Raw targets, sample weights and groups of the selected images.

    Raises:
        ValueError: If `rows`, `labels` and `names` differ in length.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: Sequence[int],
        labels: Sequence[int],
        names: Sequence[str],
        *,
        transform: Callable[..., Any] | None = None,
        seed: int = 0,
        annotations: Annotations | None = None,
    ) -> None:
        if not len(rows) == len(labels) == len(names):
            raise ValueError(
                f"rows, labels and names must have equal lengths, got {len(rows)}, {len(labels)} and {len(names)}"
            )
        self.source, self.rows, self.labels, self.names = source, list(rows), list(labels), list(names)
        self.transform, self.seed = transform, seed
        self.annotations = annotations or Annotations()
        self._encode: Callable[[Target], Any] | None = None
        self._is_weighted = False
        # in shared memory, so that persistent workers read new epochs
        self._epoch = _shared_zero()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return the transformed image (or RGB image without a transform) and class index; see `with_targets`."""
        index = self._position(index)
        if self.transform is None:
            return self._item(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_item_seed(self.seed, self.epoch, index))
            return self._item(index)

    @property
    def epoch(self) -> int:
        """Epoch that seeds the augmentation."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the augmentation; Accelerate's data loaders call this at the start of each epoch."""
        self._epoch.fill_(epoch)

    def image(self, index: int) -> Image.Image:
        """Return a copy of the untransformed image as RGB; multispectral images are reduced to three channels."""
        image: Any = self.source.load(self.rows[self._position(index)])
        if isinstance(image, Tensor):
            return to_pil_image(first_channels(image))
        return image.copy() if image.mode == "RGB" else to_rgb(image)

    def content_digest(self) -> str:
        """Return the SHA-256 of the raw content (file bytes or pixels) of all images in order."""
        total = hashlib.sha256()
        for row in self.rows:
            for source in self._sources():
                total.update(hashlib.sha256(source.content(row)).digest())
        return total.hexdigest()

    def locations(self) -> list[tuple[ImageSource, int]]:
        """Return the source and row of each image, inside joined sources."""
        source = self.source
        return [source.locate(row) if isinstance(source, _JoinedSource) else (source, row) for row in self.rows]

    def _sources(self) -> list[ImageSource]:
        """Return the sources of an item's content."""
        return [self.source]

    def with_transform(self, transform: Callable[..., Any] | None) -> Self:
        """Return a copy with another transform; cached images are shared."""
        return self._select(range(len(self)), transform)

    def with_source(self, source: ImageSource) -> Self:
        """Return a copy with another source of the same rows."""
        dataset = self.with_transform(self.transform)
        dataset.source = source
        return dataset

    def with_targets(self, encode: Callable[[Target], Any] | None = None, *, is_weighted: bool = False) -> Self:
        """Return a copy with other targets.

        Args:
            encode: Maps the label-column value to the target; None uses the class index. Must be picklable.
            is_weighted: Append the sample weight to each item, if the data has weights.
        """
        dataset = self._select(range(len(self)), self.transform)
        dataset._encode, dataset._is_weighted = encode, is_weighted and self.annotations.weights is not None
        return dataset

    def target_and_weight(self, index: int) -> tuple[Any, ...]:
        """Return the target of an item, followed by the sample weight if items are weighted."""
        target: Any = self.labels[index]
        if self._encode is not None:
            if self.annotations.targets is None:
                raise RuntimeError(
                    "encoding targets requires a label column, got images with classes only; load a table"
                )
            target = self._encode(self.annotations.targets[index])
        if not self._is_weighted or self.annotations.weights is None:
            return (target,)
        return target, self.annotations.weights[index]

    def subset(self, positions: Sequence[int]) -> Self:
        """Return the images at these positions, in this order."""
        return self._select([self._position(position) for position in positions], self.transform)

    def _select(self, positions: Sequence[int], transform: Callable[..., Any] | None) -> Self:
        """Return a copy with the selected items."""
        selected = copy(self)
        selected.rows = [self.rows[position] for position in positions]
        selected.labels = [self.labels[position] for position in positions]
        selected.names = [self.names[position] for position in positions]
        selected.annotations = self.annotations.subset(positions)
        selected.transform = transform
        selected._epoch = _shared_zero()  # epochs of the copies are independent
        selected.set_epoch(self.epoch)
        return selected

    def _item(self, index: int) -> tuple[Any, ...]:
        """Return the transformed image and its target; the caller seeds the generator."""
        image: Any = self.source.load(self.rows[index])
        if self.transform is not None:
            image = self.transform(image)
        else:
            image = image.clone() if isinstance(image, Tensor) else image.copy()
        return image, *self.target_and_weight(index)

    def _position(self, index: int) -> int:
        """Convert a negative index to a position."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)


def _shared_zero() -> Tensor:
    """Return a zero-initialized int64 scalar in shared memory.

    Raises:
        OSError: If shared memory (`/dev/shm`) is full or a file size limit is reached.
    """
    try:
        return torch.zeros((), dtype=torch.int64).share_memory_()
    except RuntimeError as error:
        raise OSError(f"cannot allocate eight bytes in shared memory: {error}; free space in /dev/shm") from None


def _item_seed(seed: int, epoch: int, index: int) -> int:
    """Return a 63-bit seed derived from (seed, epoch, index)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def known_metadata(images: ImageDataset) -> dict[int, ImageMetadata]:
    """Return the metadata of a dataset's inspected images by position."""
    return {
        position: source.metadata[row]
        for position, (source, row) in enumerate(images.locations())
        if isinstance(source, CachedImages) and row in source.metadata
    }


def file_paths(images: ImageDataset) -> dict[int, Path]:
    """Return the file of each image by position; images that are not files are missing."""
    return {
        position: source.paths[row]
        for position, (source, row) in enumerate(images.locations())
        if isinstance(source, FileImages)
    }


class FileMasks(FileImages):
    """Mask files, cached like images.

    Args:
        paths: Files supported by `read_label_map`.
        is_white_foreground: If True, nonzero values become label 1.
    """

    def __init__(self, paths: Sequence[Path], *, is_white_foreground: bool = False) -> None:
        super().__init__(paths)
        self.is_white_foreground = is_white_foreground

    def read(self, row: int) -> Image.Image:
        """Return the labels as a grayscale image."""
        labels, _ = read_label_map(self.paths[row])
        if self.is_white_foreground:
            labels = labels > 0
        return Image.fromarray(labels.astype(np.uint8))


class ArrayMasks(ArrayImages):
    """Masks in one label array."""

    def load(self, row: int) -> Image.Image:
        """Return the labels as a grayscale image."""
        return Image.fromarray(self.pixels[row])


class MaskDataset(ImageDataset):
    """Dataset of selected images with masks; see `ImageDataset` for seeding.

    Args:
        source: Source of the images.
        masks: Source of the masks, with the same rows.
        rows: Selected rows of the source, in order.
        names: Name of each selected image.
        transform: Maps (RGB image, mask) to two tensors; None returns an image and a label array.
        seed: Seed of the augmentation.
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
        """Return the untransformed labels of an image, `[height, width]`, uint8."""
        return np.array(self.masks.load(self.rows[self._position(index)]))

    def _sources(self) -> list[ImageSource]:
        """Return the sources of an item's content."""
        return [self.source, self.masks]

    def _item(self, index: int) -> tuple[Any, Any]:
        """Transform image and labels together: `[3, height, width]` and `[height, width]`, int64."""
        image, labels = self.source.load(self.rows[index]), torch.from_numpy(self.mask(index))
        if self.transform is None:
            return image.copy(), labels.numpy()
        transformed, mask = self.transform(image, tv_tensors.Mask(labels))
        return transformed, mask.as_subclass(Tensor).long()


def read_at_side(parts: Sequence[ImageDataset], side: int | None) -> list[ImageDataset]:
    """Return splits that read images at a reduced resolution; splits with masks are unchanged.

    Args:
        parts: Splits; sources shared between splits stay shared.
        side: Minimum shorter side, see `Reading.side`.
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
    """Return a file source with another `Reading.side`; return other sources unchanged."""
    return source.at_side(side) if isinstance(source, CachedImages | _JoinedSource) else source


class _JoinedSource:
    """Concatenation of two sources at a row boundary."""

    def __init__(self, first: ImageSource, second: ImageSource, boundary: int) -> None:
        self.first, self.second, self.boundary = first, second, boundary

    def locate(self, row: int) -> tuple[ImageSource, int]:
        """Return the source that contains the row, which is not itself joined, and its row there."""
        source, row = (self.first, row) if row < self.boundary else (self.second, row - self.boundary)
        return source.locate(row) if isinstance(source, _JoinedSource) else (source, row)

    def load(self, row: int) -> Image.Image:
        """Return the image from the source that contains the row."""
        source, row = self.locate(row)
        return source.load(row)

    def content(self, row: int) -> bytes:
        """Return the raw content of the image."""
        source, row = self.locate(row)
        return source.content(row)

    def at_side(self, side: int | None) -> "_JoinedSource":
        """Return a copy with another `Reading.side`."""
        return _JoinedSource(_at_side(self.first, side), _at_side(self.second, side), self.boundary)


def joined(first: ImageDataset, second: ImageDataset) -> ImageDataset:
    """Concatenate two datasets; the result has no transform and the seed of the first.

    Args:
        first: Dataset of images, with or without masks.
        second: Dataset of the same type.
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
    """Labeled images in the splits defined by the data.

    Attributes:
        name: Short name of the data.
        classes: Class names by index.
        train: Training split, or all images if there are no splits.
        val: Validation split, if the data has one.
        test: Test split, if the data has one.
        has_parts: True if the data defines splits, so that no test split is created.
        notes: Notes for the user: skipped files, choices, licenses.
        strata: Names of image labels if they differ from the classes, e.g. for images with masks.
        is_resized_whole: If True, images are resized without a center crop.
        official_joins_val: True if the authors' scripts also train on the validation split.
        broken: Reason by name of each skipped image.
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
        """Names of image labels, used to stratify splits."""
        return self.classes if self.strata is None else self.strata

    @property
    def parts(self) -> dict[str, ImageDataset]:
        """Existing splits by name."""
        splits = (("train", self.train), ("val", self.val), ("test", self.test))
        return {name: part for name, part in splits if part is not None}
