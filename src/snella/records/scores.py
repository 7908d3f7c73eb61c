"""Results of a task on one split: one dataclass a task, which says them in short, in words and in rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snella._text import count_text, percent_text
from snella.records.record import OPTIONAL, record_from


@dataclass(frozen=True)
class Scores:
    """Result of a classifier on one split; `confusion[i][j]` counts images of class i taken for class j."""

    accuracy: float
    balanced_accuracy: float = math.nan
    loss: float = math.nan
    confusion: list[list[int]] = field(default_factory=list)
    macro_f1: float = field(default=math.nan, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Refuse a table that is not square."""
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError(
                f"confusion must be square, got {len(self.confusion)} rows of lengths "
                f"{sorted({len(row) for row in self.confusion})}"
            )

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion))

    @property
    def standard_error(self) -> float:
        """One standard error of the accuracy, sqrt(a (1 - a) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count) if self.count else math.nan

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy, "images": self.count}

    def text(self) -> str:
        """The numbers in a few words."""
        return f"accuracy {percent_text(self.accuracy)}, balanced {percent_text(self.balanced_accuracy)}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        error = f"± {100 * self.standard_error:.1f} (one standard error), " if self.count else ""
        images = f"{error}{count_text(self.count)} images" if self.count else ""
        return [
            (f"{split} accuracy", percent_text(self.accuracy), images),
            (f"{split} balanced accuracy", percent_text(self.balanced_accuracy), "mean of the classes"),
        ]


@dataclass(frozen=True)
class ClassScores:
    """Result of a segmentation for one class; NaN where the class was neither there nor found."""

    name: str
    pixels: int = 0
    dice: float = math.nan
    iou: float = math.nan
    dice_pooled: float = math.nan
    iou_pooled: float = math.nan


@dataclass(frozen=True)
class MaskScores:
    """Result of a segmentation on one split: by image, pooled, and GPS's variant without false positives."""

    dice: float
    iou: float
    dice_pooled: float
    iou_pooled: float
    iou_pooled_with_background: float = math.nan
    dice_gps_foreground_only: float = math.nan
    iou_gps_foreground_only: float = math.nan
    pixel_accuracy: float = math.nan
    images: int = 0
    per_class: list[ClassScores] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    loss: float = math.nan

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {
            "dice": self.dice,
            "iou": self.iou,
            "dice_pooled": self.dice_pooled,
            "iou_pooled": self.iou_pooled,
            "images": self.images,
        }

    def text(self) -> str:
        """The numbers in a few words."""
        return (
            f"Dice {percent_text(self.dice)}, IoU {percent_text(self.iou)} by image; "
            f"{percent_text(self.dice_pooled)}, {percent_text(self.iou_pooled)} pooled"
        )

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        gps = f"{percent_text(self.dice_gps_foreground_only)}, {percent_text(self.iou_gps_foreground_only)}"
        return [
            (f"{split} Dice", percent_text(self.dice), f"mean of {count_text(self.images)} images"),
            (f"{split} IoU", percent_text(self.iou), "mean of the images"),
            (
                f"{split} Dice, IoU pooled",
                f"{percent_text(self.dice_pooled)}, {percent_text(self.iou_pooled)}",
                f"all pixels together. GPS's variant, without false positives: {gps}",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class OrdinalScores(Scores):
    """Result of a task with ordered classes on one split: `mae` in ranks, `kappa` with quadratic weights."""

    mae: float
    kappa: float

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"mae": self.mae, "kappa": self.kappa, **super().values()}

    def text(self) -> str:
        """The numbers in a few words."""
        return f"MAE {self.mae:.3f} ranks, kappa {self.kappa:.3f}, {super().text()}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        return [
            (f"{split} MAE", f"{self.mae:.3f}", f"ranks, mean of {count_text(self.count)} images"),
            (f"{split} kappa", f"{self.kappa:.3f}", "quadratic weights; 1 is perfect, 0 is chance"),
            *super().rows(split),
        ]


@dataclass(frozen=True)
class LabelScores:
    """Result of one label of several; NaN where no image has it."""

    name: str
    support: int = 0
    average_precision: float = math.nan
    f1: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    threshold: float = 0.5


@dataclass(frozen=True)
class LabelSetScores:
    """Result of a task with several labels an image on one split; `map` is the mean of average precisions."""

    map: float
    macro_f1: float
    micro_f1: float = math.nan
    subset_accuracy: float = math.nan
    images: int = 0
    loss: float = math.nan
    per_class: list[LabelScores] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"map": self.map, "macro_f1": self.macro_f1, "micro_f1": self.micro_f1, "images": self.images}

    def text(self) -> str:
        """The numbers in a few words."""
        f1 = f"F1 {percent_text(self.macro_f1)} macro, {percent_text(self.micro_f1)} micro"
        return f"mAP {percent_text(self.map)}, {f1}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        return [
            (f"{split} mAP", percent_text(self.map), f"mean of the labels, {count_text(self.images)} images"),
            (
                f"{split} F1",
                percent_text(self.macro_f1),
                f"mean of the labels; all together {percent_text(self.micro_f1)}",
            ),
            (f"{split} all labels right", percent_text(self.subset_accuracy), "share of the images"),
        ]


@dataclass(frozen=True)
class NumberScores:
    """Result of one number of a regression, in its own unit; `baseline_mae` is that of the training images' median."""

    name: str
    mae: float
    rmse: float = math.nan
    r2: float = math.nan
    mean: float = math.nan
    baseline_mae: float = math.nan
    baseline_rmse: float = math.nan


@dataclass(frozen=True)
class RegressionScores:
    """Result of a regression on one split; means over its numbers."""

    mae: float
    rmse: float
    r2: float = math.nan
    images: int = 0
    loss: float = math.nan
    per_target: list[NumberScores] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"mae": self.mae, "rmse": self.rmse, "r2": self.r2, "images": self.images}

    def text(self) -> str:
        """The numbers in a few words."""
        return f"MAE {self.mae:.4g}, RMSE {self.rmse:.4g}, R² {self.r2:.3f}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        of_several = f", mean of {len(self.per_target)} numbers" if len(self.per_target) > 1 else ""
        return [
            (f"{split} MAE", f"{self.mae:.4g}", f"mean absolute error, {count_text(self.images)} images{of_several}"),
            (f"{split} RMSE", f"{self.rmse:.4g}", f"root mean squared error{of_several}"),
            (f"{split} R²", f"{self.r2:.3f}", f"share of the variance explained{of_several}"),
        ]


SplitScores = Scores | OrdinalScores | MaskScores | LabelSetScores | RegressionScores
"""Results on one split, by task."""
_SCORES_BY_ENTRY: dict[str, type[SplitScores]] = {
    **{"dice": MaskScores, "map": LabelSetScores, "rmse": RegressionScores, "kappa": OrdinalScores}
}


def scores_from(values: Mapping[str, Any]) -> SplitScores:
    """The record of what `Task.metrics` or `evaluate` returned."""
    kind = next((kind for entry, kind in _SCORES_BY_ENTRY.items() if entry in values), Scores)
    return record_from(kind, values)
