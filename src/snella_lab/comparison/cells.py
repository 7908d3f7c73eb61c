"""Cells of a comparison, and the plan that schedules them.

A cell is one run of a method on a task with one seed. Tuning runs select the hyperparameters on validation images, and
final runs evaluate them on test images. The settings and results of each cell are stored as a row.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from snella_app.config.train import TrainConfig
from snella_app.methods import find_method
from snella_lab.comparison.experiment import (
    DataEntry,
    Experiment,
    MethodEntry,
    default_weight_decay,
    folder_name,
    make_config,
)
from snella_lab.comparison.rows import CellRow, SearchChoice
from snella_lab.comparison.search import Candidate, TuningResult, next_tuning_runs

TEST_SEED = 0
"""Default seed of the test split, the same in every cell. A run's seed does not change the test split, so
no run is tuned on the test images of another run."""


@dataclass(frozen=True)
class Cell:
    """One tuning or final run of a method on a task.

    Args:
        data: The task.
        method: The method.
        seed: Seed for the train/validation split, initialization, shuffling, and augmentation.
        candidate: Learning-rate factor and weight decay.
        is_final: True for a final run, the only kind that is evaluated on test images.
        search: Result of the hyperparameter search, which is stored in the row of a final run.
        blocked_by: Why a final run cannot be trained: every candidate has a failed tuning run. None for other cells.
    """

    data: DataEntry
    method: MethodEntry
    seed: int
    candidate: Candidate
    is_final: bool
    search: SearchChoice | None = field(default=None, compare=False)
    blocked_by: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Path of the run folder below `cells/`, without the hyperparameters if this is a final run."""
        prefix = f"{folder_name(self.data.name)}/{folder_name(self.method.name)}"
        if self.is_final:
            return f"{prefix}/seed-{self.seed}"
        return f"{prefix}/trials/{self.candidate.label}_seed-{self.seed}"

    @property
    def title(self) -> str:
        """Human-readable name of the run."""
        purpose = "final" if self.is_final else f"tuning {self.candidate.label.replace('_', ' ')}"
        return f"{self.data.name} · {self.method.name} · {purpose} · seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Return the run folder."""
        return root / "cells" / self.name

    def config(self, experiment: Experiment, out: Path | str) -> TrainConfig:
        """Return the settings of the run, which writes to the folder `out`.

        Protocol `final` applies only to final runs. Tuning runs use `standard` instead, because they need validation
        images.
        """
        settings: dict[str, Any] = {"test_seed": TEST_SEED, **experiment.settings}
        values: dict[str, Any] = {}
        if settings.get("protocol") == "final":
            if self.is_final:
                values["val_size"] = None  # the validation images join the training images
            else:
                settings["protocol"] = "standard"
        return make_config(
            self.method,
            self.data,
            settings,
            backbone=experiment.backbone,
            out=str(out),
            seed=self.seed,
            **tuned_settings(experiment.config(self.method, self.data), self.candidate),
            **values,
        )


def tuned_settings(defaults: TrainConfig, candidate: Candidate) -> dict[str, float]:
    """Return `lr`, `head_lr`, and `weight_decay` of a candidate, given the method's default settings.

    The candidate's factor scales `lr` and, for methods that train only the head, `head_lr` as well.
    """
    optim = defaults.optim
    lr = optim.lr or 0.0
    head_lr = lr if optim.head_lr is None else optim.head_lr
    if find_method(defaults.method.name).is_head_only:
        head_lr = _rounded(head_lr * candidate.lr_factor)
    weight_decay = candidate.weight_decay
    if weight_decay is None:
        weight_decay = optim.weight_decay or 0.0
    return {"lr": _rounded(lr * candidate.lr_factor), "head_lr": head_lr, "weight_decay": weight_decay}


def _rounded(rate: float) -> float:
    """Round to six significant digits, so that rounding errors do not show: 3 * 0.003 becomes 0.009."""
    return float(f"{rate:.6g}")


def tuning_result(row: CellRow) -> TuningResult:
    """Return the validation result of a tuning run's row."""
    return TuningResult(row.score("val"), row.column("val_loss"))


Unit: TypeAlias = tuple[DataEntry, MethodEntry, tuple[int, ...]]
"""Task, method, and seeds of final runs."""


def units(experiment: Experiment) -> list[Unit]:
    """Split an experiment into units that can be trained independently.

    With a hyperparameter search, a unit contains all runs of a method on a task, because later runs depend on earlier
    ones. Without a search, every run is a unit.
    """
    seeds = tuple(range(experiment.seeds))
    independent: list[Unit] = []
    for data, method in itertools.product(experiment.data, experiment.methods):
        default_decay = default_weight_decay(experiment.config(method, data))
        first_runs = next_tuning_runs(experiment.grid, default_decay, {})
        if isinstance(first_runs, list):
            independent.append((data, method, seeds))
        else:  # the grid has a single candidate
            independent += [(data, method, (seed,)) for seed in seeds]
    return independent


