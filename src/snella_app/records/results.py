"""Result records: the scores of a model on one split, by task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator

from snella_app.records.record import OPTIONAL, Float, record_from
from snella_app.text import count_text, decimal_text, margin_text, measure_text, percent_text

_Z = 1.959964  # 97.5% quantile of the normal distribution


class _Result:
    """Base class of the scores of a task. `short` contains the names of the main scores."""

    short: ClassVar[tuple[str, ...]]

    def values(self) -> dict[str, Any]:
        """Return the scores in `short` by name; some may be NaN."""
        return {name: getattr(self, name) for name in self.short}


@dataclass(frozen=True)
class Scores(_Result):
    """Classification scores on one split. `confusion[i][j]` counts images of class i predicted as class j."""

    short: ClassVar[tuple[str, ...]] = ("accuracy", "balanced_accuracy", "images")

    accuracy: Float
    balanced_accuracy: Float = math.nan
    loss: Float = math.nan
    confusion: list[list[int]] = field(default_factory=list)
    macro_f1: Float = field(default=math.nan, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Check that the confusion matrix is square."""
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError(
                f"confusion must be square, got {len(self.confusion)} rows of lengths "
                f"{sorted({len(row) for row in self.confusion})}"
            )

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion))

    @property
    def margin(self) -> float:
        """95% margin of the accuracy: distance to the farther end of the Wilson interval. NaN if there are no images.

        center = (a + z² / 2n) / (1 + z² / n),   half = z sqrt(a (1 - a) / n + z² / 4n²) / (1 + z² / n)
        """
        if not self.images:
            return math.nan
        shrinkage = _Z**2 / self.images
        center = (self.accuracy + shrinkage / 2) / (1 + shrinkage)
        variance = self.accuracy * (1 - self.accuracy) / self.images + (shrinkage / 2 / _Z) ** 2
        return _Z * math.sqrt(max(variance, 0.0)) / (1 + shrinkage) + abs(self.accuracy - center)

    @property
    def balanced_margin(self) -> float:
        """95% margin of the balanced accuracy. NaN if there are no images.

        z / K sqrt(Σ_c p_c (1 - p_c) / (n_c + 2)),   p_c = (correct_c + 1) / (n_c + 2), over the K classes present
        """
        correct_and_size = [(row[i], sum(row)) for i, row in enumerate(self.confusion) if sum(row)]
        if not correct_and_size:
            return math.nan
        variances: list[float] = []
        for correct, size in correct_and_size:
            share = (correct + 1) / (size + 2)
            variances.append(share * (1 - share) / (size + 2))
        return _Z / len(variances) * math.sqrt(sum(variances))

    def text(self) -> str:
        """Format the main scores as one line."""
        return f"accuracy {percent_text(self.accuracy)}, balanced {percent_text(self.balanced_accuracy)}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Return the label, value, and note of each score."""
        images = f"{margin_text(self.margin)}, {count_text(self.images)} images" if self.images else ""
        balanced = ", ".join(filter(None, (margin_text(self.balanced_margin), "mean over classes")))
        return [
            (f"{split} accuracy", percent_text(self.accuracy), images),
            (f"{split} balanced accuracy", percent_text(self.balanced_accuracy), balanced),
        ]


@dataclass(frozen=True)
class ClassScores:
    """Segmentation scores of one class.

    They are NaN if the class is neither present nor predicted. `dice` and `iou` are always NaN for the background.
    """

    name: str
    pixels: int = 0
    dice: Float = math.nan
    iou: Float = math.nan
    dice_pooled: Float = math.nan
    iou_pooled: Float = math.nan


@dataclass(frozen=True)
class MaskScores(_Result):
    """Segmentation scores on one split: means over images, and scores pooled over all pixels.

    Scores with `gps` in their names follow the code of GPS, a fine-tuning method. They ignore false positives.
    """

    short: ClassVar[tuple[str, ...]] = ("dice", "iou", "dice_pooled", "iou_pooled", "images")

    dice: Float
    iou: Float
    dice_pooled: Float
    iou_pooled: Float
    iou_pooled_with_background: Float = math.nan
    dice_gps_foreground_only: Float = math.nan
    iou_gps_foreground_only: Float = math.nan
    pixel_accuracy: Float = math.nan
    images: int = 0
    per_class: list[ClassScores] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    loss: Float = math.nan

    def text(self) -> str:
        """Format the main scores as one line."""
        return (
            f"Dice {percent_text(self.dice)}, IoU {percent_text(self.iou)} by image; "
            f"{percent_text(self.dice_pooled)}, {percent_text(self.iou_pooled)} pooled"
        )

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Return the label, value, and note of each score."""
        gps = f"{percent_text(self.dice_gps_foreground_only)}, {percent_text(self.iou_gps_foreground_only)}"
        return [
            (
                f"{split} Dice",
                percent_text(self.dice),
                f"mean over images with true or predicted foreground, of {count_text(self.images)} images",
            ),
            (f"{split} IoU", percent_text(self.iou), "mean over the same images"),
            (
                f"{split} Dice, IoU pooled",
                f"{percent_text(self.dice_pooled)}, {percent_text(self.iou_pooled)}",
                f"over all pixels. GPS's variant, without false positives: {gps}",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class OrdinalScores(Scores):
    """Ordinal classification scores on one split, including `mae` in ranks and `kappa` with quadratic weights."""

    short: ClassVar[tuple[str, ...]] = ("mae", "kappa", *Scores.short)

    mae: Float
    kappa: Float

    def text(self) -> str:
        """Format the main scores as one line."""
        kappa = decimal_text(self.kappa, 3)
        return f"MAE {decimal_text(self.mae, 3)} ranks, kappa {kappa}, {super().text()}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Return the label, value, and note of each score."""
        return [
            (f"{split} MAE", decimal_text(self.mae, 3), f"ranks, mean over {count_text(self.images)} images"),
            (f"{split} kappa", decimal_text(self.kappa, 3), "quadratic weights; 1 is perfect, 0 is chance"),
            *super().rows(split),
        ]


