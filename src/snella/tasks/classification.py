"""Image classification: batches of (image, label), cross entropy, accuracies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score
from torch import Tensor


@dataclass(frozen=True)
class ClassificationTask:
    """Loss and metrics for one label per image."""

    num_classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check both values at once."""
        faults = []
        if self.num_classes < 2:
            faults.append(f"num_classes must be at least 2, got {self.num_classes}")
        if not 0.0 <= self.label_smoothing < 1.0:
            faults.append(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if faults:
            raise ValueError("; ".join(faults))

    def collate(self, items: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Make a batch of transformed items.

        Args:
            items: Images `[channels, height, width]` of one size, with their class numbers.

        Returns:
            `images` `[batch, channels, height, width]` and `labels` `[batch]` (int64).
        """
        images, labels = zip(*items, strict=True)
        return {"images": torch.stack(list(images)), "labels": torch.tensor(labels, dtype=torch.long)}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, computed in float32 at least.

        loss = mean_i( -Σ_c q[i, c] log softmax(logits)[i, c] ),  q = (1 - ε) onehot + ε / classes

        Args:
            logits: `[batch, classes]`.
            labels: `[batch]`.

        Returns:
            0-dim.
        """
        return F.cross_entropy(self._scores(logits), labels, label_smoothing=self.label_smoothing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the classes, `[batch, classes]`, float32 at least."""
        return self._scores(logits).softmax(dim=-1)

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Accuracy, balanced accuracy, loss and the confusion matrix.

        Balanced accuracy is the mean, over the classes that occur, of the share recognised. The loss is without
        smoothing.

        Args:
            logits: `[images, classes]`.
            labels: `[images]`.

        Returns:
            `accuracy`, `balanced_accuracy`, `loss` and `confusion` (rows are true classes, columns predicted ones).

        Raises:
            ValueError: No images, or another number of labels than of rows.
        """
        scores = torch.as_tensor(np.asarray(logits))
        truth = np.asarray(labels)
        if len(truth) == 0 or len(scores) != len(truth):
            raise ValueError(
                f"logits and labels must have the same length of at least 1, got {len(scores)} and {len(truth)}"
            )
        predicted = scores.argmax(dim=-1).numpy()
        return {
            "accuracy": float(accuracy_score(truth, predicted)),
            "balanced_accuracy": float(recall_score(truth, predicted, labels=np.unique(truth), average="macro")),
            "loss": float(F.cross_entropy(self._scores(scores), torch.as_tensor(truth, dtype=torch.long))),
            "confusion": confusion_matrix(truth, predicted, labels=range(self.num_classes)).tolist(),
        }

    @staticmethod
    def _scores(logits: Tensor) -> Tensor:
        """Half precision becomes float32, in which softmax and its logarithm are taken."""
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
