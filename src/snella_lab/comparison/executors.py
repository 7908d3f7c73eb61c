"""Executors that train the cells of a comparison: in this process, in subprocesses, or on Ray.

A cell is one run of the comparison, and its row contains its settings and results.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from snella_app.text import first_line
from snella_app.training.session import TrainingInterrupted
from snella_lab.comparison.cells import Cell
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.run_cell import Outcome, run_cell
from snella_lab.provenance import GitState, git_state, set_git_state


class Job(NamedTuple):
    """Settings of a worker process that trains one cell.

    Attributes:
        root: Folder of the comparison.
        experiment: The experiment.
        threads: Number of threads in the process.
        state: Commit and dirty flag for the row, determined by the parent process.
        keep_checkpoints: If True, save a checkpoint after each epoch.
        folder: Working directory on machines where it exists. None keeps the current one.
    """

    root: Path
    experiment: Experiment
    threads: int
    state: GitState
    keep_checkpoints: bool
    folder: Path | None = None

    def run(self, cell: Cell) -> Outcome:
        """Train a cell in this process."""
        if self.folder is not None and self.folder.is_dir():  # data paths may be relative to it
            os.chdir(self.folder)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # for child processes; torch has already read it
        torch.set_num_threads(self.threads)
        set_git_state(self.state)
        return run_cell(self.root, self.experiment, cell, is_dedicated=True, keep_checkpoints=self.keep_checkpoints)


class InThisProcess:
    """Sequential execution in this process.

    Process memory is not measured, because the process's peak includes all previous cells.
    """

    slots = 1

    def __init__(self, root: Path, experiment: Experiment, keep_checkpoints: bool = False) -> None:
        self._root = root
        self._experiment = experiment
        self._keep_checkpoints = keep_checkpoints
        self._finished: list[Outcome] = []

    def start(self, cell: Cell) -> None:
        """Train a cell and block until it is finished."""
        outcome = run_cell(self._root, self._experiment, cell, keep_checkpoints=self._keep_checkpoints)
        self._finished.append(outcome)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return the outcomes of the cells trained since the last call. If there are none, wait for the timeout."""
        if not self._finished:
            time.sleep(timeout_s)
        finished = self._finished
        self._finished = []
        return finished

    def stop(self, cell: Cell) -> None:
        """Do nothing, because no cell runs in the background."""

    def close(self) -> None:
        """Do nothing, because no cell runs in the background."""


class InProcesses:
    """Parallel execution with a new process per cell, which isolates crashes.

    Where the system supports it, processes fork from a server that has only imported the libraries, so they start
    quickly and their peak memory is that of the cell. Elsewhere, each process imports the libraries itself.
    """

    def __init__(
        self, root: Path, experiment: Experiment, slots: int, threads: int, keep_checkpoints: bool = False
    ) -> None:
        self.slots = slots
        self._job = Job(root, experiment, threads, git_state(), keep_checkpoints)
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(["snella_lab.comparison.run_cell"])
        self._running: dict[Connection, tuple[Cell, Any]] = {}

    def start(self, cell: Cell) -> None:
        """Start a cell in a new process."""
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(sending, self._job, cell), name=cell.name)
        process.start()
        sending.close()  # the process keeps the other copy, so the pipe closes when the process exits
        self._running[receiving] = (cell, process)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Wait until a cell finishes or the timeout expires, and return the outcomes of all finished cells."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        return [self._end(ready) for ready in wait(list(self._running), timeout_s) if isinstance(ready, Connection)]

    def stop(self, cell: Cell) -> None:
        """Kill the process of a running cell."""
        for connection, (running, process) in list(self._running.items()):
            if running == cell:
                process.kill()
                process.join()
                connection.close()
                del self._running[connection]

    def close(self) -> None:
        """Terminate running cells, and kill those that do not exit within 20 seconds."""
        for _, process in self._running.values():
            with contextlib.suppress(ProcessLookupError):  # the process has already exited
                process.terminate()
        for connection, (_, process) in self._running.items():
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._running.clear()

    def _end(self, connection: Connection) -> Outcome:
        """Return the outcome that a process sent, or the reason for its crash."""
        cell, process = self._running.pop(connection)
        outcome: Outcome | None
        try:
            outcome = connection.recv()
        except (EOFError, OSError):  # OSError: killed while sending the outcome
            outcome = None
        process.join()
        connection.close()
        return outcome or Outcome(cell, error=_crash_reason(process.exitcode))


