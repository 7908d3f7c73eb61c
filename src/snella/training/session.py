"""How every kind of run begins, and what its folder says of how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from snella.training.checkpoints import check_complete, latest_checkpoint, remove_incomplete
from snella.training.run_folder import RunFolderOf
from snella.training.settings import RunSettings
from snella.training.stopping import TrainingInterrupted

S = TypeVar("S", bound=RunSettings)


def settle_unfinished(run: RunFolderOf[S], config: S, console: Console, result: str) -> tuple[S, bool] | None:
    """Decide what to train, before anything is loaded or written.

    Args:
        run: Folder of the run.
        config: The settings asked for.
        console: Is told where the result of a finished run is.
        result: What that is, in a few words.

    Returns:
        Resolved settings, and whether a stored run goes on; None where the run to be resumed is finished.

    Raises:
        FileExistsError: As `RunFolderOf.settle`, as are the others.
        FileNotFoundError: Or the adapter of a finished run is gone.
        ValueError: `resume` with settings that differ from the stored ones.
    """
    settled = run.settle(config)
    asked: Any = settled
    if asked.resume and run.status == "finished":
        run.check_adapter()
        console.print(f"{run.path} is finished already; {result}", highlight=False, soft_wrap=True)
        return None
    return settled, asked.resume and run.status is not None


def checkpoint_to_continue(run: RunFolderOf[Any], console: Console) -> Path | None:
    """The checkpoint that training goes on from; None where it begins.

    Args:
        run: Folder of the run; what a killed process left half written is removed.
        console: Is told which one it is.

    Raises:
        CheckpointError: It is damaged; names the file and the ways out.
    """
    remove_incomplete(run.checkpoints)
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        check_complete(checkpoint)
        console.print(f"continuing from {checkpoint}", highlight=False, soft_wrap=True)
    return checkpoint


@contextmanager
def outcome_recorded(run: RunFolderOf[Any], command: str) -> Iterator[None]:
    """Write into `run.json` that the work inside was interrupted or failed.

    Args:
        run: Folder of the run.
        command: That continues it, `train` and the like.

    Raises:
        TrainingInterrupted: The work inside was interrupted; says where its state is saved and how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        saved = latest_checkpoint(run.checkpoints)
        where = f"saved as {saved}" if saved else "no checkpoint was written yet"
        run.update("interrupted")
        raise TrainingInterrupted(
            f"interrupted; {where}; continue with: snella {command} --out {run.path} --resume"
        ) from None
    except Exception as fault:
        _record_failure(run, fault)
        raise


def _record_failure(run: RunFolderOf[Any], fault: Exception) -> None:
    """Note the error in `run.json`; a full disk must not hide the error itself."""
    try:
        run.update("failed", error=str(fault))
    except OSError as second:
        fault.add_note(f"the status in {run.path} could not be updated either: {second}")
