import re
import shutil

import numpy as np
import pytest
from PIL import Image, features
from rich.console import Console

from snella_app.data import images
from snella_app.data.check import check_data
from snella_app.data.datasets import MaskDataset
from snella_app.data.images import read_label_map
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig

from .mask_folders import write_pairs


@pytest.mark.parametrize("white", [1, 255])
def test_black_and_white_masks_are_binary(white, tmp_path):
    data = load_data(f"masks:{write_pairs(tmp_path / 'm', 10, white=white)}")
    assert data.classes == ["background", "foreground"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 2, 2]
    assert set(np.unique(data.train.mask(0))) == {0, 1}
    assert data.label_names == ["foreground"]


def test_label_maps_define_the_number_of_classes(tmp_path):
    root = write_pairs(tmp_path / "m", 10, classes=4)
    data = load_data(f"masks:{root}")
    assert data.classes == ["background", "class 1", "class 2", "class 3"]
    (root / "classes.txt").write_text("nothing\nleaf\nstem\nroot\nrare\n")
    assert load_data(f"masks:{root}").classes == ["nothing", "leaf", "stem", "root", "rare"]


def test_palette_masks_are_read_as_indices(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    mask.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 250])
    mask.save(tmp_path / "m.png")
    labels, is_thresholded = read_label_map(tmp_path / "m.png")
    assert labels.tolist() == [[0, 1], [2, 1]] and not is_thresholded


def test_images_with_masks_are_detected_by_content(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "m", 10)
    first, second = sorted((root / "images").iterdir())[:2]
    first.rename(first.with_suffix(".jpe"))
    assert sum(map(len, load_data(f"masks:{root}").parts.values())) == 10
    second.rename(second.with_suffix(".heic")).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    monkeypatch.setattr(images, "has_heic", lambda: False)
    with pytest.raises(
        ValueError, match=r"images/.*\.heic is an HEIC image; HEIC images need pillow-heif: pip install"
    ):
        load_data(f"masks:{root}")


def test_masks_without_foreground_are_accepted_with_a_list_of_classes(tmp_path):
    root = write_pairs(tmp_path / "m", 10)
    for file in (root / "masks").iterdir():
        with Image.open(file) as mask:
            mask.load()
        Image.new("L", mask.size).save(file)
    with pytest.raises(ValueError, match=r"at least two labels, got only 0; list absent classes in classes\.txt"):
        load_data(f"masks:{root}")
    (root / "classes.txt").write_text("background\nleaf\n")
    assert load_data(f"masks:{root}").classes == ["background", "leaf"]


@pytest.mark.parametrize("ending", [".jpg", ".avif"])
def test_masks_in_lossy_formats_are_thresholded_at_128_with_a_note(ending, tmp_path):
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = load_data(f"masks:{write_pairs(tmp_path / 'm', 10, ending=ending)}")
    note = next(note for note in data.notes if "10 masks in a lossy format (JPEG, WebP, AVIF)" in note)
    assert "at least 128" in note
    exact = load_data(f"masks:{write_pairs(tmp_path / 'exact', 10)}")
    assert np.mean(data.train.mask(0) != exact.train.mask(0)) < 0.02


def test_black_and_white_masks_may_have_lossy_and_lossless_formats(tmp_path):
    root = write_pairs(tmp_path / "m", 10)
    for file in sorted((root / "masks").iterdir())[:5]:
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    data = load_data(f"masks:{root}")
    assert data.classes == ["background", "foreground"]
    assert all(set(np.unique(part.mask(i))) == {0, 1} for part in data.parts.values() for i in range(len(part)))


@pytest.mark.parametrize("val", ["val", "valid"])
def test_existing_splits_are_used(val, tmp_path):
    for part, count in (("train", 4), (val, 2), ("test", 3)):
        write_pairs(tmp_path / "m" / part, count)
    data = load_data(f"masks:{tmp_path / 'm'}")
    assert [len(part) for part in (data.train, data.val, data.test)] == [4, 2, 3]
    assert data.test.names[0] == "test/images/000.png"
    # every split has the same noise
    assert any("3 of 3 test images are also training images" in note for note in data.notes)


