"""Results of a run on one split, one class a task: what they hold and how a report shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from snella.analysis.formats import count_text, percent_text
from snella.analysis.json_fields import Fields

__all__ = ["ClassScores", "MaskScores", "Scores", "read_scores"]


@dataclass(frozen=True)
class Scores:
    """Result of a classifier on one split; `confusion[i][j]` counts images of class i taken for class j."""

    accuracy: float
    balanced_accuracy: float
    loss: float
    confusion: list[list[int]]

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
    pixels: int
    dice: float
    iou: float
    dice_pooled: float
    iou_pooled: float


@dataclass(frozen=True)
class MaskScores:
    """Result of a segmentation on one split: by image, pooled, and GPS's variant without false positives."""

    dice: float
    iou: float
    dice_pooled: float
    iou_pooled: float
    dice_gps: float
    iou_gps: float
    loss: float
    count: int
    classes: list[ClassScores] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {
            "dice": self.dice,
            "iou": self.iou,
            "dice_pooled": self.dice_pooled,
            "iou_pooled": self.iou_pooled,
            "images": self.count,
        }

    def text(self) -> str:
        """The numbers in a few words."""
        return (
            f"Dice {percent_text(self.dice)}, IoU {percent_text(self.iou)} by image; "
            f"{percent_text(self.dice_pooled)}, {percent_text(self.iou_pooled)} pooled"
        )

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        gps = f"GPS's variant, without false positives: {percent_text(self.dice_gps)}, {percent_text(self.iou_gps)}"
        return [
            (f"{split} Dice", percent_text(self.dice), f"mean of {count_text(self.count)} images"),
            (f"{split} IoU", percent_text(self.iou), "mean of the images"),
            (
                f"{split} Dice, IoU pooled",
                f"{percent_text(self.dice_pooled)}, {percent_text(self.iou_pooled)}",
                f"all pixels together. {gps}",
            ),
        ]


def read_scores(fields: Fields, split: str) -> Scores | MaskScores | None:
    """Result on a split, None where it was not measured.

    Raises:
        ValueError: A field is missing or of another kind, or a confusion matrix is not square.
    """
    if fields.values.get(split) is None:
        return None
    scores = fields.inner(split)
    return _mask_scores(scores) if "dice" in scores.values else _class_scores(fields, scores, split)


def _class_scores(fields: Fields, scores: Fields, split: str) -> Scores:
    """Result of a classifier."""
    confusion = scores.get("confusion", list, [])
    if any(not isinstance(row, list) or len(row) != len(confusion) for row in confusion):
        raise ValueError(
            f"{fields.file}: '{split}.confusion' must be square, got {len(confusion)} rows of lengths "
            f"{sorted({len(row) if isinstance(row, list) else 0 for row in confusion})}; run `snella evaluate` again"
        )
    return Scores(
        accuracy=scores.get("accuracy", float),
        balanced_accuracy=scores.get("balanced_accuracy", float, math.nan),
        loss=scores.get("loss", float, math.nan),
        confusion=[[int(count) for count in row] for row in confusion],
    )


def _mask_scores(scores: Fields) -> MaskScores:
    """Result of a segmentation."""
    numbers = ("dice", "iou", "dice_pooled", "iou_pooled")
    return MaskScores(
        **{name: scores.get(name, float) for name in numbers},
        dice_gps=scores.get("dice_gps_foreground_only", float, math.nan),
        iou_gps=scores.get("iou_gps_foreground_only", float, math.nan),
        loss=scores.get("loss", float, math.nan),
        count=scores.get("images", int, 0),
        classes=[
            ClassScores(
                name=row.get("name", str),
                pixels=row.get("pixels", int, 0),
                **{name: row.get(name, float, math.nan) for name in numbers},
            )
            for row in scores.each("per_class", [])
        ],
    )
