"""Number of training and evaluation images for the paper's tables, and the estimated time."""

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
    """Amount of work.

    Args:
        passes: Number of training batches (forward and backward).
        learnt: Total samples in the training batches.
        measured: Samples in evaluation (forward only).
    """

    passes: float
    learnt: float
    measured: float = 0.0

    def times(self, count: float) -> Workload:
        """Multiply the work by `count`."""
        return Workload(count * self.passes, count * self.learnt, count * self.measured)

    def plus(self, other: Workload) -> Workload:
        """Add two workloads."""
        return Workload(self.passes + other.passes, self.learnt + other.learnt, self.measured + other.measured)


def training(images: int, epochs: int, batch: int, measured: float = 0.0) -> Workload:
    """Return the workload of one training run; the last batch of an epoch may be smaller."""
    return Workload(epochs * math.ceil(images / batch), epochs * images, measured)


def seconds(speed: RowSpeed, counted: CountedStep, work: Workload, *, is_checkpointed: bool = False) -> float:
    """Estimate the seconds of a workload: training by the step model, evaluation by the FLOP of the forward pass.

    Args:
        speed: Speed of the machine.
        counted: One step of `counted.batch` samples.
        work: The workload.
        is_checkpointed: True if each training pass repeats the forward pass, including the merge.
    """
    forward = counted.forward_flop / counted.batch
    total = speed.step.seconds(work.passes, counted.adapted, work.learnt * counted.training_flop / counted.batch)
    if is_checkpointed:
        total += speed.forward.seconds(work.passes, counted.adapted, work.learnt * forward)
    return total + speed.forward.seconds(0, counted.adapted, work.measured * forward)


def final_run(experiment: Experiment) -> Workload:
    """Return the workload of one final run on every task of an experiment."""
    return _over_tasks(experiment, str(experiment.settings["protocol"]))


def one_method(experiment: Experiment) -> tuple[Workload, Workload]:
    """Return the workloads of one method in an experiment with the fewest and the most tuning runs."""
    grid = experiment.grid
    factors = len(grid.lr_factors)
    fewest = factors * grid.seeds if factors > 1 else 0
    most = (factors + grid.max_extensions) * grid.seeds if factors > 1 else 0
    final = final_run(experiment).times(experiment.seeds)
    trial = _over_tasks(experiment, "standard")
    return final.plus(trial.times(fewest)), final.plus(trial.times(most))


def _over_tasks(experiment: Experiment, protocol: str) -> Workload:
    """Return the workload of one training run on every task."""
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
    """Return the sizes of train, val and test, and True if the authors' scripts also train on val."""
    if task in VTAB_TASKS:
        return _VTAB_TRAIN, _VTAB_VAL, VTAB_TASKS[task].test_size, True
    return *FGVC_DATASETS[task].sizes, False
