"""Local weight files of a run keep their absolute paths and digests."""

from dataclasses import replace

import pytest
import timm
import torch

from snella_app.backbones.local_files import located, with_local_files
from snella_app.records.run import BackboneInfo


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders with different `w.pth`; the first is the current folder."""
    for seed, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / name / "w.pth")
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path / "first", tmp_path / "second"


@pytest.mark.parametrize("values", [{"name": "w.pth"}, {"name": "test_vit", "weights": "w.pth"}])
def test_relative_weights_are_found_from_a_folder_with_other_weights(values, folders, monkeypatch):
    first, second = folders
    backbone = with_local_files(BackboneInfo(**values))
    assert located(backbone) == backbone
    monkeypatch.chdir(second)
    field = "weights" if "weights" in values else "name"
    assert getattr(located(backbone), field) == str(first / "w.pth")
    (first / "w.pth").rename(first / "moved.pth")
    with pytest.raises(ValueError, match=r"weights of the run have changed: w.pth differs from the file used"):
        located(backbone)
    (first / "moved.pth").rename(second / "w.pth")
    assert located(backbone) == backbone


def test_replaced_weights_are_an_error(folders):
    backbone = with_local_files(BackboneInfo("w.pth"))
    (folders[1] / "w.pth").replace(folders[0] / "w.pth")
    with pytest.raises(ValueError, match="restore it, or train again"):
        located(backbone)


def test_a_model_name_in_place_of_a_path_is_kept(folders):
    backbone = replace(with_local_files(BackboneInfo("w.pth")), name="test_vit")
    assert located(backbone).name == "test_vit"


def test_model_names_have_no_files(folders):
    backbone = BackboneInfo("test_vit.r160_in1k")
    assert with_local_files(backbone) == located(backbone) == backbone


def test_folders_have_paths_but_no_digests(folders):
    for name in ("sam:../second", "local-dir:../second"):
        backbone = with_local_files(BackboneInfo(name))
        assert backbone.paths == {"name": str(folders[1])} and backbone.digests == {}
        assert located(backbone) == backbone
