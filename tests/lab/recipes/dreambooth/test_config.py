from pathlib import Path

import pytest
import yaml

from snella_app.cli.parser import parse
from snella_lab.recipes.dreambooth.config import DreamBoothConfig


def config(**changes):
    return DreamBoothConfig.from_flat(**{"data": "folder:dog", "pipeline": "sd3", "out": "runs/dog", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0, "resolution": 4}, "resolution must be at least 8, got 4; steps must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be at least 0 and finite, got -1.0"),
        ({"prior_weight": float("inf")}, "prior_weight must be at least 0 and finite, got inf"),
        ({"weighting": "none"}, "weighting must be one of logit_normal, mode, uniform, .*, got 'none'"),
        ({"optimizer": "sgd"}, "optimizer must be one of auto, adamw, adamw8bit, got 'sgd'"),
        ({"method": "linear"}, "method must be one of full, lora, dora, snella, snell for generation, got 'linear'"),
        ({"method": "snela"}, "got 'snela'; nearest: snell"),
        (
            {"method": "lora", "scalar_lr": 0.1},
            "scalar_lr applies to methods with scalar kernel parameters .*, got 0.1 with method 'lora'",
        ),
        ({"r": 8, "method_options": {"r": 4}}, "r set both directly and in method_options"),
        ({"r": 7}, "r must be divisible by num_pieces=2, got r=7"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are mutually exclusive, got both"),
        (
            {"data": None, "pipeline": None, "out": None},
            "missing required settings: data, pipeline, out, e.g. data='.*' pipeline='.*' out='.*'$",
        ),
        ({"token": " "}, "token must be a word, got ' '"),
    ],
)
def test_errors_contain_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_defaults_are_the_settings_of_the_paper():
    settings = config().resolved()
    optim = settings.optim
    assert (settings.resolution, settings.steps, optim.batch_size, optim.accumulation, optim.lr) == (
        512,
        500,
        1,
        4,
        1e-4,
    )
    assert (optim.optimizer, optim.gradient_checkpointing, settings.prior_weight) == ("auto", True, 0.0)
    assert config(method="lora-16").resolved().method.all_options() == {"r": 16}
    assert config(method="full").resolved().optim.lr == 5e-6


def test_prompts_contain_token_and_class():
    settings = config(prior_weight=1.0).with_class_name("dog")
    assert (settings.prompt, settings.class_prompt) == ("a photo of sks dog", "a photo of dog")
    assert config(class_name="puppy", token="xyz").with_class_name("dog").prompt == "a photo of xyz puppy"
    assert config(prompt="my sks").with_class_name(None).prompt == "my sks"
    with pytest.raises(
        ValueError, match=r"class_name must name .*, because folder:dog does not define it; set it, or set prompt"
    ):
        config().with_class_name(None)
    with pytest.raises(ValueError, match="set it, or set class_prompt"):
        config(prompt="my sks", prior_weight=1.0).with_class_name(None)


def test_command_line_parses_the_settings():
    name, settings = parse(
        [
            "dreambooth",
            "--data",
            "folder:dog",
            "--pipeline",
            "sd3",
            "--out",
            "o",
            "--flip",
            "--method-options.kernel",
            "rbf",
        ]
    )
    assert name == "dreambooth"
    dreambooth = DreamBoothConfig.from_flat(**settings)
    assert (dreambooth.flip, dreambooth.method.options, dreambooth.steps) == (True, {"kernel": "rbf"}, 500)


def test_help_shows_the_defaults_of_each_command(capsys):
    with pytest.raises(SystemExit):
        parse(["dreambooth", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "basic options: --data" in text and "(default with snella: 0.0001)" in text
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    assert "(default with snella: 0.005)" in " ".join(capsys.readouterr().out.split())


def test_table_vi_experiment_matches_the_paper():
    path = Path(__file__).parents[4] / "experiments" / "dreambooth" / "table6.yaml"
    settings = DreamBoothConfig.from_flat(
        **yaml.safe_load(path.read_text()), subject="dog6", out="runs/dog6"
    ).resolved()
    optim = settings.optim
    actual = (settings.resolution, optim.batch_size, optim.accumulation, optim.lr, settings.steps, optim.optimizer)
    assert actual == (512, 1, 4, 1e-4, 500, "adamw8bit")
    assert optim.gradient_checkpointing and settings.method.scaling == 1.0
