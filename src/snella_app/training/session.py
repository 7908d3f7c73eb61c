"""Session of a run: lock, interrupts and final status."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from snella_app.runs.folder import BaseRunFolder
from snella_app.training.checkpoints import latest_checkpoint
from snella_app.training.distributed import mean_across_processes, process_count, require_single_process

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_REPEAT_S = 1.0  # a parent process may forward a signal that this process has already received
_HELD: set[int] = set()
"""File descriptors of the locks that this process holds."""


class TrainingInterrupted(Exception):
    """Raised when the user stops training; the message names the last checkpoint, if any."""

    exit_status = 130


class NonFiniteLossError(Exception):
    """Raised when the loss or the gradient becomes infinite or NaN."""

    exit_status = 2


class RunInUseError(OSError):
    """Raised when another process is writing to the run folder."""


class InterruptCallback(TrainerCallback):
    """Callback and context manager for graceful interruption.

    The first signal finishes the step, saves a checkpoint and stops; another one, at least a second later, stops
    immediately (no-op in distributed training). Signals are SIGINT (Ctrl-C), SIGTERM (schedulers) and SIGHUP (closed
    terminal). Ignored SIGTERM and SIGHUP, as with `nohup`, stay ignored. Handlers are installed inside the context,
    only in the main thread.

    Attributes:
        is_requested: True after the first signal.
        has_saved: True once a checkpoint has been saved after the first signal.
    """

    def __init__(self) -> None:
        self.is_requested = self.has_saved = False
        self._requested_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set the flag on the first signal; raise KeyboardInterrupt on the second, in a single process."""
        if self.is_requested:
            # torchrun forwards a signal that each process has already received
            if process_count() > 1 or time.monotonic() - self._requested_at < _REPEAT_S:
                return
            raise KeyboardInterrupt
        self.is_requested, self._requested_at = True, time.monotonic()
        repeat = "" if process_count() > 1 else "; repeat to stop immediately"
        with contextlib.suppress(OSError):  # closed terminal; signal handlers must not use buffered streams
            os.write(2, f"\nsnella: finishing this step and saving, then stopping{repeat}\n".encode())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a signal, save and stop midway through an epoch; `on_epoch_end` handles its last step."""
        if mean_across_processes(float(self.is_requested)) > 0:
            self.is_requested = True  # also if another process received the signal
        if self.is_requested and not _is_epoch_end(state):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Skip the evaluation and the second checkpoint of an unfinished epoch; after a signal, save a complete one."""
        if not _is_epoch_end(state):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.is_requested:
            control.should_save = True  # also without a checkpoint per epoch

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the checkpoint of a complete epoch."""
        if self.is_requested:
            self.has_saved = control.should_training_stop = True


def _is_epoch_end(state: TrainerState) -> bool:
    """Return whether the step is the last one of an epoch."""
    steps_per_epoch = state.max_steps // state.num_train_epochs
    return state.global_step % steps_per_epoch == 0


@contextmanager
def lock_run(run: BaseRunFolder[Any], *, is_shared: bool = False) -> Iterator[None]:
    """Lock a run folder against writes by other processes.

    The lock is a kernel file lock, which is released whenever the process ends. Folders created for the lock are
    removed if they stay empty. `is_shared` allows distributed training, where only the main process locks.

    Raises:
        RunInUseError: If a running process holds the lock; the message has its process id.
        ValueError: If the folder's path has characters that are not printable.
        NotImplementedError: If the world size is larger than 1 without `is_shared`.
        OSError: If the folder or the lock file cannot be created (except for a finished run), or the lock is a link.
    """
    if not is_shared:
        require_single_process("training")
    if not str(run.path).isprintable():
        raise ValueError(f"out must contain only printable characters, got {str(run.path)!r}; choose another folder")
    if run.path.exists() and not run.path.is_dir():
        yield  # resolve_resume reports this error later
        return
    created = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _lock(run.lock, run.path)
    except OSError as error:
        if error.errno not in _UNWRITABLE or run.status != "finished":
            raise
        descriptor = None
    if descriptor is None:
        yield  # a finished run on a read-only disk needs no lock
        return
    _HELD.add(descriptor)
    try:
        yield
    finally:
        run.lock.unlink(missing_ok=True)
        _HELD.discard(descriptor)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()


def _lock(path: Path, run: Path) -> int:
    """Open and lock the lock file, write the process id and return the descriptor."""
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
                f"{run} is locked by running process {owner or '(unknown id)'}; wait for it, end it, or choose "
                "another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # the previous owner removed the file after it was opened here


def _close_inherited() -> None:
    """Close inherited locks in forked processes, e.g. data loader workers, which may outlive the owner."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_inherited)


def resume_text(command: str, folder: Path, *, has_dataset: bool = False) -> str:
    """Return the `snella COMMAND` call that resumes a run, or the `snella.train` call for a dataset object."""
    if has_dataset:
        return f"snella.train(data=..., out={str(folder)!r}, resume=True)"
    return f"snella {command} --out {shlex.quote(str(folder))} --resume"


@contextmanager
def record_status(run: BaseRunFolder[Any], command: str, *, has_dataset: bool = False) -> Iterator[None]:
    """Record an interruption or failure inside the context in `run.json`.

    Args:
        run: Folder of the run.
        command: Command that resumes the run, as in `snella COMMAND`.
        has_dataset: True if the data is a dataset object, which a command cannot load.

    Raises:
        TrainingInterrupted: If the context is interrupted; the message has the checkpoint and the call to resume.
    """
    try:
        yield
    except KeyboardInterrupt:
        saved = latest_checkpoint(run.checkpoints)
        state = f"saved as {saved}" if saved else "no checkpoint was written yet"
        resume = resume_text(command, run.path, has_dataset=has_dataset)
        interrupted = TrainingInterrupted(f"interrupted; {state}; resume with: {resume}")
        try:
            run.update("interrupted")
        except OSError as second:
            interrupted.add_note(f"the status in {run.path} could not be updated: {second}")
        raise interrupted from None
    except Exception as error:
        plain = _without_worker(error)
        try:
            run.update("failed", error=str(plain))
        except OSError as second:
            plain.add_note(f"the status in {run.path} could not be updated: {second}")
        if plain is error:
            raise
        raise plain from None


def _without_worker(error: Exception) -> Exception:
    """Extract a data loader worker's error from the traceback text that torch raises."""
    text = str(error)
    if "DataLoader worker process" not in text or "Original Traceback" not in text:
        return error
    name = type(error).__name__
    *traceback, message = re.split(rf"^(?:[\w.]+\.)?{name}: ", text.strip(), flags=re.MULTILINE)
    if traceback:
        return type(error)(message)
    # without a message, the text ends with the name; torch replaces errors that need several arguments
    return type(error)(name) if text.rstrip().splitlines()[-1].rpartition(".")[2] == name else error
