"""Detect, decode and inspect image files, and read masks as label maps.

A `Reading` holds the decoding options. Inspecting an image decodes it once, to check the file and to collect metadata.
"""

import importlib.util
import io
import math
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

from snella_app.data.options import FULL_WHITE, Reading

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".ppm", ".pgm", ".pbm", ".avif"),
)
# the documented limit is twice Pillow's, where it raises DecompressionBombError
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
"""Formats that Pillow may decode, regardless of the file name; pillow-heif adds HEIF. EPS is excluded because
decoding it starts Ghostscript."""
_MAX_VALUES = 8 * (Image.MAX_IMAGE_PIXELS or 2**27)
"""Maximum number of values in an array file or a TIFF file read by tifffile. Pillow limits other images itself."""
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
"""Magic bytes of common formats. Those of TIFF and BMP are left out because they are ambiguous."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
HEIC_HINT = "HEIC images need pillow-heif: pip install 'snella[heic]', or save them as JPEG"
_NUMPY_START = b"\x93NUMPY"
_REDUCIBLE = ("L", "RGB", "CMYK", "YCbCr")
"""Pillow modes whose values can be averaged."""
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_ASPECT = 200
"""Maximum ratio of the sides of an image."""
"""Modes of 8-bit images by number of channels; images with a different number of channels are arrays."""
_THUMBNAIL_SIDE = 16
_DRAFT = (256, 256)
"""Minimum size to which JPEGs are scaled down while they are inspected, which saves time."""
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    OverflowError,
    MemoryError,
    RuntimeError,
    TokenError,
    Image.DecompressionBombError,
)
"""Errors that Pillow and NumPy raise for invalid, truncated or damaged files. RuntimeError occurs for AVIF files, and
TokenError for the headers of array files."""
File = str | Path | BinaryIO


@dataclass(frozen=True)
class ImageMetadata:
    """Metadata of a decoded image.

    Attributes:
        size: Width and height. For an inspected file, they are the stored ones, without EXIF rotation.
        mode: Pillow mode as stored in the file, or a text with the number of channels and bits of an array.
        format: File format, e.g. JPEG, or `array` for an image decoded as an array. Empty if Pillow names no format,
            e.g. for images that are not files.
        has_pages: True if the file has several pages or frames.
        thumbnail: The image reduced to 16×16 gray values, uint8. Thumbnails of re-encoded and resized copies are nearly
            equal.
        brightest: Largest value of a 16-bit grayscale image or uint16 array as a fraction of white; None for other
            images.
    """

    size: tuple[int, int]
    mode: str
    format: str
    has_pages: bool
    thumbnail: np.ndarray
    brightest: float | None = None


RGB = Reading()
"""Default options: RGB at full resolution."""


def read_image(path: str | Path, reading: Reading = RGB) -> Any:
    """Read and fully decode an image file, applying EXIF orientation.

    Args:
        path: File in a supported format. HEIC needs pillow-heif. For 1, 3 or 4 channels, only the first page or frame
            is used.
        reading: Decoding options.

    Returns:
        A PIL image for 1, 3 or 4 channels; otherwise, a `tv_tensors.Image`, `[channels, height, width]`, with uint8
        values or float32 values in [0, 1], where 16-bit values are fractions of white.

    Raises:
        ValueError: If the file is not an image or is truncated, or has unsupported values or the wrong number of
            channels.
        ImportError: If tifffile is required but not installed.
    """
    return decode_image(path, str(path), reading)


def decode_image(file: File, name: str, reading: Reading = RGB) -> Any:
    """Decode a file or byte stream as in `read_image`; `name` identifies it in messages."""
    with _image_errors(name, file):
        check_regular(file)
        if reading.channels not in PILLOW_MODES:
            return tv_tensors.Image(array_tensor(_read_array(file, reading.channels), reading.white))
        with open_image(file) as image:
            draft_factor = _reduction(image, reading)
            if draft_factor > 1:  # JPEGs are scaled while they are decoded, which is faster than averaging
                image.draft(None, (image.width // draft_factor, image.height // draft_factor))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # in place avoids a copy of upright images
            is_reducible = image.mode in _REDUCIBLE and "transparency" not in image.info
            factor = _reduction(image, reading) if is_reducible else 1
            return to_channels(image.reduce(factor) if factor > 1 else image, reading)


def _reduction(image: Image.Image, reading: Reading) -> int:
    """Return the largest integer factor that leaves the shorter side at least `reading.side`.

    Returns 1 if there is no `side` or the image is smaller.
    """
    return 1 if reading.side is None else max(1, min(image.size) // reading.side)


def inspect_image(file: File, name: str, reading: Reading = RGB) -> ImageMetadata:
    """Decode an image and return its metadata.

    Large JPEGs are decoded at a lower resolution. The errors are those of `read_image`.
    """
    with _image_errors(name, file):
        check_regular(file)
        brightest: float | None = None
        if reading.channels not in PILLOW_MODES:
            values = _read_array(file, reading.channels)
            array = array_tensor(values, reading.white)
            bits = "8" if array.dtype == torch.uint8 else "16 or more"
            mode = f"{reading.channels} channels of {bits} bits"
            _check_aspect(array.shape[-1], array.shape[-2])
            metadata = metadata_of(to_pil_image(first_channels(array)), mode, "array")
            if values.dtype == np.uint16:
                brightest = float(array.max())
            return replace(metadata, brightest=brightest)
        with open_image(file) as image:
            size = image.size
            _check_aspect(*size)
            mode = image.mode
            file_format = image.format or ""
            has_pages = file_format != "MPO" and bool(getattr(image, "is_animated", False))
            image.draft(None, _DRAFT)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            metadata = metadata_of(to_channels(image, reading), mode, file_format)
            if mode.startswith("I") and _is_deep(mode, highest := int(np.asarray(image).max(initial=0)), reading.white):
                brightest = min(highest / reading.white, 1.0)
            return replace(metadata, size=size, has_pages=has_pages, brightest=brightest)


def metadata_of(image: Image.Image, mode: str = "", kind: str = "") -> ImageMetadata:
    """Return the metadata of a decoded image."""
    thumbnail = image.convert("L").resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    return ImageMetadata(image.size, mode or image.mode, kind, False, np.asarray(thumbnail))


def check_shape(image: Image.Image | Tensor, name: str | Path) -> None:
    """Raise ValueError for a very elongated image, because resizing its shorter side would need gigabytes."""
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
    try:
        _check_aspect(width, height)
    except ValueError as error:
        raise ValueError(f"'{name}' is not a readable image: {error}") from None


def _check_aspect(width: int, height: int) -> None:
    """Raise ValueError if the sides of an image differ by more than a factor of `_MAX_ASPECT`."""
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise ValueError(f"its sides may differ by a factor of at most {_MAX_ASPECT}, got {width}×{height}")


def check_regular(file: File) -> None:
    """Raise ValueError for paths that are not regular files, e.g. folders, pipes, sockets and devices."""
    if isinstance(file, str | Path) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("not a regular file (a folder, pipe, socket or device)")


@contextmanager
def _image_errors(name: str, file: File) -> Iterator[None]:
    """Convert decoder errors to a ValueError that names the image."""
    try:
        yield
    except DECODING_ERRORS as error:
        # os.path.isfile returns False for a name that is too long, whereas Path.is_file may raise
        if isinstance(file, str | Path) and os.path.isfile(file) and not os.path.getsize(file):
            reason = "the file is empty"
        elif isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(error, UnidentifiedImageError):
            reason = "unknown image format"
        else:
            reason = str(error) or type(error).__name__
        hint = f"; {HEIC_HINT}" if is_heic(file) and not has_heic() else ""
        raise ValueError(f"'{name}' is not a readable image: {reason}{hint}") from error


def open_image(file: File) -> Image.Image:
    """Open an image in one of the `FORMATS` with Pillow, HEIC with pillow-heif, or an 8-bit NumPy array file.

    Raises:
        UnidentifiedImageError: If the format is not supported.
        ValueError: If an array is damaged or not uint8 with 1, 3 or 4 channels.
        Image.DecompressionBombError: If the image has too many pixels.
        OSError, SyntaxError: If the file cannot be read or its header is damaged.
    """
    if _start_of(file).startswith(_NUMPY_START):
        return _array_image(file)
    if is_heic(file) and has_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(file, formats=("HEIF",))
    return Image.open(file, formats=_supported_formats())


def _load_npy(file: File) -> np.ndarray:
    """Read an array file after checking in its header that its values are numeric and not too many."""
    array_pixels(file)
    return np.load(file, allow_pickle=False)


def _array_image(file: File) -> Image.Image:
    """Read an 8-bit array file, `[height, width]`, `[height, width, channels]` or `[channels, height, width]`."""
    values = _load_npy(file)
    if values.ndim == 3 and values.shape[-1] not in PILLOW_MODES and values.shape[0] in PILLOW_MODES:
        values = np.moveaxis(values, 0, -1)
    channels = values.shape[-1] if values.ndim == 3 else 1
    has_channels = values.ndim in (2, 3) and channels in PILLOW_MODES
    if not has_channels or values.dtype != np.uint8:
        remedy = "convert it to uint8" if has_channels else "set the number of channels with --channels (channels=)"
        actual = f"{values.dtype} of shape {list(values.shape)}"
        raise ValueError(f"an array must be uint8 with 1, 3 or 4 channels, got {actual}; {remedy}")
    if channels == 1:
        values = values.reshape(values.shape[:2])
    return Image.fromarray(np.ascontiguousarray(values))


@cache
def _supported_formats() -> tuple[str, ...]:
    """Return the `FORMATS` supported by the installed Pillow."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def has_heic() -> bool:
    """Return whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def _start_of(file: File) -> bytes:
    """Return the first 12 bytes, which identify the format, and rewind a stream.

    Returns no bytes for paths that are not files or cannot be read.
    """
    if not isinstance(file, str | Path):
        file.seek(0)
        start = file.read(12)
        file.seek(0)
        return start
    try:
        with Path(file).open("rb") if Path(file).is_file() else io.BytesIO() as stream:
            return stream.read(12)
    except OSError:
        return b""


def _read_array(file: File, channels: int) -> np.ndarray:
    """Read a TIFF or array file as `[channels, height, width]`, in the machine's byte order."""
    if _start_of(file).startswith(_NUMPY_START):
        values = _load_npy(file)
    else:
        with _open_tiff(file) as tiff:
            _check_values(*_shape_and_dtype(tiff))
            values = tiff.asarray()
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or channels not in (values.shape[0], values.shape[-1]):
        raise ValueError(f"the image must have {channels} channels, got an array of {list(values.shape)}")
    if values.shape[0] != channels:
        values = np.moveaxis(values, -1, 0)
    # torch rejects arrays in a different byte order
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def array_tensor(values: np.ndarray, white: int) -> Tensor:
    """Convert an array to a tensor of dtype uint8, or float32 in [0, 1].

    uint16 values become fractions of `white`, at most 1. Other integers, and floats outside [0, 1], raise ValueError.
    """
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values))
    if values.dtype == np.uint16:
        return torch.from_numpy(values.astype(np.float32) / white).clamp(max=1)
    fractions = values.astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating) or not (fractions.min() >= 0 and fractions.max() <= 1):
        raise ValueError(
            f"values must be uint8, uint16 or floats in [0, 1], got {values.dtype} in [{values.min():g}, "
            f"{values.max():g}]"
        )
    return torch.from_numpy(fractions)