def test_a_copy_in_another_split_is_one_warning(tmp_path):
    root = write_pairs(tmp_path / "m" / "train", 6)
    write_pairs(tmp_path / "other", 9)
    for kind in ("images", "masks"):
        (tmp_path / "m" / "val" / kind).mkdir(parents=True)
        for index in (6, 7, 8):
            shutil.copy(tmp_path / "other" / kind / f"{index:03}.png", tmp_path / "m" / "val" / kind)
    Image.open(root / "images" / "002.png").save(tmp_path / "m" / "val" / "images" / "007.png", compress_level=1)
    data = load_data(f"masks:{tmp_path / 'm'}")
    (warning,) = data.warnings
    assert warning.startswith(
        "1 of 3 val images is also a training image (1 of them matched by 16×16 thumbnails), e.g. "
    )
    assert "'train/images/002.png' is 'val/images/007.png'" in warning
    assert sum("also" in note for note in data.notes) == 1


def test_image_and_mask_are_transformed_together_and_reproducibly(tmp_path):
    from snella_app.data.transforms import build_transform

    root = write_pairs(tmp_path / "m", 6)
    for index in range(6):  # bright pixels are foreground
        labels = np.asarray(Image.open(root / "masks" / f"{index:03}.png"))
        Image.fromarray(np.repeat(labels[..., None], 3, 2)).save(root / "images" / f"{index:03}.png")
    config = {"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_mode": "squash", "crop_pct": 1.0}
    data = load_data(f"masks:{root}").train
    data = data.with_transform(build_transform(config, augment="crop"))
    first = [data[index] for index in range(len(data))]
    for image, mask in first:
        assert mask.shape == image.shape[1:] and mask.dtype.is_signed
        assert ((image[0] > 0.5) == mask.bool()).float().mean() > 0.93
    again = [data[index] for index in reversed(range(len(data)))][::-1]
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(first, again, strict=True))
    data.set_epoch(1)
    assert any((data[index][1] != first[index][1]).any() for index in range(len(data)))


def test_all_file_errors_are_reported_together(tmp_path):
    root = write_pairs(tmp_path / "m", 9, classes=3)
    (root / "masks" / "000.png").unlink()
    (root / "images" / "001.png").unlink()
    Image.new("L", (7, 5)).save(root / "masks" / "002.png")
    labels = np.asarray(Image.open(root / "masks" / "003.png")).copy()
    labels[0, 0] = 77
    Image.fromarray(labels).save(root / "masks" / "003.png")
    (root / "images" / "004.png").write_bytes(b"no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 40, 3)).astype(np.uint8)).save(
        root / "masks" / "005.png"
    )
    with pytest.raises(ValueError) as caught:
        load_data(f"masks:{root}")
    text = str(caught.value)
    for error in (
        "1 image without a mask: 000.png",
        "1 mask without an image: 001.png",
        "masks/002.png is 7×5, its image 40×32",
        "1 mask with labels out of range 0 to 2",
        "masks/003.png has 77",
        "2 pairs with an unreadable file",
        "004.png' is not a readable image",
        "005.png' is not a readable mask: the mask has colors",
    ):
        assert error in text


def test_skip_corrupt_skips_broken_pairs(tmp_path):
    root = write_pairs(tmp_path / "m", 9)
    (root / "masks" / "003.png").write_bytes(b"no image")
    data = load_data(f"masks:{root}", DataConfig(skip_corrupt=True))
    assert len(data.train) + len(data.val) + len(data.test) == 8
    assert any("skipped 1 pair with an unreadable file" in note and "003.png" in note for note in data.notes)


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_data_check_counts_unreadable_pairs(skip_corrupt, tmp_path):
    root = write_pairs(tmp_path / "m", 9)
    (root / "masks" / "003.png").write_bytes(b"no image")
    check = check_data(f"masks:{root}", DataConfig(skip_corrupt=skip_corrupt))
    found, other = (check.notes, check.errors) if skip_corrupt else (check.errors, check.notes)
    assert len(found) == 1 and "1 unusable image" in found[0] and "003.png" in found[0]
    assert not other


