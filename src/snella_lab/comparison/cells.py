"""Cells of a comparison (one run each, with configuration and folder), and the plan that schedules them."""

import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

import snella_lab
from snella_app.config import TrainConfig
from snella_app.methods import find_method
from snella_app.records import CellRow, SearchChoice
from snella_lab.comparison.experiment import DataEntry, Experiment, MethodEntry, folder_name, make_config
from snella_lab.comparison.search import Candidate, Choice, TuningResult, next_tuning_runs

GitState: TypeAlias = tuple[str | None, bool | None]
_state: GitState | None = None
_PACKAGES = ("snella", "peft", "transformers", "accelerate", "torch", "timm", "numpy", "scikit-learn", "numba")


def package_info() -> dict[str, str | None]:
    """Return versions, keyed as in PEFT's method comparison (`torch-version`), and the commit of snella's checkout."""
    versions: dict[str, str | None] = {f"{name}-version": _version(name) for name in _PACKAGES}
    commit, is_dirty = git_state()
    return {**versions, "snella-commit-hash": commit, "snella-is-dirty": None if is_dirty is None else str(is_dirty)}


def system_info() -> dict[str, Any]:
    """Describe the machine, keyed as in PEFT's method comparison, with CPU cores and torch threads."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_state() -> GitState:
    """Return the commit of snella's checkout and True if tracked files are modified; None outside a checkout.

    Cached per process; workers get the state from their parent.
    """
    global _state
    if _state is None:
        _state = _query_git()
    return _state


def set_git_state(state: GitState) -> None:
    """Set the git state determined by the parent process, which matches the loaded code."""
    global _state
    _state = state


def _query_git() -> GitState:
    """Query the git state of the checkout."""
    root = Path(snella_lab.__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *words: str) -> str | None:
    """Return the output of a git command; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """Return the version of a package; None if not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _processor() -> str:
    """Return the CPU model name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


TEST_SEED = 0
"""Seed of the test split in every cell. Run seeds only change the training and validation images, so that
hyperparameters tuned with one seed have not seen the test images of another."""


@dataclass(frozen=True)
class Cell:
    """One run: a method on a task with a seed, either a tuning or a final run.

    Args:
        data: The task.
        method: The method.
        seed: Seed of training and validation split, initialization, shuffling and augmentation.
        candidate: Learning-rate factor and weight decay.
        is_final: True for a final run, the only kind that evaluates test images.
        search: Tuning results stored in the row of a final run.
    """

    data: DataEntry
    method: MethodEntry
    seed: int
    candidate: Candidate
    is_final: bool
    search: SearchChoice | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Path of the cell's folder below `cells/`; for a final run, independent of the selected hyperparameters."""
        place = f"{folder_name(self.data.name)}/{folder_name(self.method.name)}"
        if self.is_final:
            return f"{place}/seed-{self.seed}"
        return f"{place}/trials/{self.candidate.label}_seed-{self.seed}"

    @property
    def title(self) -> str:
        """Human-readable name of the run."""
        purpose = "final" if self.is_final else f"tuning {self.candidate.label.replace('_', ' ')}"
        return f"{self.data.name} · {self.method.name} · {purpose} · seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Return the run folder."""
        return root / "cells" / self.name

    def config(self, experiment: Experiment, out: Path | str) -> TrainConfig:
        """Return the run settings."""
        rates = tuned_settings(experiment, self.data, self.method, self.candidate)
        settings = {"test_seed": TEST_SEED, **experiment.settings}
        if settings.get("protocol") == "final":  # the final run trains on the validation images, too
            if self.is_final:
                settings.pop("val_size", None)
            else:
                settings["protocol"] = "standard"
        return make_config(
            self.method,
            self.data,
            settings,
            backbone=experiment.backbone,
            out=str(out),
            seed=self.seed,
            **rates,
        )


def tuned_settings(
    experiment: Experiment, data: DataEntry, method: MethodEntry, candidate: Candidate
) -> Mapping[str, Any]:
    """Return `lr`, `head_lr` and `weight_decay` of a candidate, based on the method's defaults.

    The factor scales the learning rate of the method's parameters. The head's learning rate is scaled only if the
    method trains nothing but the head.
    """
    base = make_config(method, data, experiment.settings, backbone=experiment.backbone, out="-")
    lr = base.lr or 0.0
    head_lr = lr if base.head_lr is None else base.head_lr
    is_head_only = find_method(method.method).is_head_only
    decay = base.weight_decay or 0.0
    return {
        "lr": _rounded(lr * candidate.lr_factor),
        "head_lr": _rounded(head_lr * candidate.lr_factor) if is_head_only else head_lr,
        "weight_decay": decay if candidate.weight_decay is None else candidate.weight_decay,
    }


def _rounded(rate: float) -> float:
    """Round to six significant digits: 3 * 0.003 becomes 0.009."""
    return float(f"{rate:.6g}")


def tuning_result(row: CellRow) -> TuningResult:
    """Extract the validation result from the row of a tuning run."""
    return TuningResult(row.score("val"), row.column("val_loss"))


@dataclass(frozen=True)
class BlockedRun:
    """A final run that cannot start because all its tuning runs failed.

    Args:
        cell: The cell.
        error: Reason, with the error of the first tuning run.
    """

    cell: Cell
    error: str


