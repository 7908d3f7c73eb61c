"""Data section of a configuration, and decoding options. Does not import torch, so that `--help` stays fast."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from snella_app.settings import Config, errors_of

TargetKind = Literal["class", "labels", "numbers", "masks"]
"""Content of the label column: one class per row, any number of labels, or regression targets; `masks` means images
with masks, which have no label column."""
FULL_WHITE = 65535
"""Largest 16-bit value."""
_COLOR_AUGMENTATIONS = ("imagenet", "randaugment", "trivialaugment", "3augment")
"""Augmentations with color operations, which require gray or RGB images."""


@dataclass(frozen=True)
class Reading:
    """Decoding options for images.

    Attributes:
        channels: 3 for RGB, 1 for gray, 4 for RGBA; any other number for a TIFF (by tifffile) or `.npy` array of
            `[height, width, channels]`, `[channels, height, width]` or one page per channel.
        white: Value of 16-bit gray images and arrays that maps to white; larger values are clipped.
        side: Minimum shorter side; larger 8-bit images without palette or transparency are downscaled by an integer
            factor. JPEGs first use the decoder's scaling, which is faster; the rest is averaged. None uses the full
            resolution.
    """

    channels: int = 3
    white: int = FULL_WHITE
    side: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Images, labels, splits and augmentation. The flat name of `spec` is `data`.

    Args:
        spec: Training data: a folder (class/image, or train|val|test/class/image), also written folder:PATH; a table of
            paths and labels (.csv, .parquet, also written csv:FILE, parquet:FILE); a Hugging Face dataset
            (hf:FOLDER, hf:OWNER/NAME); WebDataset shards (wds:FOLDER); a benchmark task (vtab:PATH/dtd,
            fgvc:PATH/cub); or digits, mnist5k, fashion-mnist, elpv, stamps or mri-regions. With masks: masks:PATH
            (images/ and masks/), kvasir:PATH, mri or mri-lobes.
        task: classification (one class per image), multilabel (any number of labels), ordinal (ordered classes),
            regression (numbers) or segmentation (one class per pixel; needs data with masks).
        columns: Columns of a table, e.g. path=file,label=species,split=part,weight=w,group=patient; roles left
            out are detected by name. New splits keep groups together.
        class_order: Class names from lowest to highest, e.g. small,medium,large (ordinal); not needed if the names
            begin with numbers.
        train_size: Number of training images, stratified by class; all by default.
        val_size: Number of validation images; all by default.
        test_size: Number of test images; all by default.
        val_fraction: Fraction of the images to hold out for validation if the data has no validation split.
        test_fraction: Fraction of the images to hold out for testing if the data has no splits; 0 for none.
        test_seed: Seed for the test split, so that runs with different seeds can share it; defaults to seed.
        folds: Number of cross-validation folds. Trains one run per fold in OUT/fold-1 and so on, and summarizes them in
            a table. Folds are stratified by class and keep groups together.
        fold: Train only this fold (from 1) as a single run.
        protocol: Selection of the best epoch: standard (on validation), final (none; also trains on the validation
            images and saves the last epoch) or official (on the test images, as in the authors' scripts; results are
            optimistic and flagged).
        channels: Image channels: 1 for grayscale, 3 for RGB, 4 for RGBA, or the number of channels of TIFF or .npy
            files. The backbone's first convolution is adapted.
        white: Value of 16-bit images that maps to white, e.g. 4095 for 12-bit cameras; defaults to 65535.
        skip_corrupt: Skip unreadable images and report their number.
        strict_sizes: Reject benchmark data (vtab, fgvc) with a different number of images or missing classes; false
            only prints a note.
        sampler: Order of the training images: shuffle, or weighted, which draws with replacement so that all classes
            are equally frequent.
        augment: Data augmentation: none, flip, crop (random resized crop and flip), crop-no-flip, or imagenet (smaller
            crops, flip and color jitter). randaugment and trivialaugment add random color and geometric changes to
            crop; 3augment adds color jitter and one of grayscale, solarization and blur. auto selects flip for
            regression, segmentation and protocol official; otherwise, crop, or crop-no-flip if flips change classes.
        tta: Test-time augmentation: 2 averages the predictions for an image and its flip; 1 uses only the image. auto
            selects 2 for classification if training flips images and the protocol is not official. Epochs are validated
            with one view.
        random_erasing: Probability of erasing a random rectangle of an image.
        mixup: Mixup: mixes pairs of images and labels with weights from Beta(mixup, mixup), e.g. 0.8; 0 disables it.
        cutmix: CutMix: pastes a rectangle of one image into another, with areas from Beta(cutmix, cutmix), e.g. 1; 0
            disables it. With mixup, each batch uses one of the two.
        workers: Number of data-loading processes; 0 loads images in the training process.
    """

    flat_names: ClassVar = {"spec": "data"}
    minimums: ClassVar = {
        **dict.fromkeys(("train_size", "val_size", "test_size", "channels", "white", "fold"), 1),
        **{"folds": 2, "workers": 0, "test_seed": 0},
    }
    nonnegative: ClassVar = ("mixup", "cutmix")
    fractions: ClassVar = ("test_fraction",)

    spec: str | None = None
    task: Literal["classification", "multilabel", "ordinal", "regression", "segmentation"] = "classification"
    columns: str | None = None
    class_order: str | None = None
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    test_seed: int | None = None
    folds: int | None = None
    fold: int | None = None
    protocol: Literal["standard", "final", "official"] = "standard"
    channels: int = 3
    white: int | None = None
    skip_corrupt: bool = False
    strict_sizes: bool = True
    sampler: Literal["shuffle", "weighted"] = "shuffle"
    augment: Literal[
        "auto", "none", "flip", "crop", "crop-no-flip", "imagenet", "randaugment", "trivialaugment", "3augment"
    ] = "auto"
    tta: int | Literal["auto"] = "auto"
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    workers: int = 0

    @property
    def sizes(self) -> dict[str, int | None]:
        """Configured number of images by split; None for all."""
        return {"train": self.train_size, "val": self.val_size, "test": self.test_size}

    @property
    def reading(self) -> Reading:
        """Decoding options for the images."""
        return Reading(self.channels, self.white or FULL_WHITE)

    @property
    def views(self) -> int:
        """Number of views averaged per prediction: `tta`, or 1 if it is auto."""
        return self.tta if isinstance(self.tta, int) else 1

    def coerce_fields(self) -> list[str]:
        """Convert the fields, complete the paths in `spec` and `columns`, and return the errors."""
        errors = super().coerce_fields()
        if self.spec:
            from snella_app.data.load import full_spec

            object.__setattr__(self, "spec", full_spec(self.spec))
        if isinstance(self.columns, str):
            from snella_app.data.columns import with_absolute_root

            object.__setattr__(self, "columns", with_absolute_root(self.columns))
        return errors

    def errors(self) -> list[str]:
        """Check the fields and their combinations, and return the errors."""
        errors = super().errors()
        if self.tta not in ("auto", 1, 2):
            errors.append(f"tta must be 1, 2 or auto, got {self.tta}; snella predict --tta supports more views")
        if not 0.0 <= self.random_erasing <= 1.0:
            errors.append(f"random_erasing must be in [0, 1], got {self.random_erasing}")
        if not 0.0 < self.val_fraction < 1.0:
            errors.append(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        elif self.test_fraction < 1.0 <= (held_out := self.val_fraction + self.test_fraction):
            errors.append(f"val_fraction + test_fraction must leave images to train on, got {held_out}")
        if self.task == "segmentation":
            errors += self._mask_errors()
        if self.augment in _COLOR_AUGMENTATIONS and self.channels not in (1, 3):
            allowed = "none, flip, crop or crop-no-flip"
            errors.append(f"augment must be {allowed} for {self.channels} channels, got {self.augment!r}")
        if self.test_seed is not None and self.test_seed >= 2**32:  # the limit of NumPy's seeds
            errors.append(f"test_seed must be less than {2**32}, got {self.test_seed}")
        if self.fold is not None and (self.folds is None or self.fold > self.folds):
            errors.append(f"fold must be at most folds, got {self.fold} with folds {self.folds or 'unset'}")
        if self.folds is not None and self.protocol != "standard":
            errors.append(f"protocol must be standard with folds, got {self.protocol!r}")
        if self.columns is not None:
            from snella_app.data.columns import Columns

            errors += errors_of(Columns.parse, self.columns)
        return errors

    def _mask_errors(self) -> list[str]:
        """Return errors about settings that do not support masks."""
        errors = [] if self.channels == 3 else [f"channels must be 3 with task 'segmentation', got {self.channels}"]
        given = {name: getattr(self, name) for name in ("mixup", "cutmix", "random_erasing")}
        errors += [f"{name} does not support masks, got {value}" for name, value in given.items() if value]
        if self.augment in ("randaugment", "trivialaugment"):
            errors.append(
                "augment must be one of none, flip, crop, crop-no-flip, imagenet, 3augment for images with masks, "
                f"got {self.augment!r}"
            )
        return errors
