"""How costs are written: units that people use, two digits, and what the numbers are."""

from __future__ import annotations

import textwrap

from counted_step import CountedStep
from row_speed import BACKBONE, BATCHES, RowSpeed

_GIB = 2**30
_UNITS = (("s", 1, 100), ("min", 60, 100), ("hours", 3600, 50), ("days", 86400, 700))
_YEAR_S = 365.25 * 86400
_WIDTH = 140


def notes_text(speed: RowSpeed, is_gpu_measured: bool) -> str:
    """What the numbers are, and where they come from."""
    small, large = BATCHES
    per_weight_ns = f"{1e9 * speed.step.per_weight_s:.2g} ns"
    rate = f"{float(f'{1e-9 / speed.step.per_flop_s:.2g}'):,.0f} GFLOP/s"
    gpu = "" if is_gpu_measured else " We have measured nothing on a GPU."
    paragraphs = (
        f"These are estimates, not measurements, for SNELLA-8 in float32 on {speed.device}: seconds = passes × adapted "
        f"weights × {per_weight_ns} + FLOP ÷ {rate}, both constants being those of the line through the rows of "
        f"`snella` at batch {small} and {large} in `benchmarks/results.jsonl` (`{BACKBONE}`, {speed.when}).",
        "The FLOP of forward and backward pass are counted from shapes by torch's flop counter, with three products "
        "for every adapted layer; images that are only measured count by their forward pass. Memory is counted from "
        "shapes too: weights, gradients, AdamW's moments, what is kept for the backward pass, temporary tensors; "
        "libraries and the allocator come on top. Reading and preparing images is not in the times."
        f"{gpu} `snella bench --batch {small},{large} --methods lora,snella` measures a step on your machine; the "
        "times above go with it.",
    )
    return "\n\n".join(
        textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False) for text in paragraphs
    )


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def time_text(total_s: float) -> str:
    """Two digits and a unit that people use."""
    for unit, size, most in _UNITS:
        if total_s < most * size:
            return f"{_two_digits(total_s / size)} {unit}"
    return f"{_two_digits(total_s / _YEAR_S)} years"


def flop_text(counted: CountedStep) -> str:
    """Of one sample, forward and backward."""
    return f"{_two_digits(counted.training_flop / counted.batch / 1e12)} TFLOP"


def memory_text(counted: CountedStep) -> str:
    """Peak of a step."""
    return f"{_two_digits(counted.peak_bytes / _GIB)} GiB"


def _two_digits(value: float) -> str:
    """Rounded to two digits, written out."""
    return f"{float(f'{value:.2g}'):,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f}"
