"""Slices of one head: the T1 template of Debian's `mricron-data` with its brain mask and its atlas of regions."""

import os
from functools import cache
from pathlib import Path

import numpy as np

from snella.data.collection import Collection
from snella.data.dataset import ImageDataset
from snella.data.debian import not_there
from snella.data.mask_dataset import ArrayMasks, MaskDataset
from snella.data.masks import MASK_STRATA
from snella.data.nifti import read_nifti
from snella.data.sources import ArrayImages

__all__ = ["REGIONS", "load_mri", "load_mri_lobes", "load_mri_regions"]

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
"""Slabs from below upwards, in slices of 1 mm, again and again; those of no part keep neighbours apart."""
_FIRST_SLICE, _LAST_SLICE = 5, 154
_PATCH, _STEP, _EVERY = 64, 10, 3
_SLAB_NOTE = (
    "{}: slices of one single head, so the parts are slabs of 18, 5 and 7 mm with 3 mm between them: neighbouring "
    "slices look alike, and results say nothing about other people's heads"
)


def load_mri(folder: str | None = None) -> Collection:
    """Axial slices of a head with the mask of its brain, 217×217 grey, 1 mm a pixel: skull, eyes and muscles are not.

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
    """Classification: 64×64 mm of a slice, in which of nine groups of regions its centre lies; raises as `load_mri`.

    Centres stand 10 mm apart in every third slice, where the 3×3 pixels around them are all of one group.
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
            raise FileNotFoundError(not_there(data, root / name, "mricron-data", "SNELLA_MRI"))
    shapes = {name: list(_volume(root / name).shape) for name in (_HEAD, _BRAIN, _ATLAS)}
    if any(shape != shapes[_HEAD] or shape[2] <= _LAST_SLICE or shape[1] < shape[0] for shape in shapes.values()):
        raise ValueError(f"data {data}: the volumes in '{root}' must be aligned and at least 155 slices, got {shapes}")
    return root


@cache
def _volume(path: Path) -> np.ndarray:
    """A volume, read once."""
    return read_nifti(path)
