import shutil

import numpy as np
import pytest
from PIL import Image

from snella_app.cli.main import main
from snella_app.data.check import check_data, contact_sheet
from snella_app.data.options import DataConfig

from .mask_folders import write_pairs


def stamp(seed, size=(40, 30)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for label, (name, count) in enumerate({"dog": 12, "Dogs": 6, "New folder": 6}.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            stamp(100 * label + index, (40 + index, 30)).save(root / name / f"{index:02}.png")
    return root


def test_counts_sizes_formats_and_names_are_reported(photos):
    stamp(7, (400, 300)).save(photos / "dog/large.jpg")
    check = check_data(f"folder:{photos}")
    assert check.errors == []
    assert check.counts == {
        "Dogs": {"train": 4, "val": 1, "test": 1},
        "New folder": {"train": 4, "val": 1, "test": 1},
        "dog": {"train": 7, "val": 3, "test": 3},
    }
    assert check.sizes == ((40, 30), (44, 30), (400, 300))
    assert check.kinds == {"PNG RGB": 24, "JPEG RGB": 1}
    assert check.warnings == [
        "generic class names: 'New folder'; rename them, or remove folders that are not classes",
        "possible duplicate classes: 'Dogs' and 'dog'; merge them",
    ]


def test_numbers_and_grades_are_no_spelling_variants(photos, tmp_path):
    for name in ("-1", "1", "1.5", "15", "A", "A-", "A+", "red-fox", "red fox"):
        shutil.copytree(photos / "dog", tmp_path / "grades" / name)
    warnings = check_data(f"folder:{tmp_path / 'grades'}").warnings
    assert [text for text in warnings if "duplicate classes" in text] == [
        "possible duplicate classes: 'red fox' and 'red-fox'; merge them"
    ]


@pytest.mark.parametrize("name", ["pets", "eurosat", "cub"])
def test_class_folders_named_like_a_benchmark_are_class_folders(name, photos, capsys):
    (photos / "dog").rename(photos / name)
    assert main(["data", "check", str(photos)]) == 0
    assert f"{name} " in capsys.readouterr().out
    photos.rename(photos.with_name(name))
    assert main(["data", "check", str(photos.with_name(name))]) == 0
    assert "benchmark" not in capsys.readouterr().out


def test_copies_with_different_numbers_have_several_labels(photos, tmp_path):
    table = [f"photos/dog/{i:02}.png,{30 + i}" for i in range(12)] + ["photos/dog/copy.png,31.5"]
    (photos / "dog/copy.png").write_bytes((photos / "dog/01.png").read_bytes())
    rows = "\n".join(["path,age,split", *(f"{row},train" for row in table), "photos/Dogs/00.png,30,val"])
    (tmp_path / "ages.csv").write_text(rows)
    config = DataConfig(columns="label=age,group=none")
    warnings = check_data(f"csv:{tmp_path / 'ages.csv'}", config, target="numbers").warnings
    assert any(text.startswith("train: 1 image has several labels: ") for text in warnings)


def test_broken_files_and_duplicate_images_are_reported(photos):
    (photos / "dog/00.png").write_text("no image")
    for index in range(20, 30):
        stamp(3, (43, 30)).save(photos / "Dogs" / f"{index}.png")
        stamp(3, (43, 30)).save(photos / "dog" / f"{index}.png")
    check = check_data(f"folder:{photos}")
    (error,) = check.errors
    assert error.startswith("1 unusable image: dog/00.png (unknown image format)")
    assert not any("left out" in note for note in check.notes)
    assert any(text.startswith("train: 1 image appears more than once: ") for text in check.warnings)
    assert sum(text.startswith("train: 1 image has several labels: ") for text in check.warnings) == 1
    assert any("test images are also training images" in text for text in check.warnings)


def test_unsplittable_data_is_an_error_and_still_described(photos):
    for file in sorted((photos / "Dogs").iterdir())[1:]:
        file.unlink()
    check = check_data(f"folder:{photos}")
    assert check.errors[0].startswith("every class needs at least 3 images")
    assert "--test-fraction 0" not in check.errors[0]  # a validation split would also need a second image
    assert check.counts["Dogs"] == {"train": 1}
    sized = DataConfig(train_size=10, val_size=4, test_size=4)
    assert check_data(f"folder:{photos}", sized).errors == check.errors


def test_a_contact_sheet_has_one_row_per_class(photos):
    sheet = contact_sheet(check_data(f"folder:{photos}").splits)
    assert sheet.size == (10 * 100 + 4, 3 * 120 + 4)
    tile = np.asarray(sheet)[24 + 12 : 24 + 84, 8:96].astype(float)
    assert tile.std() > 20 and np.asarray(sheet)[:, -4:].min() == 255


def test_the_command_prints_results_writes_a_sheet_and_fails_on_errors(photos, capsys, tmp_path):
    assert main(["data", "check", f"folder:{photos}", "--sheet", str(tmp_path / "new/sheet.png")]) == 0
    shown = capsys.readouterr().out
    assert "photos: 24 images in 3 classes" in shown
    assert shown.splitlines()[-1] == "usable, with 2 warnings above"
    assert "smallest 40×30, median 44×30, largest 51×30 px" in shown
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        assert sheet.width == 1004
    (photos / "dog/00.png").write_text("no image")
    assert main(["data", "check", f"folder:{photos}"]) == 2
    assert "1 error in 'folder:" in (error := capsys.readouterr().err) and "; 2 warnings above" in error
    assert main(["data", "check", f"folder:{photos}", "--sheet", "x.jpg"]) == 2
    assert "sheet must be a PNG file, got 'x.jpg'; write 'x.png'" in capsys.readouterr().err
    (photos / "dog/00.png").unlink()
    assert main(["data", "check", str(photos)]) == 0
    assert "photos: 23 images in 3 classes" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for options in ([], ["--columns", "label=x", "--skip-corrupt"]):
        assert main(["data", "check", str(tmp_path / "empty"), *options]) == 2
        assert "contains no dataset" in capsys.readouterr().err


def test_data_without_files_is_described(capsys):
    assert main(["data", "check", "digits"]) == 0
    assert "digits: 1,797 images in 10 classes" in capsys.readouterr().out


def test_skipped_images_are_a_note_with_skip_corrupt(photos, capsys):
    (photos / "dog" / "00.png").write_bytes(b"nothing")
    assert main(["data", "check", f"folder:{photos}"]) == 2
    assert "skip with --skip-corrupt" in capsys.readouterr().err
    assert main(["data", "check", f"folder:{photos}", "--skip-corrupt"]) == 0
    printed = capsys.readouterr().out
    assert "skipped 1 unusable image (--skip-corrupt): dog/00.png" in printed


def test_label_lists_are_checked_as_multilabel_data(photos, tmp_path, capsys):
    table = tmp_path / "t.csv"
    names = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    table.write_text("path,tags\n" + "".join(f"{photos / name},{name.parent}|thing\n" for name in names))
    table.write_text(table.read_text() + f"{photos / names[0].with_name('none.png')},\n")
    stamp(9, (40, 30)).save(photos / names[0].with_name("none.png"))
    assert main(["data", "check", f"csv:{table}", "--columns", "label=tags", "--task", "multilabel"]) == 0
    printed = capsys.readouterr().out
    assert "complete, no errors found" in printed
    check = check_data(f"csv:{table}", DataConfig(columns="label=tags"), target="labels")
    assert list(check.counts) == [*check.splits.classes, "(none)"] and sum(check.counts["(none)"].values()) == 1
    assert sum(check.counts["thing"].values()) == len(names) and "(none)" in printed and "label" in printed


def test_the_range_of_numbers_is_reported(photos, tmp_path, capsys):
    table = tmp_path / "t.csv"
    names = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    rows = "".join(f"{photos / name},{number},{2.5 * number}\n" for number, name in enumerate(names))
    table.write_text("path,age,height\n" + rows)
    assert main(["data", "check", f"csv:{table}", "--columns", "label=age+height", "--task", "regression"]) == 0
    printed = capsys.readouterr().out
    last = len(names) - 1
    assert f"age from 0 to {last}, median " in printed and f"height from 0 to {2.5 * last:g}, median" in printed


def test_ranges_are_printed_in_the_order_of_the_targets(photos, tmp_path, capsys):
    rows = [f"{file},{index},{-index}" for index, file in enumerate(sorted(photos.glob("*/*.png")))]
    (tmp_path / "t.csv").write_text("\n".join(["path,age,depth", *rows]))
    options = ["--columns", "label=age+depth", "--task", "regression"]
    assert main(["data", "check", f"csv:{tmp_path / 't.csv'}", *options]) == 0
    shown = capsys.readouterr().out
    assert shown.index("age from 0") < shown.index("depth from -")


def test_data_of_another_task_is_an_error_as_in_training(photos, tmp_path, capsys):
    masks = write_pairs(tmp_path / "masks", 10)
    for arguments, expected in (
        ([f"masks:{masks}", "--task", "regression"], "task must be segmentation for images with masks"),
        ([f"folder:{photos}", "--task", "segmentation"], "data must be images with masks for task segmentation"),
    ):
        assert main(["data", "check", *arguments]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
