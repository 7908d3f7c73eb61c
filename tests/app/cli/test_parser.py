import re
import subprocess
import sys
from pathlib import Path

import pytest

from snella_app.cli.main import main
from snella_app.cli.parser import COMMANDS, UsageError, parse
from snella_app.methods.defaults import SPARSE_DEFAULTS


def test_options_accept_dashes_and_underscores():
    for option in ("--target-sparsity", "--target_sparsity"):
        name, settings = parse(["train", "--data", "digits", option, "0.5"])
        assert (name, settings["target_sparsity"], settings["data"]) == ("train", 0.5, "digits")
    assert parse(["train", "--target-sparsity=0.25"])[1]["target_sparsity"] == 0.25


def test_flags_accept_an_optional_value():
    assert parse(["train", "--resume", "--out", "x"])[1]["resume"] is True
    assert parse(["train", "--out", "x", "--resume"])[1]["resume"] is True
    assert parse(["train", "--resume", "false"])[1]["resume"] is False
    assert parse(["train", "--skip_corrupt"])[1]["skip_corrupt"] is True
    assert parse(["compare", "--skip-corrupt", "--out", "x"])[1]["skip_corrupt"] is True
    assert parse(["compare", "--skip-corrupt", "false", "--out", "x"])[1]["skip_corrupt"] is False
    assert "skip_corrupt" not in parse(["compare", "--out", "x"])[1]
    settings = parse(["predict", "run", "--skip-corrupt", "a.png", "b.png"])[1]
    assert (settings["skip_corrupt"], settings["images"]) == (True, ["a.png", "b.png"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--preset paper", {"epochs": 100, "scaling": 1.0, "method_options": {"preset": "paper"}}),
        ("--epochs 10 --preset=paper", {"epochs": 10, "scaling": 1.0}),
        ("--preset official --method-options.kernel rbf", {"method_options": {"preset": "official", "kernel": "rbf"}}),
        ("--config file.yaml", {"epochs": 7, "scaling": 1.0}),
        ("--config file.yaml --preset official", {"epochs": 7, "method_options": {"preset": "official"}}),
        ("--preset official --config file.yaml", {"epochs": 7, "method_options": {"preset": "official"}}),
        ("--epochs 9 --config file.yaml", {"epochs": 9, "method_options": {"preset": "paper"}}),
        ("--epochs=9 --config=file.yaml --seed 3", {"epochs": 9, "seed": 3}),
        ("--config=file.yaml --epochs 9", {"epochs": 9, "method_options": {"preset": "paper"}}),
    ],
)
def test_explicit_options_override_a_preset(args, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.yaml").write_text("preset: paper\nepochs: 7\n")
    _, settings = parse(["train", "--out", "x", *args.split()])
    assert {name: settings[name] for name in expected} == expected


def test_method_options_are_set_individually():
    args = ["train", "--method-options.kernel", "rbf", "--method-options.min_layer_share", "0.1"]
    assert parse(args)[1]["method_options"] == {"kernel": "rbf", "min_layer_share": 0.1}
    args = ["train", "--method_options.kernel", "p_linear", "--method_options.min_layer_share=0.1"]
    assert parse(args)[1]["method_options"] == {"kernel": "p_linear", "min_layer_share": 0.1}


@pytest.mark.parametrize("option", ["--print-config", "--print_config", "--print-config=skip_default"])
def test_the_configuration_is_printed_as_help_shows_it(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--epochs", "7", option])
    assert caught.value.code == 0 and "epochs: 7" in capsys.readouterr().out


def test_help_of_train_shows_basic_options_first_and_method_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    before, basic, advanced = re.split("basic options:|advanced options [^:]*:", text)
    assert "--config CONFIG" in before and "--data DATA" in basic and "--seed SEED" in advanced
    assert "null" not in text and "None" not in text
    for name in ("lr", "scalar_lr", "r", "target_sparsity", "scaling"):
        help_of_one = re.split(r" --[a-z-]+ [A-Z_]+ ", advanced.split(f"--{name.replace('_', '-')} {name.upper()}")[1])[
            0
        ]
        assert f"(default with snella: {SPARSE_DEFAULTS[name]})" in help_of_one


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--learning-rate=1"], "no option --learning-rate; use --lr;"),
        (["train", "--output_dir", "x"], "no option --output-dir; use --out;"),
        (["language", "--warmup", "0.3"], "no option --warmup; nearest: --"),
        (["predict", "--out=p.csv", "--skip-corrupt", "elves.png"], "before the images: snella predict RUN elves.png"),
        (["train", "--task", "multi-label"], "got multi-label; did you mean multilabel"),
    ],
)
def test_parser_errors_use_the_typed_names(args, message):
    """`golden/errors.txt` has more."""
    with pytest.raises(UsageError, match=message):
        parse(args)


