import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from PIL import Image
from pyarrow import parquet

from snella_app.data.hub import _values
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_image(index):
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def encoded(index):
    content = io.BytesIO()
    make_image(index).save(content, "PNG")
    return content.getvalue()


def all_items(data):
    """Return the pixels, class name and group of every image by name."""
    items = {}
    for part in (data.train, data.val, data.test):
        for index in range(len(part) if part is not None else 0):
            groups = part.annotations.groups
            items[part.names[index]] = (
                part.image(index).tobytes(),
                data.classes[part.labels[index]],
                None if groups is None else groups[index],
            )
    return items


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    rows = [(f"{i:02}.png", "ab"[i % 2], f"p{i // 3}") for i in range(24)]
    for index in range(24):
        make_image(index).save(root / f"{index:02}.png")
    with (root / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "species", "patient"), *rows])
    return root


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its file open
def test_an_image_folder_with_metadata_has_its_columns(image_folder):
    items = all_items(load_data(f"hf:{image_folder}"))
    assert len(items) == 24
    for name, item in items.items():
        index = int(Path(name).stem)
        assert item == (make_image(index).tobytes(), "ab"[index % 2], f"p{index // 3}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its file open
def test_names_of_images_in_a_folder_with_metadata_do_not_determine_the_split(image_folder):
    names = [f"{('test', 'train', 'photo')[index % 3]}_{index:02}.png" for index in range(24)]
    table = image_folder / "metadata.csv"
    text = table.read_text()
    for index, name in enumerate(names):
        (image_folder / f"{index:02}.png").rename(image_folder / name)
        text = text.replace(f"\n{index:02}.png", f"\n{name}")
    table.write_text(text)
    assert sorted(all_items(load_data(f"hf:{image_folder}"))) == sorted(names)
    rows = list(csv.DictReader(text.splitlines()))
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table.unlink()
    assert sorted(all_items(load_data(f"hf:{image_folder}"))) == sorted(names)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its file open
def test_folders_of_splits_share_a_table_of_metadata(image_folder, tmp_path, monkeypatch):
    table = image_folder / "metadata.csv"
    text = table.read_text()
    for index in range(24):
        part = "test" if index % 4 == 0 else "train"
        (image_folder / part).mkdir(exist_ok=True)
        (image_folder / f"{index:02}.png").rename(image_folder / part / f"{index:02}.png")
        text = text.replace(f"\n{index:02}.png", f"\n{part}/{index:02}.png")
    table.write_text(text)
    monkeypatch.chdir(image_folder / "test")
    data = load_data("hf:../../photos")
    assert sorted(data.test.names) == [f"test/{index:02}.png" for index in range(0, 24, 4)]
    assert len(data.train) + len(data.val) == 18
    (tmp_path / "link").symlink_to(image_folder)
    assert load_data(f"hf:{tmp_path / 'link'}").test.names == data.test.names
    (image_folder / "train" / "01.png").rename(image_folder / "01.png")
    table.write_text(text.replace("train/01.png", "01.png"))
    with pytest.raises(ValueError, match=r"must all be in folders of splits, or none of them, got also '01\.png'"):
        load_data(f"hf:{image_folder}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its file open
def test_folders_of_splits_may_have_a_table_each(image_folder, tmp_path):
    lines = (image_folder / "metadata.csv").read_text().splitlines()
    (image_folder / "metadata.csv").unlink()
    for part, numbers in (("train", range(18)), ("test", range(18, 24))):
        (image_folder / part).mkdir()
        (image_folder / part / "metadata.csv").write_text("\n".join([lines[0], *(lines[1 + k] for k in numbers)]))
        for number in numbers:
            (image_folder / f"{number:02}.png").rename(image_folder / part / f"{number:02}.png")
    (tmp_path / "link").symlink_to(image_folder)
    for folder in (image_folder, tmp_path / "link"):
        assert load_data(f"hf:{folder}").test.names == [f"test/{number:02}.png" for number in range(18, 24)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its file open
def test_a_table_in_a_subfolder_lists_all_images(image_folder, tmp_path):
    image_folder.rename(tmp_path / "images")
    image_folder.mkdir()
    (tmp_path / "images").rename(image_folder / "images")
    (image_folder / "images" / "00.png").rename(image_folder / "images" / "test_00.png")
    table = image_folder / "images" / "metadata.csv"
    table.write_text(table.read_text().replace("\n00.png", "\ntest_00.png"))
    names = sorted(all_items(load_data(f"hf:{image_folder}")))
    assert len(names) == 24 and "images/test_00.png" in names


def test_rows_without_an_image_are_reported_or_skipped(tmp_path):
    images = [None, *({"bytes": encoded(index), "path": None} for index in range(19))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": images, "label": ["a", "b"] * 10}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"1 of 20 rows .* train/000000 \(no image\)"):
        load_data(f"hf:{tmp_path / 'saved'}")
    data = load_data(f"hf:{tmp_path / 'saved'}", DataConfig(skip_corrupt=True))
    assert len(data.train) + len(data.val) + len(data.test) == 19


def test_a_saved_dataset_has_its_class_names_and_splits(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])})
    parts = {
        part: datasets.Dataset.from_dict(
            {"image": [{"bytes": encoded(i), "path": None} for i in numbers], "label": [i % 2 for i in numbers]},
            features=features,
        )
        for part, numbers in (("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 20)))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = load_data(f"hf:{tmp_path}/saved")
    assert data.classes == ["zebra", "ant"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 4]
    assert data.test.labels == [0, 1, 0, 1] and data.test.image(1).tobytes() == make_image(17).tobytes()
    again = load_data(datasets.DatasetDict(parts))
    assert again.classes == data.classes and all_items(again).keys() == all_items(data).keys()
    assert again.train.content_digest() == data.train.content_digest()
    with pytest.raises(ValueError, match=r"no column 'kind' for label\. Columns: 'image' \('<image>'\), 'label' \("):
        load_data(f"hf:{tmp_path}/saved", DataConfig(columns="label=kind"))


def test_rows_may_only_reference_files_below_the_folder_or_the_given_root(tmp_path):
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for index in range(20):
        make_image(index).save(tmp_path / "images" / f"{index:02}.png")
    names = [str(tmp_path / "images" / f"{index:02}.png") for index in range(20)]

    def save(paths, name):
        table = {"image": [{"bytes": None, "path": path} for path in paths], "label": ["a", "b"] * 10}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        (tmp_path / name).mkdir()
        rows = pa.Table.from_pydict(table, schema=features.arrow_schema)
        parquet.write_table(rows, tmp_path / name / "train-00000-of-00001.parquet")
        return f"hf:{tmp_path / name}"

    outside = save(names, "outside")
    with pytest.raises(ValueError, match=r"20 of 20 rows .* is outside '.*outside'; allow .*--columns root="):
        load_data(outside)
    assert load_data(outside, DataConfig(columns=f"root={tmp_path}")).train.image(0).size == (8, 8)
    for special in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(ValueError, match=r"1 of 20 rows .*not a regular file"):
            load_data(save([*names[:19], special], "special"), DataConfig(columns="root=/"))
        shutil.rmtree(tmp_path / "special")


def test_a_class_index_without_a_name_is_a_one_line_error(tmp_path):
    plain = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(4)], "label": [0, 1, 2, 0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    kind = datasets.ClassLabel(names=["x", "y"])
    data = datasets.Dataset(plain.data, plain.info.copy())
    data.info.features["label"] = kind
    with pytest.raises(ValueError, match=r"column 'label', row 3 must be a class index below 2, got 2"):
        load_data(data)


def test_lists_of_class_indices_become_lists_of_names(tmp_path):
    kind = datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"]))
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(20)], "labels": [[0, 2], [1]] * 10},
        features=datasets.Features({"image": datasets.Image(), "labels": kind}),
    )
    loaded = load_data(data, target="labels")
    assert loaded.classes == ["x", "y", "z"] and set(loaded.train.annotations.targets) == {("x", "z"), ("y",)}


@pytest.fixture
def shards(tmp_path):
    """Return a function that writes shards of ten samples with `json` or `cls` labels."""

    def write(names, label=lambda i: ("json", json.dumps({"species": "ab"[i % 2], "site": f"s{i // 2}"}))):
        for number, name in enumerate(names):
            with tarfile.open(tmp_path / name, "w") as tar:
                for i in range(10 * number, 10 * number + 10):
                    suffix, text = label(i)
                    for end, content in (("png", encoded(i)), (suffix, text.encode())):
                        entry = tarfile.TarInfo(f"{i:03}.{end}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        return tmp_path

    return write


def test_shards_have_labels_in_json_and_groups(shards):
    root = shards(["x-000.tar", "x-001.tar", "x-002.tar"])
    for spec in (f"wds:{root}", f"wds:{root}/x-*.tar", f"wds:{root}/x-{{000..002}}.tar"):
        items = all_items(load_data(spec, DataConfig(columns="group=json.site")))
        assert items == {f"{i:03}": (make_image(i).tobytes(), "ab"[i % 2], f"s{i // 2}") for i in range(30)}


def test_shard_names_define_the_splits(shards):
    root = shards(["train-0.tar", "train-1.tar", "val-0.tar", "test-0.tar"], lambda i: ("cls", str(i % 2)))
    data = load_data(f"wds:{root}")
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 10, 10]
    assert data.classes == ["0", "1"] and data.val.names[0] == "020"


def test_missing_shards_and_datasets_are_reported(shards, image_folder, tmp_path):
    root = shards(["x-000.tar"])
    with pytest.raises(FileNotFoundError, match=r"got wds:.*, missing: .*x-001\.tar; nearest: 'x-000\.tar'"):
        load_data(f"wds:{root}/x-{{000..001}}.tar")
    with pytest.raises(FileNotFoundError, match=r"missing: .*y-\*\.tar"):
        load_data(f"wds:{root}/y-*.tar")
    with pytest.raises(FileNotFoundError, match=r"data hf:.*photo cannot be read: .*; nearest: 'photos'"):
        load_data(f"hf:{tmp_path}/photo")
    with pytest.raises(ConnectionError, match=r"neither a folder nor in the cache, and the Hub could not be reached"):
        load_data("hf:somebody/photos")
    with pytest.raises(ValueError, match="data python:x is a Python object; pass it"):
        load_data("python:x")
    (tmp_path / "bad.tar").write_text("no tar")
    with pytest.raises(ValueError, match=r"data wds:.*bad\.tar cannot be read: "):
        load_data(f"wds:{tmp_path}/bad.tar")


def test_a_broken_image_in_a_dataset_is_reported():
    content = [{"bytes": encoded(i) if i != 3 else b"no image", "path": None} for i in range(20)]
    data = datasets.Dataset.from_dict({"image": content, "label": ["a", "b"] * 10})
    data = data.cast_column("image", datasets.Image())
    with pytest.raises(
        ValueError, match=r"1 of 20 rows of python:data, 1 unreadable: train/000003 \(unknown image format"
    ):
        load_data(data)
    assert len(load_data(data, DataConfig(skip_corrupt=True)).train) == 11


class TorchImages(torch.utils.data.Dataset):
    classes = ("cat", "dog")

    def __init__(self, numbers, make=make_image):
        self.numbers, self.make = list(numbers), make

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, row):
        return self.make(self.numbers[row]), self.numbers[row] % 2


