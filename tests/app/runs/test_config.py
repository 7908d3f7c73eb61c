import dataclasses
import inspect
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from snella_app.config.sections import MethodConfig, ModelConfig, OptimConfig, RunConfig
from snella_app.config.train import TrainConfig, command_line
from snella_app.data.options import DataConfig
from snella_app.device import choose_device
from snella_app.methods import METHODS
from snella_app.methods.defaults import TRAIN_PRESETS
from snella_app.settings import Config

REQUIRED_SETTINGS = {"data": "digits", "backbone": "test_vit", "out": "runs/x"}


def test_all_errors_are_reported_together():
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_flat(
            out="x",
            epochs=-1,
            batch_size=-1,
            lr=-1.0,
            augment="flop",
            method="snela",
            warmup_ratio=1.0,
            val_fraction=0.0,
        )
    text = str(caught.value)
    for part in (
        "missing required settings: data, backbone, e.g. data='photos' backbone='vit_base_patch16_224.augreg_in21k'",
        "epochs must be at least 0, got -1",
        "batch_size must be at least 1, got -1",
        "lr must be at least 0 and finite, got -1.0",
        "augment must be one of auto, none, flip, crop, crop-no-flip, imagenet, randaugment, trivialaugment, 3augment, "
        "got 'flop'",
        "warmup_ratio must be in [0, 1), got 1.0",
        "val_fraction must be in (0, 1), got 0.0",
        "got 'snela'; nearest: snella",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "missing required settings: out, e.g. out='runs/photos'"),
        ({"method": "linear", "r": 4}, "method 'linear' has no option 'r'"),
        ({"method": "lora-8", "r": 4}, "sets r to 8, but got r=4"),
        ({"method_options": {"kernal": "rbf"}}, r"no option 'kernal' \(nearest: kernel"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ({"method": "LoRA_8"}, "got 'LoRA_8'; did you mean 'lora-8'"),
        ({"lr": float("inf")}, "lr must be at least 0 and finite, got inf"),
        ({"img_size": 4}, "img_size must be at least 8, got 4"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_reported(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_flat(**{**REQUIRED_SETTINGS, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_resolving_adds_method_defaults_to_explicit_settings(method):
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, method=method, lr=0.5).resolved()
    assert config.optim.lr == 0.5
    for name, value in METHODS[method].defaults_of("").items():
        is_head_rate = name == "head_lr" and METHODS[method].is_head_only
        assert config.flat()[name] == (0.5 if name == "lr" or is_head_rate else value)
    assert config.resolved() == config


def test_every_default_of_a_method_is_a_setting():
    fields = set(TrainConfig.settings())
    for method in METHODS.values():
        assert set(method.defaults) <= fields


def test_the_rank_in_the_name_wins_over_the_default_and_options_over_both():
    assert TrainConfig.from_flat(**REQUIRED_SETTINGS, method="snella-16").resolved().method.all_options()["r"] == 16
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, method_options={"scaling": 2.0, "kernel": "rbf"}).resolved()
    assert config.method.scaling is None
    assert config.method.all_options() == {"r": 8, "target_sparsity": 0.7, "scaling": 2.0, "kernel": "rbf"}
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, method="lora-4", method_options={"r": 4}).resolved()
    assert config.method.r is None and config.method.all_options() == {"r": 4}


def test_differences_compare_only_explicit_settings():
    stored = TrainConfig.from_flat(**REQUIRED_SETTINGS, method="lora", epochs=7).resolved()
    assert TrainConfig.from_flat(out="elsewhere", resume=True).differences(stored) == []
    assert TrainConfig.from_flat(out="x", resume=True, epochs=9).differences(stored) == ["epochs is 7 there and 9 here"]


def test_an_explicit_default_is_a_difference_unless_it_selects_automatically():
    stored = TrainConfig.from_flat(**REQUIRED_SETTINGS, epochs=7, lr=0.1, precision="fp32", method="lora-4")
    given = TrainConfig.from_flat(out="x", resume=True, epochs=10, lr=None, precision="auto", method="snella")
    expected = ["method is 'lora-4' there and 'snella' here", "epochs is 7 there and 10 here"]
    assert sorted(given.differences(stored)) == sorted(expected)
    assert given.replace(method="snella").differences(stored) == expected[1:]


@pytest.mark.parametrize("settings", [{"time_budget": "10m"}, {"method": "linear"}])
def test_given_epochs_agree_with_planned_ones(settings):
    given = TrainConfig.from_flat(data="digits", backbone="test_vit", out="x", epochs=10, **settings)
    assert given.differences(given.replace(epochs=0)) == []
    assert given.differences(given.replace(epochs=0, method="lora-8", time_budget=None))


def test_method_options_differ_only_in_given_entries():
    values = {**REQUIRED_SETTINGS, "method_options": {"kernel": "rbf"}}
    stored = TrainConfig.from_flat(**values, early_stopping=3).resolved()
    assert stored.method.options == {"kernel": "rbf", "schedule_end": 0.7}
    for options in ({}, {"kernel": "rbf"}):
        assert TrainConfig.from_flat(out="x", resume=True, method_options=options).differences(stored) == []
    other = TrainConfig.from_flat(out="x", resume=True, method_options={"kernel": "p_linear"})
    assert other.differences(stored) == [
        "method_options is {'kernel': 'rbf', 'schedule_end': 0.7} there and {'kernel': 'p_linear'} here"
    ]


def test_every_setting_is_documented():
    for setting in TrainConfig.settings().values():
        texts = [kind.__doc__ or "" for kind in setting.owner.__mro__]
        assert sum(f"\n        {setting.path[-1]}: " in text for text in texts) == 1, setting.name


def test_a_preset_sets_missing_settings_and_is_stored():
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, preset="paper", epochs=10, method_options={"kernel": "rbf"})
    assert (config.method.scaling, config.optim.lr, config.optim.scalar_lr) == (1.0, 1e-3, 1e-3)
    assert config.data.augment == "none"
    assert config.optim.epochs == 10, "an explicit value wins, even if it is the default"
    assert config.method.options == {"preset": "paper", "kernel": "rbf"}
    assert config.resolved().method.scaling == 1.0 and config.resolved().method.target_sparsity == 0.7
    assert config.replace(scaling=2.0).method.scaling == 2.0
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, preset="paper", method_options={"scaling": 3.0})
    assert config.method.all_options() == {"preset": "paper", "scaling": 3.0}, "an option wins like its setting"
    assert TrainConfig.from_flat(**config.stored()).stored() == config.stored()


