"""Which images choose the best epoch, how images are prepared for it, and how results say so."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from snella.data import DataSplits, ImageDataset

_OFFICIAL_INTERVAL = 10
_OFFICIAL_CROP_PCT = 0.875


@dataclass(frozen=True)
class RunProtocol:
    """How the epoch that is kept is chosen.

    Attributes:
        name: As `--protocol` takes it.
        selected_on: Part of the data that the best epoch is chosen on; None keeps the last epoch.
        summary: One line for people.
        warning: What results must not be mistaken for; empty where there is nothing to warn of.
    """

    name: str
    selected_on: Literal["val", "test"] | None
    summary: str
    warning: str = ""

    def selection_part(self, splits: DataSplits) -> ImageDataset | None:
        """The images that the best epoch is chosen on."""
        return {"val": splits.val, "test": splits.test, None: None}[self.selected_on]

    def is_measured(self, epoch: int, epochs: int) -> bool:
        """Whether the model is measured after an epoch, counted from 1.

        The authors' scripts measure after the first epoch, every tenth from there on, and each of the last ten.
        """
        if self.selected_on != "test":
            return self.selected_on is not None
        return (epoch - 1) % _OFFICIAL_INTERVAL == 0 or epoch > epochs - _OFFICIAL_INTERVAL

    def rank(
        self, row: Mapping[str, Any], of_task: Callable[[Mapping[str, Any]], tuple[float, float]]
    ) -> tuple[float, float]:
        """What epochs are compared by: the task's rank, the lowest where an epoch was not measured.

        Args:
            row: Of the history; with `is_denser` it holds more weights than were asked for, and counts as not measured.
            of_task: `Task.rank`.
        """
        if self.selected_on is None:
            return 0.0, 0.0  # all alike, so that the last is kept
        if f"{self.selected_on}_loss" not in row or row.get("is_denser"):
            return -math.inf, -math.inf
        return of_task(self.unnamed(row))

    def best_metric(self, of_task: str) -> str:
        """The entry of the history that epochs are compared by; `last_epoch` where nothing is compared."""
        return "last_epoch" if self.selected_on is None else _renamed(of_task, "val_", f"{self.selected_on}_")

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the history in which `val_…` is called after the part that was measured."""
        return {_renamed(key, "val_", f"{self.selected_on}_"): value for key, value in row.items()}

    def unnamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row that `named` renamed, with `val_…` again."""
        return {_renamed(key, f"{self.selected_on}_", "val_"): value for key, value in row.items()}

    def data_config(self, config: Mapping[str, Any], *, is_resized_whole: bool) -> dict[str, Any]:
        """The model's data configuration as this protocol and the data want it.

        Args:
            config: The model's own: `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation` and others.
            is_resized_whole: Whether the benchmark resizes whole images instead of cutting their center out.
        """
        changed = dict(config)
        if is_resized_whole:
            changed |= {"crop_mode": "squash", "crop_pct": 1.0}
        if self.name == "official":
            changed |= {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
            if is_resized_whole:
                changed |= {"interpolation": "bicubic"}
            else:
                changed |= {"crop_mode": "center", "crop_pct": _OFFICIAL_CROP_PCT, "interpolation": "bilinear"}
        return changed


PROTOCOLS: dict[str, RunProtocol] = {
    protocol.name: protocol
    for protocol in (
        RunProtocol("standard", "val", "the best epoch is chosen on validation, the test images are measured once"),
        RunProtocol(
            "final",
            None,
            "training and validation images are learnt from, the last epoch is kept, the test images are measured once",
        ),
        RunProtocol(
            "official",
            "test",
            "as the authors' scripts do: the best epoch is chosen on the test images, with ImageNet's mean and "
            "standard deviation",
            "the test images chose the epoch, so that this test accuracy is too good, and not comparable with others",
        ),
    )
}
"""By the name that `--protocol` takes."""


def protocol_of(name: str) -> RunProtocol:
    """The protocol of a name.

    Raises:
        ValueError: There is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


def _renamed(key: str, old: str, new: str) -> str:
    """`key` with another beginning, if it has the old one."""
    return new + key.removeprefix(old) if key.startswith(old) else key


__all__ = [
    "PROTOCOLS",
    "RunProtocol",
    "protocol_of",
]
