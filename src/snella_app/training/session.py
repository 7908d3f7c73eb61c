"""Run sessions: locking, resuming, interrupts and the final status."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella_app.console import print_line
from snella_app.runs.folder import RunFolderOf
from snella_app.training.checkpoints import intact_checkpoint, latest_checkpoint, remove_incomplete
from snella_app.training.distributed import any_of_all, process_count, refuse_several_processes


class TrainingInterrupted(Exception):
    """Training was stopped by the user, after saving."""

    exit_status = 130


class NonFiniteLossError(Exception):
    """The loss or the gradient became infinite or NaN."""

    exit_status = 2


class InterruptCallback(TrainerCallback):
    """Handle the first request to stop by finishing the step, saving and stopping; the second stops at once.

    Requests are Ctrl-C, SIGTERM (a scheduler's), and SIGHUP (a closed terminal), unless it is ignored, as under
    `nohup`. A context manager: the handlers are installed inside, in the main thread only.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first request, raise at the second."""
        if self.is_requested:
            if process_count() > 1:
                return  # torchrun passes a signal on that each process has got already
            raise KeyboardInterrupt
        self.is_requested = True
        with contextlib.suppress(OSError):  # of a terminal that was closed; buffered streams may not be used here
            os.write(2, b"\nsnella: finishing this step and saving, then stopping; once more stops at once\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save within the epoch, unless its end, which saves anyway, is reached."""
        self.is_requested = any_of_all(self.is_requested)
        if self.is_requested and not _is_epoch_end(state):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An unfinished epoch is not evaluated, and is saved already."""
        if not _is_epoch_end(state):
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the checkpoint of a whole epoch."""
        if self.is_requested:
            control.should_training_stop = True


def _is_epoch_end(state: TrainerState) -> bool:
    """Whether the number of steps is a whole number of epochs."""
    steps_per_epoch = state.max_steps // state.num_train_epochs
    return state.global_step % steps_per_epoch == 0


_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_HELD: set[int] = set()
"""Descriptors of the locks that this process holds."""


class RunInUseError(OSError):
    """Another process is writing into the folder of a run."""


@contextmanager
def lock_run(run: RunFolderOf[Any], *, is_shared: bool = False) -> Iterator[None]:
    """Hold the lock of a run's folder, so that no other process writes into it.

    The lock is one of the kernel's, which frees it when the process ends in whatever way. Folders that are made for it
    and stay empty are removed.

    Args:
        run: Folder of the run; need not exist yet.
        is_shared: Whether several processes of one training may be at work, of which the main one locks.

    Raises:
        RunInUseError: A running process holds it; names the process.
        ValueError: The folder's name is no text (bytes that are not UTF-8, control characters).
        NotImplementedError: This is one of several processes of one training, as `torchrun` starts them.
    """
    if not is_shared:
        refuse_several_processes("training")
    if not str(run.path).isprintable():
        raise ValueError(f"out must be a name in UTF-8 without control characters, got {str(run.path)!r}")
    if run.path.exists() and not run.path.is_dir():
        yield  # refused when settings are compared with what is there
        return
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _lock(run.lock, run.path)
    except OSError as error:
        if error.errno not in _UNWRITABLE or run.status != "finished":
            raise
        descriptor = None
    if descriptor is None:
        yield  # a finished run that cannot be written: to say that it is finished, nothing need be
        return
    _HELD.add(descriptor)
    try:
        yield
    finally:
        run.lock.unlink(missing_ok=True)
        _HELD.discard(descriptor)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _lock(path: Path, run: Path) -> int:
    """An open lock file that this process alone has locked, with its process id inside."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(f"{path} must be a file, got a symbolic link; remove it") from None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunInUseError(
                f"out={run} is being written by process {owner or 'of unknown number'}, which is still alive; wait for "
                "it, end it, or choose another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # its owner ended, and removed it, after it was opened here


def _close_inherited() -> None:
    """Close the locks that a forked process, such as a loader's worker, inherits: it may outlive the owner."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_inherited)


def checkpoint_to_resume(run: RunFolderOf[Any], console: Console) -> Path | None:
    """The checkpoint to resume from, the latest intact one; None for a new run.

    Args:
        run: Folder of the run; what a killed process left half written is removed.
        console: Where to write which one it is, and what is wrong with later ones.

    Raises:
        CheckpointError: There are checkpoints, all of them damaged; names the file and the remedies.
    """
    checkpoint, damages = intact_checkpoint(run)
    for damage in damages:
        print_line(console, f"note: skipped {damage}")
    remove_incomplete(run.checkpoints, checkpoint)
    if checkpoint is not None:
        print_line(console, f"resuming from {checkpoint}")
    return checkpoint


@contextmanager
def record_status(run: RunFolderOf[Any], command: str) -> Iterator[None]:
    """Record in `run.json` that the work inside was interrupted or failed.

    Args:
        run: Folder of the run.
        command: That resumes it, `train` and the like.

    Raises:
        TrainingInterrupted: The work inside was interrupted; names the checkpoint and the command to resume.
    """
    try:
        yield
    except KeyboardInterrupt:
        saved = latest_checkpoint(run.checkpoints)
        where = f"saved as {saved}" if saved else "no checkpoint was written yet"
        run.update("interrupted")
        raise TrainingInterrupted(
            f"interrupted; {where}; resume with: snella {command} --out {run.path} --resume"
        ) from None
    except Exception as error:
        plain = _without_worker(error)
        _record_failure(run, plain)
        if plain is error:
            raise
        raise plain from None


def _without_worker(error: Exception) -> Exception:
    """The error that a loader's worker met, which torch repeats with the worker's traceback as its text."""
    text = str(error)
    if "DataLoader worker process" not in text or "Original Traceback" not in text:
        return error
    last = text.strip().splitlines()[-1]
    return type(error)(last.removeprefix(f"{type(error).__name__}: "))


def _record_failure(run: RunFolderOf[Any], error: Exception) -> None:
    """Note the error in `run.json`; a full disk must not hide the error itself."""
    try:
        run.update("failed", error=str(error))
    except OSError as second:
        error.add_note(f"the status in {run.path} could not be updated either: {second}")
