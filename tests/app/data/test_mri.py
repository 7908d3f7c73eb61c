import gzip
import struct

import numpy as np
import pytest

from snella_app.data.load import load_data
from snella_lab.bundled.data import _LAST_SLICE, REGIONS, load_mri, read_nifti


def write_nifti(path, volume, kind=2):
    header = bytearray(352)
    header[:4] = struct.pack("<i", 348)
    header[40:56] = struct.pack("<8h", volume.ndim, *volume.shape, *([1] * (7 - volume.ndim)))
    header[70:72] = struct.pack("<h", kind)
    header[108:112] = struct.pack("<f", 352)
    header[344:348] = b"n+1\0"
    path.write_bytes(gzip.compress(bytes(header) + volume.tobytes(order="F")))


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """Head of 60×70×160 voxels with a brain of two regions."""
    head = np.full((60, 70, 160), 90, np.uint8)
    brain, atlas = np.zeros_like(head), np.zeros_like(head)
    brain[10:50, 10:60] = 120
    atlas[10:30, 10:60], atlas[30:50, 10:60] = 1, 2
    for name, volume in (("ch2", head), ("ch2bet", brain), ("aal", atlas)):
        write_nifti(tmp_path / f"{name}.nii.gz", volume)
    (tmp_path / "aal.nii.txt").write_text("1 Precentral_L 2001\n2 Vermis_3 9100\n\n")
    monkeypatch.setenv("SNELLA_MRI", str(tmp_path))
    return tmp_path


def test_the_splits_are_separated_slabs(templates):
    data = load_data("mri")
    heights = {part: [int(name[-3:]) for name in getattr(data, part).names] for part in ("train", "val", "test")}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert min(abs(a - b) for a in heights[first] for b in heights[second]) > 3
    assert data.classes == ["background", "brain"]
    assert any("all slices come from one head" in note for note in data.notes)
    assert data.train.image(0).size == (70, 70)
    assert data.train.mask(0).sum() == 40 * 50


def test_the_atlas_is_grouped_into_nine_regions(templates):
    data = load_data("mri-lobes")
    assert data.classes == ["background", *REGIONS] and len(REGIONS) == 9
    assert set(np.unique(data.train.mask(0))) == {0, 1, 9}


def test_patches_are_labeled_by_the_region_at_their_center(templates):
    data = load_data("mri-regions")
    assert data.classes == list(REGIONS)
    assert set(data.train.labels) == {0, 8} and data.train.image(0).size == (64, 64)
    assert any("regions" in note for note in data.notes)


def test_missing_volumes_error_contains_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SNELLA_MRI", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ch2.nii.gz' does not exist; run `apt install mricron-data`"):
        load_mri()


def test_mismatched_volumes_are_rejected(templates):
    write_nifti(templates / "aal.nii.gz", np.zeros((60, 70, 150), np.uint8))
    from snella_lab.bundled.data import _volume

    _volume.cache_clear()
    with pytest.raises(ValueError, match=rf"must have equal shapes .* and z > {_LAST_SLICE}, got .*\[60, 70, 150\]"):
        load_mri()


def test_damaged_volumes_are_reported(tmp_path):
    path = tmp_path / "v.nii.gz"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"v.nii.gz' is damaged: Not a gzipped file"):
        read_nifti(path)
    path.write_bytes(gzip.compress(b"junk" * 100))
    with pytest.raises(ValueError, match=r"v.nii.gz' is damaged: it is not a 3-D NIfTI-1 volume of bytes"):
        read_nifti(path)
    write_nifti(path, np.zeros((2, 3, 4), np.uint8), kind=16)
    with pytest.raises(ValueError, match=r"NIfTI-1 volume of bytes \(shape \[2, 3, 4\], data type 16\)"):
        read_nifti(path)
    write_nifti(path, np.zeros((2, 3, 4), np.uint8))
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-5]))
    with pytest.raises(ValueError, match=r"v.nii.gz' is damaged: buffer is smaller than requested size"):
        read_nifti(path)
