"""A training run, from configuration to report."""

import contextlib
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from snella import SnellaCallback
from snella_app.backbones.local_files import located
from snella_app.config.train import TrainConfig
from snella_app.console import counted, make_console, print_line
from snella_app.device import choose_device
from snella_app.methods import method_of
from snella_app.methods.registry import matrices_of
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs.evaluate import rewrite_report
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import SPLITS, check_splits, find_data
from snella_app.text import first_line
from snella_app.training.build import RunComponents, build, load, load_initial_weights, store_selection
from snella_app.training.callbacks import ProgressDisplay, ScheduleCallback, StepTimeCallback, TrackingCallback
from snella_app.training.checkpoints import checkpoint_to_resume, latest_checkpoint
from snella_app.training.distributed import (
    broadcast_from_main,
    init_process_group,
    is_main,
    main_process_only,
    mean_across_processes,
    process_count,
    shard_frozen,
    wait_for_everyone,
)
from snella_app.training.finish import LiveReport, finish
from snella_app.training.linear_probe import (
    cache_features,
    can_cache_features,
    enable_feature_norm,
    init_head_from_probe,
)
from snella_app.training.plan import describe_run, estimate_step_memory, log_summary, resolve, shorten_hint
from snella_app.training.session import InterruptCallback, lock_run, record_status
from snella_app.training.trainer import SnellaTrainer, StartCallback


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

    Under the `standard` protocol, the model is selected on the validation images. After training, it is evaluated once
    on the test images.

    Args:
        config: Configuration. With `resume`, the stored run continues from its last checkpoint with its stored
            settings.
        console: Output console. Defaults to standard output.
        data: A torch or Hugging Face dataset, or a mapping from split names such as train to datasets.
            `config.data.spec` names the data, for example `python:flowers`. Resuming the run requires the same data.
        evaluate_test: If False, skip the test images, for example in tuning runs.
        keep_checkpoints: If False, save a checkpoint only on interruption, for example in short runs.
        render_report: If False, skip the HTML report, which `snella inspect --report` can write later.

    Returns:
        Folder of the finished run.

    Raises:
        FileExistsError: If `out` is a file, contains other files, or contains a run and neither `resume` nor
            `overwrite` is set.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If files of the data or the backbone, the run to resume, or the adapter or results of a
            finished run are missing.
        ValueError: If settings contradict each other or the data, if the device is not available, or if settings or
            images of a resumed run have changed.
        TypeError: If `data` is not a supported dataset.
        ImportError: If a package that the data, the backbone, or `track` needs is missing.
        ConnectionError: If the Hugging Face Hub is needed and unreachable.
        NotImplementedError: If Accelerate is configured for FSDP or another mode besides DDP, or the backbone does not
            support `channels` or the given weight file.
        TrainingInterrupted: After a SIGINT (Ctrl-C), SIGTERM, or SIGHUP during training. A checkpoint is saved first,
            unless a second signal stops training immediately.
        NonFiniteLossError: If the loss or gradient is infinite or NaN. The last checkpoint remains valid.
        CheckpointError: If the disk is full, in which case the last checkpoint remains valid, or if the checkpoint of a
            resumed run is damaged.
    """
    run = RunFolder(str(config.run.out))
    init_process_group(config.run.device)
    if not is_main():
        console = Console(file=io.StringIO())  # only the main process prints
    console = console or make_console(survives_closed_output=True)
    with main_process_only(lock_run(run, allow_distributed=True)):
        if config.run.resume:
            broadcast_from_main(run.complete_replacement)
        if config.model.init_from is not None and not (config.run.resume and run.status is not None):
            config = _with_initial_settings(config, RunFolder(config.model.init_from))
        config, resumed = broadcast_from_main(partial(run.resolve_resume, config))
        if resumed is not None and resumed.is_finished:
            print_line(console, f"{run.path} is already finished; report {run.report}")
            if is_main():
                run.remove_temporary_files()
                if render_report and not run.report.is_file():
                    rewrite_report(run.path, console)
            return run
        stored = None if resumed is None else resumed.data
        device = choose_device(config.run.device)
        _check_available(config, device)
        if stored is not None:
            config = config.replace(data=find_data(run.path, str(config.data.spec), stored.folder))
        if resumed is not None:
            backbone = located(resumed.backbone)
            config = config.replace(backbone=backbone.name, weights=backbone.weights)
        loaded = load(config.data, config.optim, config.run, console, data)
        if config.data.channels != 3:
            channels = counted(config.data.channels, "channel")
            loaded.splits.notes.append(
                f"if the first convolution of {config.model.backbone} has 3 input channels, it is adapted to {channels}"
            )
        initial = None if config.model.init_from is None else RunFolder(config.model.init_from)
        selection_run = run if stored is not None else initial
        selection_path = None if selection_run is None else selection_run.path
        parts = build(config.model, config.method, loaded, device, selection_path, console)
        if initial is not None and (stored is None or latest_checkpoint(run.checkpoints) is None):
            load_initial_weights(parts, str(config.data.spec), initial)
        if stored is None:
            plan, parts = resolve(config, loaded, parts, console)
        else:
            check_splits(run.path, stored, parts.splits)
            plan = config  # `config.yaml` contains the plan
        wait_for_everyone()  # all processes must read the stored files before the main process replaces them
        if is_main():
            step_memory = estimate_step_memory(plan, parts)
            run.prepare(plan, is_resumed=stored is not None)
            store_selection(run.path, plan.method.name, parts.model)
            run.write(describe_run(plan, parts, step_memory, SPLITS if evaluate_test else ("train", "val")))
            log_summary(console, plan, parts, step_memory)
        if not evaluate_test:
            parts.splits.test = None
        with main_process_only(record_status(run, "train", has_dataset=data is not None)):
            trainer = _fit(plan, run, parts, console, keep_checkpoints, render_report)
            finish(trainer, console, render_report)
    return run


def _with_initial_settings(config: TrainConfig, initial: RunFolder) -> TrainConfig:
    """Return the settings of a run that starts from `initial`, with the current paths of inherited data and weights."""
    inherited = initial.init_from_settings(config)
    info = read(RunInfo, initial.path)
    backbone = located(info.backbone)
    inherited = inherited.replace(backbone=backbone.name, weights=backbone.weights)
    if config.data.spec is not None:
        return inherited
    return inherited.replace(data=find_data(initial.path, str(inherited.data.spec), info.data.folder))


def _check_available(config: TrainConfig, device: torch.device) -> None:
    """Raise an error if the precision or a tracker is not available, before the data and the model are loaded."""
    if config.optim.precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision must be fp32 or bf16 on device {device.type!r}, got 'fp16'; fp16 requires a GPU")
    for name in config.run.trackers:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ImportError(f"track={name} is not available: {error}") from error


def _fit(
    plan: TrainConfig,
    run: RunFolder,
    parts: RunComponents,
    console: Console,
    keep_checkpoints: bool,
    render_report: bool,
) -> SnellaTrainer:
    """Initialize the head and train, or continue training from the last checkpoint of a resumed run.

    Raises:
        KeyboardInterrupt: If training was interrupted by a signal.
    """
    start = time.monotonic()
    optim = plan.optim
    trackers = plan.run.trackers
    matrices = matrices_of(parts.model)
    method = method_of(parts.model)
    step_timer = StepTimeCallback(next(parts.model.parameters()).device)
    with InterruptCallback() as interrupt, _tracking(trackers, run):
        checkpoint = broadcast_from_main(lambda: checkpoint_to_resume(run, console)) if plan.run.resume else None
        if can_cache_features(plan.data, parts.model):
            cache_features(parts, optim.effective_batch_size)
        if optim.head_init == "probe" and checkpoint is None:
            init_head_from_probe(parts, optim, plan.data.sampler)
        norm = enable_feature_norm(parts, optim) if optim.head_norm == "running" else None
        if optim.epochs:
            parts.initial_layer_features = None  # training changes the features
        if plan.run.shard and process_count() > 1:
            shard_frozen(parts.model)
        callbacks: list[TrainerCallback] = [SnellaCallback()] if matrices and optim.epochs else []
        if method is not None and method.schedule is not None:
            callbacks.append(ScheduleCallback(method.schedule))
        trainer = SnellaTrainer(parts, plan, run, [*callbacks, interrupt], norm, keep_checkpoints)
        trainer.session_start = start
        trainer.step_timer = step_timer
        display = ProgressDisplay(console, trainer, partial(shorten_hint, parts))
        for callback in (display, step_timer, StartCallback(trainer)):
            trainer.add_callback(callback)
        if trackers:
            trainer.add_callback(TrackingCallback(trainer, matrices))
        if render_report and is_main():
            trainer.add_callback(LiveReport(trainer))
        with contextlib.closing(display):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    is_incomplete = trainer.state.global_step < trainer.state.max_steps and not trainer.has_stopped_early
    # an interruption in the last epoch also stops the run, provided that its checkpoint is saved
    is_saved = keep_checkpoints or interrupt.checkpoint_saved or not optim.epochs
    if is_incomplete or mean_across_processes(float(interrupt.stop_requested and is_saved)) > 0:
        raise KeyboardInterrupt
    return trainer


@contextmanager
def _tracking(trackers: Sequence[str], run: RunFolder) -> Iterator[None]:
    """Direct trackers to the run folder, suppress their output, and convert their errors inside the context.

    Environment variables of the trackers take precedence if they are already set.
    """
    if not trackers:
        yield
        return
    folder = run.path / "tracking"
    defaults = {
        "TENSORBOARD_LOGGING_DIR": str(folder),
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}/mlflow.db",
    }
    if is_main():
        folder.mkdir(exist_ok=True)
    for name in ("alembic", "mlflow"):  # mlflow creates its database with alembic
        logging.getLogger(name).setLevel(logging.WARNING)
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in trackers:
            raise
        raise ValueError(f"track={package}: {first_line(error)}") from error
    finally:
        for name in added:
            os.environ.pop(name, None)
