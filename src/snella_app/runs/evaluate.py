"""`evaluate`: a run's best model on its test split or on other data."""

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snella_app.console import make_console, print_line, tracked
from snella_app.data import DataSplits, ImageDataset, full_spec, has_columns, load_data
from snella_app.data.datasets import read_at_side, show_reading
from snella_app.data.load import equal_pictures, near_copies
from snella_app.records import Calibration, DataInfo, RunInfo, plain, read
from snella_app.report import write_report
from snella_app.report.examples import ImageSource
from snella_app.runs.calibrate import calibrate
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import (
    PARTS,
    changed_parts,
    check_splits,
    encoded,
    find_data,
    is_same_split,
    load_splits,
    parts_of,
)
from snella_app.runs.model import Ensemble, LoadedRun, get_task, load_run, unfinished_note
from snella_app.tasks import Task, create_task


def redraw_report(run: str | Path, console: Console | None = None) -> Path:
    """Rewrite the report of a stored run, from its files and its validation images.

    Where these are missing or changed, the report has no images, and a note says why.

    Args:
        run: Folder of the run.
        console: Where to write the note; standard output if None.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: This is not the folder of a run.
        ValueError: The run is of another kind, such as a personalized generator.
    """
    folder = RunFolder(run)
    info = read(RunInfo, folder.path)
    task = get_task(info)
    try:
        shown = _shown_images(folder, info.data)
        images: ImageSource | None = None if shown is None else task.report_images(shown, folder.path)
    except (OSError, ValueError, ImportError) as error:
        print_line(console or make_console(), f"note: the report has no images: {error}")
        images = None
    return write_report(folder.path, images, state="stopped" if folder.has_stopped else None)


def _shown_images(folder: RunFolder, stored: DataInfo) -> ImageDataset | None:
    """The images that `predictions.json` is about."""
    config = folder.read_config()
    config.data = find_data(folder.path, str(config.data), stored.folder)
    splits = load_splits(config)
    name = "test" if splits.val is None else "val"
    check_splits(folder.path, stored, splits, (name,))
    return parts_of(splits).get(name)


Split = Literal["auto", "train", "val", "test", "all"]


class _Relabeled(Dataset[tuple[Tensor, Any]]):
    """Items of several data sets in a row, with the class numbers of the run."""

    def __init__(self, parts: Sequence[ImageDataset], numbers: list[int], task: Task) -> None:
        self.items = [(part, index) for part in parts for index in range(len(part))]
        self.numbers = numbers
        self.task = task

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        part, inner = self.items[index]
        image, label, *_ = part[inner]
        return image, self.task.remap_labels(label, self.numbers)


