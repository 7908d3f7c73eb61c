"""Run protocols, which determine how an epoch is selected and how images are preprocessed.

The protocol `official` follows the scripts that SNELLA's authors released.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from snella_app.data.datasets import ImageDataset
from snella_app.data.load import DataSplits
from snella_app.records.run import renamed

_OFFICIAL_INTERVAL = 10
"""Number of epochs between evaluations, and of final epochs that are all evaluated, in the authors' scripts."""
_OFFICIAL_CROP_PCT = 0.875
"""Fraction of the shorter side of the resized image that the center crop keeps."""


@dataclass(frozen=True)
class RunProtocol:
    """Protocol that selects the saved epoch and adjusts the preprocessing.

    Attributes:
        name: Value of `--protocol`.
        selected_on: Split for epoch selection, or None to save the last epoch.
        summary: Human-readable, one line.
        warning: Caveat about the results. Empty if there is none.
    """

    name: str
    selected_on: Literal["val", "test"] | None
    summary: str
    warning: str = ""

    def selection_part(self, splits: DataSplits) -> ImageDataset | None:
        """Return the split for epoch selection, or None if the protocol uses none or the data lacks it."""
        return {"val": splits.val, "test": splits.test, None: None}[self.selected_on]

    def is_measured(self, epoch: int, epochs: int) -> bool:
        """Return whether the model is evaluated for epoch selection after an epoch, counted from 1.

        On validation images, every epoch is evaluated. On test images, as in the authors' scripts, epoch 1, every tenth
        epoch after it, and each of the last ten epochs are evaluated.
        """
        if self.selected_on != "test":
            return self.selected_on is not None
        return (epoch - 1) % _OFFICIAL_INTERVAL == 0 or epoch > epochs - _OFFICIAL_INTERVAL

    def selection_score(
        self, row: Mapping[str, Any], task_score: Callable[[Mapping[str, Any]], tuple[float, float]]
    ) -> tuple[float, float]:
        """Return the selection score of an epoch, which is (0, 0) without a selection split.

        Epochs that were not evaluated score negative infinity.

        Args:
            row: Row of the history. Rows with `is_denser`, whose updates have more entries than the target budget
                allows, are treated as not evaluated.
            task_score: `Task.selection_score`.
        """
        if self.selected_on is None:
            return 0.0, 0.0  # ties select the last epoch
        if f"{self.selected_on}_loss" not in row or row.get("is_denser"):
            return -math.inf, -math.inf
        return task_score(self.with_val_prefix(row))

    def best_metric(self, monitor: str) -> str:
        """Return the monitored metric's name in the history, or `last_epoch` if no epoch is selected."""
        return "last_epoch" if self.selected_on is None else f"{self.selected_on}_{monitor}"

    def with_split_prefix(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of the history with the prefix `val_` replaced by the name of the evaluated split."""
        return renamed(row, "val_", f"{self.selected_on}_")

    def with_val_prefix(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Invert `with_split_prefix`."""
        return renamed(row, f"{self.selected_on}_", "val_")

    def data_config(self, config: Mapping[str, Any], *, is_resized_whole: bool) -> dict[str, Any]:
        """Adjust the model's data config to this protocol and the data.

        Args:
            config: Data config of the model: `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation` and others.
            is_resized_whole: If True, images are resized without a center crop.
        """
        adjusted = dict(config)
        if is_resized_whole:
            adjusted |= {"crop_mode": "squash", "crop_pct": 1.0}
        if self.name == "official":
            adjusted |= {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
            if is_resized_whole:
                adjusted |= {"interpolation": "bicubic"}
            else:
                adjusted |= {"crop_mode": "center", "crop_pct": _OFFICIAL_CROP_PCT, "interpolation": "bilinear"}
        return adjusted


PROTOCOLS: dict[str, RunProtocol] = {
    protocol.name: protocol
    for protocol in (
        RunProtocol(
            "standard", "val", "the model is selected on validation images; the test images are evaluated once"
        ),
        RunProtocol(
            "final",
            None,
            "training on training and validation images; the last epoch is saved and evaluated once on the test images",
        ),
        RunProtocol(
            "official",
            "test",
            "as in the authors' scripts: the best epoch is selected on the test images, and inputs are "
            "normalized with ImageNet's mean and standard deviation",
            "the epoch was selected on the test images; test accuracy is optimistic and not comparable with runs that "
            "select on validation images",
        ),
    )
}
"""Protocols by value of `--protocol`."""
