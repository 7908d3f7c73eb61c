"""A training run, from configuration to report."""

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from snella import SnellaCallback
from snella_app.config import TrainConfig
from snella_app.console import make_console, print_line
from snella_app.data.protocol import get_protocol
from snella_app.methods import method_of
from snella_app.records import RunInfo, read
from snella_app.runs.evaluate import redraw_report
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import PARTS, check_splits, find_data
from snella_app.training.build import RunComponents, build_components, load_start, store_selection
from snella_app.training.callbacks import ProgressDisplay, ScheduleCallback, TrackingCallback
from snella_app.training.checkpoints import latest_checkpoint
from snella_app.training.distributed import (
    from_main,
    is_main,
    join_processes,
    only_main,
    process_count,
    wait_for_others,
)
from snella_app.training.finish import Session, draw_page, finish
from snella_app.training.linear_probe import (
    cache_features,
    can_cache_features,
    normalize_features,
    start_head_from_probe,
)
from snella_app.training.plan import choose_heads, plan_training
from snella_app.training.results import describe_run, log_summary, matrices_of, shorten_hint
from snella_app.training.session import InterruptCallback, checkpoint_to_resume, lock_run, record_status
from snella_app.training.sharding import shard_frozen
from snella_app.training.trainer import SnellaTrainer

_PAGE_S = 30.0


def train(
    config: TrainConfig,
    console: Console | None = None,
    *,
    data: Any = None,
    measure_test: bool = True,
    keep_checkpoints: bool = True,
    draw_report: bool = True,
) -> RunFolder:
    """Fine-tune a backbone and write a complete run folder.

    The best epoch is selected on the validation images. After training, its adapter is evaluated once on the test
    images.

    Args:
        config: Configuration. With `resume`, the stored run continues from its last checkpoint with its stored
            settings.
        console: Output console; standard output if None.
        data: Data set of torch or Hugging Face, or a mapping from train, val and test to data sets. `config.data` then
            names it, for example `python:flowers`. Resuming the run requires the same object.
        measure_test: If False, skip the test images, for example in tuning runs.
        keep_checkpoints: If False, do not save a checkpoint after each epoch; for short runs.
        draw_report: If False, skip the HTML report; `snella inspect --report` writes it later.

    Returns:
        Folder of the finished run.

    Raises:
        FileExistsError: If the folder contains a run and neither `resume` nor `overwrite` is set.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If the data of a resumed run or the adapter of a finished run is missing.
        ValueError: If settings contradict each other or the data, or the images of a resumed run have changed.
        TrainingInterrupted: On Ctrl-C, after saving a checkpoint.
        NonFiniteLossError: If the loss or gradient is infinite or NaN; the last checkpoint remains valid.
        CheckpointError: If the disk is full (the last checkpoint remains valid), or the checkpoint of a resumed run is
            damaged.
    """
    run = RunFolder(str(config.out))
    join_processes(config.device)
    if not is_main():
        console = Console(file=io.StringIO())
    console = console or make_console(survives_closed_output=True)
    with only_main(lock_run(run, is_shared=True)):
        if config.init_from is not None and not config.resume:
            config = RunFolder(config.init_from).start_settings(config)
        config, status = from_main(partial(run.resolve_resume, config))
        if status == "finished":
            _show_finished(run, console, draw_report)
            return run
        config, parts = _prepare(config, run, console, status is not None, data)
        if is_main():
            run.prepare(config, is_resumed=status is not None)
            store_selection(run.path, config.method, parts.model)
            run.write(describe_run(config, parts, PARTS if measure_test else ("train", "val")))
            log_summary(console, config, parts)
        if not measure_test:
            parts.splits.test = None
        session = Session(config, run, parts, console, keep_checkpoints, draw_report)
        with only_main(record_status(run, "train")):
            finish(session, _fit(session))
    return run


def _show_finished(run: RunFolder, console: Console, draw_report: bool) -> None:
    """Report that the run is already finished, and write its HTML report if it is missing."""
    print_line(console, f"{run.path} is already finished; report {run.report}")
    if is_main():
        run.remove_temporaries()
        if draw_report and not run.report.is_file():
            redraw_report(run.path, console)


def _prepare(
    config: TrainConfig, run: RunFolder, console: Console, is_resumed: bool, data: Any
) -> tuple[TrainConfig, RunComponents]:
    """Load the data and the model, and resolve automatic settings; a resumed run reuses its stored settings."""
    started_at = time.monotonic()
    _check_trackers(config)
    stored = read(RunInfo, run.path).data if is_resumed else None
    if is_resumed:
        config.data = find_data(run.path, str(config.data), None if stored is None else stored.folder)
    start = None if config.init_from is None else RunFolder(config.init_from)
    selection_path = run.path if is_resumed else None if start is None else start.path
    parts = build_components(config, selection_path, console, data)
    check_splits(run.path, stored, parts.splits)
    has_no_checkpoint = latest_checkpoint(run.checkpoints) is None
    if not is_resumed:
        parts, config = plan_training(parts, config, console, started_at, data)
    else:
        config = config.with_batch_size_for(len(parts.splits.train))
        config = choose_heads(parts, config) if has_no_checkpoint else config
    if config.epochs:
        parts.start_layers = None  # invalid once training changes the features
    if start is not None and has_no_checkpoint:
        load_start(parts, config, start)
    wait_for_others()  # all processes must read the stored files before the main process replaces them
    return config, parts


