"""`snella compare` on the command line."""

import pytest

from snella_app.cli.main import main
from snella_app.cli.parser import parse
from snella_lab.comparison.experiment_files import experiment_from_options
from snella_lab.comparison.options import CompareOptions
from snella_lab.comparison.store import read_lines

ARGS = [
    *("compare", "--methods", "linear,bias", "--data", "digits", "--backbone", "test_vit", "--pretrained", "false"),
    *("--img-size", "32", "--epochs", "1", "--batch-size", "20", "--train-size", "40", "--val-size", "20"),
    *("--test-size", "30", "--device", "cpu", "--seeds", "1", "--lr-factors", "1", "--weight-decays", "none"),
    *("--extensions", "0", "--forgetting", "none", "--workers", "0"),
]


def parse_experiment(*args):
    return experiment_from_options(CompareOptions.from_flat(**parse(list(args))[1]))


def test_a_comparison_trains_and_resumes(tmp_path, capsys):
    out = str(tmp_path / "c")
    assert main([*ARGS, "--out", out]) == 0
    rows, _ = read_lines(tmp_path / "c" / "results.jsonl")
    assert {row.experiment_name for row in rows.values()} == {"linear", "bias"}
    assert main(["compare", "--out", out, "--draw-only"]) == 0
    assert "difference from linear" in capsys.readouterr().out and (tmp_path / "c" / "comparison.html").exists()


def test_flags_become_an_experiment():
    experiment = parse_experiment(
        *("compare", "--out", "x", "--methods", "lora-8, snella-8", "--data", "elpv,digits", "--backbone", "test_vit"),
        *("--lr-factors", "0.3,1", "--weight-decays", "none", "--tune-seeds", "2", "--epochs", "4"),
        *("--forgetting", "none", "--workers", "3"),
    )
    assert [entry.name for entry in experiment.methods] == ["lora-8", "snella-8"]
    assert (experiment.grid.lr_factors, experiment.grid.weight_decays, experiment.grid.seeds) == ((0.3, 1.0), (), 2)
    assert experiment.settings == {"epochs": 4} and experiment.forgetting == ()


def test_options_override_the_file():
    args = ("compare", "--out", "x", "--experiment", "quick", "--seeds", "4", "--epochs", "2", "--methods", "linear")
    experiment = parse_experiment(*args)
    assert experiment.seeds == 4 and experiment.settings["epochs"] == 2 and experiment.settings["img_size"] == 42
    assert [entry.name for entry in experiment.methods] == ["linear"] and experiment.reference_name == "linear"


def test_head_init_and_ema_apply_to_every_method(tmp_path):
    args = ("--head-init", "probe", "--ema", "0.5", "--methods", "bias,lora-2")
    assert main([*ARGS, *args, "--out", str(tmp_path / "c")]) == 0
    rows, _ = read_lines(tmp_path / "c" / "results.jsonl")
    assert {(row.train_config["head_init"], row.results.ema) for row in rows.values()} == {("probe", 0.5)}


def test_the_exit_status_reports_failed_runs(tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    out = str(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("snella_lab.comparison.run_cell.train", fail)
        assert main([*ARGS, "--out", out]) == 1
    error = capsys.readouterr().err
    assert "2 runs failed, e.g. digits/bias/seed-0: OSError: no space left on device" in error
    assert "add --retry-failed to train the failed runs again" in error
    assert main(["compare", "--out", out, "--draw-only"]) == 0
    assert main(["compare", "--out", out, "--workers", "0"]) == 1
    assert main(["compare", "--out", out, "--workers", "0", "--retry-failed"]) == 0


def test_a_folder_resumes_its_experiment(tmp_path):
    assert parse_experiment("compare", "--out", str(tmp_path)) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "linear,lorra-8"], "got 'lorra-8'; nearest: lora"),
        (["--data", "digits,elvp"], "nearest: 'elpv'"),
        (["--backbone", "tset_vit"], "'tset_vit'"),
        (["--experiment", "quik"], "--experiment must be a YAML file or one of"),
    ],
)
def test_user_errors_are_one_line_and_create_no_folder(args, message, tmp_path, failing):
    assert message in failing(*ARGS, *args, "--out", str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_experiments_of_other_commands_are_not_listed(tmp_path, failing):
    message = failing(*ARGS, "--experiment", "table5", "--out", str(tmp_path / "c"))
    assert "quick" in message and "table1-vtab" in message
    assert not any(f" {name}," in message or f"nearest: {name}" in message for name in ("table5", "table6", "table18"))
