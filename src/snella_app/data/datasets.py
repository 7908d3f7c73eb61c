"""Torch datasets of labeled images, whose augmentation is seeded by (seed, epoch, index)."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

from snella_app.data.images import ImageMetadata, first_channels, to_rgb
from snella_app.data.sources import CachedImages, FileImages, ImageSource, JoinedSource, at_side, locate

Target = str | float | tuple[str, ...] | tuple[float, ...]
"""Label-column value of an image: class name, number, label names, or several numbers."""


@dataclass(frozen=True)
class Annotations:
    """Raw label values, sample weights and groups, with one entry per image. Absent columns are None.

    Attributes:
        targets: Values of the label column: class name (`str`), number, label names (tuple of `str`), or numbers of
            several columns (tuple of `float`), depending on the `target` of `load_data`.
        weights: Nonnegative sample weights in the loss.
        groups: Group of each image, e.g. a patient, site or video.
    """

    targets: list[Target] | None = None
    weights: list[float] | None = None
    groups: list[str] | None = None

    def subset(self, positions: Sequence[int]) -> "Annotations":
        """Return the annotations at these positions."""
        selected: dict[str, Any] = {}
        for name, column in self.plain().items():
            selected[name] = [column[position] for position in positions]
        return Annotations(**selected)

    def joined(self, other: "Annotations") -> "Annotations":
        """Concatenate the annotations of two datasets, without columns that either of them lacks."""
        own_columns = self.plain()
        other_columns = other.plain()
        shared = [name for name in own_columns if name in other_columns]
        return Annotations(**{name: [*own_columns[name], *other_columns[name]] for name in shared})

    def plain(self) -> dict[str, Any]:
        """Return the present columns by name."""
        return {name: column for name, column in vars(self).items() if column is not None}


class ImageDataset(Dataset[tuple[Any, ...]]):
    """Dataset of selected images with labels, names and a transform.

    The transform of item `i` runs with torch's generator seeded by (seed, epoch, i), so augmentation is independent of
    workers and order. The generator is restored afterwards.

    Args:
        source: Source of the images.
        rows: Selected rows of the source, in order.
        labels: Class index of each selected image, or stratum index (see `build_collection`).
        names: Name of each selected image.
        annotations: Raw targets, sample weights and groups of the selected images.

    Attributes:
        transform: Maps a decoded image to a tensor, or None to return images. Set by `with_transform`.
        seed: Seed of the augmentation.

    Raises:
        ValueError: If `rows`, `labels` and `names` differ in length.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: Sequence[int],
        labels: Sequence[int],
        names: Sequence[str],
        annotations: Annotations | None = None,
    ) -> None:
        if not len(rows) == len(labels) == len(names):
            raise ValueError(
                f"rows, labels and names must have equal lengths, got {len(rows)}, {len(labels)} and {len(names)}"
            )
        self.source = source
        self.rows = list(rows)
        self.labels = list(labels)
        self.names = list(names)
        self.annotations = annotations or Annotations()
        self.transform: Callable[..., Any] | None = None
        self.seed = 0
        self._encode: Callable[[Target], Any] | None = None
        self._is_weighted = False
        # in shared memory, where persistent workers read each new epoch
        self._epoch = _shared_scalar(0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return the image, transformed if there is a transform, and its target and weight as set by `with_targets`."""
        index = range(len(self))[index]  # nonnegative
        if self.transform is None:
            return self._item(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_item_seed(self.seed, self.epoch, index))
            return self._item(index)

    @property
    def epoch(self) -> int:
        """Epoch that seeds the augmentation."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the augmentation; Accelerate's data loaders call this at the start of each epoch."""
        self._epoch.fill_(epoch)

    def image(self, index: int) -> Image.Image:
        """Return a copy of the untransformed image as RGB. Multispectral images are reduced to three channels."""
        image = self.source.load(self.rows[index])
        if isinstance(image, Tensor):
            return to_pil_image(first_channels(image))
        return image.copy() if image.mode == "RGB" else to_rgb(image)

    def content_digest(self) -> str:
        """Return the SHA-256 of the raw content (file bytes or pixels) of all images and any masks, in order."""
        total = hashlib.sha256()
        for row in self.rows:
            for source in self._sources():
                total.update(hashlib.sha256(source.content(row)).digest())
        return total.hexdigest()

    def _sources(self) -> list[ImageSource]:
        """Return the sources of an item's content."""
        return [self.source]

    def with_transform(self, transform: Callable[..., Any] | None) -> Self:
        """Return a copy with a different transform. The copy shares the cached images."""
        dataset = self._copy()
        dataset.transform = transform
        return dataset

    def with_targets(self, encode: Callable[[Target], Any] | None = None, *, is_weighted: bool = False) -> Self:
        """Return a copy with different targets.

        Args:
            encode: Maps the label-column value to the target; None uses the class index. Must be picklable.
            is_weighted: Append the sample weight to each item, if the data has weights.
        """
        dataset = self._copy()
        dataset._encode = encode
        dataset._is_weighted = is_weighted and self.annotations.weights is not None
        return dataset

    def target_and_weight(self, index: int) -> tuple[Any, ...]:
        """Return the target of an item, followed by the sample weight if items are weighted."""
        target: Any = self.labels[index]
        if self._encode is not None:
            if self.annotations.targets is None:
                raise RuntimeError(
                    "encoding targets requires raw labels, got images with classes only; pass target='labels' or "
                    "'numbers' to load_data"
                )
            target = self._encode(self.annotations.targets[index])
        if not self._is_weighted or self.annotations.weights is None:
            return (target,)
        return target, self.annotations.weights[index]

    def subset(self, positions: Sequence[int]) -> Self:
        """Return the images at these positions, in this order."""
        dataset = self._copy()
        dataset.rows = [self.rows[position] for position in positions]
        dataset.labels = [self.labels[position] for position in positions]
        dataset.names = [self.names[position] for position in positions]
        dataset.annotations = self.annotations.subset(positions)
        return dataset

    def _copy(self) -> Self:
        """Return a copy with an independent epoch."""
        dataset = copy(self)
        dataset._epoch = _shared_scalar(self.epoch)
        return dataset

    def _item(self, index: int) -> tuple[Any, ...]:
        """Return the image, transformed if there is a transform, and `target_and_weight`; the caller sets the seed."""
        image = self.source.load(self.rows[index])
        if self.transform is not None:
            image = self.transform(image)
        else:
            image = image.clone() if isinstance(image, Tensor) else image.copy()
        return image, *self.target_and_weight(index)


def _shared_scalar(value: int) -> Tensor:
    """Return an int64 scalar in shared memory.

    Raises OSError if the memory is full or a file size limit is reached.
    """
    try:
        return torch.tensor(value).share_memory_()
    except RuntimeError as error:
        raise OSError(f"cannot allocate eight bytes in shared memory: {error}; free space in /dev/shm") from None


def _item_seed(seed: int, epoch: int, index: int) -> int:
    """Return a 63-bit seed derived from (seed, epoch, index)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def known_metadata(images: ImageDataset) -> dict[int, ImageMetadata]:
    """Return the metadata of a dataset's inspected images by position."""
    locations = [locate(images.source, row) for row in images.rows]
    return {
        position: source.metadata[row]
        for position, (source, row) in enumerate(locations)
        if isinstance(source, CachedImages) and row in source.metadata
    }


def file_paths(images: ImageDataset) -> dict[int, Path]:
    """Return the file of each image by position, leaving out images that are not files."""
    locations = [locate(images.source, row) for row in images.rows]
    return {
        position: source.paths[row]
        for position, (source, row) in enumerate(locations)
        if isinstance(source, FileImages)
    }


class MaskDataset(ImageDataset):
    """Dataset of selected images with masks; see `ImageDataset` for seeding.

    `transform` maps (RGB image, mask) to two tensors; None returns an image and a label array.

    Args:
        source: Source of the images.
        masks: Source of the masks, with the same rows.
        rows: Selected rows of both sources, in order.
        names: Name of each selected image.
        labels: Stratum index of each selected image; 0 by default.
        annotations: Annotations; each target is a tuple of the names of the classes in the mask.
    """

    def __init__(
        self,
        source: ImageSource,
        masks: ImageSource,
        rows: Sequence[int],
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        annotations: Annotations | None = None,
    ) -> None:
        super().__init__(source, rows, [0] * len(rows) if labels is None else labels, names, annotations)
        self.masks = masks

    def mask(self, index: int) -> np.ndarray:
        """Return the untransformed labels of an image, `[height, width]`, uint8."""
        return np.array(self.masks.load(self.rows[index]))

    def _sources(self) -> list[ImageSource]:
        """Return the sources of an item's content."""
        return [self.source, self.masks]

    def _item(self, index: int) -> tuple[Any, Any]:
        """Return image and labels, which a transform maps to `[3, height, width]` and int64 `[height, width]`."""
        image = self.source.load(self.rows[index])
        labels = torch.from_numpy(self.mask(index))
        if self.transform is None:
            return image.copy(), labels.numpy()
        transformed, mask = self.transform(image, tv_tensors.Mask(labels))
        return transformed, mask.as_subclass(Tensor).long()


def read_at_side(parts: Sequence[ImageDataset], side: int | None) -> list[ImageDataset]:
    """Return copies of splits with a different `Reading.side`. Splits that share a source still share one.

    Splits with masks are returned unchanged.
    """
    sources: dict[int, ImageSource] = {}
    changed = []
    for part in parts:
        if not isinstance(part, MaskDataset):
            if id(part.source) not in sources:
                sources[id(part.source)] = at_side(part.source, side)
            part = part.with_transform(part.transform)
            part.source = sources[id(part.source)]
        changed.append(part)
    return changed


def joined(first: ImageDataset, second: ImageDataset) -> ImageDataset:
    """Concatenate two datasets, of which both or neither have masks. The result has no transform."""
    boundary = 1 + max(first.rows, default=-1)
    rows = [*first.rows, *(boundary + row for row in second.rows)]
    names = [*first.names, *second.names]
    source = JoinedSource(first.source, second.source, boundary)
    labels = [*first.labels, *second.labels]
    annotations = first.annotations.joined(second.annotations)
    if isinstance(first, MaskDataset) and isinstance(second, MaskDataset):
        masks = JoinedSource(first.masks, second.masks, boundary)
        return MaskDataset(source, masks, rows, names, labels, annotations)
    return ImageDataset(source, rows, labels, names, annotations)


@dataclass
class Collection:
    """Labeled images in the splits defined by the data.

    Attributes:
        name: Short name of the data.
        classes: Class names by index.
        train: Training split, or all images if there are no splits.
        val: Validation split, if the data has one.
        test: Test split, if the data has one.
        has_parts: True if the data defines splits, so that no test split is created.
        notes: Notes for the user: skipped files, choices, licenses.
        strata: Names of image labels if they differ from the classes, e.g. for images with masks.
        is_resized_whole: If True, images are resized without a center crop.
        official_joins_val: True if the scripts of SNELLA's authors also train on the validation split.
        broken: Reason why each skipped image is unusable, by name.
        problems: Reasons why the data can be used only for evaluation, not for training.
    """

    name: str
    classes: list[str]
    train: ImageDataset
    val: ImageDataset | None = None
    test: ImageDataset | None = None
    has_parts: bool = False
    notes: list[str] = field(default_factory=list)
    strata: list[str] | None = None
    is_resized_whole: bool = False
    official_joins_val: bool = False
    broken: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def label_names(self) -> list[str]:
        """Names of image labels, used to stratify splits."""
        return self.classes if self.strata is None else self.strata

    @property
    def parts(self) -> dict[str, ImageDataset]:
        """Existing splits by name."""
        splits = (("train", self.train), ("val", self.val), ("test", self.test))
        return {name: part for name, part in splits if part is not None}
