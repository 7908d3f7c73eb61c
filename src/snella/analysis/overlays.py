"""Masks as pictures: label maps in a palette, and colours laid over an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from snella.analysis.figure_style import COLOURS, WARM, write_whole

__all__ = ["mask_colours", "overlay", "overlay_panels", "read_mask", "write_mask"]

_OPACITY = 0.45
_TINTS = (0.0, 0.5, 0.75)
_GAP = 4
_LONGEST = 260


def mask_colours(count: int) -> np.ndarray:
    """Colours of `count` labels, `[count, 3]` uint8; black for the background, the same ones every time."""
    inks = np.array([to_rgb(ink) for ink in (WARM, *(colour for colour in COLOURS if colour != WARM))])
    labels = np.arange(max(count - 1, 0))
    lighter = np.array(_TINTS)[labels // len(inks) % len(_TINTS), None]  # where the inks are used up, tints of them
    colours = inks[labels % len(inks)] * (1 - lighter) + lighter
    return (np.concatenate([np.zeros((1, 3)), colours])[:count] * 255).round().astype(np.uint8)


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Write labels `[height, width]` (uint8) as a palette PNG whose indices are the labels, whole or not at all."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(mask_colours(256).reshape(-1).tolist())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    write_whole(path, out.getvalue())


def read_mask(path: Path) -> Image.Image:
    """The palette PNG that `write_mask` wrote; its array holds the labels."""
    with Image.open(path) as image:
        image.load()
        return image


def overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Lay the colours of a mask over an image, with outlines; the background stays as it is.

    Args:
        image: RGB.
        labels: `[height, width]`, uint8; brought to the image's size by the nearest pixel.
    """
    sized = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    pixels, colours = np.asarray(image.convert("RGB")).astype(float), mask_colours(256)[sized].astype(float)
    opacity = np.where(_outline(sized), 1.0, _OPACITY) * (sized > 0)
    mixed = pixels + opacity[..., None] * (colours - pixels)
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
    """Pixels whose right or lower neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge
