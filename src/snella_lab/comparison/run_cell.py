"""Training and evaluation of one cell."""

import hashlib
import json
import math
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from snella_app.config.train import TrainConfig
from snella_app.data.datasets import ImageDataset
from snella_app.data.load import load_data
from snella_app.data.splits import stratified_sample
from snella_app.data.transforms import build_transform
from snella_app.files import write_json
from snella_app.methods import build_method, find_method, merge_trained, parse_method, spec_of
from snella_app.methods.defaults import PROBE_METHOD
from snella_app.methods.model_parts import is_inside, recorded_inputs
from snella_app.records.record import plain, read
from snella_app.records.results import SplitScores, scores_from
from snella_app.records.run import Metrics, RunInfo
from snella_app.runs import RunFolder, load_run
from snella_app.runs.evaluate import evaluate
from snella_app.runs.model import make_backbone
from snella_app.training.checkpoints import find_damage, latest_checkpoint
from snella_app.training.linear_probe import base_and_head
from snella_app.training.plan import versions_of
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train
from snella_lab.comparison.cells import Cell, tuning_result
from snella_lab.comparison.experiment import MEASURES, Experiment
from snella_lab.comparison.rows import CellResults, CellRow
from snella_lab.comparison.store import LOCKS, append_row, cell_lock, read_row, remove_lock
from snella_lab.provenance import git_state, package_info, system_info, timestamp


def count_changed_weights(run: Path) -> int | None:
    """Merge a run's update and count the changed weights outside the head; None if the method cannot be merged."""
    loaded = load_run(run, device="cpu")
    head = spec_of(loaded.model).head
    try:
        merged = merge_trained(loaded.model)
    except ValueError:
        return None
    return count_differences(merged, make_backbone(loaded.info.backbone, loaded.task.name), head)


def count_differences(model: nn.Module, other: nn.Module, head: str) -> int:
    """Count the weights that differ between two models of the same architecture, except in the module `head`."""
    values = dict(other.named_parameters())
    return sum(
        int((parameter != values[name]).sum())
        for name, parameter in model.named_parameters()
        if not is_inside(name, head)
    )


_FOLDS = 5
_PROBE_BATCH = 32
_MAX_NAME_BYTES = 200


def measure_forgetting(run: Path, data: str, images: int, cache: Path, device: str = "auto") -> dict[str, Any]:
    """Compare the linear-probe accuracy of adapted and frozen features on at most `images` images of other data.

    The accuracy of frozen features is cached in the folder `cache` by backbone, data and preprocessing.

    Returns:
        The `CellResults` fields `forgetting` (a fraction, negative if the adapted features are better),
        `forgetting_data`, `probe_accuracy_frozen` and `probe_accuracy_adapted`.
    """
    loaded = load_run(run, device)
    items, labels = probe_images(data, images)
    transform = build_transform(loaded.info.data_config, train=False, augment="none")
    items = [part.with_transform(transform) for part in items]
    adapted = probe_accuracy(head_inputs(loaded.model, items, _PROBE_BATCH), labels)
    backbone = loaded.info.backbone
    hashed = json.dumps([data, loaded.info.data_config], sort_keys=True)  # characters of `data` are replaced below
    digest = hashlib.sha256(hashed.encode()).hexdigest()[:8]
    name = "_".join(str(part) for part in (backbone.name, backbone.img_size, data, images, digest))
    seed = f"_{backbone.seed}" if backbone.pretrained is False else ""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name + seed)
    if len(name.encode()) > _MAX_NAME_BYTES:
        name = hashlib.sha256(name.encode()).hexdigest()
    path = cache / f"{name}.json"
    if path.is_file():
        frozen = float(json.loads(path.read_text())["accuracy"])
    else:
        model = build_method(PROBE_METHOD, make_backbone(backbone)).to(loaded.device)
        frozen = probe_accuracy(head_inputs(model, items, _PROBE_BATCH), labels)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"data": data, "images": len(labels), "backbone": plain(backbone), "accuracy": frozen})
    return {
        "forgetting": frozen - adapted,
        "forgetting_data": data,
        "probe_accuracy_frozen": frozen,
        "probe_accuracy_adapted": adapted,
    }


