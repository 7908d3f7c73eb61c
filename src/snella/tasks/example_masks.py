"""Predicted masks of a few validation images, kept in the run's folder for its report."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from snella.analysis.examples import ImageSource
from snella.analysis.overlays import overlay_panels, read_mask, write_mask
from snella.data import ImageDataset, MaskDataset

__all__ = ["choose_indices", "mask_file", "overlay_source", "write_masks"]

_LIMIT = 12


def mask_file(index: int) -> str:
    """Where the predicted mask of an image lies in the run's folder."""
    return f"masks/{index:05}.png"


def choose_indices(dice: Sequence[float | None], limit: int = _LIMIT) -> list[int]:
    """Choose images to show: half of them the worst, the others evenly spread over the rest, from bad to good.

    Args:
        dice: Of each image; None for those without anything to find, which come last.
        limit: How many.
    """
    order = sorted(range(len(dice)), key=lambda index: (dice[index] is None, dice[index] or 0.0, index))
    worst, rest = order[: limit // 2], order[limit // 2 :]
    count = min(len(rest), limit - len(worst))
    return worst + [rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)]


@torch.inference_mode()
def write_masks(model: nn.Module, dataset: ImageDataset, indices: Sequence[int], folder: Path) -> None:
    """Predict the masks of some images again and write them as label maps, in place of those of before.

    Args:
        model: Class scores from images.
        dataset: Transformed items.
        indices: Which images.
        folder: Of the run.
    """
    target = (folder / mask_file(0)).parent
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    device = next(model.parameters()).device
    model.eval()
    for index in indices:
        image, _ = dataset[index]
        labels = model(image[None].to(device)).argmax(1)[0].to(torch.uint8).cpu().numpy()
        write_mask(labels, folder / mask_file(index))


def overlay_source(dataset: MaskDataset, folder: Path) -> ImageSource:
    """Panels of image, true and predicted mask by index; None where no mask was kept."""

    def picture(index: int) -> Image.Image | None:
        path = folder / mask_file(index)
        if not path.is_file():
            return None
        return overlay_panels(dataset.image(index), [dataset.mask(index), np.asarray(read_mask(path))])

    return picture
