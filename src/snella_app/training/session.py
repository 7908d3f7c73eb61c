"""Locking, graceful interruption, and status of a training run (POSIX only)."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from snella_app.runs.folder import BaseRunFolder
from snella_app.training.checkpoints import latest_checkpoint
from snella_app.training.distributed import mean_across_processes, process_count, require_single_process

_UNWRITABLE_ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM)
_MIN_REPEAT_S = 1.0
"""Seconds within which a second signal is ignored: a parent process may forward a signal that has already arrived."""
_HELD_LOCKS: set[int] = set()
"""File descriptors of the locks that this process holds."""


class TrainingInterrupted(Exception):
    """Raised when a signal stops training; the message names the last checkpoint, if any."""

    exit_status = 130  # 128 + SIGINT, as shells report it


class NonFiniteLossError(Exception):
    """Raised when the loss or the gradient becomes infinite or NaN."""

    exit_status = 2


class RunInUseError(OSError):
    """Raised when another process is writing to the run folder."""


class InterruptCallback(TrainerCallback):
    """Callback and context manager for graceful interruption.

    On the first signal, training finishes the current step, saves a checkpoint, and stops. A second signal, at least
    one second later, stops it immediately, except in distributed training.

    The signals are SIGINT (Ctrl-C), SIGTERM (sent by schedulers), and SIGHUP (closed terminal). SIGTERM and SIGHUP stay
    ignored if they already were, for example under `nohup`. Handlers are installed while the context is active, and
    only in the main thread.

    Attributes:
        stop_requested: True after the first signal.
        checkpoint_saved: True once a checkpoint has been saved after the first signal.
    """

    def __init__(self) -> None:
        self.stop_requested = self.checkpoint_saved = False
        self._requested_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                previous = signal.getsignal(number)
                stays_ignored = previous == signal.SIG_IGN and number != signal.SIGINT
                if stays_ignored or previous is None:  # None: C code set the handler, so it could not be restored
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Request a stop on the first signal; in a single process, raise KeyboardInterrupt on a later one."""
        if self.stop_requested:
            # torchrun forwards a signal that each process has already received
            if process_count() > 1 or time.monotonic() - self._requested_at < _MIN_REPEAT_S:
                return
            raise KeyboardInterrupt
        self._requested_at = time.monotonic()  # before the flag, since a signal may arrive in between
        self.stop_requested = True
        repeat = "" if process_count() > 1 else "; repeat to stop immediately"
        with suppress(OSError):  # the terminal may be closed
            # buffered streams are not safe in signal handlers
            os.write(2, f"\nsnella: finishing this step and saving, then stopping{repeat}\n".encode())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a signal, save and stop, unless this is the last step of an epoch, which `on_epoch_end` handles."""
        if mean_across_processes(float(self.stop_requested)) > 0:  # any process received a signal
            self.stop_requested = True
        if self.stop_requested and not _is_epoch_end(state):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint if a signal arrived and the epoch is complete.

        If training stops midway through the epoch, `on_step_end` has already requested a checkpoint. In this case, the
        epoch is not evaluated, and no second checkpoint is saved.
        """
        if not _is_epoch_end(state):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.stop_requested:
            control.should_save = True  # even if checkpoints are not saved every epoch

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop once a checkpoint has been saved after a signal."""
        if self.stop_requested:
            self.checkpoint_saved = control.should_training_stop = True


def _is_epoch_end(state: TrainerState) -> bool:
    """Return whether the current step ends an epoch. All epochs have the same number of steps."""
    steps_per_epoch = state.max_steps // state.num_train_epochs
    return state.global_step % steps_per_epoch == 0


@contextmanager
def lock_run(run: BaseRunFolder[Any], *, allow_distributed: bool = False) -> Iterator[None]:
    """Lock a run folder against writes by other processes.

    The lock is an `flock`, which the kernel releases when the process exits, even after a crash. Folders created for
    the lock are removed if they stay empty. A finished run in a folder that is not writable is not locked. With
    `allow_distributed`, the world size may be larger than 1, and only the main process should take the lock.

    Raises:
        RunInUseError: If a running process holds the lock; the message includes its process ID, if known.
        ValueError: If the folder's path contains nonprintable characters.
        NotImplementedError: If the world size is larger than 1 and `allow_distributed` is False.
        OSError: If the folder or the lock file cannot be created, or the lock file is a symbolic link.
    """
    if not allow_distributed:
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
        if error.errno not in _UNWRITABLE_ERRNOS or run.status != "finished":
            raise
        descriptor = None
    if descriptor is None:
        yield  # a finished run that cannot be changed needs no lock
        return
    _HELD_LOCKS.add(descriptor)
    try:
        yield
    finally:
        run.lock.unlink(missing_ok=True)
        _HELD_LOCKS.discard(descriptor)
        os.close(descriptor)
        with suppress(OSError):
            for folder in created:
                folder.rmdir()


def _lock(path: Path, run: Path) -> int:
    """Open and lock the lock file, write the process ID, and return the descriptor."""
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
                f"{run} is locked by running process {owner or '(unknown ID)'}; wait for it to finish, stop it, or "
                "choose another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        # the previous owner may have removed the file after it was opened here; such a lock protects nothing
        if os.fstat(descriptor).st_nlink:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)


def _close_inherited() -> None:
    """Close inherited locks in forked processes, such as data loader workers.

    Such processes may outlive the owner of the lock and would then keep the run locked.
    """
    for descriptor in _HELD_LOCKS:
        os.close(descriptor)
    _HELD_LOCKS.clear()


os.register_at_fork(after_in_child=_close_inherited)


def resume_command(command: str, folder: Path, *, has_dataset: bool = False) -> str:
    """Return the `snella` command that resumes a run, or the `snella.train` call if the data is a dataset object."""
    if has_dataset:
        return f"snella.train(data=..., out={str(folder)!r}, resume=True)"
    return f"snella {command} --out {shlex.quote(str(folder))} --resume"


@contextmanager
def record_status(run: BaseRunFolder[Any], command: str, *, has_dataset: bool = False) -> Iterator[None]:
    """Update the status in `run.json` if the body of the context is interrupted or fails.

    Args:
        run: Folder of the run.
        command: Name of the `snella` command that resumes the run, such as `train`.
        has_dataset: True if the data is a dataset object, which a command cannot load.

    Raises:
        TrainingInterrupted: If the body is interrupted. The message names the last checkpoint, if any, and the remedy.
        Exception: Errors of the body. A data loader worker's error is raised without the worker's traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        saved = latest_checkpoint(run.checkpoints)
        state = f"saved as {saved}" if saved else "no checkpoint has been written yet"
        resume = resume_command(command, run.path, has_dataset=has_dataset)
        interrupted = TrainingInterrupted(f"interrupted; {state}; resume with: {resume}")
        try:
            run.update("interrupted")
        except OSError as update_error:
            interrupted.add_note(f"the status in {run.path} could not be updated: {update_error}")
        raise interrupted from None
    except Exception as error:
        unwrapped = _unwrap_worker_error(error)
        try:
            run.update("failed", error=str(unwrapped))
        except OSError as update_error:
            unwrapped.add_note(f"the status in {run.path} could not be updated: {update_error}")
        if unwrapped is error:
            raise
        raise unwrapped from None


def _unwrap_worker_error(error: Exception) -> Exception:
    """Return the original error of a data loader worker, or any other error unchanged.

    torch raises the error again with the worker's traceback in the message. If the error's type needs several
    arguments, torch raises a RuntimeError instead, which is also returned unchanged.
    """
    text = str(error)
    if "DataLoader worker process" not in text or "Original Traceback" not in text:
        return error
    name = type(error).__name__
    # the message starts in the last line that begins with the error's type, e.g. "ValueError: ..."
    *traceback, message = re.split(rf"^(?:[\w.]+\.)?{name}: ", text.strip(), flags=re.MULTILINE)
    if traceback:
        return type(error)(message)
    last_line = text.rstrip().splitlines()[-1]
    if last_line.rpartition(".")[2] == name:  # an error without a message
        return type(error)(name)
    return error