def _with_rare_classes(root):
    """Write 40 pairs with the class `leaf` in nearly all masks, `stem` in 12, `root` in 3, and `flower` in none."""
    write_pairs(root, 40, classes=4)
    for index, file in enumerate(sorted((root / "masks").iterdir())):
        labels = np.asarray(Image.open(file)).copy()
        labels[(labels == 3) & (index >= 3)] = 0
        labels[(labels == 2) & (index >= 12)] = 0
        Image.fromarray(labels).save(file)
    (root / "classes.txt").write_text("background\nleaf\nstem\nroot\nflower\n")
    return root


@pytest.mark.parametrize("seed", range(5))
def test_splits_of_masks_are_stratified_by_the_rarest_foreground_class(seed, tmp_path):
    data = load_data(f"masks:{_with_rare_classes(tmp_path / 'm')}", seed=seed)
    for part in data.parts.values():
        masks = [part.mask(index) for index in range(len(part))]
        assert sum((mask == 3).any() for mask in masks) == 1
        assert sum((mask == 2).any() for mask in masks) >= 2
        for mask, names in zip(masks, part.annotations.targets, strict=True):
            assert names == tuple(data.classes[label] for label in np.unique(mask))
    assert data.warnings == ["class 'flower' has no training images; add training images or remove the class"]


def test_many_rare_classes_do_not_enlarge_the_test_split(tmp_path):
    root = write_pairs(tmp_path / "m", 60)
    for index, file in enumerate(sorted((root / "masks").iterdir())):
        labels = np.asarray(Image.open(file)) // 255 * (1 + index // 3)
        Image.fromarray(labels.astype(np.uint8)).save(file)
    data = load_data(f"masks:{root}")
    assert len(data.classes) == 21 and [len(part) for part in data.parts.values()] == [36, 12, 12]


def test_a_label_without_a_class_is_an_error_of_data_check(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "m", 10, classes=3)
    monkeypatch.setattr(MaskDataset, "mask", lambda images, index: np.full((2, 2), 7, np.uint8))
    check = check_data(f"masks:{root}")
    assert len(check.errors) == 1 and check.errors[0].endswith("has label 7, but there are 3 classes")
    assert check.counts and not check.pixel_shares


def test_a_class_missing_from_given_test_masks_is_a_warning(tmp_path):
    root = tmp_path / "m"
    write_pairs(root / "train", 12, classes=3)
    write_pairs(root / "other", 24, classes=3)
    shutil.move(root / "other", tmp_path / "other")
    for kind in ("images", "masks"):
        (root / "test" / kind).mkdir(parents=True)
        for index in (20, 21):
            shutil.copy(tmp_path / "other" / kind / f"{index:03}.png", root / "test" / kind)
    for file in (root / "test" / "masks").iterdir():
        labels = np.asarray(Image.open(file)).copy()
        Image.fromarray(labels % 2).save(file)
    (warning,) = load_data(f"masks:{root}").warnings
    assert warning == (
        "class 'class 2' has no test images; add test images, or test scores will ignore missing classes"
    )


def test_data_check_counts_images_and_pixels_of_each_class(tmp_path, capsys):
    root = _with_rare_classes(tmp_path / "m")
    check = check_data(f"masks:{root}")
    masks = [np.asarray(Image.open(file)) for file in sorted((root / "masks").iterdir())]
    for label, name in enumerate(check.splits.classes):
        assert sum(check.counts[name].values()) == sum((mask == label).any() for mask in masks)
        assert check.pixel_shares[name] == pytest.approx(np.mean([mask == label for mask in masks]))
    check.print_summary(Console(width=100), "class")
    table = capsys.readouterr().out
    assert "pixels" in table and "images     │    24 │   8 │    8 │  40 │" in table


