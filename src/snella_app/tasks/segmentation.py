"""Semantic segmentation, trained with cross-entropy plus an overlap loss, and measured by Dice and IoU."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from snella.ops import widest_dtype
from snella_app.backbones.segmenter import DECODER, create_segmenter
from snella_app.console import make_table
from snella_app.data.datasets import ImageDataset
from snella_app.data.options import TargetKind
from snella_app.records.predictions import MaskPredictions, StoredMaskPrediction
from snella_app.report.examples import ImageLoader, overlay_panels, read_mask, write_mask
from snella_app.tasks.predictions import MaskPrediction, check_mask_output, write_mask_predictions
from snella_app.tasks.task import Task, full_precision, paired, weighted_mean


def pixel_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each image by true class (row) and predicted class (column), `[batch, classes, classes]`.

    Both masks are `[batch, height, width]`, int64.
    """
    batch = len(labels)
    size = num_classes**2
    # position of each pixel's entry in the flattened result
    entries = labels * num_classes + predicted + size * torch.arange(batch, device=labels.device)[:, None, None]
    return torch.bincount(entries.reshape(-1), minlength=batch * size).reshape(batch, num_classes, num_classes)


def image_scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute Dice and IoU of each class in each image.

    Dice = 2 TP / (2 TP + FP + FN),  IoU = TP / (TP + FP + FN)

    Args:
        counts: `[images, classes, classes]` from `pixel_counts`.

    Returns:
        Two arrays `[images, classes]`. The scores are NaN if a class is neither present nor predicted.
    """
    hits = np.diagonal(counts, axis1=1, axis2=2).astype(float)
    wrong = counts.sum(1) + counts.sum(2) - 2 * hits
    with np.errstate(invalid="ignore"):
        return 2 * hits / (2 * hits + wrong), hits / (hits + wrong)


def foreground_means(scores: np.ndarray) -> list[float]:
    """Return the mean of each row of `[images, classes]` over the foreground classes.

    NaN scores are skipped. The mean is NaN if all of them are NaN.
    """
    return [_nanmean(row[1:], math.nan) for row in scores]


def pooled_scores(counts: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Compute all scores on a dataset, averaged over the foreground classes that are present or predicted.

    - By image: mean over classes, then over images. Images without any of these classes are excluded. The score is 1
      if no image remains.
    - Pooled: computed over the pixels of all images. `iou_pooled_with_background` averages over all classes.
    - The variant of the fine-tuning method GPS, for comparison with its code: pooled, without background pixels, and
      therefore without false positives on them. For two classes, IoU equals the recall R, and Dice equals 2R / (1 + R).

    Args:
        counts: `[images, classes, classes]` from `pixel_counts`; class 0 is the background.
        classes: Class names by index.
    """
    dice, iou = image_scores(counts)
    total = counts.sum(0)
    pooled_dice, pooled_iou = image_scores(total[None])
    foreground_only = total.copy()
    foreground_only[0] = 0
    gps_dice, gps_iou = image_scores(foreground_only[None])
    per_class: list[dict[str, Any]] = []
    for label, name in enumerate(classes):
        is_foreground = label > 0
        per_class.append(
            {
                "name": name,
                "pixels": int(total[label].sum()),
                "dice": _nanmean(dice[:, label], None) if is_foreground else None,
                "iou": _nanmean(iou[:, label], None) if is_foreground else None,
                "dice_pooled": _nanmean(pooled_dice[:, label], None),
                "iou_pooled": _nanmean(pooled_iou[:, label], None),
            }
        )
    return {
        "dice": _nanmean(np.asarray(foreground_means(dice)), 1.0),
        "iou": _nanmean(np.asarray(foreground_means(iou)), 1.0),
        "dice_pooled": _nanmean(pooled_dice[0, 1:], 1.0),
        "iou_pooled": _nanmean(pooled_iou[0, 1:], 1.0),
        "iou_pooled_with_background": _nanmean(pooled_iou[0], 1.0),
        "dice_gps_foreground_only": _nanmean(gps_dice[0, 1:], 1.0),
        "iou_gps_foreground_only": _nanmean(gps_iou[0, 1:], 1.0),
        "pixel_accuracy": float(np.trace(total) / total.sum()),
        "images": len(counts),
        "per_class": per_class,
        "confusion": total.astype(int).tolist(),
    }


