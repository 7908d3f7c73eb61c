"""Image classification: batches of (image, label), cross entropy, accuracies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn

from snella.backbones import create_backbone
from snella.data import ImageDataset, MaskDataset
from snella.records import Prediction, Predictions
from snella.report.examples import ImageSource
from snella.tasks import predictions as image_outputs
from snella.tasks.task import ResultTable


@dataclass(frozen=True)
class ClassificationTask:
    """Loss and metrics for one label per image."""

    num_classes: int
    label_smoothing: float = 0.0

    name: ClassVar[str] = "classification"
    head: ClassVar[str | None] = None
    best_metric: ClassVar[str] = "val_accuracy"
    settings: ClassVar[tuple[str, ...]] = ()
    has_one_class: ClassVar[bool] = True

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
    def create(cls, classes: Sequence[str], *, label_smoothing: float = 0.0, **others: Any) -> "ClassificationTask":
        """Make the task for some classes."""
        return cls(len(classes), label_smoothing)

    @staticmethod
    def build_model(name: str, **options: Any) -> nn.Module:
        """A timm model with a head of `num_classes`; arguments as for `create_backbone`."""
        return create_backbone(name, **options)

    def check_data(self, dataset: ImageDataset, spec: str) -> None:
        """Refuse images with masks.

        Raises:
            ValueError: They are.
        """
        if isinstance(dataset, MaskDataset):
            raise ValueError(
                f"task must be segmentation for images with masks such as {spec}, got {self.name!r}; "
                "add --task segmentation"
            )

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

    def average_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logits whose softmax is the mean of several models' class probabilities."""
        return torch.stack([self.probabilities(logits) for logits in outputs]).mean(0).log()

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Accuracy, balanced accuracy, loss and the confusion matrix.

        Balanced accuracy is the mean, over the classes that occur, of the share recognized. The loss is without
        smoothing.

        Args:
            logits: `[images, classes]`.
            labels: `[images]`.

        Returns:
            `accuracy`, `balanced_accuracy`, `loss` and `confusion` (rows are true classes, columns predicted ones).

        Raises:
            ValueError: No images, or another number of labels than of rows.
        """
        from sklearn.metrics import accuracy_score, confusion_matrix, recall_score  # a second, only to measure

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

    def reduce(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float32 and labels, as they are."""
        return outputs.float(), labels

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Probabilities `[images, classes]` from logits."""
        return self.probabilities(torch.as_tensor(np.asarray(reduced)))

    def predictions(self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path) -> Predictions:
        """Label and probabilities of each image."""
        rows = zip(dataset.names, dataset.labels, sample_outputs.tolist(), strict=True)
        items = [
            Prediction(index, name, int(label), [round(p, 6) for p in row])
            for index, (name, label, row) in enumerate(rows)
        ]
        return Predictions(split, items=items)

    def save_examples(self, model: nn.Module, dataset: ImageDataset, sample_outputs: Tensor, folder: Path) -> None:
        """Nothing: the report shows the images themselves."""

    def report_images(self, dataset: ImageDataset, folder: Path) -> ImageSource:
        """The images themselves."""
        return dataset.image

    def remap_labels(self, label: int, numbers: Sequence[int]) -> int:
        """The class number `numbers[label]`."""
        return numbers[label]

    def epoch_row(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """Both accuracies."""
        return {"val_accuracy": scores["accuracy"], "val_balanced_accuracy": scores["balanced_accuracy"]}

    def selection_score(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Higher validation accuracy first, then lower validation loss."""
        return row["val_accuracy"], -row["val_loss"]

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """Both accuracies."""
        return f"accuracy {row['val_accuracy']:.4f}  balanced {row['val_balanced_accuracy']:.4f}"

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """Accuracies."""
        text = "" if test is None else f", test {test['accuracy']:.4f} (balanced {test['balanced_accuracy']:.4f})"
        return f"validation {val['accuracy']:.4f}{text}"

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

    @staticmethod
    def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
        """As `check_output` of `snella.tasks.predictions`."""
        image_outputs.check_output(out, top_k, overwrite=overwrite)

    @staticmethod
    def write_predictions(
        predictions: Iterable[Any], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write a CSV file."""
        return image_outputs.write_predictions(predictions, out, top_k, overwrite=overwrite)

    @staticmethod
    def prediction_text(prediction: Any, top_k: int | None) -> str:
        """As `class_text` of `snella.tasks.predictions`."""
        return image_outputs.class_text(prediction, top_k)

    @staticmethod
    def _scores(logits: Tensor) -> Tensor:
        """Half precision becomes float32, in which softmax and its logarithm are taken."""
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
