"""Real data sets that Debian ships as packages: Fashion-MNIST and the stamps of Tux Paint."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from snella.data.collection import Collection
from snella.data.dataset import ImageDataset
from snella.data.sources import ArrayImages, FileImages

__all__ = ["load_fashion_mnist", "load_stamps", "not_there"]

_FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
_FASHION_CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
_STAMPS_FOLDER = "/usr/share/tuxpaint/stamps"  # where Debian's package puts it
_STAMPS_AT_LEAST = 12


def load_fashion_mnist(folder: str | None = None) -> Collection:
    """Fashion-MNIST, 60,000 and 10,000 pictures of clothes, 28x28 grey, 10 classes.

    Args:
        folder: Where the four IDX files lie; by default `$SNELLA_FASHION_MNIST`, else Debian's place.

    Raises:
        FileNotFoundError: The files are not there; the message holds the command.
        ValueError: A file is damaged.
    """
    root = Path(folder or os.environ.get("SNELLA_FASHION_MNIST") or _FASHION_FOLDER).expanduser()
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if len(pixels) != len(labels) or labels.max(initial=0) >= len(_FASHION_CLASSES):
            raise ValueError(
                f"data fashion-mnist: the {part} files in '{root}' do not belong together: {len(pixels)} images, "
                f"{len(labels)} labels up to {labels.max(initial=0)}"
            )
        rows = range(len(pixels))
        names = [f"fashion-mnist/{part}/{row}" for row in rows]
        parts[part] = ImageDataset(ArrayImages(pixels), rows, labels.tolist(), names)
    return Collection("fashion-mnist", _FASHION_CLASSES, parts["train"], test=parts["test"], has_parts=True)


def load_stamps(folder: str | None = None) -> Collection:
    """Tux Paint's stamps, photographs and drawings of things on white, by category.

    Classes are the categories with at least 12 pictures, 13 of them as Debian ships them (the next, "military", has
    11). `*_mirror.png`, other views of pictures that are there already, are left out: they would tell a test picture.

    Args:
        folder: The stamps; by default `$SNELLA_STAMPS`, else Debian's place.

    Raises:
        FileNotFoundError: The stamps are not there; the message holds the command.
        ValueError: Fewer than two categories are large enough.
    """
    root = Path(folder or os.environ.get("SNELLA_STAMPS") or _STAMPS_FOLDER).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(not_there("stamps", root, "tuxpaint-stamps-default", "SNELLA_STAMPS"))
    files = {
        category.name: [file for file in sorted(category.rglob("*.png")) if not file.stem.endswith("_mirror")]
        for category in sorted(root.iterdir())
        if category.is_dir()
    }
    classes = [name for name, found in files.items() if len(found) >= _STAMPS_AT_LEAST]
    if len(classes) < 2:
        raise ValueError(
            f"data stamps: '{root}' must hold two or more categories of at least {_STAMPS_AT_LEAST} PNGs, got {classes}"
        )
    pairs = [(file, label) for label, name in enumerate(classes) for file in files[name]]
    names = [file.relative_to(root).as_posix() for file, _ in pairs]
    source = FileImages([file for file, _ in pairs])
    images = ImageDataset(source, range(len(pairs)), [label for _, label in pairs], names)
    small = [f"{name} ({len(found)})" for name, found in files.items() if name not in classes]
    notes = (
        [f"stamps: categories of fewer than {_STAMPS_AT_LEAST} pictures left out: {', '.join(small)}"] if small else []
    )
    return Collection("stamps", classes, images, notes=notes)


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes."""
    if not file.is_file():
        raise FileNotFoundError(not_there("fashion-mnist", file, "dataset-fashion-mnist", "SNELLA_FASHION_MNIST"))
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data fashion-mnist: '{file}' is damaged: {error}") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"data fashion-mnist: '{file}' is damaged: it is no IDX file of {dimensions} dimensions")
    shape = tuple(np.frombuffer(content, ">i4", dimensions, 4).tolist())
    if len(content) - header != np.prod(shape):
        raise ValueError(
            f"data fashion-mnist: '{file}' is damaged: {list(shape)} announced, {len(content) - header} values there"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def not_there(data: str, path: Path, package: str, variable: str) -> str:
    """Message about a missing Debian package."""
    return f"data {data}: '{path}' is not there; run `apt install {package}`, or set {variable} to its folder"
