"""The division of pictures into train, val and test, and what is written of it."""

import importlib.util
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

_FILE = Path(__file__).parents[3] / "benchmarks" / "products" / "folders.py"


@pytest.fixture
def folders(monkeypatch):
    monkeypatch.syspath_prepend(_FILE.parent)  # and takes out what the module adds
    spec = importlib.util.spec_from_file_location("products_folders", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _image(color):
    return Image.new("RGB", (8, 8), color)


def test_each_origin_is_in_one_part_and_the_shares_are_met(folders):
    pictures = [
        folders.Picture(f"{label}-{number}", label, f"{label}-{number // 2}", partial(_image, "red"))
        for label in ("a", "b")
        for number in range(80)
    ]
    divided = folders.divide(pictures, folders.Folder(lambda _: pictures, shares=(0.5, 0.2, 0.3)))
    parts = {}
    for picture in divided:
        parts.setdefault(picture.origin, set()).add(picture.part)
    assert len(parts) == 80 and all(len(found) == 1 for found in parts.values())
    assert Counter((picture.label, picture.part) for picture in divided) == {
        (label, part): count for label in ("a", "b") for part, count in (("train", 40), ("val", 16), ("test", 24))
    }


def test_a_picture_of_training_is_left_out_of_test(folders, tmp_path):
    colors = {"train": ("red", "green"), "val": ("blue",), "test": ("red", "white")}
    pictures = [
        folders.Picture(f"{part}-{color}", "a", color, partial(_image, color), part)
        for part, found in colors.items()
        for color in found
    ]
    counts = folders.write(tmp_path / "out", pictures)
    assert counts == {"train": {"a": 2}, "val": {"a": 1}, "test": {"a": 1}}
    assert [file.name for file in (tmp_path / "out" / "test" / "a").iterdir()] == ["test-white.png"]
    assert folders.write(tmp_path / "out", pictures, is_checked=False)["test"] == {"a": 2}
