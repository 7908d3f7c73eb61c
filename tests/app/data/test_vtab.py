import re
import shutil

import pytest

from snella_app.data.benchmarks import VTAB_TASKS
from snella_app.data.load import data_folder, load_data
from snella_app.data.options import DataConfig
from tests.benchmark_folders import write_noise, write_vtab

TINY = {"train800": 12, "val200": 4, "test": 8}


@pytest.fixture
def kitti(tmp_path):
    return write_vtab(tmp_path / "vtab-1k" / "kitti", 4, TINY)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Smallest task at its real size."""
    return write_vtab(tmp_path_factory.mktemp("vtab") / "kitti", 4, {"train800": 800, "val200": 200, "test": 711})


def names(part):
    return sorted({name.split("/")[1] for name in part.names})


def test_there_are_nineteen_tasks_in_three_groups():
    groups = [task.group for task in VTAB_TASKS.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert sum(task.classes for task in VTAB_TASKS.values()) == 940


def test_a_complete_task_loads_without_notes(complete):
    data = load_data(f"vtab:{complete}")
    assert (len(data.train), len(data.val), len(data.test), len(data.classes)) == (800, 200, 711, 4)
    assert data.notes == [] and data.is_resized_whole
    assert data.train.labels[:5] == [0, 1, 2, 3, 0] and data.train.names[0] == "images/train800/000000.jpg"
    assert data.train.image(0).size == (8, 8)


def test_the_final_protocol_trains_on_both_splits(complete):
    standard, final = (load_data(f"vtab:{complete}", DataConfig(protocol=name)) for name in ("standard", "final"))
    assert final.val is None and len(final.train) == 1000
    assert final.train.names == standard.train.names + standard.val.names
    assert final.train.labels == standard.train.labels + standard.val.labels
    assert final.test.names == standard.test.names
    same = [final.train.image(index).tobytes() for index in (0, 999)]
    assert same == [standard.train.image(0).tobytes(), standard.val.image(199).tobytes()]


def test_the_official_protocol_trains_on_both_splits(kitti):
    official = load_data(f"vtab:{kitti}", DataConfig(protocol="official", strict_sizes=False))
    assert official.val is None and names(official.train) == ["train800", "val200"] and names(official.test) == ["test"]


@pytest.mark.parametrize(
    ("folder", "requested", "name"), [("cifar100", "cifar", "cifar"), ("pets", "pets", "oxford_iiit_pet")]
)
def test_alternative_folder_names_are_accepted(folder, requested, name, tmp_path):
    write_vtab(tmp_path / folder, VTAB_TASKS[name].classes, {"train800": 100, "val200": 4, "test": 4})
    data = load_data(f"vtab:{tmp_path / requested}", DataConfig(strict_sizes=False))
    assert data.name == name and len(data.classes) == VTAB_TASKS[name].classes


def test_missing_lists_are_derived_from_the_joint_list(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "kitti")
    for name in ("train800", "val200"):
        (folder / f"{name}.txt").unlink()
    data = load_data(f"vtab:{folder}")
    assert (len(data.train), len(data.val)) == (800, 200) and names(data.val) == ["train800val200"]
    assert data.notes == ["kitti: train800 and val200 are the first 800 and the last 200 of train800val200.txt"]


def test_other_sizes_are_rejected_and_listed(kitti):
    message = (
        r"vtab:.*kitti does not match the benchmark's kitti: train800 must have 800 images, got 12; val200 must have "
        r"200 images, got 4; train800val200 must have 1,000 images, got 16; test must have 711 images, got 8; "
        r"to use it anyway, pass strict_sizes=False"
    )
    with pytest.raises(ValueError, match=message):
        load_data(f"vtab:{kitti}")


def test_allowed_other_sizes_are_noted(kitti):
    data = load_data(f"vtab:{kitti}", DataConfig(strict_sizes=False))
    assert "differs from the benchmark: test must have 711 images, got 8" in data.notes


def edit_list(folder, name, change):
    file = folder / f"{name}.txt"
    file.write_text(change(file.read_text()))


def test_all_errors_are_reported_in_one_message(kitti):
    (kitti / "images/test/000003.jpg").unlink()
    (kitti / "images/test/000004.jpg").unlink()
    edit_list(kitti, "train800", lambda text: text.replace("000001.jpg 1", "000001.jpg 7"))
    edit_list(kitti, "val200", lambda text: text + "images/val200/000000.jpg 0\nx.jpg --1\nx.jpg ²\n")
    with pytest.raises(ValueError) as caught:
        load_data(f"vtab:{kitti}", DataConfig(strict_sizes=False))
    for part in (
        "val200.txt must have lines such as 'images/test/000000.jpg 3'; malformed lines (2): line 6 is 'x.jpg --1', l",
        "2 of 8 files listed in test do not exist in",
        "images/test/000003.jpg, images/test/000004.jpg",
        "labels must be in 0 … 3; train800 has 7",
        "val200 has 1 duplicate file: images/val200/000000.jpg",
        "train800val200.txt must list the labels of train800.txt, then those of val200.txt",
    ):
        assert part in str(caught.value)
    assert "strict_sizes" not in str(caught.value)


def test_missing_and_empty_lists_are_reported(kitti):
    (kitti / "val200.txt").unlink()
    edit_list(kitti, "test", lambda text: "")
    with pytest.raises(ValueError, match=r"test.txt is empty; missing in '.*kitti': val200.txt; the layout is TASK/\{"):
        load_data(f"vtab:{kitti}", DataConfig(strict_sizes=False))


def test_classes_without_images_are_counted(kitti):
    for name in ("train800", "val200", "train800val200", "test"):
        edit_list(kitti, name, lambda text: re.sub(" 3\n", " 2\n", text))
    with pytest.raises(ValueError, match="4 classes must have images, got 3; missing: 3"):
        load_data(f"vtab:{kitti}")


def test_a_test_image_in_the_training_list_is_rejected(kitti):
    edit_list(kitti, "test", lambda text: text + "images/train800/000002.jpg 2\n")
    with pytest.raises(ValueError, match=r"the benchmark's kitti: 1 image in both train800 and test: 000002\.jpg$"):
        load_data(f"vtab:{kitti}", DataConfig(strict_sizes=False))


def test_many_copies_under_other_names_are_rejected_once(kitti):
    shutil.copy(kitti / "images/train800/000002.jpg", kitti / "images/test/000005.jpg")
    with pytest.raises(ValueError) as caught:
        load_data(f"vtab:{kitti}", DataConfig(strict_sizes=False))
    assert str(caught.value).endswith(
        "does not match the benchmark's kitti: 1 of 8 images of test with copies in train800: "
        "images/test/000005.jpg = images/train800/000002.jpg"
    )


@pytest.mark.parametrize("source", ["train800", "val200"])
def test_a_few_copies_are_noted_once(source, tmp_path):
    folder = write_vtab(tmp_path / "kitti", 4, {**TINY, "test": 30})
    shutil.copy(folder / f"images/{source}/000001.jpg", folder / "images/test/000005.jpg")
    notes = [
        note for note in load_data(f"vtab:{folder}", DataConfig(strict_sizes=False)).notes if "test/000005.jpg" in note
    ]
    assert len(notes) == 1 and notes[0].startswith(f"1 of 30 images of test with copies in {source}: ")


def test_files_of_equal_size_but_other_content_are_not_copies(tmp_path):
    folder = write_vtab(tmp_path / "kitti", 4, TINY)
    for split in ("train800", "test"):
        file = folder / f"images/{split}/000000.jpg"
        write_noise(file.with_suffix(".bmp"), (len(split), 1))
        file.with_suffix(".bmp").rename(file)
    assert (folder / "images/train800/000000.jpg").stat().st_size == (folder / "images/test/000000.jpg").stat().st_size
    assert not any("copies" in note for note in load_data(f"vtab:{folder}", DataConfig(strict_sizes=False)).notes)


def test_an_unknown_task_error_suggests_similar_names(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"vtab:.*/clevr_counts must end with the name of a task, got 'clevr_counts'; nearest: clevr_count",
    ):
        load_data(f"vtab:{tmp_path}/clevr_counts")
    with pytest.raises(ValueError, match="got 'xyz'; tasks are cifar, caltech101"):
        load_data(f"vtab:{tmp_path}/xyz")


def test_a_missing_folder_error_contains_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*/dtd'; the layout is TASK/\{train800"):
        load_data(f"vtab:{tmp_path}/dtd")


def test_val_size_requires_a_validation_split(kitti):
    with pytest.raises(ValueError, match="val_size must be omitted because protocol=final has no val split, got 3"):
        load_data(f"vtab:{kitti}", DataConfig(protocol="final", val_size=3, strict_sizes=False))


def test_a_run_finds_its_data_under_an_alternative_folder_name(tmp_path):
    (tmp_path / "cifar100").mkdir()
    assert data_folder(f"vtab:{tmp_path}/cifar") == tmp_path / "cifar100"
    assert data_folder(f"vtab:{tmp_path}/dtd") == tmp_path / "dtd" and data_folder("digits") is None
    assert data_folder(f"fgvc:{tmp_path}/other") == tmp_path / "other"


def test_a_copy_in_a_held_out_fold_is_noted_once(tmp_path):
    folder = write_vtab(tmp_path / "kitti", 4, {**TINY, "train800": 40, "test": 30})
    shutil.copy(folder / "images/train800/000000.jpg", folder / "images/train800/000004.jpg")
    separated = 0
    for seed in range(4):
        data = load_data(f"vtab:{folder}", DataConfig(strict_sizes=False, folds=2, fold=1), seed=seed)
        held_out = {name[-10:] for name in data.val.names if name.startswith("images/train800/")}
        is_separated = len(held_out & {"000000.jpg", "000004.jpg"}) == 1
        notes = [note for note in data.notes if "000004.jpg" in note and "000000.jpg" in note]
        assert len(notes) == is_separated
        separated += is_separated
    assert 0 < separated < 4


def test_a_list_may_start_with_a_byte_order_mark(kitti):
    for file in kitti.glob("*.txt"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    data = load_data(f"vtab:{kitti}", DataConfig(strict_sizes=False))
    assert data.train.names[0] == "images/train800/000000.jpg"
