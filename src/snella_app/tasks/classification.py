"""Classification with one class per image, and ordinal classification, whose classes are ordered."""

import csv
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from rich.table import Table
from torch import Tensor

from snella_app.console import make_table
from snella_app.data.datasets import ImageDataset
from snella_app.records.predictions import Predictions, StoredPrediction
from snella_app.tasks.linear_fit import fit_binary_probe, fit_probe
from snella_app.tasks.predictions import Prediction
from snella_app.tasks.task import (
    ClassWeights,
    Task,
    full_precision,
    paired,
    resolve_class_weights,
    unknown_class,
    weighted_mean,
)
from snella_app.text import listed

FOCAL_GAMMA = 2.0
"""Exponent γ of the focal losses, the default in the paper (see `focal`)."""
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
"""Number at the beginning of a class name."""


def focal(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the focal loss of each sample, `[batch]`, with low weights for well-classified samples.

    l_i = -Σ_c q[i, c] (1 - p[i, c])^γ log p[i, c],   p = softmax(logits),   q = (1 - ε) target + ε / classes,   γ = 2

    Source: Lin et al., 2017, arXiv 1708.02002, eq. 4, extended to several classes.

    Args:
        logits: `[batch, classes]`, float32 or float64.
        labels: `[batch]` int64, or targets `[batch, classes]` whose rows sum to 1, e.g. from mixup.
        label_smoothing: ε.
    """
    log_p = logits.log_softmax(-1)
    q = labels.to(log_p) if labels.ndim > 1 else F.one_hot(labels, logits.shape[-1]).to(log_p)
    q = q * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    return -(q * (1 - log_p.exp()) ** FOCAL_GAMMA * log_p).sum(-1)


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Loss and metrics for one label per image.

    Args:
        classes: Class names by index.
        label_smoothing: Label smoothing ε.
        loss_name: One of `losses`.
        monitor: Metric for epoch selection.
        class_weights: Value of `--class-weights`: balanced, none, or weights by name.
        weight_by_class: Resolved class weights; set by `fitted`.
        log_priors: Log class frequencies of the training images for logit adjustment; set by `fitted`.
    """

    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    loss_name: str = "cross-entropy"
    monitor: str = "accuracy"
    class_weights: ClassWeights = None
    weight_by_class: tuple[float, ...] | None = None
    log_priors: tuple[float, ...] | None = None

    name: ClassVar[str] = "classification"
    settings: ClassVar[tuple[str, ...]] = ("label_smoothing", "class_weights", "sampler", "loss")
    losses: ClassVar[tuple[str, ...]] = ("cross-entropy", "focal", "logit-adjusted")
    monitors: ClassVar[Mapping[str, int]] = {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "loss": -1}
    has_class_scores: ClassVar[bool] = True
    has_linear_fit: ClassVar[bool] = True
    epoch_format: ClassVar[str] = "accuracy {val_accuracy:.4f}  balanced {val_balanced_accuracy:.4f}"
    val_format: ClassVar[str] = "{accuracy:.4f}"
    monitor_names: ClassVar[Mapping[str, str]] = {"balanced_accuracy": "balanced", "macro_f1": "macro F1"}
    test_format: ClassVar[str] = "{accuracy:.4f} (balanced {balanced_accuracy:.4f})"
    result_format: ClassVar[str] = "accuracy {accuracy:.4f}, balanced accuracy {balanced_accuracy:.4f}, loss {loss:.4f}"

    def __post_init__(self) -> None:
        """Check the number of classes."""
        if len(self.classes) < 2:
            raise ValueError(f"classes must have at least 2 entries, got {list(self.classes)}")

    @property
    def has_kernel_fit(self) -> bool:
        """True for cross-entropy. Ridge regression with a fitted scale does not model the other losses."""
        return self.loss_name == "cross-entropy"

    def fitted(self, train: ImageDataset) -> Self:
        """Return the task with class weights and priors of the training images.

        Balanced weights are w_c = n / (K n_c), as in scikit-learn, for n images of K classes, n_c of them in class c.
        Their mean over the training images is 1.

        Raises:
            ValueError: If `class_weights` is invalid, or a class has no images although balanced weights or priors need
                them.
        """
        log_priors = None
        balanced: np.ndarray = np.ones(len(self.classes))
        if self.class_weights == "balanced" or self.loss_name == "logit-adjusted":
            counts = np.bincount(train.labels, minlength=len(self.classes))
            absent = [repr(name) for name, count in zip(self.classes, counts, strict=True) if count == 0]
            if absent:
                raise ValueError(
                    "class_weights=balanced and loss=logit-adjusted need training images of every class, got none of "
                    f"{listed(absent)}; add images, pass class_weights by name, or choose another loss"
                )
            balanced = len(train) / (len(self.classes) * counts)
            log_priors = tuple(np.log(counts / counts.sum()).tolist())
        weights = resolve_class_weights(self.class_weights, self.classes, balanced.tolist())
        return dataclasses.replace(self, weight_by_class=weights, log_priors=log_priors)

    def sample_weights(self, train: ImageDataset) -> list[float]:
        """Return the inverse frequency of each image's class, so that classes are sampled uniformly."""
        counts = np.bincount(train.labels, minlength=len(self.classes))
        return (1 / counts[np.asarray(train.labels)]).tolist()

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Compute the weighted mean loss of the batch, in float32 or wider.

        loss = 1/n Σ_i v_i w[y_i] l_i

        `logits` is `[batch, classes]`. `labels` is `[batch]`, or mixed targets `[batch, classes]`, whose class weights
        are mixed accordingly. `weights` are the sample weights v, w are the class weights, and l_i is the loss of
        sample i.
        """
        logits = full_precision(logits)
        losses = self._losses(logits, labels)
        if self.weight_by_class is not None:
            by_class = torch.tensor(self.weight_by_class, device=logits.device, dtype=logits.dtype)
            class_weights = by_class[labels] if labels.ndim == 1 else labels.to(by_class) @ by_class
            weights = class_weights if weights is None else class_weights * weights.to(class_weights)
        return weighted_mean(losses, weights)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss l of each sample, `[batch]`.

        `logit-adjusted` is the cross-entropy of `logits + log π`, where π_c is the fraction of training images of class
        c. The shift applies only in training; the argmax of the unshifted logits minimizes the balanced error.

        Source: Menon et al., 2021, arXiv 2007.07314, eq. 10, with τ = 1.
        """
        if self.loss_name == "focal":
            return focal(logits, labels, self.label_smoothing)
        if self.loss_name == "logit-adjusted":
            logits = logits + torch.tensor(self.log_priors, device=logits.device).to(logits)
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Compute the softmax over classes, `[batch, classes]`, at least float32."""
        return full_precision(logits).softmax(dim=-1)

    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Return class probabilities, `[batch, classes]`."""
        return self.probabilities(outputs / temperature)

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Compute accuracy, balanced accuracy, macro F1, loss, and the confusion matrix.

        Balanced accuracy is the mean recall of the classes that occur in `labels`, and macro F1 is the mean of their
        `F1 = 2 TP / (2 TP + FP + FN)`. The loss is the plain cross-entropy without smoothing or weights, regardless of
        the training loss. Rows of the confusion matrix are true classes; columns are predicted classes.

        Args:
            logits: `[images, classes]`.
            labels: `[images]`.
        """
        scores, truth = paired(logits, labels)
        predicted = scores.argmax(dim=-1).numpy()
        return {
            **class_scores(truth, predicted, len(self.classes)),
            "loss": float(F.cross_entropy(full_precision(scores), torch.as_tensor(truth, dtype=torch.long))),
        }

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> Predictions:
        """Return the label, probabilities, and group of each image."""
        groups: Sequence[str | None] = dataset.annotations.groups or [None] * len(dataset)
        rows = zip(dataset.names, dataset.labels, sample_outputs.tolist(), groups, strict=True)
        items: list[StoredPrediction] = []
        for index, (name, label, row, group) in enumerate(rows):
            probabilities = [round(p, 6) for p in row]
            items.append(StoredPrediction(index, name, int(label), probabilities, group=group))
        return Predictions(split, items=items)

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit a logistic regression with `fit_probe`."""
        return fit_probe(features, labels, outputs, weights=weights)

    def probe_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """Return the class weight of each image."""
        return None if self.weight_by_class is None else np.asarray(self.weight_by_class)[labels]

    def remap_labels(self, label: int, numbers: Sequence[int]) -> int:
        """Return the class index `numbers[label]`."""
        return numbers[label]

    def result_table(self, scores: Mapping[str, Any]) -> Table:
        """Return the confusion matrix as a table."""
        rows = [[name, *map(str, row)] for name, row in zip(self.classes, scores["confusion"], strict=True)]
        return make_table(["", *self.classes], rows, title="true class (rows) and predicted class (columns)")

    def image_predictions(
        self, paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[Prediction]:
        """Return all classes with their probabilities for each image, most likely first."""
        return [
            Prediction(path, sorted(zip(self.classes, row, strict=True), key=lambda pair: -pair[1]))
            for path, row in zip(paths, self.probabilities(outputs).cpu().tolist(), strict=True)
        ]


def class_scores(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Compute `accuracy`, `balanced_accuracy`, `macro_f1`, and `confusion` from true and predicted class indices."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score  # lazy: slow import

    present = np.unique(truth)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=present, average="macro")),
        "macro_f1": float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0)),
        "confusion": confusion_matrix(truth, predicted, labels=range(num_classes)).tolist(),
    }


