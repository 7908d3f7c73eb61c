"""One mask file: read as whole-number labels, one a pixel."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from snella.data.images import DECODING_ERRORS

__all__ = ["LOSSY_FORMATS", "THRESHOLD", "read_label_map"]

THRESHOLD = 128
"""Least value that is foreground in a mask of a lossy format."""
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
_GREYS = ("L", "I", "I;16", "I;16B", "I;16L")


def read_label_map(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a mask: palette indices, grey values, or a picture of black and white.

    A lossy format (JPEG) does not keep labels, so that only two can be told apart: such a mask is cut at `THRESHOLD`
    and becomes 0 and 1.

    Args:
        path: PNG and the like in palette, grey or black-and-white mode, RGB where the three channels are equal; or
            JPEG.

    Returns:
        `[height, width]`, uint16; and whether it was cut at the threshold.

    Raises:
        ValueError: The file is no image, is truncated, or holds colours instead of labels.
    """
    try:
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
    if image.mode == "P" or image.mode == "1" or image.mode in _GREYS:
        return np.asarray(image)
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode in ("RGB", "RGBA"):
        colours = np.asarray(image)[..., :3]
        if (colours == colours[..., :1]).all():
            return colours[..., 0]
        raise ValueError("it holds colours, save it as a palette or grey PNG whose values are the labels")
    raise ValueError(f"mode {image.mode} has no labels, save it as a palette or grey PNG")
