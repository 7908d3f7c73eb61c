import os
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from snella_app.data import copies, images
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig


def load(root, seed=0, **options):
    return load_data(f"folder:{root}", DataConfig(**options), seed=seed)


def test_class_folders_become_a_stratified_split_in_three(write_images):
    data = load(write_images({"dog": 20, "cat": 10}), seed=3)
    assert data.classes == ["cat", "dog"] and data.name == "photos"
    counts = [Counter(part.labels) for part in (data.train, data.val, data.test)]
    assert counts == [{0: 6, 1: 12}, {0: 2, 1: 4}, {0: 2, 1: 4}]
    names = [name for part in (data.train, data.val, data.test) for name in part.names]
    assert len(set(names)) == 30 and set(names) == {
        f"{c}/{i:03}.png" for c, n in (("cat", 10), ("dog", 20)) for i in range(n)
    }
    assert all(
        (name.startswith("dog")) == bool(label) for name, label in zip(data.val.names, data.val.labels, strict=True)
    )
    assert data.description == "photos: 30 images in 2 classes; train 18 · val 6 · test 6"


def test_an_item_is_the_image_of_its_name(write_images):
    root = write_images({"a": 5, "b": 5})
    data = load(root)
    for index, name in enumerate(data.test.names):
        assert data.test.image(index).tobytes() == Image.open(root / name).tobytes()


@pytest.mark.parametrize("word", ["val", "validation", "valid", "Val", "dev"])
def test_existing_splits_are_used(word, write_images):
    data = load(write_images({"train/a": 4, "train/b": 3, f"{word}/a": 2, f"{word}/b": 1, "test/a": 1, "test/b": 2}))
    assert [Counter(part.labels) for part in (data.train, data.val, data.test)] == [
        {0: 4, 1: 3},
        {0: 2, 1: 1},
        {0: 1, 1: 2},
    ]
    assert data.val.names == [f"{word}/a/000.png", f"{word}/a/001.png", f"{word}/b/000.png"]


