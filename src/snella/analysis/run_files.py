"""Typed readers for the JSON files of a run folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from snella._files import check_files
from snella.analysis.json_fields import FORMAT, Fields, read_fields
from snella.analysis.scores import MaskScores, Scores, read_scores

__all__ = [
    "FORMAT",
    "STATUSES",
    "Allocation",
    "AllocationStep",
    "ComparisonRow",
    "EpochRow",
    "MaskPrediction",
    "MaskPredictions",
    "MatrixInfo",
    "Metrics",
    "Prediction",
    "Predictions",
    "RunInfo",
    "Scores",
    "read_allocation",
    "read_comparison",
    "read_if_present",
    "read_mask_predictions",
    "read_metrics",
    "read_predictions",
    "read_run",
]

STATUSES = ("running", "interrupted", "failed", "finished")
R = TypeVar("R")


@dataclass(frozen=True)
class RunInfo:
    """What was trained on what: `run.json`."""

    folder: Path
    status: str
    method: str
    method_options: dict[str, Any]
    backbone: dict[str, Any]
    classes: list[str]
    data: dict[str, Any]
    data_config: dict[str, Any]
    versions: dict[str, Any]
    command: str
    error: str | None
    task: str = "classification"

    @property
    def is_finished(self) -> bool:
        """Whether training came to its end."""
        return self.status == "finished"


@dataclass(frozen=True)
class EpochRow:
    """One epoch of training; NaN where a value was not measured.

    `val_…` is what the best epoch was chosen on: the test images where `Metrics.selected_on` says so.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_balanced_accuracy: float
    lr: float
    budget: int | None
    val_dice: float = math.nan
    val_iou: float = math.nan


@dataclass(frozen=True)
class Metrics:
    """Results and costs: `metrics.json`."""

    best_epoch: int | None
    best_metric: str
    train_s: float
    trainable_parameters: int
    adapted_weights: int | None
    adapter_bytes: int
    peak_rss_mib: float
    history: list[EpochRow]
    val: Scores | MaskScores | None
    test: Scores | MaskScores | None
    protocol: str = "standard"
    selected_on: str | None = "val"
    ema: float | None = None

    @property
    def selection(self) -> str:
        """The images that the best epoch was chosen on, in words."""
        return "test" if self.selected_on == "test" else "validation"


@dataclass(frozen=True)
class MatrixInfo:
    """One adapted matrix; `budget` and `nonzeros` are those of the saved adapter, where training wrote them."""

    name: str
    kind: str
    depth: int | None
    shape: tuple[int, ...]
    size: int
    budget: int | None = None
    nonzeros: int | None = None


@dataclass(frozen=True)
class AllocationStep:
    """One allocation: the budget `b_t` of all matrices at time `t` of `total`, and its division."""

    step: int
    t: int
    total: int
    budget: int
    budgets: dict[str, int]
    importance: dict[str, float]


@dataclass(frozen=True)
class Allocation:
    """How budgets evolved: `allocation.json`."""

    total_weights: int
    target_budget: int
    matrices: list[MatrixInfo]
    history: list[AllocationStep]


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image."""

    index: int
    name: str
    label: int
    probabilities: list[float]

    @property
    def predicted(self) -> int:
        """Class of the highest probability."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """The highest probability."""
        return max(self.probabilities)

    @property
    def is_right(self) -> bool:
        """Whether the predicted class is the label."""
        return self.predicted == self.label


@dataclass(frozen=True)
class Predictions:
    """Predictions on one split: `predictions.json`."""

    split: str
    items: list[Prediction]


@dataclass(frozen=True)
class MaskPrediction:
    """How well one image was segmented; NaN where nothing was to be found. `mask` is a file of the run's folder."""

    index: int
    name: str
    dice: float
    iou: float
    mask: str | None


@dataclass(frozen=True)
class MaskPredictions:
    """Segmented images of one split: `predictions.json`."""

    split: str
    items: list[MaskPrediction]


@dataclass(frozen=True)
class ComparisonRow:
    """One method of a comparison; NaN or None where a value was not measured."""

    method: str
    accuracy: float
    balanced_accuracy: float
    trainable_parameters: int | None
    train_s: float
    adapter_bytes: int | None


def read_run(run: str | Path) -> RunInfo:
    """Read `run.json`, and compare the files that it names with their digests there.

    Raises:
        FileNotFoundError: The folder holds no such file.
        ValueError: The file is damaged or of an unknown format, or another one was altered.
    """
    folder = Path(run)
    fields = read_fields(folder / "run.json")
    check_files(folder, fields.get("files", dict, {}))
    classes = [str(name) for name in fields.get("classes", list)]
    backbone, data = fields.inner("backbone"), fields.inner("data")
    return RunInfo(
        folder=folder,
        status=fields.choice("status", STATUSES),
        method=fields.get("method", str),
        method_options=fields.get("method_options", dict, {}),
        backbone={"weights": None, "img_size": None, **backbone.values, "name": backbone.get("name", str)},
        classes=classes,
        data={
            **data.values,
            "spec": data.get("spec", str),
            "seed": data.get("seed", int, None),
            "description": data.get("description", str, ""),
            "sizes": data.get("sizes", dict, {}),
            "notes": data.get("notes", list, []),
        },
        data_config=fields.get("data_config", dict, {}),
        versions=fields.get("versions", dict, {}),
        command=fields.get("command", str, ""),
        error=fields.get("error", str, None),
        task=fields.get("task", str, "classification"),
    )


