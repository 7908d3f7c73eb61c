"""The cells of a comparison: one training each, with a place of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snella.comparison.entries import DataEntry, MethodEntry, config_of, folder_name
from snella.comparison.experiment import Experiment
from snella.comparison.search import Candidate
from snella.methods import parse_method
from snella.runs import TrainConfig

TEST_SEED = 0
"""Decides the test images of every cell: other seeds draw other training and validation images, never a test image, so
that the rates, chosen with one seed, have not seen the test images of another."""
HEAD_ONLY = ("linear", "mlp")
"""Families that train nothing but the head: its rate is their learning rate."""


@dataclass(frozen=True)
class Cell:
    """One training: a method on a task with a seed, either to choose rates or for the table.

    Args:
        data: The task.
        method: The contender.
        seed: Of training and validation images, initial values, order, augmentation.
        candidate: Rates.
        is_final: Whether this is a row of the table, which alone measures the test images.
        search: How its rates were chosen, for the row of a final cell.
    """

    data: DataEntry
    method: MethodEntry
    seed: int
    candidate: Candidate
    is_final: bool
    search: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Path of the cell's folder below `cells/`; the same for a final cell whatever rates were chosen."""
        place = f"{folder_name(self.data.name)}/{folder_name(self.method.name)}"
        if self.is_final:
            return f"{place}/seed-{self.seed}"
        return f"{place}/trials/{self.candidate.label}_seed-{self.seed}"

    @property
    def title(self) -> str:
        """The cell for people."""
        what = "final" if self.is_final else f"trial {self.candidate.label.replace('_', ' ')}"
        return f"{self.data.name} · {self.method.name} · {what} · seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Where its run lies."""
        return root / "cells" / self.name

    def config(self, experiment: Experiment, out: Path | str) -> TrainConfig:
        """The settings of its run."""
        rates = rates_of(experiment, self.data, self.method, self.candidate)
        settings = dict(experiment.settings)
        if settings.get("protocol") == "final":  # rates are chosen on images that the final run then learns from
            if self.is_final:
                settings.pop("val_size", None)
            else:
                settings["protocol"] = "standard"
        return config_of(
            self.method,
            self.data,
            settings,
            backbone=experiment.backbone,
            out=str(out),
            seed=self.seed,
            test_seed=TEST_SEED,
            **rates,
        )


def rates_of(experiment: Experiment, data: DataEntry, method: MethodEntry, candidate: Candidate) -> Mapping[str, Any]:
    """`lr`, `head_lr` and `weight_decay` of a candidate, from the method's own defaults.

    The factor multiplies the learning rate of what the method adds or changes; the head's rate stays, except where
    nothing but the head is trained.
    """
    base = config_of(method, data, experiment.settings, backbone=experiment.backbone, out="-")
    lr = base.lr or 0.0
    head_lr = lr if base.head_lr is None else base.head_lr
    is_head_only = parse_method(method.method)[0] in HEAD_ONLY
    decay = base.weight_decay or 0.0
    return {
        "lr": _rounded(lr * candidate.lr_factor),
        "head_lr": _rounded(head_lr * candidate.lr_factor) if is_head_only else head_lr,
        "weight_decay": decay if candidate.weight_decay is None else candidate.weight_decay,
    }


def _rounded(rate: float) -> float:
    """Six digits: 0.009 for three times 0.003."""
    return float(f"{rate:.6g}")