@dataclass(frozen=True)
class LabelScores:
    """Multi-label scores of one label. Average precision, F1, and recall are NaN if no image has the label."""

    name: str
    support: int = 0
    average_precision: Float = math.nan
    f1: Float = math.nan
    precision: Float = math.nan
    recall: Float = math.nan
    threshold: float = 0.5


@dataclass(frozen=True)
class LabelSetScores(_Result):
    """Multi-label scores on one split. `map` is the mean average precision over labels."""

    short: ClassVar[tuple[str, ...]] = ("map", "macro_f1", "micro_f1", "images")

    map: Float
    macro_f1: Float
    micro_f1: Float = math.nan
    subset_accuracy: Float = math.nan
    images: int = 0
    loss: Float = math.nan
    per_class: list[LabelScores] = field(default_factory=list)

    def text(self) -> str:
        """Format the main scores as one line."""
        f1 = f"F1 {percent_text(self.macro_f1)} macro, {percent_text(self.micro_f1)} micro"
        return f"mAP {percent_text(self.map)}, {f1}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Return the label, value, and note of each score."""
        return [
            (f"{split} mAP", percent_text(self.map), f"mean over labels, {count_text(self.images)} images"),
            (f"{split} F1", percent_text(self.macro_f1), f"macro; micro {percent_text(self.micro_f1)}"),
            (f"{split} subset accuracy", percent_text(self.subset_accuracy), "images with all labels correct"),
        ]


@dataclass(frozen=True)
class NumberScores:
    """Scores of one regression target in its unit.

    The baseline predicts the training median for `baseline_mae`, and the training mean for `baseline_rmse`.
    """

    name: str
    mae: Float
    rmse: Float = math.nan
    r2: Float = math.nan
    mean: Float = math.nan
    baseline_mae: Float = math.nan
    baseline_rmse: Float = math.nan


@dataclass(frozen=True)
class RegressionScores(_Result):
    """Regression scores on one split.

    `mae`, `rmse`, and `r2` are means over targets. Targets can have different units, so `text` and `rows` report
    errors by target and average only R².
    """

    short: ClassVar[tuple[str, ...]] = ("mae", "rmse", "r2", "images")

    mae: Float
    rmse: Float
    r2: Float = math.nan
    images: int = 0
    loss: Float = math.nan
    per_target: list[NumberScores] = field(default_factory=list)

    def text(self) -> str:
        """Format the main scores as one line."""
        r2 = decimal_text(self.r2, 3)
        if len(self.per_target) > 1:
            errors = ", ".join(f"{row.name} {measure_text(row.mae)}" for row in self.per_target)
            return f"R² {r2}, mean over {len(self.per_target)} targets; MAE of {errors}"
        return f"MAE {measure_text(self.mae)}, RMSE {measure_text(self.rmse)}, R² {r2}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Return the label, value, and note of each score."""
        r2 = decimal_text(self.r2, 3)
        images = f"{count_text(self.images)} images"
        if len(self.per_target) > 1:
            explained = f"fraction of variance explained, mean over {len(self.per_target)} targets, {images}"
            errors = [
                (f"{split} MAE of {row.name}", measure_text(row.mae), f"RMSE {measure_text(row.rmse)}")
                for row in self.per_target
            ]
            return [(f"{split} R²", r2, explained), *errors]
        return [
            (f"{split} MAE", measure_text(self.mae), f"mean absolute error, {images}"),
            (f"{split} RMSE", measure_text(self.rmse), "root mean squared error"),
            (f"{split} R²", r2, "fraction of variance explained"),
        ]


_SCORES_BY_ENTRY: dict[str, type[Any]] = {
    "dice": MaskScores,
    "map": LabelSetScores,
    "rmse": RegressionScores,
    "kappa": OrdinalScores,
}
"""Scores class by an entry that only this class has. Scores without any of these entries become `Scores`."""


def scores_from(values: Any) -> SplitScores:
    """Build the scores record from the values that `Task.metrics` or `evaluate` returned.

    Errors are as for `record_from`.
    """
    entries = values if isinstance(values, Mapping) else {}
    kind = next((kind for entry, kind in _SCORES_BY_ENTRY.items() if entry in entries), Scores)
    return record_from(kind, values)


SplitScores = Annotated[
    Scores | OrdinalScores | MaskScores | LabelSetScores | RegressionScores, PlainValidator(scores_from)
]
"""Scores of any task on one split."""
