"""What a training writes: `run.json`, `metrics.json`, `allocation.json`, `predictions.json`, `folds.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from snella_app.files import check_files
from snella_app.records.record import FORMAT, OPTIONAL, Record, plain
from snella_app.records.results import SplitScores

Status = Literal["running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class BackboneInfo:
    """The model that a run began with.

    Attributes:
        name: As `--backbone` takes it, or of a generator's pipeline or language model.
        weights: File of its weights, where that is not part of the name.
        pretrained: Whether it began with pre-trained weights; None for generators, as the following two.
        img_size: Side of its images in pixels, where that was asked for.
        num_classes: Outputs of its head.
        seed: Decides what is not pre-trained in it.
        architecture: The name under which timm makes such a model; None for models of other origin.
        channels: Of its images.
    """

    name: str
    weights: str | None = None
    pretrained: bool | None = field(default=None, metadata=OPTIONAL)
    img_size: int | None = None
    num_classes: int | None = field(default=None, metadata=OPTIONAL)
    seed: int | None = field(default=None, metadata=OPTIONAL)
    architecture: str | None = None
    channels: int = field(default=3, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        """Refuse numbers that no model has."""
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most:,}, got {value:,}")


_MOST = {"img_size": 16_384, "num_classes": 1_000_000, "channels": 4_096}


@dataclass(frozen=True)
class DataInfo:
    """The data of a run.

    Attributes:
        spec: As `--data` takes it.
        seed: Decides the splits.
        description: In a few words.
        sizes: Items of each part.
        digest: SHA-256 of the file names, classes and split; None for generators.
        contents: SHA-256 of the images of each part that the run read; nothing for generators.
        folder: Its absolute place; None for data without one.
        notes: What a user should know about it.
        fold_part: The part that is a fold of a cross-validation.
        white: Value of 16-bit images that becomes white, where it was given.
        read_side: What the shorter side of an image keeps at least, where it is read at a lower resolution; None for
            images with masks, which are read in full.
        subject: Of a personalization: which one.
        class_name: And what kind of thing it is.
        files: And its images in `folder`.
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


@dataclass(frozen=True)
class ReliabilityBin:
    """One confidence bin: mean confidence, fraction correct, number of images."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """Calibration on one split, with the temperature and without.

    Attributes:
        split: val or test.
        count: Images.
        ece: Expected calibration error with the temperature, `Σ_b count_b / count · |accuracy_b - confidence_b|` over
            bins of equally many images (Guo et al., arXiv 1706.04599, but for the bins).
        ece_before: The same without.
        loss: Mean cross entropy with the temperature.
        loss_before: The same without.
        bins: The bins, from the lowest confidence to the highest, with the temperature.
        bins_before: The same without.
    """

    split: str
    count: int
    ece: float
    ece_before: float
    loss: float
    loss_before: float
    bins: list[ReliabilityBin]
    bins_before: list[ReliabilityBin]

    @property
    def is_better(self) -> bool:
        """Whether the temperature lowers the calibration error."""
        return self.ece < self.ece_before


@dataclass(frozen=True)
class Calibration:
    """The temperature that a classifier's logits are divided by, fitted on validation images, and what it changes.

    Attributes:
        temperature: Greater than 1 where the model is too sure of itself.
        threshold: Least probability at which half as many errors are left among the validation images as in all of
            them; None where none does that, or there was no error.
        coverage: Share of the validation images whose probability reaches the threshold.
        accuracy: Share of these that is right.
        reliability: On validation, and on test images where there are any.
    """

    temperature: float
    threshold: float | None = None
    coverage: float = math.nan
    accuracy: float = math.nan
    reliability: list[Reliability] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Whether the temperature helped, on the test images where there are any."""
        if not self.reliability:
            return ""
        last = self.reliability[-1]
        where = f"{'validation' if last.split == 'val' else last.split} images"
        change = f"expected calibration error {100 * last.ece_before:.1f} % without it, {100 * last.ece:.1f} % with it"
        if last.is_better:
            return f"The temperature helped on the {last.count} {where}: {change}."
        return (
            f"The temperature did not help on the {last.count} {where}: {change}. Do not rely on the probabilities; "
            "more validation images may help."
        )


