"""One training run, from settings to report."""

import time

from rich.console import Console

from snella import SnellaCallback
from snella.analysis import write_report
from snella.methods import load_trained_into
from snella.training.announcing import announce
from snella.training.assembly import Assembly, assemble
from snella.training.checkpoints import check_complete, latest_checkpoint, remove_incomplete
from snella.training.config import TrainConfig
from snella.training.console import make_console
from snella.training.features import cache_features, can_cache_features
from snella.training.progress import ProgressDisplay
from snella.training.results import (
    best_epoch,
    describe_allocation,
    describe_predictions,
    describe_run,
    folder_bytes,
    matrices_of,
    peak_rss_mib,
    trainable_parameters,
)
from snella.training.run_folder import RunFolder
from snella.training.split_identity import check_splits, find_data
from snella.training.stopping import InterruptCallback, TrainingInterrupted
from snella.training.trainer import SnellaTrainer


def train(config: TrainConfig, console: Console | None = None) -> RunFolder:
    """Fine-tune a backbone and leave a complete run folder behind.

    The best epoch is chosen on validation; the test images are measured once, at the end, with its adapter.

    Args:
        config: What to do. With `resume` a stored run goes on from its last checkpoint, with its own settings.
        console: Where to write; standard output if None.

    Returns:
        The folder, its run finished.

    Raises:
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` was asked for.
        FileNotFoundError: The data of a resumed run is not there, or the adapter of a finished one.
        ValueError: Settings that contradict each other or the data, or a resumed run whose images have changed.
        TrainingInterrupted: Ctrl-C; a checkpoint is saved.
        NonFiniteLossError: The loss or the gradient became infinite or NaN; the last good state is kept.
        CheckpointError: The disk is full, and the last checkpoint is kept; or that of a resumed run is damaged.
    """
    console = console or make_console()
    run = RunFolder(str(config.out))
    config = run.settle(config)
    is_resumed = config.resume and run.status is not None
    if config.resume and run.status == "finished":
        run.check_adapter()
        console.print(f"{run.path} is finished already; its report is {run.report}", highlight=False, soft_wrap=True)
        return run
    stored = run.read_json("run.json").get("data", {}) if is_resumed else {}
    if is_resumed:
        config.data = find_data(run.path, str(config.data), stored)
    parts = assemble(config)
    check_splits(run.path, stored, parts.splits)
    config = config.fitted_to(len(parts.splits.train))
    if is_resumed:
        run.write_config(config)
    else:
        run.create(config)
    run.checkpoints.mkdir(exist_ok=True)
    run.update("running", **describe_run(config, parts))
    announce(console, config, parts)
    try:
        with InterruptCallback() as interrupt:
            trainer = _fit(config, parts, run, interrupt, console)
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        _finish(trainer, parts, run, console)
    except KeyboardInterrupt:
        saved = latest_checkpoint(run.checkpoints)
        where = f"saved as {saved}" if saved else "no checkpoint was written yet"
        message = f"interrupted; {where}; continue with: snella train --out {run.path} --resume"
        run.update("interrupted")
        raise TrainingInterrupted(message) from None
    except Exception as fault:
        _record_failure(run, fault)
        raise
    return run


def _fit(
    config: TrainConfig, parts: Assembly, run: RunFolder, interrupt: InterruptCallback, console: Console
) -> SnellaTrainer:
    """Train, from the last checkpoint if there is one."""
    remove_incomplete(run.checkpoints)
    checkpoint = latest_checkpoint(run.checkpoints)
    matrices = matrices_of(parts.model)
    allocation = SnellaCallback() if matrices else None
    display = ProgressDisplay(console, sum(m.size for m in matrices) or None, allocation, config.progress)
    callbacks = [*([allocation] if allocation else []), interrupt, display]
    start = time.monotonic()
    trained_part = cache_features(parts, config) if can_cache_features(config, parts.model) else None
    trainer = SnellaTrainer(
        parts.model, config, parts.task, parts.splits.train, parts.splits.val, run, callbacks, trained_part, start
    )
    display.last_loss = lambda: trainer.last_loss
    if checkpoint is not None:
        check_complete(checkpoint)
        console.print(f"continuing from {checkpoint}", highlight=False, soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        display.close()
    return trainer


def _finish(trainer: SnellaTrainer, parts: Assembly, run: RunFolder, console: Console) -> None:
    """Measure the best adapter, write the results and the report."""
    train_s = trainer.elapsed_s
    splits, model = parts.splits, parts.model
    load_trained_into(model, run.adapter)
    val, probabilities = trainer.score(splits.val)
    test = None if splits.test is None else trainer.score(splits.test)[0]
    matrices = matrices_of(model)
    best = best_epoch(trainer.history)
    callback = trainer.allocation_callback
    if callback is not None:
        run.write_json("allocation.json", describe_allocation(model, callback))
    run.write_json("predictions.json", describe_predictions(splits.val, probabilities, "val"))
    run.write_json(
        "metrics.json",
        {
            "best_epoch": best,
            "best_metric": "val_accuracy",
            "train_s": round(train_s, 3),
            "trainable_parameters": trainable_parameters(model),
            "adapted_weights": sum(m.size for m in matrices) if matrices else None,
            "adapter_bytes": folder_bytes(run.adapter),
            "peak_rss_mib": peak_rss_mib(),
            "history": trainer.history,
            "val": val,
            "test": test,
        },
    )
    run.update("finished")
    report = write_report(run.path, splits.val.image)
    shown = f"validation {val['accuracy']:.4f}" + (
        "" if test is None else f", test {test['accuracy']:.4f} (balanced {test['balanced_accuracy']:.4f})"
    )
    console.print(f"best epoch {best}: {shown}", highlight=False, soft_wrap=True)
    if matrices:
        kept, total = sum(m.budget for m in matrices), sum(m.size for m in matrices)
        console.print(
            f"its update changes {kept:,} of {total:,} weights ({1 - kept / total:.1%} sparse)",
            highlight=False,
            soft_wrap=True,
        )
        target = callback.allocator.target_budget if callback is not None and callback.allocator else kept
        if kept > target:
            console.print(
                f"epoch {best} was chosen before the schedule reached its target, {target:,} weights",
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"adapter {run.adapter}, report {report}", highlight=False, soft_wrap=True)


def _record_failure(run: RunFolder, fault: Exception) -> None:
    """Note the error in `run.json`; a full disk must not hide the error itself."""
    try:
        run.update("failed", error=str(fault))
    except OSError as second:
        fault.add_note(f"the status in {run.path} could not be updated either: {second}")
