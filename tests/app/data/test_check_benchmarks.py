import pytest

from snella_app.data.check import check_benchmarks
from tests.benchmark_folders import write_fgvc, write_vtab

TINY = {"train800": 8, "val200": 4, "test": 4}


@pytest.fixture
def data(tmp_path):
    """Folder with some datasets of both benchmarks."""
    write_vtab(tmp_path / "vtab-1k" / "kitti", 4, TINY)
    write_vtab(tmp_path / "vtab-1k" / "patch_camelyon", 2, TINY)
    write_fgvc(tmp_path / "fgvc" / "cub", "images", [1, 2], {"train": 4, "val": 2, "test": 2})
    return tmp_path


def test_both_benchmarks_in_a_folder_are_checked(data):
    vtab, fgvc = check_benchmarks(data)
    assert (vtab.title, vtab.folder.name, [inspection.name for inspection in vtab.inspections]) == (
        "VTAB-1k",
        "vtab-1k",
        ["patch_camelyon", "kitti"],
    )
    assert (fgvc.title, fgvc.folder.name, fgvc.missing) == (
        "FGVC",
        "fgvc",
        ["nabirds", "oxfordflower", "stanforddog", "stanfordcar"],
    )


def test_missing_datasets_are_reported_with_their_location(data):
    (check,) = check_benchmarks(data / "vtab-1k")
    assert len(check.missing) == 17
    assert check.errors[-1].startswith("17 of 19 datasets of VTAB-1k are missing: cifar, caltech101, dtd")
    assert f"put each into '{data / 'vtab-1k'}' as TASK/{{train800,val200" in check.errors[-1]


def test_a_folder_with_a_similar_name_is_reported(data):
    (data / "vtab-1k" / "DTD-1k").mkdir()
    (check,) = check_benchmarks(data / "vtab-1k")
    assert check.errors[-1].endswith("(unknown folders: 'DTD-1k', nearest: 'dtd')")


def test_a_single_dataset_can_be_checked(data, monkeypatch):
    (vtab,), (fgvc,) = (check_benchmarks(data / path) for path in ("vtab-1k/kitti", "fgvc/cub"))
    assert vtab.missing == fgvc.missing == []
    monkeypatch.chdir(data / "vtab-1k/kitti")
    assert check_benchmarks(".")[0].folder == data / "vtab-1k"
    assert "kitti: test must have 711 images, got 4" in vtab.errors
    assert any(error.startswith("cub: 200 classes must have images, got 2") for error in fgvc.errors)


def test_decode_finds_broken_images(data):
    (data / "vtab-1k/kitti/images/test/000001.jpg").write_bytes(b"no image")
    (quick,), (thorough,) = (check_benchmarks(data / "vtab-1k/kitti", decode=decode) for decode in (False, True))
    assert not any("cannot be read" in error for error in quick.errors)
    assert any(
        error.startswith("kitti: 1 of 28 images cannot be read: images/test/000001.jpg (unknown image format)")
        for error in thorough.errors
    )


def test_a_folder_without_benchmark_error_contains_the_layout(tmp_path):
    with pytest.raises(ValueError, match=r"\(it is empty\); use class folders, .*: VTAB-1k as TASK/\{train800"):
        check_benchmarks(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"\(it contains photos\).*VTAB-1k tasks: cifar, .*; FGVC datasets: cub, "):
        check_benchmarks(tmp_path)


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"data must be an existing dataset or benchmark folder, got '.*nowhere', which does not exist; benchmark",
    ):
        check_benchmarks(tmp_path / "nowhere")


def test_a_file_is_rejected_as_a_folder(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"data must be a dataset or benchmark folder, got the file '.*x\.csv'$"):
        check_benchmarks(tmp_path / "x.csv")
