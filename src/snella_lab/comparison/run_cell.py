"""`run_cell`: train and evaluate one cell, once, and store its row."""

import json
import os
import shutil
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from snella_app.data import ImageDataset, build_transform, load_data
from snella_app.data.splits import stratified_sample
from snella_app.files import write_json
from snella_app.methods import build_method, find_method, merge_trained, parse_method, spec_of
from snella_app.methods.defaults import PROBE_METHOD
from snella_app.methods.model_parts import is_inside
from snella_app.records import CellResults, CellRow, Metrics, RunInfo, SplitScores, plain, read, scores_from
from snella_app.runs import RunFolder, load_run
from snella_app.runs.evaluate import evaluate
from snella_app.runs.model import make_backbone
from snella_app.training.linear_probe import head_inputs
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train
from snella_lab.comparison.cells import Cell, git_state, package_info, system_info, tuned_settings, tuning_result
from snella_lab.comparison.experiment import MEASURES, Experiment
from snella_lab.comparison.store import LOCKS, append_row, cell_lock, read_row, remove_lock


def count_changed_weights(run: Path) -> int | None:
    """Fold what a run has trained into its backbone and count the values that are other than before, the head aside.

    Args:
        run: Folder of a finished run.

    Returns:
        None for a method that cannot be folded: it adds to the backbone and leaves its weights alone.
    """
    loaded = load_run(run, device="cpu")
    head = spec_of(loaded.model).head
    try:
        merged = merge_trained(loaded.model)
    except ValueError:
        return None
    return count_differences(merged, make_backbone(loaded.info.backbone, loaded.task.name), head)


def count_differences(model: nn.Module, other: nn.Module, head: str) -> int:
    """How many values of the parameters of two models of one architecture differ.

    Args:
        model: One.
        other: The other.
        head: Name of the module that is left out.
    """
    values = dict(other.named_parameters())
    return sum(
        int((parameter != values[name]).sum())
        for name, parameter in model.named_parameters()
        if not is_inside(name, head)
    )


_FOLDS = 5


def measure_forgetting(run: Path, data: str, images: int, cache: Path, batch_size: int = 32) -> dict[str, Any]:
    """Compare a run's features with those of its backbone.

    Args:
        run: Folder of a finished run.
        data: Other data than the run's.
        images: Maximum number of its images.
        cache: Folder where the accuracy of frozen features is kept, which all runs of a backbone share.
        batch_size: Images at a time.

    Returns:
        Fields of `CellResults`: `forgetting` (a share of 1; negative where the adapted features are better),
        `forgetting_data`, `probe_accuracy_frozen` and `probe_accuracy_adapted`.
    """
    loaded = load_run(run)
    items, labels = probe_images(data, images)
    transform = build_transform(loaded.info.data_config, train=False, augment="none")
    items = [part.with_transform(transform) for part in items]
    adapted = probe_accuracy(head_inputs(loaded.model, items, batch_size), labels)
    backbone = loaded.info.backbone
    name = "_".join(str(part) for part in (backbone.name, backbone.img_size, data, images))
    seed = f"_{backbone.seed}" if backbone.pretrained is False else ""
    path = cache / ("".join(c if c.isalnum() or c in "._-" else "-" for c in name + seed) + ".json")
    if path.is_file():
        frozen = float(json.loads(path.read_text())["accuracy"])
    else:
        model = build_method(PROBE_METHOD, make_backbone(backbone)).to(loaded.device)
        frozen = probe_accuracy(head_inputs(model, items, batch_size), labels)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"data": data, "images": len(labels), "backbone": plain(backbone), "accuracy": frozen})
    return {
        "forgetting": frozen - adapted,
        "forgetting_data": data,
        "probe_accuracy_frozen": frozen,
        "probe_accuracy_adapted": adapted,
    }