def test_a_missing_validation_split_is_created_from_training(write_images):
    data = load(write_images({"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 2}))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)
    assert all(name.startswith("train/") for name in data.val.names)


def test_a_folder_with_splits_but_without_test_has_no_test_split(write_images):
    root = write_images({"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    assert load(root).test is None
    with pytest.raises(ValueError, match="test_size must be omitted because 'photos' has no test split, got 2"):
        load(root, test_size=2)


def test_a_class_named_train_is_a_class(write_images):
    assert load(write_images({"bus": 5, "train": 5})).classes == ["bus", "train"]


def test_hidden_files_are_ignored_and_other_types_noted(write_images):
    root = write_images({"a": 5, "b": 5, ".cache": 5, "a/.thumbs": 5})
    (root / "a" / ".DS_Store").write_bytes(b"x")
    (root / "a" / "._000.png").write_bytes(b"x")
    (root / "a" / "labels.txt").write_bytes(b"x")
    (root / "b" / "photo.heic").write_bytes(b"x")
    data = load(root)
    assert data.classes == ["a", "b"]
    assert len(data.train) + len(data.val) + len(data.test) == 10
    (note,) = data.notes
    assert note.startswith("skipped 2 files other than .png,") and "1 .txt" in note and "1 .heic" in note


def test_images_in_nested_folders_belong_to_the_class(write_images):
    data = load(write_images({"a/day": 3, "a/night/late": 2, "b": 5}))
    assert data.classes == ["a", "b"]
    assert len(data.train) + len(data.val) + len(data.test) == 10


def test_linked_folders_are_entered_once(write_images, tmp_path):
    root = write_images({"a": 5, "b": 5})
    root.rename(tmp_path / "more")
    root = write_images({"a": 5, "b": 5})
    (root / "a" / "more").symlink_to(tmp_path / "more" / "b", target_is_directory=True)
    (root / "a" / "again").symlink_to(tmp_path / "more" / "b", target_is_directory=True)
    (root / "a" / "cycle").symlink_to(root / "a", target_is_directory=True)
    assert sum(map(len, (data := load(root)).parts.values())) == 15 and data.classes == ["a", "b"]


def test_suffixes_are_case_insensitive(write_images):
    root = write_images({"a": 5, "b": 5}, suffix=".JPG")
    assert load(root).train.image(0).mode == "RGB"


def break_files(root, count):
    for index in range(count):
        file = root / "a" / f"{index:03}.png"
        file.write_bytes(file.read_bytes()[:60] if index % 2 else b"no image")


def test_broken_images_are_listed_and_counted(write_images):
    root = write_images({"a": 6, "b": 5})
    break_files(root, 2)
    with pytest.raises(ValueError) as caught:
        load(root)
    message = str(caught.value)
    assert "2 of 11 images in" in message and "--skip-corrupt" in message
    assert "a/000.png (unknown image format)" in message and "a/001.png (" in message


def test_five_of_many_broken_images_are_listed(write_images):
    root = write_images({"a": 12, "b": 5})
    break_files(root, 8)
    with pytest.raises(ValueError, match=r"8 of 17 images .*a/004\.png .* and 3 more\. Remove") as caught:
        load(root)
    assert "a/005.png" not in str(caught.value)


def test_skip_corrupt_skips_broken_images_with_a_note(write_images):
    root = write_images({"a": 7, "b": 5})
    break_files(root, 2)
    data = load(root, skip_corrupt=True)
    names = data.train.names + data.val.names + data.test.names
    assert len(names) == 10 and not {"a/000.png", "a/001.png"} & set(names)
    (note,) = data.notes
    assert note.startswith("skipped 2 broken images: a/000.png (")


def test_a_class_of_only_broken_images_is_rejected(write_images):
    root = write_images({"a": 2, "b": 5, "c": 5})
    break_files(root, 2)
    with pytest.raises(ValueError, match="class folders without readable images: 'a'"):
        load(root, skip_corrupt=True)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 5, "b": 0, "c": 5}, r"without readable images: 'b'; remove them or add images \(\.png, \.jpg"),
        ({"a": 5}, "at least two classes are required, got one: 'a'; .* PATH/class/image.jpg, one folder per class"),
        (
            {".": 3},
            r"'.*photos' cannot be used: it has no class folders \(3 images without a class\); .* PATH/class/",
        ),
        ({".": 0}, r"folder '.*photos' cannot be used: it is empty; the expected layout is PATH/class/image\.jpg"),
        (
            {"train/a": 2, "train/b": 2, "val/c": 1},
            "classes of 'val' missing from training: 'c'; training has 'a', 'b'",
        ),
        (
            {"train/a": 2, "train/b": 2, "test/B": 1},
            r"classes of 'test' missing from training: 'B' \(nearest: 'b'\); training has 'a', 'b'",
        ),
        ({"train/cats": 2, "train/dogs": 2, "val/cat": 1}, r"missing from training: 'cat' \(nearest: 'cats'\)"),
        ({"train/CATS": 2, "train/DOGS": 2, "val/cats": 1}, r"missing from training: 'cats' \(nearest: 'CATS'\)"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 0}, "without readable images: 'val/b'"),
        ({"val/a": 2, "test/a": 2}, "has 'test', 'val' but no 'train' with class folders; add PATH/train/"),
        ({"train/a": 2, "val/a": 2, "valid/a": 2}, "has two 'val' splits: 'val' and 'valid'"),
        ({"a": 9, "b": 2}, "every class needs at least 3 images to create a 'test' split.*'b' has 2"),
        ({"train/a": 9, "train/b": 1}, "every class needs at least 2 images to create a 'val' split.*'b' has 1"),
    ],
)
def test_a_folder_without_a_classification_problem_is_rejected(counts, message, write_images):
    with pytest.raises(ValueError, match=message):
        load(write_images(counts))


def test_training_and_testing_are_splits(write_images):
    data = load(write_images({"training/a": 4, "training/b": 4, "testing/a": 2, "testing/b": 2}))
    assert data.classes == ["a", "b"] and len(data.test) == 4


def test_skipped_files_and_folders_are_noted(write_images):
    root = write_images({"train/a": 4, "train/b": 4, "test": 3, "extra/a": 2, ".": 1})
    assert load(root).notes == [
        "skipped 1 image outside class folders, e.g. '000.png'",
        "skipped 'extra' with 2 images, 'test' with 3 images: not a split with class folders; "
        "split names are dev, test, testing, train, training, val, valid, validation",
    ]


