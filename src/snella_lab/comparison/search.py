"""Hyperparameter search for the learning rate and the weight decay, on the validation set.

The search tunes the learning rate at the method's default weight decay, then the weight decay at the best learning
rate. While the best value is on the edge of the grid (for the weight decay, the upper edge), the grid is extended, at
most `Grid.max_extensions` times per hyperparameter. The next step depends only on the results so far, so the search can
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
    """A point on the grid.

    Args:
        lr_factor: Multiplier of the method's default learning rate.
        weight_decay: Weight decay. None for the method's default.
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
    """Validation results of a tuning run, which are None if the run failed.

    `accuracy` is the score of the comparison's metric, even if that is not accuracy.
    """

    accuracy: float | None
    loss: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: accuracy, then negative loss. Failed runs rank lowest."""
        if self.accuracy is None or self.loss is None:
            return -math.inf, -math.inf
        return self.accuracy, -self.loss


Results = Mapping[Candidate, Sequence[TuningResult]]
"""Results of tuning runs by candidate. A complete candidate has one result per seed."""


@dataclass(frozen=True)
class Choice:
    """Result of the search.

    Args:
        candidate: The best candidate. None if every candidate has a failed tuning run.
        tried: All candidates of the search: those for the learning rate, then those for the weight decay.
        lr_on_edge: True if the best learning rate is the smallest or largest of several that were tried.
        weight_decay_on_edge: True if the best weight decay is positive and the largest of several that were tried.
    """

    candidate: Candidate | None
    tried: tuple[Candidate, ...]
    lr_on_edge: bool
    weight_decay_on_edge: bool

    def record(self, results: Results, tuned_settings: Callable[[Candidate], Mapping[str, Any]]) -> SearchChoice:
        """Convert the choice and the tuning results to the `search` entry of a final run's row.

        `tuned_settings` returns the `lr`, `head_lr`, and `weight_decay` of a candidate.
        """
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
    """Return the candidates that need tuning runs next, or the final choice if none do.

    If the grid has a single candidate, the choice is returned at once, because no tuning run is needed.
    """
    factors = sorted(set(grid.lr_factors))
    decays = grid.other_weight_decays(default_weight_decay)
    if len(factors) == 1 and not decays:
        only = Candidate(factors[0])
        return Choice(only, (only,), lr_on_edge=False, weight_decay_on_edge=False)
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
        return Choice(None, tuple(candidates), lr_on_edge=False, weight_decay_on_edge=False)
    lr_on_edge = len(factors) > 1 and best.lr_factor in (factors[0], factors[-1])
    if not decays:
        return Choice(best, tuple(candidates), lr_on_edge=lr_on_edge, weight_decay_on_edge=False)
    for extensions in range(grid.max_extensions + 1):
        tried = [Candidate(best.lr_factor), *(Candidate(best.lr_factor, decay) for decay in decays)]
        missing = _missing(tried, grid, results)
        if missing:
            return missing
        best = _best(tried, results) or best
        largest = max([default_weight_decay, *decays])
        chosen = default_weight_decay if best.weight_decay is None else best.weight_decay
        if not 0 < largest == chosen or extensions == grid.max_extensions:  # ten times 0 would not extend the grid
            break
        decays = [*decays, _rounded(largest * 10)]
    is_on_edge = 0 < largest == chosen
    return Choice(best, (*candidates, *tried[1:]), lr_on_edge=lr_on_edge, weight_decay_on_edge=is_on_edge)


def _missing(candidates: Sequence[Candidate], grid: Grid, results: Results) -> list[Candidate]:
    """Return the candidates that have fewer than `grid.seeds` tuning runs."""
    return [candidate for candidate in candidates if len(results.get(candidate, ())) < grid.seeds]


def _best(candidates: Sequence[Candidate], results: Results) -> Candidate | None:
    """Return the candidate with the highest mean `rank` over seeds, or None if each candidate has a failed run.

    Ties go to the learning rate that is closest to the default on a logarithmic scale, then to the first candidate.
    """
    ranks = {}
    for candidate in candidates:
        accuracies, losses = zip(*(result.rank for result in results[candidate]), strict=True)
        ranks[candidate] = sum(accuracies) / len(accuracies), sum(losses) / len(losses)
    best = max(ranks, key=lambda candidate: (ranks[candidate], -abs(math.log(candidate.lr_factor))))
    return best if math.isfinite(ranks[best][0]) else None


def _extension(factors: Sequence[float], best: float) -> float | None:
    """Return the next factor beyond the edge of the grid, or None if the best factor is not on an edge.

    The extension repeats the ratio over two steps: 1, 3, 10 is followed by 30. With two factors, it repeats their
    ratio. A single factor is not extended.
    """
    if len(factors) < 2 or best not in (factors[0], factors[-1]):
        return None
    edge, neighbor, *others = factors if best == factors[0] else factors[::-1]
    extension = edge * neighbor / others[0] if others else edge * edge / neighbor
    rounded = _rounded(extension)
    is_beyond = rounded > edge if extension > edge else rounded < edge
    return rounded if is_beyond else extension  # rounding may lead back onto the grid if its steps are small


def _rounded(value: float) -> float:
    """Round to two significant digits, which preserves the pattern of a 1, 3, 10 grid."""
    return float(f"{value:.2g}")
