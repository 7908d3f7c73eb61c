"""Evaluate the best model of a run, refit its temperature, and rewrite its report.

The images come from the run's own data or from other data. Results on images that the run was trained on are
optimistic, so `evaluate` adds a note if it finds such images.
"""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from snella_app.console import make_console, print_line, track_progress
from snella_app.data.copies import find_equal_images, find_near_copies, similar_text
from snella_app.data.datasets import ImageDataset, read_at_side
from snella_app.data.load import DataSplits, has_columns, load_data
from snella_app.data.options import DataConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.data.sources import show_reading
from snella_app.records.record import plain, read
from snella_app.records.run import Calibration, RunInfo
from snella_app.report.examples import ImageLoader
from snella_app.report.report import write_report
from snella_app.runs.calibrate import calibrate
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import (
    SPLITS,
    changed_splits,
    check_splits,
    encode_targets,
    load_run_splits,
    load_splits,
    splits_digest,
)
from snella_app.runs.model import (
    Ensemble,
    LoadedRun,
    check_batch_size,
    get_task,
    load_run,
    load_single_run,
    unfinished_note,
)
from snella_app.tasks import create_task

Split = Literal["auto", "train", "val", "test", "all"]


def rewrite_report(run: str | Path, console: Console | None = None) -> Path:
    """Rewrite the report of a run from its files and its validation images.

    Without a validation split, the report shows test images. If the images are missing or changed, the report has no
    images, and a printed note gives the reason.

    Args:
        run: Run folder.
        console: Console for the note; standard output if None.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If `run` is not a run folder, or a finished run has no `metrics.json`.
        ValueError: If a file of the run is damaged, or the run has an unsupported task, such as image generation.
    """
    folder = RunFolder(run)
    info = read(RunInfo, folder.path)
    task = get_task(info)
    images: ImageLoader | None = None
    try:
        splits = load_run_splits(folder, info.data)
        split = "test" if splits.val is None else "val"  # the split of `predictions.json`
        check_splits(folder.path, info.data, splits, (split,))
        if (dataset := splits.parts.get(split)) is not None:
            images = task.report_images(dataset, folder.path)
    except (OSError, ValueError, ImportError) as error:
        print_line(console or make_console(), f"note: the report has no images: {error}")
    state: Literal["stopped"] | None = "stopped" if folder.was_killed else None  # run.json still says `running`
    return write_report(folder.path, images, state=state)


