"""End of a training run: evaluation of the saved model, results, report and console summary."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snella_app.console import print_line
from snella_app.data import ImageDataset
from snella_app.data.protocol import RunProtocol
from snella_app.files import write_text
from snella_app.methods import load_trained_into
from snella_app.records import AveragedEpochs, EpochRow, FinalHead, Metrics, plain, scores_from
from snella_app.report.card import model_card
from snella_app.report.report import write_report
from snella_app.runs.calibrate import calibrate
from snella_app.runs.folder import CARD
from snella_app.runs.layer_probe import LAYER_PROBE
from snella_app.tasks import Task
from snella_app.training.distributed import is_main, process_count, wait_for_everyone
from snella_app.training.final_head import LayerFit, fit_layers, is_clearly_worse, measure_layers
from snella_app.training.linear_probe import original_images, probe_rows
from snella_app.training.memory import peak_rss_mib
from snella_app.training.results import (
    best_epoch,
    describe_allocation,
    folder_bytes,
    matrices_of,
    sparsity_summary,
    trainable_parameters,
)
from snella_app.training.session import Session
from snella_app.training.sharding import is_sharded
from snella_app.training.trainer import SnellaTrainer

_ADAPTER_USE = """This folder contains an adapter in PEFT format. Run `import snella` before loading it with PEFT; the
package registers the adapter's keys. With the run folder, `snella predict RUN IMAGES` runs prediction on images, and
`snella merge RUN --out MODEL` merges the adapter into a plain model.
"""
_MAX_PREDICTIONS = 5_000  # predictions of a large test split take hundreds of megabytes
Outputs = tuple[np.ndarray, np.ndarray]
"""Reduced outputs and targets of all images in a split."""


@dataclass
class _Measured:
    """Results of the saved model.

    Attributes:
        outputs: Outputs of the final head by split.
        averaged: Weight average over epochs, if computed.
        final_head: Linear head on several layers, if fitted.
    """

    outputs: dict[str, Outputs]
    averaged: AveragedEpochs | None
    final_head: FinalHead | None


def write_live_report(session: Session, trainer: SnellaTrainer) -> None:
    """Write the report of the completed epochs."""
    parts = session.parts
    allocation = None if trainer.allocator is None else describe_allocation(parts.model, trainer.allocator)
    write_report(session.run.path, metrics=_metrics(session, trainer), allocation=allocation)


def finish(session: Session, trainer: SnellaTrainer) -> None:
    """Evaluate the saved model, write results and report, and print a summary."""
    train_s, run, parts = trainer.elapsed_s, session.run, session.parts
    measured = _measure(session, trainer)
    name, reported_images = ("val", parts.splits.val) if parts.splits.val is not None else ("test", parts.splits.test)
    if reported_images is not None and len(reported_images) > _MAX_PREDICTIONS:
        reported_images = None
    if not is_main():
        if reported_images is not None and is_sharded(parts.model):
            # the main process predicts examples and needs the weight shards of this process
            with tempfile.TemporaryDirectory() as folder:
                sample_outputs = parts.task.sample_outputs(measured.outputs[name][0])
                parts.task.save_examples(parts.model, reported_images, sample_outputs, Path(folder))
        return
    scores = _write_task_state(session, measured.outputs)
    if trainer.allocator is not None:
        run.write(describe_allocation(parts.model, trainer.allocator))
    report_images = (
        None if reported_images is None else _write_predictions(session, name, reported_images, measured.outputs[name])
    )
    run.write(
        dataclasses.replace(
            _metrics(session, trainer),
            train_s=round(train_s, 3),
            averaged=measured.averaged,
            final_head=measured.final_head,
            val=None if scores["val"] is None else scores_from(scores["val"]),
            test=None if scores["test"] is None else scores_from(scores["test"]),
        )
    )
    write_text(run.adapter / CARD, model_card(run.path, _ADAPTER_USE, library="peft"))
    # written before the status, so that resuming a run killed here completes it
    report = write_report(run.path, report_images, state="finished") if session.render_report else None
    run.finish()
    _print_results(session, trainer, measured, scores)
    print_line(session.console, f"adapter {run.adapter}" + (f", report {report}" if report else ""))


def _measure(session: Session, trainer: SnellaTrainer) -> _Measured:
    """Load the saved adapter and compute the outputs of the final head on validation and test images."""
    parts, console = session.parts, session.console
    averaged = trainer.average_epochs()
    wait_for_everyone()  # until the main process has written the best adapter
    if trainer.feature_norm is not None:
        trainer.feature_norm.remove()
    load_trained_into(parts.model, session.run.adapter)
    with console.status("evaluating the saved model") if console.is_terminal else contextlib.nullcontext():
        outputs = {} if parts.splits.val is None else {"val": trainer.outputs(parts.splits.val)}
        fit, final_head = _fit_final_head(session, trainer, outputs)
        if parts.splits.test is not None:
            views, loader = session.plan.data.views, trainer.get_eval_dataloader
            outputs["test"] = (
                trainer.outputs(parts.splits.test)
                if fit is None
                else measure_layers(parts, fit.probe, parts.splits.test, views, loader)
            )
    return _Measured(outputs, averaged, final_head)


def _write_task_state(session: Session, outputs: dict[str, Outputs]) -> dict[str, dict[str, Any] | None]:
    """Calibrate the task on validation outputs, store its state and temperature, and return the scores by split."""
    run, parts = session.run, session.parts
    if "val" in outputs:
        parts.task = parts.task.calibrated(*outputs["val"])
    scores = {name: parts.task.metrics(*outputs[name]) if name in outputs else None for name in ("val", "test")}
    if state := parts.task.state():
        run.update("running", task_state=state)
    if parts.task.has_one_class:
        probabilities = {name: parts.task.sample_outputs(reduced) for name, (reduced, _) in outputs.items()}
        calibration = calibrate({name: (probabilities[name], torch.from_numpy(outputs[name][1])) for name in outputs})
        run.update("running", calibration=None if calibration is None else plain(calibration))
    return scores


def _write_predictions(session: Session, name: str, images: ImageDataset, outputs: Outputs) -> Any:
    """Write the predictions of a split and the examples for the report; return the source of the report's images."""
    run, parts = session.run, session.parts
    sample_outputs = parts.task.sample_outputs(outputs[0])
    parts.task.save_examples(parts.model, images, sample_outputs, run.path)
    run.write(parts.task.predictions(images, sample_outputs, name, run.path))
    return parts.task.report_images(images, run.path)


