import json
import shutil

import pytest

from snella_app.data.benchmarks import FGVC_DATASETS
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from tests.benchmark_folders import write_fgvc

TINY = {"train": 9, "val": 3, "test": 6}


@pytest.fixture
def cub(tmp_path):
    return write_fgvc(tmp_path / "fgvc" / "cub", "images", [3, 17, 200], TINY)


def load(folder, **options):
    return load_data(f"fgvc:{folder}", DataConfig(strict_sizes=False, **options))


def test_there_are_five_datasets():
    assert [data.classes for data in FGVC_DATASETS.values()] == [200, 555, 102, 120, 196]
    assert sum(sum(data.sizes) for data in FGVC_DATASETS.values()) == 105_304


def test_a_dataset_loads_with_its_splits_and_class_names(cub):
    data = load(cub)
    assert (len(data.train), len(data.val), len(data.test)) == (9, 3, 6)
    assert data.classes == ["003.Bird_3", "017.Bird_17", "200.Bird_200"] and data.train.labels[:4] == [0, 1, 2, 0]
    assert data.train.image(0).size == (8, 8) and not data.is_resized_whole


def test_class_indices_are_shared_across_lists(cub):
    """Indices by list would map class id 200 to 1 in training and to 2 in test."""
    train = json.loads((cub / "train.json").read_text())
    (cub / "train.json").write_text(json.dumps({file: label for file, label in train.items() if label != 17}))
    data = load(cub)
    assert set(data.train.labels) == {0, 2} and set(data.test.labels) == {0, 1, 2}
    assert all(
        data.classes[label] == name.split("/")[0] for name, label in zip(data.test.names, data.test.labels, strict=True)
    )


def test_string_ids_are_sorted_numerically(cub):
    for split in TINY:
        file = cub / f"{split}.json"
        file.write_text(json.dumps({name: str(label) for name, label in json.loads(file.read_text()).items()}))
    assert load(cub).train.labels[:3] == [0, 1, 2]


def test_classes_without_separate_folders_use_their_ids_as_names(tmp_path):
    folder = write_fgvc(tmp_path / "oxfordflower", "", [1, 2, 10], TINY)
    for split in TINY:
        entries = json.loads((folder / f"{split}.json").read_text())
        (folder / "jpg").mkdir(exist_ok=True)
        for name in entries:
            shutil.move(folder / name, folder / "jpg" / name.split("/")[1])
        (folder / f"{split}.json").write_text(json.dumps({f"jpg/{n.split('/')[1]}": c for n, c in entries.items()}))
    assert load(folder).classes == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("folder", "images", "name"),
    [("CUB_200_2011", "images", "cub"), ("stanforddogs", "Images", "stanforddog"), ("stanfordcars", "", "stanfordcar")],
)
def test_alternative_folder_names_are_accepted(folder, images, name, tmp_path):
    write_fgvc(tmp_path / folder, images, [1, 2], TINY)
    for requested in (folder, name):
        assert load(tmp_path / requested).name == name


def test_the_final_protocol_trains_on_validation_and_the_official_one_does_not(cub):
    final, official = load(cub, protocol="final"), load(cub, protocol="official")
    assert (len(final.train), final.val, len(final.test)) == (12, None, 6)
    assert (len(official.train), official.val, len(official.test)) == (9, None, 6)


def test_trainval_replaces_train_and_val_under_every_protocol(cub):
    joined = {}
    for split in ("train", "val"):
        joined |= json.loads((cub / f"{split}.json").read_text())
        (cub / f"{split}.json").unlink()
    (cub / "trainval.json").write_text(json.dumps(joined))
    data = load(cub)
    assert len(data.train) + len(data.val) == 12 and len(data.val) >= 3
    final = load(cub, protocol="final")
    assert (len(final.train), final.val) == (12, None)
    note = "cub: no train.json; trainval.json replaces train.json and val.json"
    assert data.notes[0] == final.notes[0] == note


def test_other_sizes_and_classes_are_rejected_and_listed(cub):
    message = (
        r"fgvc:.*cub does not match the benchmark's cub: 200 classes must have images, got 3; "
        r"train must have 5,394 images, got 9; val must have 600 images, got 3; test must have 5,794 images, got 6"
    )
    with pytest.raises(ValueError, match=message):
        load_data(f"fgvc:{cub}")


def test_more_classes_than_in_the_benchmark_are_always_rejected(tmp_path):
    folder = write_fgvc(tmp_path / "oxfordflower", "", range(1, 104), {"train": 103, "val": 3, "test": 3})
    with pytest.raises(ValueError, match="lists must have 102 classes, got 103"):
        load(folder)


def test_missing_files_and_malformed_lists_are_reported_in_one_message(cub):
    shutil.rmtree(cub / "images" / "017.Bird_17")
    (cub / "val.json").write_text('{"a.jpg": 1,')
    with pytest.raises(ValueError) as caught:
        load(cub)
    for part in (
        "val.json must be a JSON file:",
        "3 of 9 files listed in train do not exist in '",
        "2 of 6 files listed in test do not exist",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.jpg": "²"}, r"test.json must map each image to an integer; invalid entries \(1\): 'a.jpg': '²'"),
        ([1, 2], r"test.json must contain an object \{image path: class\}, got '\[1, 2\]'"),
        ({"a.jpg": "bird"}, r"test.json must map each image to an integer; invalid entries \(1\): 'a.jpg': 'bird'"),
        ({"a.jpg": 1.5, "b.jpg": True}, r"invalid entries \(2\): 'a.jpg': 1.5, 'b.jpg': True"),
    ],
)
def test_malformed_lists_are_rejected(content, message, cub):
    (cub / "test.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(cub)


def test_missing_lists_are_reported(cub):
    (cub / "test.json").unlink()
    with pytest.raises(
        ValueError, match=r"missing in '.*cub': test.json; the layout is DATASET/\{train,val,test\}.json"
    ):
        load(cub)


def test_an_image_in_two_lists_is_rejected(cub):
    train, test = (json.loads((cub / f"{split}.json").read_text()) for split in ("train", "test"))
    first = next(iter(train))
    (cub / "test.json").write_text(json.dumps({**test, first: train[first]}))
    with pytest.raises(ValueError, match=r"1 image in both train and test: train_0\.jpg"):
        load(cub)


def test_an_unknown_or_missing_dataset_error_suggests_similar_names(tmp_path):
    with pytest.raises(ValueError, match=r"got 'standforddog'; nearest: stanforddog"):
        load_data(f"fgvc:{tmp_path}/standforddog")
    with pytest.raises(ValueError, match=r"got 'xyz'; datasets are cub, nabirds"):
        load_data(f"fgvc:{tmp_path}/xyz")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*/nabirds'; the layout is DATASET/\{train"):
        load_data(f"fgvc:{tmp_path}/nabirds")
