"""Records of a run: `run.json`, `metrics.json`, `allocation.json`, `folds.json`.

A run saves the adapter of its best epoch, selected by a score on the validation or test images, or the adapter of its
last epoch if no epoch is selected. Alternatively, it can save an average of epochs. The budget of a matrix is the
number of weights that its update may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from snella_app.files import check_files
from snella_app.records.record import FORMAT, OPTIONAL, Float, Record, read_if_present
from snella_app.records.results import SplitScores
from snella_app.text import split_text

Status = Literal["running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class BackboneInfo:
    """Initial model of a run.

    Attributes:
        name: Value of `--backbone`, or the name of a generator's pipeline or of a language model.
        weights: Weight file, if not part of the name.
        pretrained: True for pre-trained weights. For image generators and language models, `pretrained`, `num_classes`,
            and `seed` are None.
        img_size: Requested input resolution in pixels.
        num_classes: Number of outputs of the head.
        seed: Seed of newly initialized weights.
        architecture: timm model name, or None for models outside timm.
        channels: Number of image channels.
        paths: Absolute paths of `name` and `weights` if they are local files or folders.
        digests: SHA-256 of `name` and `weights` if they are local files.
    """

    name: str
    weights: str | None = None
    pretrained: bool | None = field(default=None, metadata=OPTIONAL)
    img_size: int | None = None
    num_classes: int | None = field(default=None, metadata=OPTIONAL)
    seed: int | None = field(default=None, metadata=OPTIONAL)
    architecture: str | None = None
    channels: int = field(default=3, metadata=OPTIONAL)
    paths: dict[str, str] | None = field(default=None, metadata=OPTIONAL)
    digests: dict[str, str] | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Check sizes against their limits."""
        for name, maximum in _MAX.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= maximum:
                raise ValueError(f"{name} must be from 1 to {maximum:,}, got {value:,}")


_MAX = {"img_size": 16_384, "num_classes": 1_000_000, "channels": 4_096}
"""Maximum values of fields of `BackboneInfo`."""


@dataclass(frozen=True)
class DataInfo:
    """Data of a run.

    Attributes:
        spec: Value of `--data`.
        seed: Seed of the run.
        sizes: Number of items by split.
        digest: SHA-256 of classes, image names, labels, sample weights, groups, and splits. For generators, SHA-256 of
            the training files.
        contents: SHA-256 of the images and masks that the run read, by split. For language runs, SHA-256 of the
            template, under `template`. Empty for image generators.
        folder: Absolute path, or None for data without a folder.
        fold_part: Split that is a cross-validation fold, or None without cross-validation.
        white: Value of 16-bit images that maps to white, if given.
        read_side: Minimum shorter side of images that are decoded at a reduced resolution. None for images with masks,
            which are decoded at full resolution.
        subject: Subject of a DreamBooth run. Its class is `class_name`, and its images are `files` in `folder`.
    """

    spec: str
    seed: int | None = None
    description: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    digest: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    folder: str | None = None
    notes: list[str] = field(default_factory=list)
    fold_part: str | None = field(default=None, metadata=OPTIONAL)
    white: int | None = field(default=None, metadata=OPTIONAL)
    read_side: int | None = field(default=None, metadata=OPTIONAL)
    subject: str | None = field(default=None, metadata=OPTIONAL)
    class_name: str | None = field(default=None, metadata=OPTIONAL)
    files: list[str] | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Check `read_side`."""
        if self.read_side is not None and self.read_side < 1:
            raise ValueError(f"read_side must be at least 1, got {self.read_side}")


@dataclass(frozen=True)
class ReliabilityBin:
    """One confidence bin: mean confidence, fraction correct, and number of images."""

    confidence: Float
    accuracy: Float
    count: int


@dataclass(frozen=True)
class Reliability:
    """Calibration on one split, with and without temperature scaling.

    Attributes:
        split: val or test.
        ece: Expected calibration error with the temperature, `Σ_b count_b / count · |accuracy_b - confidence_b|` over
            equal-mass bins (Guo et al., arXiv 1706.04599, use equal-width bins).
        ece_before: Expected calibration error without the temperature.
        loss: Mean cross-entropy with the temperature.
        loss_before: Mean cross-entropy without the temperature.
        bins: Confidence bins in ascending order, with the temperature.
        bins_before: Confidence bins without the temperature.
    """

    split: str
    count: int
    ece: Float
    ece_before: Float
    loss: Float
    loss_before: Float
    bins: list[ReliabilityBin]
    bins_before: list[ReliabilityBin]


_LARGE_ERROR = 0.05
"""Expected calibration error above which probabilities are called unreliable."""


@dataclass(frozen=True)
class Calibration:
    """Temperature scaling of a classifier, fitted on validation images, and its effect.

    Attributes:
        temperature: Divisor of the logits; above 1 for an overconfident model.
        threshold: Lowest confidence such that validation images at or above it have at most half the overall error
            rate. None if there is no such threshold or no error.
        coverage: Fraction of validation images whose confidence reaches the threshold, or 1 without a threshold.
        accuracy: Accuracy on these images.
        reliability: Calibration on validation and, if present, test images.
    """

    temperature: float
    threshold: float | None = None
    coverage: Float = math.nan
    accuracy: Float = math.nan
    reliability: list[Reliability] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Effect of the temperature on the test images, or the validation images if there are no test images.

        The text is empty if the effect is unknown.
        """
        if not self.reliability or math.isnan(self.reliability[-1].ece):
            return ""
        last = self.reliability[-1]
        images = f"{last.count} {split_text(last.split)} images"
        change = f"expected calibration error {100 * last.ece_before:.1f}% without it, {100 * last.ece:.1f}% with it"
        if last.ece < last.ece_before:
            return f"Temperature scaling reduced the calibration error on the {images}: {change}."
        text = f"Temperature scaling did not reduce the calibration error on the {images}: {change}."
        if last.ece > _LARGE_ERROR:
            text += " Do not rely on the probabilities; more validation images may help."
        return text