@dataclass(frozen=True, kw_only=True)
class RunInfo(Record):
    """What was trained on what: `run.json`; `files` are the digests of a finished run's other files.

    `calibration` is there for classifiers that were measured on validation images. `id` is drawn when a run begins, and
    each of its checkpoints names it. `settings` is the digest of the settings in `config.yaml`. `final_head` is
    `layers` if predictions come from a linear head on several layers, fitted after training.
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
        """What `predict` divides logits by; 1 where nothing was calibrated."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def trained_head_temperature(self) -> float:
        """The temperature for the trained head's logits; 1 if the calibrated head is another one."""
        return self.temperature if self.final_head == "trained" else 1.0

    @property
    def is_finished(self) -> bool:
        """Whether training came to its end."""
        return self.status == "finished"

    def check_folder(self, folder: Path) -> None:
        """Compare the files of a finished run with their digests; an unfinished run has none."""
        check_files(folder, self.files or {})


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch of training; NaN where a value was not measured.

    Epoch 0 is the model before training, measured where its head starts from a probe or from another run.
    `val_…` is what the best epoch was chosen on: the test images where `Metrics.selected_on` says so. `is_denser` marks
    an epoch that holds more weights than were asked for, and so was not to be chosen.
    """

    epoch: int
    train_loss: float = math.nan
    val_loss: float = field(default=math.nan, metadata=OPTIONAL)
    val_accuracy: float = field(default=math.nan, metadata=OPTIONAL)
    val_balanced_accuracy: float = field(default=math.nan, metadata=OPTIONAL)
    val_dice: float = field(default=math.nan, metadata=OPTIONAL)
    val_iou: float = field(default=math.nan, metadata=OPTIONAL)
    val_dice_pooled: float = field(default=math.nan, metadata=OPTIONAL)
    val_iou_pooled: float = field(default=math.nan, metadata=OPTIONAL)
    val_pixel_accuracy: float = field(default=math.nan, metadata=OPTIONAL)
    val_macro_f1: float = field(default=math.nan, metadata=OPTIONAL)
    val_micro_f1: float = field(default=math.nan, metadata=OPTIONAL)
    val_subset_accuracy: float = field(default=math.nan, metadata=OPTIONAL)
    val_map: float = field(default=math.nan, metadata=OPTIONAL)
    val_mae: float = field(default=math.nan, metadata=OPTIONAL)
    val_rmse: float = field(default=math.nan, metadata=OPTIONAL)
    val_r2: float = field(default=math.nan, metadata=OPTIONAL)
    val_kappa: float = field(default=math.nan, metadata=OPTIONAL)
    lr: float = math.nan
    budget: int | None = None
    is_denser: bool = field(default=False, metadata=OPTIONAL)


@dataclass(frozen=True)
class AveragedEpochs:
    """Epochs whose trained weights were averaged after the training.

    Attributes:
        kind: `swa`, the mean of all that were kept, or `soup`, the mean of those that raised the result.
        epochs: Those in the average.
        offered: Those that were kept.
        is_saved: Whether the average is the run's adapter; otherwise the best epoch was better.
        scores: Results of the average on the images that select the epoch, by their names in the history.
    """

    kind: Literal["swa", "soup"]
    epochs: list[int]
    offered: list[int]
    is_saved: bool
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Which epochs were averaged."""
        names = ", ".join(map(str, self.epochs))
        return f"the average of epochs {names}" if len(self.epochs) > 1 else f"epoch {names} alone"


@dataclass(frozen=True)
class FinalHead:
    """A linear head on features of several layers that was fitted after training, beside the trained head.

    Attributes:
        layers: Their indices in timm's `feature_info`, from 0.
        is_saved: Whether predictions use it; otherwise it is clearly worse on validation.
        metric: That the validation results are of; None without validation images.
        val: Result on validation of a fit to the training images.
        val_trained: That of the trained head.
    """

    layers: list[int]
    is_saved: bool
    metric: str | None = None
    val: float = math.nan
    val_trained: float = math.nan

    @property
    def name(self) -> str:
        """What it is: layers are counted from 1."""
        return f"linear head on layers {', '.join(str(layer + 1) for layer in self.layers)}"

    @property
    def comparison(self) -> str:
        """Both validation results; empty without validation images."""
        if self.metric is None:
            return ""
        metric = self.metric.replace("_", " ")
        return f"validation {metric} {self.val:.4f}, {self.val_trained:.4f} with the trained head"


