"""Dice and IoU from counts of pixels: by image, pooled, and as one published code computes them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["image_scores", "pixel_counts", "pooled_scores"]


def pixel_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count, for each image, the pixels of each true class (row) by predicted class (column).

    Args:
        predicted: `[batch, height, width]`, int64.
        labels: The same shape.
        num_classes: Classes.

    Returns:
        `[batch, classes, classes]`, int64.
    """
    batch, size = len(labels), num_classes**2
    cells = labels * num_classes + predicted + size * torch.arange(batch, device=labels.device)[:, None, None]
    return torch.bincount(cells.reshape(-1), minlength=batch * size).reshape(batch, num_classes, num_classes)


def image_scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and IoU of each foreground class in each image.

    Dice = 2 TP / (2 TP + FP + FN),  IoU = TP / (TP + FP + FN)

    Args:
        counts: `[images, classes, classes]` from `pixel_counts`; class 0 is the background.

    Returns:
        Two arrays `[images, classes - 1]`; NaN where a class is neither in the image nor predicted.
    """
    hits, wrong = _hits_and_errors(counts)
    with np.errstate(invalid="ignore"):
        return (2 * hits / (2 * hits + wrong))[:, 1:], (hits / (hits + wrong))[:, 1:]


def pooled_scores(counts: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """All results on a data set, means over the foreground classes.

    By image: the mean over the images of the mean over the classes that are in the image or predicted there; images
    with neither are left out, and 1 is the result where no image is left. Pooled: the pixels of all images together.
    GPS's variant is pooled too, but drops every pixel whose true class is the background before counting, so that false
    positives there never count: for two classes IoU becomes the recall R and Dice 2R / (1 + R).

    Args:
        counts: `[images, classes, classes]` from `pixel_counts`; class 0 is the background.
        classes: Names by number.

    Returns:
        `dice`, `iou` (by image), `dice_pooled`, `iou_pooled`, `iou_pooled_with_background`,
        `dice_gps_foreground_only`, `iou_gps_foreground_only`, `pixel_accuracy`, `images`, `per_class`, and `confusion`
        (pixels; rows are true classes).
    """
    dice, iou = image_scores(counts)
    total = counts.sum(0)
    pooled_dice, pooled_iou = (values[0] for values in _pooled(total))
    inside = total.copy()
    inside[0] = 0
    gps_dice, gps_iou = (values[0] for values in _pooled(inside))
    return {
        "dice": _mean_of_means(dice),
        "iou": _mean_of_means(iou),
        "dice_pooled": _mean(pooled_dice[1:]),
        "iou_pooled": _mean(pooled_iou[1:]),
        "iou_pooled_with_background": _mean(pooled_iou),
        "dice_gps_foreground_only": _mean(gps_dice[1:]),
        "iou_gps_foreground_only": _mean(gps_iou[1:]),
        "pixel_accuracy": float(np.trace(total) / total.sum()),
        "images": len(counts),
        "per_class": [
            {
                "name": name,
                "pixels": int(total[label].sum()),
                "dice": _number(dice[:, label - 1]) if label else None,
                "iou": _number(iou[:, label - 1]) if label else None,
                "dice_pooled": _number(pooled_dice[label]),
                "iou_pooled": _number(pooled_iou[label]),
            }
            for label, name in enumerate(classes)
        ],
        "confusion": total.astype(int).tolist(),
    }


def _pooled(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and IoU of every class, `[1, classes]`, of counts `[classes, classes]`."""
    hits, wrong = _hits_and_errors(total[None])
    with np.errstate(invalid="ignore"):
        return 2 * hits / (2 * hits + wrong), hits / (hits + wrong)


def _hits_and_errors(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TP and FP + FN of each class, `[images, classes]`."""
    hits = np.diagonal(counts, axis1=1, axis2=2).astype(float)
    return hits, counts.sum(1) + counts.sum(2) - 2 * hits


def _mean_of_means(values: np.ndarray) -> float:
    """Mean over images of the mean over the classes that have a value."""
    by_image = [float(row[~np.isnan(row)].mean()) for row in values if not np.isnan(row).all()]
    return float(np.mean(by_image)) if by_image else 1.0


def _mean(values: np.ndarray) -> float:
    """Mean of what has a value; 1 where nothing was there and nothing was found."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 1.0


def _number(values: np.ndarray | np.floating[Any]) -> float | None:
    """Mean of what has a value, None where nothing has."""
    known = np.atleast_1d(values)[~np.isnan(np.atleast_1d(values))]
    return float(known.mean()) if len(known) else None
