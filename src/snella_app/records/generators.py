"""Records of image generators, language models, and the demonstration (`snella demo`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from snella_app.records.record import FORMAT, OPTIONAL, Float, Record, plain


@dataclass(frozen=True)
class FixedLoss:
    """Loss on fixed noise and timesteps, before and after training."""

    before: Float = math.nan
    after: Float = math.nan


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One step or epoch of a generator's training. Values that were not measured are None."""

    step: int = 0
    epoch: float | None = field(default=None, metadata=OPTIONAL)
    loss: float | None = field(default=None, metadata=OPTIONAL)
    eval_loss: float | None = field(default=None, metadata=OPTIONAL)
    learning_rate: float | None = field(default=None, metadata=OPTIONAL)
    grad_norm: float | None = field(default=None, metadata=OPTIONAL)
    budget: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class GeneratorMetrics(Record):
    """Losses and costs of training an image or text generator: `metrics.json`."""

    file: ClassVar[str] = "metrics.json"

    train_s: Float = math.nan
    trainable_parameters: int
    adapted_weights: int | None = None
    adapter_bytes: int = 0
    peak_rss_mib: Float = math.nan
    peak_gpu_mib: float | None = None
    optimizer: str = ""
    fixed_loss: FixedLoss | None = field(default=None, metadata=OPTIONAL)
    loss_history: list[LossRow] = field(default_factory=list)

    def learning(self) -> dict[str, Any]:
        """Summarize the losses as plain values. Epochs and losses that were not recorded are None.

        Returns:
            `steps`, `epochs`, the `first` and `last` loss, the last loss on `held_out` entries, the loss on fixed noise
            and timesteps before and after training (`fixed_before`, `fixed_after`), and the `optimizer`.
        """
        rows = self.loss_history
        fixed = self.fixed_loss or FixedLoss()
        steps = [row.step for row in rows]
        epochs = [row.epoch for row in rows if row.epoch is not None]
        losses = [row.loss for row in rows if row.loss is not None]
        held_out = [row.eval_loss for row in rows if row.eval_loss is not None]
        return {
            "steps": max(steps, default=0),
            "epochs": max(epochs, default=None),
            "first": losses[0] if losses else None,
            "last": losses[-1] if losses else None,
            "held_out": held_out[-1] if held_out else None,
            "fixed_before": plain(fixed.before),
            "fixed_after": plain(fixed.after),
            "optimizer": self.optimizer,
        }


@dataclass(frozen=True)
class MethodResult:
    """Result of one method in the demonstration. Values that were not measured are NaN or None."""

    method: str
    split: str = "test"
    accuracy: Float = math.nan
    balanced_accuracy: Float = math.nan
    trainable_parameters: int | None = None
    train_s: Float = math.nan
    step_memory: int | None = None
    adapter_bytes: int | None = None
    best_epoch: int | None = None


@dataclass(frozen=True)
class MethodResults(Record):
    """Method comparison of the demonstration: `comparison.json`."""

    file: ClassVar[str] = "comparison.json"

    format: int = FORMAT
    rows: list[MethodResult] = field(kw_only=True)


@dataclass(frozen=True)
class SubjectFidelity(Record):
    """Evaluation of a DreamBooth run: `generation.json`."""

    file: ClassVar[str] = "generation.json"

    concept_alignment: Float
    text_alignment: Float
    text_alignment_without_token: Float
    vendi: Float
    vendi_by_prompt: Float


@dataclass(frozen=True)
class TaskAccuracy:
    """Fraction of a task's questions that were answered correctly."""

    accuracy: Float


@dataclass(frozen=True)
class AnswerScores(Record):
    """Evaluation of a language model: `language.json`."""

    file: ClassVar[str] = "language.json"

    mean: Float
    tasks: dict[str, TaskAccuracy]
