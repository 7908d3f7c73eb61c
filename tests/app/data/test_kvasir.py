import shutil

import pytest

from snella_app.data.load import load_data

from .mask_folders import write_pairs


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path / "Kvasir-SEG", 25, ending=".jpg")


def test_the_split_files_define_the_test_split(folder):
    names = [f"{index:03}" for index in range(25)]
    (folder / "train.txt").write_text("\n".join(names[:20]))
    (folder / "val.txt").write_text("\n".join(f"images/{name}.jpg" for name in names[20:]))
    data = load_data(f"kvasir:{folder}")
    assert data.classes == ["background", "polyp"]
    assert data.test.names == [f"images/{name}.png" for name in names[20:]]
    assert len(data.train) + len(data.val) == 20


def test_without_split_files_names_define_the_split_with_a_note(folder):
    data = load_data(f"kvasir:{folder}")
    assert len(data.test) == 3  # 12%
    assert any("3 test images are selected by SHA-256 of their names" in note for note in data.notes)
    again = load_data(f"kvasir:{folder}", seed=5)
    assert again.test.names == data.test.names and again.train.names != data.train.names


def test_inconsistent_split_files_are_rejected(folder):
    (folder / "train.txt").write_text("000\n001\n002\nghost\n")
    with pytest.raises(ValueError, match=r"train.txt exists but val.txt does not; add it, or remove train.txt"):
        load_data(f"kvasir:{folder}")
    (folder / "val.txt").write_text("002\n003\n")
    with pytest.raises(ValueError) as caught:
        load_data(f"kvasir:{folder}")
    assert "1 name in train.txt without an image and a mask: ghost" in str(caught.value)
    assert "1 name in both train.txt and val.txt: 002" in str(caught.value)


def test_a_test_copy_under_another_name_is_detected_by_its_pixels(folder):
    shutil.copy(folder / "images" / "000.png", folder / "images" / "024.png")
    (folder / "train.txt").write_text("\n".join(f"{index:03}" for index in range(20)))
    (folder / "val.txt").write_text("\n".join(f"{index:03}" for index in range(20, 25)))
    notes = load_data(f"kvasir:{folder}").notes
    assert any("1 of 5 test images is also a training image" in note and "images/000.png" in note for note in notes)


def test_masks_with_more_labels_name_the_classes(folder):
    shutil.rmtree(folder)
    write_pairs(folder, 25, classes=4)
    with pytest.raises(ValueError, match=r"labels out of range 0 to 1 \(the classes are background, polyp\).*2, 3"):
        load_data(f"kvasir:{folder}")


def test_split_files_may_start_with_a_byte_order_mark(folder):
    names = [f"{index:03}" for index in range(25)]
    (folder / "train.txt").write_text("\n".join(names[:20]), encoding="utf-8-sig")
    (folder / "val.txt").write_text("\n".join(names[20:]), encoding="utf-8-sig")
    assert len(load_data(f"kvasir:{folder}").test) == 5