def test_an_extra_folder_level_and_a_label_table_are_reported(write_images):
    root = write_images({"photos/cats": 3, "photos/dogs": 3})
    with pytest.raises(ValueError, match="got one: 'photos'; its subfolders 'cats', 'dogs' may be the"):
        load(root)
    (root / "photos").rename(root.parent / "loose")
    (root / "images").mkdir()
    (root.parent / "loose" / "cats" / "000.png").rename(root / "images" / "000.png")
    (root / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(ValueError, match=rf"in 'metadata\.csv', pass --data csv:{root}/metadata\.csv$"):
        load(root)
    (root / "metadata.csv").rename(root / "metadata.jsonl")
    with pytest.raises(ValueError, match=rf"in 'metadata\.jsonl', pass --data hf:{root}$"):
        load(root)
    (root / "metadata.jsonl").rename(root / "labels.xlsx")
    with pytest.raises(ValueError, match=r"To use the labels in 'labels\.xlsx', save it as CSV"):
        load(root)


def test_imbalanced_classes_are_noted(write_images):
    (note,) = load(write_images({"a": 40, "b": 10})).notes
    assert note.startswith("classes are imbalanced: 24 training images of 'a', 6 of 'b'")


def test_images_in_two_splits_are_noted(write_images):
    root = write_images({"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    (root / "test/a/copy.png").write_bytes((root / "train/a/001.png").read_bytes())
    (note,) = load(root).notes
    assert note.startswith("1 of 5 test images is also a training image, e.g. 'train/a/001.png' is 'test/a/copy.png'")


def test_validation_images_among_the_test_images_are_noted(write_images):
    root = write_images({"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    for part, index in (("train", 0), ("val", 90), ("test", 180)):  # the fixture draws equal images for all splits
        for file in (root / part).rglob("*.png"):
            pixels = np.random.default_rng([index, ord(file.parent.name), int(file.stem)]).integers(0, 256, (12, 12, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    assert load(root).notes == []
    (root / "test/a/copy.png").write_bytes((root / "val/a/001.png").read_bytes())
    (note,) = load(root).notes
    assert note.startswith("1 of 5 test images is also a validation image, e.g. 'val/a/001.png' is 'test/a/copy.png'")
    assert note.endswith("; test results are optimistic; remove the copies from one split")


def test_thumbnails_are_not_compared_for_too_many_pairs(write_images, monkeypatch):
    root = write_images({"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    monkeypatch.setattr(copies, "_MAX_PAIRS", 16)
    text = r"4 test images were compared with \d training images by file content only, because there are more than 16"
    assert any(re.match(text, warning) for warning in load(root).warnings)


def test_an_unreadable_subfolder_is_an_error(write_images, monkeypatch):
    root = write_images({"a/deep": 4, "b": 4})
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(PermissionError, match="deep"):
        load(root)


def test_images_of_other_suffixes_are_detected_by_content(write_images, monkeypatch):
    root = write_images({"a": 5, "b": 5})
    (root / "a/000.png").rename(root / "a/000.jpeg_large")
    (root / "a/photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    monkeypatch.setattr(images, "has_heic", lambda: False)
    data = load(root)
    assert len(data.train) + len(data.val) + len(data.test) == 10
    assert data.notes[0].endswith(
        "1 HEIC; HEIC images need pillow-heif: pip install 'snella[heic]', or save them as JPEG"
    )


def test_two_images_per_class_suffice_without_a_test_split(write_images):
    root = write_images({"a": 2, "b": 2})
    with pytest.raises(ValueError, match=r"or disable the test split with --test-fraction 0 \(test_fraction=0\)"):
        load(root)
    assert load(root, test_fraction=0).test is None


def test_several_errors_are_reported_together(write_images):
    root = write_images({"train/a": 2, "train/b": 0, "val/c": 1})
    with pytest.raises(
        ValueError, match=r"without readable images: 'train/b'; remove .*; classes of 'val' missing from training: 'c'"
    ):
        load(root)


def test_a_missing_folder_error_suggests_similar_names(write_images):
    root = write_images({"a": 3, "b": 3})
    missing = root.parent / "fotos" / "2024"
    with pytest.raises(FileNotFoundError, match=f"folder:{missing}: no folder 'fotos' in .*nearest: 'photos'"):
        load(missing)
    with pytest.raises(FileNotFoundError, match=r"no folder 'zzz' in .* has no folder with a similar name"):
        load(root.parent / "zzz")


def test_an_empty_path_is_rejected():
    with pytest.raises(ValueError, match=r"data must name a folder after 'folder:', got 'folder:'; write folder:PATH"):
        load("")


def test_a_file_is_rejected_as_a_folder(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=re.escape(f"folder:{tmp_path}/x.png must be a folder with one folder per class")
    ):
        load(tmp_path / "x.png")


def test_a_class_only_in_training_is_noted(write_images):
    data = load(write_images({"train/a": 4, "train/b": 4, "val/a": 2}))
    (note,) = data.notes
    assert note.startswith("class 'b' has no validation images; add validation images, ") and data.warnings == [note]


@pytest.mark.parametrize(("name", "hint"), [("labels.jsonl", ""), ("metadata.jsonl", "pass --data hf:")])
def test_only_metadata_files_are_recommended_as_hugging_face_datasets(name, hint, write_images):
    root = write_images({"images": 8})
    (root / name).write_text("{}")
    with pytest.raises(ValueError, match="at least two classes are required") as caught:
        load_data(f"folder:{root}")
    assert hint in str(caught.value) and (name in str(caught.value)) == bool(hint)


def test_a_name_that_is_too_long_is_reported():
    with pytest.raises(
        FileNotFoundError, match=r"folder:x*: no folder 'x*' in '.*'; '.*' has no folder with a similar"
    ):
        load_data(f"folder:{'x' * 300}")
