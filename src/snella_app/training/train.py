"""A training run, from configuration to report."""

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from snella import SnellaCallback
from snella_app.config import TrainConfig
from snella_app.console import counted, make_console, print_line
from snella_app.data.protocol import get_protocol
from snella_app.device import choose_device
from snella_app.methods import method_of
from snella_app.records import DataInfo, RunInfo, read
from snella_app.runs.evaluate import rewrite_report
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import SPLITS, check_splits, find_data
from snella_app.training.build import LoadedData, RunComponents, build, load, load_initial_weights, store_selection
from snella_app.training.callbacks import ProgressDisplay, ScheduleCallback, StepTimeCallback, TrackingCallback
from snella_app.training.checkpoints import latest_checkpoint
from snella_app.training.distributed import (
    broadcast_from_main,
    init_process_group,
    is_main,
    main_process_only,
    process_count,
    wait_for_everyone,
)
from snella_app.training.finish import finish, write_live_report
from snella_app.training.linear_probe import (
    cache_features,
    can_cache_features,
    init_head_from_probe,
    normalize_features,
)
from snella_app.training.plan import choose_heads, resolve
from snella_app.training.results import describe_run, log_summary, matrices_of, shorten_hint
from snella_app.training.session import InterruptCallback, Session, checkpoint_to_resume, lock_run, record_status
from snella_app.training.sharding import shard_frozen
from snella_app.training.trainer import SnellaTrainer, training_arguments

_REPORT_INTERVAL_S = 30.0


def train(
    config: TrainConfig,
    console: Console | None = None,
    *,
    data: Any = None,
    evaluate_test: bool = True,
    keep_checkpoints: bool = True,
    render_report: bool = True,
) -> RunFolder:
    """Fine-tune a backbone and write a complete run folder.

    The best epoch is selected on the validation images. After training, its adapter is evaluated once on the test
    images.

    Args:
        config: Configuration. With `resume`, the stored run continues from its last checkpoint with its stored
            settings.
        console: Output console; standard output if None.
        data: A torch or Hugging Face dataset, or a mapping from train, val and test to datasets. `config.data.spec`
            names it, for example `python:flowers`. Resuming the run requires the same object.
        evaluate_test: If False, skip the test images, for example in tuning runs.
        keep_checkpoints: If False, do not save a checkpoint after each epoch; for short runs.
        render_report: If False, skip the HTML report; `snella inspect --report` writes it later.

    Returns:
        Folder of the finished run.

    Raises:
        FileExistsError: If the folder contains a run and neither `resume` nor `overwrite` is set.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If the data of a resumed run or the adapter of a finished run is missing.
        ValueError: If settings contradict each other or the data, or the images of a resumed run have changed.
        TrainingInterrupted: If training is interrupted with Ctrl-C; a checkpoint is saved first.
        NonFiniteLossError: If the loss or gradient is infinite or NaN; the last checkpoint remains valid.
        CheckpointError: If the disk is full (the last checkpoint remains valid), or the checkpoint of a resumed run is
            damaged.
    """
    run = RunFolder(str(config.run.out))
    init_process_group(config.run.device)
    if not is_main():
        console = Console(file=io.StringIO())
    console = console or make_console(survives_closed_output=True)
    with main_process_only(lock_run(run, is_shared=True)):
        if config.model.init_from is not None and not config.run.resume:
            config = RunFolder(config.model.init_from).init_from_settings(config)
        config, status = broadcast_from_main(partial(run.resolve_resume, config))
        if status == "finished":
            _show_finished(run, console, render_report)
            return run
        stored = None if status is None else read(RunInfo, run.path).data
        images = _load(config, run, stored, console, data)
        parts = _build(config, run, stored, console, images)
        plan, parts = _resolve(config, run, stored, console, images, parts)
        wait_for_everyone()  # all processes must read the stored files before the main process replaces them
        if is_main():
            run.prepare(plan, is_resumed=stored is not None)
            store_selection(run.path, plan.method.name, parts.model)
            run.write(describe_run(plan, parts, SPLITS if evaluate_test else ("train", "val")))
            log_summary(console, plan, parts)
        if not evaluate_test:
            parts.splits.test = None
        step_timer = StepTimeCallback(next(parts.model.parameters()).device)
        session = Session(plan, run, parts, console, step_timer, keep_checkpoints, render_report)
        with main_process_only(record_status(run, "train")):
            finish(session, _fit(session))
    return run


