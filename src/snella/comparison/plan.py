"""The plan of a comparison: tuning runs first, then final runs with the chosen hyperparameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from snella.comparison.cells import Cell, tuned_settings, tuning_result
from snella.comparison.experiment import DataEntry, Experiment, MethodEntry
from snella.comparison.search import Candidate, Choice, TuningResult, next_tuning_runs
from snella.records import CellRow


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
