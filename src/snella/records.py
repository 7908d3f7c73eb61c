"""The JSON files of a run, as dataclasses: whoever writes one makes its record, whoever reads one gets it.

A field is a key of the file; one with a default may be missing there, or null. Keys that no field names are passed
over. `write` and `read` are the only way between both.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from snella._files import check_files, is_intact, sealed, write_json
from snella._text import count_text, percent_text

FORMAT = 1
"""The run-folder format that this version of snella writes and reads."""

Status = Literal["running", "interrupted", "failed", "finished"]

T = TypeVar("T")
R = TypeVar("R", bound="Record")


class Record:
    """Base of the dataclasses that are a whole file.

    Attributes:
        file: Its name in the folder of a run.
        is_sealed: Whether it carries the SHA-256 of its other entries.
    """

    file: ClassVar[str]
    is_sealed: ClassVar[bool] = False

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The entries of a file under the names of the fields."""
        return values

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the fields under the names of the file."""
        return values

    def check_folder(self, folder: Path) -> None:
        """Refuse a folder whose other files are not what this one says, with a ValueError."""


_OPTIONAL = {"is_optional": True}
"""Marks a field that is not written while it has its default."""


def plain(value: Any) -> Any:
    """A record, or what stands in one, as plain values for JSON, which lacks NaN: null stands for it."""
    if is_dataclass(value) and not isinstance(value, type):
        values = {
            f.name: plain(getattr(value, f.name))
            for f in fields(value)
            if not (f.metadata.get("is_optional") and _is_same(getattr(value, f.name), f.default))
        }
        return value.encoded(values) if isinstance(value, Record) else values
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(record: Record, folder: str | Path) -> Path:
    """Write a record into the folder of a run, atomically; the file."""
    file = Path(folder) / record.file
    values = plain(record)
    write_json(file, sealed(values) if record.is_sealed else values)
    return file


def read(kind: type[R], folder: str | Path) -> R:
    """Read a record from the folder of a run.

    Args:
        kind: Class of the record.
        folder: Of the run.

    Raises:
        FileNotFoundError: The folder holds no such file.
        ValueError: The file is damaged or of an unknown format, a field is missing or of another type, or what the file
            says of the folder is not so.
    """
    file = Path(folder) / kind.file
    record = record_from(kind, kind.decoded(read_object(file)), file)
    record.check_folder(Path(folder))
    return record


def read_if_present(kind: type[R], folder: str | Path) -> R | None:
    """Read a record as `read` does; None where the run has no such file."""
    return read(kind, folder) if (Path(folder) / kind.file).exists() else None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object, and check its seal and its format number.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, not an object, altered, or of a format that this version does not know.
    """
    if not file.is_file():
        folder, hint = file.parent, _hint(file)
        if (folder / "run.json").is_file():
            state = "the run has not written it yet, or the file was removed"
        elif folder.is_dir():
            state, hint = "this is not the folder of a run", "give the folder that `snella train --out` wrote"
        else:
            state, hint = "there is no such folder", "give the folder that `snella train --out` wrote"
        raise FileNotFoundError(f"no file {file}: {state}; {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: byte {error.start} is not UTF-8; {_hint(file)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged: {error.msg} in line {error.lineno}, column {error.colno}; {_hint(file)}"
        ) from error
    except RecursionError:
        raise ValueError(f"{file} is damaged: it is nested too deeply; {_hint(file)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: the file must hold a mapping, got {_shown(values)}; {_hint(file)}")
    if not is_intact(values):
        raise ValueError(f"{file} was altered after it was written: its SHA-256 is another; {_hint(file)}")
    if values.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{file} has format {values['format']!r}, this version of snella reads format {FORMAT}; "
            "install the version that wrote it (named under 'versions' in run.json)"
        )
    return values


