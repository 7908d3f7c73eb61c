"""Torch data sets of labeled images; augmentation does not depend on workers, prefetching or resuming."""

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
"""How files of formats begin that Pillow reads; those of TIFF and BMP are others' too."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
HEIC_HINT = "HEIC photographs cannot be read, save them as JPEG"
_THREADS = 4  # decoding releases the interpreter lock
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are no images, cut off or damaged."""


def read_image(path: str | Path) -> Image.Image:
    """Read and fully decode an image file as RGB, turned upright where the camera noted it.

    Args:
        path: File in any format that Pillow reads; of an animation the first frame.

    Raises:
        ValueError: The file is no image, is truncated, or has values that have no 8-bit meaning.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file (a pipe, a socket or a device, which may never end)")
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:
        hint = f"; {HEIC_HINT}" if is_heic(Path(path)) else ""
        raise ValueError(f"'{path}' is not a readable image: {error or type(error).__name__}{hint}") from error


def is_image(path: Path) -> bool:
    """Whether a file in a folder is taken for an image: by its ending, or by its content whatever the ending says.

    Hidden files are none: `._photo.jpg` is what macOS keeps beside `photo.jpg`.

    Args:
        path: Existing file.
    """
    if path.name.startswith(".") or path.suffix.lower() in IMAGE_SUFFIXES:
        return not path.name.startswith(".")
    start = _first_bytes(path)
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_avif = start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis")
    return start.startswith(_STARTS) or is_webp or is_avif


def is_heic(path: Path) -> bool:
    """Whether a file is a photograph in Apple's format, which Pillow does not read."""
    start = _first_bytes(path)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def _first_bytes(path: Path) -> bytes:
    """The beginning of a regular file; nothing of others and of those that cannot be read."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(12)
    except OSError:
        return b""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB: transparency on white, gray three times, 16-bit values by their high byte.

    Args:
        image: Image of any mode but 32-bit floating point.

    Raises:
        ValueError: Floating-point values: which of them is white is not known.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(white, colors).convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        eight_bit = values >> 8 if values.max(initial=0) > 255 or image.mode != "I" else values
        return Image.fromarray(np.clip(eight_bit, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values, save it with 8 or 16 bits")
    return image.convert("RGB")


def broken_images(paths: Sequence[Path]) -> dict[int, str]:
    """Decode every file once and tell which ones cannot be.

    Args:
        paths: Image files.

    Returns:
        From the position in `paths` to the reason, in order.
    """
    return broken_rows(FileImages(paths), range(len(paths)))


def broken_rows(source: "CachedImages", rows: Sequence[int]) -> dict[int, str]:
    """Decode images of a source once and tell which ones cannot be.

    Args:
        source: Images.
        rows: Which of them.

    Returns:
        From the row to the reason, in the order of `rows`.
    """

    def reason(row: int) -> str | None:
        try:
            source.read(row)
        except ValueError as error:
            return str(error).partition("image: ")[2] or str(error)
        return None

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return {row: text for row, text in zip(rows, threads.map(reason, rows), strict=True) if text is not None}


THRESHOLD = 128
"""Least value that is foreground in a mask of a lossy format."""
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
_GRAYS = ("L", "I", "I;16", "I;16B", "I;16L")


def read_label_map(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a mask: palette indices, gray values, or a picture of black and white.

    A lossy format (JPEG) does not preserve labels, so that only two can be told apart: such a mask is thresholded at
    `THRESHOLD` and becomes 0 and 1.

    Args:
        path: PNG and the like in palette, gray or black-and-white mode, RGB where the three channels are equal; or
            JPEG.

    Returns:
        `[height, width]`, uint16; and whether it was cut at the threshold.

    Raises:
        ValueError: The file is no image, is truncated, or holds colors instead of labels.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file (a pipe, a socket or a device, which may never end)")
        with Image.open(path) as image:
            image.load()
            is_lossy = image.format in LOSSY_FORMATS
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright.convert("L")) >= THRESHOLD if is_lossy else _labels(upright)
            return values.astype(np.uint16), is_lossy
    except DECODING_ERRORS as error:
        raise ValueError(f"'{path}' is not a readable mask: {error or type(error).__name__}") from error


def _labels(image: Image.Image) -> np.ndarray:
    """The labels that a lossless mask holds."""
    if image.mode == "P" or image.mode == "1" or image.mode in _GRAYS:
        return np.asarray(image)
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode in ("RGB", "RGBA"):
        colors = np.asarray(image)[..., :3]
        if (colors == colors[..., :1]).all():
            return colors[..., 0]
        raise ValueError("it holds colors, save it as a palette or gray PNG whose values are the labels")
    raise ValueError(f"mode {image.mode} has no labels, save it as a palette or gray PNG")


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
    """

    def __init__(self, *, budget_bytes: int = _BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.kept_bytes = 0
        self._kept: dict[int, Image.Image] = {}

    def load(self, row: int) -> Image.Image:
        """The image as RGB.

        Raises:
            ValueError: The file is gone or broken by now.
        """
        if (kept := self._kept.get(row)) is not None:
            return kept
        image = self.read(row)
        worker = get_worker_info()
        budget = self.budget_bytes // (1 if worker is None else worker.num_workers)
        size = len(image.getbands()) * image.width * image.height
        if self.kept_bytes + size <= budget:
            self._kept[row] = image
            self.kept_bytes += size
        return image

    def read(self, row: int) -> Image.Image:
        """Decode one image; a ValueError where it is broken."""
        raise NotImplementedError

    def content(self, row: int) -> bytes:
        """What one image is made of."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: a worker starts with none."""
        return {**self.__dict__, "_kept": {}, "kept_bytes": 0}


class FileImages(CachedImages):
    """Image files.

    Args:
        paths: Files.
        budget_bytes: See `CachedImages`.
    """

    def __init__(self, paths: Sequence[Path], *, budget_bytes: int = _BUDGET_BYTES) -> None:
        super().__init__(budget_bytes=budget_bytes)
        self.paths = list(paths)

    def read(self, row: int) -> Image.Image:
        """Decode one file."""
        return read_image(self.paths[row])

    def content(self, row: int) -> bytes:
        """The bytes of one file."""
        return self.paths[row].read_bytes()


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
        self.source = source
        self.rows = list(rows)
        self.labels = list(labels)
        self.names = list(names)
        self.transform = transform
        self.seed = seed
        self.annotations = annotations or Annotations()
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


class ArrayMasks:
    """Masks in one array.

    Args:
        labels: `[n, height, width]`, uint8.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def load(self, row: int) -> Image.Image:
        """Labels as the gray values of a picture."""
        return Image.fromarray(self.labels[row])

    def content(self, row: int) -> bytes:
        """The labels."""
        return self.labels[row].tobytes()


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
        return moved, _plain(mask).long()

    def _made(self, rows: list[int], labels: list[int], names: list[str], transform: Any) -> "MaskDataset":
        """A data set of the same sources."""
        return MaskDataset(self.source, self.masks, rows, names, transform=transform, seed=self.seed)


def _plain(mask: Tensor) -> Tensor:
    """An ordinary tensor with the mask's values."""
    return mask.as_subclass(Tensor)


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


__all__ = [
    "DECODING_ERRORS",
    "HEIC_HINT",
    "IMAGE_SUFFIXES",
    "LOSSY_FORMATS",
    "THRESHOLD",
    "Annotations",
    "ArrayImages",
    "ArrayMasks",
    "CachedImages",
    "FileImages",
    "FileMasks",
    "ImageDataset",
    "ImageSource",
    "MaskDataset",
    "Target",
    "broken_images",
    "broken_rows",
    "is_heic",
    "is_image",
    "joined",
    "read_image",
    "read_label_map",
    "to_rgb",
]
