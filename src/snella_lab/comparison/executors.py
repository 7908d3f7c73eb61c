"""Executors: in-process, subprocess and Ray."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from snella_app.training.session import TrainingInterrupted
from snella_lab.comparison.cells import Cell, GitState, git_state, set_git_state
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.run_cell import Outcome, run_cell, set_threads

_PRELOADED = ["snella_lab.comparison.run_cell"]


@dataclass(frozen=True)
class Finished:
    """A finished cell.

    Args:
        cell: Which.
        outcome: Of `run_cell`; None where its process crashed.
        error: The reason of a crash, or an error outside of training.
    """

    cell: Cell
    outcome: Outcome | None
    error: str = ""


class Executor(Protocol):
    """Trains cells, several at a time if it can."""

    slots: int

    def start(self, cell: Cell) -> None:
        """Begin a cell; there must be a free slot."""

    def wait(self, timeout_s: float) -> list[Finished]:
        """Finished cells, after the first one or the timeout."""

    def close(self) -> None:
        """Stop running cells."""


class InThisProcess:
    """One cell after the other, here. Memory is not measured: it would be that of all cells so far."""

    slots = 1

    def __init__(self, root: Path, experiment: Experiment) -> None:
        self._root, self._experiment = root, experiment
        self._ended: list[Finished] = []

    def start(self, cell: Cell) -> None:
        """Train it now."""
        self._ended.append(Finished(cell, run_cell(self._root, self._experiment, cell)))

    def wait(self, timeout_s: float) -> list[Finished]:
        """The trained cells."""
        if not self._ended:
            time.sleep(timeout_s)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Nothing runs."""


class InProcesses:
    """A fresh process for every cell, `slots` at a time; a crash affects its cell alone.

    Processes are forked from a server that has imported the libraries and done nothing else, so that they start at once
    and their peak memory is the cell's.

    Args:
        root: Folder of the comparison.
        experiment: What the cells belong to.
        slots: Processes at a time.
        threads: Threads of each.
    """

    def __init__(self, root: Path, experiment: Experiment, slots: int, threads: int) -> None:
        self.slots = slots
        self._root, self._experiment, self._threads = root, experiment, threads
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(_PRELOADED)
        self._running: dict[Connection, tuple[Cell, Any]] = {}

    def start(self, cell: Cell) -> None:
        """Begin a cell in a process of its own."""
        receiving, sending = self._context.Pipe(duplex=False)
        arguments = (sending, self._root, self._experiment, cell, self._threads, git_state())
        process = self._context.Process(target=_work, args=arguments, name=cell.name)
        process.start()
        sending.close()
        self._running[receiving] = (cell, process)

    def wait(self, timeout_s: float) -> list[Finished]:
        """Finished cells, after the first one or the timeout."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        return [self._end(ready) for ready in wait(list(self._running), timeout_s) if isinstance(ready, Connection)]

    def close(self) -> None:
        """Interrupt running cells, and wait for them."""
        for _, process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for connection, (_, process) in self._running.items():
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._running.clear()

    def _end(self, connection: Connection) -> Finished:
        """The outcome that a process has sent, or the reason of its crash."""
        cell, process = self._running.pop(connection)
        try:
            outcome, error = connection.recv()
        except EOFError:
            outcome, error = None, ""
        process.join()
        connection.close()
        if outcome is None and not error:
            error = _crash_reason(process.exitcode)
        return Finished(cell, outcome, error)


def _work(
    connection: Connection, root: Path, experiment: Experiment, cell: Cell, threads: int, state: GitState
) -> None:
    """Main function of a cell's process. Ctrl-C reaches it through the parent, which terminates it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_threads(threads)
    set_git_state(state)
    with _reported(connection) as send:
        send((run_cell(root, experiment, cell, is_own_process=True), ""))


@contextlib.contextmanager
def _reported(connection: Connection) -> Iterator[Any]:
    """Send an error to the parent instead of raising it."""
    try:
        yield connection.send
    except (KeyboardInterrupt, TrainingInterrupted, BrokenPipeError):
        return  # the parent has gone
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            connection.send((None, f"{type(error).__name__}: {error}"))
    finally:
        connection.close()


def _crash_reason(exit_code: int | None) -> str:
    """Why a process ended without a result."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {exit_code} and without a result"


class OnRay:
    """One Ray task a cell, each in a worker process of its own.

    A cluster is used if `RAY_ADDRESS` names one, else one is started on this machine. All its machines must see the
    comparison's folder under the same path.

    Args:
        root: Folder of the comparison; made absolute.
        experiment: What the cells belong to.
        slots: Cells at a time; as many as the cluster's processors allow if None.
        threads: Threads of each, reserved as Ray's CPUs.
        gpus: Share of a GPU that each needs; 0 for none.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, root: Path, experiment: Experiment, slots: int | None, threads: int, gpus: float = 0.0) -> None:
        ray = import_ray()
        self._ray = ray
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            address = os.environ.get("RAY_ADDRESS")
            here: dict[str, Any] = {
                "num_cpus": slots * threads if slots else os.cpu_count() or 1,
                "include_dashboard": False,
            }
            ray.init(address=address or "local", log_to_driver=False, **({} if address else here))
        available = int(ray.cluster_resources().get("CPU", 1)) // threads
        self.slots = max(1, available if slots is None else slots)
        self._arguments = (root.resolve(), experiment, threads, git_state())
        # a worker that ends after each cell: its peak memory is the cell's
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)(_work_for_ray)
        self._running: dict[Any, Cell] = {}

    def start(self, cell: Cell) -> None:
        """Give a cell to Ray."""
        self._running[self._task.remote(*self._arguments, cell)] = cell

    def wait(self, timeout_s: float) -> list[Finished]:
        """Finished cells, after the first one or the timeout."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._end(reference) for reference in ready]

    def close(self) -> None:
        """Stop running cells, and the cluster if it was started here."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._owns_ray:
            self._ray.shutdown()

    def _end(self, reference: Any) -> Finished:
        """The outcome that a worker has returned, or the reason of its crash."""
        cell = self._running.pop(reference)
        try:
            return Finished(cell, self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()
            return Finished(cell, None, f"{type(error).__name__}: {reason[-1] if reason else 'its worker crashed'}")


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        ImportError: It is not installed; names the command.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(f"ray=True needs Ray, which is not installed ({error}); run `pip install ray`") from None
    return ray


def _work_for_ray(root: Path, experiment: Experiment, threads: int, state: GitState, cell: Cell) -> Outcome:
    """Main function of a Ray worker."""
    set_threads(threads)
    set_git_state(state)
    return run_cell(root, experiment, cell, is_own_process=True)