def test_unknown_keys_in_a_configuration_file_are_rejected(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nepoks: 3\nlearning_rate: 1\n")
    unknown = r"'epoks' \(nearest: epochs.*\), 'learning_rate' \(use lr\)"
    with pytest.raises(UsageError, match=rf"--config .*c\.yaml has unknown settings: {unknown}"):
        parse(["train", "--config", str(tmp_path / "c.yaml")])


def test_a_list_in_a_configuration_file_is_rejected(tmp_path):
    (tmp_path / "c.yaml").write_text("images: 3\n")
    with pytest.raises(UsageError, match=r"IMAGES must be a list such as \[a, b\], got 3"):
        parse(["predict", "--config", str(tmp_path / "c.yaml"), "run", "a.png"])


@pytest.mark.parametrize("option", ["--max-steps", "--warmup-steps", "--lora-alpha", "--name", "--project"])
def test_options_with_another_meaning_are_not_translated(option):
    with pytest.raises(
        UsageError, match=f"snella train has no option {option}; (nearest: .*|options of the method .*); see"
    ):
        parse(["train", option, "1"])


def test_a_missing_configuration_mapping_is_rejected():
    with pytest.raises(UsageError, match="--config must be an existing YAML file, got 'epochs: 3 xxx"):
        parse(["train", "--config", "epochs: 3 " + 300 * "x"])
    for args in (["--config="], ["--config", "", "--out", "x"]):
        with pytest.raises(UsageError, match="--config must be an existing YAML file, got ''"):
            parse(["train", *args])


def test_a_missing_folder_of_a_configuration_file_is_reported(tmp_path):
    with pytest.raises(UsageError, match=r"got '.*a/c\.yaml'; there is no folder '.*a'"):
        parse(["train", "--config", str(tmp_path / "a" / "c.yaml")])


def test_help_is_also_a_command(capsys):
    for args, equivalent in ((["help", "train"], ["train", "--help"]), (["help"], ["--help"])):
        texts = []
        for line in (args, equivalent):
            with pytest.raises(SystemExit):
                main(line)
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]


def test_everyday_commands_come_before_research_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    everyday, research = capsys.readouterr().out.split("everyday commands:")[1].split("research commands:")
    names = [re.findall(r"^  ([a-z-]+)", text, re.MULTILINE) for text in (everyday, research)]
    assert {"train", "predict", "data", "compare"} <= set(names[0]) and {"bench", "fit-matrix"} <= set(names[1])
    assert sorted([*names[0], *names[1]]) == sorted(COMMANDS)


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("docstring_parser", "jsonargparse", "timm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import snella
from snella_app.cli.main import main
assert main(["--help"]) == 2
try: snella.load
except ImportError as error: print(error)
print(snella.SnellaConfig(r=2).r)
"""


def test_the_command_line_names_a_missing_extra():
    process = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=True)
    assert process.stderr == "snella: the command line needs docstring_parser: pip install 'snella[app]'\n"
    assert process.stdout == "snella.load needs timm: pip install 'snella[app]'\n2\n"


@pytest.mark.parametrize(
    ("setting", "reason"), [("out: 2024-02-30", "day is out of range"), ("seed: " + "9" * 5000, "4300")]
)
def test_an_unreadable_value_in_a_configuration_file_has_its_own_reason(setting, reason, tmp_path):
    (tmp_path / "c.yaml").write_text(setting)
    with pytest.raises(UsageError, match=rf"c\.yaml: .*{reason}.*; write settings as"):
        parse(["train", "--config", str(tmp_path / "c.yaml")])


def test_arguments_after_two_dashes_are_not_options():
    images = ["--my_cat.jpg", "--watch", "-dog.jpg"]
    settings = parse(["predict", "run", "--top_k", "2", "--", *images])[1]
    assert (settings["images"], settings["top_k"], settings["watch"]) == (images, 2, False)
