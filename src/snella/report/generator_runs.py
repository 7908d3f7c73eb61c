"""Readers of runs that train a generator: of images (`generation`) or of text (`language`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snella._text import percent_text, plain_text, seconds_text
from snella.records import AnswerScores, FixedLoss, GeneratorMetrics, LossRow, SubjectFidelity, read, read_if_present

GENERATOR_TASKS = ("generation", "language")
"""Tasks without classes: their runs count steps and have a loss instead of a best epoch and its accuracy."""


@dataclass(frozen=True)
class LearningCurve:
    """The losses of a run; NaN where a value was not measured.

    Attributes:
        history: Each step or epoch that was noted.
        steps: Optimizer steps.
        epochs: Passes over the data; NaN where the run counts steps alone.
        first: Loss of the first entry.
        last: Loss of the last.
        held_out: Last loss of held-out entries.
        fixed_before: Loss on fixed noise and times before training.
        fixed_after: The same after it.
        optimizer: Its name.
    """

    history: list[LossRow]
    steps: int
    epochs: float
    first: float
    last: float
    held_out: float
    fixed_before: float
    fixed_after: float
    optimizer: str


def read_learning_curve(run: str | Path) -> LearningCurve:
    """Read the losses in `metrics.json`; raises as `snella.records.read`."""
    metrics = read(GeneratorMetrics, run)
    rows, fixed = metrics.loss_history, metrics.fixed_loss or FixedLoss()
    losses = [row.loss for row in rows if row.loss is not None]
    held_out = [row.eval_loss for row in rows if row.eval_loss is not None]
    return LearningCurve(
        history=rows,
        steps=max((row.step for row in rows), default=0),
        epochs=max((row.epoch for row in rows if row.epoch is not None), default=math.nan),
        first=losses[0] if losses else math.nan,
        last=losses[-1] if losses else math.nan,
        held_out=held_out[-1] if held_out else math.nan,
        fixed_before=fixed.before,
        fixed_after=fixed.after,
        optimizer=metrics.optimizer,
    )


def read_scores_of_generator(run: str | Path, task: str) -> dict[str, float]:
    """What an evaluation measured, by name; nothing where there was none. Raises as `snella.records.read`.

    Args:
        run: Folder of the run.
        task: One of `GENERATOR_TASKS`.
    """
    if task == "generation":
        fidelity = read_if_present(SubjectFidelity, run)
        return {} if fidelity is None else dataclasses.asdict(fidelity)
    answers = read_if_present(AnswerScores, run)
    if answers is None:
        return {}
    return {"mean": answers.mean} | {name: scores.accuracy for name, scores in answers.tasks.items()}


def generator_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What such a run learned from, for how long and with what result, as lines of `snella inspect`.

    Args:
        summary: From `inspect_summary`, with a task of `GENERATOR_TASKS`.
    """
    backbone, data, curve = summary["backbone"], summary["data"], summary["learning"]
    of_images = summary["task"] == "generation"
    size = f", {backbone['img_size']}×{backbone['img_size']} px" if backbone["img_size"] else ""
    held = data["sizes"].get("val") or 0
    rows = [
        ("pipeline" if of_images else "model", backbone["name"] + size),
        ("data", f"{data['spec']}, {data['description']}" + (f", {held} held out" if held else "")),
    ]
    if curve is not None:
        epochs = "" if curve["epochs"] is None else f" ({plain_text(curve['epochs'])} epochs)"
        duration = f"{curve['steps']:,}{epochs} in {seconds_text(summary['train_s'])}"
        rows.append(("steps", duration + (f", {curve['optimizer']}" if curve["optimizer"] else "")))
        rows.append(("loss", _loss_text(curve)))
    scores = summary["scores"]
    if scores and of_images:
        rows.append(("scores", ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())))
    elif scores:
        each = ", ".join(f"{name} {percent_text(value)}" for name, value in scores.items() if name != "mean")
        rows.append(("accuracy", f"{percent_text(scores['mean'])}, the mean of {each}"))
    return rows


def _loss_text(curve: dict[str, Any]) -> str:
    """How the loss fell: on fixed noise where that was measured, else from the first entry to the last."""
    if curve["fixed_after"] is not None:
        return f"{curve['fixed_after']:.5f} on fixed noise, {plain_text(curve['fixed_before'])} before training"
    if curve["last"] is None:
        return "not noted"
    held_out = "" if curve["held_out"] is None else f"; {curve['held_out']:.4f} on held-out entries"
    return f"{curve['last']:.4f} at the end, {plain_text(curve['first'])} at the beginning{held_out}"


__all__ = [
    "GENERATOR_TASKS",
    "LearningCurve",
    "generator_rows",
    "read_learning_curve",
    "read_scores_of_generator",
]
