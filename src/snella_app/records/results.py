"""Results: scores on one split, one dataclass a task; rows of comparisons; what evaluations of generators measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from snella_app.records.record import FORMAT, OPTIONAL, Record, record_from
from snella_app.text import count_text, decimal_text, margin_text, measure_text, percent_text

_Z = 1.959964  # 97.5 % quantile of the normal distribution


class _Result:
    """Base of the results of a task."""

    short: ClassVar[tuple[str, ...]]

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {name: getattr(self, name) for name in self.short}


@dataclass(frozen=True)
class Scores(_Result):
    """Result of a classifier on one split; `confusion[i][j]` counts images of class i predicted as class j."""

    short: ClassVar[tuple[str, ...]] = ("accuracy", "balanced_accuracy", "images")

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
    def images(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion))

    @property
    def margin(self) -> float:
        """95 % margin of the accuracy: the distance to the farther end of Wilson's interval; NaN without images.

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
        """95 % margin of the balanced accuracy; NaN without images.

        z / K sqrt(Σ_c p_c (1 - p_c) / (n_c + 2)),   p_c = (correct_c + 1) / (n_c + 2), over the K classes that occur
        """
        rows = [(row[i], sum(row)) for i, row in enumerate(self.confusion) if sum(row)]
        if not rows:
            return math.nan
        smoothed = [((correct + 1) / (size + 2), size + 2) for correct, size in rows]
        return _Z / len(rows) * math.sqrt(sum(share * (1 - share) / size for share, size in smoothed))

    def text(self) -> str:
        """The numbers in a few words."""
        return f"accuracy {percent_text(self.accuracy)}, balanced {percent_text(self.balanced_accuracy)}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        images = f"{margin_text(self.margin)}, {count_text(self.images)} images" if self.images else ""
        balanced = ", ".join(filter(None, (margin_text(self.balanced_margin), "mean of the classes")))
        return [
            (f"{split} accuracy", percent_text(self.accuracy), images),
            (f"{split} balanced accuracy", percent_text(self.balanced_accuracy), balanced),
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
class MaskScores(_Result):
    """Result of a segmentation on one split: by image, pooled, and GPS's variant without false positives."""

    short: ClassVar[tuple[str, ...]] = ("dice", "iou", "dice_pooled", "iou_pooled", "images")

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

    short: ClassVar[tuple[str, ...]] = ("mae", "kappa", *Scores.short)

    mae: float
    kappa: float

    def text(self) -> str:
        """The numbers in a few words."""
        kappa = decimal_text(self.kappa, 3)
        return f"MAE {decimal_text(self.mae, 3)} ranks, kappa {kappa}, {super().text()}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        return [
            (f"{split} MAE", decimal_text(self.mae, 3), f"ranks, mean of {count_text(self.images)} images"),
            (f"{split} kappa", decimal_text(self.kappa, 3), "quadratic weights; 1 is perfect, 0 is chance"),
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
class LabelSetScores(_Result):
    """Result of a task with several labels an image on one split; `map` is the mean of average precisions."""

    short: ClassVar[tuple[str, ...]] = ("map", "macro_f1", "micro_f1", "images")

    map: float
    macro_f1: float
    micro_f1: float = math.nan
    subset_accuracy: float = math.nan
    images: int = 0
    loss: float = math.nan
    per_class: list[LabelScores] = field(default_factory=list)

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
class RegressionScores(_Result):
    """Result of a regression on one split.

    `mae`, `rmse` and `r2` are means over its numbers. Errors of several numbers have different units, so that
    `text` and `rows` give those of each number, and the mean of R² alone.
    """

    short: ClassVar[tuple[str, ...]] = ("mae", "rmse", "r2", "images")

    mae: float
    rmse: float
    r2: float = math.nan
    images: int = 0
    loss: float = math.nan
    per_target: list[NumberScores] = field(default_factory=list)

    def text(self) -> str:
        """The numbers in a few words."""
        r2 = decimal_text(self.r2, 3)
        if len(self.per_target) > 1:
            errors = ", ".join(f"{row.name} {measure_text(row.mae)}" for row in self.per_target)
            return f"R² {r2}, mean of {len(self.per_target)} numbers; MAE of {errors}"
        return f"MAE {measure_text(self.mae)}, RMSE {measure_text(self.rmse)}, R² {r2}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        r2, images = decimal_text(self.r2, 3), f"{count_text(self.images)} images"
        if len(self.per_target) > 1:
            explained = f"share of the variance explained, mean of {len(self.per_target)} numbers, {images}"
            errors = [
                (f"{split} MAE of {row.name}", measure_text(row.mae), f"RMSE {measure_text(row.rmse)}, in its own unit")
                for row in self.per_target
            ]
            return [(f"{split} R²", r2, explained), *errors]
        return [
            (f"{split} MAE", measure_text(self.mae), f"mean absolute error, {images}"),
            (f"{split} RMSE", measure_text(self.rmse), "root mean squared error"),
            (f"{split} R²", r2, "share of the variance explained"),
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


@dataclass(frozen=True, kw_only=True)
class TriedCandidate:
    """One point of a search: its settings, the means over its seeds, and how many of them failed."""

    lr_factor: float
    lr: float
    head_lr: float
    weight_decay: float
    val_accuracy: float | None
    val_loss: float | None
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchChoice:
    """How the learning rate and weight decay of a final run were chosen.

    Attributes:
        lr_factor: The best, times the method's default learning rate.
        lr_on_edge: Whether it is the smallest or the largest that was tried.
        weight_decay_on_edge: Whether the best weight decay is the largest of several.
        trials: All that were tried.
    """

    lr_factor: float | None
    lr_on_edge: bool = False
    weight_decay_on_edge: bool = False
    trials: list[TriedCandidate] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CellResults:
    """What a finished run of a comparison gave; None where a value was not measured.

    Attributes:
        trained_as: The tuning run that it was made from.
        peft_config: PEFT's configuration of the adapter; None for methods outside PEFT.
        kept_weights: Budget of the adapted ones in the adapter.
        file_size: Bytes of the adapter.
        val: Scores by their names, which are columns such as `val_accuracy` in the file.
        test: Likewise of the test images, for final runs.
        split: SHA-256 of what was split, and how.
        changed_weights: Values of the backbone that are other than before, for final runs.
        peak_rss_mib: Of the process, where the run had one of its own.
        training_mib: What of it came after the libraries were loaded.
        forgetting: Share of other data's images that a linear probe loses, for final runs.
    """

    trained_as: str | None = None
    peft_config: dict[str, Any] | None = None
    num_trainable_params: int | None = None
    adapted_weights: int | None = None
    kept_weights: int | None = None
    file_size: int | None = None
    train_time: float | None = None
    step_time: float | None = None
    accelerator_memory_max: int | None = None
    accelerator_memory_reserved_avg: int | None = None
    accelerator_memory_reserved_99th: int | None = None
    train_loss: float | None = None
    train_samples: int | None = None
    epochs: int | None = None
    best_epoch: int | None = None
    protocol: str = "standard"
    selected_on: Literal["val", "test"] | None = None
    ema: float | None = None
    val: dict[str, float | None] = field(default_factory=dict)
    test: dict[str, float | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    split: str | None = None
    changed_weights: int | None = None
    peak_rss_mib: float | None = None
    training_mib: float | None = None
    forgetting: float | None = None
    forgetting_data: str | None = None
    probe_accuracy_frozen: float | None = field(default=None, metadata=OPTIONAL)
    probe_accuracy_adapted: float | None = field(default=None, metadata=OPTIONAL)


_SPLITS = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class CellRow(Record):
    """One run of a comparison: `cell.json` in its folder, and a line of `results.jsonl`.

    In the file, the results are columns among the others, and there are none of a failed run. Settings, versions and
    the machine have the names of PEFT's method comparison.

    Attributes:
        cell: Path of its folder below `cells/`.
        metric: Score that methods are compared by.
        task_name: The data.
        experiment_name: The method's label.
        tried_weight_decay: That of a tuning run; None for the method's default.
        search: How the settings of a final run were chosen.
        error: Of a failed run.
        total_time: Seconds, the tuning run that it was made from among them.
    """

    file: ClassVar[str] = "cell.json"
    is_sealed: ClassVar[bool] = True

    cell: str
    purpose: Literal["final", "trial"]
    metric: str = "accuracy"
    task_name: str
    group: str = ""
    experiment_name: str
    comparison: str = ""
    method: str = ""
    peft_type: str = ""
    model_id: str = ""
    seed: int
    lr_factor: float = 1.0
    tried_weight_decay: float | None = None
    lr: float = math.nan
    head_lr: float = math.nan
    weight_decay: float = math.nan
    search: SearchChoice | None = None
    train_config: dict[str, Any] = field(default_factory=dict)
    peft_version: str | None = None
    transformers_version: str | None = None
    torch_version: str | None = None
    snella_version: str | None = None
    git_dirty: bool | None = None
    package_info: dict[str, str | None] = field(default_factory=dict)
    system_info: dict[str, Any] = field(default_factory=dict)
    created_at: str
    status: Literal["success", "failed"]
    error: str | None = None
    total_time: float = 0.0
    results: CellResults | None = None

    def column(self, name: str) -> float | None:
        """A result by its name in the file, such as `test_accuracy`; None where it was not measured."""
        split, _, score = name.partition("_")
        if self.results is None:
            return None
        return getattr(self.results, split).get(score) if split in _SPLITS else getattr(self.results, name)

    def score(self, split: str) -> float | None:
        """What methods are compared by, on `val` or `test`."""
        return self.column(f"{split}_{self.metric}")

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns of a finished run as its results, those of a split as its scores."""
        if values.get("status") != "success":
            return values
        scores = {
            split: {name.removeprefix(f"{split}_"): v for name, v in values.items() if name.startswith(f"{split}_")}
            for split in _SPLITS
        }
        return {**values, "results": {**values, **scores}}

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """And the other way round."""
        results = values.pop("results") or {}
        for name, value in results.items():
            values |= {f"{name}_{score}": v for score, v in value.items()} if name in _SPLITS else {name: value}
        return values


@dataclass(frozen=True)
class MethodResult:
    """One method of the demonstration; NaN or None where a value was not measured."""

    method: str
    split: str = "test"
    accuracy: float = math.nan
    balanced_accuracy: float = math.nan
    trainable_parameters: int | None = None
    train_s: float = math.nan
    adapter_bytes: int | None = None
    best_epoch: int | None = None


@dataclass(frozen=True)
class MethodResults(Record):
    """The methods that the demonstration compared: `comparison.json`."""

    file: ClassVar[str] = "comparison.json"

    format: int = FORMAT
    rows: list[MethodResult] = field(kw_only=True)


@dataclass(frozen=True)
class SubjectFidelity(Record):
    """What an evaluation of a personalized generator measured: `generation.json`."""

    file: ClassVar[str] = "generation.json"

    concept_alignment: float
    text_alignment: float
    text_alignment_without_token: float
    vendi: float
    vendi_by_prompt: float


@dataclass(frozen=True)
class TaskAccuracy:
    """Share of one task's questions that were answered correctly."""

    accuracy: float


@dataclass(frozen=True)
class AnswerScores(Record):
    """What an evaluation of a language model measured: `language.json`."""

    file: ClassVar[str] = "language.json"

    mean: float
    tasks: dict[str, TaskAccuracy]