def test_the_official_preset_adds_only_the_differences_of_the_authors_code():
    paper, official = (TrainConfig.from_flat(**REQUIRED_SETTINGS, preset=name).flat() for name in ("paper", "official"))
    assert {name for name in paper if paper[name] != official[name]} == {"preset", "method_options"}
    assert official["method_options"] == {"preset": "official"}


def test_a_preset_in_a_section_is_rejected():
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, preset="paper")
    assert dataclasses.replace(config, optim=OptimConfig(lr=0.1)).method == config.method
    with pytest.raises(
        ValueError, match=r"preset must be given to TrainConfig.from_flat, .* got .*preset='paper'\); use"
    ):
        dataclasses.replace(config, method=MethodConfig(preset="paper"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "papr"}, "preset must be one of paper, official, got 'papr'"),
        ({"preset": "paper", "method": "lora-8"}, "^preset applies to snella and snell, got 'paper' with method 'lora"),
        ({"preset": "paper", "method": "snela"}, "^method must be one of .*, got 'snela'; nearest: snella"),
        ({"preset": "paper", "method_options": [1]}, r"method_options must be settings such as .*, got \[1\]"),
        ({"preset": "paper", "method": "auto"}, "preset applies to snella and snell, got 'paper' with method 'auto'"),
        ({"preset": "official", "method": "snella-matched-8"}, "got 'official' with method 'snella-matched-8'; leave"),
    ],
)  # fmt: skip
def test_an_unknown_preset_or_method_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, **changes)


def test_the_documents_show_what_the_presets_change():
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    paper, official = TRAIN_PRESETS["paper"], TRAIN_PRESETS["official"]
    default = TrainConfig.from_flat(**REQUIRED_SETTINGS).resolved().flat()
    lines = ["| option | default | `--preset paper` | `--preset official` |", "|---|---|---|---|"]
    for name in (name for name in paper if name != "method_options"):
        cells = [default[name], paper[name], official[name]]
        shown = [cell if isinstance(cell, str) else _plain(cell) for cell in cells]
        lines.append(f"| `--{name.replace('_', '-')}` | {' | '.join(shown)} |")
    lines.append("| `--method-options.preset` | paper | paper | official |")
    assert "\n".join(lines) in page


