"""Predictions on one split of a run: `predictions.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from snella_app.records.record import OPTIONAL, Float, Record
from snella_app.text import split_text


@dataclass(frozen=True)
class SplitPredictions(Record):
    """Base class of predictions on one split: `predictions.json`."""

    file: ClassVar[str] = "predictions.json"

    split: str = "val"

    @property
    def split_name(self) -> str:
        """Human-readable name of the split."""
        return split_text(self.split)


@dataclass(frozen=True)
class StoredPrediction:
    """Class prediction for one image."""

    index: int
    name: str
    label: int
    probabilities: list[Float]
    rank: int | None = field(default=None, metadata=OPTIONAL)
    group: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def predicted(self) -> int:
        """Predicted class: the predicted rank of ordered classes, or else the class with the highest probability."""
        if self.rank is not None:
            return self.rank
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """Probability of the predicted class."""
        return self.probabilities[self.predicted]

    @property
    def is_correct(self) -> bool:
        """True if the predicted class is the label."""
        return self.predicted == self.label


MAX_PREDICTIONS = 5_000
"""Maximum size of a split whose predictions are stored. Those of a larger split could take hundreds of megabytes."""


@dataclass(frozen=True)
class Predictions(SplitPredictions):
    """Class predictions on one split."""

    items: list[StoredPrediction] = field(kw_only=True)

    def with_temperature(self, temperature: float) -> Self:
        """Return these predictions with temperature-scaled probabilities, `p ** (1 / T)`, normalized to sum to 1."""

        def scaled(item: StoredPrediction) -> StoredPrediction:
            powers = [p ** (1 / temperature) for p in item.probabilities]
            total = sum(powers)
            return replace(item, probabilities=[power / total for power in powers])

        return self if temperature == 1.0 else replace(self, items=[scaled(item) for item in self.items])

    def for_classes(self, count: int) -> Self:
        """Return these predictions after checking that each has `count` probabilities.

        Raises:
            ValueError: If a prediction has a different number of probabilities, or an invalid label or rank.
        """
        for i, item in enumerate(self.items):
            if len(item.probabilities) != count or not (0 <= item.label < count and 0 <= (item.rank or 0) < count):
                raise ValueError(
                    f"{self.file}: items[{i}] has {len(item.probabilities)} probabilities, label {item.label} and rank "
                    f"{item.rank}, but run.json lists {count} classes; train again with `--overwrite`"
                )
        return self


@dataclass(frozen=True)
class StoredLabelSetPrediction:
    """True labels of one image, as indices, and the predicted probabilities of all labels."""

    index: int
    name: str
    labels: list[int]
    probabilities: list[Float]


@dataclass(frozen=True)
class LabelSetPredictions(SplitPredictions):
    """Multi-label predictions on one split, with the threshold of each label."""

    thresholds: list[Float] = field(kw_only=True)
    items: list[StoredLabelSetPrediction] = field(kw_only=True)


@dataclass(frozen=True)
class StoredNumberPrediction:
    """True and predicted regression targets of one image, in their units."""

    index: int
    name: str
    values: list[Float]
    predicted: list[Float]


@dataclass(frozen=True)
class NumberPredictions(SplitPredictions):
    """Regression predictions on one split."""

    items: list[StoredNumberPrediction] = field(kw_only=True)


@dataclass(frozen=True)
class StoredMaskPrediction:
    """Segmentation scores of one image. They are NaN if no foreground class is present or predicted.

    `mask` is the path of the predicted mask in the run folder, or None if the mask is not stored.
    """

    index: int
    name: str = ""
    dice: Float = math.nan
    iou: Float = math.nan
    mask: str | None = None


@dataclass(frozen=True)
class MaskPredictions(SplitPredictions):
    """Segmentation results on one split."""

    items: list[StoredMaskPrediction] = field(kw_only=True)
