"""Time and memory per cell of the `snella compare` driver, with simulated training.

    python benchmarks/compare_driver.py --out benchmarks/compare_driver.jsonl

A simulated worker immediately writes the row of its cell. The driver plans, starts and records every cell, then writes
the tables and the report. Each size runs in a separate process, with ten methods and ten cells per method and task
(five learning rates, two weight decays, three seeds); 10,000 cells are 100 tasks. `resume` is a second call that trains
nothing. Times are CPU times without the simulated workers. Memory is the growth of the peak after a warm-up of 100
cells. The last row is a least-squares line through the newest rows of all sizes: a fixed cost, and a cost per cell.
"""

import argparse
import io
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from snella_app.training.memory import peak_rss_mib, reset_peak_rss
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.comparison import compare as driver
from snella_lab.comparison.cells import Cell
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.rows import CellResults, CellRow
from snella_lab.comparison.run_cell import Outcome, row_header
from snella_lab.comparison.store import append_row
from snella_lab.provenance import conditions

METHODS = ["linear", "bias", "lora-2", "lora-4", "lora-8", "lora-16", "snella-2", "snella-4", "snella-8", "full"]
CELLS_PER_TASK = 10 * len(METHODS)
SLOTS = 16


class SimulatedExecutor:
    """Executor that writes rows instead of training.

    Attributes:
        worker_s: CPU time of the simulated workers.
    """

    slots = SLOTS

    def __init__(self, root: Path, experiment: Experiment) -> None:
        self._root, self._experiment = root, experiment
        self._ended: list[Outcome] = []
        self._headers: dict[tuple[str, str], dict[str, Any]] = {}
        self.worker_s = 0.0

    def start(self, cell: Cell) -> None:
        """Write the row of a cell."""
        start = time.process_time()
        row = CellRow(**self._header(cell), status="success", total_time=12.5, results=_results(cell))
        with mock.patch("os.fsync"):
            append_row(self._root, cell.folder(self._root), row)
        sent = pickle.dumps(Outcome(cell, row))  # a copy, as from a worker
        self._ended.append(pickle.loads(sent))
        self.worker_s += time.process_time() - start

    def _header(self, cell: Cell) -> dict[str, Any]:
        """Return the columns that are known before training, computed once per method and task."""
        pair = cell.data.name, cell.method.name
        if pair not in self._headers:
            self._headers[pair] = row_header(cell, self._experiment, "2026-01-02T03:04:05+00:00")
        header = self._headers[pair]
        candidate = {"lr_factor": cell.candidate.lr_factor, "tried_weight_decay": cell.candidate.weight_decay}
        run = {"cell": cell.name, "purpose": "final" if cell.is_final else "trial", "seed": cell.seed}
        config = {**header["train_config"], "lr": cell.candidate.lr_factor / 1000, "seed": cell.seed, "out": cell.name}
        return {**header, **candidate, **run, "search": cell.search, "train_config": config}

    def stop(self, cell: Cell) -> None:
        """No-op."""

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return the finished cells."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """No-op."""


def _results(cell: Cell) -> CellResults:
    """Return plausible results."""
    number = sum(cell.name.encode()) % 97 / 1000
    score = 0.7 + number - 0.02 * abs(cell.candidate.lr_factor - 1.0)
    scores = {"accuracy": score, "balanced_accuracy": score - 0.03, "loss": 1 - score}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["qkv", "proj", "fc1", "fc2"]}
    return CellResults(
        peft_config={**config, **{f"option_{number}": None for number in range(20)}},
        **{"num_trainable_params": 1000, "file_size": 5000, "train_time": 10.0, "step_time": 0.05},
        **{"train_loss": 0.4, "train_samples": 8000, "epochs": 20, "best_epoch": 17, "selected_on": "val"},
        val=scores,
        test=scores if cell.is_final else {},
        sizes={"train": 800, "val": 200, "test": 1000},
        split="0" * 64,
        **{"changed_weights": 10_000, "peak_rss_mib": 550.0, "training_mib": 150.0, "forgetting": 0.01},
    )


def _experiment(cells: int) -> Experiment:
    """Return an experiment with the given number of cells."""
    return Experiment.from_dict(
        {
            "methods": METHODS,
            "data": [{"data": "digits", "name": f"task-{number}"} for number in range(cells // CELLS_PER_TASK)],
            "backbone": "test_vit",
            "seeds": 3,
            "grid": {"lr_factors": [0.1, 0.3, 1, 3, 10], "weight_decays": [0.001, 0.1], "max_extensions": 0},
            "forgetting": [],
            "train": {"pretrained": False, "img_size": 32, "device": "cpu", "epochs": 20, "batch_size": 32},
        }
    )


def _compare(root: Path, cells: int) -> dict[str, float]:
    """Run a comparison and return its seconds by phase, without the simulated workers."""
    experiment, executors, phases = _experiment(cells), [], {}
    original = driver._train_all

    def executor(root: Path, experiment: Experiment, *options: Any, **settings: Any) -> SimulatedExecutor:
        executors.append(SimulatedExecutor(root, experiment))
        return executors[-1]

    def train_all(*arguments: Any, **options: Any) -> None:
        start = time.process_time()
        original(*arguments, **options)
        phases["train_s"] = time.process_time() - start - executors[-1].worker_s

    driver._executor, driver._train_all = executor, train_all
    driver.validate_inputs = lambda *arguments, **options: None
    start = time.process_time()
    try:
        driver.compare(experiment, root, console=Console(file=io.StringIO(), width=200))
    finally:
        driver._train_all = original
    phases["total_s"] = time.process_time() - start - executors[-1].worker_s
    return phases


def measure(cells: int) -> dict[str, Any]:
    """Measure one size."""
    with tempfile.TemporaryDirectory() as folder:
        _compare(Path(folder) / "warm-up", CELLS_PER_TASK)
        reset_peak_rss()
        before = peak_rss_mib()
        root = Path(folder) / "c"
        phases = _compare(root, cells)
        growth = (peak_rss_mib() - before) * 2**20
        rows = sum(1 for _ in (root / "results.jsonl").open())
        if rows != cells:
            raise RuntimeError(f"the comparison must have {cells} rows, got {rows}")
        resumed = _compare(root, cells)
        page = (root / "comparison.html").stat().st_size
    total = phases["total_s"]
    return {
        "cells": cells,
        "tasks": cells // CELLS_PER_TASK,
        "cpu_s": round(total, 3),
        "growth_mb": round(growth / 1e6, 2),
        "cpu_ms_per_cell": round(1000 * total / cells, 3),
        "cpu_ms_per_cell_planning": round(1000 * phases["train_s"] / cells, 3),
        "cpu_ms_per_cell_report": round(1000 * (total - phases["train_s"]) / cells, 3),
        "cpu_ms_per_cell_resume": round(1000 * resumed["total_s"] / cells, 3),
        "kb_per_cell": round(growth / 1000 / cells, 2),
        "page_mb": round(page / 1e6, 2),
    }


def fit_line(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit fixed cost and cost per cell to rows of several sizes by least squares."""
    cells = [row["cells"] for row in rows]
    s_per_cell, fixed_s = np.polyfit(cells, [row["cpu_s"] for row in rows], 1).tolist()
    mb_per_cell, fixed_mb = np.polyfit(cells, [row["growth_mb"] for row in rows], 1).tolist()
    return {
        "sizes": sorted(cells),
        "fixed_s": round(fixed_s, 2),
        "slope_ms_per_cell": round(1000 * s_per_cell, 3),
        "fixed_mb": round(fixed_mb, 1),
        "slope_kb_per_cell": round(1000 * mb_per_cell, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="output file for rows; if omitted, only the first size is measured and printed")
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000, 3_000, 10_000, 30_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out is None:
        print(json.dumps(measure(options.cells[0])))
        return
    for cells in options.cells:
        command = [sys.executable, __file__, "--cells", str(cells)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        provenance = {**conditions("cpu"), "command": f"python benchmarks/compare_driver.py --cells {cells}"}
        row = {"benchmark": "compare_driver", **provenance, **json.loads(done.stdout.splitlines()[-1])}
        print(row, flush=True)
        append_rows(options.out, [row])
    newest = {row["cells"]: row for row in read_rows(options.out) if row["benchmark"] == "compare_driver"}
    if len(newest) > 1:
        line = {"benchmark": "compare_driver_line", **conditions("cpu"), **fit_line(list(newest.values()))}
        print(line)
        append_rows(options.out, [line])


if __name__ == "__main__":
    main()
