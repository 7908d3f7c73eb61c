"""What a run hands to methods that choose from data what is trained, and where it keeps their choice."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snella.data import ImageDataset
from snella.methods import SelectionData, find_method, load_trained, save_trained
from snella.methods.saving import METHOD_FILE
from snella.tasks import Task
from snella.training.config import TrainConfig
from snella.training.sampler import EpochSampler

FOLDER = "selection"
"""Folder of a run with the structure that was chosen, and its first values."""


def selection_data(
    train: ImageDataset, val: ImageDataset | None, task: Task, config: TrainConfig, console: Console | None = None
) -> SelectionData:
    """Training and validation batches, the same for the same seed, and never test images.

    Pass number `k` over the training images has the order and the augmentation of the run's own epoch `k`; validation
    images come in their order.

    Args:
        train: Training images with the run's transform.
        val: Validation images with theirs; None where there are none.
        task: Makes batches, and has the loss.
        config: Batch size, seed and workers.
        console: Where progress is shown; None for nowhere.
    """
    passes = count()
    show = config.progress and console is not None and console.is_terminal

    def batches(images: ImageDataset, order: EpochSampler | None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            images,
            config.images_per_step,
            sampler=order,
            collate_fn=task.collate,
            num_workers=config.workers,
            generator=torch.Generator().manual_seed(config.seed),  # or a pass would draw from torch's own numbers
        )
        steps = track(loader, "choosing what is trained", console=console, transient=True) if show else loader
        yield from ((batch["images"], batch["labels"]) for batch in steps)

    def train_pass() -> Iterator[tuple[Tensor, Tensor]]:
        epoch, images = next(passes), train.with_transform(train.transform)
        order = EpochSampler(len(images), config.seed)
        images.set_epoch(epoch)
        order.set_epoch(epoch)
        return batches(images, order)

    def say(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, soft_wrap=True)

    validation: Callable[[], Iterator[tuple[Tensor, Tensor]]] | None = None
    if val is not None:
        validation = lambda: batches(val, None)  # noqa: E731
    return SelectionData(train_pass, validation, task.loss, say)


def store_selection(run: Path, method: str, model: nn.Module) -> None:
    """Keep what a method has chosen, so that a resumed run need not choose again; nothing for other methods.

    Args:
        run: Folder of the run.
        method: Name of the method.
        model: As `build_method` made it.
    """
    if find_method(method).needs_batches and not has_selection(run):
        save_trained(model, run / FOLDER)


def has_selection(run: Path) -> bool:
    """Whether a run has kept a choice, whole."""
    return (run / FOLDER / METHOD_FILE).is_file()


def restore_selection(run: Path, backbone: nn.Module) -> nn.Module:
    """The backbone with the choice that a run has kept, its values as training began with them.

    Raises:
        AdapterFileError: The kept choice is damaged.
    """
    return load_trained(run / FOLDER, backbone)
