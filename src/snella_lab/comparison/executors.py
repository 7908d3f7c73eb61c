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
        cell: The cell.
        outcome: Outcome of `run_cell`; None if the process crashed.
        error: Reason of the crash, or an error outside training.
    """

    cell: Cell
    outcome: Outcome | None
    error: str = ""


class Executor(Protocol):
    """Interface for training cells in parallel."""

    slots: int

    def start(self, cell: Cell) -> None:
        """Start a cell; requires a free slot."""

    def wait(self, timeout_s: float) -> list[Finished]:
        """Wait for a finished cell or the timeout, and return all finished cells."""

    def close(self) -> None:
        """Stop running cells."""


class InThisProcess:
    """Sequential execution in this process.

    Memory is not measured, because the process peak covers all previous cells.
    """

    slots = 1

    def __init__(self, root: Path, experiment: Experiment) -> None:
        self._root, self._experiment = root, experiment
        self._ended: list[Finished] = []

    def start(self, cell: Cell) -> None:
        """Train a cell and block until it is finished."""
        self._ended.append(Finished(cell, run_cell(self._root, self._experiment, cell)))

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return the trained cells."""
        if not self._ended:
            time.sleep(timeout_s)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """No-op; no cell runs in the background."""


class InProcesses:
    """Parallel execution with a new process for every cell, so that a crash affects only its cell.

    Processes fork from a server that has only imported the libraries. They start quickly, and their peak memory is
    that of the cell.

    Args:
        root: Folder of the comparison.
        experiment: The experiment.
        slots: Number of parallel processes.
        threads: Threads per process.
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
        """Start a cell in a new process."""
        receiving, sending = self._context.Pipe(duplex=False)
        arguments = (sending, self._root, self._experiment, cell, self._threads, git_state())
        process = self._context.Process(target=_work, args=arguments, name=cell.name)
        process.start()
        sending.close()
        self._running[receiving] = (cell, process)

    def wait(self, timeout_s: float) -> list[Finished]:
        """Wait for a finished cell or the timeout, and return all finished cells."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        return [self._end(ready) for ready in wait(list(self._running), timeout_s) if isinstance(ready, Connection)]

    def close(self) -> None:
        """Terminate running cells and wait for them."""
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
        """Return the outcome sent by a process, or the reason of its crash."""
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
    """Run a cell in a worker process; ignore Ctrl-C, because the parent terminates the worker."""
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
        return  # the parent is gone or terminating
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            connection.send((None, f"{type(error).__name__}: {error}"))
    finally:
        connection.close()


def _crash_reason(exit_code: int | None) -> str:
    """Return the reason why a process exited without a result."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process exited with status {exit_code} without a result"


class OnRay:
    """Execution on Ray, with one task and one worker process per cell.

    Connects to the cluster in `RAY_ADDRESS`, or starts a local one. All machines must see the comparison's folder
    under the same path.

    Args:
        root: Folder of the comparison; made absolute.
        experiment: The experiment.
        slots: Number of parallel cells; None uses all CPUs of the cluster.
        threads: Threads per cell, reserved as Ray CPUs.
        gpus: Fraction of a GPU per cell.

    Raises:
        ImportError: If Ray is not installed.
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
        # max_calls=1: a new worker for each cell, so that its peak memory is that of the cell
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)(_work_for_ray)
        self._running: dict[Any, Cell] = {}

    def start(self, cell: Cell) -> None:
        """Submit a cell to Ray."""
        self._running[self._task.remote(*self._arguments, cell)] = cell

    def wait(self, timeout_s: float) -> list[Finished]:
        """Wait for a finished cell or the timeout, and return all finished cells."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._end(reference) for reference in ready]

    def close(self) -> None:
        """Cancel running cells, and shut down a cluster started by this object."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._owns_ray:
            self._ray.shutdown()

    def _end(self, reference: Any) -> Finished:
        """Return the outcome of a worker, or the reason of its crash."""
        cell = self._running.pop(reference)
        try:
            return Finished(cell, self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()
            return Finished(cell, None, f"{type(error).__name__}: {reason[-1] if reason else 'the worker crashed'}")


def import_ray() -> Any:
    """Import and return the module `ray`.

    Raises:
        ImportError: If Ray is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(f"ray=True requires Ray ({error}); run `pip install ray`") from None
    return ray


def _work_for_ray(root: Path, experiment: Experiment, threads: int, state: GitState, cell: Cell) -> Outcome:
    """Run a cell in a Ray worker."""
    set_threads(threads)
    set_git_state(state)
    return run_cell(root, experiment, cell, is_own_process=True)
