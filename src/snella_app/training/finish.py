"""End of a training run: evaluation of the saved model, results, reports, and console summary.

Training saves the adapter of the best epoch. Afterwards, an average of epochs may replace it, and a head may be fitted
to features of several layers. This head replaces the trained head unless it is clearly worse on validation images.

The budget of a weight matrix is the maximum number of its entries that the sparse update may change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from snella import BudgetAllocator
from snella.matrices import AdaptedMatrix
from snella_app.console import print_line
from snella_app.data.datasets import ImageDataset
from snella_app.files import write_text
from snella_app.methods import load_trained_into, spec_of
from snella_app.methods.registry import can_merge, matrices_of, trainable_parameters
from snella_app.records.predictions import MAX_PREDICTIONS
from snella_app.records.record import plain
from snella_app.records.results import scores_from
from snella_app.records.run import Allocation, AllocationStep, AveragedEpochs, EpochRow, FinalHead, MatrixInfo, Metrics
from snella_app.report.card import model_card
from snella_app.report.report import write_report
from snella_app.runs.calibrate import calibrate
from snella_app.runs.folder import CARD
from snella_app.runs.layer_probe import LAYER_PROBE, LayerProbe, MixedHead
from snella_app.tasks import Task
from snella_app.training.build import RunComponents
from snella_app.training.checkpoints import BEST
from snella_app.training.distributed import is_main, is_sharded, process_count, wait_for_everyone
from snella_app.training.final_head import (
    LayerFit,
    OutputsAndLabels,
    compute_probe_outputs,
    fit_layers,
    fits_last_epoch,
    is_clearly_worse,
)
from snella_app.training.linear_probe import original_images, probe_indices
from snella_app.training.memory import peak_rss_mib
from snella_app.training.trainer import SnellaTrainer

_PEFT_USE = """This folder contains an adapter in PEFT format. If PEFT does not know the adapter's type,
run `import snella` first, which registers it."""
_PLAIN_USE = """This folder contains the trained weights, which `snella_app.methods.load_trained` loads into the
backbone."""
_PREDICT_USE = "With the run folder, `snella predict RUN IMAGES` runs prediction on images"
_MERGE_USE = "`snella merge RUN --out MODEL.safetensors` merges the weights into a plain model"
_REPORT_INTERVAL_S = 30.0
"""Minimum seconds between two updates of the report during training."""


class LiveReport(TrainerCallback):
    """Callback that updates the report after a checkpoint, at most once every `_REPORT_INTERVAL_S` seconds.

    The pause after an update is at least 50 times its duration, so updates take at most 2% of the time.
    """

    def __init__(self, trainer: SnellaTrainer) -> None:
        self.trainer = trainer
        self._written_at = time.monotonic()
        self._pause = _REPORT_INTERVAL_S

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Write the report of the completed epochs."""
        start = time.monotonic()
        trainer = self.trainer
        if start - self._written_at < self._pause or not trainer.history:
            return
        # a full disk is reported by the next checkpoint, any other persistent error by the final report
        with contextlib.suppress(OSError, ValueError):
            allocation = None
            if trainer.allocator is not None:
                allocation = describe_allocation(trainer.parts.model, trainer.allocator)
            metrics = _metrics(trainer)
            write_report(trainer.run_folder.path, metrics=metrics, allocation=allocation)
        self._written_at = time.monotonic()
        self._pause = max(_REPORT_INTERVAL_S, 50 * (self._written_at - start))


