import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_lab.bundled.data import load_fashion_mnist, load_stamps

FASHION = Path("/usr/share/datasets/fashion-mnist")
STAMPS = Path("/usr/share/tuxpaint/stamps")


def idx(values: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def fashion(tmp_path, monkeypatch) -> Path:
    """Small Fashion-MNIST with 40 training and 10 test images."""
    for prefix, count in (("train", 40), ("t10k", 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    monkeypatch.setenv("SNELLA_FASHION_MNIST", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_its_official_test_split(monkeypatch):
    monkeypatch.delenv("SNELLA_FASHION_MNIST", raising=False)
    data = load_data("fashion-mnist", DataConfig(train_size=1000, val_size=500))
    assert (len(data.train), len(data.val), len(data.test)) == (1000, 500, 10_000)
    assert Counter(data.test.labels) == dict.fromkeys(range(10), 1000)
    assert data.classes[9] == "ankle boot" and data.train.image(0).size == (28, 28)
    assert data.test.names[7] == "fashion-mnist/test/7" and data.val.names[0].startswith("fashion-mnist/train/")


def test_the_validation_split_is_taken_from_the_training_images(fashion):
    data = load_data("fashion-mnist", DataConfig(val_fraction=0.25))
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 10)


def test_missing_fashion_mnist_error_contains_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SNELLA_FASHION_MNIST", str(tmp_path))
    command = "run `apt install dataset-fashion-mnist`, or set SNELLA_FASHION_MNIST"
    with pytest.raises(FileNotFoundError, match=rf"train-images-idx3-ubyte\.gz' does not exist; {command}"):
        load_fashion_mnist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "Not a gzipped file"),
        (gzip.compress(b"\x00\x00\x08\x01" + b"\x00" * 8), "buffer is smaller than requested size"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-12], "Compressed file ended"),
        (
            gzip.compress(struct.pack(">BBBB3i", 0, 0, 8, 3, 2, 28, 28) + b"\x00" * 5),
            r"cannot reshape array of size 5 into shape \(2,28,28\)",
        ),
    ],
    ids=["no-gzip", "short", "cut", "too-few"],
)
def test_a_damaged_file_is_reported(content, message, fashion):
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t10k-images-idx3-ubyte\.gz' is damaged: .*{message}"):
        load_fashion_mnist()


@pytest.mark.parametrize("labels", [np.zeros(9, np.uint8), np.full(10, 11, np.uint8)])
def test_mismatched_files_are_rejected(labels, fashion):
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    message = f"test files in '.*' do not match: 10 images, {len(labels)} labels up to {labels.max()}"
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist()


@pytest.mark.skipif(not STAMPS.is_dir(), reason="Debian package tuxpaint-stamps-default is not installed")
def test_the_stamps_have_thirteen_categories_on_white(monkeypatch):
    monkeypatch.delenv("SNELLA_STAMPS", raising=False)
    data = load_data("stamps")
    assert len(data.classes) == 13 and "animals" in data.classes and "military" not in data.classes
    names = data.train.names + data.val.names + data.test.names
    assert not any("_mirror" in name for name in names)
    assert min(Counter(data.train.labels + data.val.labels + data.test.labels).values()) >= 12
    assert "military (11)" in data.notes[0]
    index = next(i for i, name in enumerate(names) if name.startswith("animals/birds"))
    image = load_data("stamps").train.image(index) if index < len(data.train) else data.train.image(0)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def stamps(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name / "kind").mkdir(parents=True)
        for index in range(count):
            Image.new("RGBA", (2, 2)).save(root / name / "kind" / f"{index}.png")
    return root


def test_small_categories_and_mirrored_stamps_are_skipped(tmp_path, monkeypatch):
    root = stamps(tmp_path, {"a": 12, "b": 13, "c": 11})
    monkeypatch.setenv("SNELLA_STAMPS", str(root))
    Image.new("RGBA", (2, 2)).save(root / "c" / "kind" / "0_mirror.png")
    collection = load_stamps()
    assert collection.classes == ["a", "b"] and len(collection.train) == 25
    assert collection.notes == ["stamps: skipped categories with fewer than 12 images: c (11)"]
    assert collection.train.image(0).getpixel((0, 0)) == (255, 255, 255)


def test_too_few_categories_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("SNELLA_STAMPS", str(stamps(tmp_path, {"a": 12, "b": 2})))
    with pytest.raises(ValueError, match=r"at least 2 categories with 12 PNGs each, got \['a'\]"):
        load_stamps()


def test_missing_stamps_error_contains_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SNELLA_STAMPS", str(tmp_path / "none"))
    with pytest.raises(
        FileNotFoundError,
        match=r"none' does not exist; run `apt install tuxpaint-stamps-default`, or set SNELLA_STAMPS",
    ):
        load_data("stamps")
