"""Train and evaluate one cell of a comparison: a tuning or final run of a method on a task.

Tuning runs select hyperparameters, and final runs are evaluated on test images. The settings and results of a cell are
stored as a row.
"""

import hashlib
import json
import math
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

LOGS = "logs"
"""Name of the folder with one log per cell."""
_MAX_FOLDS = 5
"""Maximum number of cross-validation folds of a linear probe."""
_PROBE_BATCH_SIZE = 32
_MAX_NAME_BYTES = 200
"""Maximum length of a file name in the cache of probe accuracies, without the suffix; file systems allow 255 bytes."""
_MAX_ERROR_LENGTH = 400
"""Maximum length of an error message in a row, in characters."""


def count_changed_weights(run: Path) -> int | None:
    """Count the weights outside the head that a run changed, after merging its update into the backbone.

    Returns None if the update cannot be merged.
    """
    loaded = load_run(run, device="cpu")
    head = spec_of(loaded.model).head
    try:
        merged = merge_trained(loaded.model)
    except ValueError:
        return None
    return count_differences(merged, make_backbone(loaded.info.backbone, loaded.task.name), head)


def count_differences(model: nn.Module, other: nn.Module, head: str) -> int:
    """Count the weights that differ between two models of the same architecture, except in the module `head`."""
    other_parameters = dict(other.named_parameters())
    count = 0
    for name, parameter in model.named_parameters():
        if not is_inside(name, head):
            count += int((parameter != other_parameters[name]).sum())
    return count


def measure_forgetting(run: Path, data: str, max_images: int, cache: Path, device: str = "auto") -> dict[str, Any]:
    """Measure how much a run reduces the accuracy of a linear probe on different data.

    One probe uses the features of the trained model, and a second one uses those of the frozen backbone. The accuracy
    of the second probe is cached by backbone, data, preprocessing, and `max_images`.

    Args:
        run: Folder of the run.
        data: Data specification for the probe, which should differ from the run's.
        max_images: Maximum number of images for the probe.
        cache: Folder for the cached accuracies; created if missing.
        device: Device on which the features are computed, as in `load_run`.

    Returns:
        The `CellResults` fields `forgetting` (a fraction, negative if the adapted features are better),
        `forgetting_data`, `probe_accuracy_frozen`, and `probe_accuracy_adapted`.

    Raises:
        Exception: Any error that `load_run` or `probe_images` raises.
    """
    loaded = load_run(run, device)
    parts, labels = probe_images(data, max_images)
    transform = build_transform(loaded.info.data_config)
    parts = [part.with_transform(transform) for part in parts]
    adapted = probe_accuracy(head_inputs(loaded.model, parts, _PROBE_BATCH_SIZE), labels)
    backbone = loaded.info.backbone
    path = cache / _cache_name(loaded.info, data, max_images)
    if path.is_file():
        frozen = float(json.loads(path.read_text())["accuracy"])
    else:
        model = build_method(PROBE_METHOD, make_backbone(backbone)).to(loaded.device)
        frozen = probe_accuracy(head_inputs(model, parts, _PROBE_BATCH_SIZE), labels)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"data": data, "images": len(labels), "backbone": plain(backbone), "accuracy": frozen})
    return {
        "forgetting": frozen - adapted,
        "forgetting_data": data,
        "probe_accuracy_frozen": frozen,
        "probe_accuracy_adapted": adapted,
    }


def _cache_name(info: RunInfo, data: str, max_images: int) -> str:
    """Return the file name for the cached accuracy of the frozen backbone's probe."""
    backbone = info.backbone
    # the digest covers the preprocessing, and distinguishes names that become equal when characters are replaced below
    hashed = json.dumps([data, info.data_config], sort_keys=True)
    digest = hashlib.sha256(hashed.encode()).hexdigest()[:8]
    name = "_".join(str(part) for part in (backbone.name, backbone.img_size, data, max_images, digest))
    if backbone.pretrained is False:  # None means pre-trained; only the features of random weights depend on the seed
        name += f"_{backbone.seed}"
    characters = [character if character.isalnum() or character in "._-" else "-" for character in name]
    name = "".join(characters)
    if len(name.encode()) > _MAX_NAME_BYTES:
        name = hashlib.sha256(name.encode()).hexdigest()
    return f"{name}.json"


@torch.no_grad()
def head_inputs(model: nn.Module, parts: Sequence[ImageDataset], batch_size: int) -> NDArray[np.float32]:
    """Apply a model from `build_method` to images and return the inputs to its head.

    The model is switched to evaluation mode and stays in it.

    Returns:
        `[images, width]`, in the order of `parts`.
    """
    _, head = base_and_head(model)
    batches: list[Tensor] = []
    device = next(model.parameters()).device
    model.eval()
    with recorded_inputs(head) as recorded:
        for images, *_ in DataLoader(ConcatDataset(parts), batch_size):
            model(images.to(device))
            batches.append(recorded.pop().flatten(1).float().cpu())
    return torch.cat(batches).numpy()