def finish(trainer: SnellaTrainer, console: Console, render_report: bool = True) -> None:
    """Average epochs if requested, fit the final head, evaluate the saved model, and write and print the results."""
    train_s = trainer.elapsed_s
    run = trainer.run_folder
    parts = trainer.parts
    if is_main():
        (run.adapter / LAYER_PROBE).unlink(missing_ok=True)  # left by an interrupted `finish`
        run.update("running", final_head="trained")
    averaged = trainer.average_epochs()
    wait_for_everyone()  # until the main process has written the best adapter
    status = console.status("evaluating the saved model") if console.is_terminal else contextlib.nullcontext()
    with status, tempfile.TemporaryDirectory() as folder:
        last_epoch = _fit_last_epoch(trainer, Path(folder))
        if trainer.feature_norm is not None:
            trainer.feature_norm.remove()
            trainer.feature_norm = None  # the saved weights include it
        best_folder = run.checkpoints / BEST
        load_trained_into(parts.model, best_folder if best_folder.is_dir() else run.adapter)
        if best_folder.is_dir():  # an interrupted `finish` has replaced the adapter
            trainer.save_adapter()
        outputs, final_head = _measure(trainer, last_epoch)
    split = "test" if parts.splits.val is None else "val"
    images = parts.splits.test if parts.splits.val is None else parts.splits.val
    if images is not None and len(images) > MAX_PREDICTIONS:
        images = None  # predictions are not stored for large splits
    if not is_main():
        if images is not None and is_sharded(parts.model):
            # the main process predicts examples and needs the weight shards of this process
            sample_outputs = parts.task.sample_outputs(outputs[split][0])
            with tempfile.TemporaryDirectory() as folder:
                parts.task.save_examples(parts.model, images, sample_outputs, Path(folder))
        return
    scores = _write_task_state(trainer, outputs)
    if trainer.allocator is not None:
        run.write(describe_allocation(parts.model, trainer.allocator))
    report_images = None
    if images is not None:
        sample_outputs = parts.task.sample_outputs(outputs[split][0])
        parts.task.save_examples(parts.model, images, sample_outputs, run.path)
        run.write(parts.task.predictions(images, sample_outputs, split, run.path))
        report_images = parts.task.report_images(images, run.path)
    metrics = _metrics(trainer)
    if final_head is not None and final_head.replaced_epoch is not None:
        metrics = dataclasses.replace(metrics, best_epoch=trainer.history[-1]["epoch"])
    val_scores = None if scores["val"] is None else scores_from(scores["val"])
    test_scores = None if scores["test"] is None else scores_from(scores["test"])
    metrics = dataclasses.replace(
        metrics,
        train_s=round(train_s, 3),
        averaged=averaged,
        final_head=final_head,
        val=val_scores,
        test=test_scores,
    )
    run.write(metrics)
    write_text(run.adapter / CARD, _adapter_card(run.path, parts.model))
    # written before the status, so that resuming completes a run killed here
    report = write_report(run.path, report_images, state="finished") if render_report else None
    run.finish()
    shutil.rmtree(best_folder, ignore_errors=True)
    _print_results(console, trainer, metrics, scores)
    print_line(console, f"adapter {run.adapter}" + (f", report {report}" if report else ""))


def _adapter_card(run: Path, model: nn.Module) -> str:
    """Return the model card of a run's adapter folder, which describes the files of `save_trained`."""
    is_peft = isinstance(model, PeftModel)
    use = f"{_PREDICT_USE}, and {_MERGE_USE}" if can_merge(spec_of(model).name) else _PREDICT_USE
    return model_card(run, f"{_PEFT_USE if is_peft else _PLAIN_USE} {use}.", library="peft" if is_peft else "snella")


@dataclasses.dataclass
class _LastEpoch:
    """Folder with the last epoch's weights, and the head on several layers that was fitted to this epoch."""

    folder: Path
    fit: LayerFit


def _fit_last_epoch(trainer: SnellaTrainer, folder: Path) -> _LastEpoch | None:
    """Fit a head on several layers to the last epoch's model, and write the model's trained weights to a folder.

    With `ema`, the model has the averaged weights.

    Returns:
        The folder and the fit. None if `_fits_layers` or `fits_last_epoch` is False, if the last epoch is the best one,
        if there are no validation images, or if training stopped early.
    """
    plan = trainer.plan
    parts = trainer.parts
    is_best = trainer.history[-1]["epoch"] == trainer.best_epoch
    can_fit = _fits_layers(trainer) and fits_last_epoch(plan) and parts.splits.val is not None
    if not can_fit or is_best or trainer.has_stopped_early:
        return None
    with trainer.average_parameters():
        fit = fit_layers(parts, _head_images(parts), plan.data, plan.optim)
        trainer.save_adapter(folder)
    return _LastEpoch(folder, fit)


def _fits_layers(trainer: SnellaTrainer) -> bool:
    """Return whether the run fits a head on several layers.

    A run that is resumed in several processes does not, even if its plan includes the head.
    """
    return trainer.plan.optim.final_head == "layers" and process_count() == 1


def _head_images(parts: RunComponents) -> ImageDataset:
    """Return the training images to which the final head is fitted."""
    return original_images(parts.splits.train).subset(probe_indices(parts).tolist())


def _measure(
    trainer: SnellaTrainer, last_epoch: _LastEpoch | None
) -> tuple[dict[str, OutputsAndLabels], FinalHead | None]:
    """Choose the final head, and compute its outputs on the validation and test images.

    Returns:
        The outputs by split, and the record of the head on several layers, which is None if no such head was fitted.
    """
    parts = trainer.parts
    plan = trainer.plan
    splits = parts.splits
    views = plan.data.views
    outputs: dict[str, OutputsAndLabels] = {}
    fit: LayerFit | None = None
    probe: LayerProbe | None = None
    final_head: FinalHead | None = None
    if last_epoch is not None:
        fit = last_epoch.fit
    elif _fits_layers(trainer):
        fit = fit_layers(parts, _head_images(parts), plan.data, plan.optim)
        if fit.trained_val is not None:
            outputs["val"] = fit.trained_val
    if splits.val is not None and not outputs:
        outputs["val"] = trainer.outputs(splits.val, views)
    if fit is not None:
        probe, final_head = _select_final_head(trainer, fit, outputs, last_epoch)
        if probe is None and splits.val is not None and outputs["val"] is fit.trained_val:
            outputs["val"] = trainer.outputs(splits.val, views)  # the fit may have computed its features in bfloat16
            final_head = dataclasses.replace(final_head, val_trained=_score(parts.task, outputs["val"]))
    if splits.test is not None and probe is not None:
        outputs["test"] = compute_probe_outputs(parts, probe, splits.test, views, plan.optim.effective_batch_size)
    elif splits.test is not None:
        outputs["test"] = trainer.outputs(splits.test, views)
    return outputs, final_head


