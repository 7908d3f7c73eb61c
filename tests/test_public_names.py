"""Public names of the package `snella`."""

import io

import pytest
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset

import snella
from snella_app.config.train import TrainConfig
from snella_app.runs import RunFolder


def test_public_names_are_listed_and_exist():
    assert set(snella.__all__) <= set(dir(snella)) and {"train", "load"} <= set(dir(snella))
    assert all(getattr(snella, name) is not None for name in snella.__all__)
    assert not [name for name in dir(snella) if name.startswith("_")]


def test_train_and_load_take_two_lines(photos, tiny_run, tmp_path, no_report):
    console = Console(file=io.StringIO())
    settings = {**tiny_run, "epochs": 1, "device": "cpu:0", "out": tmp_path / "run"}
    run = snella.train(data=photos, console=console, **settings)
    assert isinstance(run, RunFolder) and run.status == "finished"
    assert run.read_config().data.spec == f"folder:{photos}"
    assert snella.load(run).predict(photos / "cats" / "000.png").label in ("cats", "dogs", "owls")


class Gray(Dataset):
    """Dark and bright images."""

    classes = ("dark", "bright")

    def __len__(self):
        return 24

    def __getitem__(self, row):
        return Image.new("RGB", (32, 32), (10 * row,) * 3), row // 12


def test_dataset_object_is_cross_validated(tiny_run, tmp_path, no_report):
    settings = {**tiny_run, "epochs": 1, "folds": 2, "out": tmp_path / "run"}
    run = snella.train(data=Gray(), console=Console(file=io.StringIO()), **settings)
    assert [row["fold"] for row in run.read_json("folds.json")["rows"]] == [1, 2]
    for fold in ("fold-1", "fold-2"):
        info = RunFolder(tmp_path / "run" / fold).read_json("run.json")
        assert info["classes"] == ["dark", "bright"] and info["data"]["spec"] == "python:data"


def test_config_and_settings_are_mutually_exclusive():
    with pytest.raises(TypeError, match="train takes either config or settings, got both: config and epochs"):
        snella.train(TrainConfig.from_flat(data="digits", backbone="test_vit", out="x"), epochs=3)