def probe_accuracy(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the stratified cross-validation accuracy of a logistic regression.

    Args:
        features: Features, `[images, width]`.
        labels: Class indices, `[images]`, with at least two images per class.
    """
    class_sizes = np.bincount(labels)[np.unique(labels)]
    folds = min(_MAX_FOLDS, int(class_sizes.min()))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a comparison of accuracies does not need full convergence
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, features, labels, cv=split)
    return float((predicted == labels).mean())


def probe_images(data: str, max_images: int) -> tuple[list[ImageDataset], NDArray[np.int64]]:
    """Return a stratified sample of at most `max_images` training and validation images, with labels.

    Raises:
        FileNotFoundError: If the data does not exist.
        ImportError: If a package that the data needs is not installed.
        ConnectionError: If a dataset on the Hub is not cached and the Hub is unreachable.
        ValueError: If the data is invalid, the sample has only one image of a class, or a sample of `max_images` is too
            small for one image of each class.
    """
    splits = load_data(data)
    parts = [splits.train] if splits.val is None else [splits.train, splits.val]
    labels = [label for part in parts for label in part.labels]
    if len(labels) > max_images:
        chosen = stratified_sample(labels, max_images, seed=0, classes=splits.classes, argument="forgetting_images")
        num_train = len(splits.train)
        train_indices = [index for index in chosen if index < num_train]
        val_indices = [index - num_train for index in chosen if index >= num_train]
        # not strict: without a validation split, `parts` has one entry and `val_indices` is empty
        indexed_parts = zip(parts, (train_indices, val_indices), strict=False)
        parts = [part.subset(indices) for part, indices in indexed_parts if indices]
    targets = np.array([label for part in parts for label in part.labels])
    counts = np.bincount(targets, minlength=len(splits.classes))
    singletons = [name for name, count in zip(splits.classes, counts, strict=True) if count == 1]
    if singletons:
        raise ValueError(
            f"forgetting on {data!r} requires two images per class, but the sample has only one image of each of these "
            f"classes: {', '.join(singletons)}; increase forgetting_images ({max_images}) or choose different data"
        )
    return parts, targets


def row_header(cell: Cell, experiment: Experiment, created_at: str) -> dict[str, Any]:
    """Return the fields of a `CellRow` that are known before training."""
    config = cell.config(experiment, cell.name)
    peft_type = find_method(cell.method.method).peft_type
    if not peft_type:
        family, _ = parse_method(cell.method.method)
        peft_type = family.upper()
    packages = package_info()
    _, is_dirty = git_state()
    return {
        "cell": cell.name,
        "purpose": "final" if cell.is_final else "trial",
        "metric": experiment.metric,
        "task_name": cell.data.name,
        "group": cell.data.group,
        "experiment_name": cell.method.name,  # PEFT's method comparison calls a method with its settings an experiment
        "comparison": experiment.name,
        "method": cell.method.method,
        "peft_type": peft_type,
        "model_id": experiment.backbone,
        "seed": cell.seed,
        "lr_factor": cell.candidate.lr_factor,
        "tried_weight_decay": cell.candidate.weight_decay,
        "lr": config.optim.lr,
        "head_lr": config.optim.head_lr,
        "weight_decay": config.optim.weight_decay,
        "search": cell.search,
        "train_config": config.stored(),
        "peft_version": packages["peft-version"],
        "transformers_version": packages["transformers-version"],
        "torch_version": packages["torch-version"],
        "snella_version": packages["snella-version"],
        "git_dirty": is_dirty,
        "package_info": packages,
        "system_info": system_info(),
        "created_at": created_at,
    }


def read_results(folder: Path) -> CellResults:
    """Read the results of a finished run."""
    metrics = read(Metrics, folder)
    data = read(RunInfo, folder).data
    run = RunFolder(folder)
    adapter_row = next(row for row in metrics.history if row.epoch == metrics.adapter_epoch)
    epochs = sum(row.epoch > 0 for row in metrics.history)  # epoch 0 is an evaluation before training
    peft_config: dict[str, Any] | None = None
    peft_config_file = run.adapter / "adapter_config.json"
    if peft_config_file.is_file():  # missing for methods outside PEFT
        peft_config = json.loads(peft_config_file.read_text())
    return CellResults(
        peft_config=peft_config,
        num_trainable_params=metrics.trainable_parameters,
        adapted_weights=metrics.adapted_weights,
        kept_weights=adapter_row.budget,
        file_size=metrics.adapter_bytes,
        train_time=metrics.train_s,
        step_time=metrics.step_s,
        accelerator_memory_max=metrics.accelerator_memory_max,
        accelerator_memory_reserved_avg=metrics.accelerator_memory_reserved_avg,
        accelerator_memory_reserved_99th=metrics.accelerator_memory_reserved_99th,
        train_loss=adapter_row.train_loss,
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
    """Return the scores of one split by name; `accuracy`, `balanced_accuracy`, and `loss` are None if not measured."""
    names = ["accuracy", "balanced_accuracy", "loss"]
    for measures in MEASURES.values():
        names += [name for name in measures if hasattr(scores, name)]
    return {name: getattr(scores, name, None) for name in names}


def reuse_tuning_run(root: Path, experiment: Experiment, cell: Cell, folder: Path) -> CellRow | None:
    """Reuse the tuning run with the candidate and seed of a final run, instead of training again.

    The tuning run is copied to `folder` and evaluated on the test images.

    Returns:
        Row of the tuning run. None if `cell` is itself a tuning run, or if the tuning run cannot be reused: it failed,
        its row or adapter is missing, or its settings, package versions, commit, machine, or number of threads differ
        from the current ones.
    """
    if not cell.is_final:
        return None
    tuning_cell = replace(cell, is_final=False, search=None)
    placeholder = "-"  # the same folder for both runs, so that their folders do not count as a difference
    if cell.config(experiment, placeholder) != tuning_cell.config(experiment, placeholder):
        return None  # with protocol `final`, final runs train on the validation images as well, but tuning runs do not
    tuning_run = RunFolder(tuning_cell.folder(root))
    row = read_row(tuning_run.path)
    if row is None or row.status != "success" or not tuning_run.adapter.is_dir():
        return None
    stored = (row.train_config, row.package_info, row.system_info)
    current = (tuning_cell.config(experiment, tuning_cell.name).stored(), package_info(), system_info())
    if stored != current:
        return None
    shutil.copytree(tuning_run.path, folder, ignore=shutil.ignore_patterns(CellRow.file))
    final_run = RunFolder(folder)
    config = final_run.read_config().replace(out=str(folder))
    final_run.write_config(config)
    scores = evaluate(folder, split="test", batch_size=config.optim.effective_batch_size, device=config.run.device)
    final_run.write(replace(read(Metrics, folder), test=scores_from(scores)))
    return row


def drop_adapters(root: Path, experiment: Experiment, cell: Cell) -> None:
    """Delete adapters of tuning runs with the method, task, and seed of a finished cell.

    The best of these runs, including ties, keep their adapters until the final run with this seed is finished, because
    the final run may reuse one of them.
    """
    tuning_folder = replace(cell, is_final=False).folder(root).parent
    ranks: dict[Path, tuple[float, float]] = {}  # higher is better
    for file in tuning_folder.glob(f"*_seed-{cell.seed}/{CellRow.file}"):
        row = read_row(file.parent)
        if row is not None:
            ranks[file.parent] = tuning_result(row).rank
    # tuning may use more seeds than there are final runs; no final run reuses the adapters of the additional seeds
    awaits_final_run = not cell.is_final and cell.seed < experiment.seeds
    for folder, rank in ranks.items():
        if not awaits_final_run or rank < max(ranks.values()):
            shutil.rmtree(RunFolder(folder).adapter, ignore_errors=True)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell: a row, an error, or neither if the cell must be restarted or another process has claimed it.

    Args:
        cell: Cell that was started.
        row: Row of the cell, which may record a failed training run.
        is_local: False if this call did not train the cell, because its row exists or another process has claimed it.
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

    An interrupted attempt resumes from its checkpoint, if that is intact and has the same settings and package
    versions. Otherwise, the files of the attempt are deleted first. A failed run is stored as a row with its error.

    Args:
        root: Folder of the comparison.
        experiment: The experiment.
        cell: Cell to train.
        is_dedicated: Whether this process trains no other cell. If True, the row contains the process's peak memory.
        keep_checkpoints: If True, save a checkpoint after each epoch, e.g. on preemptible machines. SIGTERM and Ctrl-C
            always save one.

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
    """Store and return the row of a cell that crashed or is blocked by failed tuning runs.

    A row that is already stored is returned unchanged. Returns None if another process has claimed the cell. If
    `ignores_lock`, the row is stored even then, because the process that holds the lock may be unresponsive.
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


def _train_cell(root: Path, experiment: Experiment, cell: Cell, is_dedicated: bool, keep_checkpoints: bool) -> CellRow:
    """Train and evaluate a cell, and return a row with its results or error."""
    start = time.monotonic()
    before_mib = psutil.Process().memory_info().rss / 2**20
    created_at = timestamp()
    folder = cell.folder(root)
    log = root / LOGS / (cell.name.replace("/", "!") + ".txt")  # cell names contain slashes
    log.parent.mkdir(parents=True, exist_ok=True)
    config = cell.config(experiment, folder)
    resumed_s = _resumable_s(folder, config)
    is_resumed = resumed_s is not None
    if not is_resumed and folder.exists():
        shutil.rmtree(folder)
    header = row_header(cell, experiment, created_at)
    with log.open("a" if is_resumed else "w", encoding="utf-8") as file:
        try:
            tuning_row = None if is_resumed else reuse_tuning_run(root, experiment, cell, folder)
            if tuning_row is None:
                train(
                    config.replace(resume=is_resumed),
                    Console(file=file, width=200),
                    evaluate_test=cell.is_final,
                    keep_checkpoints=keep_checkpoints,
                    render_report=False,
                )
            results = read_results(folder)
            if tuning_row is not None and tuning_row.results is not None:
                results = replace(
                    results,
                    trained_as=tuning_row.cell,
                    peak_rss_mib=tuning_row.results.peak_rss_mib,
                    training_mib=tuning_row.results.training_mib,
                )
            elif is_dedicated:
                peak_mib = read(Metrics, folder).peak_rss_mib
                results = replace(results, peak_rss_mib=peak_mib, training_mib=round(peak_mib - before_mib, 1))
            _check_score(experiment, cell, results)
            if cell.is_final:
                results = replace(results, **_measure_final_run(root, experiment, cell, config))
            shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)
        except TrainingInterrupted:
            raise  # not a failure: the cell is started again later
        except Exception as error:
            traceback.print_exc(file=file)
            total_s = time.monotonic() - start + (resumed_s or 0.0)
            return CellRow(**header, status="failed", error=_error_text(error), total_time=round(total_s, 3))
    earlier_s = resumed_s or 0.0
    if tuning_row is not None:
        earlier_s = tuning_row.total_time  # includes the reused training
    total_s = time.monotonic() - start + earlier_s
    return CellRow(**header, status="success", total_time=round(total_s, 3), results=results)


