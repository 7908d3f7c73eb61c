"""Cells of a comparison, each a training run, and the plan that schedules them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from snella_app.config import TrainConfig
from snella_app.methods import find_method
from snella_app.records import CellRow, SearchChoice
from snella_lab.comparison.experiment import DataEntry, Experiment, MethodEntry, folder_name, make_config
from snella_lab.comparison.search import Candidate, TuningResult, next_tuning_runs

TEST_SEED = 0
"""Seed of the test split in every cell. Run seeds change only the training and validation images, so that
no run is tuned on the test images of another."""


@dataclass(frozen=True)
class Cell:
    """One tuning or final run of a method on a task.

    Args:
        data: The task.
        method: The method.
        seed: Seed of training and validation split, initialization, shuffling and augmentation.
        candidate: Learning-rate factor and weight decay.
        is_final: True for a final run, the only kind that evaluates test images.
        search: Tuning results, stored in the row of a final run.
        blocked_by: Error that prevents a final run: all its tuning runs failed.
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
        """Path of the run folder below `cells/`; the path of a final run does not depend on its hyperparameters."""
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
) -> Mapping[str, float]:
    """Return `lr`, `head_lr` and `weight_decay` of a candidate, based on the method's defaults.

    The factor scales `lr`. It scales `head_lr` only for methods that train nothing but the head.
    """
    base = make_config(method, data, experiment.settings, backbone=experiment.backbone, out="-")
    lr, head_lr, decay = base.optim.lr or 0.0, base.optim.head_lr, base.optim.weight_decay or 0.0
    defaults = {"lr": lr, "head_lr": lr if head_lr is None else head_lr, "weight_decay": decay}
    return scaled_settings(defaults, method, candidate)


def scaled_settings(defaults: Mapping[str, float], method: MethodEntry, candidate: Candidate) -> Mapping[str, float]:
    """Scale the `defaults`, the settings of `Candidate()`, to a candidate; see `tuned_settings`."""
    lr, head_lr, decay = (defaults[name] for name in ("lr", "head_lr", "weight_decay"))
    is_head_only = find_method(method.method).is_head_only
    return {
        "lr": _rounded(lr * candidate.lr_factor),
        "head_lr": _rounded(head_lr * candidate.lr_factor) if is_head_only else head_lr,
        "weight_decay": decay if candidate.weight_decay is None else candidate.weight_decay,
    }


def _rounded(rate: float) -> float:
    """Round to six significant digits: 3 * 0.003 becomes 0.009."""
    return float(f"{rate:.6g}")


def tuning_result(row: CellRow) -> TuningResult:
    """Return the validation result of a tuning run's row."""
    return TuningResult(row.score("val"), row.column("val_loss"))


Part: TypeAlias = tuple[int, int]
"""Index of a part, from 0, and number of parts of a comparison."""


def units(experiment: Experiment) -> list[tuple[DataEntry, MethodEntry, tuple[int, ...]]]:
    """Split an experiment into independent units: task, method and seeds of final runs.

    With a hyperparameter search, a unit contains all runs of a method on a task, because later runs depend on earlier
    ones. Without a search, every run is a unit.
    """
    seeds = tuple(range(experiment.seeds))
    split: list[tuple[DataEntry, MethodEntry, tuple[int, ...]]] = []
    for data, method in _pairs(experiment):
        decay = tuned_settings(experiment, data, method, Candidate())["weight_decay"]
        has_search = isinstance(next_tuning_runs(experiment.grid, decay, {}), list)
        split += [(data, method, seeds)] if has_search else [(data, method, (seed,)) for seed in seeds]
    return split


class Plan:
    """Finished and remaining cells of an experiment.

    The cost of each method call is independent of the number of finished cells.

    Args:
        experiment: The experiment.
        rows: Rows of finished cells by cell name.
        part: Part of the `units` to plan; None plans all cells.

    Attributes:
        done: Number of finished cells.
        left: Number of remaining cells, excluding grid extensions.
    """

    def __init__(self, experiment: Experiment, rows: Mapping[str, CellRow], part: Part | None = None) -> None:
        self.experiment = experiment
        self._pairs: dict[tuple[str, str], _Pair] = {}
        for data, method, seeds in _planned(experiment, part):
            self._pairs[data.name, method.name] = _Pair(experiment, data, method, seeds)
        self.done = 0
        for row in rows.values():
            pair = self._pairs.get(_pair_of(row))
            if pair is not None:
                self.done += pair.record(row)
        self._open = {name: pair for name, pair in self._pairs.items() if pair.ready()}
        self.left = sum(pair.left() for pair in self._open.values())

    def record(self, row: CellRow) -> None:
        """Add the row of a finished cell."""
        pair = self._pairs.get(_pair_of(row))
        if pair is None:
            return
        before = pair.left()
        self.done += pair.record(row)
        self.left += pair.left() - before
        if not pair.ready():
            self._open.pop(_pair_of(row), None)

    def ready(self) -> Iterator[Cell]:
        """Yield unfinished cells without unfinished dependencies, in the order of the experiment.

        Rows recorded during the iteration may make further cells ready; the next call yields them.
        """
        for pair in list(self._open.values()):
            yield from list(pair.ready())

    def remaining(self) -> Iterator[tuple[str, str, int]]:
        """Yield task, method and number of remaining cells of each unfinished pair, excluding grid extensions."""
        return ((task, method, pair.left()) for (task, method), pair in self._open.items())