def test_a_torch_dataset_is_split_and_existing_splits_are_used():
    items = all_items(load_data(TorchImages(range(20))))
    assert items == {f"train/{i:06}": (make_image(i).tobytes(), ("cat", "dog")[i % 2], None) for i in range(20)}
    parts = {"train": range(10), "val": range(10, 14), "test": [15, 16]}
    data = load_data({name: TorchImages(numbers) for name, numbers in parts.items()})
    assert [len(part) for part in (data.train, data.val, data.test)] == [10, 4, 2]
    assert data.test.labels == [1, 0] and data.test.image(0).tobytes() == make_image(15).tobytes()


@pytest.mark.parametrize("as_list", [False, True])
def test_labels_of_shape_images_by_one_are_unwrapped(as_list):
    class ColumnLabels(TorchImages):
        def __getitem__(self, row):
            return self.make(self.numbers[row]), np.array([self.numbers[row] % 2])

    data = ColumnLabels(range(20))
    if as_list:
        data.labels = np.array([[number % 2] for number in data.numbers])
    plain = load_data(TorchImages(range(20)))
    assert all_items(load_data(data)) == all_items(plain) and plain.classes == ["cat", "dog"]
    parts = load_data({"train": data, "val": TorchImages(range(20, 24)), "test": TorchImages(range(24, 28))})
    assert parts.classes == ["cat", "dog"] and len(parts.val) == 4
    numbers = load_data(data, target="numbers").train
    assert numbers.annotations.targets == [int(name[6:]) % 2 for name in numbers.names]