@dataclass(frozen=True, kw_only=True)
class Metrics(Record):
    """Results and costs: `metrics.json`; of a generator's, the costs alone.

    In the file, the history's `val_…` are called `test_…` where the test images chose the epoch.
    """

    file: ClassVar[str] = "metrics.json"

    best_epoch: int | None = None
    protocol: str = "standard"
    selected_on: Literal["val", "test"] | None = "val"
    best_metric: str = "val_accuracy"
    ema: float | None = None
    train_s: float = math.nan
    trainable_parameters: int
    adapted_weights: int | None = None
    adapter_bytes: int = 0
    peak_rss_mib: float = math.nan
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
        """The epoch whose budgets the adapter has: the best one, or the last one of a run that saved an average."""
        if self.averaged is not None and self.averaged.is_saved and self.history:
            return self.history[-1].epoch
        return self.best_epoch

    @property
    def measured(self) -> tuple[str, SplitScores | None]:
        """The results that a report shows first, those on test images where there are any, and their split."""
        return ("test", self.test) if self.test is not None else ("validation", self.val)

    @property
    def selection(self) -> str:
        """The split that the best epoch was selected on, human-readable."""
        return "test" if self.selected_on == "test" else "validation"

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The history's `test_…` as `val_…`."""
        history = values.get("history")
        if values.get("selected_on") != "test" or not isinstance(history, list):
            return values
        return {**values, "history": [_renamed(row, "test_", "val_") for row in history]}

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """And the other way round."""
        if self.selected_on != "test":
            return values
        return {**values, "history": [_renamed(row, "val_", "test_") for row in values["history"]]}


def _renamed(row: Any, old: str, new: str) -> Any:
    """A row whose names begin with `new` instead of `old`."""
    if not isinstance(row, Mapping):
        return row
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in row.items()}


@dataclass(frozen=True)
class FixedLoss:
    """Loss on fixed noise and times, before and after training."""

    before: float = math.nan
    after: float = math.nan


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """A step or epoch of a generator's training; None where a value was not measured."""

    step: int = 0
    epoch: float | None = field(default=None, metadata=OPTIONAL)
    loss: float | None = field(default=None, metadata=OPTIONAL)
    eval_loss: float | None = field(default=None, metadata=OPTIONAL)
    learning_rate: float | None = field(default=None, metadata=OPTIONAL)
    grad_norm: float | None = field(default=None, metadata=OPTIONAL)
    budget: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class GeneratorMetrics(Record):
    """Losses and costs of a run that trained a generator of images or of text: `metrics.json`."""

    file: ClassVar[str] = "metrics.json"

    train_s: float = math.nan
    trainable_parameters: int
    adapted_weights: int | None = None
    adapter_bytes: int = 0
    peak_rss_mib: float = math.nan
    peak_gpu_mib: float | None = None
    optimizer: str = ""
    fixed_loss: FixedLoss | None = field(default=None, metadata=OPTIONAL)
    loss_history: list[LossRow] = field(default_factory=list)

    def learning(self) -> dict[str, Any]:
        """The losses in short, as plain values; None where a value was not measured.

        Returns:
            `steps`, `epochs`, `first` and `last` loss, that of `held_out` entries, those on fixed noise and times
            before and after training (`fixed_before`, `fixed_after`), and the `optimizer`.
        """
        rows, fixed = self.loss_history, self.fixed_loss or FixedLoss()
        losses = [row.loss for row in rows if row.loss is not None]
        held_out = [row.eval_loss for row in rows if row.eval_loss is not None]
        return {
            "steps": max((row.step for row in rows), default=0),
            "epochs": max((row.epoch for row in rows if row.epoch is not None), default=None),
            "first": losses[0] if losses else None,
            "last": losses[-1] if losses else None,
            "held_out": held_out[-1] if held_out else None,
            "fixed_before": plain(fixed.before),
            "fixed_after": plain(fixed.after),
            "optimizer": self.optimizer,
        }


