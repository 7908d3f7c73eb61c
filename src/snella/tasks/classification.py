"""Image classification: batches of (image, label), cross entropy and its variants, accuracies."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from snella.data import ImageDataset
from snella.records import Prediction, Predictions
from snella.tasks import predictions as image_outputs
from snella.tasks.losses import CLASS_LOSSES, full_precision, weighted_mean
from snella.tasks.task import ClassWeights, ResultTable, Task, class_frequencies, resolve_class_weights

INVERSE_PENALTY = 0.1
"""Of the linear probe: scikit-learn's `C` on features of mean variance 1."""
_MAX_ITERATIONS = 2000


def feature_scale(features: np.ndarray) -> float:
    """Root mean variance of features `[images, width]`, 1 where they are constant."""
    return float(np.sqrt(features.var(0).mean())) or 1.0


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    inverse_penalty: float = INVERSE_PENALTY,
    weights: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression.

    Args:
        features: `[images, width]`.
        labels: Class of each image.
        classes: How many there are; one without images keeps weights of zero.
        inverse_penalty: Weight of the sum of the images' losses beside `‖w‖²/2`.
        weights: Sample weights `[images]`; None for ones.

    Returns:
        Weight `[classes, width]` and bias `[classes]` of a softmax classifier, float64.
    """
    from sklearn.linear_model import LogisticRegression  # a second, only to fit

    scale = feature_scale(features)
    probe = LogisticRegression(C=inverse_penalty, max_iter=_MAX_ITERATIONS)
    probe.fit(features / scale, labels, sample_weight=weights)
    weight, bias = probe.coef_ / scale, probe.intercept_
    if len(probe.classes_) == 2:
        # one score for the second class is half of it for each of the two, with opposite signs
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    of_all, of_bias = torch.zeros(classes, features.shape[1], dtype=torch.float64), torch.zeros(classes).double()
    of_all[probe.classes_], of_bias[probe.classes_] = torch.from_numpy(weight), torch.from_numpy(bias)
    return of_all, of_bias


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Loss and metrics for one label per image.

    Args:
        num_classes: How many there are.
        label_smoothing: Share of the target spread over all classes.
        loss_name: One of `losses`.
        monitor: Metric that the epoch is chosen by.
        class_weights: As `--class-weights` has them: balanced, none, or weights by name.
        weight_by_class: What they are; from `fitted`.
        log_priors: Logarithm of each class's share of the training images; from `fitted`, for the logit adjustment.
    """

    num_classes: int
    label_smoothing: float = 0.0
    loss_name: str = "cross-entropy"
    monitor: str = "accuracy"
    class_weights: ClassWeights = None
    weight_by_class: tuple[float, ...] | None = None
    log_priors: tuple[float, ...] | None = None

    name: ClassVar[str] = "classification"
    settings: ClassVar[tuple[str, ...]] = ("label_smoothing", "class_weights", "sampler", "loss")
    losses: ClassVar[tuple[str, ...]] = tuple(CLASS_LOSSES)
    monitors: ClassVar[Mapping[str, int]] = {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "loss": -1}
    has_one_class: ClassVar[bool] = True
    has_linear_fit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check both values at once."""
        errors = []
        if self.num_classes < 2:
            errors.append(f"num_classes must be at least 2, got {self.num_classes}")
        if not 0.0 <= self.label_smoothing < 1.0:
            errors.append(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if errors:
            raise ValueError("; ".join(errors))

    @classmethod
    def create(
        cls,
        classes: Sequence[str],
        *,
        label_smoothing: float = 0.0,
        loss: str | None = None,
        monitor: str | None = None,
        class_weights: ClassWeights = None,
        **others: Any,
    ) -> Self:
        """Make the task for some classes."""
        first = next(iter(cls.monitors))
        return cls(len(classes), label_smoothing, loss or cls.losses[0], monitor or first, class_weights)

    def fitted(self, train: ImageDataset, classes: Sequence[str]) -> Self:
        """The task with class weights and priors of the training images.

        balanced: w_c = n / (K n_c), as scikit-learn's, whose mean over the training images is 1.
        """
        log_priors = None
        balanced: np.ndarray = np.ones(self.num_classes)
        if self.class_weights == "balanced" or self.loss_name == "logit-adjusted":
            counts = class_frequencies(train.labels, classes)
            balanced = len(train) / (len(classes) * counts)
            log_priors = tuple(np.log(counts / counts.sum()).tolist())
        weights = resolve_class_weights(self.class_weights, classes, balanced.tolist())
        return dataclasses.replace(self, weight_by_class=weights, log_priors=log_priors)

    def sample_weights(self, train: ImageDataset) -> list[float]:
        """The inverse number of images of each image's class, so that classes are drawn equally often."""
        counts = np.bincount(train.labels, minlength=self.num_classes)
        return (1 / counts[np.asarray(train.labels)]).tolist()

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the batch of the loss of each sample times its weight, computed in float32 at least.

        loss = 1/n Σ_i v_i w[y_i] l_i,   l_i = `cross_entropy`, `focal` or `logit_adjusted` of `snella.tasks.losses`

        Args:
            logits: `[batch, classes]`.
            labels: `[batch]`, or mixtures `[batch, classes]`; the weight of a mixture is that of its parts.
            weights: v, the samples' own, `[batch]`; None for ones.

        Returns:
            0-dim.
        """
        logits = full_precision(logits)
        priors = None if self.log_priors is None else torch.tensor(self.log_priors, device=logits.device)
        losses = CLASS_LOSSES[self.loss_name](logits, labels, log_priors=priors, label_smoothing=self.label_smoothing)
        if self.weight_by_class is not None:
            by_class = torch.tensor(self.weight_by_class, device=logits.device, dtype=logits.dtype)
            of_class = by_class[labels] if labels.ndim == 1 else labels.to(by_class) @ by_class
            weights = of_class if weights is None else of_class * weights.to(of_class)
        return weighted_mean(losses, weights)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the classes, `[batch, classes]`, float32 at least."""
        return full_precision(logits).softmax(dim=-1)

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Logits whose softmax is the mean of several models' class probabilities."""
        return torch.stack([self.probabilities(logits) for logits in outputs]).mean(0).log()

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Accuracy, balanced accuracy, macro F1, loss and the confusion matrix.

        Balanced accuracy and macro F1 are means over the classes that occur, of the share recognized and of
        `F1 = 2 TP / (2 TP + FP + FN)`. The loss is the plain cross entropy, without smoothing and weights, whatever is
        trained with.

        Args:
            logits: `[images, classes]`.
            labels: `[images]`.

        Returns:
            `accuracy`, `balanced_accuracy`, `macro_f1`, `loss` and `confusion` (rows are true classes, columns
            predicted ones).

        Raises:
            ValueError: No images, or another number of labels than of rows.
        """
        scores, truth = _checked(logits, labels)
        predicted = scores.argmax(dim=-1).numpy()
        return {
            **class_scores(truth, predicted, self.num_classes),
            "loss": float(F.cross_entropy(full_precision(scores), torch.as_tensor(truth, dtype=torch.long))),
        }

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Probabilities `[images, classes]` from logits."""
        return self.probabilities(torch.as_tensor(np.asarray(reduced)))

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> Predictions:
        """Label, probabilities and group of each image."""
        groups: Sequence[str | None] = dataset.annotations.groups or [None] * len(dataset)
        rows = zip(dataset.names, dataset.labels, sample_outputs.tolist(), groups, strict=True)
        items = [
            Prediction(index, name, int(label), [round(p, 6) for p in row], group=group)
            for index, (name, label, row, group) in enumerate(rows)
        ]
        return Predictions(split, items=items)

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """A logistic regression, `fit_probe`."""
        return fit_probe(features, labels, outputs, weights=weights)

    def probe_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """The weight of each image's class."""
        return None if self.weight_by_class is None else np.asarray(self.weight_by_class)[labels]

    def remap_labels(self, label: int, numbers: Sequence[int]) -> int:
        """The class number `numbers[label]`."""
        return numbers[label]

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """Both accuracies."""
        return f"accuracy {row['val_accuracy']:.4f}  balanced {row['val_balanced_accuracy']:.4f}"

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """Accuracies, and on validation what the epoch was chosen by."""
        text = "" if test is None else f", test {test['accuracy']:.4f} (balanced {test['balanced_accuracy']:.4f})"
        name = {"balanced_accuracy": "balanced", "macro_f1": "macro F1"}.get(self.monitor)
        chosen_by = "" if name is None else f" ({name} {val[self.monitor]:.4f})"
        return f"validation {val['accuracy']:.4f}{chosen_by}{text}"

    def result_text(self, scores: Mapping[str, Any]) -> str:
        """Both accuracies and the loss."""
        return (
            f"accuracy {scores['accuracy']:.4f}, balanced accuracy {scores['balanced_accuracy']:.4f}, "
            f"loss {scores['loss']:.4f}"
        )

    def result_table(self, scores: Mapping[str, Any], classes: Sequence[str]) -> ResultTable:
        """The confusion matrix."""
        rows = [[name, *map(str, row)] for name, row in zip(classes, scores["confusion"], strict=True)]
        return ResultTable("true class (rows) and predicted class (columns)", ["", *classes], rows)

    def image_predictions(
        self, classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[image_outputs.Prediction]:
        """All classes with their probabilities, the likeliest first."""
        return image_outputs.class_predictions(classes, paths, self.probabilities(outputs))

    check_output = staticmethod(image_outputs.check_output)
    write_predictions = staticmethod(image_outputs.write_predictions)
    prediction_text = staticmethod(image_outputs.class_text)


def class_scores(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, Any]:
    """`accuracy`, `balanced_accuracy`, `macro_f1` and `confusion` of class numbers `[images]`."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score  # a second, only to measure

    present = np.unique(truth)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=present, average="macro")),
        "macro_f1": float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0)),
        "confusion": confusion_matrix(truth, predicted, labels=range(num_classes)).tolist(),
    }


def _checked(outputs: ArrayLike, labels: ArrayLike) -> tuple[Tensor, np.ndarray]:
    """Outputs and labels of equally many images, at least one."""
    scores, truth = torch.as_tensor(np.asarray(outputs)), np.asarray(labels)
    if len(truth) == 0 or len(scores) != len(truth):
        raise ValueError(
            f"logits and labels must have the same length of at least 1, got {len(scores)} and {len(truth)}"
        )
    return scores, truth
