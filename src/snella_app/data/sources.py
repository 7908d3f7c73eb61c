"""Sources of images and masks by row: arrays, files, and concatenations."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from snella_app.console import track_progress
from snella_app.data.images import (
    RGB,
    ImageMetadata,
    Reading,
    inspect_image,
    metadata_of,
    read_image,
    read_label_map,
)

if TYPE_CHECKING:
    from rich.console import Console

_THREADS = 4  # decoding releases the GIL
_CONSOLE: ContextVar["Console | None"] = ContextVar("console", default=None)
_T = TypeVar("_T")
_R = TypeVar("_R")


class ImageSource(Protocol):
    """Picklable source of images by row."""

    def load(self, row: int) -> Any:
        """Return the decoded image (see `read_image`). Callers must not modify it, since it may be shared."""

    def content(self, row: int) -> bytes:
        """Return the raw content of the image, either file bytes or pixels."""


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


class ArrayMasks(ArrayImages):
    """Masks in one label array."""

    def load(self, row: int) -> Image.Image:
        """Return the labels as a grayscale image."""
        return Image.fromarray(self.pixels[row])


class CachedImages:
    """Lazily decoded images with an in-memory cache.

    Subclasses implement `read` and `content`.

    Args:
        reading: As for `read_image`.

    Attributes:
        metadata: Metadata of the inspected images by row.
        budget_bytes: Cache size for decoded images in bytes, divided among loader workers. Images that do not fit are
            decoded on every access.
    """

    budget_bytes = 512 * 2**20

    def __init__(self, reading: Reading = RGB) -> None:
        self.reading = reading
        self.metadata: dict[int, ImageMetadata] = {}
        self.cached_bytes = 0
        self._cached: dict[int, Any] = {}

    def load(self, row: int) -> Any:
        """Return the decoded image, from the cache if possible.

        Raises:
            ValueError: If the file is missing or broken.
            ImportError: If tifffile is required but not installed.
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
        """Return a copy with a different `Reading.side`, without cached images and metadata."""
        source = copy(self)
        source.reading = replace(self.reading, side=side)
        source._cached = {}
        source.cached_bytes = 0
        return source

    def __getstate__(self) -> dict[str, Any]:
        """Exclude cached images and metadata from pickling and copying."""
        return {**self.__dict__, "_cached": {}, "cached_bytes": 0, "metadata": {}}


class FileImages(CachedImages):
    """Image files.

    Args:
        paths: The file of each row.
        reading: As for `read_image`.
    """

    def __init__(self, paths: Sequence[Path], reading: Reading = RGB) -> None:
        super().__init__(reading)
        self.paths = list(paths)

    def read(self, row: int) -> Any:
        """Decode one file."""
        return read_image(self.paths[row], self.reading)

    def inspect(self, row: int) -> ImageMetadata:
        """Return the metadata of one file, decoding it only if it is new or has changed."""
        path = self.paths[row]
        try:
            stat = path.stat()
        except OSError:  # explained by `inspect_image`
            return inspect_image(path, str(path), self.reading)
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return _inspect_unchanged(path, self.reading, state)

    def content(self, row: int) -> bytes:
        """Return the bytes of one file."""
        return self.paths[row].read_bytes()


@lru_cache(maxsize=50_000)
def _inspect_unchanged(path: Path, reading: Reading, state: tuple[int, ...]) -> ImageMetadata:
    """Inspect a file. The result is cached until the file's state changes, because data may be loaded repeatedly."""
    return inspect_image(path, str(path), reading)


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


class JoinedSource:
    """Concatenation of two sources. Rows from `boundary` on belong to the second."""

    def __init__(self, first: ImageSource, second: ImageSource, boundary: int) -> None:
        self.first = first
        self.second = second
        self.boundary = boundary

    def load(self, row: int) -> Any:
        """Return the image from the source that contains the row."""
        source, row = locate(self, row)
        return source.load(row)

    def content(self, row: int) -> bytes:
        """Return the raw content of the image."""
        source, row = locate(self, row)
        return source.content(row)


def locate(source: ImageSource, row: int) -> tuple[ImageSource, int]:
    """Return the innermost source that contains a row of joined sources, and the row's position in that source."""
    while isinstance(source, JoinedSource):
        if row < source.boundary:
            source = source.first
        else:
            row -= source.boundary
            source = source.second
    return source, row


def at_side(source: ImageSource, side: int | None) -> ImageSource:
    """Return the source with a different `Reading.side`. Sources that do not decode, e.g. arrays, are unchanged."""
    if isinstance(source, JoinedSource):
        return JoinedSource(at_side(source.first, side), at_side(source.second, side), source.boundary)
    return source.at_side(side) if isinstance(source, CachedImages) else source


def broken_images(paths: Sequence[Path]) -> dict[int, str]:
    """Decode every file once and return the reason for each broken file, by position."""
    return broken_rows(FileImages(paths), range(len(paths)))


def broken_rows(source: CachedImages, rows: Sequence[int]) -> dict[int, str]:
    """Decode rows of a source once and store their `metadata`. Return the reason for each broken row, in order."""

    def reason(row: int) -> str | None:
        try:
            source.metadata[row] = source.inspect(row)
        except ValueError as error:
            return str(error).partition(" is not a readable image: ")[2] or str(error)
        return None

    return {row: text for row, text in zip(rows, decode_all(reason, rows), strict=True) if text is not None}


def decode_all(decode: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Apply a decoding function to all items in threads, with a progress bar inside `show_reading`."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return list(track_progress(threads.map(decode, items), "reading images", len(items), _CONSOLE.get()))


@contextmanager
def show_reading(console: "Console | None") -> Iterator[None]:
    """Make `decode_all` show a transient progress bar in this context if the console is a terminal."""
    token = _CONSOLE.set(console)
    try:
        yield
    finally:
        _CONSOLE.reset(token)