def _planned(experiment: Experiment, part: Part | None) -> list[tuple[DataEntry, MethodEntry, tuple[int, ...]]]:
    """Return the task-method pairs of a part, each with the seeds of its final runs."""
    if part is None:
        return [(data, method, tuple(range(experiment.seeds))) for data, method in _pairs(experiment)]
    index, count = part
    planned: dict[tuple[str, str], tuple[DataEntry, MethodEntry, tuple[int, ...]]] = {}
    for data, method, seeds in units(experiment)[index::count]:
        earlier = planned.get((data.name, method.name), (data, method, ()))[2]
        planned[data.name, method.name] = (data, method, (*earlier, *seeds))
    return list(planned.values())


def _pairs(experiment: Experiment) -> list[tuple[DataEntry, MethodEntry]]:
    """Return all pairs of task and method, grouped by task."""
    return [(data, method) for data in experiment.data for method in experiment.methods]


@dataclass(frozen=True)
class _Run:
    """Columns of a row that the plan needs; complete rows of large comparisons would take too much memory."""

    seed: int
    candidate: Candidate
    is_final: bool
    result: TuningResult
    search: SearchChoice | None
    error: str | None

    @classmethod
    def of(cls, row: CellRow) -> "_Run":
        """Extract the columns from a row."""
        is_final = row.purpose == "final"
        error = row.error or ("failed" if row.status != "success" else None)
        candidate = Candidate(row.lr_factor, row.tried_weight_decay)
        return cls(row.seed, candidate, is_final, tuning_result(row), row.search if is_final else None, error)


class _Pair:
    """Finished and remaining cells of one method on one task.

    Args:
        experiment: The experiment.
        data: The task.
        method: The method.
        seeds: Seeds of the final runs.
    """

    def __init__(self, experiment: Experiment, data: DataEntry, method: MethodEntry, seeds: tuple[int, ...]) -> None:
        self._experiment, self._data, self._method, self._seeds = experiment, data, method, seeds
        self._defaults = tuned_settings(experiment, data, method, Candidate())
        self._runs: dict[str, _Run] = {}
        self._ready: list[Cell] | None = None

    def record(self, row: CellRow) -> bool:
        """Add a row, and return True if its cell is new."""
        is_new = row.cell not in self._runs
        self._runs[row.cell], self._ready = _Run.of(row), None
        return is_new

    def ready(self) -> list[Cell]:
        """Return the next cells."""
        if self._ready is None:
            self._ready = self._next()
        return self._ready

    def left(self) -> int:
        """Return the number of remaining cells, excluding grid extensions."""
        ready = self.ready()
        if not ready or ready[0].is_final:
            return len(ready)
        finals, grid = len(self._seeds), self._experiment.grid
        if ready[0].candidate.weight_decay is not None:
            return len(ready) + finals
        decays = {decay for decay in grid.weight_decays if decay != self._defaults["weight_decay"]}
        return len(ready) + len(decays) * grid.seeds + finals

    def _next(self) -> list[Cell]:
        """Compute the next cells.

        Once a final run is evaluated on the test images, its hyperparameters apply to all seeds of the pair, even if
        tuning runs are repeated later.
        """
        data, method = self._data, self._method
        evaluated = self._first_success()
        if evaluated is not None:
            finals = (Cell(data, method, s, evaluated.candidate, True, evaluated.search) for s in self._seeds)
            return self._missing(finals)
        results = self._results()
        choice = next_tuning_runs(self._experiment.grid, self._defaults["weight_decay"], results)
        if isinstance(choice, list):
            seeds = range(self._experiment.grid.seeds)
            return self._missing([Cell(data, method, seed, candidate, False) for candidate in choice for seed in seeds])
        selected = choice.candidate or Candidate()
        missing = self._missing([Cell(data, method, seed, selected, True) for seed in self._seeds])
        if missing and choice.candidate is not None:
            rates = {c: scaled_settings(self._defaults, method, c) for c in choice.tried}
            search = choice.record(results, rates.__getitem__)
            return [replace(cell, search=search) for cell in missing]
        error = f"all {len(choice.tried)} tuning runs failed; first error: {self._first_error()}"
        return [replace(cell, blocked_by=error) for cell in missing]

    def _missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the cells without a row."""
        return [cell for cell in cells if cell.name not in self._runs]

    def _results(self) -> dict[Candidate, list[TuningResult]]:
        """Group the results of tuning runs by candidate."""
        results: dict[Candidate, list[TuningResult]] = {}
        for run in self._trials():
            results.setdefault(run.candidate, []).append(run.result)
        return results

    def _first_success(self) -> _Run | None:
        """Return the successful final run with the lowest seed, or None."""
        finals = (run for run in self._runs.values() if run.is_final and run.error is None)
        return min(finals, key=lambda run: run.seed, default=None)

    def _trials(self) -> list[_Run]:
        """Return the tuning runs, sorted by cell name."""
        trials = (run for _, run in sorted(self._runs.items(), key=lambda item: item[0]) if not run.is_final)
        return [run for run in trials if run.seed < self._experiment.grid.seeds]

    def _first_error(self) -> str:
        """Return the error of the first failed tuning run."""
        return next((run.error for run in self._trials() if run.error), "no error was recorded")


def _pair_of(row: CellRow) -> tuple[str, str]:
    """Return the task and method of a row."""
    return row.task_name, row.experiment_name