def _resumable_s(folder: Path, config: TrainConfig) -> float | None:
    """Return the seconds that an interrupted attempt had trained at the checkpoint from which it can resume.

    Returns None if there is no intact checkpoint with the same settings and package versions.
    """
    run = RunFolder(folder)
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        return None
    try:
        if run.status not in ("running", "interrupted") or find_damage(checkpoint, run.id):
            return None
        versions = read(RunInfo, folder).versions
        packages = set(versions) - {"python"}
        if versions != versions_of(packages):
            return None
        if config.differences(run.read_config()):
            return None
        progress = json.loads((checkpoint / "progress.json").read_text())
        return float(progress["elapsed_s"])
    except (OSError, ValueError, LookupError, TypeError, PackageNotFoundError):
        return None  # a file of the attempt is damaged, or one of its packages is no longer installed


def _check_score(experiment: Experiment, cell: Cell, results: CellResults) -> None:
    """Check that a final run has a test score, and that the score used for comparison, if any, is finite."""
    if cell.is_final:
        split = "test"
        scores = results.test
    else:
        split = "validation"
        scores = results.val
    score = scores.get(experiment.metric)
    if cell.is_final and score is None:
        raise ValueError(f"data {cell.data.data!r} must have a test split for a final run, but has none")
    if score is not None and not math.isfinite(score):
        title = experiment.measures[experiment.metric]
        raise ValueError(f"{title} is undefined on the {split} images, for example because all targets are equal")


def _measure_final_run(root: Path, experiment: Experiment, cell: Cell, config: TrainConfig) -> dict[str, Any]:
    """Return the `CellResults` fields that only final runs have: the number of changed weights, and forgetting."""
    folder = cell.folder(root)
    measured: dict[str, Any] = {"changed_weights": count_changed_weights(folder)}
    if config.data.channels == 3:  # probe images are RGB; forgetting is not measured for other numbers of channels
        probe_data = experiment.probe_data(cell.data)
        if probe_data is not None:
            cache = root / "frozen"
            max_images = experiment.forgetting_images
            measured |= measure_forgetting(folder, probe_data, max_images, cache, config.run.device)
    return measured


def _error_text(error: Exception) -> str:
    """Return the type and message of an error as one line, shortened for a row; the log contains the full text."""
    text = " ".join(str(error).split())
    if len(text) > _MAX_ERROR_LENGTH:
        text = text[:_MAX_ERROR_LENGTH] + " …"
    return f"{type(error).__name__}: {text}"
