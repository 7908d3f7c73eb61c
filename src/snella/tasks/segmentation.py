"""Semantic segmentation: batches of (image, mask), cross entropy and overlap, Dice and IoU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from snella.analysis.examples import ImageSource
from snella.backbones import DECODER, create_segmenter
from snella.data import ImageDataset, MaskDataset
from snella.tasks.example_masks import choose_indices, mask_file, overlay_source, write_masks
from snella.tasks.mask_loss import MaskLoss, overlap_losses
from snella.tasks.mask_scores import image_scores, pixel_counts, pooled_scores
from snella.tasks.task import ResultTable

__all__ = ["SegmentationTask"]

_SCORES = ("dice", "iou", "dice_pooled", "iou_pooled", "pixel_accuracy")


@dataclass(frozen=True)
class SegmentationTask:
    """Loss and metrics for one label per pixel; class 0 is the background.

    Everything is measured at the size of the model's input, to which masks are brought by the nearest pixel.

    Args:
        classes: Names by label.
        label_smoothing: Share of the cross entropy's target spread over all classes.
        mask_loss: Overlap that is added to the cross entropy.
    """

    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    mask_loss: MaskLoss = "dice"

    name: ClassVar[str] = "segmentation"
    head: ClassVar[str | None] = DECODER
    best_metric: ClassVar[str] = "val_dice"
    settings: ClassVar[tuple[str, ...]] = ("mask_loss",)

    def __post_init__(self) -> None:
        """Check all values at once."""
        faults = []
        if len(self.classes) < 2:
            faults.append(f"classes must be at least 2, the background among them, got {list(self.classes)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            faults.append(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.mask_loss not in get_args(MaskLoss):
            faults.append(f"mask_loss must be one of {', '.join(get_args(MaskLoss))}, got {self.mask_loss!r}")
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def create(
        cls,
        classes: Sequence[str],
        *,
        label_smoothing: float = 0.0,
        mask_loss: MaskLoss | None = None,
        **others: Any,
    ) -> "SegmentationTask":
        """Make the task for some classes."""
        return cls(tuple(classes), label_smoothing, mask_loss or "dice")

    @staticmethod
    def build_model(name: str, **options: Any) -> nn.Module:
        """A backbone with a decoder for `num_classes`; arguments as for `create_segmenter`."""
        return create_segmenter(name, **options)

    def check_data(self, dataset: ImageDataset, spec: str) -> None:
        """Refuse images without masks.

        Raises:
            ValueError: They have none.
        """
        if not isinstance(dataset, MaskDataset):
            raise ValueError(
                f"data must be images with masks for task segmentation, e.g. masks:DIR, got {spec!r}; "
                "for labelled images leave --task out"
            )

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Make a batch of transformed items.

        Args:
            items: Images `[channels, height, width]` of one size, with their masks `[height, width]`.

        Returns:
            `images` `[batch, channels, height, width]` and `labels` `[batch, height, width]` (int64).
        """
        images, masks = zip(*items, strict=True)
        return {"images": torch.stack(list(images)), "labels": torch.stack(list(masks)).long()}

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean over the images of cross entropy and overlap loss.

        Args:
            outputs: Class scores, `[batch, classes, height, width]`.
            labels: `[batch, height, width]`.

        Returns:
            0-dim.
        """
        return self._losses(outputs, labels, self.label_smoothing).mean()

    def keep(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Counts of pixels and the loss of each image, `[batch, classes² + 1]`, float64; and zeros."""
        counts = pixel_counts(outputs.argmax(1), labels, len(self.classes)).flatten(1)
        losses = self._losses(outputs, labels, 0.0)
        return torch.cat([counts.double(), losses[:, None].double()], 1), labels.new_zeros(len(labels))

    def metrics(self, kept: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Dice and IoU as `pooled_scores` has them, and the loss without smoothing.

        Args:
            kept: Rows of `keep`.
            labels: Zeros of `keep`.

        Returns:
            Plain values; the losses' mean is `loss`.

        Raises:
            ValueError: No images.
        """
        rows = np.asarray(kept)
        if len(rows) == 0:
            raise ValueError("there must be at least 1 image to measure on, got 0")
        return {**pooled_scores(self._counts(rows), list(self.classes)), "loss": float(rows[:, -1].mean())}

    def verdicts(self, kept: ArrayLike) -> Tensor:
        """The rows of `keep`."""
        return torch.as_tensor(np.asarray(kept))

    def items(self, dataset: ImageDataset, verdicts: Tensor, folder: Path) -> list[dict[str, Any]]:
        """Dice and IoU of each image, mean over its classes; where its predicted mask lies, for the report's ones."""
        dice, iou = (_by_image(values) for values in image_scores(self._counts(verdicts.numpy())))
        return [
            {
                "index": index,
                "name": name,
                "dice": dice[index],
                "iou": iou[index],
                "mask": mask_file(index) if (folder / mask_file(index)).is_file() else None,
            }
            for index, name in enumerate(dataset.names)
        ]

    def keep_examples(self, model: nn.Module, dataset: ImageDataset, verdicts: Tensor, folder: Path) -> None:
        """Write the predicted masks of some images: the worst ones, and others evenly spread."""
        dice = _by_image(image_scores(self._counts(verdicts.numpy()))[0])
        write_masks(model, dataset, choose_indices(dice), folder)

    def pictures(self, dataset: ImageDataset, folder: Path) -> ImageSource:
        """Image, true mask and predicted mask side by side, where the mask was kept."""
        if not isinstance(dataset, MaskDataset):
            raise TypeError(f"dataset must have masks, got {type(dataset).__name__}")
        return overlay_source(dataset, folder)

    def renumbered(self, label: Tensor, numbers: Sequence[int]) -> Tensor:
        """A mask with other class numbers."""
        return torch.tensor(numbers)[label]

    def epoch_row(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """Dice, IoU and pixel accuracy."""
        return {f"val_{name}": scores[name] for name in _SCORES}

    def rank(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Higher mean Dice of the validation images first, then lower validation loss."""
        return row["val_dice"], -row["val_loss"]

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """Dice and IoU, by image."""
        return f"Dice {row['val_dice']:.4f}  IoU {row['val_iou']:.4f}"

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """Dice and IoU by image."""
        text = "" if test is None else f", test Dice {test['dice']:.4f} (IoU {test['iou']:.4f})"
        return f"validation Dice {val['dice']:.4f} (IoU {val['iou']:.4f}){text}"

    def result_text(self, scores: Mapping[str, Any]) -> str:
        """Dice and IoU by image and pooled, GPS's variant, and the loss."""
        return (
            f"Dice {scores['dice']:.4f}, IoU {scores['iou']:.4f} (by image); "
            f"{scores['dice_pooled']:.4f}, {scores['iou_pooled']:.4f} (pooled); "
            f"{scores['dice_gps_foreground_only']:.4f}, {scores['iou_gps_foreground_only']:.4f} "
            f"(GPS's variant, without false positives); loss {scores['loss']:.4f}"
        )

    def result_table(self, scores: Mapping[str, Any], classes: Sequence[str]) -> ResultTable:
        """Dice and IoU of each class."""
        columns = ["class", "pixels", "Dice by image", "IoU by image", "Dice pooled", "IoU pooled"]
        keys = ("dice", "iou", "dice_pooled", "iou_pooled")
        rows = [
            [row["name"], f"{row['pixels']:,}", *("–" if row[key] is None else f"{row[key]:.4f}" for key in keys)]
            for row in scores["per_class"]
        ]
        return ResultTable("each class", columns, rows)

    def _losses(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """The loss of each image, `[batch]`."""
        scores = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        pixels = F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)
        return pixels.flatten(1).mean(1) + overlap_losses(scores, labels, self.mask_loss)

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Counts of pixels out of the rows of `keep`, `[images, classes, classes]`."""
        return rows[:, :-1].reshape(len(rows), len(self.classes), len(self.classes))


def _by_image(values: np.ndarray) -> list[float | None]:
    """Mean over the classes of each image, None where no class is in it."""
    return [None if np.isnan(row).all() else float(row[~np.isnan(row)].mean()) for row in values]