def _work(connection: Connection, job: Job, cell: Cell) -> None:
    """Run a cell in a worker process and send its outcome. Ignore Ctrl-C, because the parent terminates the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = job.run(cell)
    except (KeyboardInterrupt, TrainingInterrupted):
        return  # the parent is terminating this process and needs no outcome
    except Exception as error:
        outcome = Outcome(cell, error=f"{type(error).__name__}: {error}")
    with contextlib.suppress(BrokenPipeError):  # the parent has exited
        connection.send(outcome)


def _crash_reason(exit_code: int | None) -> str:
    """Return the reason why a process exited without a result."""
    if exit_code is not None and exit_code < 0:
        name = next((known.name for known in signal.Signals if known == -exit_code), f"signal {-exit_code}")
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process exited with status {exit_code} without a result"


class OnRay:
    """Parallel execution on Ray, with one Ray task and one worker process per cell.

    Connects to the cluster at `RAY_ADDRESS`, or starts a local one. The comparison's folder must have the same path on
    all machines. If a cell loses its worker or machine, its outcome has neither a row nor an error, so that the caller
    starts the cell again. The cell then resumes from its last checkpoint. After `MAX_RESTARTS` restarts, the outcome is
    an error.

    Args:
        root: Folder of the comparison, which is made absolute.
        experiment: The experiment.
        slots: Maximum number of parallel cells. None uses the whole cluster.
        threads: Threads per cell, reserved as Ray CPUs.
        gpus: GPUs per cell, reserved as Ray GPUs. None reserves an equal share for each slot: at most one GPU, or none
            if the training uses no GPU. Without `slots`, the share is one GPU.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If no cluster is reachable at `RAY_ADDRESS`.
        ValueError: If no machine of the cluster has enough CPUs and GPUs for a cell.
    """

    def __init__(
        self, root: Path, experiment: Experiment, slots: int | None, threads: int, gpus: float | None = None
    ) -> None:
        ray = import_ray()
        self._ray = ray
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(ray, None if slots is None else slots * threads)
        self._slots = slots
        self._threads = threads
        self._gpus = gpus
        if gpus is None:
            cluster_gpus = sum(node.get("GPU", 0.0) for node in self._nodes())
            self._gpus = _gpu_share(cluster_gpus, slots, experiment)
        job = Job(root.resolve(), experiment, threads, git_state(), keep_checkpoints=True, folder=Path.cwd())
        self._job = ray.put(job)
        # max_calls=1 starts a new worker for each cell, so that its peak memory is that of the cell
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": self._gpus, "max_calls": 1, "max_retries": 0}
        self._task = ray.remote(**options)(Job.run)
        self._running: dict[Any, Cell] = {}
        self._restarts: dict[str, int] = {}
        self._counted_at = -math.inf
        self._cluster_slots = 0
        if not self.slots:
            machines = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in self._nodes())
            self.close()
            raise ValueError(
                f"a run needs {threads} CPUs and {self._gpus:g} GPUs on one machine, but the Ray cluster has "
                f"{machines}; reduce threads or gpus"
            )

    @property
    def slots(self) -> int:
        """Maximum number of parallel cells, which grows and shrinks with the cluster."""
        now = time.monotonic()
        if now - self._counted_at > _NODE_REFRESH_S:
            self._cluster_slots = sum(map(self._slots_of, self._nodes()))
            self._counted_at = now
        return self._cluster_slots if self._slots is None else min(self._cluster_slots, self._slots)

    def start(self, cell: Cell) -> None:
        """Submit a cell to Ray."""
        self._running[self._task.remote(self._job, cell)] = cell

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Wait until a cell ends or the timeout expires, and return the outcome, if any."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._end(reference) for reference in ready]

    def stop(self, cell: Cell) -> None:
        """Stop a running cell."""
        for reference in [reference for reference, running in self._running.items() if running == cell]:
            del self._running[reference]
            self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Cancel running cells, and shut down a cluster that this object started."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._owns_ray:
            self._ray.shutdown()

    def _end(self, reference: Any) -> Outcome:
        """Return the outcome that a worker sent, or the reason for its crash.

        The outcome contains neither a row nor an error if the cell must be started again.
        """
        cell = self._running.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
            return outcome
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[-1] if lines else 'the worker crashed'}"
            restarts = self._restarts.get(cell.name, 0)
            is_terminated = isinstance(getattr(error, "cause", None), TrainingInterrupted)  # SIGTERM in the worker
            if isinstance(error, self._ray.exceptions.RayTaskError) and not is_terminated:
                return Outcome(cell, error=reason)
            if restarts == MAX_RESTARTS:
                return Outcome(cell, error=f"{reason} (after {restarts} restarts)")
            self._restarts[cell.name] = restarts + 1
            return Outcome(cell)

    def _nodes(self) -> list[dict[str, float]]:
        """Return the resources of all live machines."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _slots_of(self, node: dict[str, float]) -> int:
        """Return the number of cells that fit on a machine."""
        by_cpu = int(node.get("CPU", 0.0) // self._threads)
        if not self._gpus:
            return by_cpu
        gpus = node.get("GPU", 0.0)
        if self._gpus <= 1:  # a cell cannot combine fractions of several GPUs
            tolerance = 1e-6  # for the rounding error of the quotient
            cells_per_gpu = int(1 / self._gpus + tolerance)
            by_gpu = int(gpus) * cells_per_gpu
        else:
            by_gpu = int(gpus // self._gpus)
        return min(by_cpu, by_gpu)


Executor = InThisProcess | InProcesses | OnRay
"""Trains cells in parallel, in at most `slots` slots. `slots` may change at any time.

The caller of `start` ensures that a slot is free. An outcome of `wait` with neither a row nor an error means that the
cell must be started again, or that another process has claimed it. `wait` never returns the outcome of a cell that
`stop` has stopped.
"""
MAX_RESTARTS = 2
"""Maximum number of restarts of a cell that has lost its worker or machine."""
_NODE_REFRESH_S = 2.0
"""Seconds after which `slots` counts the machines of the cluster again."""


def _connect(ray: Any, cpus: int | None) -> None:
    """Connect to the cluster at `RAY_ADDRESS`, or start a local one with `cpus` CPUs (None for all)."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        ray.init(address="local", log_to_driver=False, include_dashboard=False, num_cpus=cpus or os.cpu_count())
        return
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"no Ray cluster is reachable at RAY_ADDRESS={address} ({first_line(error)}); "
            "start one with `ray start --head`, or unset RAY_ADDRESS to use this machine"
        ) from None


def _gpu_share(gpus: float, slots: int | None, experiment: Experiment) -> float:
    """Return the GPUs per cell: an equal share per slot, at most one. Returns 0 if the training uses no GPU."""
    if not gpus or not str(experiment.settings.get("device", "auto")).startswith(("auto", "cuda")):
        return 0.0
    share = 1.0
    if slots is not None:
        cells_per_gpu = max(1, math.ceil(slots / gpus))
        share = 1 / cells_per_gpu
    return math.floor(share * 10_000) / 10_000  # Ray's precision


def import_ray() -> Any:
    """Import and return `ray`.

    Raises:
        ImportError: If Ray is not installed. The message contains the command that installs it.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(f"ray=True requires Ray ({error}); run `pip install ray`") from None
    return ray