def test_transformed_items_and_other_objects_are_rejected():
    with pytest.raises(ValueError, match=r"images must be PIL images or uint8, got Tensor of torch\.float32; remove"):
        load_data(TorchImages(range(20), lambda i: torch.zeros(3, 8, 8)))
    pixels = load_data(TorchImages(range(20), lambda i: torch.full((3, 8, 8), i, dtype=torch.uint8)))
    assert pixels.train.image(0).getpixel((0, 0)) == (int(pixels.train.names[0][6:]),) * 3
    with pytest.raises(TypeError, match=r"must be a specification such as folder:photos, or map-style .* got int"):
        load_data(3)


@pytest.mark.parametrize("error", [OSError("image file is truncated"), SyntaxError("broken PNG file")])
def test_a_broken_image_of_a_torch_dataset_is_an_unusable_row(error):
    def make(number):
        if number == 3:
            raise error
        return make_image(number)

    images = TorchImages(range(20), make)
    images.targets = [number % 2 for number in range(20)]
    with pytest.raises(ValueError, match=rf"1 of 20 rows of python:data, 1 unreadable: train/000003 \({error}\)"):
        load_data(images)
    assert len(load_data(images, DataConfig(skip_corrupt=True)).train) == 11


@pytest.mark.parametrize("value", [[1.0, 2.0], []])
def test_lists_of_numbers_in_one_column_are_no_regression_targets(value):
    rows = {"image": [make_image(i) for i in range(20)], "label": [value] + [[float(i)] for i in range(1, 20)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("float32"))})
    with pytest.raises(
        ValueError, match=r"1 of 20 rows .*1 invalid label: train/000000 \(label '.*' is not a finite number"
    ):
        load_data(datasets.Dataset.from_dict(rows, features=features), target="numbers")