def _metrics(session: Session, trainer: SnellaTrainer) -> Metrics:
    """Build the metrics record of the completed epochs."""
    parts, protocol, matrices = session.parts, trainer.protocol, matrices_of(session.parts.model)
    return Metrics(
        best_epoch=best_epoch(trainer.history, trainer.selection_score),
        protocol=protocol.name,
        selected_on=protocol.selected_on,
        best_metric=protocol.best_metric(f"val_{parts.task.monitor}"),
        ema=session.plan.optim.ema,
        train_s=round(trainer.elapsed_s, 3),
        trainable_parameters=trainable_parameters(parts.model),
        adapted_weights=sum(m.size for m in matrices) if matrices else None,
        adapter_bytes=folder_bytes(session.run.adapter),
        peak_rss_mib=peak_rss_mib(),
        **session.step_timer.summary(),
        history=[EpochRow(**protocol.with_val_prefix(row)) for row in trainer.history],
    )


def _fit_final_head(
    session: Session, trainer: SnellaTrainer, outputs: dict[str, Outputs]
) -> tuple[LayerFit | None, FinalHead | None]:
    """Fit a linear head on several layers if requested, and save it unless it is clearly worse on the validation set.

    Args:
        session: Training session; the head is saved in the adapter folder.
        trainer: Trainer that provides the data loaders.
        outputs: Validation outputs of the trained head, if available; replaced by the outputs of a saved final head.

    Returns:
        The fit, or None if it is not saved, and its record, or None if no head was fitted.
    """
    views, parts, run = session.plan.data.views, session.parts, session.run
    task = parts.task
    if is_main():
        (run.adapter / LAYER_PROBE).unlink(missing_ok=True)  # left by an interrupted `finish`
        run.update("running", final_head="trained")
    if session.plan.optim.final_head != "layers" or process_count() > 1:  # a run resumed in several processes
        return None, None
    train = original_images(parts.splits.train).subset(probe_rows(parts).tolist())
    fit = fit_layers(parts, train, views, trainer.get_eval_dataloader)
    if fit.val is None:
        record = FinalHead(fit.probe.layers, True)
    else:
        val, val_trained = (float(task.metrics(*part)[task.monitor]) for part in (fit.val, outputs["val"]))
        is_saved = not is_clearly_worse(task, fit.val, outputs["val"])
        record = FinalHead(fit.probe.layers, is_saved, task.monitor, val, val_trained)
        if not is_saved:
            return None, record
        outputs["val"] = fit.val
    fit.probe.save(run.adapter / LAYER_PROBE)
    run.update("running", final_head="layers")
    return fit, record


