"""Cells on Ray's workers: a running cluster, or one on this machine."""

import os
import time
from pathlib import Path
from typing import Any

from snella.comparison.cell_run import Outcome, run_cell, set_threads
from snella.comparison.cells import Cell
from snella.comparison.executors import Ended
from snella.comparison.experiment import Experiment
from snella.comparison.provenance import GitState, git_state, take_git_state


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
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)(_work)
        self._running: dict[Any, Cell] = {}

    def start(self, cell: Cell) -> None:
        """Give a cell to Ray."""
        self._running[self._task.remote(*self._arguments, cell)] = cell

    def wait(self, timeout_s: float) -> list[Ended]:
        """Cells that have ended, after the first one or the timeout."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._end(reference) for reference in ready]

    def close(self) -> None:
        """Stop what is under way, and the cluster if it is ours."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._owns_ray:
            self._ray.shutdown()

    def _end(self, reference: Any) -> Ended:
        """What a worker has returned, or why it did not."""
        cell = self._running.pop(reference)
        try:
            return Ended(cell, self._ray.get(reference))
        except self._ray.exceptions.RayError as fault:
            reason = str(fault).strip().splitlines()
            return Ended(cell, None, f"{type(fault).__name__}: {reason[-1] if reason else 'its worker died'}")


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        ImportError: It is not installed; names the command.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as fault:
        raise ImportError(f"ray=True needs Ray, which is not installed ({fault}); run `pip install ray`") from None
    return ray


def _work(root: Path, experiment: Experiment, threads: int, state: GitState, cell: Cell) -> Outcome:
    """What a worker does."""
    set_threads(threads)
    take_git_state(state)
    return run_cell(root, experiment, cell, is_own_process=True)