class Plan:
    """Finished and remaining cells of an experiment.

    Args:
        experiment: The experiment.
        rows: Rows of finished cells by cell name; `record` adds to a copy.
    """

    def __init__(self, experiment: Experiment, rows: Mapping[str, CellRow]) -> None:
        self.experiment = experiment
        self.rows = dict(rows)
        self._default_decays = {
            (data.name, method.name): tuned_settings(experiment, data, method, Candidate())["weight_decay"]
            for data, method in self._pairs()
        }

    def record(self, row: CellRow) -> None:
        """Add the row of a finished cell."""
        self.rows[row.cell] = row

    def ready(self) -> list[Cell | BlockedRun]:
        """Return unfinished cells without unfinished dependencies, in the order of the experiment."""
        return [cell for pair in self._pairs() for cell in self._ready(*pair)]

    def left(self) -> list[tuple[Cell, int]]:
        """Return the next cell and the number of remaining runs of every unfinished pair, ignoring grid extensions."""
        counts = []
        for data, method in self._pairs():
            ready = self._ready(data, method)
            if ready:
                first = ready[0].cell if isinstance(ready[0], BlockedRun) else ready[0]
                counts.append((first, len(ready) + self._later(data, method, first)))
        return counts

    def done(self) -> int:
        """Return the number of finished cells."""
        names = {_pair_of(row) for row in self.rows.values()}
        pairs = {(data.name, method.name) for data, method in self._pairs()} & names
        return sum(_pair_of(row) in pairs for row in self.rows.values())

    def choice(self, data: DataEntry, method: MethodEntry) -> Choice | list[Candidate]:
        """Return the selected hyperparameters of a pair, or the candidates to train first."""
        decay = self._default_decays[data.name, method.name]
        return next_tuning_runs(self.experiment.grid, decay, self._results(data, method))

    def _pairs(self) -> list[tuple[DataEntry, MethodEntry]]:
        """Return all pairs of task and method, grouped by task."""
        return [(data, method) for data in self.experiment.data for method in self.experiment.methods]

    def _ready(self, data: DataEntry, method: MethodEntry) -> list[Cell | BlockedRun]:
        """Return the next cells of one pair.

        Once a final run is evaluated on test images, its hyperparameters are fixed for all seeds of the pair, even if
        tuning runs are repeated later.
        """
        measured = self._measured(data, method)
        if measured is not None:
            seeds = range(self.experiment.seeds)
            remaining = (Cell(data, method, s, _candidate_of(measured), True, measured.search) for s in seeds)
            return [cell for cell in remaining if cell.name not in self.rows]
        choice = self.choice(data, method)
        if isinstance(choice, list):
            trials = [
                Cell(data, method, seed, candidate, False)
                for candidate in choice
                for seed in range(self.experiment.grid.seeds)
            ]
            return [cell for cell in trials if cell.name not in self.rows]
        finals = [
            Cell(data, method, seed, choice.candidate or Candidate(), True) for seed in range(self.experiment.seeds)
        ]
        missing = [cell for cell in finals if cell.name not in self.rows]
        if missing and choice.candidate is not None:
            rates = {c: tuned_settings(self.experiment, data, method, c) for c in choice.tried}
            search = choice.record(self._results(data, method), rates.__getitem__)
            return [replace(cell, search=search) for cell in missing]
        error = f"all {len(choice.tried)} tuning runs failed; first error: {self._first_error(data, method)}"
        return [BlockedRun(cell, error) for cell in missing]

    def _later(self, data: DataEntry, method: MethodEntry, next_cell: Cell) -> int:
        """Return the number of runs of a pair that are not ready yet."""
        if next_cell.is_final:
            return 0
        finals = self.experiment.seeds
        if next_cell.candidate.weight_decay is not None:
            return finals
        decays = {w for w in self.experiment.grid.weight_decays if w != self._default_decays[data.name, method.name]}
        return finals + len(decays) * self.experiment.grid.seeds

    def _results(self, data: DataEntry, method: MethodEntry) -> dict[Candidate, list[TuningResult]]:
        """Return the finished tuning runs of a pair."""
        results: dict[Candidate, list[TuningResult]] = {}
        for row in self._trials(data, method):
            candidate = _candidate_of(row)
            results.setdefault(candidate, []).append(tuning_result(row))
        return results

    def _measured(self, data: DataEntry, method: MethodEntry) -> CellRow | None:
        """Return the final row of a pair with the lowest seed, or None."""
        pair = (data.name, method.name)
        rows = (r for r in self.rows.values() if r.purpose == "final" and _pair_of(r) == pair)
        return min((r for r in rows if r.status == "success"), key=lambda row: row.seed, default=None)

    def _trials(self, data: DataEntry, method: MethodEntry) -> list[CellRow]:
        """Return the rows of a pair's tuning runs, sorted by cell name."""
        pair = (data.name, method.name)
        rows = [r for r in self.rows.values() if r.purpose == "trial" and _pair_of(r) == pair]
        return sorted((r for r in rows if r.seed < self.experiment.grid.seeds), key=lambda row: row.cell)

    def _first_error(self, data: DataEntry, method: MethodEntry) -> str:
        """Return the error of the first failed tuning run."""
        return next((row.error for row in self._trials(data, method) if row.error), "no error was recorded")


def _pair_of(row: CellRow) -> tuple[str, str]:
    """Return task and method of a row."""
    return row.task_name, row.experiment_name


def _candidate_of(row: CellRow) -> Candidate:
    """Return the candidate of a row."""
    return Candidate(row.lr_factor, row.tried_weight_decay)
