"""Torch data sets of labeled images; augmentation does not depend on workers, prefetching or resuming."""

import hashlib
import importlib.util
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jfif", ".avif")
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
"""How files of formats begin that Pillow reads; those of TIFF and BMP are others' too."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
HEIC_HINT = "HEIC photographs need pillow-heif: pip install 'snella[heic]', or save them as JPEG"
_NUMPY_START = b"\x93NUMPY"
_PILLOW_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
_THREADS = 4  # decoding releases the interpreter lock
_SIDE = 16
_DRAFT = (256, 256)
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
File = str | Path | BinaryIO
FULL_WHITE = 65535
"""The largest value of 16 bits."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image that was decoded once.

    Attributes:
        size: Width and height as stored.
        mode: Pillow's mode as stored, or the type and the number of channels of an array.
        format: Such as JPEG.
        has_pages: Whether it has more than one page or frame.
        thumbnail: 16×16 gray values, uint8: copies that were saved again or resized have nearly the same.
        brightest: Largest value of a 16-bit image as a share of white; None for others.
    """

    size: tuple[int, int]
    mode: str
    format: str
    has_pages: bool
    thumbnail: np.ndarray
    brightest: float | None = None


@dataclass(frozen=True)
class Reading:
    """How the pixels of an image are read.

    Attributes:
        channels: 3 for RGB, 1 for gray, 4 for RGBA; any other number for a TIFF (by tifffile) or `.npy` array of
            `[height, width, channels]`, `[channels, height, width]` or a page a channel.
        white: Value of 16-bit gray images and arrays that becomes white; larger ones do too.
    """

    channels: int = 3
    white: int = FULL_WHITE


RGB = Reading()


def read_image(path: str | Path, reading: Reading = RGB) -> Any:
    """Read and fully decode an image file, turned upright where the camera noted it.

    Args:
        path: File in any format that Pillow reads; of several pages or an animation the first. HEIC with pillow-heif.
        reading: Channels, and the value that is white.

    Returns:
        A PIL image, or for other numbers of channels than 1, 3 and 4 a `tv_tensors.Image` `[channels, height, width]`,
        uint8 or, of 16-bit values as their share of white, float32.

    Raises:
        ValueError: The file is no image, is truncated, or has values that have no 8-bit meaning or other channels.
    """
    return decode_image(path, str(path), reading)


def decode_image(file: File, name: str, reading: Reading = RGB) -> Any:
    """Decode an image as `read_image` does, from a file or a stream of bytes that is called `name` in messages."""
    with _naming_errors(name, file):
        _check_regular(file)
        if reading.channels not in _PILLOW_CHANNELS:
            return tv_tensors.Image(_read_array(file, reading))
        with _open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # without a copy where it is upright
            return to_channels(image, reading)


def inspect_image(file: File, name: str, reading: Reading = RGB) -> ImageFacts:
    """Decode an image once, large JPEGs at a lower resolution, and say what it is. Raises as `read_image`."""
    with _naming_errors(name, file):
        _check_regular(file)
        if reading.channels not in _PILLOW_CHANNELS:
            array = _read_array(file, reading)
            kind = f"{reading.channels} channels of {'8' if array.dtype == torch.uint8 else '16 or more'} bits"
            facts = facts_of(to_pil_image(_shown(array)), kind, "array")
            return replace(facts, brightest=None if array.dtype == torch.uint8 else float(array.max()))
        with _open(file) as image:
            size, mode, kind = image.size, image.mode, image.format or ""
            has_pages = kind != "MPO" and bool(getattr(image, "is_animated", False))
            image.draft(None, _DRAFT)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            facts = facts_of(to_channels(image, reading), mode, kind)
            is_deep = mode.startswith("I;16")
            brightest = min(float(np.asarray(image).max(initial=0)) / reading.white, 1.0) if is_deep else None
            return replace(facts, size=size, has_pages=has_pages, brightest=brightest)


def facts_of(image: Image.Image, mode: str = "", kind: str = "") -> ImageFacts:
    """What is known of an image that is decoded already."""
    thumbnail = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return ImageFacts(image.size, mode or image.mode, kind, False, np.asarray(thumbnail))


def _check_regular(file: File) -> None:
    """Refuse what has a name but no end."""
    if isinstance(file, str | Path) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file (a pipe, a socket or a device, which may never end)")


@contextmanager
def _naming_errors(name: str, file: File) -> Iterator[None]:
    """Turn the errors of decoders into one that names the image."""
    try:
        yield
    except DECODING_ERRORS as error:
        hint = f"; {HEIC_HINT}" if _is_heic_start(_start_of(file)) and not has_heic() else ""
        raise ValueError(f"'{name}' is not a readable image: {_reason(error, file)}{hint}") from error


def _reason(error: BaseException, file: File) -> str:
    """Why a file is no readable image, without its name, which Pillow's message repeats with the whole path."""
    if isinstance(file, str | Path) and Path(file).is_file() and not Path(file).stat().st_size:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return str(error) or type(error).__name__


