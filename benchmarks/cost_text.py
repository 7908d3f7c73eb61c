"""Text of cost estimates: times, FLOP, memory and a note on the method."""

from __future__ import annotations

import textwrap

from counted_step import CountedStep
from row_speed import BACKBONE, BATCHES, RowSpeed

_GIB = 2**30
_UNITS = (("s", 1, 100), ("min", 60, 100), ("hours", 3600, 50), ("days", 86400, 700))
_YEAR_S = 365.25 * 86400
_WIDTH = 120


def notes_text(speed: RowSpeed, is_gpu_measured: bool) -> str:
    """Describe how costs are estimated."""
    small, large = BATCHES
    per_weight_ns = f"{1e9 * speed.step.per_weight_s:.2g} ns"
    rate = f"{float(f'{1e-9 / speed.step.per_flop_s:.2g}'):,.0f} GFLOP/s"
    gpu = "" if is_gpu_measured else " No GPU measurements are available."
    text = (
        f"The times are estimates for SNELLA-8 in float32 on {device_text(speed.device)}. The model is seconds = "
        f"training batches × adapted weights × {per_weight_ns} + FLOPs ÷ {rate}, fitted to the measurements of "
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
    for unit, size, limit in _UNITS:
        if total_s < limit * size:
            return f"{_two_digits(total_s / size)} {unit}"
    return f"{_two_digits(total_s / _YEAR_S)} years"


def flop_text(counted: CountedStep) -> str:
    """Format the training FLOP of one sample."""
    return f"{_two_digits(counted.training_flop / counted.batch / 1e12)} TFLOP"


def memory_text(counted: CountedStep) -> str:
    """Format the peak memory of a step."""
    return f"{_two_digits(counted.peak_bytes / _GIB)} GiB"


def _two_digits(value: float) -> str:
    """Round to two significant digits, without exponent."""
    return f"{float(f'{value:.2g}'):,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f}"
