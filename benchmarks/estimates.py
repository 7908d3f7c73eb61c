"""Time estimates: step times fitted to results.jsonl, workloads of experiments, and their text."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

from counted_step import CountedStep

from snella_app.data.benchmarks import FGVC_DATASETS, VTAB_TASKS
from snella_app.data.protocol import PROTOCOLS
from snella_lab.comparison.experiment import Experiment

BACKBONE, METHOD, BATCHES = "vit_base_patch16_224", "snella", (4, 16)
_SETTING = {"benchmark": "step_time", "backbone": BACKBONE, "method": METHOD, "dtype": "float32"}
_SETTING |= {"r": 8, "sparsity": 0.7}
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Line:
    """Linear model of the seconds of a pass: `per_weight_s · adapted weights + per_flop_s · FLOP`."""

    per_weight_s: float
    per_flop_s: float

    def seconds(self, passes: float, adapted: int, flop: float) -> float:
        """Return the seconds of `passes` passes with `flop` FLOP in total."""
        return passes * self.per_weight_s * adapted + flop * self.per_flop_s


@dataclass(frozen=True)
class RowSpeed:
    """Linear models fitted to two batch sizes: a constant cost of the merge, and a cost per image."""

    step: Line
    forward: Line
    device: str


def row_speed(rows: list[dict[str, Any]], counted: CountedStep) -> RowSpeed:
    """Fit both models to the backbone's newest rows with at least three rounds; `counted` is its step on one image.

    Raises:
        ValueError: If a batch size has no CPU row, the rows come from two machines, or times grow faster than the batch
            size or not at all.
    """
    matching = [row for row in rows if all(row.get(key) == value for key, value in _SETTING.items())]
    matching = [row for row in matching if row["device"].startswith("cpu") and row["rounds"] >= _MIN_ROUNDS]
    by_batch = {row["batch"]: row for row in matching}
    missing = [str(batch) for batch in BATCHES if batch not in by_batch]
    if missing:
        raise ValueError(
            f"results.jsonl must contain rows of {METHOD} on {BACKBONE} in float32 on a CPU, medians of at least "
            f"{_MIN_ROUNDS} rounds, at batch {' and '.join(map(str, BATCHES))}, got none at {', '.join(missing)}; "
            "run: python benchmarks/step_time.py"
        )
    small, large = (by_batch[batch] for batch in BATCHES)
    if small["device"] != large["device"]:
        raise ValueError(
            f"rows at batch {BATCHES[0]} and {BATCHES[1]} must come from one machine, got {small['device']!r} and "
            f"{large['device']!r}; run: python benchmarks/step_time.py"
        )
    return RowSpeed(
        step=_line(small, large, "step_s", counted.adapted, counted.training_flop),
        forward=_line(small, large, "forward_s", counted.adapted, counted.forward_flop),
        device=small["device"],
    )


def has_gpu_rows(rows: list[dict[str, Any]]) -> bool:
    """Return True if any row was measured on a GPU."""
    return any(not row["device"].startswith("cpu") for row in rows)


def _line(small: dict[str, Any], large: dict[str, Any], name: str, adapted: int, flop: int) -> Line:
    """Fit the linear model to two rows."""
    per_image = (large[name] - small[name]) / (large["batch"] - small["batch"])
    shared = small[name] - small["batch"] * per_image
    if per_image <= 0 or shared < 0:
        raise ValueError(
            f"{name} of rows at batch {small['batch']} and {large['batch']} must grow with the batch size, and not "
            f"faster, got {small[name]} and {large[name]} s; run again: python benchmarks/step_time.py"
        )
    return Line(shared / adapted, per_image / flop)


@dataclass(frozen=True)
class Workload:
    """Number of training batches (`passes`), and of training and evaluation samples over all epochs."""

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

    If `is_checkpointed`, each training step repeats the forward pass, including the merge.
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


_GIB = 2**30
_UNITS = (("s", 1, 100), ("min", 60, 100), ("hours", 3600, 50), ("days", 86400, 700), ("years", 31_557_600, math.inf))
"""Name, seconds and exclusive limit of each unit."""
_WIDTH = 120


def notes_text(speed: RowSpeed, is_gpu_measured: bool) -> str:
    """Describe how costs are estimated."""
    small, large = BATCHES
    per_weight_ns = f"{1e9 * speed.step.per_weight_s:.2g} ns"
    rate = f"{float(f'{1e-9 / speed.step.per_flop_s:.2g}'):,.0f} GFLOP/s"
    gpu = "" if is_gpu_measured else " No GPU measurements are available."
    text = (
        f"The times are estimates for SNELLA-8 in float32 on {device_text(speed.device)}. They use a simpler "
        f"formula than the [cost model](cost-model.md#the-cost-model): seconds = training batches × adapted "
        f"weights × {per_weight_ns} + FLOPs ÷ {rate}, fitted to the measurements of "
        f"`{BACKBONE}` at batch sizes {small} and {large} in `benchmarks/results.jsonl`. FLOPs and memory are computed "
        f"from tensor shapes and exclude data loading and library overhead.{gpu}"
    )
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def device_text(device: str) -> str:
    """Describe a CPU in a row: `cpu, 2 threads, AMD EPYC` is "2 threads of an AMD EPYC CPU"."""
    _, threads, *name = device.split(", ")
    return " ".join([threads, "of an" if name else "of a", *name, "CPU"])


def time_text(total_s: float) -> str:
    """Format a duration with two significant digits in a suitable unit."""
    unit, size, _ = next(row for row in _UNITS if total_s < row[1] * row[2])
    return f"{_two_digits(total_s / size)} {unit}"


def flop_text(counted: CountedStep) -> str:
    """Format the training FLOP of one sample."""
    return f"{_two_digits(counted.training_flop / counted.batch / 1e12)} TFLOP"


def memory_text(counted: CountedStep) -> str:
    """Format the peak memory of a step."""
    return f"{_two_digits(counted.peak_bytes / _GIB)} GiB"


def _two_digits(value: float) -> str:
    """Round to two significant digits, without exponent."""
    return f"{float(f'{value:.2g}'):,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f}"