@dataclass(frozen=True, kw_only=True)
class RunInfo(Record):
    """Record of a run: `run.json`.

    `files` contains the digests of a finished run's other files, or of an unfinished run's adapter. `calibration` is
    set for classifiers with validation images. `id` is a random ID, generated when the run starts and also stored in
    its checkpoints. `settings` is the digest of the settings in `config.yaml`. `final_head` is `layers` if predictions
    come from a head on several layers, fitted after training. `step_memory` is the estimated peak memory of a training
    step in each process, in bytes; None for a run without training.
    """

    file: ClassVar[str] = "run.json"
    is_sealed: ClassVar[bool] = True

    format: int = FORMAT
    task: str = "classification"
    protocol: str = "standard"
    ema: float | None = None
    tta: int = field(default=1, metadata=OPTIONAL)
    method: str
    method_options: dict[str, Any] = field(default_factory=dict)
    step_memory: int | None = field(default=None, metadata=OPTIONAL)
    backbone: BackboneInfo
    classes: list[str]
    task_state: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)
    data: DataInfo
    data_config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    id: str | None = field(default=None, metadata=OPTIONAL)
    settings: str | None = field(default=None, metadata=OPTIONAL)
    status: Status
    error: str | None = field(default=None, metadata=OPTIONAL)
    files: dict[str, str] | None = field(default=None, metadata=OPTIONAL)
    calibration: Calibration | None = field(default=None, metadata=OPTIONAL)
    final_head: Literal["trained", "layers"] = field(default="trained", metadata=OPTIONAL)

    @property
    def temperature(self) -> float:
        """Divisor of the logits in `predict`, which is 1 without calibration."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def trained_head_temperature(self) -> float:
        """Divisor of the trained head's logits, which is 1 if the calibration is for the final head."""
        return self.temperature if self.final_head == "trained" else 1.0

    @property
    def is_finished(self) -> bool:
        """True if training is complete."""
        return self.status == "finished"

    def check_folder(self, folder: Path) -> None:
        """Verify the digests of the run's files."""
        check_files(folder, self.files or {})


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch of training. Values that were not measured are NaN.

    Epoch 0 is the model before training, which is evaluated if its head comes from a linear probe or another run.
    `val_…` refers to the images used for epoch selection, which are the test images if `Metrics.selected_on` is `test`.
    `is_denser` marks an epoch above the target budget, which is not eligible for selection.
    """

    epoch: int
    train_loss: Float = math.nan
    val_loss: Float = field(default=math.nan, metadata=OPTIONAL)
    val_accuracy: Float = field(default=math.nan, metadata=OPTIONAL)
    val_balanced_accuracy: Float = field(default=math.nan, metadata=OPTIONAL)
    val_dice: Float = field(default=math.nan, metadata=OPTIONAL)
    val_iou: Float = field(default=math.nan, metadata=OPTIONAL)
    val_dice_pooled: Float = field(default=math.nan, metadata=OPTIONAL)
    val_iou_pooled: Float = field(default=math.nan, metadata=OPTIONAL)
    val_pixel_accuracy: Float = field(default=math.nan, metadata=OPTIONAL)
    val_macro_f1: Float = field(default=math.nan, metadata=OPTIONAL)
    val_micro_f1: Float = field(default=math.nan, metadata=OPTIONAL)
    val_subset_accuracy: Float = field(default=math.nan, metadata=OPTIONAL)
    val_map: Float = field(default=math.nan, metadata=OPTIONAL)
    val_mae: Float = field(default=math.nan, metadata=OPTIONAL)
    val_rmse: Float = field(default=math.nan, metadata=OPTIONAL)
    val_r2: Float = field(default=math.nan, metadata=OPTIONAL)
    val_kappa: Float = field(default=math.nan, metadata=OPTIONAL)
    lr: Float = math.nan
    budget: int | None = None
    is_denser: bool = field(default=False, metadata=OPTIONAL)


@dataclass(frozen=True)
class AveragedEpochs:
    """Weight average over epochs, computed after training.

    Attributes:
        kind: `swa` averages all candidate epochs; `soup` averages those that do not lower the score.
        epochs: Averaged epochs.
        offered: Candidate epochs.
        is_saved: True if the average is the run's adapter, False if the best epoch scored higher.
        scores: Scores of the average on the images used for epoch selection, by name in the history.
    """

    kind: Literal["swa", "soup"]
    epochs: list[int]
    offered: list[int]
    is_saved: bool
    scores: dict[str, Float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Human-readable list of the averaged epochs."""
        names = ", ".join(map(str, self.epochs))
        return f"the average of epochs {names}" if len(self.epochs) > 1 else f"only epoch {names}"


