"""`Task`: what training, evaluation and reports ask of a kind of task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn

from snella_app.backbones import create_backbone
from snella_app.data import ImageDataset, MaskDataset
from snella_app.records import LabelSetPredictions, MaskPredictions, NumberPredictions, Predictions
from snella_app.report.examples import ImageSource
from snella_app.text import listed, nearest

TargetKind = Literal["class", "labels", "numbers"]


@dataclass(frozen=True)
class ResultTable:
    """A human-readable table: a title, the columns' names (the first one heads the rows' names), and rows of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Task(ABC):
    """A kind of task: what a batch is, which model fits, loss, metrics, and how results read.

    A model's outputs of a batch are turned into two small tensors by `reduce`; those of a whole data set, concatenated,
    are what `metrics` and `sample_outputs` are computed from. What a task takes from the training images (`fitted`) and
    from the validation images (`calibrated`) and needs to predict is its `state`, which `run.json` keeps.

    Attributes:
        monitor: Metric that the epoch is chosen by, one of `monitors`.
    """

    name: ClassVar[str]
    """As in `--task`."""
    head: ClassVar[str | None] = None
    """Module of the model that is new and trained in full; None where the model itself says which."""
    target: ClassVar[TargetKind] = "class"
    """What a label column holds, as `load_data` takes it."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Settings of a run that not every task has, and this one has."""
    outputs_name: ClassVar[str] = "classes"
    """What the classes are called in overviews."""
    losses: ClassVar[tuple[str, ...]] = ()
    """What `--loss` may be, the default first."""
    monitors: ClassVar[Mapping[str, int]]
    """What `--monitor` may be, the default first; 1 where higher is better, -1 where lower is."""
    has_one_class: ClassVar[bool] = False
    """Whether an image has one class, whose probabilities are the softmax of the outputs; a temperature calibrates
    them."""
    augment: ClassVar[str] = "crop"
    """Default of `--augment auto`. Regression and segmentation use flips, since crops change their targets."""
    has_linear_fit: ClassVar[bool] = False
    """Whether `fit_linear` finds a linear head on features."""
    epoch_format: ClassVar[str]
    """An epoch's row in a few words, by the names of its entries, as the following ones are."""
    val_format: ClassVar[str]
    """The best epoch's results on validation."""
    test_format: ClassVar[str]
    """And on test images."""
    monitor_names: ClassVar[Mapping[str, str]] = {}
    """How metrics are called that epochs may be chosen by, and that `val_format` does not show."""
    result_format: ClassVar[str]
    """Results in a few words."""

    monitor: str

    @classmethod
    def create(cls, classes: Sequence[str], **settings: Any) -> Self:
        """Make the task for some classes; settings of other tasks are ignored, None is for the default."""
        settings["loss_name"] = settings.pop("loss", None) if cls.losses else None
        known = {f.name for f in fields(cls)} & {name for name, value in settings.items() if value is not None}  # type: ignore[arg-type]
        given = {name: tuple(value) if isinstance(value := settings[name], list) else value for name in known}
        return cls(cls.first_field(classes), **given)  # type: ignore[call-arg]

    @classmethod
    def first_field(cls, classes: Sequence[str]) -> Any:
        """What the task's first field holds: the names of its classes."""
        return tuple(classes)

    @staticmethod
    def build_model(name: str, **options: Any) -> nn.Module:
        """The pre-trained model, with a new head for `num_classes`; options as for `create_backbone`."""
        return create_backbone(name, **options)

    @staticmethod
    def count_outputs(classes: Sequence[str]) -> int:
        """Number of outputs of the model's head."""
        return len(classes)

    @classmethod
    def order_classes(cls, classes: Sequence[str], order: str | None) -> list[str]:
        """The classes in the order that the task numbers them in."""
        return list(classes)

    @property
    def best_metric(self) -> str:
        """Entry of an epoch's row that epochs are compared by first."""
        return f"val_{self.monitor}"

    def check_data(self, dataset: ImageDataset, spec: str) -> None:
        """Refuse data of another kind than the task needs: here, images with masks.

        Raises:
            ValueError: It is of another kind.
        """
        if isinstance(dataset, MaskDataset):
            raise ValueError(
                f"task must be segmentation for images with masks such as {spec}, got {self.name!r}; "
                "add --task segmentation"
            )

    def encode(self, target: Any) -> Any:
        """What an item's second part is, from what the label column says; not asked for classes and masks."""
        return target

    def fitted(self, train: ImageDataset, classes: Sequence[str]) -> Self:
        """The task with what it takes from the training images' targets."""
        return self

    def calibrated(self, reduced: ArrayLike, labels: ArrayLike) -> Self:
        """The task with what it takes from the best epoch's outputs on the validation images."""
        return self

    def state(self) -> dict[str, Any]:
        """Plain values that `create` needs besides the classes to predict with a finished run."""
        return {}

    def of_ensemble(self, tasks: Sequence[Any]) -> Self:
        """The task of several models together, from those of each."""
        return self

    @abstractmethod
    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Outputs that say what several models, or several views of the same images, say on average.

        `tasks` are those of each model; None for this one's.
        """

    def outputs(self, model: Callable[[Tensor], Tensor], images: Tensor, tta: int = 1) -> Tensor:
        """A model's outputs; with `tta` 2 their average over the images `[..., width]` and their flips."""
        outputs = model(images)
        if tta == 1:
            return outputs
        flipped = model(images.flip(-1))
        return self.average_outputs([outputs, flipped.flip(-1) if flipped.ndim == 4 else flipped])  # maps turn back

    def sample_weights(self, train: ImageDataset) -> list[float]:
        """How often the weighted sampler draws each training image, up to a factor."""
        raise ValueError(f"sampler=weighted needs classes to balance, got task {self.name!r}")

    def collate(self, items: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Make a batch of transformed items.

        Args:
            items: Images `[channels, height, width]` of one size, targets (class numbers or tensors of one size), and,
                where the data has them, sample weights.

        Returns:
            `images` `[batch, channels, height, width]`, `labels` `[batch, ...]`, and `weights` `[batch]` if there are.
        """
        images, targets, *weights = zip(*items, strict=True)
        labels = torch.stack(list(targets)) if isinstance(targets[0], Tensor) else torch.tensor(targets)
        batch = {"images": torch.stack(list(images)), "labels": labels}
        return batch | ({"weights": torch.tensor(weights[0], dtype=torch.float32)} if weights else {})

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The training loss, 0-dim, float32 at least; `weights` are the samples' own, `[batch]`."""

    def reduce(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce the outputs of a batch to what `metrics` needs: two small tensors with a row per sample."""
        return outputs.float(), labels

    @abstractmethod
    def metrics(self, reduced: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Results on a data set, `loss` among them, as plain values."""

    @abstractmethod
    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Per-sample outputs for the run's `predictions.json`, a row per sample."""

    @abstractmethod
    def predictions(
        self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path
    ) -> Predictions | MaskPredictions | LabelSetPredictions | NumberPredictions:
        """The record of what is said about each item of a split."""

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit the best linear head on features.

        Args:
            features: `[images, width]`.
            labels: What `collate` makes of the images' targets.
            outputs: Of the head.
            weights: Sample weights `[images]`; None for ones.

        Returns:
            Weight `[outputs, width]` and bias `[outputs]`, float64.
        """
        raise ValueError(f"a linear probe needs one output an image, got task {self.name!r}")

    def probe_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """What class weights make of the samples in `fit_linear`; None for ones."""
        return None

    def save_examples(self, model: nn.Module, dataset: ImageDataset, sample_outputs: Tensor, folder: Path) -> None:
        """Save the files in the run's folder that the images of its report need; none where it shows the images."""
        return

    def report_images(self, dataset: ImageDataset, folder: Path) -> ImageSource:
        """The report's images by index."""
        return dataset.image

    @abstractmethod
    def remap_labels(self, label: Any, numbers: Sequence[int]) -> Any:
        """An item's label with the class numbers `numbers[old]`."""

    def epoch_row(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """The entries of an epoch's row that this task measures on validation, besides the loss."""
        return {f"val_{name}": scores[name] for name in self.monitors if name != "loss"}

    def selection_score(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """The score that epochs are selected by: the better monitored metric first, then the lower validation loss."""
        return self.monitors[self.monitor] * row[f"val_{self.monitor}"], -row["val_loss"]

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """An epoch's row in a few words."""
        return self.epoch_format.format_map(row)

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """The best epoch's results on validation and, where there are test images, on these."""
        text = "" if test is None else f", test {self.test_format.format_map(test)}"
        name = self.monitor_names.get(self.monitor)
        chosen_by = "" if name is None else f" ({name} {val[self.monitor]:.4f})"
        return f"validation {self.val_format.format_map(val)}{chosen_by}{text}"

    def result_text(self, scores: Mapping[str, Any]) -> str:
        """Results in a few words."""
        return self.result_format.format_map(scores)

    @abstractmethod
    def result_table(self, scores: Mapping[str, Any], classes: Sequence[str]) -> ResultTable:
        """Results class by class, or target by target."""

    final_name: ClassVar[str] = "probabilities"
    """What `final_outputs` are."""

    @abstractmethod
    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """What `predict` says of a batch, as one tensor: probabilities of the classes, or numbers in their unit.

        Args:
            outputs: Of the model.
            temperature: Of the run, which logits are divided by.
        """

    @abstractmethod
    def image_predictions(
        self, classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> Iterable[Any]:
        """What the model's outputs of a batch say about images outside a data set, one object an image."""

    @staticmethod
    @abstractmethod
    def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
        """Refuse what `write_predictions` would refuse, before anything is predicted."""

    @staticmethod
    @abstractmethod
    def write_predictions(
        predictions: Iterable[Any], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write what `image_predictions` gave as a file or a folder, and return it."""

    @staticmethod
    def prediction_text(prediction: Any, top_k: int | None) -> str:
        """What `image_predictions` gave for an image, in one line."""
        return prediction.text(top_k)

    def merged_use(self) -> str:
        """A comment in Python: how a merged model's output is read, of `model`, `transform`, `classes` and `image`."""
        return "# classes[model(transform(image.convert('RGB'))[None]).argmax()]"


def paired(outputs: ArrayLike, labels: ArrayLike, name: str = "logits") -> tuple[Tensor, np.ndarray]:
    """Outputs and labels of equally many images, at least one.

    Raises:
        ValueError: No images, or another number of labels than of outputs.
    """
    scores, truth = torch.as_tensor(np.asarray(outputs)), np.asarray(labels)
    if len(truth) == 0 or len(scores) != len(truth):
        raise ValueError(
            f"{name} and labels must have the same length of at least 1, got {len(scores)} and {len(truth)}"
        )
    return scores, truth


def unknown_class(name: str, classes: Sequence[str]) -> str:
    """The error of a name that is no class, with the nearest one."""
    return f"no class {name!r}" + nearest(name, classes, form=" (nearest: '{}')")


def check_monitor(task: type[Task], monitor: str) -> str | None:
    """The error of a metric that a task does not measure, with the nearest one; None where it does."""
    if monitor in task.monitors:
        return None
    hint = nearest(monitor.lower().replace("-", "_"), task.monitors, cutoff=0.4)
    return f"monitor must be one of {', '.join(task.monitors)} for task {task.name}, got {monitor!r}{hint}"


ClassWeights = str | Mapping[str, float] | None


def resolve_class_weights(
    setting: ClassWeights, classes: Sequence[str], balanced: Sequence[float]
) -> tuple[float, ...] | None:
    """The weight of each class.

    Args:
        setting: balanced, none, or weights by class name.
        classes: Names by number.
        balanced: What `balanced` stands for.

    Raises:
        ValueError: Names that are no class (nearest given) or classes without a weight, or weights that are negative or
            not finite.
    """
    if setting is None or setting == "none":
        return None
    if isinstance(setting, str):
        return tuple(float(weight) for weight in balanced)
    errors = [unknown_class(name, classes) for name in map(str, setting) if name not in classes]
    named = {str(name): weight for name, weight in setting.items()}
    missing = [repr(name) for name in classes if name not in named]
    if missing:
        errors.append(f"no weight for {listed(missing)}")
    wrong = [f"{name!r}: {weight}" for name, weight in named.items() if not 0 <= weight < float("inf")]
    if wrong:
        errors.append(f"weights must be at least 0 and finite, got {', '.join(wrong)}")
    if errors:
        raise ValueError(
            f"class_weights must name each class once, of {', '.join(map(repr, classes))}: {'; '.join(errors)}"
        )
    return tuple(float(named[name]) for name in classes)


def class_frequencies(labels: Sequence[int], classes: Sequence[str]) -> np.ndarray:
    """Number of images of each class, `[classes]`.

    Raises:
        ValueError: A class has none, so that nothing can be balanced by their inverse.
    """
    counts = np.bincount(labels, minlength=len(classes))
    absent = [repr(name) for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        raise ValueError(
            f"class_weights and sampler balance classes by their training images, got none of {', '.join(absent[:5])}; "
            "add images, or give class_weights by name"
        )
    return counts