def test_equal_images_of_a_dataset_are_not_called_re_encoded():
    photos = [make_image(i) for i in range(14)]
    parts = {"train": TorchImages(range(10), photos.__getitem__), "test": TorchImages([0, 11, 12], photos.__getitem__)}
    assert any(
        text.startswith("1 of 3 test images is also a training image, e.g. 'train/000000' is 'test/000000'")
        for text in load_data(parts).warnings
    )


@pytest.mark.parametrize("item", [{"image": make_image(0), "label": 1}, make_image(0)])
def test_items_that_are_not_pairs_are_rejected(item):
    with pytest.raises(TypeError, match=rf"items must be \(image, label\), got {type(item).__name__} from list"):
        load_data([item] * 20)


def test_columns_are_rejected_for_torch_datasets():
    with pytest.raises(ValueError, match=r"columns applies only to datasets with .* got columns='label=species' for"):
        load_data(TorchImages(range(20)), DataConfig(columns="label=species"))


def test_the_root_applies_to_dataset_objects(tmp_path):
    for index in range(20):
        make_image(index).save(tmp_path / f"{index}.png")
    rows = {"image": [{"bytes": None, "path": f"{index}.png"} for index in range(20)], "label": ["a", "b"] * 10}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    assert load_data(data, DataConfig(columns=f"root={tmp_path}")).train.image(0).size == (8, 8)


@pytest.mark.parametrize("names", [("train", "extra"), ("val", "test")])
def test_a_mapping_of_torch_datasets_without_known_splits_is_rejected(names):
    with pytest.raises(ValueError, match=rf"must map train and optionally val and test to datasets, got '{names[0]}',"):
        load_data({name: TorchImages(range(20)) for name in names})


def test_streaming_datasets_are_rejected():
    stream = datasets.Dataset.from_dict({"label": [0, 1]}).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"map-style datasets of \(image, label\) items, got IterableDataset"):
        load_data(stream)


def test_mappings_are_flattened_if_the_first_value_is_missing():
    rows = datasets.Dataset.from_dict({"json": [None, {"species": "newt"}]})
    assert _values(rows, []) == {"json.species": [None, "newt"]}


def test_each_torch_dataset_maps_its_indices_to_its_own_class_names():
    train, val = TorchImages(range(12)), TorchImages([1, 3])
    train.classes, val.classes = np.array(["bird", "cat", "dog"]), ("cat", "dog")
    train.targets = [number % 3 for number in train.numbers]
    data = load_data({"train": train, "val": val, "test": TorchImages([])})
    assert data.classes == ["bird", "cat", "dog"] and data.val.labels == [2, 2]
    val.classes = ("cat", "fox")
    with pytest.raises(ValueError, match=r"python:data: classes .* must be bird, cat, dog, got 'fox' in val/000000"):
        load_data({"train": train, "val": val})
    train.targets[4] = 3
    with pytest.raises(ValueError, match=r"label of train/000004 must be a class index from 0 to 2, got 3"):
        load_data({"train": train})