def _print_results(
    session: Session, trainer: SnellaTrainer, measured: _Measured, scores: dict[str, dict[str, Any] | None]
) -> None:
    """Print the selected epoch, its results and the sparsity of the adapter."""
    console, parts, averaged = session.console, session.parts, measured.averaged
    best, epochs = best_epoch(trainer.history, trainer.selection_score), session.plan.optim.epochs
    if trainer.has_stopped_early and (last := trainer.history[-1]["epoch"]) < epochs:
        print_line(console, f"stopped after epoch {last} of {epochs}")
    if averaged is not None:
        print_line(console, _averaged_text(averaged, best))
    if measured.final_head is not None:
        print_line(console, _final_head_text(measured.final_head))
    average = averaged.text if averaged is not None and averaged.is_saved else None
    saved = average if epochs else _untrained_text(measured.final_head)
    print_line(console, _final_text(parts.task, trainer.protocol, best, scores["val"], scores["test"], saved))
    if trainer.protocol.warning:
        print_line(console, f"{trainer.protocol.name} protocol: {trainer.protocol.warning}")
    measured_part = scores["val"] or scores["test"] or {}
    if parts.task.has_one_class and (only_class := _only_class(measured_part, parts.splits.classes)):
        print_line(
            console,
            f"note: every {'test' if scores['val'] is None else 'validation'} image is predicted as {only_class!r}; "
            "the model did not learn to distinguish the classes; try a larger --img-size, more --epochs or --sampler "
            "weighted",
        )
    matrices = matrices_of(parts.model)
    if matrices and (best > 0 or average is not None):
        budget = sum(m.budget for m in matrices)
        print_line(console, f"the update {sparsity_summary(matrices)}")
        target = budget if trainer.allocator is None else trainer.allocator.target_budget
        if budget > target and average is None:
            print_line(console, f"epoch {best} was selected before the budget reached its target, {target:,} weights")


def _final_head_text(head: FinalHead) -> str:
    """Describe the head fitted after training and its use in predictions."""
    if head.metric is None:
        return f"{head.name} is the final head, fitted to the training images"
    if not head.is_saved:
        return f"{head.name} is clearly worse: {head.comparison}, which is the final head"
    return f"{head.name} is the final head: {head.comparison}; refitted on training and validation images"


def _untrained_text(head: FinalHead | None) -> str:
    """Describe the saved model of a run without epochs."""
    return f"not trained (0 epochs); the {head.name if head is not None and head.is_saved else 'linear probe'} is saved"


def _only_class(scores: dict[str, Any], classes: Sequence[str]) -> str | None:
    """Return the only predicted class; None if several classes are predicted or the images have only one class."""
    confusion = np.asarray(scores.get("confusion") or [[]])
    predicted = np.flatnonzero(confusion.sum(0))
    return classes[predicted[0]] if len(predicted) == 1 and np.count_nonzero(confusion.sum(1)) > 1 else None


def _averaged_text(averaged: AveragedEpochs, best: int) -> str:
    """Describe the result of `--swa` or `--soup`."""
    candidates = f"of epochs {averaged.offered[0]} to {averaged.offered[-1]}"
    if averaged.is_saved:
        return f"{averaged.kind} {candidates}: {averaged.text} is saved"
    worse = f"is worse on the validation set than epoch {best}, which is saved"
    return f"{averaged.kind} {candidates}: {averaged.text} {worse}"


def _final_text(
    task: Task,
    protocol: RunProtocol,
    best: int,
    val: dict[str, Any] | None,
    test: dict[str, Any] | None,
    saved: str | None,
) -> str:
    """Format the results of the saved model and the selection criterion; `saved` describes a model without an epoch."""
    if val is not None:
        selected = f"best epoch {best}" if best > 0 else "no epoch is better than the initial model, which is saved"
        return f"{saved or selected}: {task.final_text(val, test)}"
    if saved is None:
        saved = (
            f"epoch {best}, the last" if protocol.selected_on is None else f"epoch {best}, the best on the test images"
        )
    return f"{saved}: " + ("not evaluated" if test is None else f"test {task.result_format.format_map(test)}")
