"""How long a step takes on the machine that the rows of results.jsonl were measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from counted_step import CountedStep

BACKBONE, CONTENDER, BATCHES = "vit_base_patch16_224", "snella", (4, 16)
_SETTING = {"benchmark": "step_time", "backbone": BACKBONE, "contender": CONTENDER, "dtype": "float32", "r": 8}
_SPARSITY = 0.7
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Line:
    """Seconds of one pass: `per_weight_s · adapted weights + per_flop_s · FLOP`."""

    per_weight_s: float
    per_flop_s: float

    def seconds(self, passes: float, adapted: int, flop: float) -> float:
        """Of `passes` passes that compute `flop` together."""
        return passes * self.per_weight_s * adapted + flop * self.per_flop_s


@dataclass(frozen=True)
class RowSpeed:
    """Two lines through the rows of both batch sizes: what a batch shares is merging, the rest grows with its images.

    Args:
        step: Forward pass, backward pass and optimizer.
        forward: The forward pass alone.
        device: The machine, as its rows call it.
        when: Commits and dates of the rows.
    """

    step: Line
    forward: Line
    device: str
    when: str


def row_speed(rows: list[dict[str, Any]], counted: CountedStep) -> RowSpeed:
    """Fit both lines.

    The newest row of each batch size counts, of those that are medians of three rounds or more.

    Args:
        rows: Of results.jsonl.
        counted: One image of the rows' backbone.

    Raises:
        ValueError: A batch size has no such row on a CPU, they are of two machines, or times do not grow with the
            batch, or faster than it.
    """
    found = {batch: _row(rows, batch) for batch in BATCHES}
    missing = [str(batch) for batch, row in found.items() if row is None]
    if missing:
        raise ValueError(
            f"results.jsonl must hold rows of {CONTENDER} on {BACKBONE} in float32 on a CPU, medians of at least "
            f"{_LEAST_ROUNDS} rounds, at batch {' and '.join(map(str, BATCHES))}, got none at {', '.join(missing)}; "
            "run: python benchmarks/step_time.py"
        )
    small, large = (row for row in found.values() if row is not None)
    if small["device"] != large["device"]:
        raise ValueError(
            f"rows at batch {BATCHES[0]} and {BATCHES[1]} must be of one machine, got {small['device']!r} and "
            f"{large['device']!r}; run: python benchmarks/step_time.py"
        )
    whens = dict.fromkeys(
        f"commit {row['commit']}{' with changes' if row['dirty'] else ''}, {row['date'][:10]}" for row in (small, large)
    )
    return RowSpeed(
        step=_line(small, large, "step_s", counted.adapted, counted.training_flop),
        forward=_line(small, large, "forward_s", counted.adapted, counted.forward_flop),
        device=small["device"],
        when=" and ".join(whens),
    )


def has_gpu_rows(rows: list[dict[str, Any]]) -> bool:
    """Whether anything was measured on a GPU."""
    return any(not row["device"].startswith("cpu") for row in rows)


def _row(rows: list[dict[str, Any]], batch: int) -> dict[str, Any] | None:
    """The row of a batch size."""
    wanted = _SETTING | {"batch": batch, "sparsity": _SPARSITY}
    own = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in wanted.items())
        and row["device"].startswith("cpu")
        and row["rounds"] >= _LEAST_ROUNDS
    ]
    return own[-1] if own else None


def _line(small: dict[str, Any], large: dict[str, Any], name: str, adapted: int, flop: int) -> Line:
    """The line through two rows."""
    per_image = (large[name] - small[name]) / (large["batch"] - small["batch"])
    shared = small[name] - small["batch"] * per_image
    if per_image <= 0 or shared < 0:
        raise ValueError(
            f"{name} of rows at batch {small['batch']} and {large['batch']} must grow with the batch, and not faster "
            f"than it, got {small[name]} and {large[name]} s; measure them again: python benchmarks/step_time.py"
        )
    return Line(shared / adapted, per_image / flop)
