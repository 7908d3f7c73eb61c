"""Example images for the report, and mask overlays."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from snella_app.data.images import DECODING_ERRORS, open_image
from snella_app.files import write_png
from snella_app.records.predictions import StoredPrediction

_OPACITY = 0.45
"""Opacity of a mask inside its outline."""
_TINTS = (0.0, 0.5, 0.75)
"""Fraction of white mixed into each version of the palette, the original first. After that, colors repeat."""
_GAP = 4
"""Space between the panels of `overlay_panels`, in pixels."""
_MAX_SIDE = 260
"""Longer side of a panel, in pixels."""
ImageLoader = Callable[[int], Image.Image | None]
"""Maps the index of an image in its split to the image, or to None if it is unavailable."""


def mask_colors(count: int) -> np.ndarray:
    """Return a fixed color for each label, `[count, 3]` uint8. Label 0, the background, is black."""
    from matplotlib.colors import to_rgb

    from snella_app.report.style import COLORS, WARM  # lazy: imports matplotlib

    warm_first = [WARM, *(color for color in COLORS if color != WARM)]
    palette = np.array([to_rgb(color) for color in warm_first])
    labels = np.arange(max(count - 1, 0))
    tint = np.array(_TINTS)[labels // len(palette) % len(_TINTS), None]
    colors = palette[labels % len(palette)] * (1 - tint) + tint
    return (np.concatenate([np.zeros((1, 3)), colors])[:count] * 255).round().astype(np.uint8)


def mask_image(labels: np.ndarray) -> Image.Image:
    """Convert labels `[height, width]` (uint8) to a palette image: the palette index of a pixel is its label."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(mask_colors(256).reshape(-1).tolist())
    return image


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Atomically write labels `[height, width]` (uint8) as a palette PNG, see `mask_image`."""
    write_png(path, mask_image(labels), optimize=True)


def read_mask(path: Path) -> Image.Image:
    """Read a palette PNG written by `write_mask`. The array of the image contains the labels."""
    with open_image(path) as image:
        image.load()
        return image


def overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Overlay the colors of a mask on an image, with opaque outlines. The background is unchanged.

    Args:
        image: Image, converted to RGB.
        labels: `[height, width]`, uint8, resized to the size of the image with nearest-neighbor interpolation.
    """
    sized = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    padded = np.pad(sized, 1, mode="edge")
    above, below = padded[:-2, 1:-1], padded[2:, 1:-1]
    left, right = padded[1:-1, :-2], padded[1:-1, 2:]
    is_edge = np.any([sized != neighbor for neighbor in (above, below, left, right)], axis=0)
    pixels = np.asarray(image.convert("RGB")).astype(float)
    colors = mask_colors(256)[sized].astype(float)
    opacity = np.where(is_edge, 1.0, _OPACITY) * (sized > 0)
    mixed = pixels + opacity[..., None] * (colors - pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay_panels(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """Return the image and one overlay per mask, side by side on a transparent canvas."""
    scale = _MAX_SIDE / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [shown, *(overlay(shown, mask) for mask in masks)]
    width, height = size
    step = width + _GAP
    canvas = Image.new("RGBA", (len(panels) * step - _GAP, height), (0, 0, 0, 0))
    for column, panel in enumerate(panels):
        canvas.paste(panel, (column * step, 0))
    return canvas


@dataclass(frozen=True)
class EmbeddedImage:
    """Image embedded in a page as a data URI. If there is no image, `problem` states the reason."""

    uri: str | None = None
    width: int = 0
    height: int = 0
    problem: str = ""


def choose_examples(
    items: Sequence[StoredPrediction], limit: int = 24
) -> tuple[list[StoredPrediction], list[StoredPrediction]]:
    """Choose up to `limit` predictions, `(wrong, correct)`, half wrong and half correct if possible.

    The wrong predictions are the most confident ones; the correct ones are evenly spaced among all that are correct.
    """
    wrong = sorted((item for item in items if not item.is_correct), key=lambda item: -item.probability)
    correct = [item for item in items if item.is_correct]
    n_wrong = min(len(wrong), max(limit // 2, limit - len(correct)))
    n_correct = min(len(correct), limit - n_wrong)
    return wrong[:n_wrong], [correct[i * len(correct) // n_correct] for i in range(n_correct)]


def embed_image(index: int, images: ImageLoader | None, max_side: int = 176) -> EmbeddedImage:
    """Load an image by its index and encode it. If it is unavailable or unreadable, `problem` states the reason."""
    try:
        image = None if images is None else images(index)
    except DECODING_ERRORS as error:
        return EmbeddedImage(problem=f"image cannot be read: {error}")
    if image is None:
        return EmbeddedImage(problem="image unavailable")
    return EmbeddedImage(*image_data_uri(image, max_side))


def image_data_uri(image: Image.Image, max_side: int) -> tuple[str, int, int]:
    """Return an image as a PNG data URI of at most `max_side` pixels per side, with its width and height.

    Smaller images keep their size. Except for heat maps, the report enlarges images below 96 px without smoothing.
    """
    has_transparency = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if has_transparency else "RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return png_data_uri(image), image.width, image.height


def png_data_uri(image: Image.Image, *, optimize: bool = True) -> str:
    """Return an image as a PNG data URI of the same mode and size; `optimize` is slow and gives a smaller file."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=optimize)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
