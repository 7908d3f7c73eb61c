"""Example images of a report: selection and encoding."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from snella._files import write_bytes
from snella.records import Prediction

_OPACITY = 0.45
_TINTS = (0.0, 0.5, 0.75)
_GAP = 4
_LONGEST = 260


def mask_colors(count: int) -> np.ndarray:
    """Colors of `count` labels, `[count, 3]` uint8; black for the background, the same ones every time."""
    from matplotlib.colors import to_rgb

    from snella.report.style import COLORS, WARM  # matplotlib, which a classification does not wait for

    inks = np.array([to_rgb(ink) for ink in (WARM, *(color for color in COLORS if color != WARM))])
    labels = np.arange(max(count - 1, 0))
    lighter = np.array(_TINTS)[labels // len(inks) % len(_TINTS), None]  # where the inks are used up, tints of them
    colors = inks[labels % len(inks)] * (1 - lighter) + lighter
    return (np.concatenate([np.zeros((1, 3)), colors])[:count] * 255).round().astype(np.uint8)


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Write labels `[height, width]` (uint8) as a palette PNG whose indices are the labels atomically."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(mask_colors(256).reshape(-1).tolist())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    write_bytes(path, out.getvalue())


def read_mask(path: Path) -> Image.Image:
    """The palette PNG that `write_mask` wrote; its array holds the labels."""
    with Image.open(path) as image:
        image.load()
        return image


def overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Lay the colors of a mask over an image, with outlines; the background stays as it is.

    Args:
        image: RGB.
        labels: `[height, width]`, uint8; brought to the image's size by the nearest pixel.
    """
    sized = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    pixels, colors = np.asarray(image.convert("RGB")).astype(float), mask_colors(256)[sized].astype(float)
    opacity = np.where(_outline(sized), 1.0, _OPACITY) * (sized > 0)
    mixed = pixels + opacity[..., None] * (colors - pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay_panels(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """The image, and beside it the image under each of the masks; small pictures are enlarged, large ones shrunk."""
    scale = _LONGEST / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [shown, *(overlay(shown, mask) for mask in masks)]
    canvas = Image.new("RGBA", (len(panels) * (size[0] + _GAP) - _GAP, size[1]), (0, 0, 0, 0))
    for place, panel in enumerate(panels):
        canvas.paste(panel, (place * (size[0] + _GAP), 0))
    return canvas


def _outline(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbor has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


ImageSource = Mapping[int, Image.Image | None] | Callable[[int], Image.Image | None]
"""Index of an image in its split → the picture, or None where there is none to show."""


@dataclass(frozen=True)
class Example:
    """One image with its prediction; without a picture, `problem` says why."""

    prediction: Prediction
    uri: str | None
    width: int
    height: int
    problem: str


def choose_examples(items: Sequence[Prediction], limit: int = 24) -> tuple[list[Prediction], list[Prediction]]:
    """Choose up to `limit` predictions: (wrong ones, right ones), half of each where there are as many.

    The wrong ones are those with the highest probability for the wrong class, the right ones are evenly spread over
    the split.
    """
    wrong = sorted((item for item in items if not item.is_right), key=lambda item: -item.probability)
    right = [item for item in items if item.is_right]
    n_wrong = min(len(wrong), max(limit // 2, limit - len(right)))
    n_right = min(len(right), limit - n_wrong)
    return wrong[:n_wrong], [right[i * len(right) // n_right] for i in range(n_right)]


def load_example(prediction: Prediction, images: ImageSource | None) -> Example:
    """Fetch the picture of a prediction; one that cannot be read is reported in its place, not raised."""
    return Example(prediction, *load_picture(prediction.index, images))


def load_picture(index: int, images: ImageSource | None, longest: int = 176) -> tuple[str | None, int, int, str]:
    """Fetch a picture: its URI, width and height, and, where there is none, the reason."""
    problem = "no picture"
    image = None
    try:
        if images is not None:
            image = images(index) if callable(images) else images.get(index)
        if image is not None:
            return *picture_uri(image, longest), ""
    except OSError as error:
        problem = f"cannot be read: {error}"
    return None, 0, 0, problem


def picture_uri(image: Image.Image, longest: int = 176) -> tuple[str, int, int]:
    """Return a picture as a base64 PNG of at most `longest` pixels a side, with its width and height.

    Small pictures keep their size; the page enlarges them without smoothing.
    """
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii"), image.width, image.height
