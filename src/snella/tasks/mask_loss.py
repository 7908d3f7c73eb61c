"""How far soft masks are from covering the true ones."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["MaskLoss", "overlap_losses"]

MaskLoss = Literal["dice", "iou", "none"]
_SMOOTHING = 1.0  # a pixel: keeps classes that an image lacks from dividing by zero, and punishes finding them


def overlap_losses(scores: Tensor, labels: Tensor, kind: MaskLoss) -> Tensor:
    """One minus the soft overlap of each image, mean over the foreground classes.

    dice: 1 - (2 Σ p t + 1) / (Σ p + Σ t + 1)        iou: 1 - (Σ p t + 1) / (Σ p + Σ t - Σ p t + 1)

    Sums over the pixels of an image; `p` is the softmax of the scores, `t` is 1 on pixels of the class.

    Args:
        scores: `[batch, classes, height, width]`, floating point; class 0 is the background.
        labels: `[batch, height, width]`, int64.
        kind: dice, iou, or none for zeros.

    Returns:
        `[batch]`.
    """
    if kind == "none":
        return scores.new_zeros(len(scores))
    p = scores.softmax(1)[:, 1:].flatten(2)  # [batch, classes - 1, pixels]
    t = F.one_hot(labels.flatten(1), scores.shape[1])[..., 1:].transpose(1, 2).to(p.dtype)
    both, sums = (p * t).sum(-1), p.sum(-1) + t.sum(-1)
    overlap = (
        (2 * both + _SMOOTHING) / (sums + _SMOOTHING)
        if kind == "dice"
        else (both + _SMOOTHING) / (sums - both + _SMOOTHING)
    )
    return (1 - overlap).mean(-1)
