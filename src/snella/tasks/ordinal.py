"""Ordered classes: CORN's conditional questions, errors in ranks, quadratic weighted kappa."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from snella.data import ImageDataset
from snella.records import Predictions
from snella.tasks import predictions as image_outputs
from snella.tasks.classification import ClassificationTask, class_scores, fit_probe
from snella.tasks.losses import corn, corn_probabilities, full_precision, weighted_mean
from snella.tasks.task import ClassWeights

__all__ = ["OrdinalTask", "rank_order"]

_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def rank_order(classes: Sequence[str], order: str | None) -> list[str]:
    """The classes from the lowest to the highest.

    Args:
        classes: Their names.
        order: The same names separated by commas; None where all of them begin with different numbers, which then give
            the order.

    Raises:
        ValueError: No order is known, or `order` names other classes (nearest given).
    """
    if order is None:
        found = [_NUMBER.match(name) for name in classes]
        numbers = [float(match[0]) for match in found if match]
        if len(set(numbers)) != len(classes):
            raise ValueError(
                f"class_order must name the classes from the lowest to the highest for task ordinal, e.g. "
                f"{','.join(classes)}, got none; names that begin with a number are in order by themselves"
            )
        return [name for _, name in sorted(zip(numbers, classes, strict=True))]
    names = [name.strip() for name in order.split(",")]
    errors = []
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            errors.append(f"no class {name!r}" + (f" (nearest: {near[0]!r})" if near else ""))
    missing = [repr(name) for name in classes if name not in names]
    errors += [f"{', '.join(missing)} missing"] if missing else []
    errors += ["a class twice"] if len(set(names)) < len(names) else []
    if errors:
        raise ValueError(f"class_order must name each class once, got {order!r}: {'; '.join(errors)}")
    return names


@dataclass(frozen=True)
class OrdinalTask(ClassificationTask):
    """Loss and metrics for one of several ordered classes an image.

    The head has K - 1 outputs, the logits of the questions "is it above rank k, given that it is at least k?". The
    predicted rank is the number of ranks k with P(y > k) > 1/2: the median of the class probabilities, which makes the
    error in ranks smallest.

    Source: CORN, Shi, Cao and Raschka, 2023, arXiv 2111.08851.
    """

    monitor: str = "mae"

    name: ClassVar[str] = "ordinal"
    settings: ClassVar[tuple[str, ...]] = ("class_order", "class_weights", "sampler")
    losses: ClassVar[tuple[str, ...]] = ()
    monitors: ClassVar[Mapping[str, int]] = {
        **{"mae": -1, "kappa": 1, "accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "loss": -1}
    }
    has_one_class: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the number of classes."""
        if self.num_classes < 3:
            raise ValueError(
                f"classes must be at least 3 for task ordinal, got {self.num_classes}; two are a classification"
            )

    @classmethod
    def create(
        cls,
        classes: Sequence[str],
        *,
        monitor: str | None = None,
        class_weights: ClassWeights = None,
        **others: Any,
    ) -> Self:
        """Make the task for some classes, the lowest first."""
        return cls(len(classes), loss_name="corn", monitor=monitor or "mae", class_weights=class_weights)

    @staticmethod
    def count_outputs(classes: Sequence[str]) -> int:
        """One less than classes."""
        return len(classes) - 1

    @classmethod
    def order_classes(cls, classes: Sequence[str], order: str | None) -> list[str]:
        """From the lowest to the highest, by `rank_order`."""
        return rank_order(classes, order)

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the batch of `snella.tasks.losses.corn` times the weights of sample and class.

        Args:
            logits: `[batch, K - 1]`.
            labels: Ranks `[batch]`.
            weights: The samples' own, `[batch]`; None for ones.

        Returns:
            0-dim.
        """
        logits = full_precision(logits)
        if self.weight_by_class is not None:
            of_class = torch.tensor(self.weight_by_class, device=logits.device, dtype=logits.dtype)[labels]
            weights = of_class if weights is None else of_class * weights.to(of_class)
        return weighted_mean(corn(logits, labels), weights)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities, `[batch, K]`, float32 at least."""
        return corn_probabilities(full_precision(logits))

    def average_outputs(self, outputs: Sequence[Tensor], tasks: Sequence[Any] | None = None) -> Tensor:
        """Logits whose questions are answered as the mean of the class probabilities answers them."""
        mean = torch.stack([self.probabilities(logits) for logits in outputs]).mean(0)
        from_rank = mean.flip(-1).cumsum(-1).flip(-1).clamp(max=1.0)  # P(y ≥ k)
        return (from_rank[:, 1:] / from_rank[:, :-1]).logit(eps=1e-7)

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Errors in ranks, quadratic weighted kappa, and what a classification has.

        mae = mean |rank - true rank|,   kappa = 1 - Σ (i - j)² O[i, j] / Σ (i - j)² E[i, j]

        O counts images by true and predicted rank, E is what it would be were both independent.

        Args:
            logits: `[images, K - 1]`.
            labels: `[images]`.

        Returns:
            `mae`, `kappa`, `accuracy`, `balanced_accuracy`, `macro_f1`, `confusion` and `loss` (CORN's, without
            weights).

        Raises:
            ValueError: No images, or another number of labels than of rows.
        """
        from sklearn.metrics import cohen_kappa_score  # a second, only to measure

        scores, truth = torch.as_tensor(np.asarray(logits)), np.asarray(labels)
        if len(truth) == 0 or len(scores) != len(truth):
            raise ValueError(
                f"logits and labels must have the same length of at least 1, got {len(scores)} and {len(truth)}"
            )
        ranks = predicted_ranks(self.probabilities(scores)).numpy()
        every = range(self.num_classes)
        is_constant = len({*truth.tolist(), *ranks.tolist()}) == 1  # all right, where kappa is 0 / 0
        kappa = 1.0 if is_constant else cohen_kappa_score(truth, ranks, labels=list(every), weights="quadratic")
        return {
            "mae": float(np.abs(ranks - truth).mean()),
            "kappa": float(kappa),
            **class_scores(truth, ranks, self.num_classes),
            "loss": float(corn(full_precision(scores), torch.as_tensor(truth, dtype=torch.long)).mean()),
        }

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> Predictions:
        """Label, probabilities and predicted rank of each image."""
        plain = super().predictions(dataset, sample_outputs, split, folder)
        ranks = predicted_ranks(sample_outputs).tolist()
        items = [dataclasses.replace(item, rank=rank) for item, rank in zip(plain.items, ranks, strict=True)]
        return dataclasses.replace(plain, items=items)

    def fit_linear(
        self, features: np.ndarray, labels: np.ndarray, outputs: int, weights: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """A logistic regression for each question, on the images that it is asked of."""
        weight = torch.zeros(outputs, features.shape[1], dtype=torch.float64)
        bias = torch.zeros(outputs, dtype=torch.float64)
        for rank in range(outputs):
            is_asked = labels >= rank
            answers = (labels[is_asked] > rank).astype(int)
            if len(set(answers.tolist())) == 2:
                own = None if weights is None else weights[is_asked]
                both, of_both = fit_probe(features[is_asked], answers, 2, weights=own)
                weight[rank], bias[rank] = both[1] - both[0], of_both[1] - of_both[0]
        return weight, bias

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """Error in ranks, kappa and accuracy."""
        return f"MAE {row['val_mae']:.4f} ranks  kappa {row['val_kappa']:.4f}  accuracy {row['val_accuracy']:.4f}"

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """Error in ranks and kappa."""
        text = "" if test is None else f", test {test['mae']:.4f} ranks (kappa {test['kappa']:.4f})"
        return f"validation MAE {val['mae']:.4f} ranks{text}"

    def result_text(self, scores: Mapping[str, Any]) -> str:
        """Error in ranks, kappa, accuracies and loss."""
        return (
            f"MAE {scores['mae']:.4f} ranks, quadratic weighted kappa {scores['kappa']:.4f}, "
            f"{super().result_text(scores)}"
        )

    def image_predictions(
        self, classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> list[image_outputs.Prediction]:
        """The predicted class first, then the others by their probability."""
        probabilities = self.probabilities(outputs)
        plain = image_outputs.class_predictions(classes, paths, probabilities)
        chosen = [classes[rank] for rank in predicted_ranks(probabilities).tolist()]
        made = []
        for item, name in zip(plain, chosen, strict=True):
            first = [pair for pair in item.ranking if pair[0] == name]
            ranking = first + [pair for pair in item.ranking if pair[0] != name]
            made.append(dataclasses.replace(item, ranking=ranking))
        return made

    def merged_use(self) -> str:
        """The number of ranks that are probably exceeded."""
        return "# classes[(model(transform(image.convert('RGB'))[None]).sigmoid().cumprod(1) > 0.5).sum()]"


def predicted_ranks(probabilities: Tensor) -> Tensor:
    """The median rank of class probabilities `[images, K]`, `[images]` int64: how many ranks have P(y > k) > 1/2."""
    above = 1 - probabilities.cumsum(-1)[:, :-1]  # P(y > k)
    return (above > 0.5).sum(-1)
