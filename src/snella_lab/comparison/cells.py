"""Cells of a comparison: one run each, with its configuration and folder; and the plan, which says which are next."""

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
    """Versions under the keys of PEFT's method comparison (`torch-version`), and the commit of snella's checkout."""
    versions: dict[str, str | None] = {f"{name}-version": _version(name) for name in _PACKAGES}
    commit, is_dirty = git_state()
    return {**versions, "snella-commit-hash": commit, "snella-is-dirty": None if is_dirty is None else str(is_dirty)}


def system_info() -> dict[str, Any]:
    """The machine, under the keys of PEFT's method comparison, with cores and torch's threads."""
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
    """Commit of the checkout that snella was imported from, and whether tracked files differ; None outside of one.

    Queried once per process; a worker gets it from its parent.
    """
    global _state
    if _state is None:
        _state = _query_git()
    return _state


def set_git_state(state: GitState) -> None:
    """Set the state that the parent process has found: the code that runs here was loaded then."""
    global _state
    _state = state


def _query_git() -> GitState:
    """The current state of the checkout."""
    root = Path(snella_lab.__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *words: str) -> str | None:
    """Output of a git command; None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


TEST_SEED = 0
"""Decides the test images of every cell: other seeds draw other training and validation images, never a test image, so
that hyperparameters tuned with one seed have not seen the test images of another."""


@dataclass(frozen=True)
class Cell:
    """One run: a method on a task with a seed, for tuning or for the table.

    Args:
        data: The task.
        method: The method.
        seed: Of training and validation images, initial values, order, augmentation.
        candidate: Learning-rate factor and weight decay.
        is_final: Whether this is a row of the table, which alone measures the test images.
        search: How its hyperparameters were tuned, for the row of a final run.
    """

    data: DataEntry
    method: MethodEntry
    seed: int
    candidate: Candidate
    is_final: bool
    search: SearchChoice | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Path of the cell's folder below `cells/`; the same for a final run whatever hyperparameters were chosen."""
        place = f"{folder_name(self.data.name)}/{folder_name(self.method.name)}"
        if self.is_final:
            return f"{place}/seed-{self.seed}"
        return f"{place}/trials/{self.candidate.label}_seed-{self.seed}"

    @property
    def title(self) -> str:
        """The run, human-readable."""
        what = "final" if self.is_final else f"tuning {self.candidate.label.replace('_', ' ')}"
        return f"{self.data.name} · {self.method.name} · {what} · seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """The folder of its run."""
        return root / "cells" / self.name

    def config(self, experiment: Experiment, out: Path | str) -> TrainConfig:
        """The settings of its run."""
        rates = tuned_settings(experiment, self.data, self.method, self.candidate)
        settings = {"test_seed": TEST_SEED, **experiment.settings}
        if settings.get("protocol") == "final":  # tuned on images that the final run then trains on
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
    """`lr`, `head_lr` and `weight_decay` of a candidate, from the method's own defaults.

    The factor multiplies the learning rate of what the method adds or changes; the head's rate stays, except where
    nothing but the head is trained.
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
    """Six digits: 0.009 for three times 0.003."""
    return float(f"{rate:.6g}")


def tuning_result(row: CellRow) -> TuningResult:
    """The result of a tuning run, from its row."""
    return TuningResult(row.score("val"), row.column("val_loss"))


@dataclass(frozen=True)
class BlockedRun:
    """A final run that cannot be trained, since all its tuning runs failed.

    Args:
        cell: Which.
        error: Why, with the error of the first tuning run.
    """

    cell: Cell
    error: str