def test_splits_may_lack_optional_columns_but_not_labels():
    def part(numbers, **columns):
        images = [{"bytes": encoded(i), "path": None} for i in numbers]
        data = datasets.Dataset.from_dict({"image": images, **columns})
        return data.cast_column("image", datasets.Image())

    train = part(range(10), label=["a", "b"] * 5)
    test = part(range(10, 14), label=["b", "a"] * 2, site=["s1", "s2", "s3", "s3"])
    data = load_data({"train": train, "test": test})
    assert data.test.annotations.groups == ["s1", "s2", "s3", "s3"] and data.test.labels == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"4 of 14 rows of python:data, 4 no label: test/000000 \(no label\)"):
        load_data({"train": train, "test": part(range(10, 14))})


def test_splits_must_have_the_image_column():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(4)], "label": list("abab")}
    train = datasets.Dataset.from_dict(rows, features=features)
    parts = {"train": train, "test": train.remove_columns("image")}
    with pytest.raises(ValueError, match=r"column 'image' must contain images in every split, got none in 'test'"):
        load_data(datasets.DatasetDict(parts))


def test_datasets_without_a_known_split_are_rejected():
    train = datasets.Dataset.from_dict({"image": [{"bytes": encoded(0), "path": None}], "label": ["a"]})
    with pytest.raises(ValueError, match=r"python:data must have a train split .* got splits labeled, unlabeled"):
        load_data(datasets.DatasetDict({"labeled": train, "unlabeled": train}))
    with pytest.raises(ValueError, match=r"python:data must have a train split .* got splits labeled, test"):
        load_data(datasets.DatasetDict({"labeled": train, "test": train}))
    with pytest.raises(ValueError, match=r"python:data must have a train split .* got no splits"):
        load_data({})


def test_shards_may_repeat_the_keys_of_other_shards(shards):
    root = shards(["x-000.tar"])
    first = (root / "x-000.tar").rename(root / "y-000.tar")
    shards(["x-000.tar"], lambda i: ("json", json.dumps({"species": "ba"[i % 2], "site": "s"})))
    assert first.is_file()
    data = load_data(f"wds:{root}")
    assert sum(map(len, data.parts.values())) == 20 and not any("skipped" in note for note in data.notes)
    assert {name.partition("/")[0] for name in data.train.names} == {"x-000", "y-000"}


def test_shards_of_different_folders_may_have_the_same_name(shards):
    root = shards(["part.tar"])
    for folder in ("a[1]", "b"):
        (root / folder).mkdir()
        shutil.copy(root / "part.tar", root / folder / "part.tar")
    data = load_data(f"wds:{root}/*/part.tar")
    assert sum(map(len, data.parts.values())) == 20 and not any("skipped" in note for note in data.notes)
    assert {name.rpartition("/")[0] for name in data.train.names} == {"a[1]/part", "b/part"}


@pytest.mark.parametrize(("spec", "error"), [("wds:", "must name shards after 'wds:'"), ("wds:{}", "got none in '")])
def test_shards_must_exist(spec, error, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_data(spec.format(tmp_path))


def test_class_names_may_come_from_any_split():
    parts = {"train": TorchImages(range(20)), "test": TorchImages(range(8))}
    parts["train"].classes = None
    assert load_data(parts).classes == ["cat", "dog"]


def test_an_item_that_cannot_be_decoded_is_reported_or_skipped():
    class Broken(TorchImages):
        def __getitem__(self, index):
            if index == 3:
                raise IndexError("truncated block")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="truncated block"):
        load_data(Broken(range(20)))
    data = load_data(Broken(range(20)), DataConfig(skip_corrupt=True))
    assert sum(map(len, data.parts.values())) == 19


def test_columns_replace_the_splits_of_a_dataset():
    sites = [f"s{i // 4}" for i in range(20)]
    rows = {"image": [make_image(i) for i in range(20)], "label": ["a", "b"] * 10, "site": sites}
    part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data = datasets.DatasetDict({"train": part, "test": part})
    shared = load_data(data)
    assert shared.has_parts and any("split=none creates new splits" in note for note in shared.warnings)
    new = load_data(data, DataConfig(columns="split=none"))
    groups = [set(images.annotations.groups) for images in new.parts.values()]
    assert not new.has_parts and sum(map(len, new.parts.values())) == 40
    assert len(groups) == 3 and sum(map(len, groups)) == len(set.union(*groups))