@dataclass(frozen=True)
class FinalHead:
    """Head on features of several layers, fitted after training in addition to the trained head.

    Attributes:
        layers: Indices in timm's `feature_info`, from 0.
        is_saved: True if predictions use this head. False if it is worse on the validation images (for single-label
            classification: clearly worse).
        metric: Name of the validation metric, or None without validation images.
        val: Validation score of the head fitted to the training images.
        val_trained: Validation score of the trained head.
        kind: Linear head, or mixture of a kernel head and a linear head.
        replaced_epoch: Best epoch of the trained head if the last epoch is saved instead, because this head was fitted
            to the last epoch's features. None if the best epoch is saved.
    """

    layers: list[int]
    is_saved: bool
    metric: str | None = None
    val: Float = math.nan
    val_trained: Float = math.nan
    kind: Literal["linear", "mixed"] = field(default="linear", metadata=OPTIONAL)
    replaced_epoch: int | None = field(default=None, metadata=OPTIONAL)

    @property
    def name(self) -> str:
        """Human-readable name, with layers counted from 1."""
        kind = "kernel and linear" if self.kind == "mixed" else self.kind
        return f"{kind} head on layers {', '.join(str(layer + 1) for layer in self.layers)}"

    @property
    def comparison(self) -> str:
        """Both validation scores. The text is empty without validation images."""
        if self.metric is None:
            return ""
        metric = self.metric.replace("_", " ")
        return f"validation {metric} {self.val:.4f}, {self.val_trained:.4f} with the trained head"

    @property
    def text(self) -> str:
        """Description of the head and its use in predictions."""
        if self.metric is None:
            return f"{self.name} is the final head, fitted to the training images"
        if not self.is_saved:
            return f"{self.name} is worse: {self.comparison}; the trained head is the final head"
        return f"{self.name} is the final head: {self.comparison}; refitted on training and validation images"


