"""Step-time model fitted to results.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from counted_step import CountedStep

BACKBONE, METHOD, BATCHES = "vit_base_patch16_224", "snella", (4, 16)
_SETTING = {"benchmark": "step_time", "backbone": BACKBONE, "method": METHOD, "dtype": "float32", "r": 8}
_SPARSITY = 0.7
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
    """Linear models fitted to two batch sizes: a constant cost of the merge, and a cost per image.

    Args:
        step: Forward pass, backward pass and optimizer.
        forward: Forward pass only.
        device: Device name in the rows.
    """

    step: Line
    forward: Line
    device: str


def row_speed(rows: list[dict[str, Any]], counted: CountedStep) -> RowSpeed:
    """Fit both models to the newest row of each batch size with at least three rounds.

    Args:
        rows: Rows of results.jsonl.
        counted: Step of the rows' backbone on one image.

    Raises:
        ValueError: If a batch size has no CPU row, the rows come from two machines, or times grow faster than the batch
            size or not at all.
    """
    by_batch = {batch: _row(rows, batch) for batch in BATCHES}
    missing = [str(batch) for batch, row in by_batch.items() if row is None]
    if missing:
        raise ValueError(
            f"results.jsonl must contain rows of {METHOD} on {BACKBONE} in float32 on a CPU, medians of at least "
            f"{_MIN_ROUNDS} rounds, at batch {' and '.join(map(str, BATCHES))}, got none at {', '.join(missing)}; "
            "run: python benchmarks/step_time.py"
        )
    small, large = (row for row in by_batch.values() if row is not None)
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


def _row(rows: list[dict[str, Any]], batch: int) -> dict[str, Any] | None:
    """Return the newest row of a batch size, or None."""
    setting = _SETTING | {"batch": batch, "sparsity": _SPARSITY}
    matching = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in setting.items())
        and row["device"].startswith("cpu")
        and row["rounds"] >= _MIN_ROUNDS
    ]
    return matching[-1] if matching else None


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
