"""What `snella` itself offers."""

import io
from pathlib import Path

import pytest
from rich.console import Console

import snella
from snella.runs import RunFolder, TrainConfig


def test_the_public_names_are_listed_and_are_there():
    assert set(snella.__all__) <= set(dir(snella)) and {"train", "load"} <= set(dir(snella))
    assert all(getattr(snella, name) is not None for name in snella.__all__)
    assert not [name for name in dir(snella) if name.startswith("_") and name != "__version__"]


def test_the_package_says_that_it_has_types():
    assert (Path(snella.__file__).parent / "py.typed").is_file()


def test_a_run_is_trained_and_loaded_in_two_lines(photos, tiny_run, tmp_path, no_report):
    console = Console(file=io.StringIO())
    settings = {**tiny_run, "epochs": 1, "device": "cpu:0", "out": tmp_path / "run"}
    run = snella.train(data=photos, console=console, **settings)
    assert isinstance(run, RunFolder) and run.status == "finished"
    assert run.read_config().data == f"folder:{photos}"
    assert snella.load(run).predict(photos / "cats" / "000.png").label in ("cats", "dogs", "owls")


def test_a_config_and_settings_exclude_each_other():
    with pytest.raises(TypeError, match="train takes a config or settings, got both: config and epochs"):
        snella.train(TrainConfig(data="digits", backbone="test_vit", out="x"), epochs=3)
