"""`train`: one training run, from configuration to report."""

import contextlib
import dataclasses
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from snella import SnellaCallback
from snella_app.config import TrainConfig
from snella_app.console import make_console, print_line
from snella_app.data.protocol import RunProtocol, get_protocol
from snella_app.files import write_text
from snella_app.methods import load_trained_into, method_of
from snella_app.records import AveragedEpochs, EpochRow, FinalHead, Metrics, RunInfo, plain, read, scores_from
from snella_app.report import model_card, write_report
from snella_app.runs.calibrate import calibrate
from snella_app.runs.evaluate import redraw_report
from snella_app.runs.folder import CARD, RunFolder
from snella_app.runs.images import PARTS, check_splits, find_data
from snella_app.runs.layer_probe import LAYER_PROBE
from snella_app.tasks import Task
from snella_app.training.build import RunComponents, assemble, build_components, load_start, store_selection
from snella_app.training.callbacks import ProgressDisplay, ScheduleCallback, StepTimeCallback, TrackingCallback
from snella_app.training.checkpoints import latest_checkpoint
from snella_app.training.distributed import (
    from_main,
    is_main,
    join_processes,
    only_main,
    process_count,
    wait_for_others,
)
from snella_app.training.final_head import LayerFit, fit_layers, is_clearly_worse, measure_layers
from snella_app.training.linear_probe import (
    cache_features,
    can_cache_features,
    choose_augmentation,
    choose_final_head,
    choose_head_start,
    normalize_features,
    plain_images,
    probe_rows,
    start_head_from_probe,
)
from snella_app.training.memory import peak_rss_mib
from snella_app.training.results import (
    best_epoch,
    describe_allocation,
    describe_run,
    folder_bytes,
    log_summary,
    matrices_of,
    shorten_hint,
    sparsity_summary,
    trainable_parameters,
)
from snella_app.training.session import InterruptCallback, checkpoint_to_resume, lock_run, record_status
from snella_app.training.sharding import is_sharded, shard_frozen
from snella_app.training.sizing import fit_batch_size, fit_epochs, fit_image_size
from snella_app.training.trainer import SnellaTrainer

_ADAPTER_USE = """This folder is an adapter in PEFT's format; its keys are registered by the package `snella` (`import
snella` before PEFT loads it). With the run that it comes from, `snella predict RUN IMAGES` predicts, and `snella merge
RUN --out MODEL` makes it a plain model.
"""
_PAGE_S = 30.0
_MOST_PREDICTIONS = 5_000  # a benchmark's test split would fill hundreds of megabytes


def train(
    config: TrainConfig,
    console: Console | None = None,
    *,
    data: Any = None,
    measure_test: bool = True,
    keep_checkpoints: bool = True,
    draw_report: bool = True,
) -> RunFolder:
    """Fine-tune a backbone and leave a complete run folder behind.

    The best epoch is selected on validation; the test images are evaluated once, at the end, with its adapter.

    Args:
        config: The configuration. With `resume` a stored run is resumed from its last checkpoint, with its own
            settings.
        console: Where to write; standard output if None.
        data: A data set of torch or Hugging Face, or a mapping from train, val and test to such ones; `config.data` is
            then a name for it, `python:flowers`. Resuming needs it again.
        measure_test: False skips the test images, for tuning runs.
        keep_checkpoints: False saves no state to resume from after each epoch, for short runs.
        draw_report: False skips the HTML report; `snella inspect --report` draws it later.

    Returns:
        The folder, its run finished.

    Raises:
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` was asked for.
        RunInUseError: Another process is writing into the folder.
        FileNotFoundError: The data of a resumed run is not there, or the adapter of a finished one.
        ValueError: Settings that contradict each other or the data, or a resumed run whose images have changed.
        TrainingInterrupted: Ctrl-C; a checkpoint is saved.
        NonFiniteLossError: The loss or the gradient became infinite or NaN; the last good state is kept.
        CheckpointError: The disk is full, and the last checkpoint is kept; or that of a resumed run is damaged.
    """
    run = RunFolder(str(config.out))
    join_processes(config.device)
    if not is_main():
        console = Console(file=io.StringIO())
    console = console or make_console(survives_closed_output=True)
    with only_main(lock_run(run, is_shared=True)):
        return _train(config, run, console, measure_test, keep_checkpoints, draw_report, data)


