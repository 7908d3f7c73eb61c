"""Training one cell, once, whoever asks for it."""

import os
import shutil
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console

from snella.comparison.cells import Cell
from snella.comparison.changed_weights import count_changed_weights
from snella.comparison.experiment import Experiment
from snella.comparison.forgetting import measure_forgetting
from snella.comparison.reuse import MEMORY, drop_adapters, finish_trial
from snella.comparison.rows import head_of_row, results_of
from snella.comparison.store import LOCKS, append_row, cell_lock, read_row, remove_lock
from snella.runs import RunFolder, TrainingInterrupted
from snella.runs.train import train

LOGS = "logs"
_ERROR_LENGTH = 400


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a cell ended.

    Args:
        state: trained (here), found (its row was there already), or taken (another process is at it).
        row: Its row, where it has one.
    """

    state: Literal["trained", "found", "taken"]
    row: dict[str, Any] | None = None


def run_cell(root: Path, experiment: Experiment, cell: Cell, is_own_process: bool = False) -> Outcome:
    """Train a cell and store its row, unless that is done already or being done.

    What an interrupted attempt left is removed first. A training that fails becomes a row with its error.

    Args:
        root: Folder of the comparison.
        experiment: What the cell belongs to.
        cell: Which.
        is_own_process: Whether this process has done nothing else, so that its peak memory is the cell's.

    Raises:
        TrainingInterrupted: Ctrl-C; the cell is free for the next attempt.
        OSError: The row could not be written.
    """
    folder = cell.folder(root)
    row = read_row(folder)
    if row is not None:
        return Outcome("found", row)
    with cell_lock(root / LOCKS, cell.name) as is_acquired:
        row = read_row(folder)
        if row is not None:
            return Outcome("found", row)
        if not is_acquired:
            return Outcome("taken")
        row = append_row(root, folder, _row(root, experiment, cell, folder, is_own_process))
        drop_adapters(root, experiment, cell)
    remove_lock(root / LOCKS, cell.name)
    return Outcome("trained", row)


def record_death(root: Path, experiment: Experiment, cell: Cell, error: str) -> dict[str, Any] | None:
    """Store the row of a cell whose process ended without one; None where another process has taken it over."""
    folder = cell.folder(root)
    with cell_lock(root / LOCKS, cell.name) as is_acquired:
        row = read_row(folder)
        if row is None and not is_acquired:
            return None
        if row is None:
            row = append_row(root, folder, _failed(head_of_row(cell, experiment, _now()), error, 0.0))
    remove_lock(root / LOCKS, cell.name)
    return row


def _row(root: Path, experiment: Experiment, cell: Cell, folder: Path, is_own_process: bool) -> dict[str, Any]:
    """Train and measure; the row of the results, or of the failure."""
    start, before_mib = time.monotonic(), psutil.Process().memory_info().rss / 2**20
    created_at = _now()
    log = root / LOGS / (cell.name.replace("/", "!") + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    head = head_of_row(cell, experiment, created_at)
    with log.open("w", encoding="utf-8") as file:
        try:
            trial = finish_trial(root, experiment, cell, folder)
            if trial is None:
                train(
                    cell.config(experiment, folder),
                    Console(file=file, width=200),
                    measure_test=cell.is_final,
                    keep_checkpoints=False,
                    draw_report=False,
                )
            run = RunFolder(folder)
            results = results_of(run)
            if cell.is_final and results["test_accuracy"] is None:
                raise ValueError(f"data {cell.data.data!r} must have a test part for the table, got none")
            if trial is not None:
                memory = {key: trial[key] for key in MEMORY}
            else:
                memory = _memory(run, before_mib) if is_own_process else dict.fromkeys(MEMORY)
            changed = count_changed_weights(run.path) if cell.is_final else None
            probe = _forgetting(root, experiment, cell, run)
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        except (KeyboardInterrupt, TrainingInterrupted):
            raise
        except Exception as fault:
            traceback.print_exc(file=file)
            return _failed(head, f"{type(fault).__name__}: {_first_lines(fault)}", time.monotonic() - start)
    total = round(time.monotonic() - start + (0.0 if trial is None else trial["total_time"]), 3)
    origin = {"trained_as": None if trial is None else trial["cell"]}
    return {
        **head,
        "status": "success",
        "error": None,
        "total_time": total,
        **origin,
        **results,
        "changed_weights": changed,
        **memory,
        **probe,
    }


def _memory(run: RunFolder, before_mib: float) -> dict[str, float]:
    """Peak resident memory of the process, and what of it came after the libraries were loaded."""
    peak = run.read_json("metrics.json")["peak_rss_mib"]
    return {"peak_rss_mib": peak, "training_mib": round(peak - before_mib, 1)}


def _forgetting(root: Path, experiment: Experiment, cell: Cell, run: RunFolder) -> dict[str, Any]:
    """The columns of forgetting, for final cells."""
    data = experiment.probe_data(cell.data) if cell.is_final else None
    if data is None:
        return {"forgetting": None, "forgetting_data": None}
    return measure_forgetting(run.path, data, experiment.forgetting_images, root / "frozen")


def _failed(head: dict[str, Any], error: str, elapsed_s: float) -> dict[str, Any]:
    """The row of a training that failed."""
    return {**head, "status": "failed", "error": error, "total_time": round(elapsed_s, 3)}


def _first_lines(fault: Exception) -> str:
    """An error's message, cut where libraries write pages; the log has all of it."""
    text = " ".join(str(fault).split())
    return text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + " …"


def _now() -> str:
    """The time of day, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def set_threads(threads: int) -> None:
    """Let this process compute with so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