def array_pixels(file: File) -> int:
    """Return the number of values in a TIFF or array file from its header, and rewind a stream.

    Raises:
        ValueError: If the file has neither format or is damaged, or if its values are not numeric or too many.
        ImportError: If tifffile is required but not installed.
    """
    try:
        if _start_of(file).startswith(_NUMPY_START):
            with nullcontext(file) if not isinstance(file, str | Path) else Path(file).open("rb") as stream:
                read_header = np.lib.format.read_array_header_2_0
                if np.lib.format.read_magic(stream) == (1, 0):
                    read_header = np.lib.format.read_array_header_1_0
                shape, _, dtype = read_header(stream)
        else:
            with _open_tiff(file) as tiff:
                shape, dtype = _shape_and_dtype(tiff)
    except DECODING_ERRORS as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(file, str | Path):
        file.seek(0)
    _check_values(shape, dtype)
    return math.prod(shape)


@contextmanager
def _open_tiff(file: File) -> Iterator[Any]:
    """Open a TIFF file with tifffile, and convert errors other than `DECODING_ERRORS` to ValueError."""
    tifffile = _import_tifffile()
    try:
        with tifffile.TiffFile(file) as tiff:
            yield tiff
    except DECODING_ERRORS:
        raise
    except Exception as error:  # e.g. TypeError from tifffile; zlib.error or lzma.LZMAError from codecs
        raise ValueError(str(error) or type(error).__name__) from error


