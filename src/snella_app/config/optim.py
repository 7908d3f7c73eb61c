"""`OptimConfig`: optimization of a run."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from snella_app.config.base import Config, errors_of
from snella_app.text import first_line

DEFAULT_BATCH_SIZE = 32
SCHEDULE_END = 0.7
"""Fraction of the epochs after which the budget reaches its target, with early stopping."""
_CLASS_WEIGHTS = ("balanced", "none")
_TIME = r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"


@dataclass(frozen=True, kw_only=True)
class BaseOptimConfig(Config):
    """Learning rates and regularization; also the base class of the recipes' `optim` sections.

    Args:
        lr: Learning rate of the factors (full, bias: of all trained weights). Lower it if the loss diverges or is NaN,
            raise it if the loss decreases slowly.
        scalar_lr: Learning rate of the scalar kernel parameters (snella, snell); rarely needs tuning.
        weight_decay: Decoupled weight decay; not applied to the scalar kernel parameters.
        max_grad_norm: Maximum norm for gradient clipping; 0 disables it.
    """

    nonnegative: ClassVar[tuple[str, ...]] = ("lr", "scalar_lr", "weight_decay", "max_grad_norm")

    lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimConfig(BaseOptimConfig):
    """Epochs, batches, loss, learning rates, heads and weight averages. None selects the default of the method.

    Args:
        epochs: Number of epochs; 0 trains only a linear probe.
        time_budget: Approximate training time, e.g. 30m or 1h30m. Measures a training step and sets the number of
            epochs and, unless given, img_size: the largest at which `epochs` epochs fit, but at least half the largest
            size at which the final head alone fits.
        early_stopping: Stop after N epochs without improvement. With budgets (snella, snell), training continues at
            least until the target sparsity is reached, by default after 70% of the epochs.
        batch_size: Batch size; defaults to 32, or to all training images if there are fewer. auto selects the largest
            power of two up to 256 that fits into memory and leaves at least 10 steps per epoch.
        accumulate: Gradient accumulation: number of batches per optimizer step.
        head_lr: Learning rate of the classifier head.
        head_init: Initialization of the classifier head: random, or probe, a linear probe on the model's features
            (LP-FT; takes seconds). auto selects probe for a linear head, unless the protocol is official.
        head_norm: Normalization of the head's inputs during training: running (running mean and variance) or none. The
            saved head is a plain linear layer. auto selects running if the head starts from a probe.
        final_head: Head used for predictions: trained, or layers, a linear head on features of several layers, fitted
            to the training and validation images after training (Head2Toe). auto selects layers for timm models, unless
            it is clearly worse on validation or the protocol is official.
        layer_decay: Layer-wise learning rate decay, e.g. 0.75: learning rate of a block relative to the next block.
        warmup_ratio: Fraction of the steps for linear learning rate warm-up, followed by cosine decay.
        min_lr: Final value of `lr` after cosine decay; the other learning rates decay by the same factor.
        loss: Loss function. Classification: cross-entropy, focal (down-weights easy images) or logit-adjusted (for
            imbalanced classes). Multilabel: cross-entropy or focal. Regression: mse, l1 or huber. Defaults to the
            first.
        class_weights: Class weights in the loss: balanced (by inverse class frequency), none, or a YAML or JSON file
            with a weight for each class name. A configuration file may also contain the mapping itself.
        label_smoothing: Label smoothing: fraction of the target spread over all classes.
        mask_loss: Overlap loss added to the cross entropy: dice, iou or none (segmentation; defaults to dice).
        monitor: Validation metric that selects the best epoch. Classification: accuracy, balanced_accuracy, macro_f1 or
            loss. Ordinal: mae, kappa or any metric of classification. Multilabel: map, macro_f1, micro_f1,
            subset_accuracy or loss. Regression: loss, mae, rmse or r2. Segmentation: dice, iou and others. Defaults to
            the first.
        ema: Decay of the exponential moving average of the trained weights, e.g. 0.9998. The average is evaluated and
            saved. Off by default.
        swa: Stochastic weight averaging: average the weights of the last N epochs. The average is saved unless the best
            epoch is better on validation. Off by default.
        soup: Greedy soup over the last N epochs: start from the best epoch, and add each epoch to the average that does
            not lower the validation score. Off by default.
        precision: Precision of the training steps and of the features to which heads are fitted: fp32, or autocast with
            bf16 or (GPU only) fp16. auto selects bf16 on GPUs and CPUs with bfloat16 instructions, otherwise fp32.
            Evaluation and prediction use fp32, except for evaluation during fp16 training.
    """

    minimums: ClassVar = {"epochs": 0, "swa": 2, "soup": 2, "early_stopping": 1, "batch_size": 1, "accumulate": 1}
    nonnegative: ClassVar = (*BaseOptimConfig.nonnegative, "head_lr", "min_lr")
    fractions: ClassVar = ("warmup_ratio", "label_smoothing")

    epochs: int = 10
    time_budget: str | None = None
    early_stopping: int | None = None
    batch_size: int | Literal["auto"] | None = None
    accumulate: int = 1
    head_lr: float | None = None
    head_init: Literal["auto", "random", "probe"] = "auto"
    head_norm: Literal["auto", "none", "running"] = "auto"
    final_head: Literal["auto", "trained", "layers"] = "auto"
    layer_decay: float | None = None
    warmup_ratio: float = 0.1
    min_lr: float = 0.0
    loss: Literal["cross-entropy", "focal", "logit-adjusted", "mse", "l1", "huber"] | None = None
    class_weights: dict[str, float] | str | None = None
    label_smoothing: float = 0.0
    mask_loss: Literal["dice", "iou", "none"] | None = None
    monitor: str | None = None
    ema: float | None = None
    swa: int | None = None
    soup: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @property
    def effective_batch_size(self) -> int:
        """`batch_size`, or the default if it is not an integer."""
        return self.batch_size if isinstance(self.batch_size, int) else DEFAULT_BATCH_SIZE

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of optimizer steps per epoch."""
        return -(-images // (self.effective_batch_size * self.accumulate))

    def with_batch_size_for(self, images: int) -> Self:
        """Return a copy with `batch_size` set for this number of training images."""
        is_set = isinstance(self.batch_size, int)
        return self if is_set else dataclasses.replace(self, batch_size=min(DEFAULT_BATCH_SIZE, images))

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of `snella_app.training.optimizer.build_optimizer`."""
        return {
            "lr": self.lr or 0.0,
            "head_lr": self.head_lr,
            "weight_decay": self.weight_decay or 0.0,
            "scalar_lr": self.scalar_lr,
            "layer_decay": self.layer_decay,
        }

    def task_options(self) -> dict[str, Any]:
        """Settings of `snella_app.tasks.create_task`: loss and monitored metric."""
        names = ("loss", "class_weights", "label_smoothing", "mask_loss", "monitor")
        return {name: getattr(self, name) for name in names}

    def read_class_weights(self) -> dict[str, float] | str | None:
        """Return `class_weights`, read from its file if it names one.

        Raises:
            ValueError: If the file does not contain weights by class name.
        """
        if not isinstance(self.class_weights, str) or self.class_weights in _CLASS_WEIGHTS:
            return self.class_weights
        error = (
            f"class_weights must be {' or '.join(_CLASS_WEIGHTS)}, or a YAML or JSON file such as "
            f"{{cat: 1, dog: 2.5}}, got {self.class_weights!r}"
        )
        file = Path(self.class_weights)
        if not file.is_file():
            raise ValueError(f"{error}, which does not exist")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as cause:
            raise ValueError(f"{error}: {first_line(cause)}") from cause
        if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
            raise ValueError(f"{error}, which has other content")
        return {str(name): float(value) for name, value in values.items()}

    def errors(self) -> list[str]:
        """Check the fields and their combinations."""
        errors = super().errors()
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            errors.append(f"ema must be in (0, 1), got {self.ema}; leave it out to disable it")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            errors.append(f"layer_decay must be in (0, 1], got {self.layer_decay}; leave it out to disable it")
        if self.lr is not None and self.min_lr > self.lr:
            errors.append(f"min_lr must be at most lr, {self.lr}, got {self.min_lr}")
        errors += errors_of(self.read_class_weights)
        if self.time_budget is not None:
            errors += errors_of(budget_seconds, self.time_budget)
        averages = {name: value for name in ("ema", "swa", "soup") if (value := getattr(self, name)) is not None}
        if len(averages) > 1:
            values = " and ".join(f"{name} {value:g}" for name, value in averages.items())
            errors.append(f"ema, swa and soup are mutually exclusive, got {values}; leave one out")
        return errors


def budget_seconds(text: str) -> float:
    """Parse a duration such as `30m`, `1h30m` or `90s` into seconds.

    Raises:
        ValueError: If `text` is not a duration.
    """
    match = re.fullmatch(_TIME, text.strip())
    seconds = sum(float(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if seconds <= 0:
        raise ValueError(f"time_budget must be a duration such as 30m, 1h30m or 90s, got {text!r}")
    return seconds