def _train(
    config: TrainConfig,
    run: RunFolder,
    console: Console,
    measure_test: bool,
    keep_checkpoints: bool,
    draw_report: bool,
    data: Any,
) -> RunFolder:
    """The work of `train`, in a folder that no other process writes into."""
    begun = time.monotonic()
    if config.init_from is not None and not config.resume:
        config = RunFolder(config.init_from).start_settings(config)
    config, status = from_main(partial(run.resolve_resume, config))
    if status == "finished":
        print_line(console, f"{run.path} is finished already; its report is {run.report}")
        if is_main():
            run.remove_temporaries()
            if draw_report and not run.report.is_file():
                redraw_report(run.path, console)
        return run
    is_resumed = status is not None
    _check_trackers(config)
    stored = read(RunInfo, run.path).data if is_resumed else None
    if is_resumed:
        config.data = find_data(run.path, str(config.data), None if stored is None else stored.folder)
    start = None if config.init_from is None else RunFolder(config.init_from)
    chosen = run.path if is_resumed else None if start is None else start.path
    parts = build_components(config, chosen, console, data)
    check_splits(run.path, stored, parts.splits)
    if not is_resumed:
        base, asked = parts, config

        def at_size(size: int | None) -> RunComponents:
            return assemble(dataclasses.replace(asked, img_size=size), base.splits, base.task, data=data)

        size = from_main(lambda: fit_image_size(base, asked, at_size, console)).img_size
        if size != config.img_size:
            parts, config = at_size(size), dataclasses.replace(config, img_size=size)
        config = from_main(lambda: fit_batch_size(parts, config, console))
    config = config.with_batch_size_for(len(parts.splits.train))
    if not is_resumed or latest_checkpoint(run.checkpoints) is None:
        config = dataclasses.replace(config, final_head=choose_final_head(parts, config))
        config = choose_augmentation(parts, config if start else choose_head_start(parts, config))
        _check_epochs(config)
    if not is_resumed:
        config = from_main(lambda: fit_epochs(parts, config, console, begun))
    if config.epochs:
        parts.start_layers = None  # training changes the features
    if start is not None and latest_checkpoint(run.checkpoints) is None:
        load_start(parts, config, start)
    wait_for_others()  # all have read what a resumed run had
    if is_main():
        run.prepare(config, is_resumed=is_resumed)
        store_selection(run.path, config.method, parts.model)
        run.write(describe_run(config, parts, PARTS if measure_test else ("train", "val")))
        log_summary(console, config, parts)
    if not measure_test:
        parts.splits.test = None
    costs = StepTimeCallback(next(parts.model.parameters()).device)
    with only_main(record_status(run, "train")):
        with InterruptCallback() as interrupt:
            trainer = _fit(config, parts, run, interrupt, console, costs, keep_checkpoints, draw_report)
        if trainer.state.global_step < trainer.state.max_steps and not trainer.has_stalled:
            raise KeyboardInterrupt
        _finish(trainer, parts, run, console, costs, draw_report)
    return run


def _check_epochs(config: TrainConfig) -> None:
    """Refuse 0 epochs where nothing else gives a head."""
    is_measured = get_protocol(config.protocol).selected_on == "val"
    if config.epochs == 0 and not (is_measured and config.head_init == "probe"):
        raise ValueError(
            "epochs must be at least 1, got 0: without training there is only a head that starts from a probe "
            "(head_init) and is measured on validation images (protocol)"
        )