def _shape_and_dtype(tiff: Any) -> tuple[tuple[int, ...], Any]:
    """Return the shape and dtype of the first image of an open TIFF file."""
    if not tiff.series:
        raise ValueError("the file has no image")
    return tiff.series[0].shape, tiff.series[0].dtype


def _check_values(shape: tuple[int, ...], dtype: Any) -> None:
    """Raise ValueError unless the values are numeric and there are at most `_MAX_VALUES` of them."""
    if dtype is None or dtype.kind not in "uif":
        raise ValueError(f"values must be numeric, got {dtype}")
    if math.prod(shape) > _MAX_VALUES:
        raise ValueError(f"the image must have at most {_MAX_VALUES:,} values, got an array of {list(shape)}")


def _import_tifffile() -> Any:
    """Return the module tifffile, or raise an ImportError that names the extra to install."""
    try:
        import tifffile
    except ImportError as error:
        message = "TIFF images that do not have 1, 3 or 4 channels need tifffile; pip install 'snella[channels]'"
        raise ImportError(message) from error
    return tifffile


def first_channels(image: Tensor) -> Tensor:
    """Return three channels for display, `[3, height, width]`: the first three, or the first one repeated."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return shown.as_subclass(Tensor)


def to_channels(image: Image.Image, reading: Reading) -> Image.Image:
    """Convert an image to 8-bit gray (1 channel), RGB (3) or RGBA (4); gray and RGB blend transparency with white."""
    is_transparent = image.mode in ("1", "L", "RGB") and "transparency" in image.info
    if reading.channels == 4 and (image.mode in ("RGBA", "LA", "PA", "P") or is_transparent):
        return image.convert("RGBA")
    colors = to_rgb(image, reading.white)
    return colors if reading.channels == 3 else colors.convert(PILLOW_MODES[reading.channels])


def eight_bits(values: np.ndarray, white: int) -> np.ndarray:
    """Scale 16-bit values to uint8 so that `white` maps to 255, and clip them."""
    scaled = values >> 8 if white == FULL_WHITE else (values.astype(np.float32) * (255 / white)).round()
    return scaled.clip(0, 255).astype(np.uint8)


def is_image(path: Path) -> bool:
    """Return whether a file is an image, by suffix or content.

    Hidden files are excluded, e.g. the `._photo.jpg` that macOS creates next to `photo.jpg`.
    """
    if path.name.startswith("."):
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    start = _start_of(path)
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_avif = start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis")
    is_known = start.startswith((*_STARTS, _NUMPY_START)) or is_webp or is_avif
    return is_known or (is_heic(path) and has_heic())


def is_heic(file: File) -> bool:
    """Return whether a file is HEIC, which needs pillow-heif."""
    start = _start_of(file)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def _is_deep(mode: str, highest: int, white: int) -> bool:
    """Return whether an integer image has 16-bit values. In mode I (32 bits), only the values and `white` show this."""
    return mode != "I" or highest > 255 or white != FULL_WHITE


def to_rgb(image: Image.Image, white: int = FULL_WHITE) -> Image.Image:
    """Convert any mode to 8-bit RGB: blend transparency with white, repeat gray, and scale 16-bit values by `white`.

    Args:
        image: Image of any mode except 32-bit floating point.
        white: Value of 16-bit images that maps to white.

    Raises:
        ValueError: If the image has floating-point values, whose white value is unknown, or integers outside 0 to
            65,535.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > FULL_WHITE:
            raise ValueError(
                f"values must be from 0 to {FULL_WHITE:,}, got {values.min():,} to {values.max():,}; scale them, and "
                "save the image with 8 or 16 bits"
            )
        is_deep = _is_deep(image.mode, int(values.max(initial=0)), white)
        gray = eight_bits(values, white) if is_deep else values.astype(np.uint8)
        if "transparency" in image.info:
            gray = np.where(values == image.info["transparency"], np.uint8(255), gray)
        return Image.fromarray(gray).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colors = image.convert("RGBA")
        background = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(background, colors).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values are not supported; save the image with 8 or 16 bits")
    return image.convert("RGB")