def rank_order(classes: Sequence[str], order: str | None) -> list[str]:
    """Sort classes from lowest to highest: as listed in the comma-separated `order`, or by their leading numbers.

    Raises:
        ValueError: If `order` does not list each class once, or is None and the names do not begin with distinct
            numbers.
    """
    if order is None:
        matches = [_NUMBER.match(name) for name in classes]
        numbers = [float(match[0]) for match in matches if match]
        if len(set(numbers)) != len(classes):
            raise ValueError(
                f"class_order must list the classes from lowest to highest for task ordinal, e.g. "
                f"{','.join(classes)}, got none; it is optional if all names begin with distinct numbers"
            )
        return [name for _, name in sorted(zip(numbers, classes, strict=True))]
    names = [name.strip() for name in next(csv.reader([order], skipinitialspace=True), [])]
    errors = [unknown_class(name, classes) for name in names if name not in classes]
    missing = [repr(name) for name in classes if name not in names]
    if missing:
        errors.append(f"no {', '.join(missing)}")
    if len(set(names)) < len(names):
        errors.append("duplicate class")
    if errors:
        raise ValueError(f"class_order must list each class once, got {order!r}: {'; '.join(errors)}")
    return names


def corn(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the CORN loss (conditional ordinal regression) of each sample from logits of `P(y > k | y ≥ k)`.

    l_i = -1/(K - 1) Σ_{k ≤ y_i, k < K - 1} ( [y_i > k] log σ(z[i, k]) + [y_i = k] log σ(-z[i, k]) )

    A sample of rank y contributes to the first min(y + 1, K - 1) binary outputs. The mean over a batch of n samples is
    Shi et al.'s loss with the divisor n (K - 1) instead of the number of conditional samples.

    Source: CORN, Shi, Cao, and Raschka, 2023, arXiv 2111.08851, eq. 5.

    Args:
        logits: `[batch, K - 1]`, float32 or float64.
        labels: `[batch]`, ranks from 0 to K - 1, int64.

    Returns:
        `[batch]`.
    """
    thresholds = torch.arange(logits.shape[-1], device=logits.device)
    is_above = (labels[:, None] > thresholds).to(logits)
    is_conditioned = (labels[:, None] >= thresholds).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, is_above, reduction="none")
    return (losses * is_conditioned).sum(-1) / logits.shape[-1]


def corn_probabilities(logits: Tensor) -> Tensor:
    """Compute class probabilities from CORN's logits, `[batch, K]`.

    P(y > k) = Π_{j ≤ k} σ(z[j]),   P(y = k) = P(y > k - 1) - P(y > k)

    Args:
        logits: `[batch, K - 1]`, float32 or float64.
    """
    above = F.logsigmoid(logits).cumsum(-1).exp()  # ONNX has no cumulative product
    first_column = above[:, :1]  # a new tensor of a given shape would fix the batch size of a traced graph
    ones = torch.ones_like(first_column)
    zeros = torch.zeros_like(first_column)
    return torch.cat([ones, above], -1) - torch.cat([above, zeros], -1)


@dataclass(frozen=True)
class OrdinalTask(ClassificationTask):
    """Loss and metrics for one of K ordered classes per image.

    The head has K - 1 outputs: logits of P(y > k | y ≥ k). The predicted rank is the number of ranks k with
    P(y > k) > 1/2. It is the median of the class distribution and minimizes the expected absolute rank error.

    Source: CORN, Shi, Cao, and Raschka, 2023, arXiv 2111.08851.
    """

    loss_name: str = "corn"
    monitor: str = "mae"

    name: ClassVar[str] = "ordinal"
    settings: ClassVar[tuple[str, ...]] = ("class_order", "class_weights", "sampler")
    losses: ClassVar[tuple[str, ...]] = ()
    monitors: ClassVar[Mapping[str, int]] = {
        **{"mae": -1, "kappa": 1, "accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "loss": -1}
    }
    has_class_scores: ClassVar[bool] = False
    epoch_format: ClassVar[str] = "MAE {val_mae:.4f} ranks  kappa {val_kappa:.4f}  accuracy {val_accuracy:.4f}"
    val_format: ClassVar[str] = "MAE {mae:.4f} ranks"
    monitor_names: ClassVar[Mapping[str, str]] = {}
    test_format: ClassVar[str] = "{mae:.4f} ranks (kappa {kappa:.4f})"
    result_format: ClassVar[str] = (
        "MAE {mae:.4f} ranks, quadratic weighted kappa {kappa:.4f}, " + ClassificationTask.result_format
    )

    def __post_init__(self) -> None:
        """Check the number of classes."""
        if len(self.classes) < 3:
            raise ValueError(
                f"task ordinal needs at least 3 classes, got {len(self.classes)}; use --task classification"
            )

    @staticmethod
    def count_outputs(classes: Sequence[str]) -> int:
        """Return the number of classes minus one."""
        return len(classes) - 1

    @classmethod
    def order_classes(cls, classes: Sequence[str], order: str | None) -> list[str]:
        """Sort classes from lowest to highest with `rank_order`."""
        return rank_order(classes, order)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the CORN loss of each sample from logits `[batch, K - 1]` and ranks `[batch]`."""
        return corn(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Compute class probabilities, `[batch, K]`, at least float32."""
        return corn_probabilities(full_precision(logits))

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Return the CORN logits of the mean class probabilities."""
        mean = torch.stack([self.probabilities(logits) for logits in outputs]).mean(0)
        from_rank = mean.flip(-1).cumsum(-1).flip(-1).clamp(max=1.0)  # P(y ≥ k)
        tiny = torch.finfo(mean.dtype).tiny  # avoids 0 / 0 for ranks far above the predicted one
        conditional = from_rank[:, 1:] / from_rank[:, :-1].clamp(min=tiny)
        return conditional.logit(eps=1e-7)  # eps keeps the logits finite

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Compute rank errors, quadratic weighted kappa, and classification metrics.

        mae = mean |rank - true rank|,   kappa = 1 - Σ (i - j)² O[i, j] / Σ (i - j)² E[i, j]

        O counts images by true and predicted rank; E is its expectation under independence. The loss is the CORN loss
        without weights.

        Args:
            logits: `[images, K - 1]`.
            labels: `[images]`.
        """
        from sklearn.metrics import cohen_kappa_score  # lazy: slow import

        scores, truth = paired(logits, labels)
        ranks = predicted_ranks(self.probabilities(scores)).numpy()
        rank_labels = list(range(len(self.classes)))
        is_constant = len({*truth.tolist(), *ranks.tolist()}) == 1  # all correct; kappa would be 0 / 0
        kappa = 1.0 if is_constant else cohen_kappa_score(truth, ranks, labels=rank_labels, weights="quadratic")
        return {
            "mae": float(np.abs(ranks - truth).mean()),
            "kappa": float(kappa),
            **class_scores(truth, ranks, len(self.classes)),
            "loss": float(corn(full_precision(scores), torch.as_tensor(truth, dtype=torch.long)).mean()),
        }

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> Predictions:
        """Return the label, probabilities, and predicted rank of each image."""
        without_ranks = super().predictions(dataset, sample_outputs, split, folder)
        ranks = predicted_ranks(sample_outputs).tolist()
        items = [dataclasses.replace(item, rank=rank) for item, rank in zip(without_ranks.items, ranks, strict=True)]
        return dataclasses.replace(without_ranks, items=items)

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit a logistic regression of P(y > k | y ≥ k) for each rank k."""
        fits = []
        for rank in range(outputs):
            is_conditioned = labels >= rank
            rank_weights = None if weights is None else weights[is_conditioned]
            fits.append(fit_binary_probe(features[is_conditioned], labels[is_conditioned] > rank, rank_weights))
        weight, bias = zip(*fits, strict=True)
        return torch.stack(weight), torch.stack(bias)

    def image_predictions(
        self, paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[Prediction]:
        """Return all classes for each image: the predicted class first, then the others, most likely first."""
        ranks = predicted_ranks(self.probabilities(outputs)).tolist()
        by_probability = super().image_predictions(paths, images, outputs)
        return [
            # stable sort: the other classes remain ordered by probability
            dataclasses.replace(item, ranking=sorted(item.ranking, key=lambda pair: pair[0] != self.classes[rank]))
            for item, rank in zip(by_probability, ranks, strict=True)
        ]

    def decoding_comment(self, outputs: str) -> str:
        """Return a comment with code that computes the class with the median rank."""
        return f"# classes[({outputs}.sigmoid().cumprod(1) > 0.5).sum()]"


def predicted_ranks(probabilities: Tensor) -> Tensor:
    """Return median ranks, `[images]` int64, from probabilities `[images, K]`: the number of k with P(y > k) > 1/2."""
    above = 1 - probabilities.cumsum(-1)[:, :-1]  # P(y > k)
    return (above > 0.5).sum(-1)
