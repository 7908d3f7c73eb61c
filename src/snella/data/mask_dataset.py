"""Images with a label for each pixel, as a torch data set whose augmentation moves both alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from snella.data.dataset import ImageDataset
from snella.data.label_maps import read_label_map
from snella.data.sources import FileImages, ImageSource

__all__ = ["ArrayMasks", "FileMasks", "MaskDataset"]


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
        """Labels as the grey values of a picture."""
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
        """Labels as the grey values of a picture."""
        return Image.fromarray(self.labels[row])


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