def test_labels_beyond_the_named_classes_are_rejected(tmp_path):
    root = write_pairs(tmp_path / "m", 8, classes=4)
    (root / "classes.txt").write_text("sky\nsea\n")
    with pytest.raises(ValueError, match=r"labels out of range 0 to 1 \(the classes are \w+, \w+\).*2, 3"):
        load_data(f"masks:{root}")
    (root / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(ValueError, match=r"must list 2 to 256 different classes.*got \['sky', 'sky'\]"):
        load_data(f"masks:{root}")


def test_masks_with_a_single_label_are_rejected(tmp_path):
    root = write_pairs(tmp_path / "m", 6, white=0)
    with pytest.raises(ValueError, match="masks must have at least two labels, got only 0"):
        load_data(f"masks:{root}")


def test_a_wrong_layout_error_contains_the_expected_layout(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"in images/ and masks/; the expected layout is images/NAME.jpg and masks/"):
        load_data(f"masks:{tmp_path / 'photos'}")
    with pytest.raises(FileNotFoundError, match=r"masks:.*no folder 'fotos'.*nearest: 'photos'"):
        load_data(f"masks:{tmp_path / 'fotos'}")
    root = write_pairs(tmp_path / "m", 6)
    shutil.copy(root / "images" / "000.png", root / "images" / "000.bmp")
    with pytest.raises(ValueError, match=r"duplicate name in images/: 000.bmp, 000.png"):
        load_data(f"masks:{root}")


def test_a_float_mask_is_rejected(tmp_path):
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "m.tiff")
    with pytest.raises(ValueError, match=re.escape("mode F has no labels")):
        read_label_map(tmp_path / "m.tiff")


def test_labels_that_do_not_fit_eight_bits_are_rejected(tmp_path):
    root = write_pairs(tmp_path / "m", 2)
    labels = np.arange(32 * 40).reshape(32, 40)
    for index in range(2):
        Image.fromarray(labels.astype(np.uint16)).save(root / "masks" / f"{index:03}.png")
    with pytest.raises(ValueError, match=r"2 masks with labels out of range 0 to 255 .*/000\.png has 256, 257"):
        load_data(f"masks:{root}")
    for index in range(2):
        (root / "masks" / f"{index:03}.png").unlink()
        Image.fromarray((labels % 2 + 65_536).astype(np.int32)).save(root / "masks" / f"{index:03}.tif")
    with pytest.raises(
        ValueError, match=r"000\.tif' is not a readable mask: labels must be from 0 to 65535, got 65536"
    ):
        load_data(f"masks:{root}")


def test_two_folders_of_one_split_are_rejected_and_splits_without_training_noted(tmp_path):
    root = tmp_path / "m"
    for part in ("train", "val", "validation"):
        write_pairs(root / part, 3)
    with pytest.raises(ValueError, match="has two splits of the same kind: 'val' and 'validation'"):
        load_data(f"masks:{root}")
    write_pairs(tmp_path / "n", 10)
    write_pairs(tmp_path / "n" / "test", 3)
    notes = load_data(f"masks:{tmp_path / 'n'}").notes
    assert any(note.startswith("skipped 'test': split folders are used only with 'train/images'") for note in notes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_class_names_may_start_with_a_byte_order_mark(encoding, tmp_path):
    root = write_pairs(tmp_path / "m", 10)
    (root / "classes.txt").write_text("background\nzellkörper\n", encoding=encoding)
    assert load_data(f"masks:{root}").classes == ["background", "zellkörper"]


def test_class_names_in_another_encoding_are_rejected(tmp_path):
    root = write_pairs(tmp_path / "m", 10)
    (root / "classes.txt").write_text("background\nzellkörper\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"classes\.txt' must be a text file in UTF-8: .* byte 0xf6 "):
        load_data(f"masks:{root}")