def _plain(value):
    """Format a number without exponent: 0.00001, 10, 100."""
    return format(Decimal(str(value)).normalize(), "f")


WRONG_VALUES = {str: 3, bool: "no", int: "x", float: "x"}
"""Value of a wrong type by field type."""


@pytest.mark.parametrize("field", TrainConfig.settings())
def test_a_value_of_the_wrong_type_is_reported_with_its_field(field):
    kind = TrainConfig.settings()[field].type
    for wrong in (
        object(),
        [object()],
        {3: object()},
        b"x",
        *(value for part, value in WRONG_VALUES.items() if kind == part),
    ):
        with pytest.raises(ValueError, match=rf"(^|; ){field} must be "):
            TrainConfig.from_flat(**{**REQUIRED_SETTINGS, field: wrong})


def test_types_and_ranges_are_reported_together():
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_flat(**REQUIRED_SETTINGS, epochs=True, pretrained="no", lr=-1.0, seed=1.5, method_options=[1])
    for part in (
        "epochs must be an integer, got True",
        "pretrained must be true or false, got 'no'",
        "lr must be at least 0 and finite, got -1.0",
        "seed must be an integer, got 1.5",
        "method_options must be settings such as {kernel: rbf}, got [1]",
    ):
        assert part in str(caught.value)


def test_paths_and_numpy_numbers_become_plain_values():
    config = TrainConfig.from_flat(
        **{**REQUIRED_SETTINGS, "out": Path("runs/x")}, epochs=np.int64(3), lr=np.float32(0.5), drop_path=0
    )
    assert (config.run.out, config.optim.epochs, config.optim.lr) == ("runs/x", 3, 0.5)
    assert [type(value) for value in (config.run.out, config.optim.epochs, config.optim.lr)] == [str, int, float]
    options = {"r": np.int64(4), "target_sparsity": np.float64(0.5)}
    stored = TrainConfig.from_flat(**REQUIRED_SETTINGS, method_options=options).stored()
    assert yaml.safe_load(yaml.safe_dump(stored))["method_options"] == {"r": 4, "target_sparsity": 0.5}


def test_missing_required_settings_are_reported():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(Config):
        run: str
        out: str

    with pytest.raises(ValueError, match=r"^run must be set; out must be a string, got 1$"):
        Options.from_flat(out=1)


def test_setting_names_of_other_tools_suggest_snella_names():
    with pytest.raises(TypeError) as caught:
        TrainConfig.from_flat(**REQUIRED_SETTINGS, model="x", learning_rate=1e-3, epoks=3)
    assert str(caught.value) == (
        "TrainConfig has no setting 'model' (use backbone), 'learning_rate' (use lr), 'epoks' "
        "(nearest: epochs, workers); TrainConfig.settings() lists all"
    )


def test_a_bare_folder_is_stored_with_its_prefix(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    assert (
        TrainConfig.from_flat(**{**REQUIRED_SETTINGS, "data": str(tmp_path / "photos")}).data.spec
        == f"folder:{tmp_path / 'photos'}"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:7", r"device=cuda:7 is not available: torch(.* finds no GPU|\.cuda\.device_count\(\) is \d)"),
        ("mps", "device=mps is not available: torch .* finds no device of this type; use auto"),
        ("meta", "device must not be the meta device, got 'meta'"),
        ("tpu", "device must be auto or a torch device such as cpu, cuda, cuda:1 or mps, got 'tpu'"),
    ],
)
def test_an_unavailable_device_is_rejected(name, message):
    with pytest.raises(ValueError, match=message):
        choose_device(name)


def test_a_device_may_have_an_index():
    assert TrainConfig.from_flat(**REQUIRED_SETTINGS, device="cuda:1").run.device == "cuda:1"
    assert choose_device("cpu:0") == torch.device("cpu", 0)


@pytest.mark.parametrize("kind", [TrainConfig, DataConfig, ModelConfig, MethodConfig, OptimConfig, RunConfig])
def test_settings_are_keyword_only_and_frozen(kind):
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="positional argument"):
        kind("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(
            kind(**({"run": RunConfig(out="x", resume=True)} if kind is TrainConfig else {})), parameters[0].name, 1
        )