def probe_accuracy(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Accuracy of a logistic regression in stratified cross-validation.

    Args:
        features: `[images, width]`.
        labels: `[images]`; every class twice at least.
    """
    folds = min(_FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the fit change no prediction
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, features, labels, cv=split)
    return float((predicted == labels).mean())


def probe_images(data: str, images: int) -> tuple[list[ImageDataset], NDArray[np.int64]]:
    """Training and validation images of a data set, a stratified choice of at most `images`, and their labels.

    Raises:
        ValueError: Cross-validation cannot be done, since a class has one image alone.
    """
    splits = load_data(data, seed=0)
    parts = [splits.train] if splits.val is None else [splits.train, splits.val]
    labels = [label for part in parts for label in part.labels]
    if len(labels) > images:
        chosen = stratified_sample(labels, images, seed=0, classes=splits.classes, argument="forgetting_images")
        first = len(splits.train)
        inside = [[i for i in chosen if i < first], [i - first for i in chosen if i >= first]]
        parts = [part.subset(own) for part, own in zip(parts, inside, strict=False) if own]
    found = np.array([label for part in parts for label in part.labels])
    counts = np.bincount(found, minlength=len(splits.classes))
    few = [name for name, count in zip(splits.classes, counts, strict=True) if count == 1]
    if few:
        raise ValueError(
            f"forgetting on {data!r} needs two images of every class, got one of {', '.join(few)}; "
            f"raise forgetting_images ({images}) or name other data"
        )
    return parts, found


def row_header(cell: Cell, experiment: Experiment, created_at: str) -> dict[str, Any]:
    """The fields of a `CellRow` that are known before training."""
    rates = tuned_settings(experiment, cell.data, cell.method, cell.candidate)
    peft_type = find_method(cell.method.method).peft_type or parse_method(cell.method.method)[0].upper()
    packages = package_info()
    return {
        "cell": cell.name,
        "purpose": "final" if cell.is_final else "trial",
        "metric": experiment.metric,
        "task_name": cell.data.name,
        "group": cell.data.group,
        "experiment_name": cell.method.name,
        "comparison": experiment.name,
        "method": cell.method.method,
        "peft_type": peft_type,
        "model_id": experiment.backbone,
        "seed": cell.seed,
        "lr_factor": cell.candidate.lr_factor,
        "tried_weight_decay": cell.candidate.weight_decay,
        **rates,
        "search": cell.search,
        "train_config": cell.config(experiment, cell.name).stored(),
        **{f"{name}_version": packages[f"{name}-version"] for name in ("peft", "transformers", "torch", "snella")},
        "git_dirty": git_state()[1],
        "package_info": packages,
        "system_info": system_info(),
        "created_at": created_at,
    }


def read_results(run: RunFolder) -> CellResults:
    """What the files of a finished run say."""
    metrics, data = read(Metrics, run.path), read(RunInfo, run.path).data
    best = next(row for row in metrics.history if row.epoch == metrics.adapter_epoch)
    epochs = sum(row.epoch > 0 for row in metrics.history)
    return CellResults(
        peft_config=_adapter_config(run.adapter),
        num_trainable_params=metrics.trainable_parameters,
        adapted_weights=metrics.adapted_weights,
        kept_weights=best.budget,
        file_size=metrics.adapter_bytes,
        train_time=metrics.train_s,
        step_time=metrics.step_s,
        accelerator_memory_max=metrics.accelerator_memory_max,
        accelerator_memory_reserved_avg=metrics.accelerator_memory_reserved_avg,
        accelerator_memory_reserved_99th=metrics.accelerator_memory_reserved_99th,
        train_loss=best.train_loss,
        train_samples=epochs * data.sizes["train"],
        epochs=epochs,
        best_epoch=metrics.best_epoch,
        protocol=metrics.protocol,
        selected_on=metrics.selected_on,
        ema=metrics.ema,
        val=_scores(metrics.val),
        test=_scores(metrics.test),
        sizes=data.sizes,
        split=data.digest,
    )


def _scores(scores: SplitScores | None) -> dict[str, float | None]:
    """The scores of one split by name; None for what its task does not measure."""
    of_tasks = [name for measures in MEASURES.values() for name in measures if hasattr(scores, name)]
    names = dict.fromkeys(("accuracy", "balanced_accuracy", "loss", *of_tasks))
    return {name: getattr(scores, name, None) for name in names}


def _adapter_config(adapter: Path) -> dict[str, Any] | None:
    """PEFT's configuration of an adapter; None for methods outside PEFT."""
    path = adapter / "adapter_config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def finish_tuning_run(root: Path, experiment: Experiment, cell: Cell, folder: Path) -> CellRow | None:
    """Make a final run from the tuning run that it would repeat, and evaluate it on the test images.

    Args:
        root: Folder of the comparison.
        experiment: What the cell belongs to.
        cell: The final cell.
        folder: The folder of its run; must not exist.

    Returns:
        The tuning run's row; None where there is no such run, where its adapter is missing, or where it was trained
        with other settings, by other versions or on another machine.
    """
    trial = replace(cell, is_final=False, search=None)
    if not cell.is_final or cell.config(experiment, "-") != trial.config(experiment, "-"):
        return None  # under the final protocol it also trains on the images it was tuned on
    run = RunFolder(trial.folder(root))
    row = read_row(run.path)
    if row is None or row.status != "success" or not run.adapter.is_dir():
        return None
    trained = (row.train_config, row.package_info, row.system_info)
    if trained != (trial.config(experiment, trial.name).stored(), package_info(), system_info()):
        return None
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns(CellRow.file))
    own = RunFolder(folder)
    config = replace(own.read_config(), out=str(folder))
    own.write_config(config)
    scores = evaluate(folder, split="test", batch_size=config.effective_batch_size, device=config.device)
    own.write(replace(read(Metrics, folder), test=scores_from(scores)))
    return row


