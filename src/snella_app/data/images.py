"""Image files: what is one, how its pixels are read, and what is known of it; masks as label maps."""

import importlib.util
import math
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jfif", ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
"""Formats that Pillow may decode, whatever a file is called; HEIF with pillow-heif comes on top. Of others, EPS starts
Ghostscript."""
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
"""Of a TIFF or an array of any channels; Pillow refuses more for its formats."""
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
"""How files of formats begin that Pillow reads; those of TIFF and BMP are others' too."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
HEIC_HINT = "HEIC photographs need pillow-heif: pip install 'snella[heic]', or save them as JPEG"
_NUMPY_START = b"\x93NUMPY"
_REDUCIBLE = ("L", "RGB", "CMYK", "YCbCr")
"""Modes whose values may be averaged."""
_PILLOW_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
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
        side: What the shorter side of an 8-bit image keeps at least, where it is read at a whole fraction of its
            resolution: JPEGs are decoded so, which takes a tenth of the time for photographs of 12 megapixels, and
            others averaged. None reads every pixel.
    """

    channels: int = 3
    white: int = FULL_WHITE
    side: int | None = None


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
        check_regular(file)
        if reading.channels not in _PILLOW_CHANNELS:
            return tv_tensors.Image(_read_array(file, reading))
        with open_image(file) as image:
            factor = _reduction(image, reading)
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # without a copy where it is upright
            factor = _reduction(image, reading) if image.mode in _REDUCIBLE else 1
            return to_channels(image.reduce(factor) if factor > 1 else image, reading)


def _reduction(image: Image.Image, reading: Reading) -> int:
    """The fraction of its resolution that an image is read at."""
    return 1 if reading.side is None else max(1, min(image.size) // reading.side)


def inspect_image(file: File, name: str, reading: Reading = RGB) -> ImageFacts:
    """Decode an image once, large JPEGs at a lower resolution, and say what it is. Raises as `read_image`."""
    with _naming_errors(name, file):
        check_regular(file)
        if reading.channels not in _PILLOW_CHANNELS:
            array = _read_array(file, reading)
            kind = f"{reading.channels} channels of {'8' if array.dtype == torch.uint8 else '16 or more'} bits"
            facts = facts_of(to_pil_image(first_channels(array)), kind, "array")
            return replace(facts, brightest=None if array.dtype == torch.uint8 else float(array.max()))
        with open_image(file) as image:
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


def check_regular(file: File) -> None:
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
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return str(error) or type(error).__name__


def open_image(file: File) -> Image.Image:
    """Open an image by Pillow, in one of `FORMATS` only, or by pillow-heif's help as HEIC.

    Args:
        file: File or stream of bytes.

    Raises:
        UnidentifiedImageError: It is of no such format.
    """
    if _is_heic_start(_start_of(file)) and has_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(file, formats=("HEIF",))
    return Image.open(file, formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


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
        _check_header(*_array_header(file))
        values = np.load(file, allow_pickle=False)
    else:
        try:
            import tifffile
        except ImportError as error:
            raise ImportError(f"images of {channels} channels need tifffile; pip install 'snella[channels]'") from error
        with tifffile.TiffFile(file) as tiff:
            if not tiff.series:
                raise ValueError("it holds no image")
            _check_header(tiff.series[0].shape, tiff.series[0].dtype)
            values = tiff.asarray()
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


def array_pixels(file: File) -> int:
    """Pixels of a TIFF or an array file, all channels together, by its header; the stream stays where it is.

    Raises:
        ValueError: It is neither, or of no numbers.
    """
    if _start_of(file).startswith(_NUMPY_START):
        shape, dtype = _array_header(file)
    else:
        import tifffile

        with tifffile.TiffFile(file) as tiff:
            shape, dtype = (tiff.series[0].shape, tiff.series[0].dtype) if tiff.series else ((0,), None)
        if not isinstance(file, str | Path):
            file.seek(0)
    _check_header(shape, dtype)
    return math.prod(shape)


def _array_header(file: File) -> tuple[tuple[int, ...], Any]:
    """Shape and type that an array file says it has."""
    with nullcontext(file) if not isinstance(file, str | Path) else Path(file).open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        stream.seek(0)
    return shape, dtype


def _check_header(shape: Sequence[int], dtype: Any) -> None:
    """Refuse an array before it is read: of no numbers, or so large that it must be meant to fill the memory."""
    if dtype is None or dtype.kind not in "uif":
        raise ValueError(f"values must be numbers, got {dtype}")
    if math.prod(shape) > _MOST_PIXELS * 4:
        raise ValueError(f"it must have at most {_MOST_PIXELS * 4:,} values, got an array of {list(shape)}")


def first_channels(image: Tensor) -> Tensor:
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
        check_regular(path)
        with open_image(path) as image:
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