def _fit(session: Session) -> SnellaTrainer:
    """Train from the last checkpoint, or from the start if there is none.

    Raises:
        KeyboardInterrupt: If training was interrupted; a checkpoint has been saved.
    """
    with InterruptCallback() as interrupt:
        trainer = _run_trainer(session, interrupt)
    if trainer.state.global_step < trainer.state.max_steps and not trainer.has_stalled:
        raise KeyboardInterrupt
    return trainer


def _run_trainer(session: Session, interrupt: InterruptCallback) -> SnellaTrainer:
    """Initialize the head, build the trainer and run it."""
    config, run, parts = session.config, session.run, session.parts
    checkpoint = from_main(lambda: checkpoint_to_resume(run, session.console))
    start = time.monotonic()
    trained_part = cache_features(parts, config) if can_cache_features(config, parts.model) else None
    if config.head_init == "probe" and checkpoint is None:
        start_head_from_probe(parts, config)
    norm = normalize_features(parts, config) if config.head_norm == "running" else None
    if config.shard and process_count() > 1:
        shard_frozen(parts.model)
    callbacks, display, tracking = _callbacks(session, interrupt)
    with contextlib.closing(display), _tracking(config, run):
        trainer = SnellaTrainer(
            parts.model,
            config,
            parts.task,
            parts.splits.train,
            get_protocol(config.protocol).selection_part(parts.splits),
            run,
            callbacks,
            trained_part,
            start,
            session.keep_checkpoints,
            norm,
        )
        if session.draw_report and is_main():
            trainer.add_callback(_LivePage(lambda: draw_page(session, trainer)))
        display.last_loss = tracking.last_loss = lambda: trainer.last_loss
        tracking.send = lambda row: trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, row)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def _callbacks(
    session: Session, interrupt: InterruptCallback
) -> tuple[list[TrainerCallback], ProgressDisplay, TrackingCallback]:
    """Build all callbacks; also return the two that report the loss."""
    config, parts = session.config, session.parts
    matrices, method = matrices_of(parts.model), method_of(parts.model)
    allocation = SnellaCallback() if matrices and config.epochs else None
    step_images = config.effective_batch_size * config.accumulate
    display = ProgressDisplay(
        session.console,
        parts.task,
        get_protocol(config.protocol),
        sum(m.size for m in matrices) or None,
        allocation,
        config.progress,
        shorten_hint(parts),
        step_images=step_images,
    )
    tracking = TrackingCallback(matrices, allocation, step_images)
    schedules = [] if method is None or method.schedule is None else [ScheduleCallback(method.schedule)]
    callbacks = [*([allocation] if allocation else []), *schedules, interrupt, display, session.costs]
    return [*callbacks, *([tracking] if config.trackers else [])], display, tracking


def _check_trackers(config: TrainConfig) -> None:
    """Check that the packages of all trackers are installed, before the data and the model are loaded.

    Raises:
        ImportError: If a package is missing.
    """
    for name in config.trackers:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"track={name} requires a missing package; pip install {name}: {error}") from error


@contextmanager
def _tracking(config: TrainConfig, run: RunFolder) -> Iterator[None]:
    """Redirect trackers to the run folder and silence them; environment variables set by the user take precedence.

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
    if config.trackers and is_main():
        folder.mkdir(exist_ok=True)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in config.trackers:
            raise
        raise ValueError(f"track={package}: {str(error).strip().splitlines()[0]}") from error
    finally:
        for name in added:
            os.environ.pop(name, None)


class _LivePage(TrainerCallback):
    """Callback that updates the report during training, after an epoch and at most once every `_PAGE_S` seconds.

    The pause after an update is at least 20 times its duration, so updates take at most 5 % of the time.

    Args:
        draw: Function that writes the report.
    """

    def __init__(self, draw: Callable[[], object]) -> None:
        self._draw = draw
        self._drawn_at, self._pause = time.monotonic(), _PAGE_S

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        if start - self._drawn_at < self._pause:
            return
        with contextlib.suppress(OSError, ValueError):  # e.g. a full disk, which saving the checkpoint reports
            self._draw()
        self._drawn_at = time.monotonic()
        self._pause = max(_PAGE_S, 20 * (self._drawn_at - start))