def drop_adapters(root: Path, experiment: Experiment, cell: Cell) -> None:
    """Remove the adapters that no final run can use any more: all but the best tuning run's, and all once it is done.

    Of tuning runs that are equally good, as those that save the same model before training, each keeps its adapter.

    Args:
        root: Folder of the comparison.
        experiment: What the cell belongs to.
        cell: The one that was just finished; its method's tuning runs of its seed are checked.
    """
    place = replace(cell, is_final=False).folder(root).parent
    rows = {path.parent: read_row(path.parent) for path in place.glob(f"*_seed-{cell.seed}/{CellRow.file}")}
    ranks = {folder: tuning_result(row).rank for folder, row in rows.items() if row is not None}
    is_wanted = not cell.is_final and cell.seed < experiment.seeds
    for folder, rank in ranks.items():
        if not is_wanted or rank < max(ranks.values()):
            shutil.rmtree(RunFolder(folder).adapter, ignore_errors=True)


LOGS = "logs"
_ERROR_LENGTH = 400


@dataclass(frozen=True)
class Outcome:
    """The outcome of `run_cell`.

    Args:
        state: trained (here), found (its row exists already), or claimed (by another process).
        row: Its row, where it has one.
    """

    state: Literal["trained", "found", "claimed"]
    row: CellRow | None = None


def run_cell(root: Path, experiment: Experiment, cell: Cell, is_own_process: bool = False) -> Outcome:
    """Train a cell and store its row, unless that is done already or claimed by another process.

    Files of an interrupted attempt are removed first. A failed run becomes a row with its error.

    Args:
        root: Folder of the comparison.
        experiment: What the cell belongs to.
        cell: Which.
        is_own_process: Whether this process has done nothing else, so that its peak memory is the cell's.

    Raises:
        TrainingInterrupted: Ctrl-C; the cell is free for the next attempt.
        OSError: The row could not be written.
    """
    folder = cell.folder(root)
    row = read_row(folder)
    if row is not None:
        return Outcome("found", row)
    with cell_lock(root / LOCKS, cell.name) as is_acquired:
        row = read_row(folder)
        if row is not None:
            return Outcome("found", row)
        if not is_acquired:
            return Outcome("claimed")
        row = _row(root, experiment, cell, folder, is_own_process)
        append_row(root, folder, row)
        drop_adapters(root, experiment, cell)
    remove_lock(root / LOCKS, cell.name)
    return Outcome("trained", row)


