"""Hyperparameter search: learning rate and weight decay, tuned on the validation set.

The learning rate is searched first, with the method's own weight decay; then the weight decay at the best rate. While
the best value lies on the grid's edge the grid grows there. The search is a function of the results so far alone, so
that it resumes after any interruption, on any machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snella_app.records import SearchChoice, TriedCandidate
from snella_lab.comparison.experiment import Grid


@dataclass(frozen=True, order=True)
class Candidate:
    """One point of the grid.

    Args:
        lr_factor: Times the method's default learning rate.
        weight_decay: None for the method's default.
    """

    lr_factor: float = 1.0
    weight_decay: float | None = None

    @property
    def label(self) -> str:
        """Short name, for folders and lines."""
        decay = "" if self.weight_decay is None else f"_wd-{self.weight_decay:g}"
        return f"lr-x{self.lr_factor:g}{decay}"


@dataclass(frozen=True)
class TuningResult:
    """Validation results of one tuning run; None for a failed one."""

    accuracy: float | None
    loss: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: accuracy, then loss; a failed run is below all others."""
        if self.accuracy is None or self.loss is None:
            return -math.inf, -math.inf
        return self.accuracy, -self.loss


Results = Mapping[Candidate, Sequence[TuningResult]]
"""Finished tuning runs by candidate; a candidate is complete with one result per seed."""


@dataclass(frozen=True)
class Choice:
    """The result of the search.

    Args:
        candidate: The best point; None where all tuning runs failed.
        tried: All points in the order of the axes.
        lr_on_edge: Whether the best rate is the smallest or the largest that was tried.
        weight_decay_on_edge: Whether the best weight decay is the largest of several; 0 is no edge.
    """

    candidate: Candidate | None
    tried: tuple[Candidate, ...]
    lr_on_edge: bool
    weight_decay_on_edge: bool

    def record(self, results: Results, tuned_settings: Callable[[Candidate], Mapping[str, Any]]) -> SearchChoice:
        """The choice as a row holds it, with every result."""
        trials = []
        for candidate in self.tried:
            found = results.get(candidate, ())
            if not found:
                continue  # a single candidate needs no tuning run
            accuracies = [r.accuracy for r in found if r.accuracy is not None]
            is_whole = len(accuracies) == len(found)
            trials.append(
                TriedCandidate(
                    lr_factor=candidate.lr_factor,
                    **tuned_settings(candidate),
                    val_accuracy=sum(accuracies) / len(accuracies) if is_whole else None,
                    val_loss=_mean([r.loss for r in found]) if is_whole else None,
                    failed=len(found) - len(accuracies),
                )
            )
        factor = None if self.candidate is None else self.candidate.lr_factor
        return SearchChoice(
            lr_factor=factor,
            lr_on_edge=self.lr_on_edge,
            weight_decay_on_edge=self.weight_decay_on_edge,
            trials=trials,
        )


def next_tuning_runs(grid: Grid, default_weight_decay: float, results: Results) -> list[Candidate] | Choice:
    """The candidates to train before the choice can be made, or the choice.

    Args:
        grid: The axes.
        default_weight_decay: The method's own; a grid of one point with it needs no tuning run.
        results: What is finished so far.
    """
    factors = sorted(set(grid.lr_factors))
    if len(factors) == 1 and not {w for w in grid.weight_decays if w != default_weight_decay}:
        only = Candidate(factors[0])
        return Choice(only, (only,), False, False)
    for extensions in range(grid.max_extensions + 1):
        candidates = [Candidate(factor) for factor in factors]
        missing = _missing(candidates, grid, results)
        if missing:
            return missing
        best = _best(candidates, results)
        extension = None if best is None else _beyond(factors, best.lr_factor)
        if extension is None or extensions == grid.max_extensions:
            break
        factors = sorted([*factors, extension])
    if best is None:
        return Choice(None, tuple(candidates), False, False)
    lr_on_edge = len(factors) > 1 and best.lr_factor in (factors[0], factors[-1])
    decays = sorted({w for w in grid.weight_decays if w != default_weight_decay})
    if not decays:
        return Choice(best, tuple(candidates), lr_on_edge, False)
    for extensions in range(grid.max_extensions + 1):
        row = [Candidate(best.lr_factor), *(Candidate(best.lr_factor, w) for w in decays)]
        missing = _missing(row, grid, results)
        if missing:
            return missing
        best = _best(row, results) or best
        largest = max([default_weight_decay, *decays])
        chosen = default_weight_decay if best.weight_decay is None else best.weight_decay
        if not 0 < largest == chosen or extensions == grid.max_extensions:
            break
        decays = [*decays, _rounded(largest * 10)]
    on_edge = 0 < largest == chosen
    return Choice(best, (*candidates, *row[1:]), lr_on_edge, on_edge)


def _missing(candidates: Sequence[Candidate], grid: Grid, results: Results) -> list[Candidate]:
    """Candidates that lack the result of a seed."""
    return [c for c in candidates if len(results.get(c, ())) < grid.seeds]


def _best(candidates: Sequence[Candidate], results: Results) -> Candidate | None:
    """The candidate with the highest mean over seeds; the first of equals, None where all failed."""
    ranks = [(_mean_rank(results[c]), c) for c in candidates]
    rank, best = max(ranks, key=lambda item: item[0])
    return best if math.isfinite(rank[0]) else None


def _mean_rank(results: Sequence[TuningResult]) -> tuple[float, float]:
    """Means of accuracy and of negative loss."""
    accuracies, losses = zip(*(result.rank for result in results), strict=True)
    return sum(accuracies) / len(results), sum(losses) / len(results)


def _beyond(factors: Sequence[float], best: float) -> float | None:
    """The next factor outside the grid, where the best lies on its edge; None where it lies inside.

    It continues the grid over two steps: 30 after 1, 3, 10.
    """
    if len(factors) < 2:
        return None
    if best == factors[-1]:
        return _rounded(_continued(factors[::-1]))
    return _rounded(_continued(factors)) if best == factors[0] else None


def _continued(factors: Sequence[float]) -> float:
    """The number before the first one."""
    first, second, *more = factors
    return first * second / more[0] if more else first * first / second


def _rounded(value: float) -> float:
    """Two significant digits, so that a grid of 1, 3, 10 stays one."""
    return float(f"{value:.2g}")


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, None where a value is missing."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) and numbers else None
