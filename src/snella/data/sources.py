"""Where images come from: files on disk, or an array in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from snella.data.images import read_image

__all__ = ["ArrayImages", "FileImages", "ImageSource"]

_BUDGET_BYTES = 512 * 2**20


class ImageSource(Protocol):
    """Images by row; picklable, so that loader workers can have it."""

    def load(self, row: int) -> Image.Image:
        """The image as RGB; it may be shared, so it is not changed in place."""


class ArrayImages:
    """Grey images in one array.

    Args:
        pixels: `[n, height, width]`, uint8.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def load(self, row: int) -> Image.Image:
        """The image as RGB."""
        return Image.fromarray(self.pixels[row]).convert("RGB")


class FileImages:
    """Image files; decoded ones are kept in memory up to a budget, so that later epochs do not decode again.

    Args:
        paths: Files.
        budget_bytes: Of all decoded images together, one byte a pixel and channel; loader workers share it out. Images
            beyond it are decoded every time.
    """

    def __init__(self, paths: Sequence[Path], *, budget_bytes: int = _BUDGET_BYTES) -> None:
        self.paths = list(paths)
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
        """Decode one file."""
        return read_image(self.paths[row])

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: a worker starts with none."""
        return {**self.__dict__, "_kept": {}, "kept_bytes": 0}
