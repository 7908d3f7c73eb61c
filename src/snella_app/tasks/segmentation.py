"""Semantic segmentation: batches of (image, mask), cross entropy and overlap, Dice and IoU."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn

from snella_app.backbones import DECODER, create_segmenter
from snella_app.data import ImageDataset, MaskDataset
from snella_app.records import MaskPrediction, MaskPredictions
from snella_app.report.examples import ImageSource, overlay_panels, read_mask, write_mask
from snella_app.tasks import predictions as image_outputs
from snella_app.tasks.losses import full_precision, weighted_mean
from snella_app.tasks.task import ResultTable, Task


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
        "dice": _mean(np.asarray(_by_image(dice))),
        "iou": _mean(np.asarray(_by_image(iou))),
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


def _number(values: np.ndarray | np.floating[Any]) -> float | None:
    """Mean of what has a value, None where nothing has."""
    known = np.atleast_1d(values)[~np.isnan(np.atleast_1d(values))]
    return float(known.mean()) if len(known) else None


def _mean(values: np.ndarray) -> float:
    """Mean of what has a value; 1 where nothing was there and nothing was found."""
    mean = _number(values)
    return 1.0 if mean is None else mean


def _by_image(values: np.ndarray) -> list[float]:
    """Mean over the classes of each image, NaN where no class is in it."""
    means = [_number(row) for row in values]
    return [math.nan if mean is None else mean for mean in means]


_LIMIT = 12


def mask_file(index: int) -> str:
    """Where the predicted mask of an image lies in the run's folder."""
    return f"masks/{index:05}.png"


def choose_indices(dice: Sequence[float], limit: int = _LIMIT) -> list[int]:
    """Choose images to show: half of them the worst, the others evenly spread over the rest, from bad to good.

    Args:
        dice: Of each image; NaN for those without anything to find, which come last.
        limit: How many.
    """
    order = np.argsort(np.asarray(dice, dtype=float), kind="stable").tolist()  # NaN comes last
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


_SCORES = ("dice", "iou", "dice_pooled", "iou_pooled", "pixel_accuracy")


