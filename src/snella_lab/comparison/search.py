"""Hyperparameter search: learning rate and weight decay, tuned on the validation set.

The search tunes the learning rate at the method's default weight decay, then the weight decay at the best learning
rate. The grid grows while the best value is on its edge. The search depends only on the results so far, so it can
resume after any interruption, on any machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snella_lab.comparison.experiment import Grid
from snella_lab.comparison.rows import SearchChoice, TriedCandidate
from snella_lab.comparison.statistics import complete_mean


@dataclass(frozen=True, order=True)
class Candidate:
    """A point of the grid.

    Args:
        lr_factor: Factor on the method's default learning rate.
        weight_decay: Weight decay; None for the method's default.
    """

    lr_factor: float = 1.0
    weight_decay: float | None = None

    @property
    def label(self) -> str:
        """Short name for folders and log lines."""
        decay = "" if self.weight_decay is None else f"_wd-{self.weight_decay:g}"
        return f"lr-x{self.lr_factor:g}{decay}"


@dataclass(frozen=True)
class TuningResult:
    """Validation results of a tuning run; None if it failed.

    `accuracy` is the score of the comparison's metric, even if that is not accuracy.
    """

    accuracy: float | None
    loss: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: accuracy, then negative loss; failed runs rank lowest."""
        if self.accuracy is None or self.loss is None:
            return -math.inf, -math.inf
        return self.accuracy, -self.loss


Results = Mapping[Candidate, Sequence[TuningResult]]
"""Results of tuning runs by candidate; a complete candidate has one result per seed."""


@dataclass(frozen=True)
class Choice:
    """Result of the search.

    Args:
        candidate: The best candidate; None if every candidate has a failed tuning run.
        tried: All candidates: the learning rates, then the weight decays.
        lr_on_edge: True if the best learning rate is the smallest or largest of several tried.
        weight_decay_on_edge: True if the best weight decay is the largest one tried; 0 is not an edge.
    """

    candidate: Candidate | None
    tried: tuple[Candidate, ...]
    lr_on_edge: bool
    weight_decay_on_edge: bool

    def record(self, results: Results, tuned_settings: Callable[[Candidate], Mapping[str, Any]]) -> SearchChoice:
        """Convert the choice and all results to a row entry."""
        trials = []
        for candidate in self.tried:
            runs = results.get(candidate, ())
            if not runs:
                continue  # a single candidate needs no tuning run
            accuracies = [run.accuracy for run in runs]
            losses = [run.loss for run in runs]
            trials.append(
                TriedCandidate(
                    lr_factor=candidate.lr_factor,
                    **tuned_settings(candidate),
                    val_accuracy=complete_mean(accuracies),
                    val_loss=complete_mean(losses),
                    failed=sum(accuracy is None for accuracy in accuracies),
                )
            )
        factor = None if self.candidate is None else self.candidate.lr_factor
        return SearchChoice(
            lr_factor=factor, lr_on_edge=self.lr_on_edge, weight_decay_on_edge=self.weight_decay_on_edge, trials=trials
        )


def next_tuning_runs(grid: Grid, default_weight_decay: float, results: Results) -> list[Candidate] | Choice:
    """Return the candidates to train next, or the final choice; a single candidate needs no tuning run."""
    factors = sorted(set(grid.lr_factors))
    decays = sorted({w for w in grid.weight_decays if w != default_weight_decay})
    if len(factors) == 1 and not decays:
        only = Candidate(factors[0])
        return Choice(only, (only,), False, False)
    for extensions in range(grid.max_extensions + 1):
        candidates = [Candidate(factor) for factor in factors]
        missing = _missing(candidates, grid, results)
        if missing:
            return missing
        best = _best(candidates, results)
        extension = None if best is None else _extension(factors, best.lr_factor)
        if extension is None or extensions == grid.max_extensions:
            break
        factors = sorted([*factors, extension])
    if best is None:
        return Choice(None, tuple(candidates), False, False)
    lr_on_edge = len(factors) > 1 and best.lr_factor in (factors[0], factors[-1])
    if not decays:
        return Choice(best, tuple(candidates), lr_on_edge, False)
    for extensions in range(grid.max_extensions + 1):
        tried = [Candidate(best.lr_factor), *(Candidate(best.lr_factor, w) for w in decays)]
        missing = _missing(tried, grid, results)
        if missing:
            return missing
        best = _best(tried, results) or best
        largest = max([default_weight_decay, *decays])
        chosen = default_weight_decay if best.weight_decay is None else best.weight_decay
        if not 0 < largest == chosen or extensions == grid.max_extensions:
            break
        decays = [*decays, _rounded(largest * 10)]
    on_edge = 0 < largest == chosen
    return Choice(best, (*candidates, *tried[1:]), lr_on_edge, on_edge)


def _missing(candidates: Sequence[Candidate], grid: Grid, results: Results) -> list[Candidate]:
    """Return the candidates with unfinished seeds."""
    return [c for c in candidates if len(results.get(c, ())) < grid.seeds]


def _best(candidates: Sequence[Candidate], results: Results) -> Candidate | None:
    """Return the candidate with the highest mean rank over seeds; None if each has a failed run.

    Ties go to the learning rate that is closest to the default, then to the first candidate.
    """
    ranks = {}
    for candidate in candidates:
        accuracies, losses = zip(*(result.rank for result in results[candidate]), strict=True)
        ranks[candidate] = sum(accuracies) / len(accuracies), sum(losses) / len(losses)
    best = max(ranks, key=lambda candidate: (ranks[candidate], -abs(math.log(candidate.lr_factor))))
    return best if math.isfinite(ranks[best][0]) else None


def _extension(factors: Sequence[float], best: float) -> float | None:
    """Return the next factor beyond the edge of the grid if the best one is on it, else None.

    The extension repeats the ratio over two steps: 1, 3, 10 is followed by 30.
    """
    if len(factors) < 2 or best not in (factors[0], factors[-1]):
        return None
    first, second, *more = factors if best == factors[0] else factors[::-1]
    extension = first * second / more[0] if more else first * first / second
    rounded = _rounded(extension)
    is_beyond = rounded > first if extension > first else rounded < first
    return rounded if is_beyond else extension  # rounding may return to the grid if its steps are small


def _rounded(value: float) -> float:
    """Round to two significant digits, which preserves the pattern of a 1, 3, 10 grid."""
    return float(f"{value:.2g}")