def _show_finished(run: RunFolder, console: Console, render_report: bool) -> None:
    """Report that the run is already finished, and write its HTML report if it is missing."""
    print_line(console, f"{run.path} is already finished; report {run.report}")
    if is_main():
        run.remove_temporary_files()
        if render_report and not run.report.is_file():
            rewrite_report(run.path, console)


def _load(config: TrainConfig, run: RunFolder, stored: DataInfo | None, console: Console, source: Any) -> LoadedData:
    """Load images and task; for a resumed run, locate moved images with its data record `stored`."""
    if config.run.trackers:
        _check_trackers(config.run.trackers)
    device = choose_device(config.run.device)
    if config.optim.precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision must be fp32 or bf16 on device {device.type!r}, got 'fp16'; fp16 requires a GPU")
    images = config.data
    if stored is not None:
        images = replace(images, spec=find_data(run.path, str(images.spec), stored.folder))
    data = load(images, config.optim, config.run, console, source)
    if images.channels != 3:
        channels = counted(images.channels, "channel")
        data.splits.notes.append(f"the first convolution of {config.model.backbone} is adapted from 3 to {channels}")
    return data


def _build(
    config: TrainConfig, run: RunFolder, stored: DataInfo | None, console: Console, data: LoadedData
) -> RunComponents:
    """Build the model, with the stored selection of a resumed or initial run, and check the images of a resumed run."""
    start = config.model.init_from
    selection = run.path if stored is not None else None if start is None else Path(start)
    device = choose_device(config.run.device)
    parts = build(config.model, config.method, data, device, selection, console)
    if stored is not None:
        check_splits(run.path, stored, parts.splits)
    return parts


def _resolve(
    config: TrainConfig,
    run: RunFolder,
    stored: DataInfo | None,
    console: Console,
    data: LoadedData,
    parts: RunComponents,
) -> tuple[TrainConfig, RunComponents]:
    """Resolve the automatic settings of a new run; a resumed run reuses its stored settings."""
    config = replace(config, data=data.config)
    has_checkpoint = stored is not None and latest_checkpoint(run.checkpoints) is not None
    if stored is None:
        plan, parts = resolve(config, data, parts, console)
    elif has_checkpoint:
        plan = replace(config, optim=config.optim.with_batch_size_for(len(parts.splits.train)))
    else:
        plan = choose_heads(parts, config)
    if plan.model.init_from is not None and not has_checkpoint:
        load_initial_weights(parts, str(plan.data.spec), RunFolder(plan.model.init_from))
    return plan, parts


def _fit(session: Session) -> SnellaTrainer:
    """Train from the last checkpoint, or from the start if there is none.

    Raises:
        KeyboardInterrupt: If training was interrupted; a checkpoint has been saved.
    """
    with InterruptCallback() as interrupt:
        trainer = _run_trainer(session, interrupt)
    if trainer.state.global_step < trainer.state.max_steps and not trainer.has_stopped_early:
        raise KeyboardInterrupt
    return trainer


