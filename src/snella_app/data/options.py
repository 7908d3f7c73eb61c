"""Options of `load_data`."""

from dataclasses import dataclass
from typing import Literal

from snella_app.data.images import FULL_WHITE, Reading

TargetKind = Literal["class", "labels", "numbers"]
"""Content of the label column: one class per row, any number of labels, or regression targets."""
Protocol = Literal["standard", "final", "official"]
"""Use of splits for training and epoch selection; see `LoadOptions`."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for reading and splitting data.

    Attributes:
        seed: Seed of splits, subsampling and augmentation.
        test_seed: Separate seed of the test split, to share it across seeds; None uses `seed`.
        val_fraction: Fraction of the validation split.
        test_fraction: Fraction of the test split; 0 for no test split.
        train_size: Number of training images; None uses all.
        val_size: Number of validation images; None uses all.
        test_size: Number of test images; None uses all.
        protocol: `standard` uses a validation split. `final` trains on the validation split as well. `official`
            follows the authors' scripts, which select the epoch on test images. No images are held out; an existing
            validation split is used for training on VTAB and ignored for other data.
        folds: Number of cross-validation folds.
        fold: Held-out fold, counted from 1: the test split, or the validation split if the data has a test split.
            Training and validation images of the data are pooled before splitting.
        divide: If False, use only existing splits.
        columns: Column roles of a table, e.g. `path=file,label=species,group=patient`; other roles are detected by
            column name.
        target: Content of the label column: one class (`class`), any number of labels (`labels`) or numbers
            (`numbers`, with column names as `classes`). `ImageDataset.labels` contains classes, or strata for the other
            two; `ImageDataset.annotations` contains raw values, weights and groups.
        channels: Number of image channels: 3 for RGB, 1 for gray, 4 for RGBA, others for multispectral files; see
            `read_image`.
        white: Value of 16-bit images mapped to white, e.g. 4095 for 12-bit cameras; None means 65535.
        skip_corrupt: Skip unusable images and rows with a note instead of raising an error.
        strict_sizes: Reject benchmark data whose numbers of images or classes differ from the benchmark; if False, add
            a note.

    Raises:
        ValueError: If values are out of range; one message lists all errors.
    """

    seed: int = 0
    test_seed: int | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    protocol: Protocol = "standard"
    folds: int | None = None
    fold: int | None = None
    divide: bool = True
    columns: str | None = None
    target: TargetKind = "class"
    channels: int = 3
    white: int | None = None
    skip_corrupt: bool = False
    strict_sizes: bool = True

    def __post_init__(self) -> None:
        errors = [
            f"{name} must be in [0, 2^32), got {seed}"
            for name, seed in (("seed", self.seed), ("test_seed", self.test_seed))
            if seed is not None and not 0 <= seed < 2**32
        ]
        if not 0 < self.val_fraction < 1:
            errors.append(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        if not 0 <= self.test_fraction < 1:
            errors.append(f"test_fraction must be in [0, 1), got {self.test_fraction}")
        if (held_out := self.val_fraction + self.test_fraction) >= 1:
            errors.append(f"val_fraction + test_fraction must leave images to train on, got {held_out}")
        errors += [
            f"{part}_size must be at least 1, got {size}"
            for part, size in self.sizes.items()
            if size is not None and size < 1
        ]
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def sizes(self) -> dict[str, int | None]:
        """Number of images by split; None for all."""
        return {"train": self.train_size, "val": self.val_size, "test": self.test_size}

    @property
    def reading(self) -> Reading:
        """Decoding options."""
        return Reading(self.channels, self.white or FULL_WHITE)

    def seed_of(self, part: str) -> int:
        """Return the seed of a split."""
        return self.seed if part != "test" or self.test_seed is None else self.test_seed


DEFAULT_OPTIONS = LoadOptions()
