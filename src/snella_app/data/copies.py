"""Copies of images within a dataset and across splits: equal files, equal pixels and near-duplicates.

The metadata of an inspected image includes its size and a 16×16 gray thumbnail.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from snella_app.data.collection import unordered
from snella_app.data.datasets import ImageDataset, MaskDataset, file_paths, known_metadata
from snella_app.files import sha256_of
from snella_app.text import listed, split_text

_MIN_CORRELATION = 0.995
"""Minimum correlation of the thumbnails of near-duplicates."""
_MAX_DISTANCE = 3.0
"""Maximum root mean square difference of the thumbnails of near-duplicates, on a scale from 0 to 255."""
_FLAT = 2.0
"""Standard deviation up to which a thumbnail counts as flat. Different images can have equal flat thumbnails."""
_CHUNK = 1024
"""Number of images that are compared with all training images at once."""
_MAX_PAIRS = 2_000_000_000
"""Maximum number of pairs of images whose thumbnails are compared."""


def copy_warnings(parts: Mapping[str, ImageDataset], names: Sequence[str]) -> list[str]:
    """Return warnings about images in the named splits that copy training images, even if re-encoded or resized.

    Test images are also compared with validation images, on which epochs are selected and final heads are fitted. If
    the copies are image files, the warnings distinguish copies with equal bytes from images that match by their
    thumbnails, such as re-encoded or resized copies.
    """
    digest_of = cache(sha256_of)
    pairs = [("train", name) for name in names] + ([("val", "test")] if "test" in names else [])
    messages = []
    for seen, name in pairs:
        if seen not in parts or name not in parts:
            continue
        originals, part = parts[seen], parts[name]
        if _exceeds_pairs(originals, part):
            messages.append(
                f"{len(part):,} {name} images were compared with {len(originals):,} {split_text(seen)} images by file "
                f"content only, because there are more than {_MAX_PAIRS:,} pairs; resized or re-encoded copies are not "
                "reported"
            )
        equal = equal_files(originals, part, digest_of)
        files = file_paths(part)
        copies = {**find_near_copies(originals, part), **equal}
        if copies:
            examples: list[str] = []
            for position, original in sorted(copies.items()):
                examples.append(f"{originals.names[original]!r} is {part.names[position]!r}")
            alike = sum(position in files for position in copies) - len(equal)
            kind = similar_text(alike)
            noun = f"{split_text(seen)} image"
            duplicate = f"is also a {noun}" if len(copies) == 1 else f"are also {noun}s"
            messages.append(
                f"{len(copies)} of {len(part)} {name} images {duplicate}{kind}, e.g. {listed(examples)}; "
                f"{name} results are optimistic; remove the copies from one split"
            )
    return messages


def similar_text(count: int) -> str:
    """Return a remark that `count` of the copies were found by their thumbnails, or an empty string for 0."""
    return f" ({count} of them matched by 16×16 thumbnails)" if count else ""


def contradiction_warnings(parts: Mapping[str, ImageDataset]) -> list[str]:
    """Return warnings about duplicate images within a split that have different labels."""
    messages: list[str] = []
    for part, images in parts.items():
        if isinstance(images, MaskDataset):
            continue
        values = images.annotations.targets or images.labels
        groups = [
            group for group in find_duplicates(images) if len({unordered(values[position]) for position in group}) > 1
        ]
        if groups:
            verb = "image has" if len(groups) == 1 else "images have"
            messages.append(
                f"{part}: {len(groups)} {verb} several labels: {duplicates_text(images, groups)}; keep the correct one"
            )
    return messages


def duplicates_text(images: ImageDataset, groups: Sequence[Sequence[int]]) -> str:
    """Return the names of the first duplicate images: `a.png = b.png, c.png = d.png`."""
    return listed([" = ".join(images.names[position] for position in group[:3]) for group in groups])


def equal_files(train: ImageDataset, others: ImageDataset, digest_of: Callable[[Path], str]) -> dict[int, int]:
    """Find files that are byte-identical to a training image; hash only files whose size occurs in both datasets.

    Args:
        train: Training images.
        others: Images to compare.
        digest_of: `sha256_of`, cached for comparisons of several splits.

    Returns:
        Position of the training image by position in `others`.
    """
    paths = [file_paths(images) for images in (train, others)]
    sizes: list[dict[int, int]] = []
    for group in paths:
        sizes.append({position: path.stat().st_size for position, path in group.items() if path.is_file()})
    return _match(sizes, lambda dataset, position: digest_of(paths[dataset][position]))


def _match(keys: Sequence[Mapping[int, Any]], digest: Callable[[int, int], Any]) -> dict[int, int]:
    """Return the position in the first dataset with the same digest, by position in the second dataset.

    `keys` are cheap to compare. Digests are computed only at positions whose key occurs in both datasets.
    """
    shared = set(keys[0].values()) & set(keys[1].values())
    digests: list[dict[int, Any]] = []
    for dataset, group in enumerate(keys):
        positions = [position for position, key in group.items() if key in shared]
        digests.append({position: digest(dataset, position) for position in positions})
    train, others = digests
    train_positions = {value: position for position, value in train.items()}
    return {position: train_positions[value] for position, value in others.items() if value in train_positions}


def find_duplicates(images: ImageDataset) -> list[list[int]]:
    """Return groups of positions of duplicate images, which have the same size and the same thumbnail.

    Flat images and images that were not inspected are ignored.
    """
    groups: dict[Any, list[int]] = {}
    for position, metadata in known_metadata(images).items():
        if metadata.thumbnail.std() > _FLAT:
            groups.setdefault((metadata.size, metadata.thumbnail.tobytes()), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def find_equal_images(train: ImageDataset, others: ImageDataset) -> dict[int, int]:
    """Find images with the same pixels as a training image.

    If all images were inspected, only those whose stored size and thumbnail occur in both datasets are compared. Large
    JPEGs are inspected at a lower resolution and may be stored rotated, so their copies in other formats are left to
    `find_near_copies`.

    Returns:
        Position of the training image by position in `others`.
    """
    keys: list[dict[int, Any]] = []
    for images in (train, others):
        inspected = known_metadata(images)
        keys.append({position: (entry.size, entry.thumbnail.tobytes()) for position, entry in inspected.items()})
    if len(keys[0]) < len(train) or len(keys[1]) < len(others):  # not inspected: compare all images
        keys = [dict.fromkeys(range(len(images))) for images in (train, others)]
    return _match(keys, lambda dataset, position: _pixel_digest((train, others)[dataset], position))


def _pixel_digest(images: ImageDataset, position: int) -> bytes:
    """Return a digest of the decoded image."""
    image = images.source.load(images.rows[position])
    pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
    return hashlib.blake2b(repr((pixels.shape, str(pixels.dtype))).encode() + pixels.tobytes(), digest_size=16).digest()


def _exceeds_pairs(train: ImageDataset, others: ImageDataset) -> bool:
    """Return whether two datasets have too many pairs of inspected images to compare their thumbnails."""
    return len(known_metadata(train)) * len(known_metadata(others)) > _MAX_PAIRS


def find_near_copies(train: ImageDataset, others: ImageDataset) -> dict[int, int]:
    """Find near-duplicates of training images: re-encoded, resized or compressed copies.

    Two images match if their thumbnails have a correlation ≥ 0.995 and a root mean square difference ≤ 3 (on a scale
    from 0 to 255). Flat images and images that were not inspected are ignored. With more than 2 billion pairs, the
    result is empty.

    Returns:
        Position of the most similar matching training image by position in `others`.
    """
    thumbnails: list[dict[int, np.ndarray]] = []
    for images in (train, others):
        inspected = {position: metadata.thumbnail for position, metadata in known_metadata(images).items()}
        thumbnails.append({position: pixels for position, pixels in inspected.items() if pixels.std() > _FLAT})
    if not all(thumbnails) or _exceeds_pairs(train, others):
        return {}
    positions = [np.array(list(by_position)) for by_position in thumbnails]
    stacked = [np.stack(list(by_position.values())) for by_position in thumbnails]
    raw = [values.reshape(len(values), -1).astype(np.float32) for values in stacked]
    centered = [values - values.mean(1, keepdims=True) for values in raw]
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in centered]
    matches = {}
    for start in range(0, len(unit[1]), _CHUNK):
        correlations = unit[1][start : start + _CHUNK] @ unit[0].T
        for offset, is_similar in enumerate(correlations >= _MIN_CORRELATION):
            similar = np.flatnonzero(is_similar)
            if len(similar):
                distances = np.sqrt(((raw[1][start + offset] - raw[0][similar]) ** 2).mean(1))
                if distances.min() <= _MAX_DISTANCE:
                    matches[int(positions[1][start + offset])] = int(positions[0][similar[distances.argmin()]])
    return matches