def _run_trainer(session: Session, interrupt: InterruptCallback) -> SnellaTrainer:
    """Initialize the head, build the trainer and run it."""
    plan, run, parts = session.plan, session.run, session.parts
    data, optim = plan.data, plan.optim
    checkpoint = broadcast_from_main(lambda: checkpoint_to_resume(run, session.console)) if plan.run.resume else None
    start = time.monotonic()
    can_cache = can_cache_features(data, parts.model)
    trained_part = cache_features(parts, optim.effective_batch_size) if can_cache else None
    if optim.head_init == "probe" and checkpoint is None:
        init_head_from_probe(parts, optim)
    norm = normalize_features(parts, optim) if optim.head_norm == "running" else None
    if optim.epochs:
        parts.initial_layer_features = None  # training changes the features
    if plan.run.shard and process_count() > 1:
        shard_frozen(parts.model)
    callbacks, display = _callbacks(session, interrupt)
    tracking = _tracking(plan.run.trackers, run) if plan.run.trackers else nullcontext()
    with contextlib.closing(display), tracking:
        trainer = SnellaTrainer(
            parts,
            data,
            optim,
            training_arguments(optim, plan.run, run.checkpoints, data.workers, session.keep_checkpoints),
            run,
            callbacks,
            trained_part=trained_part,
            start=start,
            feature_norm=norm,
            is_initialized=plan.model.init_from is not None,
            scaling=plan.method.scaling,
        )
        if plan.run.trackers:
            step_images = optim.effective_batch_size * optim.accumulate
            trainer.add_callback(TrackingCallback(trainer, matrices_of(parts.model), step_images))
        if session.render_report and is_main():
            trainer.add_callback(_LiveReport(lambda: write_live_report(session, trainer)))
        display.last_loss = lambda: trainer.last_loss
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def _callbacks(session: Session, interrupt: InterruptCallback) -> tuple[list[TrainerCallback], ProgressDisplay]:
    """Build the callbacks; also return the display, which shows the loss of the trainer."""
    plan, parts = session.plan, session.parts
    matrices, method = matrices_of(parts.model), method_of(parts.model)
    allocation = SnellaCallback() if matrices and plan.optim.epochs else None
    display = ProgressDisplay(
        session.console,
        parts.task,
        get_protocol(plan.data.protocol),
        sum(m.size for m in matrices) or None,
        allocation,
        plan.run.progress,
        partial(shorten_hint, parts),
        step_images=plan.optim.effective_batch_size * plan.optim.accumulate,
    )
    schedules = [] if method is None or method.schedule is None else [ScheduleCallback(method.schedule)]
    return [*([allocation] if allocation else []), *schedules, interrupt, display, session.step_timer], display


def _check_trackers(trackers: Sequence[str]) -> None:
    """Check that the packages of all trackers are installed, before the data and the model are loaded.

    Raises:
        ImportError: If a package is missing.
    """
    for name in trackers:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"track={name} requires a missing package; pip install {name}: {error}") from error


@contextmanager
def _tracking(trackers: Sequence[str], run: RunFolder) -> Iterator[None]:
    """Redirect trackers to the run folder and suppress their output; the user's environment variables take precedence.

    Raises:
        ValueError: If a tracker raises an error.
    """
    folder = run.path / "tracking"
    defaults = {
        "TENSORBOARD_LOGGING_DIR": str(folder),
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}/mlflow.db",
    }
    if trackers and is_main():
        folder.mkdir(exist_ok=True)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in trackers:
            raise
        raise ValueError(f"track={package}: {str(error).strip().splitlines()[0]}") from error
    finally:
        for name in added:
            os.environ.pop(name, None)


class _LiveReport(TrainerCallback):
    """Callback that updates the report after an epoch, at most once every `_REPORT_INTERVAL_S` seconds.

    The pause after an update is at least 20 times its duration, so updates take at most 5% of the time.

    Args:
        write: Function that writes the report.
    """

    def __init__(self, write: Callable[[], object]) -> None:
        self._write = write
        self._written_at, self._pause = time.monotonic(), _REPORT_INTERVAL_S

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        if start - self._written_at < self._pause:
            return
        with contextlib.suppress(OSError, ValueError):  # e.g. a full disk, which saving the checkpoint reports
            self._write()
        self._written_at = time.monotonic()
        self._pause = max(_REPORT_INTERVAL_S, 20 * (self._written_at - start))