def test_shards_joined_by_columns_may_repeat_keys(shards):
    root = shards(["train-0.tar"])
    shards(["test-0.tar"], lambda i: ("json", json.dumps({"species": "ab"[i % 2], "site": "s"})))
    data = load_data(f"wds:{root}", DataConfig(columns="split=none,group=none"))
    assert not data.has_parts and sum(map(len, data.parts.values())) == 20
    assert {name.partition("/")[0] for name in data.train.names} == {"train-0", "test-0"}


class MultiHot(TorchImages):
    classes = ("sea", "sand", "dune")

    def __getitem__(self, index):
        return make_image(self.numbers[index]), torch.tensor([1, self.numbers[index] % 2, 0])


def test_multi_hot_targets_are_labels():
    data = load_data(MultiHot(range(40)), target="labels")
    assert data.classes == ["sea", "sand", "dune"]
    assert set(data.train.annotations.targets) == {("sea",), ("sea", "sand")}


def test_a_subset_with_many_declared_classes_is_classification_data():
    names = [f"breed {number}" for number in range(196)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [make_image(i) for i in range(60)], "label": [i % 5 for i in range(60)]}
    data = load_data(datasets.Dataset.from_dict(rows, features=features))
    assert len(data.classes) == 196 and set(data.train.labels) == set(range(5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the table open
def test_arrays_of_many_channels_are_read_and_torch_datasets_of_them_rejected(image_folder):
    for file in image_folder.glob("*.png"):
        tifffile.imwrite(file, np.zeros((6, 8, 8), np.uint8), photometric="minisblack")
        file.rename(file.with_suffix(".tif"))
    table = image_folder / "metadata.csv"
    table.write_text(table.read_text().replace(".png", ".tif"))
    data = load_data(f"hf:{image_folder}", DataConfig(channels=6))
    assert data.train[0][0].shape == (6, 8, 8)
    with pytest.raises(ValueError, match="channels must be one of 1, 3, 4 for a torch dataset, got 6"):
        load_data(TorchImages(range(30)), DataConfig(channels=6))


def test_a_target_transform_takes_precedence_over_the_list_of_targets():
    images = TorchImages(range(30))
    images.targets = [number % 3 for number in images.numbers]
    images.target_transform = lambda label: label % 2
    data = load_data(images)
    assert data.classes == ["cat", "dog"]


def test_a_broken_item_without_a_list_of_targets_is_an_unusable_row():
    def make(number):
        if number == 3:
            raise OSError("image file is truncated")
        return make_image(number)

    items = torch.utils.data.Subset(TorchImages(range(20), make), range(20))
    with pytest.raises(ValueError, match=r"1 of 20 rows of .*, 1 unreadable: train/000003 \(image file is truncated"):
        load_data(items)
    assert len(load_data(items, DataConfig(skip_corrupt=True)).train) == 11
    images = TorchImages(range(20), make)
    assert load_data(images, DataConfig(skip_corrupt=True)).classes == ["cat", "dog"]


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat, Felis", "dog")])
def test_the_single_class_of_an_image_is_its_label(names):
    images = TorchImages(range(20))
    images.classes = names
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = {"image": [make_image(i) for i in range(20)], "label": [i % 2 for i in range(20)]}
    for data in (images, datasets.Dataset.from_dict(rows, features=features)):
        splits = load_data(data, target="labels")
        assert splits.classes == list(names) and set(splits.train.annotations.targets) == {(name,) for name in names}


def test_remedies_for_torch_datasets_name_no_columns():
    train, test = TorchImages([0] * 6), TorchImages(range(6))
    train.classes = test.classes = ("cat", "dog")
    with pytest.raises(ValueError, match=r"'dog' \(3 in other splits\); add training images or remove these classes$"):
        load_data({"train": train, "test": test})
    many = TorchImages(range(30))
    many.classes, many.targets = None, [index / 7 for index in range(30)]
    with pytest.raises(ValueError, match=r"got 30 different values .*; for numbers, set --task regression$"):
        load_data(many)


def test_a_negative_class_index_is_rejected():
    images = TorchImages(range(20))
    images.targets = [-1] * 20
    with pytest.raises(ValueError, match=r"label of train/000000 must be a class index from 0 to 1, got -1"):
        load_data(images)
