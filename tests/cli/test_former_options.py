"""Options by their former names: taken, with a warning that names the present one."""

import warnings

import pytest
import yaml

from snella._deprecation import FORMER_OPTIONS
from snella.cli.parser import UsageError, parse
from snella.comparison.experiment import Experiment
from snella.data import load_data
from snella.runs import TrainConfig

TRAIN = ["train", "--data", "digits", "--out", "run"]
FORMER = {"head_start": "probe", "check_sizes": False, "skip_broken": True, "final_lr": 1e-6, "warmup": 0.3}
PRESENT = {FORMER_OPTIONS[name]: value for name, value in FORMER.items()}


def test_options_of_a_command(capsys) -> None:
    words = ["--head-start", "probe", "--check-sizes", "false", "--skip-broken", "--final-lr=1e-6", "--warmup", "0.3"]

    _, _, settings = parse([*TRAIN, *words])

    assert "snella: --warmup is called --warmup-ratio now" in capsys.readouterr().err
    assert {name: settings[name] for name in PRESENT} == PRESENT


def test_an_option_that_another_command_had_is_unknown() -> None:
    with pytest.raises(UsageError, match="no option --warmup; nearest: --"):
        parse(["language", "--warmup", "0.3"])


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_configuration_file(form, tmp_path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({**FORMER, "epochs": 3}))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, settings = parse([*TRAIN, *(word.format(file) for word in form), "--warmup-ratio", "0.2"])

    assert {name: settings[name] for name in PRESENT} == {**PRESENT, "warmup_ratio": 0.2}
    assert settings["epochs"] == 3


def test_a_long_configuration_file_with_a_former_name_and_a_preset(tmp_path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({"warmup": 0.3, "preset": "paper", "columns": "path=" + 300 * "x"}))

    _, _, settings = parse([*TRAIN, "--config", str(file)])

    assert (settings["warmup_ratio"], settings["preset"], settings["epochs"]) == (0.3, "paper", 100)


def test_the_configuration_in_python() -> None:
    with pytest.warns(FutureWarning) as caught:
        config = TrainConfig(data="digits", backbone="test_vit", out="run", **FORMER)

    assert any(str(warning.message).startswith("skip_broken is called skip_corrupt now") for warning in caught)
    assert {name: getattr(config, name) for name in PRESENT} == PRESENT
    with pytest.raises(TypeError, match="warmup is the former name of warmup_ratio, got both"):
        TrainConfig(data="digits", backbone="test_vit", out="run", warmup=0.1, warmup_ratio=0.1)


def test_an_experiment() -> None:
    values = {"methods": ["lora-8"], "data": ["digits"], "backbone": "test_vit", "name": "x"}

    experiment = Experiment.from_dict({**values, "train": {"warmup": 0.3, "head_start": "probe"}})

    assert dict(experiment.settings) == {"warmup_ratio": 0.3, "head_init": "probe"}


def test_data_in_python() -> None:
    with pytest.warns(FutureWarning, match="check_sizes is called strict_sizes now"):
        splits = load_data("digits", check_sizes=False)

    assert len(splits.classes) == 10