class Plan:
    """The cells of an experiment, of which some are done.

    Args:
        experiment: What is compared.
        rows: Rows of finished cells, by the cell's name; grows with `record`.
    """

    def __init__(self, experiment: Experiment, rows: Mapping[str, CellRow]) -> None:
        self.experiment = experiment
        self.rows = dict(rows)
        self._default_decays = {
            (data.name, method.name): tuned_settings(experiment, data, method, Candidate())["weight_decay"]
            for data, method in self._pairs()
        }

    def record(self, row: CellRow) -> None:
        """Note that a cell is done."""
        self.rows[row.cell] = row

    def ready(self) -> list[Cell | BlockedRun]:
        """Cells that are not done and wait for no other, in the order of the experiment; empty when all is done."""
        return [cell for pair in self._pairs() for cell in self._ready(*pair)]

    def left(self) -> list[tuple[Cell, int]]:
        """For every unfinished pair, its next cell and the number of remaining runs, without extensions of the grid."""
        counts = []
        for data, method in self._pairs():
            ready = self._ready(data, method)
            if ready:
                first = ready[0].cell if isinstance(ready[0], BlockedRun) else ready[0]
                counts.append((first, len(ready) + self._later(data, method, first)))
        return counts

    def done(self) -> int:
        """How many cells of this experiment have a row."""
        names = {_pair_of(row) for row in self.rows.values()}
        pairs = {(data.name, method.name) for data, method in self._pairs()} & names
        return sum(_pair_of(row) in pairs for row in self.rows.values())

    def choice(self, data: DataEntry, method: MethodEntry) -> Choice | list[Candidate]:
        """The chosen hyperparameters of a pair, or the candidates to try first."""
        decay = self._default_decays[data.name, method.name]
        return next_tuning_runs(self.experiment.grid, decay, self._results(data, method))

    def _pairs(self) -> list[tuple[DataEntry, MethodEntry]]:
        """Tasks, and on each all methods."""
        return [(data, method) for data in self.experiment.data for method in self.experiment.methods]

    def _ready(self, data: DataEntry, method: MethodEntry) -> list[Cell | BlockedRun]:
        """The next cells of one pair.

        Hyperparameters that have been evaluated on test images are final, whatever tuning runs are repeated later: all
        seeds of a pair have the same.
        """
        measured = self._measured(data, method)
        if measured is not None:
            seeds = range(self.experiment.seeds)
            rest = (Cell(data, method, s, _candidate_of(measured), True, measured.search) for s in seeds)
            return [cell for cell in rest if cell.name not in self.rows]
        found = self.choice(data, method)
        if isinstance(found, list):
            trials = [
                Cell(data, method, seed, candidate, False)
                for candidate in found
                for seed in range(self.experiment.grid.seeds)
            ]
            return [cell for cell in trials if cell.name not in self.rows]
        finals = [
            Cell(data, method, seed, found.candidate or Candidate(), True) for seed in range(self.experiment.seeds)
        ]
        missing = [cell for cell in finals if cell.name not in self.rows]
        if missing and found.candidate is not None:
            rates = {c: tuned_settings(self.experiment, data, method, c) for c in found.tried}
            search = found.record(self._results(data, method), rates.__getitem__)
            return [replace(cell, search=search) for cell in missing]
        error = f"all {len(found.tried)} tuning runs failed; the first: {self._first_error(data, method)}"
        return [BlockedRun(cell, error) for cell in missing]

    def _later(self, data: DataEntry, method: MethodEntry, next_cell: Cell) -> int:
        """Runs of a pair that are not ready yet."""
        if next_cell.is_final:
            return 0
        finals = self.experiment.seeds
        if next_cell.candidate.weight_decay is not None:
            return finals
        decays = {w for w in self.experiment.grid.weight_decays if w != self._default_decays[data.name, method.name]}
        return finals + len(decays) * self.experiment.grid.seeds

    def _results(self, data: DataEntry, method: MethodEntry) -> dict[Candidate, list[TuningResult]]:
        """Finished tuning runs of a pair."""
        results: dict[Candidate, list[TuningResult]] = {}
        for row in self._trials(data, method):
            candidate = _candidate_of(row)
            results.setdefault(candidate, []).append(tuning_result(row))
        return results

    def _measured(self, data: DataEntry, method: MethodEntry) -> CellRow | None:
        """A final row of a pair, the first of its seeds; None where there is none yet."""
        pair = (data.name, method.name)
        rows = (r for r in self.rows.values() if r.purpose == "final" and _pair_of(r) == pair)
        return min((r for r in rows if r.status == "success"), key=lambda row: row.seed, default=None)

    def _trials(self, data: DataEntry, method: MethodEntry) -> list[CellRow]:
        """Rows of a pair's trials, in the order of their names."""
        pair = (data.name, method.name)
        rows = [r for r in self.rows.values() if r.purpose == "trial" and _pair_of(r) == pair]
        return sorted((r for r in rows if r.seed < self.experiment.grid.seeds), key=lambda row: row.cell)

    def _first_error(self, data: DataEntry, method: MethodEntry) -> str:
        """The error of the first failed tuning run."""
        return next((row.error for row in self._trials(data, method) if row.error), "no error was recorded")


def _pair_of(row: CellRow) -> tuple[str, str]:
    """Task and method of a row."""
    return row.task_name, row.experiment_name


def _candidate_of(row: CellRow) -> Candidate:
    """The candidate that a trial's row is about."""
    return Candidate(row.lr_factor, row.tried_weight_decay)
