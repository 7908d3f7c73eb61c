"""Several labels an image: one sigmoid a class, binary cross entropy, average precision, thresholds from validation."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from snella_app.data import ImageDataset
from snella_app.records import LabelSetPrediction, LabelSetPredictions
from snella_app.tasks import predictions as image_outputs
from snella_app.tasks.classification import fit_binary_probe
from snella_app.tasks.losses import LABEL_SET_LOSSES, full_precision, weighted_mean
from snella_app.tasks.task import ClassWeights, ResultTable, Task, paired, resolve_class_weights

_THRESHOLD = 0.5


def best_thresholds(probabilities: np.ndarray, truth: np.ndarray) -> list[float]:
    """For each class the threshold of the highest F1, of equals the one nearest to 1/2; 1/2 for a class without images.

    Thresholds lie in the middle between two neighboring probabilities, and a label is given where its probability is at
    least the threshold.

    Args:
        probabilities: `[images, classes]`.
        truth: `[images, classes]`, 0 and 1.

    Returns:
        One number a class, in [0, 1].
    """
    thresholds = []
    for scores, labels in zip(probabilities.T, truth.T, strict=True):
        order = np.argsort(-scores, kind="stable")
        ranked, hits = scores[order], labels[order].cumsum()
        if len(hits) == 0 or hits[-1] == 0:
            thresholds.append(_THRESHOLD)
            continue
        f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
        middles = (ranked + np.append(ranked[1:], 0.0)) / 2
        is_edge = np.append(ranked[1:] < ranked[:-1], True)  # equal probabilities cannot be told apart
        best = is_edge & (f1 >= f1[is_edge].max() - 1e-12)
        thresholds.append(float(min(middles[best], key=lambda middle: abs(middle - _THRESHOLD))))
    return thresholds


@dataclass(frozen=True)
class MultiLabelTask(Task):
    """Loss and metrics for any number of labels per image.

    Args:
        classes: Names by number.
        label_smoothing: ε of the targets `(1 - ε) label + ε / 2`.
        loss_name: One of `losses`.
        monitor: Metric that the epoch is chosen by.
        class_weights: As `--class-weights` has them: balanced, none, or weights by name.
        positive_weights: What they are, on the labels that an image has; from `fitted`.
        thresholds: Probability from which an image has a label; from `calibrated`.
    """

    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    loss_name: str = "cross-entropy"
    monitor: str = "map"
    class_weights: ClassWeights = None
    positive_weights: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] = ()

    name: ClassVar[str] = "multilabel"
    target: ClassVar[Any] = "labels"
    settings: ClassVar[tuple[str, ...]] = ("label_smoothing", "class_weights", "sampler", "loss")
    outputs_name: ClassVar[str] = "labels"
    losses: ClassVar[tuple[str, ...]] = tuple(LABEL_SET_LOSSES)
    monitors: ClassVar[Mapping[str, int]] = {
        **{"map": 1, "macro_f1": 1, "micro_f1": 1, "subset_accuracy": 1, "loss": -1}
    }
    has_linear_fit: ClassVar[bool] = True
    epoch_format: ClassVar[str] = "mAP {val_map:.4f}  F1 macro {val_macro_f1:.4f} micro {val_micro_f1:.4f}"
    val_format: ClassVar[str] = "mAP {map:.4f} (macro F1 {macro_f1:.4f})"
    test_format: ClassVar[str] = val_format
    result_format: ClassVar[str] = (
        "mAP {map:.4f}, F1 {macro_f1:.4f} macro, {micro_f1:.4f} micro, all labels right {subset_accuracy:.4f}, "
        "loss {loss:.4f}"
    )

    def __post_init__(self) -> None:
        """Check the values at once, and fill the thresholds."""
        errors = []
        if not self.classes:
            errors.append("classes must be at least 1, got none")
        if not 0.0 <= self.label_smoothing < 1.0:
            errors.append(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.thresholds and len(self.thresholds) != len(self.classes):
            errors.append(f"thresholds must be one for each of {len(self.classes)} classes, got {len(self.thresholds)}")
        if errors:
            raise ValueError("; ".join(errors))
        if not self.thresholds:
            object.__setattr__(self, "thresholds", (_THRESHOLD,) * len(self.classes))

    def encode(self, target: Any) -> Tensor:
        """Zeros and ones by class, `[classes]` float32, from label names."""
        labels = torch.zeros(len(self.classes))
        labels[[self.classes.index(name) for name in target]] = 1.0
        return labels

    def fitted(self, train: ImageDataset, classes: Sequence[str]) -> Self:
        """The task with the weights of positive labels.

        balanced: w_c = (n - n_c) / n_c, so that having and lacking a label weigh the same.
        """
        counts = self._counts(train)
        balanced = (len(train) - counts) / np.maximum(counts, 1)
        return dataclasses.replace(
            self, positive_weights=resolve_class_weights(self.class_weights, classes, balanced.tolist())
        )

    def calibrated(self, reduced: ArrayLike, labels: ArrayLike) -> Self:
        """The task with the thresholds whose F1 is highest on these images, `best_thresholds`."""
        probabilities = self.probabilities(torch.as_tensor(np.asarray(reduced))).double().numpy()
        return dataclasses.replace(self, thresholds=tuple(best_thresholds(probabilities, np.asarray(labels))))

    def state(self) -> dict[str, Any]:
        """The thresholds."""
        return {"thresholds": list(self.thresholds)}

    def of_ensemble(self, tasks: Sequence[Any]) -> Self:
        """The task with the mean of the models' thresholds."""
        return dataclasses.replace(self, thresholds=tuple(np.mean([t.thresholds for t in tasks], axis=0).tolist()))

    def sample_weights(self, train: ImageDataset) -> list[float]:
        """The inverse number of images of each image's rarest label; without labels, of all images without."""
        targets = self._targets(train)
        index = {name: number for number, name in enumerate(self.classes)}
        counts, bare = self._counts(train), sum(not target for target in targets)
        return [1 / min((counts[index[name]] for name in target), default=bare) for target in targets]

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the batch of `binary_cross_entropy` or `binary_focal` times the weights, see `tasks.losses`.

        Args:
            logits: `[batch, classes]`.
            labels: `[batch, classes]`, in [0, 1].
            weights: The samples' own, `[batch]`; None for ones.

        Returns:
            0-dim.
        """
        positive = None if self.positive_weights is None else torch.tensor(self.positive_weights, device=logits.device)
        losses = LABEL_SET_LOSSES[self.loss_name](
            full_precision(logits), labels, positive_weights=positive, label_smoothing=self.label_smoothing
        )
        return weighted_mean(losses, weights)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid of each logit, `[batch, classes]`, float32 at least."""
        return full_precision(logits).sigmoid()

    def final_outputs(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Class probabilities, `[batch, classes]`."""
        return self.probabilities(outputs / temperature)

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Logits of the mean of the probabilities."""
        return torch.stack([self.probabilities(logits) for logits in outputs]).mean(0).logit(eps=1e-7)

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Average precision and F1 by class and together, with the thresholds as they are.

        Means are over the classes that occur. `map` is the mean of average precisions, which needs no threshold;
        `macro_f1` that of F1; `micro_f1` counts the labels of all classes together; `subset_accuracy` is the share of
        images whose labels are all right. The loss is the plain binary cross entropy.

        Args:
            logits: `[images, classes]`.
            labels: `[images, classes]`, 0 and 1.

        Returns:
            `map`, `macro_f1`, `micro_f1`, `subset_accuracy`, `images`, `loss`, and `per_class` (`name`, `support`,
            `average_precision`, `f1`, `precision`, `recall`, `threshold`).

        Raises:
            ValueError: No images, or another number of labels than of rows.
        """
        from sklearn.metrics import average_precision_score  # a second, only to measure

        scores, truth = paired(logits, np.asarray(labels).astype(int))
        probabilities = self.probabilities(scores).double().numpy()
        given = (probabilities >= np.asarray(self.thresholds)).astype(int)
        support = truth.sum(0)
        hits, marked = (truth * given).sum(0), given.sum(0)
        with np.errstate(invalid="ignore"):
            precision, recall = np.nan_to_num(hits / marked), hits / support
            f1 = 2 * hits / (marked + support)
        ap = [
            float(average_precision_score(truth[:, c], probabilities[:, c])) if support[c] else None
            for c in range(len(self.classes))
        ]
        present = support > 0
        loss = LABEL_SET_LOSSES["cross-entropy"](full_precision(scores), torch.as_tensor(truth)).mean()
        both = int(marked.sum() + support.sum())
        return {
            "map": _mean([value for value in ap if value is not None]),
            "macro_f1": _mean(f1[present].tolist()),
            "micro_f1": 2 * int(hits.sum()) / both if both else 1.0,
            "subset_accuracy": float((truth == given).all(1).mean()),
            "images": len(truth),
            "loss": float(loss),
            "per_class": [
                {
                    "name": name,
                    "support": int(support[c]),
                    "average_precision": ap[c],
                    "f1": float(f1[c]) if present[c] else None,
                    "precision": float(precision[c]),
                    "recall": float(recall[c]) if present[c] else None,
                    "threshold": float(self.thresholds[c]),
                }
                for c, name in enumerate(self.classes)
            ],
        }

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Probabilities `[images, classes]` from logits."""
        return self.probabilities(torch.as_tensor(np.asarray(reduced)))

    def predictions(
        self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path
    ) -> LabelSetPredictions:
        """Labels and probabilities of each image, and the thresholds."""
        index = {name: number for number, name in enumerate(self.classes)}
        rows = zip(dataset.names, self._targets(dataset), sample_outputs.tolist(), strict=True)
        items = [
            LabelSetPrediction(number, name, [index[label] for label in labels], [round(p, 6) for p in row])
            for number, (name, labels, row) in enumerate(rows)
        ]
        return LabelSetPredictions(split, thresholds=list(self.thresholds), items=items)

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """One-vs-rest: a logistic regression for each class; one that all or no images have keeps weights of zero."""
        fits = []
        for c in range(outputs):
            answers = labels[:, c] > 0.5
            own = np.ones(len(labels)) if weights is None else weights
            if self.positive_weights is not None:
                own = own * np.where(answers, self.positive_weights[c], 1.0)
            constant = 4.0 if answers[0] else -4.0  # a probability of 98 or 2 %
            fits.append(fit_binary_probe(features, answers, own, constant))
        weight, bias = zip(*fits, strict=True)
        return torch.stack(weight), torch.stack(bias)

    def remap_labels(self, label: Tensor, numbers: Sequence[int]) -> Tensor:
        """Zeros and ones by the run's classes; those that the data does not name are 0."""
        mapped = torch.zeros(len(self.classes))
        mapped[list(numbers)] = label
        return mapped

    def result_table(self, scores: Mapping[str, Any], classes: Sequence[str]) -> ResultTable:
        """Average precision, F1, precision, recall and threshold of each class."""
        keys = ("average_precision", "f1", "precision", "recall", "threshold")
        rows = [
            [row["name"], f"{row['support']:,}", *("–" if row[key] is None else f"{row[key]:.4f}" for key in keys)]
            for row in scores["per_class"]
        ]
        return ResultTable("each class", ["class", "images", "AP", "F1", "precision", "recall", "threshold"], rows)

    def image_predictions(
        self, classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[image_outputs.LabelSetPrediction]:
        """The labels from their thresholds on, and all classes with their probabilities."""
        return image_outputs.label_set_predictions(classes, paths, self.probabilities(outputs), self.thresholds)

    check_output = staticmethod(image_outputs.check_output)
    write_predictions = staticmethod(image_outputs.write_predictions)

    def merged_use(self) -> str:
        """The classes from their thresholds on."""
        shown = [round(threshold, 4) for threshold in self.thresholds]
        return (
            "# [name for name, p, t in zip(classes, model(transform(image.convert('RGB'))[None]).sigmoid()[0], "
            f"{shown}) if p >= t]"
        )

    def _targets(self, dataset: ImageDataset) -> list[tuple[str, ...]]:
        """The label names of each image."""
        return [tuple(target) for target in dataset.annotations.targets or []]  # type: ignore[arg-type]

    def _counts(self, dataset: ImageDataset) -> np.ndarray:
        """Number of images with each label, `[classes]`."""
        index = {name: number for number, name in enumerate(self.classes)}
        numbers = [index[name] for target in self._targets(dataset) for name in target]
        return np.bincount(numbers, minlength=len(self.classes))


def _mean(values: Sequence[float]) -> float:
    """Mean, 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0