def evaluate(
    run: str | Path | LoadedRun,
    data: Any = None,
    *,
    split: Split = "auto",
    batch_size: int = 32,
    columns: str | None = None,
    skip_corrupt: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the best model of a run with the metrics of its task.

    Args:
        run: Run folder, or a loaded run.
        data: Data to evaluate on instead of the run's data: a specification as for training, or a dataset object.
            The run must have been trained on all classes of the data.
        split: Split to evaluate. `"auto"` selects the test split of the run, or its validation split if it has no test
            split. For other data, `"auto"` selects all images.
        batch_size: Batch size.
        columns: Columns of a table, as for training. None uses the columns of the run.
        skip_corrupt: Skip images that cannot be read.
        device: Device if `run` is a folder: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"`, or `"mps"`.
        console: Console for progress bars; None shows no progress.

    Returns:
        A dictionary with the entries `data`, `split`, `images` (number of images), `notes`, `classes`, and `loss`, and
        the metrics of the task: for classification, `accuracy`, `balanced_accuracy`, `macro_f1`, `confusion`, etc.

    Raises:
        FileNotFoundError: As for `load_run`, or if the data does not exist.
        ValueError: As for `load_run`, or if `batch_size` is less than 1, the data does not fit the task or has an
            unknown class, the split does not exist, an image cannot be read, or files of the run's data were added,
            removed, or replaced.
        TypeError: If `data` is neither a specification nor a dataset object.
        ImportError: If the data needs a package that is not installed.
    """
    check_batch_size(batch_size)
    loaded = run if isinstance(run, LoadedRun) else load_run(run, device)
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    with show_reading(console):
        splits, chosen, datasets = images_for_run(loaded, data, split, skip_corrupt=skip_corrupt, columns=columns)
        run_splits = splits if data is None else None
        originals = _datasets_of(splits, chosen)
        training_note = _training_note(loaded, run_splits, originals, chosen)
    reduced, labels = _run_model(loaded, splits.classes, datasets, batch_size, console)
    scores = loaded.task.metrics(reduced, labels)
    selection_note = _selection_note(loaded, chosen) if run_splits is not None and training_note is None else None
    notes = [*splits.notes, training_note, selection_note, unfinished_note(loaded)]
    return {
        "data": _spec(loaded, data),
        "split": chosen,
        "images": sum(map(len, datasets)),
        "notes": [note for note in notes if note],
        "classes": loaded.classes,
        **scores,
    }


def _selection_note(loaded: LoadedRun, split: Split) -> str | None:
    """Return a note if the epoch was selected on the evaluated split of the run's data, and None otherwise."""
    protocol = PROTOCOLS[loaded.info.protocol]
    if protocol.selected_on != split:
        return None
    if split == "test":
        return protocol.warning
    return "the epoch was selected on the validation images, so results are optimistic"


def _training_note(
    loaded: LoadedRun, run_splits: DataSplits | None, datasets: Sequence[ImageDataset], split: Split
) -> str | None:
    """Return a note if the run was, or may have been, trained on evaluated images, and None otherwise.

    Args:
        loaded: The run.
        run_splits: Splits of the run's data, or None if different data is evaluated.
        datasets: Evaluated images.
        split: Evaluated split, or `all`.
    """
    if run_splits is not None and split in ("val", "test") and not isinstance(loaded.model, Ensemble):
        if split == "val" and loaded.probe is not None:
            return (
                "the final head was also fitted to these images, so results are optimistic; metrics.json has the "
                "results of a head fitted only to the training images"
            )
        return None  # the notes of the splits already report duplicates
    if run_splits is None:
        try:
            run_splits = load_run_splits(loaded.folder, loaded.info.data)
            if loaded.info.data.digest != splits_digest(run_splits):
                raise ValueError(f"files were added or removed in {loaded.info.data.spec}")
        except (OSError, ValueError, ImportError) as error:
            return (
                f"cannot check for training images of the run among these images: {error}; results are optimistic if "
                "the run was trained on them"
            )
    training_datasets = [run_splits.train]
    if isinstance(loaded.model, Ensemble):  # all folds but one train on each of these images
        held_out = ("val", run_splits.fold_part)
        training_datasets += [dataset for name, dataset in run_splits.parts.items() if name in held_out]
    elif loaded.probe is not None and run_splits.val is not None:  # the final head was also fitted to these images
        training_datasets.append(run_splits.val)
    count = 0
    alike = 0
    example = ""
    for dataset in datasets:
        exact: dict[int, str] = {}
        near: dict[int, str] = {}
        for train in training_datasets:
            exact |= {position: train.names[other] for position, other in find_equal_images(train, dataset).items()}
            near |= {position: train.names[other] for position, other in find_near_copies(train, dataset).items()}
        duplicates = {**near, **exact}
        count += len(duplicates)
        alike += len(duplicates) - len(exact)
        if duplicates and not example:
            position = min(duplicates)
            example = f"{dataset.names[position]!r} is {duplicates[position]!r}"
    if not count:
        return None
    kind = similar_text(alike)
    verb_phrase = "is a training image" if count == 1 else "are training images"
    return (
        f"{count} of {sum(map(len, datasets))} images {verb_phrase} of the run{kind}, e.g. {example}; results are "
        "optimistic, so evaluate on unseen images"
    )


def calibrate_run(run: str | Path, *, batch_size: int = 32, device: str = "auto") -> Calibration:
    """Refit the temperature of a finished classifier on its validation images, store it, and rewrite the report.

    Calibration is also measured on the test images, if the run has any.

    Args:
        run: Folder of the run; its images must still exist.
        batch_size: Batch size.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"`, or `"mps"`.

    Returns:
        The calibration stored in `run.json`.

    Raises:
        FileNotFoundError: If `run` is not a run folder, or its adapter or images no longer exist.
        ValueError: If the run is not a finished classification run, is a cross-validation run, or has no validation
            images; if its final head was fitted to them, or its images have changed; or if `batch_size` is less than 1.
    """
    check_batch_size(batch_size)
    folder = RunFolder(run)
    loaded = load_single_run(folder, device)
    if not loaded.task.has_class_scores or not loaded.info.is_finished:
        got = f"task {loaded.task.name!r}" if loaded.info.is_finished else f"status {loaded.info.status!r}"
        raise ValueError(f"run={folder.path} must be a finished classification run to be calibrated, got {got}")
    if loaded.probe is not None:
        raise ValueError(
            f"run={folder.path} has a final head that was fitted to the validation images; keep the temperature fitted "
            "during training"
        )
    sizes = loaded.info.data.sizes
    if not sizes.get("val"):
        raise ValueError(
            f"run={folder.path} has no validation images to fit a temperature on; train with --protocol standard"
        )
    measured: dict[str, tuple[Tensor, Tensor]] = {}
    split_names: tuple[Split, ...] = ("val", "test") if sizes.get("test") else ("val",)
    for split in split_names:
        splits, _, datasets = images_for_run(loaded, None, split)
        reduced, labels = _run_model(loaded, splits.classes, datasets, batch_size)
        measured[split] = (loaded.task.sample_outputs(reduced), labels)
    calibration = cast(Calibration, calibrate(measured))  # not None, because there are validation images
    if read(RunInfo, folder.path).id != loaded.info.id:
        raise ValueError(f"{folder.path} was replaced by another run during the evaluation; run it again")
    folder.update("finished", calibration=plain(calibration))
    rewrite_report(folder.path)
    return calibration


def images_for_run(
    loaded: LoadedRun,
    data: Any = None,
    split: Split = "auto",
    *,
    skip_corrupt: bool = False,
    columns: str | None = None,
) -> tuple[DataSplits, Split, list[ImageDataset]]:
    """Load the images to evaluate a run on, with the transform of the run.

    Arguments and errors are as for `evaluate`.

    Returns:
        The splits of the data, the name of the selected split, and its datasets.
    """
    splits, is_run_data = _load_splits(loaded, data, split, skip_corrupt, columns)
    chosen = _resolve_split(split, splits) if is_run_data or split != "auto" else "all"
    loaded.task.check_data(splits.train, _spec(loaded, data))
    if loaded.task.target in ("labels", "numbers"):
        splits = encode_targets(splits, create_task(loaded.task.name, splits.classes))
    datasets = read_at_side(_datasets_of(splits, chosen), loaded.reading.side)
    return splits, chosen, [dataset.with_transform(loaded.transform) for dataset in datasets]


def _spec(loaded: LoadedRun, data: Any) -> str:
    """Return the specification of the data to evaluate on."""
    if data is None:
        return loaded.info.data.spec
    return data if isinstance(data, str) else "python:data"


def _load_splits(
    loaded: LoadedRun, data: Any, split: Split, skip_corrupt: bool, columns: str | None
) -> tuple[DataSplits, bool]:
    """Load the splits of the run or of other data, and return them with True if they are the run's data."""
    config = loaded.folder.read_config()
    stored = loaded.info.data
    changes: dict[str, Any] = {
        "skip_corrupt": skip_corrupt or config.data.skip_corrupt,
        "columns": config.data.columns if columns is None else columns,
    }
    if data is None:
        splits = load_run_splits(loaded.folder, stored, **changes)
        evaluated = _split_names(_resolve_split(split, splits))
        check_splits(loaded.folder.path, stored, splits, evaluated)
        unknown = [name for name in splits.parts if name in evaluated and name not in stored.contents]
        if unknown:
            splits.notes.append(
                f"cannot check {', '.join(unknown)} for replaced images: the run did not read this split, so run.json "
                "has no digest of it"
            )
        return splits, True
    # a specification or object may refer to the data of the run, e.g. after the folder was moved
    note = None
    with contextlib.suppress(ValueError):  # the data may not fit the settings of the run
        spec, source = (data, None) if isinstance(data, str) else (config.data.spec, data)
        splits = load_splits(dataclasses.replace(config.data, spec=spec, **changes), config.run.seed, source)
        if stored.digest == splits_digest(splits):
            changed = changed_splits(stored, splits, _split_names(_resolve_split(split, splits)))
            if not changed:
                return splits, True
            note = f"the files have the same names as the run's images but different contents in {', '.join(changed)}"
    # `columns` is always used if given; the run's columns are used only for data that may have columns
    uses_columns = columns is not None or has_columns(data)
    splits = load_data(
        data,
        DataConfig(
            skip_corrupt=skip_corrupt,
            columns=changes["columns"] if uses_columns else None,
            channels=loaded.reading.channels,
            white=loaded.info.data.white,
        ),
        seed=config.run.seed,
        target=loaded.task.target,
        divide=split not in ("auto", "all"),  # all images are evaluated together
    )
    if note is not None:
        splits.notes.append(f"{note}: evaluated as other data")
    return splits, False


def _resolve_split(split: Split, splits: DataSplits) -> Split:
    """Resolve `auto` to the test split, or to the validation split if there is no test split."""
    if split != "auto":
        return split
    if splits.test is None and splits.val is None:
        raise ValueError("the data has only training images; pass --split train, or other images with --data")
    return "val" if splits.test is None else "test"


def _split_names(split: Split) -> Collection[str]:
    """Return the names of the selected splits: all of them if `split` is `all`."""
    return SPLITS if split == "all" else (split,)


def _datasets_of(splits: DataSplits, split: Split) -> list[ImageDataset]:
    """Return the datasets of a split; raise ValueError if the data does not have this split."""
    if split == "all":
        return list(splits.parts.values())
    if split not in splits.parts:
        allowed = ", ".join([*splits.parts, "all", "auto"])
        raise ValueError(f"split must be one of {allowed} for this data, got {split!r}")
    return [splits.parts[split]]


def _run_model(
    loaded: LoadedRun,
    classes: Sequence[str],
    datasets: Sequence[ImageDataset],
    batch_size: int,
    console: Console | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the model on all images, and return the outputs and labels from `Task.reduce`, on the CPU.

    `classes` are the classes of the data, which may be a subset of the run's classes in a different order.
    """
    unknown = [name for name in classes if name not in loaded.classes]
    if unknown:
        raise ValueError(
            f"the run was not trained on the classes {unknown} of the data; its classes are {loaded.classes}"
            + (
                "; name the classes of the masks in classes.txt, next to images/"
                if loaded.task.target == "masks"
                else ""
            )
        )
    task = loaded.task
    class_indices = [loaded.classes.index(name) for name in classes]

    def collate(items: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        return task.collate([(image, task.remap_labels(label, class_indices)) for image, label, *_ in items])

    batches: DataLoader[Any] = DataLoader(ConcatDataset(datasets), batch_size, collate_fn=collate)
    reduced: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode():
        for batch in track_progress(batches, "evaluating", len(batches), console):
            outputs = task.outputs(loaded.network, batch["images"].to(loaded.device), loaded.info.tta).cpu()
            batch_reduced, batch_labels = task.reduce(outputs, batch["labels"])
            reduced.append(batch_reduced)
            labels.append(batch_labels)
    return torch.cat(reduced), torch.cat(labels)