@dataclass(frozen=True)
class SegmentationTask(Task):
    """Loss and metrics for one label per pixel; class 0 is the background.

    Everything is measured at the size of the model's input, to which masks are brought by the nearest pixel.

    Args:
        classes: Names by label.
        label_smoothing: Share of the cross entropy's target spread over all classes.
        mask_loss: Overlap that is added to the cross entropy.
        monitor: Metric that the epoch is chosen by.
    """

    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    mask_loss: MaskLoss = "dice"
    monitor: str = "dice"

    name: ClassVar[str] = "segmentation"
    head: ClassVar[str | None] = DECODER
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
        """Check all values at once."""
        errors = []
        if len(self.classes) < 2:
            errors.append(f"classes must be at least 2, the background among them, got {list(self.classes)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            errors.append(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.mask_loss not in get_args(MaskLoss):
            errors.append(f"mask_loss must be one of {', '.join(get_args(MaskLoss))}, got {self.mask_loss!r}")
        if errors:
            raise ValueError("; ".join(errors))

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
                "for labeled images leave --task out"
            )

    def collate(self, items: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Make a batch of transformed items.

        Args:
            items: Images `[channels, height, width]` of one size, with their masks `[height, width]`.

        Returns:
            `images` `[batch, channels, height, width]` and `labels` `[batch, height, width]` (int64).
        """
        images, masks = zip(*items, strict=True)
        return {"images": torch.stack(list(images)), "labels": torch.stack(list(masks)).long()}

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the images of cross entropy and overlap loss, times the image's weight.

        Args:
            outputs: Class scores, `[batch, classes, height, width]`.
            labels: `[batch, height, width]`.
            weights: `[batch]`; None for ones.

        Returns:
            0-dim.
        """
        return weighted_mean(self._losses(outputs, labels, self.label_smoothing), weights)

    def reduce(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Counts of pixels and the loss of each image, `[batch, classes² + 1]`, float64; and zeros."""
        counts = pixel_counts(outputs.argmax(1), labels, len(self.classes)).flatten(1)
        losses = self._losses(outputs, labels, 0.0)
        return torch.cat([counts.double(), losses[:, None].double()], 1), labels.new_zeros(len(labels))

    def metrics(self, reduced: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Dice and IoU as `pooled_scores` has them, and the loss without smoothing.

        Args:
            reduced: Rows of `reduce`.
            labels: Zeros of `reduce`.

        Returns:
            Plain values; the losses' mean is `loss`.

        Raises:
            ValueError: No images.
        """
        rows = np.asarray(reduced)
        if len(rows) == 0:
            raise ValueError("there must be at least 1 image to measure on, got 0")
        return {**pooled_scores(self._counts(rows), list(self.classes)), "loss": float(rows[:, -1].mean())}

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """The rows of `reduce`, as they are."""
        return torch.as_tensor(np.asarray(reduced))

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> MaskPredictions:
        """Dice and IoU of each image, mean over its classes; where its predicted mask lies, for the report's ones."""
        scores = image_scores(self._counts(sample_outputs.numpy()))
        dice, iou = map(_by_image, scores)
        files = [mask_file(index) for index in range(len(dataset.names))]
        items = [
            MaskPrediction(index, name, dice[index], iou[index], file if (folder / file).is_file() else None)
            for index, (name, file) in enumerate(zip(dataset.names, files, strict=True))
        ]
        return MaskPredictions(split, items=items)

    def save_examples(self, model: nn.Module, dataset: ImageDataset, sample_outputs: Tensor, folder: Path) -> None:
        """Write the predicted masks of some images: the worst ones, and others evenly spread."""
        dice = _by_image(image_scores(self._counts(sample_outputs.numpy()))[0])
        write_masks(model, dataset, choose_indices(dice), folder)

    def report_images(self, dataset: ImageDataset, folder: Path) -> ImageSource:
        """Image, true mask and predicted mask side by side, where the mask was kept."""
        if not isinstance(dataset, MaskDataset):
            raise TypeError(f"dataset must have masks, got {type(dataset).__name__}")
        return overlay_source(dataset, folder)

    def remap_labels(self, label: Tensor, numbers: Sequence[int]) -> Tensor:
        """A mask with other class numbers."""
        return torch.tensor(numbers)[label]

    def result_table(self, scores: Mapping[str, Any], classes: Sequence[str]) -> ResultTable:
        """Dice and IoU of each class."""
        columns = ["class", "pixels", "Dice by image", "IoU by image", "Dice pooled", "IoU pooled"]
        keys = ("dice", "iou", "dice_pooled", "iou_pooled")
        rows = [
            [row["name"], f"{row['pixels']:,}", *("–" if row[key] is None else f"{row[key]:.4f}" for key in keys)]
            for row in scores["per_class"]
        ]
        return ResultTable("each class", columns, rows)

    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Class probabilities of each pixel, `[batch, classes, height, width]`."""
        return full_precision(outputs).softmax(dim=1)

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Scores of the mean of the probabilities, `[images, classes, height, width]`."""
        logs = torch.stack([scores.float().log_softmax(1) for scores in outputs])
        return logs.logsumexp(0) - math.log(len(outputs))

    def image_predictions(
        self, classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[image_outputs.MaskPrediction]:
        """The mask of each image, at its own size."""
        return image_outputs.mask_predictions(classes, paths, images, outputs)

    check_output = staticmethod(image_outputs.check_mask_output)
    write_predictions = staticmethod(image_outputs.write_mask_predictions)

    def _losses(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """The loss of each image, `[batch]`."""
        scores = full_precision(outputs)
        pixels = F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)
        return pixels.flatten(1).mean(1) + overlap_losses(scores, labels, self.mask_loss)

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Counts of pixels out of the rows of `reduce`, `[images, classes, classes]`."""
        return rows[:, :-1].reshape(len(rows), len(self.classes), len(self.classes))
