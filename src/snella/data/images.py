"""One image: read, brought to 8-bit RGB; and whole lists of files checked for broken ones."""

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["DECODING_ERRORS", "IMAGE_SUFFIXES", "broken_images", "read_image", "to_rgb"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
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
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:
        raise ValueError(f"'{path}' is not a readable image: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB: transparency on white, grey three times, 16-bit values by their high byte.

    Args:
        image: Image of any mode but 32-bit floating point.

    Raises:
        ValueError: Floating-point values: which of them is white is not known.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
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
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        reasons = threads.map(_why_broken, paths)
        return {index: reason for index, reason in enumerate(reasons) if reason is not None}


def _why_broken(path: Path) -> str | None:
    """The reason why a file cannot be decoded, None where it can."""
    try:
        read_image(path)
    except ValueError as error:
        return str(error).partition("image: ")[2]
    return None