def _open(file: File) -> Image.Image:
    """Open an image, with pillow-heif's help for HEIC."""
    if _is_heic_start(_start_of(file)) and has_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image.open(file)


@cache
def has_heic() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def _start_of(file: File) -> bytes:
    """The first bytes of a file or a stream, which stays where it is."""
    if isinstance(file, str | Path):
        return _first_bytes(Path(file))
    start = file.read(12)
    file.seek(0)
    return start


def _read_array(file: File, reading: Reading) -> Tensor:
    """The channels of a TIFF or an array file, `[channels, height, width]`, uint8 or float32 in [0, 1]."""
    channels = reading.channels
    if _start_of(file).startswith(_NUMPY_START):
        values = np.load(file, allow_pickle=False)
    else:
        try:
            import tifffile
        except ImportError as error:
            raise ImportError(f"images of {channels} channels need tifffile; pip install 'snella[channels]'") from error
        values = tifffile.imread(file)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or channels not in (values.shape[0], values.shape[-1]):
        raise ValueError(f"it must have {channels} channels, got an array of {list(values.shape)}")
    if values.shape[0] != channels:
        values = np.moveaxis(values, -1, 0)
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values))
    if values.dtype == np.uint16:
        return torch.from_numpy(values.astype(np.float32) / reading.white).clamp(max=1)
    shares = values.astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating) or not (shares.min() >= 0 and shares.max() <= 1):
        raise ValueError(
            f"values must be uint8, uint16 or shares of 0 to 1, got {values.dtype} of {values.min():g} to "
            f"{values.max():g}"
        )
    return torch.from_numpy(shares)


def _shown(image: Tensor) -> Tensor:
    """Three channels of many, `[3, height, width]`, to be looked at: the first three, or the first one three times."""
    first = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return first.as_subclass(Tensor)


def to_channels(image: Image.Image, reading: Reading) -> Image.Image:
    """Convert an image of any mode to 8-bit gray (1), RGB (3) or RGBA (4); of alpha only RGBA keeps more than white."""
    if reading.channels == 4 and image.mode in ("RGBA", "LA", "PA", "P"):
        return image.convert("RGBA")
    colors = to_rgb(image, reading.white)
    return colors if reading.channels == 3 else colors.convert(_PILLOW_CHANNELS[reading.channels])


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
    is_readable_heic = _is_heic_start(start) and has_heic()
    return start.startswith((*_STARTS, _NUMPY_START)) or is_webp or is_avif or is_readable_heic


def is_heic(path: Path) -> bool:
    """Whether a file is a photograph in Apple's format, which Pillow alone does not read."""
    return _is_heic_start(_first_bytes(path))


def _is_heic_start(start: bytes) -> bool:
    """Whether a file begins as HEIC does."""
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


def to_rgb(image: Image.Image, white: int = FULL_WHITE) -> Image.Image:
    """Convert any mode to 8-bit RGB: transparency on white, gray three times, 16-bit values by their high byte.

    Args:
        image: Image of any mode but 32-bit floating point.
        white: Value of 16-bit images that becomes white.

    Raises:
        ValueError: Floating-point values: which of them is white is not known.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colors = image.convert("RGBA")
        ground = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(ground, colors).convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        is_deep = values.max(initial=0) > 255 or image.mode != "I"
        if white == FULL_WHITE:
            eight_bit = values >> 8 if is_deep else values
        else:
            eight_bit = (values.astype(np.float32) * (255 / white)).round() if is_deep else values
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

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: a worker starts with none."""
        return {**self.__dict__, "_kept": {}, "kept_bytes": 0, "facts": {}}


class FileImages(CachedImages):
    """Image files.

    Args:
        paths: Files.
        budget_bytes: See `CachedImages`.
        reading: See `CachedImages`.
    """

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
        self.source = source
        self.rows = list(rows)
        self.labels = list(labels)
        self.names = list(names)
        self.transform = transform
        self.seed = seed
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
            return to_pil_image(_shown(image))
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
    "FULL_WHITE",
    "HEIC_HINT",
    "IMAGE_SUFFIXES",
    "LOSSY_FORMATS",
    "RGB",
    "THRESHOLD",
    "Annotations",
    "ArrayImages",
    "ArrayMasks",
    "CachedImages",
    "FileImages",
    "FileMasks",
    "ImageDataset",
    "ImageFacts",
    "ImageSource",
    "MaskDataset",
    "Reading",
    "Target",
    "Watch",
    "broken_images",
    "broken_rows",
    "decode_image",
    "facts_of",
    "has_heic",
    "inspect_image",
    "is_heic",
    "is_image",
    "joined",
    "read_image",
    "read_label_map",
    "to_channels",
    "to_rgb",
    "watched_reading",
]