def read_metrics(run: str | Path) -> Metrics:
    """Read `metrics.json`; raises as `read_run`."""
    fields = read_fields(Path(run) / "metrics.json")
    selected_on = fields.get("selected_on", str, None if "selected_on" in fields.values else "val")
    return Metrics(
        best_epoch=fields.get("best_epoch", int, None),
        best_metric=fields.get("best_metric", str, "val_accuracy"),
        train_s=fields.get("train_s", float, math.nan),
        trainable_parameters=fields.get("trainable_parameters", int),
        adapted_weights=fields.get("adapted_weights", int, None),
        adapter_bytes=fields.get("adapter_bytes", int, 0),
        peak_rss_mib=fields.get("peak_rss_mib", float, math.nan),
        history=[_epoch_row(row, selected_on or "val") for row in fields.each("history", [])],
        val=read_scores(fields, "val"),
        test=read_scores(fields, "test"),
        protocol=fields.get("protocol", str, "standard"),
        selected_on=selected_on,
        ema=fields.get("ema", float, None),
    )


def read_allocation(run: str | Path) -> Allocation:
    """Read `allocation.json`; raises as `read_run`."""
    fields = read_fields(Path(run) / "allocation.json")
    matrices = [_matrix(row) for row in fields.each("matrices")]
    names = {matrix.name for matrix in matrices}
    history = []
    for row in fields.each("history", []):
        step = _allocation_step(row)
        strangers = sorted((set(step.budgets) | set(step.importance)) - names)
        if strangers or names - set(step.budgets):
            raise ValueError(
                f"{fields.file}: {row.where} does not fit 'matrices': unknown {strangers[:3]}, "
                f"without budget {sorted(names - set(step.budgets))[:3]}; train again with `--overwrite`"
            )
        history.append(step)
    return Allocation(fields.get("total_weights", int), fields.get("target_budget", int), matrices, history)


def read_predictions(run: str | Path, num_classes: int | None = None) -> Predictions:
    """Read `predictions.json`, with one probability for each of `num_classes` classes; raises as `read_run`."""
    fields = read_fields(Path(run) / "predictions.json")
    items = []
    for row in fields.each("items"):
        probabilities = [float(p) for p in row.get("probabilities", list)]
        item = Prediction(row.get("index", int), row.get("name", str, ""), row.get("label", int), probabilities)
        wanted = len(probabilities) if num_classes is None else num_classes
        if not probabilities or len(probabilities) != wanted or not 0 <= item.label < wanted:
            raise ValueError(
                f"{fields.file}: {row.where} has {len(probabilities)} probabilities and label {item.label}, "
                f"but run.json names {wanted} classes; run `snella evaluate` again"
            )
        items.append(item)
    return Predictions(fields.get("split", str, "val"), items)


def read_mask_predictions(run: str | Path) -> MaskPredictions:
    """Read the `predictions.json` of a segmentation; raises as `read_run`."""
    fields = read_fields(Path(run) / "predictions.json")
    return MaskPredictions(
        fields.get("split", str, "val"),
        [
            MaskPrediction(
                row.get("index", int),
                row.get("name", str, ""),
                row.get("dice", float, math.nan),
                row.get("iou", float, math.nan),
                row.get("mask", str, None),
            )
            for row in fields.each("items")
        ],
    )


def read_comparison(run: str | Path) -> list[ComparisonRow]:
    """Read the rows of `comparison.json`; raises as `read_run`."""
    fields = read_fields(Path(run) / "comparison.json")
    return [
        ComparisonRow(
            method=row.get("method", str),
            accuracy=row.get("accuracy", float, math.nan),
            balanced_accuracy=row.get("balanced_accuracy", float, math.nan),
            trainable_parameters=row.get("trainable_parameters", int, None),
            train_s=row.get("train_s", float, math.nan),
            adapter_bytes=row.get("adapter_bytes", int, None),
        )
        for row in fields.each("rows")
    ]


def read_if_present(reader: Callable[[Path], R], run: str | Path, file: str) -> R | None:
    """Return `reader(run)`, or None where the run has no such file."""
    return reader(Path(run)) if (Path(run) / file).exists() else None


def _epoch_row(row: Fields, selected_on: str) -> EpochRow:
    """One entry of the metrics' history, its `val_…` measured on the images that the best epoch was chosen on."""
    names = ("train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "val_dice", "val_iou", "lr")
    values = {name: row.get(name.replace("val_", f"{selected_on}_"), float, math.nan) for name in names}
    return EpochRow(epoch=row.get("epoch", int), budget=row.get("budget", int, None), **values)


def _matrix(row: Fields) -> MatrixInfo:
    """One entry of the allocation's matrices."""
    shape = tuple(int(n) for n in row.get("shape", list))
    return MatrixInfo(
        name=row.get("name", str),
        kind=row.get("kind", str),
        depth=row.get("depth", int, None),
        shape=shape,
        size=row.get("size", int, math.prod(shape)),
        budget=row.get("budget", int, None),
        nonzeros=row.get("nonzeros", int, None),
    )


def _allocation_step(row: Fields) -> AllocationStep:
    """One entry of the allocator's history."""
    return AllocationStep(
        step=row.get("step", int),
        t=row.get("t", int),
        total=row.get("total", int),
        budget=row.get("budget", int),
        budgets=row.numbers("budgets", int),
        importance=row.numbers("importance", float, math.nan),
    )
