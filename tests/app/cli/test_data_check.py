import pytest

from snella_app.cli.main import main
from tests.benchmark_folders import write_fgvc, write_vtab


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One complete task, one task that is too small, and one FGVC dataset."""
    root = tmp_path_factory.mktemp("data")
    write_vtab(root / "vtab-1k" / "kitti", 4, {"train800": 800, "val200": 200, "test": 711})
    write_vtab(root / "vtab-1k" / "patch_camelyon", 2, {"train800": 8, "val200": 4, "test": 4})
    write_fgvc(root / "fgvc" / "cub", "images", [1, 2], {"train": 4, "val": 2, "test": 2})
    return root


def test_a_dataset_without_errors_is_reported_as_complete(data, capsys):
    assert main(["data", "check", str(data / "vtab-1k" / "kitti")]) == 0
    shown = capsys.readouterr()
    assert "complete, no errors found" in shown.out and shown.err == ""
    row = next(line for line in shown.out.splitlines() if "kitti " in line)
    assert all(word in row for word in ("800", "200", "1,000", "711", "4", "OK"))


def test_all_problems_are_reported_in_one_error(data, capsys):
    assert main(["data", "check", str(data)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and shown.err.startswith("snella: ")
    for part in (
        "patch_camelyon: train800 must have 800 images, got 8; patch_camelyon: val200 must have 200 images, got 4",
        "17 of 19 datasets of VTAB-1k are missing: cifar, caltech101",
        f"put each into '{data / 'vtab-1k'}' as TASK/{{train800",
        "cub: 200 classes must have images, got 2",
        "4 of 5 datasets of FGVC are missing: nabirds, oxfordflower, stanforddog, stanfordcar",
    ):
        assert part in shown.err
    assert "missing" in shown.out and "VTAB-1k in" in shown.out and "FGVC in" in shown.out


def test_missing_data_is_reported(failing, tmp_path):
    assert "(it is empty); use class folders" in failing("data", "check", str(tmp_path))
    assert "--folder" not in failing("data", "check", str(tmp_path / "nowhere"))
    assert "nowhere', which does not exist" in failing("data", "check", str(tmp_path / "nowhere"))


def test_decode_checks_all_images(data, failing, tmp_path):
    folder = write_fgvc(tmp_path / "nabirds", "images", [1, 2], {"train": 4, "val": 2, "test": 2})
    (folder / "images/001.Bird_1/train_0.jpg").write_bytes(b"broken")
    assert "cannot be read" not in failing("data", "check", str(folder))
    assert "1 of 8 images cannot be read: 001.Bird_1/train_0.jpg" in failing("data", "check", str(folder), "--decode")
    assert "--decode applies to benchmark folders, got 'digits'" in failing("data", "check", "digits", "--decode")


def test_an_error_on_other_sizes_has_a_remedy(data, failing, tmp_path):
    error = failing(
        "train", "--data", f"vtab:{data}/vtab-1k/patch_camelyon", "--backbone", "test_vit",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert "test must have 32,768 images, got 4" in error and error.endswith("pass --strict-sizes false\n")


@pytest.mark.parametrize("option", ["--sheet=x.png", "--task=regression", "--skip-corrupt"])
def test_missing_data_is_reported_before_options_of_datasets(option, failing, tmp_path):
    assert "nowhere', which does not exist" in failing("data", "check", str(tmp_path / "nowhere"), option)
    assert "(it is empty); use class folders" in failing("data", "check", str(tmp_path), option)


def test_options_of_datasets_do_not_apply_to_benchmarks(data, failing):
    error = failing("data", "check", str(data / "vtab-1k"), "--skip-corrupt")
    assert "is checked as a benchmark; leave out --skip-corrupt" in error