@torch.no_grad()
def head_inputs(model: nn.Module, parts: Sequence[ImageDataset], batch_size: int) -> NDArray[np.float32]:
    """Return the inputs to the head of a model from `build_method`, `[images, width]`, in evaluation mode."""
    _, head = base_and_head(model)
    rows: list[Tensor] = []
    device = next(model.parameters()).device
    model.eval()
    with recorded_inputs(head) as recorded:
        for images, *_ in DataLoader(ConcatDataset(parts), batch_size):
            model(images.to(device))
            rows.append(recorded.pop().flatten(1).float().cpu())
    return torch.cat(rows).numpy()


def probe_accuracy(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the stratified cross-validation accuracy of a logistic regression.

    Args:
        features: Features, `[images, width]`.
        labels: Class indices, `[images]`, at least two images per class.
    """
    folds = min(_FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # comparing accuracies does not need full convergence
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, features, labels, cv=split)
    return float((predicted == labels).mean())


def probe_images(data: str, images: int) -> tuple[list[ImageDataset], NDArray[np.int64]]:
    """Return a stratified sample of at most `images` training and validation images, with labels.

    Raises:
        FileNotFoundError: If the data do not exist.
        ImportError: If a package for the data is not installed.
        ValueError: If the data are invalid, the sample has only one image of a class, or `images` is less than the
            number of classes.
    """
    splits = load_data(data)
    parts = [splits.train] if splits.val is None else [splits.train, splits.val]
    labels = [label for part in parts for label in part.labels]
    if len(labels) > images:
        chosen = stratified_sample(labels, images, seed=0, classes=splits.classes, argument="forgetting_images")
        first = len(splits.train)
        inside = [[i for i in chosen if i < first], [i - first for i in chosen if i >= first]]
        parts = [part.subset(indices) for part, indices in zip(parts, inside, strict=False) if indices]
    targets = np.array([label for part in parts for label in part.labels])
    counts = np.bincount(targets, minlength=len(splits.classes))
    few = [name for name, count in zip(splits.classes, counts, strict=True) if count == 1]
    if few:
        raise ValueError(
            f"forgetting on {data!r} requires two images per class, got one of {', '.join(few)}; "
            f"increase forgetting_images ({images}) or choose other data"
        )
    return parts, targets


def row_header(cell: Cell, experiment: Experiment, created_at: str) -> dict[str, Any]:
    """Return the fields of a `CellRow` that are known before training."""
    config = cell.config(experiment, cell.name)
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
        **{name: getattr(config.optim, name) for name in ("lr", "head_lr", "weight_decay")},
        "search": cell.search,
        "train_config": config.stored(),
        **{f"{name}_version": packages[f"{name}-version"] for name in ("peft", "transformers", "torch", "snella")},
        "git_dirty": git_state()[1],
        "package_info": packages,
        "system_info": system_info(),
        "created_at": created_at,
    }


def read_results(folder: Path) -> CellResults:
    """Read the results of a finished run."""
    metrics = read(Metrics, folder)
    data = read(RunInfo, folder).data
    run = RunFolder(folder)
    peft_config = run.adapter / "adapter_config.json"  # missing for methods outside PEFT
    best = next(row for row in metrics.history if row.epoch == metrics.adapter_epoch)
    epochs = sum(row.epoch > 0 for row in metrics.history)
    return CellResults(
        peft_config=json.loads(peft_config.read_text()) if peft_config.is_file() else None,
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
        train_samples=epochs * run.read_config().optim.images_per_epoch(data.sizes["train"]),
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
    """Return the scores of one split by name; `accuracy`, `balanced_accuracy` and `loss` are None if not measured."""
    task_metrics = [name for measures in MEASURES.values() for name in measures if hasattr(scores, name)]
    names = dict.fromkeys(("accuracy", "balanced_accuracy", "loss", *task_metrics))
    return {name: getattr(scores, name, None) for name in names}


def finish_tuning_run(root: Path, experiment: Experiment, cell: Cell, folder: Path) -> CellRow | None:
    """Copy a tuning run with the final run's settings to `folder`, and evaluate it on the test images.

    Returns:
        Row of the tuning run; None if the run failed, the run or its adapter is missing, or it was trained with other
        settings, package versions, commit or number of threads, or on another machine.
    """
    trial = replace(cell, is_final=False, search=None)
    if not cell.is_final or cell.config(experiment, "-") != trial.config(experiment, "-"):
        return None  # protocol final also trains on the validation images
    run = RunFolder(trial.folder(root))
    row = read_row(run.path)
    if row is None or row.status != "success" or not run.adapter.is_dir():
        return None
    trained = (row.train_config, row.package_info, row.system_info)
    if trained != (trial.config(experiment, trial.name).stored(), package_info(), system_info()):
        return None
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns(CellRow.file))
    final_run = RunFolder(folder)
    config = final_run.read_config().replace(out=str(folder))
    final_run.write_config(config)
    scores = evaluate(folder, split="test", batch_size=config.optim.effective_batch_size, device=config.run.device)
    final_run.write(replace(read(Metrics, folder), test=scores_from(scores)))
    return row


def drop_adapters(root: Path, experiment: Experiment, cell: Cell) -> None:
    """Delete the tuning adapters of a finished cell's method, task and seed, except the best ones for reuse.

    The adapters of the best tuning runs are kept until the final run of the seed is finished.
    """
    trials = replace(cell, is_final=False).folder(root).parent
    rows = {path.parent: read_row(path.parent) for path in trials.glob(f"*_seed-{cell.seed}/{CellRow.file}")}
    ranks = {folder: tuning_result(row).rank for folder, row in rows.items() if row is not None}
    is_reusable = not cell.is_final and cell.seed < experiment.seeds
    for folder, rank in ranks.items():
        if not is_reusable or rank < max(ranks.values()):
            shutil.rmtree(RunFolder(folder).adapter, ignore_errors=True)


LOGS = "logs"
_ERROR_LENGTH = 400


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell: a row, an error, or neither if the cell must be started again or another process claimed it.

    Args:
        cell: The cell.
        row: Row of the cell, which may record a failed training run.
        is_local: False if another process stored the row.
        error: Error outside training, e.g. a crash of the process.
    """

    cell: Cell
    row: CellRow | None = None
    is_local: bool = True
    error: str = ""


def run_cell(
    root: Path, experiment: Experiment, cell: Cell, is_dedicated: bool = False, keep_checkpoints: bool = False
) -> Outcome:
    """Train a cell and store its row, unless it is finished or claimed by another process.

    An interrupted attempt resumes from its checkpoint; without one, its files are deleted first. A failed run is
    stored as a row with its error. `is_dedicated` stores the peak memory of the process. `keep_checkpoints`
    saves a checkpoint after each epoch, for preemptible machines; SIGTERM and Ctrl-C always save one.

    Raises:
        TrainingInterrupted: On Ctrl-C or SIGTERM during training; the lock of the cell is released.
        OSError: If the log or the row cannot be written.
    """
    folder = cell.folder(root)
    row = read_row(folder)
    if row is not None:
        return Outcome(cell, row, is_local=False)
    with cell_lock(root / LOCKS, cell.name) as is_acquired:
        row = read_row(folder)
        if row is not None or not is_acquired:
            return Outcome(cell, row, is_local=False)
        row = _train_cell(root, experiment, cell, is_dedicated, keep_checkpoints)
        append_row(root, folder, row)
        drop_adapters(root, experiment, cell)
    remove_lock(root / LOCKS, cell.name)
    return Outcome(cell, row)


def record_crash(
    root: Path, experiment: Experiment, cell: Cell, error: str, ignores_lock: bool = False
) -> CellRow | None:
    """Store and return the row of a crashed or blocked cell; None if another process has claimed it.

    A row that is already stored is returned unchanged. `ignores_lock` stores the row even if an unresponsive process
    holds the lock of the cell.
    """
    folder = cell.folder(root)
    with cell_lock(root / LOCKS, cell.name) as is_acquired:
        row = read_row(folder)
        if row is None:
            if not is_acquired and not ignores_lock:
                return None
            row = CellRow(**row_header(cell, experiment, timestamp()), status="failed", error=error, total_time=0.0)
            append_row(root, folder, row)
    remove_lock(root / LOCKS, cell.name)
    return row


def _checkpoint_s(folder: Path, config: TrainConfig) -> float | None:
    """Return the seconds trained before an intact checkpoint with the same settings and versions; None without one."""
    run = RunFolder(folder)
    checkpoint = latest_checkpoint(run.checkpoints)
    try:
        if checkpoint is None or run.status not in ("running", "interrupted") or find_damage(checkpoint, run.id):
            return None
        versions = read(RunInfo, folder).versions
        is_same = versions == versions_of(set(versions) - {"python"}) and not config.differences(run.read_config())
        return float(json.loads((checkpoint / "progress.json").read_text())["elapsed_s"]) if is_same else None
    except (OSError, ValueError, LookupError, TypeError, PackageNotFoundError):
        return None


def _train_cell(root: Path, experiment: Experiment, cell: Cell, is_dedicated: bool, keep_checkpoints: bool) -> CellRow:
    """Train and evaluate a cell, and return a row with its results or error."""
    start = time.monotonic()
    before_mib = psutil.Process().memory_info().rss / 2**20
    created_at = timestamp()
    folder = cell.folder(root)
    log = root / LOGS / (cell.name.replace("/", "!") + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    config = cell.config(experiment, folder)
    earlier_s = _checkpoint_s(folder, config)
    if earlier_s is None and folder.exists():
        shutil.rmtree(folder)
    head = row_header(cell, experiment, created_at)
    with log.open("w" if earlier_s is None else "a", encoding="utf-8") as file:
        try:
            trial = finish_tuning_run(root, experiment, cell, folder) if earlier_s is None else None
            if trial is None:
                train(
                    config.replace(resume=earlier_s is not None),
                    Console(file=file, width=200),
                    evaluate_test=cell.is_final,
                    keep_checkpoints=keep_checkpoints,
                    render_report=False,
                )
            results = read_results(folder)
            if trial is not None and trial.results is not None:
                memory = {name: getattr(trial.results, name) for name in ("peak_rss_mib", "training_mib")}
                results = replace(results, trained_as=trial.cell, **memory)
            elif is_dedicated:
                peak_mib = read(Metrics, folder).peak_rss_mib
                results = replace(results, peak_rss_mib=peak_mib, training_mib=round(peak_mib - before_mib, 1))
            scores, split = (results.test, "test") if cell.is_final else (results.val, "validation")
            score = scores[experiment.metric]
            if cell.is_final and score is None:
                raise ValueError(f"data {cell.data.data!r} must have a test split, got none")
            if score is not None and not math.isfinite(score):
                title = experiment.measures[experiment.metric]
                raise ValueError(
                    f"{title} is undefined on the {split} images, for example because all targets are equal"
                )
            if cell.is_final:
                results = replace(results, changed_weights=count_changed_weights(folder))
                # the probe's data are read in RGB
                if config.data.channels == 3 and (probe := experiment.probe_data(cell.data)) is not None:
                    images = experiment.forgetting_images
                    cache = root / "frozen"
                    device = config.run.device
                    forgetting = measure_forgetting(folder, probe, images, cache, device)
                    results = replace(results, **forgetting)
            shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)
        except (KeyboardInterrupt, TrainingInterrupted):
            raise
        except Exception as error:
            traceback.print_exc(file=file)
            text = " ".join(str(error).split())  # the log contains the full text
            text = text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + " …"
            elapsed_s = round(time.monotonic() - start + (earlier_s or 0.0), 3)
            return CellRow(**head, status="failed", error=f"{type(error).__name__}: {text}", total_time=elapsed_s)
    earlier_s = (earlier_s or 0.0) if trial is None else trial.total_time
    total = round(time.monotonic() - start + earlier_s, 3)
    return CellRow(**head, status="success", total_time=total, results=results)


def set_threads(threads: int) -> None:
    """Set the number of threads of this process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