@dataclass(frozen=True)
class MatrixInfo:
    """One adapted matrix; `budget` and `nonzeros` are those of the saved adapter."""

    name: str
    kind: str
    depth: int | None
    shape: tuple[int, ...]
    size: int
    budget: int
    nonzeros: int


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
class Allocation(Record):
    """How budgets evolved: `allocation.json`."""

    file: ClassVar[str] = "allocation.json"

    total_weights: int
    target_budget: int
    matrices: list[MatrixInfo]
    history: list[AllocationStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse steps that are not of these matrices."""
        names = {matrix.name for matrix in self.matrices}
        for i, step in enumerate(self.history):
            unknown = sorted((set(step.budgets) | set(step.importance)) - names)
            if unknown or names - set(step.budgets):
                raise ValueError(
                    f"history[{i}] does not fit 'matrices': unknown {unknown[:3]}, "
                    f"without budget {sorted(names - set(step.budgets))[:3]}"
                )


@dataclass(frozen=True)
class SplitPredictions(Record):
    """What a model says about the images of one split: `predictions.json`, by task."""

    file: ClassVar[str] = "predictions.json"

    split: str = "val"

    @property
    def split_name(self) -> str:
        """The split, human-readable."""
        return "validation" if self.split == "val" else self.split


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image."""

    index: int
    name: str
    label: int
    probabilities: list[float]
    rank: int | None = field(default=None, metadata=OPTIONAL)
    group: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def predicted(self) -> int:
        """Class of the highest probability; of ordered classes the predicted rank."""
        if self.rank is not None:
            return self.rank
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """The predicted class's probability."""
        return self.probabilities[self.predicted]

    @property
    def is_right(self) -> bool:
        """Whether the predicted class is the label."""
        return self.predicted == self.label


@dataclass(frozen=True)
class Predictions(SplitPredictions):
    """Predictions of one class an image."""

    items: list[Prediction] = field(kw_only=True)

    def with_temperature(self, temperature: float) -> Self:
        """The same with the probabilities that logits over a temperature give: `p ** (1 / T)`, to the sum 1."""

        def changed(item: Prediction) -> Prediction:
            powers = [p ** (1 / temperature) for p in item.probabilities]
            return replace(item, probabilities=[power / sum(powers) for power in powers])

        return self if temperature == 1.0 else replace(self, items=[changed(item) for item in self.items])

    def for_classes(self, count: int) -> Self:
        """The same, if they have a probability for each of so many classes.

        Raises:
            ValueError: One has not.
        """
        for i, item in enumerate(self.items):
            if len(item.probabilities) != count or not 0 <= item.label < count:
                raise ValueError(
                    f"{self.file}: items[{i}] has {len(item.probabilities)} probabilities and label {item.label}, "
                    f"but run.json names {count} classes; train again with `--overwrite`"
                )
        return self


@dataclass(frozen=True)
class LabelSetPrediction:
    """The class numbers that one image has, and what the model says about all classes."""

    index: int
    name: str
    labels: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class LabelSetPredictions(SplitPredictions):
    """Predictions of any number of labels an image."""

    thresholds: list[float] = field(kw_only=True)
    items: list[LabelSetPrediction] = field(kw_only=True)


@dataclass(frozen=True)
class NumberPrediction:
    """The numbers of one image and those predicted, in their own units."""

    index: int
    name: str
    values: list[float]
    predicted: list[float]


@dataclass(frozen=True)
class NumberPredictions(SplitPredictions):
    """Predicted numbers."""

    items: list[NumberPrediction] = field(kw_only=True)


@dataclass(frozen=True)
class MaskPrediction:
    """How well one image was segmented; NaN where nothing was to be found. `mask` is a file of the run's folder."""

    index: int
    name: str = ""
    dice: float = math.nan
    iou: float = math.nan
    mask: str | None = None


@dataclass(frozen=True)
class MaskPredictions(SplitPredictions):
    """Segmented images."""

    items: list[MaskPrediction] = field(kw_only=True)


@dataclass(frozen=True)
class FoldRow:
    """The result of one fold: the numbers of its held-out images by metric."""

    fold: int
    folder: str
    best_epoch: int | None
    scores: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldResults(Record):
    """A cross-validation: `folds.json`.

    Attributes:
        folds: How many there are.
        held_out: The part that a fold is: test, or val where the data has a test part of its own.
        rows: Those that are finished.
        settings: Digest of the settings in `config.yaml`.
    """

    file: ClassVar[str] = "folds.json"

    folds: int
    held_out: str = "test"
    rows: list[FoldRow] = field(default_factory=list)
    settings: str | None = field(default=None, metadata=OPTIONAL)