def _select_final_head(
    trainer: SnellaTrainer, fit: LayerFit, outputs: dict[str, OutputsAndLabels], last_epoch: _LastEpoch | None
) -> tuple[LayerProbe | None, FinalHead]:
    """Save the head on several layers and replace the trained head's `outputs`, unless the new head is clearly worse.

    If the head was fitted to the last epoch, also save this epoch instead of the best one, which was selected with the
    trained head.

    Returns:
        The saved head, or None if it is clearly worse, and the record of the head.
    """
    parts = trainer.parts
    run = trainer.run_folder
    task = parts.task
    probe = fit.probe
    kind: Literal["linear", "mixed"] = "mixed" if isinstance(probe.head, MixedHead) else "linear"
    record = FinalHead(probe.layers, is_saved=True, kind=kind)
    if fit.val is not None:
        is_saved = not is_clearly_worse(task, fit.val, outputs["val"])
        replaced_epoch = None
        if is_saved and last_epoch is not None:
            replaced_epoch = trainer.best_epoch
        scores: dict[str, Any] = {"val": _score(task, fit.val), "val_trained": _score(task, outputs["val"])}
        record = FinalHead(probe.layers, is_saved, task.monitor, **scores, kind=kind, replaced_epoch=replaced_epoch)
        if not is_saved:
            return None, record
        outputs["val"] = fit.val
        if last_epoch is not None:
            _store_best(trainer)
            load_trained_into(parts.model, last_epoch.folder)
            trainer.save_adapter()
    probe.save(run.adapter / LAYER_PROBE)
    run.update("running", final_head="layers")
    return probe, record


def _score(task: Task, outputs: OutputsAndLabels) -> float:
    """Return the value of the monitored metric."""
    return float(task.metrics(*outputs)[task.monitor])


def _store_best(trainer: SnellaTrainer) -> None:
    """Store the best epoch's weights, so that `finish` can run again after an interruption."""
    checkpoints = trainer.run_folder.checkpoints
    staging = checkpoints / f".staging-{BEST}"
    if not (checkpoints / BEST).is_dir():
        shutil.rmtree(staging, ignore_errors=True)
        trainer.save_adapter(staging)
        staging.rename(checkpoints / BEST)


def _write_task_state(trainer: SnellaTrainer, outputs: dict[str, OutputsAndLabels]) -> dict[str, dict[str, Any] | None]:
    """Calibrate the task on validation outputs, store its state and temperature, and return the scores by split.

    The scores of a split that was not evaluated are None.
    """
    run, parts = trainer.run_folder, trainer.parts
    if "val" in outputs:
        parts.task = parts.task.calibrated(*outputs["val"])
    scores: dict[str, dict[str, Any] | None] = {}
    for split in ("val", "test"):
        scores[split] = parts.task.metrics(*outputs[split]) if split in outputs else None
    if state := parts.task.state():
        run.update("running", task_state=state)
    if parts.task.has_class_scores:
        measured = {
            name: (parts.task.sample_outputs(reduced), torch.from_numpy(labels))
            for name, (reduced, labels) in outputs.items()
        }
        calibration = calibrate(measured)
        run.update("running", calibration=None if calibration is None else plain(calibration))
    return scores


