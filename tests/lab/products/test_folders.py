"""Splits into train, val and test, and the written folders."""

import importlib.util
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

_FILE = Path(__file__).parents[3] / "benchmarks" / "products" / "folders.py"


@pytest.fixture
def folders(monkeypatch):
    monkeypatch.syspath_prepend(_FILE.parent)  # also undoes the changes of the module
    spec = importlib.util.spec_from_file_location("products_folders", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _image(color):
    return Image.new("RGB", (8, 8), color)


def test_each_origin_is_in_one_split_and_split_sizes_match(folders):
    images = [
        folders.Sample(f"{label}-{number}", label, f"{label}-{number // 2}", partial(_image, "red"))
        for label in ("a", "b")
        for number in range(80)
    ]
    divided = folders.divide(images, folders.Folder(lambda _: images, shares=(0.5, 0.2, 0.3)))
    parts = {}
    for image in divided:
        parts.setdefault(image.origin, set()).add(image.part)
    assert len(parts) == 80 and all(len(split_names) == 1 for split_names in parts.values())
    assert Counter((image.label, image.part) for image in divided) == {
        (label, part): count for label in ("a", "b") for part, count in (("train", 40), ("val", 16), ("test", 24))
    }


def test_training_images_are_excluded_from_test(folders, tmp_path):
    colors = {"train": ("red", "green"), "val": ("blue",), "test": ("red", "white")}
    images = [
        folders.Sample(f"{part}-{color}", "a", color, partial(_image, color), part)
        for part, split_names in colors.items()
        for color in split_names
    ]
    counts = folders.write(tmp_path / "out", images)
    assert counts == {"train": {"a": 2}, "val": {"a": 1}, "test": {"a": 1}}
    assert [file.name for file in (tmp_path / "out" / "test" / "a").iterdir()] == ["test-white.png"]
    assert folders.write(tmp_path / "out", images, is_checked=False)["test"] == {"a": 2}
