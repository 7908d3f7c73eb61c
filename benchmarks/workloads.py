"""Workloads of the paper's experiments, and time estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counted_step import CountedStep
from row_speed import RowSpeed

from snella_app.data.benchmarks import FGVC_DATASETS, VTAB_TASKS
from snella_app.data.protocol import PROTOCOLS
from snella_lab.comparison.experiment import Experiment


@dataclass(frozen=True)
class Workload:
    """Number of batches and samples to process.

    Args:
        passes: Number of training batches (forward and backward).
        trained: Number of training samples over all epochs.
        evaluated: Number of evaluation samples (forward only).
    """

    passes: float
    trained: float
    evaluated: float = 0.0

    def times(self, count: float) -> Workload:
        """Multiply the workload by `count`."""
        return Workload(count * self.passes, count * self.trained, count * self.evaluated)

    def plus(self, other: Workload) -> Workload:
        """Add two workloads."""
        return Workload(self.passes + other.passes, self.trained + other.trained, self.evaluated + other.evaluated)


def training(images: int, epochs: int, batch: int, evaluated: float = 0.0) -> Workload:
    """Return the workload of a training run; an epoch's last batch may be smaller."""
    return Workload(epochs * math.ceil(images / batch), epochs * images, evaluated)


def seconds(speed: RowSpeed, counted: CountedStep, work: Workload, *, is_checkpointed: bool = False) -> float:
    """Estimate the seconds of a workload: training with the step model, evaluation from the forward FLOP.

    Args:
        speed: Speed of the machine.
        counted: Step on `counted.batch` samples.
        work: Workload.
        is_checkpointed: True if each training step repeats the forward pass, including the merge.
    """
    forward = counted.forward_flop / counted.batch
    total = speed.step.seconds(work.passes, counted.adapted, work.trained * counted.training_flop / counted.batch)
    if is_checkpointed:
        total += speed.forward.seconds(work.passes, counted.adapted, work.trained * forward)
    return total + speed.forward.seconds(0, counted.adapted, work.evaluated * forward)


def final_run(experiment: Experiment) -> Workload:
    """Return the workload of one final run on each task of an experiment."""
    return _over_tasks(experiment, str(experiment.settings["protocol"]))


def one_method(experiment: Experiment) -> tuple[Workload, Workload]:
    """Return one method's workloads in an experiment, with the fewest and the most tuning runs."""
    grid = experiment.grid
    factors = len(grid.lr_factors)
    fewest = factors * grid.seeds if factors > 1 else 0
    most = (factors + grid.max_extensions) * grid.seeds if factors > 1 else 0
    final = final_run(experiment).times(experiment.seeds)
    tuning = _over_tasks(experiment, "standard")
    return final.plus(tuning.times(fewest)), final.plus(tuning.times(most))


def _over_tasks(experiment: Experiment, protocol: str) -> Workload:
    """Return the workload of one training run on each task."""
    protocol_settings = PROTOCOLS[protocol]
    epochs = int(experiment.settings["epochs"])
    num_evaluations = sum(protocol_settings.is_measured(epoch, epochs) for epoch in range(1, epochs + 1))
    total = Workload(0, 0)
    for entry in experiment.data:
        train, val, test, is_joined = _sizes(entry.name)
        batch = int(entry.settings.get("batch_size", experiment.settings.get("batch_size", 0)))
        trained = train + val if protocol == "final" or (protocol == "official" and is_joined) else train
        evaluated = {"val": num_evaluations * val, "test": num_evaluations * test, None: test}[
            protocol_settings.selected_on
        ]
        total = total.plus(training(trained, epochs, batch, evaluated))
    return total


def _sizes(task: str) -> tuple[int, int, int, bool]:
    """Return the sizes of train, val and test, and True if the authors' scripts also train on val."""
    if task in VTAB_TASKS:
        return *VTAB_TASKS[task].sizes, True
    return *FGVC_DATASETS[task].sizes, False
