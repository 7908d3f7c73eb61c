"""Typed readers for the JSON files of a run folder."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from snella._files import check_files, is_intact
from snella._text import count_text, percent_text

T = TypeVar("T")

FORMAT = 1
"""The run-folder format that this version of snella writes and reads."""

_NAMES: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}
_MISSING = object()


class Fields:
    """The fields of one JSON object, each read with the type it must have.

    Args:
        file: File that the object came from, for messages.
        values: The object itself.
        where: Path of the object inside the file, such as `history[3]`.
    """

    def __init__(self, file: Path, values: Any, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{file}: {where or 'the file'} must hold a mapping, got {_shown(values)}; {_way_out(file)}"
            )
        self.file = file
        self.values = values
        self.where = where

    def get(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        """Return field `key` as a `kind`; a whole number passes as a float.

        Args:
            key: Name of the field.
            kind: `str`, `int`, `float`, `list` or `dict`.
            default: Returned where the field is absent or null; without one, absence is an error.

        Raises:
            ValueError: The field is absent and has no default, or is of another kind.
        """
        value = self.values.get(key)
        if value is None:
            if default is not _MISSING:
                return default
            near = difflib.get_close_matches(key, [str(name) for name in self.values], n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(f"{self.file}: {self._path(key)} is missing{hint}; {_way_out(self.file)}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)  # type: ignore[return-value]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{self.file}: {self._path(key)} must be {_NAMES[kind]}, got {_shown(value)}; {_way_out(self.file)}"
            )
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """Return field `key`, which must be one of `allowed`.

        Raises:
            ValueError: It is none of them.
        """
        value = self.get(key, str)
        if value not in allowed:
            raise ValueError(
                f"{self.file}: {self._path(key)} must be one of {', '.join(map(repr, allowed))}, "
                f"got {value!r}; {_way_out(self.file)}"
            )
        return value

    def inner(self, key: str) -> Fields:
        """Return the mapping at `key` as fields of their own."""
        return Fields(self.file, self.get(key, dict), self._path(key, quoted=False))

    def each(self, key: str, default: Any = _MISSING) -> list[Fields]:
        """Return the list of mappings at `key`, each as fields of its own."""
        path = self._path(key, quoted=False)
        return [Fields(self.file, item, f"{path}[{i}]") for i, item in enumerate(self.get(key, list, default))]

    def numbers(self, key: str, kind: type[T], default: Any = _MISSING) -> dict[str, T]:
        """Return the mapping of names to numbers at `key`; `default` stands for a null (JSON has no NaN)."""
        inner = Fields(self.file, self.get(key, dict), self._path(key, quoted=False))
        return {str(name): inner.get(name, kind, default) for name in inner.values}

    def _path(self, key: str, quoted: bool = True) -> str:
        """Where `key` is inside the file."""
        path = f"{self.where}.{key}" if self.where else key
        return f"'{path}'" if quoted else path


def read_fields(file: Path) -> Fields:
    """Read a JSON file that holds one object, and check its format number.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, not an object, or of a format that this version does not know.
    """
    if not file.is_file():
        folder = file.parent
        state = "the folder is not a run of snella" if folder.is_dir() else "there is no such folder"
        if (folder / "run.json").is_file():
            state = "the run did not get that far or the file was removed"
        hint = "give the folder that `snella train --out` wrote" if file.name == "run.json" else _way_out(file)
        raise FileNotFoundError(f"{file} is missing: {state}; {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: byte {error.start} is not UTF-8 text; {_way_out(file)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged: {error.msg} in line {error.lineno}, column {error.colno}; {_way_out(file)}"
        ) from error
    if not is_intact(values):
        raise ValueError(f"{file} was altered after it was written: its SHA-256 is another; {_way_out(file)}")
    fields = Fields(file, values)
    number = values.get("format", FORMAT)
    if number != FORMAT:
        raise ValueError(
            f"{file} has format {number!r}, this version of snella reads format {FORMAT}; "
            "install the version that wrote it (named under 'versions' in run.json)"
        )
    return fields


def _way_out(file: Path) -> str:
    """What to do about a file that cannot be used."""
    if file.name == "comparison.json":
        return f"run `snella compare` again or delete {file.name}"
    if file.name == "run.json":
        return "copy the file again, or train again with `--overwrite`"
    return f"go on with `snella train --resume --out {file.parent}`, or train again with `--overwrite`"


def _shown(value: Any) -> str:
    """A value with its kind, short enough for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


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


__all__ = [
    "FORMAT",
    "STATUSES",
    "Allocation",
    "AllocationStep",
    "ClassScores",
    "ComparisonRow",
    "EpochRow",
    "MaskPrediction",
    "MaskPredictions",
    "MaskScores",
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
    "read_scores",
]