def evaluate(
    run: str | Path,
    data: Any = None,
    *,
    split: Split = "auto",
    batch_size: int = 32,
    columns: str | None = None,
    skip_corrupt: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a run's best model: accuracies and confusion matrix, or Dice and IoU, as its task has them.

    Args:
        run: Folder of the run.
        data: Other images than the run's own, as for training, or an object; its classes must be among the run's.
        split: `auto` is the test part of the run's own data (validation where there is none), wherever it lies now, and
            all of other data.
        batch_size: Images at a time.
        columns: Columns of a table, as for training; the run's own if not given.
        skip_corrupt: Skip images that cannot be read.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
        console: Where to show, on a terminal, how far reading and measuring are; nowhere if None.

    Returns:
        `data`, `split`, `images` (their number), `notes`, `classes`, `loss`, and what the task's `metrics` returns: for
        classification `accuracy`, `balanced_accuracy`, `macro_f1` and `confusion`.

    Raises:
        FileNotFoundError: The run's own data is not there any more.
        ValueError: A class that the run was not trained on, a split that the data does not have, or own data with files
            added or removed, which would be split differently.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    loaded = load_run(run, device)
    with show_reading(console):
        splits, chosen, parts = images_for_run(loaded, data, split, skip_corrupt=skip_corrupt, columns=columns)
        about_training = _training_note(loaded, splits if data is None else None, _parts(splits, chosen), chosen)
    about_status = unfinished_note(loaded)
    items = _Relabeled(parts, _numbers(splits.classes, loaded), loaded.task)
    scores = loaded.task.metrics(*_run_model(loaded, items, batch_size, console))
    head = {
        "data": _spec(loaded, data),
        "split": chosen,
        "images": len(items),
        "notes": [*splits.notes, *(note for note in (about_training, about_status) if note)],
    }
    return {**head, "classes": loaded.classes, **scores}


def _training_note(
    loaded: LoadedRun, own: DataSplits | None, parts: Sequence[ImageDataset], split: Split
) -> str | None:
    """How many of the images that are measured were trained on, by their pixels; None for none.

    Args:
        loaded: The run.
        own: Its own images, where these are measured; notes about copies in its test part are among theirs.
        parts: The images that are measured.
        split: Their part.
    """
    if own is not None and split in ("val", "test") and not isinstance(loaded.model, Ensemble):
        if split == "val" and loaded.probe is not None:
            return (
                "the final head was fitted to these images too, so that results are optimistic; metrics.json has those "
                "of a fit to the training images alone"
            )
        return None
    if own is None:
        config, stored = loaded.folder.read_config(), loaded.info.data
        try:
            config.data = find_data(loaded.folder.path, str(config.data), stored.folder)
            own = load_splits(config)
            if not is_same_split(stored, own):
                raise ValueError(f"files were added or removed in {config.data}")
        except (OSError, ValueError, ImportError) as error:
            return (
                f"not checked whether the run was trained on these images, as its own cannot be compared: {error}; "
                "results are optimistic if it was"
            )
    trained = [own.train]
    if isinstance(loaded.model, Ensemble):  # each fold's model has seen what the others held out
        trained += [part for name, part in own.parts.items() if name in ("val", own.fold_part)]
    elif loaded.probe is not None and own.val is not None:
        trained.append(own.val)
    count = resaved = 0
    example = ""
    for part in parts:
        equal: dict[int, str] = {}
        near: dict[int, str] = {}
        for train in trained:
            equal |= {position: train.names[other] for position, other in equal_pictures(train, part).items()}
            near |= {position: train.names[other] for position, other in near_copies(train, part).items()}
        both = {**near, **equal}
        count, resaved = count + len(both), resaved + len(both) - len(equal)
        example = example or next((f"{part.names[p]!r} is {name!r}" for p, name in sorted(both.items())), "")
    if not count:
        return None
    kind = f" ({resaved} of them saved again or resized)" if resaved else ""
    return (
        f"{count} of {sum(map(len, parts))} images are training images of the run{kind}, e.g. {example}; results are "
        "optimistic by as much; measure on images that it has not seen"
    )


def calibrate_run(run: str | Path, *, batch_size: int = 32, device: str = "auto") -> Calibration:
    """Fit a finished classifier's temperature anew on its validation images, store it, and redraw the report.

    Test images, where there are any, are measured with it.

    Args:
        run: Folder of the run; its own images have to be where they were.
        batch_size: Images at a time.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.

    Returns:
        What `run.json` now has.

    Raises:
        FileNotFoundError: Not the folder of a run, or its images are not there any more.
        ValueError: Another task, a cross-validation, an unfinished run, no validation images, or images that changed.
    """
    folder = RunFolder(run)
    loaded = load_run(folder, device)
    if isinstance(loaded.model, Ensemble):
        raise ValueError(
            f"run={folder.path} is a cross-validation of several models; calibrate each, e.g. {loaded.folder.path}"
        )
    if not loaded.task.has_one_class or not loaded.info.is_finished:
        what = f"task {loaded.task.name!r}" if loaded.info.is_finished else f"status {loaded.info.status!r}"
        raise ValueError(f"run={folder.path} must be a finished classification to have a temperature, got {what}")
    if loaded.probe is not None:
        raise ValueError(
            f"run={folder.path} has a final head that was fitted to the validation images; its temperature is the one "
            "that training has fitted"
        )
    if not loaded.info.data.sizes.get("val"):
        raise ValueError(f"run={folder.path} has no validation images to fit a temperature on; other images may not")
    measured: dict[str, tuple[Tensor, Tensor]] = {}
    names: tuple[Split, ...] = ("val", "test") if loaded.info.data.sizes.get("test") else ("val",)
    for split in names:
        splits, _, parts = images_for_run(loaded, None, split)
        items = _Relabeled(parts, _numbers(splits.classes, loaded), loaded.task)
        reduced, labels = _run_model(loaded, items, batch_size)
        measured[split] = (loaded.task.sample_outputs(reduced), labels)
    calibration = calibrate(measured)
    if calibration is None:
        raise RuntimeError(f"run={folder.path} was calibrated on {len(measured['val'][1])} validation images")
    folder.update("finished", calibration=plain(calibration))
    redraw_report(folder.path)
    return calibration


def images_for_run(
    loaded: LoadedRun,
    data: Any = None,
    split: Split = "auto",
    *,
    skip_corrupt: bool = False,
    columns: str | None = None,
) -> tuple[DataSplits, Split, list[ImageDataset]]:
    """The images that a run is measured on, with its transform.

    Args:
        loaded: The run.
        data: As for `evaluate`.
        split: As for `evaluate`.
        skip_corrupt: Skip images that cannot be read.
        columns: As for `evaluate`.

    Returns:
        The data's splits, the split that was chosen, and its parts.

    Raises:
        FileNotFoundError: The run's own data is not there any more.
        ValueError: As for `evaluate`, but for classes.
    """
    splits, are_own = _load_splits(loaded, data, split, skip_corrupt, columns)
    chosen = _chosen(split, splits) if are_own else "all" if split == "auto" else split
    loaded.task.check_data(splits.train, _spec(loaded, data))
    if loaded.task.target != "class":
        splits = encoded(splits, create_task(loaded.task.name, splits.classes))
    return (
        splits,
        chosen,
        [part.with_transform(loaded.transform) for part in read_at_side(_parts(splits, chosen), loaded.reading.side)],
    )


def _spec(loaded: LoadedRun, data: Any) -> str:
    """How the data is called: as it was given, or as the run says of its own."""
    return loaded.info.data.spec if data is None else data if isinstance(data, str) else "python:data"


def _load_splits(
    loaded: LoadedRun, data: Any, split: Split, skip_corrupt: bool, columns: str | None
) -> tuple[DataSplits, bool]:
    """The run's own splits, or other data in full, and which of both it is."""
    config, stored = loaded.folder.read_config(), loaded.info.data
    config.skip_corrupt = skip_corrupt or config.skip_corrupt
    config.columns = columns if columns is not None else config.columns
    if data is None:
        config.data = find_data(loaded.folder.path, str(config.data), stored.folder)
        splits = load_splits(config)
        measured = _names(_chosen(split, splits))
        check_splits(loaded.folder.path, stored, splits, measured)
        unknown = [name for name in parts_of(splits) if name in measured and name not in stored.contents]
        if unknown:
            splits.notes.append(
                f"run.json has no digest of the contents of {', '.join(unknown)}, which the run did not read: that no "
                "image was replaced is not checked"
            )
        return splits, True
    note = None
    with contextlib.suppress(ValueError):
        config.data = full_spec(data) if isinstance(data, str) else config.data
        splits = load_splits(config, None if isinstance(data, str) else data)
        changed = changed_parts(stored, splits, _names(_chosen(split, splits)))
        if is_same_split(stored, splits) and not changed:
            return splits, True
        if is_same_split(stored, splits):
            note = f"the files have the names of the run's own, but other contents in {', '.join(changed)}"
    splits = load_data(
        data,
        seed=config.seed,
        skip_corrupt=skip_corrupt,
        columns=config.columns if columns is not None or has_columns(data) else None,
        channels=loaded.reading.channels,
        white=loaded.info.data.white,
        target=loaded.task.target,
        divide=split not in ("auto", "all"),
    )
    splits.notes += [] if note is None else [f"{note}: measured as other data"]
    return splits, False


def _chosen(split: Split, splits: DataSplits) -> Split:
    """The part of the run's own data that a split's name means."""
    return split if split != "auto" else "test" if splits.test is not None else "val"


def _names(split: Split) -> Collection[str]:
    """The names of the parts that are measured."""
    return PARTS if split == "all" else (split,)


def _parts(splits: DataSplits, split: Split) -> list[ImageDataset]:
    """The data sets that a split's name means."""
    present = parts_of(splits)
    if split == "all":
        return list(present.values())
    if split not in present:
        raise ValueError(f"split must be one of {', '.join([*present, 'all', 'auto'])} for this data, got {split!r}")
    return [present[split]]


def _numbers(names: list[str], loaded: LoadedRun) -> list[int]:
    """The run's number of each class of the data."""
    unknown = [name for name in names if name not in loaded.classes]
    if unknown:
        raise ValueError(
            f"the data has classes {unknown} that the run was not trained on; its classes are {loaded.classes}"
        )
    return [loaded.classes.index(name) for name in names]


def _run_model(
    loaded: LoadedRun, items: _Relabeled, batch_size: int, console: Console | None = None
) -> tuple[Tensor, Tensor]:
    """The reduced outputs of all items, on the CPU."""
    reduced: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode():
        batches = DataLoader(items, batch_size, collate_fn=loaded.task.collate)
        for batch in tracked(batches, "measuring", len(batches), console):
            images = batch["images"].to(loaded.device)
            outputs = loaded.task.outputs(loaded.network, images, loaded.info.tta).cpu()
            for whole, part in zip((reduced, labels), loaded.task.reduce(outputs, batch["labels"]), strict=True):
                whole.append(part)
    return torch.cat(reduced), torch.cat(labels)