def _fit(
    config: TrainConfig,
    parts: RunComponents,
    run: RunFolder,
    interrupt: InterruptCallback,
    console: Console,
    costs: StepTimeCallback,
    keep_checkpoints: bool,
    draw_report: bool,
) -> SnellaTrainer:
    """Train, from the last checkpoint if there is one."""
    checkpoint = from_main(lambda: checkpoint_to_resume(run, console))
    matrices = matrices_of(parts.model)
    allocation = SnellaCallback() if matrices and config.epochs else None
    protocol = get_protocol(config.protocol)
    weights = sum(m.size for m in matrices) or None
    step_images = config.effective_batch_size * config.accumulate
    display = ProgressDisplay(
        console,
        parts.task,
        protocol,
        weights,
        allocation,
        config.progress,
        shorten_hint(parts),
        step_images=step_images,
    )
    tracking = TrackingCallback(matrices, allocation, step_images)
    method = method_of(parts.model)
    schedules = [] if method is None or method.schedule is None else [ScheduleCallback(method.schedule)]
    callbacks = [*([allocation] if allocation else []), *schedules, interrupt, display, costs]
    callbacks += [tracking] if config.trackers else []
    start = time.monotonic()
    trained_part = cache_features(parts, config) if can_cache_features(config, parts.model) else None
    if config.head_init == "probe" and checkpoint is None:
        start_head_from_probe(parts, config)
    norm = normalize_features(parts, config) if config.head_norm == "running" else None
    if config.shard and process_count() > 1:
        shard_frozen(parts.model)
    with contextlib.closing(display), _tracking(config, run):
        trainer = SnellaTrainer(
            parts.model,
            config,
            parts.task,
            parts.splits.train,
            protocol.selection_part(parts.splits),
            run,
            callbacks,
            trained_part,
            start,
            keep_checkpoints,
            norm,
        )
        if draw_report and is_main():
            trainer.add_callback(_LivePage(lambda: _draw_page(trainer, parts, run, costs)))
        display.last_loss = tracking.last_loss = lambda: trainer.last_loss
        tracking.send = lambda row: trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, row)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def _check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Raises:
        ImportError: It is.
    """
    for name in config.trackers:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"track={name} needs a package; pip install {name}: {error}") from error


@contextmanager
def _tracking(config: TrainConfig, run: RunFolder) -> Iterator[None]:
    """Let trackers write into the run's folder and say nothing, unless the user has set their variables.

    Raises:
        ValueError: A tracker refuses something.
    """
    folder = run.path / "tracking"
    usual = {
        "TENSORBOARD_LOGGING_DIR": str(folder),
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}/mlflow.db",
    }
    if config.trackers and is_main():
        folder.mkdir(exist_ok=True)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    own = {name: value for name, value in usual.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in config.trackers:
            raise
        raise ValueError(f"track={package}: {str(error).strip().splitlines()[0]}") from error
    finally:
        for name in own:
            os.environ.pop(name, None)


def _metrics(trainer: SnellaTrainer, parts: RunComponents, run: RunFolder, costs: StepTimeCallback) -> Metrics:
    """Results and costs of the epochs so far."""
    protocol, matrices = trainer.protocol, matrices_of(parts.model)
    return Metrics(
        best_epoch=best_epoch(trainer.history, trainer.selection_score),
        protocol=protocol.name,
        selected_on=protocol.selected_on,
        best_metric=protocol.best_metric(parts.task.best_metric),
        ema=trainer.config.ema,
        train_s=round(trainer.elapsed_s, 3),
        trainable_parameters=trainable_parameters(parts.model),
        adapted_weights=sum(m.size for m in matrices) if matrices else None,
        adapter_bytes=folder_bytes(run.adapter),
        peak_rss_mib=peak_rss_mib(),
        **costs.summary(),
        history=[EpochRow(**protocol.with_val_prefix(row)) for row in trainer.history],
    )


def _draw_page(trainer: SnellaTrainer, parts: RunComponents, run: RunFolder, costs: StepTimeCallback) -> None:
    """Write the report of the epochs so far; the files of results are those of a finished run alone."""
    described = None if trainer.allocator is None else describe_allocation(parts.model, trainer.allocator)
    write_report(run.path, metrics=_metrics(trainer, parts, run, costs), allocation=described)


class _LivePage(TrainerCallback):
    """The report of a run that is going on, drawn at the end of an epoch at most once in `_PAGE_S` seconds.

    A page whose drawing takes long comes less often, so that drawing takes at most a twentieth of the time.

    Args:
        draw: Writes the page.
    """

    def __init__(self, draw: Callable[[], object]) -> None:
        self._draw = draw
        self._drawn_at, self._pause = time.monotonic(), _PAGE_S

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        if start - self._drawn_at < self._pause:
            return
        with contextlib.suppress(OSError, ValueError):  # a full disk: the training has its own word about it
            self._draw()
        self._drawn_at = time.monotonic()
        self._pause = max(_PAGE_S, 20 * (self._drawn_at - start))


def _finish(
    trainer: SnellaTrainer,
    parts: RunComponents,
    run: RunFolder,
    console: Console,
    costs: StepTimeCallback,
    draw_report: bool,
) -> None:
    """Evaluate the best adapter, write the results and the report."""
    train_s = trainer.elapsed_s
    splits, model = parts.splits, parts.model
    averaged = trainer.average_epochs()
    wait_for_others()  # the main process has written the best adapter
    if trainer.feature_norm is not None:
        trainer.feature_norm.remove()
    load_trained_into(model, run.adapter)
    protocol = trainer.protocol
    with console.status("measuring what is saved") if console.is_terminal else contextlib.nullcontext():
        outputs = {} if splits.val is None else {"val": trainer.outputs(splits.val)}
        fit, final_head = _fit_final_head(trainer, parts, run, outputs)
        if splits.test is not None:
            outputs["test"] = (
                trainer.outputs(splits.test)
                if fit is None
                else measure_layers(parts, fit.probe, splits.test, trainer.config.views, trainer.get_eval_dataloader)
            )
    name, shown_part = ("val", splits.val) if splits.val is not None else ("test", splits.test)
    is_shown = shown_part is not None and len(shown_part) <= _MOST_PREDICTIONS
    if not is_main():
        if shown_part is not None and is_shown and is_sharded(model):
            # the main process, which predicts examples, needs this one's part of the weights
            with tempfile.TemporaryDirectory() as folder:
                sample_outputs = parts.task.sample_outputs(outputs[name][0])
                parts.task.save_examples(model, shown_part, sample_outputs, Path(folder))
        return
    if "val" in outputs:
        parts.task = parts.task.calibrated(*outputs["val"])
    val, test = (parts.task.metrics(*outputs[name]) if name in outputs else None for name in ("val", "test"))
    if state := parts.task.state():
        run.update("running", task_state=state)
    if parts.task.has_one_class:
        probabilities = {name: parts.task.sample_outputs(reduced) for name, (reduced, _) in outputs.items()}
        calibration = calibrate({name: (probabilities[name], torch.from_numpy(outputs[name][1])) for name in outputs})
        run.update("running", calibration=None if calibration is None else plain(calibration))
    matrices = matrices_of(model)
    best = best_epoch(trainer.history, trainer.selection_score)
    allocator = trainer.allocator
    if allocator is not None:
        run.write(describe_allocation(model, allocator))
    report_images = None
    if shown_part is not None and is_shown:
        sample_outputs = parts.task.sample_outputs(outputs[name][0])
        parts.task.save_examples(model, shown_part, sample_outputs, run.path)
        run.write(parts.task.predictions(shown_part, sample_outputs, name, run.path))
        report_images = parts.task.report_images(shown_part, run.path)
    metrics = dataclasses.replace(
        _metrics(trainer, parts, run, costs),
        train_s=round(train_s, 3),
        val=None if val is None else scores_from(val),
        test=None if test is None else scores_from(test),
        averaged=averaged,
        final_head=final_head,
    )
    run.write(metrics)
    write_text(run.adapter / CARD, model_card(run.path, _ADAPTER_USE, library="peft"))
    # before the status: a run that is killed in between is resumed, measured again and completed
    report = write_report(run.path, report_images, state="finished") if draw_report else None
    run.finish()
    if trainer.has_stalled and (last := trainer.history[-1]["epoch"]) < trainer.config.epochs:
        print_line(console, f"stopped after epoch {last} of {trainer.config.epochs}")
    if averaged is not None:
        print_line(console, _averaged_text(averaged, best))
    if final_head is not None:
        print_line(console, _final_head_text(final_head))
    which = averaged.text if averaged is not None and averaged.is_saved else None
    print_line(console, _final_text(parts.task, protocol, best, val, test, which))
    if protocol.warning:
        print_line(console, f"{protocol.name} protocol: {protocol.warning}")
    if parts.task.has_one_class and (only := _only_answer(val or test or {}, splits.classes)):
        print_line(
            console,
            f"note: every {'test' if val is None else 'validation'} image is predicted as {only!r}: nothing that tells "
            "the classes apart was learned; a larger --img-size, more --epochs or --sampler weighted may help",
        )
    if matrices and trainer.config.epochs:
        kept = sum(m.budget for m in matrices)
        print_line(console, f"its update {sparsity_summary(matrices)}")
        target = kept if allocator is None else allocator.target_budget
        if kept > target and which is None and best > 0:
            print_line(console, f"epoch {best} was selected before the budget reached its target, {target:,} weights")
    shown = f"adapter {run.adapter}" + (f", report {report}" if report else "")
    print_line(console, shown)


def _fit_final_head(
    trainer: SnellaTrainer, parts: RunComponents, run: RunFolder, outputs: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[LayerFit | None, FinalHead | None]:
    """Fit the head of several layers, if the run has one, and save it unless it is clearly worse on validation.

    Args:
        trainer: Its configuration says which head is final.
        parts: Data and trained model.
        run: The head is written beside its adapter.
        outputs: Of the trained head on the validation images, if there are any; replaced by those of the final head.

    Returns:
        The fit if it is saved, and its record; None for what there is not.
    """
    config, task = trainer.config, parts.task
    if is_main():
        (run.adapter / LAYER_PROBE).unlink(missing_ok=True)  # of an end that was interrupted
        run.update("running", final_head="trained")
    if config.final_head != "layers" or process_count() > 1:  # a run of one process that several go on with
        return None, None
    train = plain_images(parts.splits.train).subset(probe_rows(parts, config).tolist())
    fit = fit_layers(parts, train, config.views, trainer.get_eval_dataloader)
    if fit.val is None:
        record = FinalHead(fit.probe.layers, True)
    else:
        val, val_trained = (float(task.metrics(*said)[task.monitor]) for said in (fit.val, outputs["val"]))
        is_saved = not is_clearly_worse(task, fit.val, outputs["val"])
        record = FinalHead(fit.probe.layers, is_saved, task.monitor, val, val_trained)
        if not is_saved:
            return None, record
        outputs["val"] = fit.val
    fit.probe.save(run.adapter / LAYER_PROBE)
    run.update("running", final_head="layers")
    return fit, record


def _final_head_text(head: FinalHead) -> str:
    """What was fitted after training, and whether predictions use it."""
    if head.metric is None:
        return f"{head.name} is the final head, fitted to all training images"
    if not head.is_saved:
        return f"{head.name} is clearly worse: {head.comparison}, which stays"
    return f"{head.name} is the final head: {head.comparison}; refitted to training and validation images"


def _only_answer(scores: dict[str, Any], classes: Sequence[str]) -> str | None:
    """The only predicted class; None where there are several, or images of one class alone."""
    confusion = np.asarray(scores.get("confusion") or [[]])
    answers = np.flatnonzero(confusion.sum(0))
    return classes[answers[0]] if len(answers) == 1 and np.count_nonzero(confusion.sum(1)) > 1 else None


def _averaged_text(averaged: AveragedEpochs, best: int) -> str:
    """What `--swa` or `--soup` came to."""
    offered = f"of epochs {averaged.offered[0]} to {averaged.offered[-1]}"
    if averaged.is_saved:
        return f"{averaged.kind} {offered}: {averaged.text} is saved"
    return f"{averaged.kind} {offered}: {averaged.text} is worse on validation than epoch {best}, which is saved"


def _final_text(
    task: Task,
    protocol: RunProtocol,
    best: int,
    val: dict[str, Any] | None,
    test: dict[str, Any] | None,
    averaged: str | None,
) -> str:
    """The results of the saved epoch or average, and what selected it."""
    if val is not None:
        chosen = f"best epoch {best}" if best > 0 else "no epoch is better than the start, which is saved"
        return f"{averaged or chosen}: {task.final_text(val, test)}"
    if averaged is not None:
        return f"{averaged}: " + ("not evaluated" if test is None else f"test {task.result_text(test)}")
    which = f"epoch {best}, the last" if protocol.selected_on is None else f"epoch {best}, the best on the test images"
    return f"{which}: " + ("not evaluated" if test is None else f"test {task.result_text(test)}")
