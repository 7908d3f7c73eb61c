"""How many images the tables of the paper make a method learn from and measure, and what that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counted_step import CountedStep
from row_speed import RowSpeed

from snella_app.data.benchmarks import FGVC_DATASETS, VTAB_TASKS
from snella_app.data.protocol import PROTOCOLS
from snella_lab.comparison.experiment import Experiment

_VTAB_TRAIN, _VTAB_VAL = 800, 200


@dataclass(frozen=True)
class Workload:
    """Work of one kind.

    Args:
        passes: Forward and backward passes, each of a batch.
        learnt: Images, or other samples, in these passes together.
        measured: Images in forward passes alone.
    """

    passes: float
    learnt: float
    measured: float = 0.0

    def times(self, count: float) -> Workload:
        """The same `count` times."""
        return Workload(count * self.passes, count * self.learnt, count * self.measured)

    def plus(self, other: Workload) -> Workload:
        """One after the other."""
        return Workload(self.passes + other.passes, self.learnt + other.learnt, self.measured + other.measured)


def training(images: int, epochs: int, batch: int, measured: float = 0.0) -> Workload:
    """A training; an epoch's last batch may be smaller."""
    return Workload(epochs * math.ceil(images / batch), epochs * images, measured)


def seconds(speed: RowSpeed, counted: CountedStep, work: Workload, *, is_checkpointed: bool = False) -> float:
    """What work takes: passes by the line of a whole step, measured images by the FLOP of the forward pass.

    Args:
        speed: Of the machine.
        counted: One step of `counted.batch` samples.
        work: How much there is.
        is_checkpointed: Whether each pass runs the forward pass a second time, merging included.
    """
    forward = counted.forward_flop / counted.batch
    total = speed.step.seconds(work.passes, counted.adapted, work.learnt * counted.training_flop / counted.batch)
    if is_checkpointed:
        total += speed.forward.seconds(work.passes, counted.adapted, work.learnt * forward)
    return total + speed.forward.seconds(0, counted.adapted, work.measured * forward)


def final_run(experiment: Experiment) -> Workload:
    """One final run of one method on every task of an experiment."""
    return _over_tasks(experiment, str(experiment.settings["protocol"]))


def one_method(experiment: Experiment) -> tuple[Workload, Workload]:
    """All trainings of one method in an experiment: with the fewest trials of its rates and with the most."""
    grid = experiment.grid
    factors = len(grid.lr_factors)
    fewest = factors * grid.seeds if factors > 1 else 0
    most = (factors + grid.max_extensions) * grid.seeds if factors > 1 else 0
    final = final_run(experiment).times(experiment.seeds)
    trial = _over_tasks(experiment, "standard")
    return final.plus(trial.times(fewest)), final.plus(trial.times(most))


def _over_tasks(experiment: Experiment, protocol: str) -> Workload:
    """One training on every task."""
    rule = PROTOCOLS[protocol]
    epochs = int(experiment.settings["epochs"])
    times_measured = sum(rule.is_measured(epoch, epochs) for epoch in range(1, epochs + 1))
    total = Workload(0, 0)
    for entry in experiment.data:
        train, val, test, is_joined = _sizes(entry.name)
        batch = int(entry.settings.get("batch_size", experiment.settings.get("batch_size", 0)))
        learnt = train + val if protocol == "final" or (protocol == "official" and is_joined) else train
        measured = {"val": times_measured * val, "test": times_measured * test, None: test}[rule.selected_on]
        total = total.plus(training(learnt, epochs, batch, measured))
    return total


def _sizes(task: str) -> tuple[int, int, int, bool]:
    """Images in train, val and test, and whether the authors' scripts learn from the second too."""
    if task in VTAB_TASKS:
        return _VTAB_TRAIN, _VTAB_VAL, VTAB_TASKS[task].test_size, True
    return *FGVC_DATASETS[task].sizes, False
