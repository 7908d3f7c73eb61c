"""What a method may look at before training, to choose what is trained: never test images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from snella.methods.method import Batches
from snella.methods.sensitivity import Loss


def _class_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, in float32 at least."""
    return F.cross_entropy(outputs.float(), labels)


def _say_nothing(text: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class SelectionData:
    """Training batches, as `build_method(..., batches=...)` takes them, with the rest that some methods need.

    Args:
        train: Gives a fresh pass over training data each time it is called.
        validation: The same over validation data; `noah` ranks candidates on it.
        loss: `(outputs, labels) -> 0-dim loss` of the task.
        report: Is told in a few words how far a long choice has come.
    """

    train: Batches
    validation: Batches | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = _class_loss
    report: Callable[[str], None] = _say_nothing

    def __call__(self) -> Iterable[tuple[Tensor, Tensor]]:
        """A fresh pass over training data."""
        return self.train()


def selection_data(batches: Batches | None) -> SelectionData:
    """What a method's `build` was given, as `SelectionData`.

    Raises:
        TypeError: `batches` cannot be called.
    """
    if isinstance(batches, SelectionData):
        return batches
    if not callable(batches):
        raise TypeError(
            f"batches must be a callable that gives a fresh pass over pairs of images and labels, got {batches!r:.80}; "
            "write batches=lambda: loader"
        )
    return SelectionData(batches)


def loss_of(data: SelectionData) -> Loss:
    """The task's loss of a model on a batch."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return data.loss(model(images), labels)

    return loss
