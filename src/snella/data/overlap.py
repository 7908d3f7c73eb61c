"""Images that stand in two parts of the data at once, told by their pixels."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from snella.data.dataset import ImageDataset

__all__ = ["overlap_note", "same_images"]

_THREADS = 4  # decoding and hashing release the interpreter lock
_SHOWN = 3


def same_images(first: ImageDataset, second: ImageDataset) -> list[tuple[str, str]]:
    """Pairs of names whose decoded pixels are equal, one from each data set.

    A picture that was compressed or resized again has other pixels and is not found.
    """
    known = dict(zip(_digests(first), first.names, strict=True))
    return [
        (known[digest], name) for digest, name in zip(_digests(second), second.names, strict=True) if digest in known
    ]


def overlap_note(train: ImageDataset, test: ImageDataset, part: str = "test") -> list[str]:
    """One note where test images are training images as well, none where all differ."""
    both = same_images(train, test)
    if not both:
        return []
    shown = ", ".join(f"{mine} = {theirs}" for mine, theirs in both[:_SHOWN])
    more = f" and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
    return [
        f"{len(both)} of {len(test)} {part} images are training images too, by their pixels: {shown}{more}; "
        f"results on {part} are too good by as much"
    ]


def _digests(images: ImageDataset) -> Sequence[str]:
    """SHA-256 of the size and the pixels of each image."""

    def digest(index: int) -> str:
        image = images.image(index)
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(digest, range(len(images))))
