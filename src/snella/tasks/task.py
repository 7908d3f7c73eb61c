"""`Task`: the protocol of tasks that training, evaluation and reports use."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn

from snella.data import ImageDataset
from snella.records import MaskPredictions, Predictions
from snella.report.examples import ImageSource

__all__ = ["ResultTable", "Task"]


@dataclass(frozen=True)
class ResultTable:
    """A human-readable table: a title, the columns' names (the first one heads the rows' names), and rows of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Task(Protocol):
    """A kind of task: what a batch is, which model fits, loss, metrics, and how results read.

    A model's outputs of a batch are turned into two small tensors by `reduce`; those of a whole data set, concatenated,
    are what `metrics` and `sample_outputs` are computed from.
    """

    name: ClassVar[str]
    """As in `--task`."""
    head: ClassVar[str | None]
    """Module of the model that is new and trained in full; None where the model itself says which."""
    best_metric: ClassVar[str]
    """Entry of an epoch's row that epochs are compared by first."""
    settings: ClassVar[tuple[str, ...]]
    """Settings of a run that only this task has."""
    has_one_class: ClassVar[bool]
    """Whether an image has one class, so that `sample_outputs` are probabilities that a temperature can calibrate."""

    @classmethod
    def create(cls, classes: Sequence[str], **settings: Any) -> "Task":
        """Make the task for some classes; settings of other tasks are ignored."""

    @staticmethod
    def build_model(name: str, **options: Any) -> nn.Module:
        """The pre-trained model, with a new head for `num_classes`; options as for `create_backbone`."""

    def check_data(self, dataset: ImageDataset, spec: str) -> None:
        """Refuse data of another kind than the task needs, with a ValueError."""

    def collate(self, items: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        """Make a batch, `images` and `labels`, of transformed items."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The training loss, 0-dim, float32 at least."""

    def reduce(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce the outputs of a batch to what `metrics` needs: two small tensors with a row per sample."""

    def metrics(self, reduced: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
        """Results on a data set, `loss` among them, as plain values."""

    def sample_outputs(self, reduced: ArrayLike) -> Tensor:
        """Per-sample outputs for the run's `predictions.json`, a row per sample."""

    def predictions(
        self, dataset: ImageDataset, sample_outputs: Tensor, split: str, folder: Path
    ) -> Predictions | MaskPredictions:
        """The record of what is said about each item of a split."""

    def save_examples(self, model: nn.Module, dataset: ImageDataset, sample_outputs: Tensor, folder: Path) -> None:
        """Save the files in the run's folder that the images of its report need."""

    def report_images(self, dataset: ImageDataset, folder: Path) -> ImageSource:
        """The report's images by index."""

    def remap_labels(self, label: Any, numbers: Sequence[int]) -> Any:
        """An item's label with the class numbers `numbers[old]`."""

    def epoch_row(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """The entries of an epoch's row that this task measures on validation, besides the loss."""

    def selection_score(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """The score that epochs are selected by; the higher the better."""

    def epoch_text(self, row: Mapping[str, Any]) -> str:
        """An epoch's row in a few words."""

    def final_text(self, val: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
        """The best epoch's results on validation and, where there are test images, on these."""

    def result_text(self, scores: Mapping[str, Any]) -> str:
        """Results in a few words."""

    def result_table(self, scores: Mapping[str, Any], classes: Sequence[str]) -> ResultTable:
        """Results class by class."""

    def average_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs that say what several models, or several views of the same images, say on average."""

    def image_predictions(
        self, classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
    ) -> Iterable[Any]:
        """What the model's outputs of a batch say about images outside a data set, one object an image."""

    @staticmethod
    def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
        """Refuse what `write_predictions` would refuse, before anything is predicted."""

    @staticmethod
    def write_predictions(
        predictions: Iterable[Any], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write what `image_predictions` gave as a file or a folder, and return it."""

    @staticmethod
    def prediction_text(prediction: Any, top_k: int | None) -> str:
        """What `image_predictions` gave for an image, in one line."""