def test_flat_names_are_unique_and_basic_settings_come_first():
    parts = [DataConfig, ModelConfig, MethodConfig, OptimConfig, RunConfig]
    names = [name for part in parts for name in part.settings()]
    assert len(names) == len(set(names)) and list(TrainConfig.settings()) == list(
        dict.fromkeys((*TrainConfig.basic, *names))
    )


def test_sections_and_flat_names_give_the_same_configuration():
    config = TrainConfig(
        data=DataConfig(spec="digits", train_size=60),
        model=ModelConfig(backbone="test_vit"),
        method=MethodConfig(name="lora-4"),
        optim=OptimConfig(lr=0.1),
        run=RunConfig(out="runs/x"),
    )
    flat = {**REQUIRED_SETTINGS, "train_size": 60, "method": "lora-4", "lr": 0.1}
    assert config == TrainConfig.from_flat(**flat) == TrainConfig.from_flat(**config.flat())
    assert {name: config.flat()[name] for name in flat} == flat
    changed = config.replace(lr=0.2, data="mnist5k")
    assert (changed.optim.lr, changed.data.spec, changed.model) == (0.2, "mnist5k", config.model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataConfig(spec=3, val_fraction=0.0),
            r"data must be a string, got 3; val_fraction must be in \(0, 1\)",
        ),
        (lambda: ModelConfig(img_size=4), "img_size must be at least 8, got 4"),
        (lambda: MethodConfig(name="lora", options={"q": 1}), "method 'lora' has no option 'q'"),
        (lambda: OptimConfig(swa=3, soup=3), "ema, swa and soup are mutually exclusive, got swa 3 and soup 3"),
        (lambda: RunConfig(seed=-1, track="tensorbord"), "seed must be at least 0, got -1; track must be among"),
    ],
)
def test_each_section_checks_its_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tilde_in_weight_files_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pth").touch()
    (tmp_path / "classes.yaml").write_text("{cat: 1, dog: 2.5}")
    files = {"weights": "~/weights.pth", "class_weights": "~/classes.yaml"}
    config = TrainConfig.from_flat(data="photos", backbone="test_vit", out="run", **files)
    assert config.optim.read_class_weights() == {"cat": 1.0, "dog": 2.5}
    for name in ("~", "~no-such-user/weights.pth", 300 * "w"):
        with pytest.raises(ValueError, match=f"weights must be an existing file, got '{name}'"):
            config.replace(weights=name).resolved()


def test_a_seed_beyond_the_range_of_numpy_is_rejected():
    with pytest.raises(ValueError, match=f"seed must be less than {2**32}, got 20261129123456"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, seed=20261129123456)


def test_class_weights_may_have_names_that_yaml_reads_as_numbers():
    config = TrainConfig.from_flat(**REQUIRED_SETTINGS, class_weights={0: 1, 1: 2.5})
    assert config.optim.class_weights == {"0": 1, "1": 2.5}
    with pytest.raises(ValueError, match=r"class_weights must be numbers by name such as \{cat: 1, dog: 2"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, class_weights={"cat": "heavy"})
    with pytest.raises(ValueError, match=r"class_weights must be balanced .*, got '\{cat: .*, which does not exist"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, class_weights="{cat: " + 300 * "1" + ", dog}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "is a folder"),
        ("[[cat, 1]]", "does not map class names to numbers"),
        ("{cat: true}", "does not map class names to numbers"),
        (f"{{cat: 1{400 * '0'}}}", "does not map class names to numbers"),
    ],
)
def test_a_file_without_class_weights_is_rejected(text, problem, tmp_path):
    path = tmp_path if text is None else tmp_path / "weights.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"class_weights must be balanced .*, got '{path}', which {problem}"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, class_weights=str(path))


def test_a_tracker_listed_twice_is_used_once():
    assert RunConfig(track="wandb, tensorboard,wandb").trackers == ["wandb", "tensorboard"]


def test_the_recorded_command_repeats_a_run_whose_settings_differ_from_its_preset():
    changes = {"preset": "paper", "epochs": 10, "augment": "auto", "max_grad_norm": 1.0}
    command = command_line(TrainConfig.from_flat(**REQUIRED_SETTINGS, **changes), "train")
    for option in ("--epochs 10", "--augment auto", "--max-grad-norm 1.0", "--preset paper"):
        assert option in command
    assert "--warmup-ratio" not in command