class Plan:
    """Finished and remaining cells of an experiment.

    Cells are grouped by pairs of task and method. `record` recomputes only the pair of the new row, so its cost does
    not grow with the number of pairs.

    Args:
        experiment: The experiment.
        rows: Rows of finished cells, by cell name.
        planned: Units to which the plan is restricted. None plans the whole experiment.

    Attributes:
        done: Number of finished cells of the plan.
        left: Number of remaining cells, not counting those that later grid extensions may add.
    """

    def __init__(
        self, experiment: Experiment, rows: Mapping[str, CellRow], planned: Iterable[Unit] | None = None
    ) -> None:
        self.experiment = experiment
        if planned is None:
            seeds = tuple(range(experiment.seeds))
            planned = ((*pair, seeds) for pair in itertools.product(experiment.data, experiment.methods))
        self._pairs: dict[tuple[str, str], _Pair] = {}
        for data, method, seeds in planned:
            key = data.name, method.name
            if key not in self._pairs:
                self._pairs[key] = _Pair(experiment, data, method)
            self._pairs[key].seeds += seeds
        self.done = 0
        for row in rows.values():
            pair = self._pairs.get(_pair_of(row))
            if pair is not None:
                self.done += pair.record(row)
        self._unfinished = {key: pair for key, pair in self._pairs.items() if pair.ready()}
        self.left = sum(pair.left() for pair in self._unfinished.values())

    def record(self, row: CellRow) -> None:
        """Add the row of a finished cell."""
        pair = self._pairs.get(_pair_of(row))
        if pair is None:
            return
        left_before = pair.left()
        self.done += pair.record(row)
        self.left += pair.left() - left_before
        if not pair.ready():
            self._unfinished.pop(_pair_of(row), None)

    def ready(self) -> Iterator[Cell]:
        """Yield the unfinished cells that do not depend on other unfinished cells, in the order of the experiment.

        Rows recorded during the iteration affect only pairs that it has not reached yet.
        """
        for pair in list(self._unfinished.values()):
            yield from list(pair.ready())

    def remaining(self) -> Iterator[tuple[str, str, int]]:
        """Yield the task, the method, and the number of remaining cells (as in `left`) of each unfinished pair."""
        return ((task, method, pair.left()) for (task, method), pair in self._unfinished.items())


@dataclass(frozen=True)
class _Run:
    """Columns of a row that the plan needs, because complete rows of large comparisons take too much memory."""

    cell: str
    seed: int
    candidate: Candidate
    is_final: bool
    result: TuningResult
    search: SearchChoice | None
    error: str | None


class _Pair:
    """Finished and remaining cells of one method on one task, with the seeds of its final runs."""

    def __init__(self, experiment: Experiment, data: DataEntry, method: MethodEntry) -> None:
        self._experiment = experiment
        self._data = data
        self._method = method
        self.seeds: tuple[int, ...] = ()
        self._defaults = experiment.config(method, data)
        self._default_decay = default_weight_decay(self._defaults)
        self._runs: dict[str, _Run] = {}
        self._ready: list[Cell] | None = None

    def record(self, row: CellRow) -> bool:
        """Add a row, and return True if its cell is new and belongs to the plan."""
        is_new = row.cell not in self._runs
        is_final = row.purpose == "final"
        error = row.error or ("failed" if row.status != "success" else None)
        candidate = Candidate(row.lr_factor, row.tried_weight_decay)
        search = row.search if is_final else None
        self._runs[row.cell] = _Run(row.cell, row.seed, candidate, is_final, tuning_result(row), search, error)
        self._ready = None
        return is_new and (not is_final or row.seed in self.seeds)

    def ready(self) -> list[Cell]:
        """Return the unfinished cells of the next step: tuning runs, or the final runs once tuning is finished."""
        if self._ready is None:
            self._ready = [cell for cell in self._next() if cell.name not in self._runs]
        return self._ready

    def left(self) -> int:
        """Return the number of remaining cells, as in `Plan.left`."""
        ready = self.ready()
        if not ready or ready[0].is_final:
            return len(ready)
        num_finals = len(self.seeds)
        grid = self._experiment.grid
        if ready[0].candidate.weight_decay is not None:  # the learning rate has been selected already
            return len(ready) + num_finals
        decays = grid.other_weight_decays(self._default_decay)
        return len(ready) + len(decays) * grid.seeds + num_finals

    def _next(self) -> list[Cell]:
        """Compute the cells of the next step, including finished ones.

        Once a final run is evaluated on the test images, its hyperparameters apply to all seeds of the pair, even if
        tuning runs are repeated later.
        """
        data = self._data
        method = self._method
        grid = self._experiment.grid
        evaluated = [run for run in self._runs.values() if run.is_final and run.error is None]
        if evaluated:
            run = min(evaluated, key=lambda other: other.seed)
            return [Cell(data, method, seed, run.candidate, is_final=True, search=run.search) for seed in self.seeds]
        trials = [run for run in self._runs.values() if not run.is_final and run.seed < grid.seeds]
        trials.sort(key=lambda run: run.cell)  # independent of the order in which the rows were recorded
        results: dict[Candidate, list[TuningResult]] = {}
        for run in trials:
            results.setdefault(run.candidate, []).append(run.result)
        choice = next_tuning_runs(grid, self._default_decay, results)
        if isinstance(choice, list):
            return [
                Cell(data, method, seed, candidate, is_final=False)
                for candidate in choice
                for seed in range(grid.seeds)
            ]
        if choice.candidate is None:
            first_error = next((run.error for run in trials if run.error), "no error was recorded")
            error = f"each of the {len(choice.tried)} candidates has a failed tuning run; first error: {first_error}"
            return [Cell(data, method, seed, Candidate(), is_final=True, blocked_by=error) for seed in self.seeds]
        search = choice.record(results, lambda candidate: tuned_settings(self._defaults, candidate))
        return [Cell(data, method, seed, choice.candidate, is_final=True, search=search) for seed in self.seeds]


def _pair_of(row: CellRow) -> tuple[str, str]:
    """Return the task and method of a row."""
    return row.task_name, row.experiment_name