def _nanmean(values: np.ndarray, default: Any) -> Any:
    """Return the mean of the values that are not NaN, or the default if there are none."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else default


_MAX_EXAMPLES = 12
_CLASSES_PER_GROUP = 8
"""Number of classes whose scores are resized at once."""


def choose_indices(dice: Sequence[float]) -> list[int]:
    """Choose example images: half with the lowest Dice, and the others evenly spaced in the ranking of the rest.

    NaN counts as the highest Dice.
    """
    order = np.argsort(np.asarray(dice, dtype=float), kind="stable").tolist()
    worst, rest = order[: _MAX_EXAMPLES // 2], order[_MAX_EXAMPLES // 2 :]
    count = min(len(rest), _MAX_EXAMPLES - len(worst))
    # the middle of each of `count` equal ranges
    return worst + [rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)]


def _mask_file(index: int) -> str:
    """Return the path of an image's predicted mask in the run folder."""
    return f"masks/{index:05}.png"


MaskLoss = Literal["dice", "iou", "none"]
_SMOOTHING = 1.0  # one pixel, which avoids division by zero for absent classes and penalizes predicting them


def overlap_losses(scores: Tensor, labels: Tensor, kind: MaskLoss) -> Tensor:
    """Compute one minus the soft overlap of each image, averaged over foreground classes.

    dice: 1 - (2 Σ p t + 1) / (Σ p + Σ t + 1)        iou: 1 - (Σ p t + 1) / (Σ p + Σ t - Σ p t + 1)

    Sums run over the pixels of an image; `p` is the softmax of the scores, and `t` is 1 on pixels of the class.

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
    t = F.one_hot(labels.flatten(1), scores.shape[1])  # [batch, pixels, classes]
    t = t[..., 1:].transpose(1, 2).to(p.dtype)
    intersection = (p * t).sum(-1)
    sums = p.sum(-1) + t.sum(-1)
    if kind == "dice":
        overlap = (2 * intersection + _SMOOTHING) / (sums + _SMOOTHING)
    else:
        overlap = (intersection + _SMOOTHING) / (sums - intersection + _SMOOTHING)
    return (1 - overlap).mean(-1)


_SCORES = ("dice", "iou", "dice_pooled", "iou_pooled", "pixel_accuracy")


def resized_labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class with the highest bilinearly resized score at each pixel, `[height, width]`, uint8.

    Classes are resized in groups, because the resized scores of all classes may take gigabytes.

    Args:
        scores: `[classes, height, width]` at the model's resolution.
        size: Height and width of the image.
    """
    best = torch.full(size, -math.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for start in range(0, len(scores), _CLASSES_PER_GROUP):
        group = scores[None, start : start + _CLASSES_PER_GROUP]
        values, indices = F.interpolate(group, size, mode="bilinear", align_corners=False)[0].max(0)
        is_higher = values > best  # ties keep the first class, as in argmax
        labels = torch.where(is_higher, (indices + start).to(torch.uint8), labels)
        best = torch.where(is_higher, values, best)
    return labels


@dataclass(frozen=True)
class SegmentationTask(Task):
    """Loss and metrics for one label per pixel; class 0 is the background.

    Metrics use the model's input resolution, to which true masks are resized with nearest-neighbor interpolation.

    Args:
        classes: Class names by label.
        label_smoothing: Label smoothing of the cross-entropy.
        mask_loss: Overlap loss added to the cross-entropy.
        monitor: Metric for epoch selection.
    """

    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    mask_loss: MaskLoss = "dice"
    monitor: str = "dice"

    name: ClassVar[str] = "segmentation"
    head: ClassVar[str | None] = DECODER
    target: ClassVar[TargetKind] = "masks"
    augment: ClassVar[str] = "flip"
    settings: ClassVar[tuple[str, ...]] = ("label_smoothing", "mask_loss")
    monitors: ClassVar[Mapping[str, int]] = {**dict.fromkeys(_SCORES, 1), "loss": -1}
    epoch_format: ClassVar[str] = "Dice {val_dice:.4f}  IoU {val_iou:.4f}"
    val_format: ClassVar[str] = "Dice {dice:.4f} (IoU {iou:.4f})"
    test_format: ClassVar[str] = val_format
    result_format: ClassVar[str] = (
        "Dice {dice:.4f}, IoU {iou:.4f} (by image); {dice_pooled:.4f}, {iou_pooled:.4f} (pooled); "
        "{dice_gps_foreground_only:.4f}, {iou_gps_foreground_only:.4f} (GPS's variant, without false positives); "
        "loss {loss:.4f}"
    )

    def __post_init__(self) -> None:
        """Check the number of classes."""
        if len(self.classes) < 2:
            raise ValueError(f"classes must have at least 2 entries including background, got {list(self.classes)}")

    def collate(self, items: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Collate images and masks; `labels` is `[batch, height, width]`, int64."""
        images, masks = zip(*items, strict=True)
        return {"images": torch.stack(list(images)), "labels": torch.stack(list(masks)).long()}

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Compute the weighted mean of cross-entropy plus overlap loss.

        `outputs` are class scores `[batch, classes, height, width]`, and `labels` is `[batch, height, width]`.
        """
        return weighted_mean(self._losses(outputs, labels, self.label_smoothing), weights)

    def reduce(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixel counts and the loss of each image, `[batch, classes² + 1]`, and zeros.

        The zeros replace the labels, which the counts already reflect. The counts are float64, or float32 on devices
        without float64.
        """
        counts = pixel_counts(outputs.argmax(1), labels, len(self.classes)).flatten(1)
        losses = self._losses(outputs, labels, 0.0)
        dtype = widest_dtype(outputs.device.type)
        rows = torch.cat([counts.to(dtype), losses[:, None].to(dtype)], 1)
        return rows, labels.new_zeros(len(labels))

    def metrics(self, reduced: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Compute the scores of `pooled_scores`, and the loss without label smoothing, from the rows of `reduce`."""
        rows = paired(reduced, labels)[0].double().numpy()
        return {**pooled_scores(self._counts(rows), list(self.classes)), "loss": float(rows[:, -1].mean())}

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Return the rows from `reduce` unchanged."""
        return torch.as_tensor(np.asarray(reduced))

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> MaskPredictions:
        """Return Dice and IoU of each image, averaged over foreground classes, and its stored mask, if any."""
        dice, iou = map(foreground_means, image_scores(self._counts(sample_outputs.numpy())))
        items: list[StoredMaskPrediction] = []
        for index, name in enumerate(dataset.names):
            file = _mask_file(index)
            mask = file if (folder / file).is_file() else None
            items.append(StoredMaskPrediction(index, name, dice[index], iou[index], mask))
        return MaskPredictions(split, items=items)

    @torch.inference_mode()
    def save_examples(self, model: nn.Module, dataset: ImageDataset, sample_outputs: Tensor, folder: Path) -> None:
        """Predict the masks of the images selected by `choose_indices`, and store them in place of all stored masks."""
        target = (folder / _mask_file(0)).parent
        target.mkdir(exist_ok=True)
        for old in target.glob("*.png"):
            old.unlink()
        device = next(model.parameters()).device
        model.eval()
        dice, _ = image_scores(self._counts(sample_outputs.numpy()))
        for index in choose_indices(foreground_means(dice)):
            image, _ = dataset[index]
            labels = model(image[None].to(device)).argmax(1)[0].to(torch.uint8).cpu().numpy()
            write_mask(labels, folder / _mask_file(index))

    def report_images(self, dataset: Any, folder: Path) -> ImageLoader:
        """Return a loader of panels (image, true mask, predicted mask) for images with a stored mask."""

        def load_panels(index: int) -> Image.Image | None:
            path = folder / _mask_file(index)
            if not path.is_file():
                return None
            return overlay_panels(dataset.image(index), [dataset.mask(index), np.asarray(read_mask(path))])

        return load_panels

    def remap_labels(self, label: Tensor, numbers: Sequence[int]) -> Tensor:
        """Map the class indices of a mask to those of the run."""
        return torch.tensor(numbers)[label]

    def result_table(self, scores: Mapping[str, Any]) -> Table:
        """Return Dice and IoU of each class."""
        columns = ["class", "pixels", "Dice by image", "IoU by image", "Dice pooled", "IoU pooled"]
        keys = ("dice", "iou", "dice_pooled", "iou_pooled")
        rows: list[list[str]] = []
        for row in scores["per_class"]:
            values = ["–" if row[key] is None else f"{row[key]:.4f}" for key in keys]
            rows.append([row["name"], f"{row['pixels']:,}", *values])
        return make_table(columns, rows, title="classes")

    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Return class probabilities of each pixel, `[batch, classes, height, width]`."""
        return full_precision(outputs).softmax(dim=1)

    def image_predictions(
        self, paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[MaskPrediction]:
        """Return the mask of each image at the image's size; scores are resized before the argmax."""
        masks = []
        for path, image, scores in zip(paths, images, outputs.float(), strict=True):
            labels = resized_labels(scores, (image.height, image.width))
            masks.append(MaskPrediction(path, labels.cpu().numpy(), list(self.classes)))
        return masks

    def decoding_comment(self, outputs: str) -> str:
        """Return a comment with code that computes the label of each pixel, at the model's resolution."""
        return f"# {outputs}[0].argmax(0)"

    build_model = staticmethod(create_segmenter)
    check_output = staticmethod(check_mask_output)
    write_predictions = staticmethod(write_mask_predictions)

    def _losses(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Compute the loss of each image, `[batch]`."""
        scores = full_precision(outputs)
        pixels = F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)
        return pixels.flatten(1).mean(1) + overlap_losses(scores, labels, self.mask_loss)

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Extract pixel counts from the rows of `reduce`, `[images, classes, classes]`."""
        return rows[:, :-1].reshape(len(rows), len(self.classes), len(self.classes))