THRESHOLD = 128
"""Minimum foreground value in a mask in a lossy format."""
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF")
"""Formats whose masks are thresholded, because compression may change their labels."""
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def read_label_map(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a mask: palette indices, gray values, or black and white.

    JPEG, WebP and AVIF can change labels, so their masks are thresholded at `THRESHOLD` to 0 and 1.

    Args:
        path: JPEG, WebP or AVIF file, or a file in another format that is palette, gray, black-and-white, or RGB with
            equal channels.

    Returns:
        Labels `[height, width]`, uint16, and whether the mask was thresholded.

    Raises:
        ValueError: If the file is not an image or is truncated, or if it has colors, or labels outside 0 to 65,535.
    """
    try:
        check_regular(path)
        with open_image(path) as image:
            image.load()
            is_lossy = image.format in LOSSY_FORMATS
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright.convert("L")) >= THRESHOLD if is_lossy else _labels(upright)
            if values.min(initial=0) < 0 or values.max(initial=0) > FULL_WHITE:
                raise ValueError(f"labels must be from 0 to {FULL_WHITE}, got {values.min()} to {values.max()}")
            return values.astype(np.uint16), is_lossy
    except DECODING_ERRORS as error:
        raise ValueError(f"'{path}' is not a readable mask: {error or type(error).__name__}") from error


def _labels(image: Image.Image) -> np.ndarray:
    """Return the labels of a lossless mask; raise ValueError if the image has colors or a mode without labels."""
    if image.mode in _LABEL_MODES:
        return np.asarray(image)
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode in ("RGB", "RGBA"):
        colors = np.asarray(image)[..., :3]
        if (colors == colors[..., :1]).all():
            return colors[..., 0]
        raise ValueError("the mask has colors; save it as a palette or gray PNG whose values are the labels")
    raise ValueError(f"mode {image.mode} has no labels; save the mask as a palette or gray PNG")