def record_from(kind: type[T], values: Any, file: Path | None = None, where: str = "") -> T:
    """Make a dataclass of plain values, each checked against the type of its field.

    Args:
        kind: The dataclass.
        values: A mapping; keys that no field names are passed over.
        file: Where the values come from, for messages.
        where: Path of the mapping inside the file, such as `history[3]`.

    Raises:
        ValueError: No mapping, a field that is missing or of another type, or what the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise _error(file, f"{_quoted(where)} must be a mapping, got {_shown(values)}")
    hints = _hints(kind)  # type: ignore[arg-type]
    arguments = {}
    for f in fields(kind):  # type: ignore[arg-type]
        value, path = values.get(f.name), f"{where}.{f.name}" if where else f.name
        has_default = f.default is not MISSING or f.default_factory is not MISSING
        if value is None and has_default and not (f.name in values and _accepts_none(hints[f.name])):
            continue
        if value is None and not _accepts_none(hints[f.name]):
            near = difflib.get_close_matches(f.name, map(str, values), n=1)
            raise _error(file, f"{_quoted(path)} is missing" + (f" (nearest: {near[0]!r})" if near else ""))
        arguments[f.name] = _converted(hints[f.name], value, file, path)
    try:
        return kind(**arguments)
    except ValueError as error:
        raise _error(file, f"{where}: {error}" if where else str(error)) from None


def _converted(kind: Any, value: Any, file: Path | None, where: str) -> Any:
    """A value of a file as a field of some type holds it."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        options = [option for option in inner if option is not NoneType]
        if value is None and len(options) < len(inner):
            return None
        return _converted(_fitting(options, value), value, file, where)
    if is_dataclass(kind):
        return record_from(kind, value, file, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in inner:
            raise _error(file, f"{_quoted(where)} must be one of {', '.join(map(repr, inner))}, got {value!r}")
        return value
    if origin in (list, tuple):
        items = _checked(list, value, file, where)
        made = [_converted(inner[0], item, file, f"{where}[{i}]") for i, item in enumerate(items)]
        return tuple(made) if origin is tuple else made
    if origin is dict:
        entries = _checked(dict, value, file, where)
        return {str(key): _converted(inner[1], item, file, f"{where}.{key}") for key, item in entries.items()}
    if kind is float and value is None:
        return math.nan  # among others of a list or mapping; JSON has no other word for it
    return _checked(kind, value, file, where)


_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def _checked(kind: type, value: Any, file: Path | None, where: str) -> Any:
    """A value that must be of a plain type; an integer passes as a float."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _error(file, f"{_quoted(where)} must be {_NAMES[kind]}, got {_shown(value)}")
    return value


def _fitting(options: list[Any], value: Any) -> Any:
    """Of several types the one whose required fields a value has most of; the first of equals."""

    def count(option: Any) -> int:
        if not is_dataclass(option) or not isinstance(value, Mapping):
            return 0
        return sum(f.name in value for f in fields(option) if f.default is MISSING and f.default_factory is MISSING)

    return max(options, key=count)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(kind)


def _accepts_none(kind: Any) -> bool:
    """Whether a field of this type may be None."""
    return kind is Any or NoneType in get_args(kind)


def _is_same(value: Any, default: Any) -> bool:
    """Whether a field has its default, which may be NaN."""
    both = (value, default)
    return value is default or value == default or all(isinstance(v, float) and math.isnan(v) for v in both)


def _quoted(where: str) -> str:
    """A place in a file."""
    return f"'{where}'" if where else "the file"


def _error(file: Path | None, message: str) -> ValueError:
    """What is wrong with a file, and what to do about it."""
    return ValueError(message if file is None else f"{file}: {message}; {_hint(file)}")


def _hint(file: Path) -> str:
    """What to do about a file that cannot be used."""
    if file.name == "comparison.json":
        return f"run `snella compare` again or delete {file.name}"
    if file.name == "run.json":
        return "copy the file again, or train again with `--overwrite`"
    return f"resume with `snella train --resume --out {file.parent}`, or train again with `--overwrite`"


def _shown(value: Any) -> str:
    """A value with its type, short enough for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


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
    pretrained: bool | None = field(default=None, metadata=_OPTIONAL)
    img_size: int | None = None
    num_classes: int | None = field(default=None, metadata=_OPTIONAL)
    seed: int | None = field(default=None, metadata=_OPTIONAL)
    architecture: str | None = None
    channels: int = field(default=3, metadata=_OPTIONAL)


@dataclass(frozen=True)
class DataInfo:
    """The data of a run.

    Attributes:
        spec: As `--data` takes it.
        seed: Decides the splits.
        description: In a few words.
        sizes: Items of each part.
        digest: SHA-256 of what was split, and how; None for old runs, which do not tell.
        contents: SHA-256 of the images of each part; nothing for old runs.
        folder: Its absolute place; None for data without one.
        notes: What a user should know about it.
        fold_part: The part that is a fold of a cross-validation.
        white: Value of 16-bit images that becomes white, where it was given.
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
    fold_part: str | None = field(default=None, metadata=_OPTIONAL)
    white: int | None = field(default=None, metadata=_OPTIONAL)
    subject: str | None = field(default=None, metadata=_OPTIONAL)
    class_name: str | None = field(default=None, metadata=_OPTIONAL)
    files: list[str] | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class ReliabilityBin:
    """The images whose highest probability lies in one range: its mean, the share that is right, how many they are."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """How far probabilities are from the shares that are right, on one split, with the temperature and without.

    Attributes:
        split: val or test.
        count: Images.
        ece: Expected calibration error with the temperature, `Σ_b count_b / count · |accuracy_b - confidence_b|` over
            15 ranges of equal width (Guo et al., arXiv 1706.04599).
        ece_before: The same without.
        loss: Mean cross entropy with the temperature.
        loss_before: The same without.
        bins: The ranges that hold images, with the temperature.
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


@dataclass(frozen=True, kw_only=True)
class RunInfo(Record):
    """What was trained on what: `run.json`; `files` are the digests of a finished run's other files.

    `calibration` is there for classifiers that were measured on validation images.
    """

    file: ClassVar[str] = "run.json"
    is_sealed: ClassVar[bool] = True

    format: int = FORMAT
    task: str = "classification"
    protocol: str = "standard"
    ema: float | None = None
    method: str
    method_options: dict[str, Any] = field(default_factory=dict)
    backbone: BackboneInfo
    classes: list[str]
    task_state: dict[str, Any] | None = field(default=None, metadata=_OPTIONAL)
    data: DataInfo
    data_config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    status: Status
    error: str | None = field(default=None, metadata=_OPTIONAL)
    files: dict[str, str] | None = field(default=None, metadata=_OPTIONAL)
    calibration: Calibration | None = field(default=None, metadata=_OPTIONAL)

    @property
    def temperature(self) -> float:
        """What `predict` divides logits by; 1 where nothing was calibrated."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def is_finished(self) -> bool:
        """Whether training came to its end."""
        return self.status == "finished"

    def check_folder(self, folder: Path) -> None:
        """Compare the files of a finished run with their digests; those of older runs pass."""
        check_files(folder, self.files or {})


@dataclass(frozen=True)
class Scores:
    """Result of a classifier on one split; `confusion[i][j]` counts images of class i taken for class j."""

    accuracy: float
    balanced_accuracy: float = math.nan
    loss: float = math.nan
    confusion: list[list[int]] = field(default_factory=list)
    macro_f1: float = field(default=math.nan, metadata=_OPTIONAL)

    def __post_init__(self) -> None:
        """Refuse a table that is not square."""
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError(
                f"confusion must be square, got {len(self.confusion)} rows of lengths "
                f"{sorted({len(row) for row in self.confusion})}"
            )

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
    pixels: int = 0
    dice: float = math.nan
    iou: float = math.nan
    dice_pooled: float = math.nan
    iou_pooled: float = math.nan


@dataclass(frozen=True)
class MaskScores:
    """Result of a segmentation on one split: by image, pooled, and GPS's variant without false positives."""

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

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {
            "dice": self.dice,
            "iou": self.iou,
            "dice_pooled": self.dice_pooled,
            "iou_pooled": self.iou_pooled,
            "images": self.images,
        }

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

    mae: float
    kappa: float

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"mae": self.mae, "kappa": self.kappa, **super().values()}

    def text(self) -> str:
        """The numbers in a few words."""
        return f"MAE {self.mae:.3f} ranks, kappa {self.kappa:.3f}, {super().text()}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        return [
            (f"{split} MAE", f"{self.mae:.3f}", f"ranks, mean of {count_text(self.count)} images"),
            (f"{split} kappa", f"{self.kappa:.3f}", "quadratic weights; 1 is perfect, 0 is chance"),
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
class LabelSetScores:
    """Result of a task with several labels an image on one split; `map` is the mean of average precisions."""

    map: float
    macro_f1: float
    micro_f1: float = math.nan
    subset_accuracy: float = math.nan
    images: int = 0
    loss: float = math.nan
    per_class: list[LabelScores] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"map": self.map, "macro_f1": self.macro_f1, "micro_f1": self.micro_f1, "images": self.images}

    def text(self) -> str:
        """The numbers in a few words."""
        f1 = f"F1 {percent_text(self.macro_f1)} macro, {percent_text(self.micro_f1)} micro"
        return f"mAP {percent_text(self.map)}, {f1}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        return [
            (f"{split} mAP", percent_text(self.map), f"mean of the classes, {count_text(self.images)} images"),
            (
                f"{split} F1",
                percent_text(self.macro_f1),
                f"mean of the classes; all labels together {percent_text(self.micro_f1)}",
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
class RegressionScores:
    """Result of a regression on one split; means over its numbers."""

    mae: float
    rmse: float
    r2: float = math.nan
    images: int = 0
    loss: float = math.nan
    per_target: list[NumberScores] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The numbers in short, as plain values."""
        return {"mae": self.mae, "rmse": self.rmse, "r2": self.r2, "images": self.images}

    def text(self) -> str:
        """The numbers in a few words."""
        return f"MAE {self.mae:.4g}, RMSE {self.rmse:.4g}, R² {self.r2:.3f}"

    def rows(self, split: str) -> list[tuple[str, str, str]]:
        """Label, value and small print of each number."""
        of_several = f", mean of {len(self.per_target)} numbers" if len(self.per_target) > 1 else ""
        return [
            (f"{split} MAE", f"{self.mae:.4g}", f"mean absolute error, {count_text(self.images)} images{of_several}"),
            (f"{split} RMSE", f"{self.rmse:.4g}", f"root mean squared error{of_several}"),
            (f"{split} R²", f"{self.r2:.3f}", f"share of the variance explained{of_several}"),
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
class EpochRow:
    """One epoch of training; NaN where a value was not measured.

    `val_…` is what the best epoch was chosen on: the test images where `Metrics.selected_on` says so. `is_denser` marks
    an epoch that holds more weights than were asked for, and so was not to be chosen.
    """

    epoch: int
    train_loss: float = math.nan
    val_loss: float = field(default=math.nan, metadata=_OPTIONAL)
    val_accuracy: float = field(default=math.nan, metadata=_OPTIONAL)
    val_balanced_accuracy: float = field(default=math.nan, metadata=_OPTIONAL)
    val_dice: float = field(default=math.nan, metadata=_OPTIONAL)
    val_iou: float = field(default=math.nan, metadata=_OPTIONAL)
    val_dice_pooled: float = field(default=math.nan, metadata=_OPTIONAL)
    val_iou_pooled: float = field(default=math.nan, metadata=_OPTIONAL)
    val_pixel_accuracy: float = field(default=math.nan, metadata=_OPTIONAL)
    val_macro_f1: float = field(default=math.nan, metadata=_OPTIONAL)
    val_micro_f1: float = field(default=math.nan, metadata=_OPTIONAL)
    val_subset_accuracy: float = field(default=math.nan, metadata=_OPTIONAL)
    val_map: float = field(default=math.nan, metadata=_OPTIONAL)
    val_mae: float = field(default=math.nan, metadata=_OPTIONAL)
    val_rmse: float = field(default=math.nan, metadata=_OPTIONAL)
    val_r2: float = field(default=math.nan, metadata=_OPTIONAL)
    val_kappa: float = field(default=math.nan, metadata=_OPTIONAL)
    lr: float = math.nan
    budget: int | None = None
    is_denser: bool = field(default=False, metadata=_OPTIONAL)


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
    averaged: AveragedEpochs | None = field(default=None, metadata=_OPTIONAL)

    @property
    def adapter_epoch(self) -> int | None:
        """The epoch whose budgets the adapter has: the best one, or the last one of a run that saved an average."""
        if self.averaged is not None and self.averaged.is_saved and self.history:
            return self.history[-1].epoch
        return self.best_epoch

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
    epoch: float | None = field(default=None, metadata=_OPTIONAL)
    loss: float | None = field(default=None, metadata=_OPTIONAL)
    eval_loss: float | None = field(default=None, metadata=_OPTIONAL)
    learning_rate: float | None = field(default=None, metadata=_OPTIONAL)
    grad_norm: float | None = field(default=None, metadata=_OPTIONAL)
    budget: int | None = field(default=None, metadata=_OPTIONAL)


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
    fixed_loss: FixedLoss | None = field(default=None, metadata=_OPTIONAL)
    loss_history: list[LossRow] = field(default_factory=list)


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
class Prediction:
    """What the model says about one image."""

    index: int
    name: str
    label: int
    probabilities: list[float]
    rank: int | None = field(default=None, metadata=_OPTIONAL)
    group: str | None = field(default=None, metadata=_OPTIONAL)

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
class Predictions(Record):
    """Predictions on one split: `predictions.json`."""

    file: ClassVar[str] = "predictions.json"

    split: str = "val"
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
class LabelSetPredictions(Record):
    """Predictions of any number of labels an image on one split: `predictions.json`."""

    file: ClassVar[str] = "predictions.json"

    split: str = "val"
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
class NumberPredictions(Record):
    """Predicted numbers of one split: `predictions.json`."""

    file: ClassVar[str] = "predictions.json"

    split: str = "val"
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
class MaskPredictions(Record):
    """Segmented images of one split: `predictions.json`."""

    file: ClassVar[str] = "predictions.json"

    split: str = "val"
    items: list[MaskPrediction] = field(kw_only=True)


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
    """

    file: ClassVar[str] = "folds.json"

    folds: int
    held_out: str = "test"
    rows: list[FoldRow] = field(default_factory=list)


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
