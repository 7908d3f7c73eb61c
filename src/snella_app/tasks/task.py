"""`Task`: the interface of tasks for training, evaluation, prediction, and reports."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from snella_app.backbones.create import create_backbone
from snella_app.data.datasets import ImageDataset, MaskDataset
from snella_app.data.options import TargetKind
from snella_app.records.predictions import LabelSetPredictions, MaskPredictions, NumberPredictions, Predictions
from snella_app.report.examples import ImageLoader
from snella_app.tasks import predictions as image_outputs
from snella_app.text import listed, nearest

_CROP_ENLARGEMENT = 8 / 7  # upscaling before corner crops, e.g. from 224 to 256 pixels
_CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))
"""Corners of the crops in order, as (bottom, right), where 1 stands for the bottom or right side."""
MAX_VIEWS = 2 * (1 + len(_CORNERS))
"""Maximum number of test-time augmentation views: the image, four corner crops, and their flips."""


class Task(ABC):
    """Base class of tasks.

    `reduce` converts the outputs of a batch to two small tensors. These are concatenated over a dataset for `metrics`
    and `sample_outputs`. `state` contains the statistics that prediction needs, from the training images
    (`fitted`) and the validation images (`calibrated`); `run.json` stores it.

    Attributes:
        monitor: Metric for epoch selection, one of `monitors`.
    """

    name: ClassVar[str]
    """Value of `--task`."""
    head: ClassVar[str | None] = None
    """Name of the new module that is fully trained, or None for the head that the model declares."""
    target: ClassVar[TargetKind] = "class"
    """Content of the label column, or `masks` for tasks that predict masks (see `load_data`)."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Task-specific settings of a run."""
    outputs_name: ClassVar[str] = "classes"
    """Name of the outputs in summaries."""
    losses: ClassVar[tuple[str, ...]] = ()
    """Choices of `--loss`, default first."""
    monitors: ClassVar[Mapping[str, int]]
    """Choices of `--monitor`, default first, with 1 if higher values are better and -1 if lower ones are."""
    has_class_scores: ClassVar[bool] = False
    """True if the outputs are softmax logits of one class per image, which temperature scaling can calibrate."""
    augment: ClassVar[str] = "crop"
    """Augmentation for `--augment auto`. Regression and segmentation use flip, since crops change their targets."""
    has_linear_fit: ClassVar[bool] = False
    """True if `fit_linear` is supported."""
    epoch_format: ClassVar[str]
    """Format string of an epoch's validation scores."""
    val_format: ClassVar[str]
    """Format string of the final validation scores."""
    test_format: ClassVar[str]
    """Format string of the test scores."""
    result_format: ClassVar[str]
    """Format string of all main scores."""
    monitor_names: ClassVar[Mapping[str, str]] = {}
    """Display names of metrics that `final_text` adds to `val_format` if they are monitored."""
    final_name: ClassVar[str] = "probabilities"
    """Name of the values that `final_outputs` returns."""

    monitor: str

    @property
    def has_kernel_fit(self) -> bool:
        """True if a head fitted after training may use kernel ridge regression of one-hot labels."""
        return False

    build_model: ClassVar[Callable[..., nn.Module]] = staticmethod(create_backbone)
    """Build the pre-trained model with a new head."""
    check_output: ClassVar[Callable[..., None]] = staticmethod(image_outputs.check_output)
    """Check the output arguments of `write_predictions` before prediction."""
    write_predictions: ClassVar[Callable[..., Path]] = staticmethod(image_outputs.write_predictions)
    """Write the results of `image_predictions` to a file or folder and return its path."""

    @staticmethod
    def count_outputs(classes: Sequence[str]) -> int:
        """Return the number of outputs of the model's head."""
        return len(classes)

    @classmethod
    def order_classes(cls, classes: Sequence[str], order: str | None) -> list[str]:
        """Return the classes in index order."""
        return list(classes)

    def check_data(self, dataset: ImageDataset, spec: str) -> None:
        """Raise ValueError if the images have masks, but the task does not use them.

        `load_data` rejects images without masks for tasks that need them.
        """
        if isinstance(dataset, MaskDataset) and self.target != "masks":
            raise ValueError(
                f"task must be segmentation for images with masks such as {spec}, got {self.name!r}; "
                "add --task segmentation"
            )

    def encode(self, target: Any) -> Any:
        """Convert a label-column value to a training target. Classes and masks need no conversion."""
        return target

    def fitted(self, train: ImageDataset) -> Self:
        """Return the task with statistics of the training targets."""
        return self

    def calibrated(self, reduced: ArrayLike, labels: ArrayLike) -> Self:
        """Return the task calibrated on the final validation outputs."""
        return self

    def state(self) -> dict[str, Any]:
        """Return the values, besides the classes, that `create_task` needs to restore the task for prediction."""
        return {}

    def for_ensemble(self, tasks: Sequence[Any]) -> Self:
        """Return the task of an ensemble of models with the given tasks."""
        return self

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Average the outputs of several models or several views.

        The base class returns logits whose softmax over dimension 1 is the mean of the probabilities.

        Args:
            outputs: Outputs of each model or view.
            tasks: Task of each model; None uses this task for all.
        """
        logs = torch.stack([full_precision(logits).log_softmax(1) for logits in outputs])
        return logs.logsumexp(0) - math.log(len(outputs))

    def outputs(self, model: Callable[[Tensor], Tensor], images: Tensor, tta: int = 1) -> Tensor:
        """Return a model's outputs, averaged over the first `tta` views of the images.

        Args:
            model: Maps a batch to outputs.
            images: `[images, channels, height, width]`.
            tta: Number of test-time augmentation views, up to `MAX_VIEWS`: the images, their horizontal flips, then
                corner crops of the enlarged images, each followed by its flip. Masks allow at most two views.
        """
        outputs: list[Tensor] = []
        for view in range(tta):
            output = model(_view(images, view))
            if output.ndim == 4 and view == 1:  # masks are flipped back
                output = output.flip(-1)
            outputs.append(output)
        return outputs[0] if tta == 1 else self.average_outputs(outputs)

    def sample_weights(self, train: ImageDataset) -> list[float]:
        """Return unnormalized sampling weights of the training images for the weighted sampler.

        Raises:
            ValueError: If the task does not assign classes to whole images.
        """
        raise ValueError(f"sampler=weighted requires images with classes, got task {self.name!r}")

    def collate(self, items: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Collate transformed items into a batch.

        Args:
            items: Images `[channels, height, width]` of equal size, targets (class indices or tensors of equal size),
                and optional sample weights.

        Returns:
            `images` `[batch, channels, height, width]`, `labels` `[batch, ...]`, and optional `weights` `[batch]`.
        """
        images, targets, *weights = zip(*items, strict=True)
        labels = torch.stack(list(targets)) if isinstance(targets[0], Tensor) else torch.tensor(targets)
        batch = {"images": torch.stack(list(images)), "labels": labels}
        if weights:
            batch["weights"] = torch.tensor(weights[0], dtype=torch.float32)
        return batch

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Compute the training loss, 0-dim, at least float32. `weights` are sample weights, `[batch]`."""

    def reduce(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce the outputs of a batch to the inputs of `metrics`: two small tensors with one row per sample."""
        return outputs.float(), labels

    @abstractmethod
    def metrics(self, reduced: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Compute scores on a dataset, including `loss`, as plain values.

        Raises:
            ValueError: If there are no images, or `reduced` and `labels` differ in length.
        """

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Compute per-sample outputs for `predictions.json`, one row per sample."""
        return self.final_outputs(torch.as_tensor(np.asarray(reduced)))

    @abstractmethod
    def predictions(
        self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path
    ) -> Predictions | MaskPredictions | LabelSetPredictions | NumberPredictions:
        """Build the record of the predictions on a split."""

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit a linear head to features.

        Args:
            features: `[images, width]`.
            labels: Collated targets of the images.
            outputs: Number of outputs of the head.
            weights: Sample weights `[images]`; None means equal weights.

        Returns:
            Weight `[outputs, width]` and bias `[outputs]`, float64.

        Raises:
            ValueError: If `has_linear_fit` is False.
        """
        raise ValueError(f"a linear probe requires a task with one output vector per image, got {self.name!r}")

    def probe_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """Return the sample weights for `fit_linear` that follow from the class weights; None for equal weights."""
        return None

    def save_examples(self, model: nn.Module, dataset: ImageDataset, sample_outputs: Tensor, folder: Path) -> None:
        """Write files for the report's images to the run folder. The base class writes none."""
        return

    def report_images(self, dataset: ImageDataset, folder: Path) -> ImageLoader:
        """Return a function that loads an image for the report by its index."""
        return dataset.image

    @abstractmethod
    def remap_labels(self, label: Any, numbers: Sequence[int]) -> Any:
        """Map class indices in an item's label: `numbers[old]` is the new index."""

    def epoch_row(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """Return the validation entries of an epoch's row, except the loss."""
        return {f"val_{name}": scores[name] for name in self.monitors if name != "loss"}

    def selection_score(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Return the score for epoch selection: the monitored metric; a lower validation loss breaks ties.

        NaN, e.g. R² of constant targets, is the lowest score.
        """
        score = self.monitors[self.monitor] * row[f"val_{self.monitor}"]
        return -math.inf if math.isnan(score) else score, -row["val_loss"]

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """Format the final validation scores and, if present, the test scores."""
        test_text = "" if test is None else f", test {self.test_format.format_map(test)}"
        name = self.monitor_names.get(self.monitor)
        monitored = "" if name is None else f" ({name} {val[self.monitor]:.4f})"
        return f"validation {self.val_format.format_map(val)}{monitored}{test_text}"

    @abstractmethod
    def result_table(self, scores: Mapping[str, Any]) -> Table:
        """Return a table of the scores by class or target, or the confusion matrix."""

    @abstractmethod
    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Convert model outputs to predictions: class probabilities, or regression values in their unit.

        `temperature` is the calibrated divisor of the logits; regression and segmentation ignore it.
        """

    @abstractmethod
    def image_predictions(self, paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor) -> Sequence[Any]:
        """Convert model outputs of images outside a dataset to prediction objects, one per image."""

    def decoding_comment(self, outputs: str) -> str:
        """Return a Python comment with code that decodes `outputs`, an expression for the outputs of a batch of one."""
        return f"# classes[{outputs}.argmax()]"


def full_precision(outputs: Tensor) -> Tensor:
    """Cast half precision to float32 for softmax, sigmoid and their logarithms, and return other dtypes unchanged."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted mean `Σ_i w_i l_i / n`, 0-dim.

    The divisor is the number of samples, not the sum of weights, so a sample's gradient does not depend on the other
    weights in the batch. Balanced class weights have mean 1 over the training images.

    Args:
        losses: `[batch]`.
        weights: `[batch]`; None means equal weights.
    """
    return (losses if weights is None else losses * weights.to(losses)).mean()


def paired(outputs: ArrayLike, labels: ArrayLike) -> tuple[Tensor, np.ndarray]:
    """Return outputs as a tensor and labels as an array; raise ValueError if their lengths differ or are 0."""
    scores = torch.as_tensor(np.asarray(outputs))
    truth = np.asarray(labels)
    if len(truth) == 0 or len(scores) != len(truth):
        raise ValueError(
            f"outputs and labels must have the same length of at least 1, got {len(scores)} and {len(truth)}"
        )
    return scores, truth


def unknown_class(name: str, classes: Sequence[str]) -> str:
    """Return the error message for an unknown class name, with the nearest class, if any is similar."""
    return f"no class {name!r}" + nearest(name, classes, form=" (nearest: '{}')")


ClassWeights = str | Mapping[str, float] | None


def resolve_class_weights(
    setting: ClassWeights, classes: Sequence[str], balanced: Sequence[float]
) -> tuple[float, ...] | None:
    """Return the weight of each class, or None for equal weights.

    `balanced` contains the weights for the setting `balanced`.

    Raises:
        ValueError: If a name is not a class, a class has no weight, a weight is negative or not finite, or all are 0.
    """
    if setting is None or setting == "none":
        return None
    if isinstance(setting, str):
        return tuple(float(weight) for weight in balanced)
    errors = [unknown_class(name, classes) for name in map(str, setting) if name not in classes]
    weights = {str(name): weight for name, weight in setting.items()}
    missing = [repr(name) for name in classes if name not in weights]
    if missing:
        errors.append(f"no weight for {listed(missing)}")
    invalid = [f"{name!r}: {weight}" for name, weight in weights.items() if not 0 <= weight < float("inf")]
    if invalid:
        errors.append(f"weights must be at least 0 and finite, got {', '.join(invalid)}")
    if weights and not any(weights.values()):
        errors.append(f"at least one weight must be above 0, got 0 for all {len(weights)}")
    if errors:
        raise ValueError(
            f"class_weights must have one weight per class ({', '.join(map(repr, classes))}): {'; '.join(errors)}"
        )
    return tuple(float(weights[name]) for name in classes)


def _view(images: Tensor, view: int) -> Tensor:
    """Return one view of a batch, `[images, channels, height, width]`.

    Views come in pairs, of which the second is flipped: the whole images first, then crops at `_CORNERS`.
    """
    crop, is_flipped = divmod(view, 2)
    if crop:
        height, width = images.shape[-2:]
        size = (round(height * _CROP_ENLARGEMENT), round(width * _CROP_ENLARGEMENT))
        enlarged = F.interpolate(images, size, mode="bicubic", align_corners=False)
        bottom, right = _CORNERS[crop - 1]
        top, left = bottom * (size[0] - height), right * (size[1] - width)
        images = enlarged[..., top : top + height, left : left + width]
    return images.flip(-1) if is_flipped else images