def record_crash(root: Path, experiment: Experiment, cell: Cell, error: str) -> CellRow | None:
    """Store the row of a cell whose process crashed; None where another process has claimed it."""
    folder = cell.folder(root)
    with cell_lock(root / LOCKS, cell.name) as is_acquired:
        row = read_row(folder)
        if row is None and not is_acquired:
            return None
        if row is None:
            row = _failed(row_header(cell, experiment, _now()), error, 0.0)
            append_row(root, folder, row)
    remove_lock(root / LOCKS, cell.name)
    return row


def _row(root: Path, experiment: Experiment, cell: Cell, folder: Path, is_own_process: bool) -> CellRow:
    """Train and measure; the row of the results, or of the failure."""
    start, before_mib = time.monotonic(), psutil.Process().memory_info().rss / 2**20
    created_at = _now()
    log = root / LOGS / (cell.name.replace("/", "!") + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    head = row_header(cell, experiment, created_at)
    with log.open("w", encoding="utf-8") as file:
        try:
            trial = finish_tuning_run(root, experiment, cell, folder)
            if trial is None:
                train(
                    cell.config(experiment, folder),
                    Console(file=file, width=200),
                    measure_test=cell.is_final,
                    keep_checkpoints=False,
                    draw_report=False,
                )
            run = RunFolder(folder)
            results = read_results(run)
            if cell.is_final and results.test[experiment.metric] is None:
                raise ValueError(f"data {cell.data.data!r} must have a test part, got none")
            results = replace(
                results,
                trained_as=None if trial is None else trial.cell,
                changed_weights=count_changed_weights(run.path) if cell.is_final else None,
                **_memory(run, trial, before_mib if is_own_process else None),
                **_forgetting(root, experiment, cell, run),
            )
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        except (KeyboardInterrupt, TrainingInterrupted):
            raise
        except Exception as error:
            traceback.print_exc(file=file)
            return _failed(head, f"{type(error).__name__}: {_first_lines(error)}", time.monotonic() - start)
    total = round(time.monotonic() - start + (0.0 if trial is None else trial.total_time), 3)
    return CellRow(**head, status="success", total_time=total, results=results)


def _memory(run: RunFolder, trial: CellRow | None, before_mib: float | None) -> dict[str, Any]:
    """Peak resident memory of the process that trained, and what of it came after the libraries were loaded.

    Args:
        run: The run.
        trial: The row of the tuning run that it was made from.
        before_mib: What the process had when it began; None where it is not the run's own.
    """
    if trial is not None and trial.results is not None:
        return {"peak_rss_mib": trial.results.peak_rss_mib, "training_mib": trial.results.training_mib}
    if before_mib is None:
        return {}
    peak = read(Metrics, run.path).peak_rss_mib
    return {"peak_rss_mib": peak, "training_mib": round(peak - before_mib, 1)}


def _forgetting(root: Path, experiment: Experiment, cell: Cell, run: RunFolder) -> dict[str, Any]:
    """The fields of forgetting, for final runs."""
    data = experiment.probe_data(cell.data) if cell.is_final else None
    return {} if data is None else measure_forgetting(run.path, data, experiment.forgetting_images, root / "frozen")


def _failed(head: dict[str, Any], error: str, elapsed_s: float) -> CellRow:
    """The row of a failed run."""
    return CellRow(**head, status="failed", error=error, total_time=round(elapsed_s, 3))


def _first_lines(error: Exception) -> str:
    """An error's message, cut where libraries write pages; the log has all of it."""
    text = " ".join(str(error).split())
    return text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + " …"


def _now() -> str:
    """The time of day, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def set_threads(threads: int) -> None:
    """Set the number of threads of this process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