def _metrics(trainer: SnellaTrainer) -> Metrics:
    """Build the metrics record of the completed epochs."""
    parts = trainer.parts
    protocol = trainer.protocol
    matrices = matrices_of(parts.model)
    adapted_weights = sum(m.size for m in matrices) if matrices else None
    history = [EpochRow(**protocol.with_val_prefix(row)) for row in trainer.history]
    return Metrics(
        best_epoch=trainer.best_epoch,
        protocol=protocol.name,
        selected_on=protocol.selected_on,
        best_metric=protocol.best_metric(parts.task.monitor),
        ema=trainer.plan.optim.ema,
        train_s=round(trainer.elapsed_s, 3),
        trainable_parameters=trainable_parameters(parts.model),
        adapted_weights=adapted_weights,
        adapter_bytes=folder_bytes(trainer.run_folder.adapter),
        peak_rss_mib=peak_rss_mib(),
        **trainer.step_timer.summary(),
        history=history,
    )


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of the weight files in an adapter folder, except the head on several layers."""
    files = (path for path in folder.glob("*.safetensors") if path.name != LAYER_PROBE)
    return sum(path.stat().st_size for path in files)


def describe_allocation(model: nn.Module, allocator: BudgetAllocator) -> Allocation:
    """Build the allocation record: the matrices with their current budgets, and the history of the budgets."""
    matrices = [
        MatrixInfo(m.name, m.kind, m.depth, tuple(m.shape), m.size, m.budget, m.nonzeros()) for m in matrices_of(model)
    ]
    history = [AllocationStep(**entry) for entry in allocator.history]
    return Allocation(
        total_weights=allocator.total_weights,
        target_budget=allocator.target_budget,
        matrices=matrices,
        history=history,
    )


def _print_results(
    console: Console, trainer: SnellaTrainer, metrics: Metrics, scores: dict[str, dict[str, Any] | None]
) -> None:
    """Print the selected epoch, its results, and the sparsity of the update."""
    parts = trainer.parts
    protocol = trainer.protocol
    epochs = trainer.plan.optim.epochs
    best = cast(int, metrics.best_epoch)
    averaged = metrics.averaged
    head = metrics.final_head
    if trainer.has_stopped_early and (last := trainer.history[-1]["epoch"]) < epochs:
        print_line(console, f"stopped after epoch {last} of {epochs}")
    if averaged is not None:
        print_line(console, _averaged_text(averaged, best, metrics.selection))
    if head is not None:
        print_line(console, head.text)
    with_head = "" if head is None else f", with the {'final' if head.is_saved else 'trained'} head"
    saved_average = averaged.text if averaged is not None and averaged.is_saved else None
    saved = f"{saved_average}{with_head}" if saved_average else None
    if not epochs:
        saved_head = head.name if head is not None and head.is_saved else "linear probe"
        saved = f"not trained (0 epochs); the {saved_head} is saved"
    val, test = scores["val"], scores["test"]
    if val is not None:
        selected = f"best epoch {best}" if best > 0 else "no epoch is better than the initial model, which is saved"
        if head is not None and head.replaced_epoch is not None:
            selected = f"epoch {best}, the last"
        print_line(console, f"{saved or selected + with_head}: {parts.task.final_text(val, test)}")
    else:
        selected = f"epoch {best}, the {'last' if protocol.selected_on is None else 'best on the test images'}"
        result = "not evaluated" if test is None else f"test {parts.task.result_format.format_map(test)}"
        print_line(console, f"{saved or selected + with_head}: {result}")
    if protocol.warning:
        print_line(console, f"{protocol.name} protocol: {protocol.warning}")
    if parts.task.has_class_scores and (only_class := _only_class(val or test or {}, parts.splits.classes)):
        print_line(
            console,
            f"note: every {'test' if val is None else 'validation'} image is predicted as {only_class!r}; "
            "the model did not learn to distinguish the classes; try a larger --img-size, more --epochs or --sampler "
            "weighted",
        )
    matrices = matrices_of(parts.model)
    if matrices and epochs:
        budget = sum(m.budget for m in matrices)
        print_line(console, f"the update {sparsity_summary(matrices)}")
        target = budget if trainer.allocator is None else trainer.allocator.target_budget
        if budget > target and saved_average is None:  # an average has the budgets of the last step
            print_line(console, f"epoch {best} was selected before the budget reached its target, {target:,} weights")


def sparsity_summary(matrices: Sequence[AdaptedMatrix]) -> str:
    """Format the number of weights that an update changes."""
    budget, total = sum(m.budget for m in matrices), sum(m.size for m in matrices)
    return f"changes {budget:,} of {total:,} weights ({1 - budget / total:.1%} sparse)"


def _only_class(scores: dict[str, Any], classes: Sequence[str]) -> str | None:
    """Return the only predicted class, or None if several are predicted or the images themselves have only one."""
    confusion = np.asarray(scores.get("confusion") or [[]])  # rows: true classes, columns: predicted classes
    predicted = np.flatnonzero(confusion.sum(0))
    num_true = np.count_nonzero(confusion.sum(1))
    return classes[predicted[0]] if len(predicted) == 1 and num_true > 1 else None


def _averaged_text(averaged: AveragedEpochs, best: int, selection: str) -> str:
    """Describe the result of `--swa` or `--soup`; `selection` names the split on which epochs are selected."""
    candidates = f"of epochs {averaged.offered[0]} to {averaged.offered[-1]}"
    if averaged.is_saved:
        return f"{averaged.kind} {candidates}: {averaged.text} is saved"
    worse = f"is worse on the {selection} set than epoch {best}, which is saved"
    return f"{averaged.kind} {candidates}: {averaged.text} {worse}"
