"""Which images a report shows, and how they get into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from snella.analysis.run_files import Prediction

__all__ = ["Example", "ImageSource", "choose_examples", "load_example", "load_picture", "picture_uri"]

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
