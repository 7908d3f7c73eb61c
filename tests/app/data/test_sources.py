import pickle
from pathlib import Path

import pytest
from PIL import Image

from snella_app.data.images import inspect_image
from snella_app.data.sources import FileImages, broken_images, broken_rows


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file in files:
        Image.new("RGB", (10, 10)).save(file)
    return files


def test_a_decoded_image_is_cached(paths):
    source = FileImages(paths)
    first = source.load(1)
    paths[1].unlink()
    assert source.load(1) is first
    assert source.cached_bytes == 300


def test_images_beyond_the_budget_are_decoded_every_time(paths):
    source = FileImages(paths)
    source.budget_bytes = 650
    images = [source.load(row) for row in range(3)]
    assert source.cached_bytes == 600
    assert source.load(0) is images[0] and source.load(2) is not images[2]


def test_decoded_images_are_not_pickled(paths):
    source = FileImages(paths)
    source.load(0)
    restored = pickle.loads(pickle.dumps(source))
    assert restored.cached_bytes == 0 and restored.load(0).size == (10, 10)
    assert source.cached_bytes == 300


def test_a_deleted_file_is_reported(paths):
    source = FileImages(paths)
    paths[2].unlink()
    with pytest.raises(ValueError, match=r"2\.png' is not a readable image: no such file"):
        source.load(2)


def test_the_reason_of_a_broken_file_does_not_contain_its_name(tmp_path):
    file = tmp_path / "image: 1.png"
    file.write_bytes(b"text")
    assert broken_images([file]) == {0: "unknown image format"}


def test_only_new_and_changed_files_are_inspected_again(paths, monkeypatch):
    inspected = []

    def record(path, *arguments):
        inspected.append(path)
        return inspect_image(path, *arguments)

    monkeypatch.setattr("snella_app.data.sources.inspect_image", record)
    first, second = FileImages(paths), FileImages(paths)
    assert broken_rows(first, range(len(paths))) == {} and sorted(inspected) == sorted(paths)
    assert broken_rows(second, range(len(paths))) == {} and len(inspected) == len(paths)
    assert second.metadata[0].size == first.metadata[0].size
    Image.new("RGB", (11, 7)).save(paths[0])
    third = FileImages(paths)
    assert broken_rows(third, range(len(paths))) == {} and inspected[len(paths) :] == [paths[0]]
    assert third.metadata[0].size == (11, 7)
    paths[0].write_bytes(b"no image")
    assert list(broken_rows(FileImages(paths), range(len(paths)))) == [0]