@dataclass(frozen=True, kw_only=True)
class Metrics(Record):
    """Results and costs of a run, or only the costs of a generator: `metrics.json`.

    The file stores the entries `val_…` of the history as `test_…` if the epoch was selected on test images.
    """

    file: ClassVar[str] = "metrics.json"

    best_epoch: int | None = None
    protocol: str = "standard"
    selected_on: Literal["val", "test"] | None = "val"
    best_metric: str = "val_accuracy"
    ema: float | None = None
    train_s: Float = math.nan
    trainable_parameters: int
    adapted_weights: int | None = None
    adapter_bytes: int = 0
    peak_rss_mib: Float = math.nan
    step_s: float | None = None
    accelerator_memory_max: int | None = None
    accelerator_memory_reserved_avg: int | None = None
    accelerator_memory_reserved_99th: int | None = None
    history: list[EpochRow] = field(default_factory=list)
    val: SplitScores | None = None
    test: SplitScores | None = None
    averaged: AveragedEpochs | None = field(default=None, metadata=OPTIONAL)
    final_head: FinalHead | None = field(default=None, metadata=OPTIONAL)

    @property
    def adapter_epoch(self) -> int | None:
        """Epoch of the adapter's budgets: the best epoch, or the last one for a saved average."""
        if self.averaged is not None and self.averaged.is_saved and self.history:
            return self.history[-1].epoch
        return self.best_epoch

    @property
    def saved_epochs(self) -> str:
        """Human-readable epoch of the saved weights, or the averaged epochs. The text is empty if they are unknown."""
        total = f" of {self.history[-1].epoch}" if self.history else ""
        if self.averaged is not None and self.averaged.is_saved:
            return f"{self.averaged.text}{total}"
        return "" if self.best_epoch is None else f"{self.best_epoch}{total}"

    @property
    def replaces_best_epoch(self) -> bool:
        """True if the last epoch is saved instead of the best one, because the final head was fitted to it."""
        return self.final_head is not None and self.final_head.replaced_epoch is not None

    @property
    def measured(self) -> tuple[str, SplitScores | None]:
        """Main split and scores of a report: those of the test split if present, or else of the validation split."""
        return ("test", self.test) if self.test is not None else ("validation", self.val)

    @property
    def selection(self) -> str:
        """Human-readable name of the split used for epoch selection, or `validation` if no split was used."""
        return "test" if self.selected_on == "test" else "validation"

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rename `test_…` in the history to `val_…`."""
        history = values.get("history")
        if values.get("selected_on") != "test" or not isinstance(history, list):
            return values
        rows: list[Any] = []
        for row in history:
            rows.append(renamed(row, "test_", "val_") if isinstance(row, Mapping) else row)
        return {**values, "history": rows}

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Rename `val_…` in the history to `test_…`."""
        if self.selected_on != "test":
            return values
        return {**values, "history": [renamed(row, "val_", "test_") for row in values["history"]]}


def renamed(row: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a copy of a row in which the prefix `old` of names is replaced with `new`."""
    values: dict[str, Any] = {}
    for key, value in row.items():
        name = new + key.removeprefix(old) if key.startswith(old) else key
        values[name] = value
    return values


@dataclass(frozen=True)
class MatrixInfo:
    """Adapted matrix, with the `budget` and `nonzeros` of the saved adapter."""

    name: str
    kind: str
    depth: int | None
    shape: tuple[int, ...]
    size: int
    budget: int
    nonzeros: int


@dataclass(frozen=True)
class AllocationStep:
    """Allocation after optimizer step `step`, at time `t` of a schedule of `total` epochs or steps.

    `budget` is the overall budget; `budgets` and `importance` are by matrix name. By default, the allocator
    distributes the budget by importance.
    """

    step: int
    t: int
    total: int
    budget: int
    budgets: dict[str, int]
    importance: dict[str, Float]


@dataclass(frozen=True)
class Allocation(Record):
    """Budgets over time: `allocation.json`."""

    file: ClassVar[str] = "allocation.json"

    total_weights: int
    target_budget: int
    matrices: list[MatrixInfo]
    history: list[AllocationStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check that every step has a budget for each matrix, and no budget or importance for other names."""
        names = {matrix.name for matrix in self.matrices}
        for i, step in enumerate(self.history):
            unknown = sorted((set(step.budgets) | set(step.importance)) - names)
            missing = sorted(names - set(step.budgets))
            errors: list[str] = []
            if unknown:
                errors.append(f"unknown {unknown[:3]}")
            if missing:
                errors.append(f"no budget for {missing[:3]}")
            if errors:
                raise ValueError(f"history[{i}] does not match 'matrices': {', '.join(errors)}")


@dataclass(frozen=True)
class FoldRow:
    """Scores of one fold by metric, on its held-out images and on a separate test split if there is one."""

    fold: int
    folder: str
    best_epoch: int | None
    scores: dict[str, Float]
    test: dict[str, Float] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldResults(Record):
    """Cross-validation results: `folds.json`.

    Attributes:
        held_out: Split formed by the folds: test, or val if the data has a separate test split.
        settings: Digest of the settings in `config.yaml`.
    """

    file: ClassVar[str] = "folds.json"

    folds: int
    held_out: str = "test"
    rows: list[FoldRow] = field(default_factory=list)
    settings: str | None = field(default=None, metadata=OPTIONAL)


def status_text(status: Status) -> str:
    """Return the status in human-readable form. A process that is killed leaves the status `running`."""
    return "running or killed" if status == "running" else status


def reject_cross_validation(path: Path) -> None:
    """Raise ValueError if a folder contains a cross-validation instead of a run."""
    if results := read_if_present(FoldResults, path):
        example = f", e.g. {path / results.rows[0].folder}" if results.rows else ""
        raise ValueError(f"run={path} is a cross-validation with several models; pass one of its runs{example}")
