import csv
import json
import os
import shutil
import signal

import pytest
import torch
import yaml

from snella_app.cli.main import main
from snella_app.runs import RunFolder, load_run
from snella_app.training.trainer import SnellaTrainer


def test_train_writes_a_finished_run_with_its_resolved_configuration(run):
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert RunFolder(run).status == "finished"
    assert (values["r"], values["target_sparsity"], values["epochs"], values["method_options"]) == (
        2,
        0.8,
        2,
        {"kernel": "mix_k"},
    )
    assert values["lr"] is not None


def test_the_command_in_run_json_can_be_parsed(run):
    import shlex

    from snella_app.cli.parser import parse
    from snella_app.config.train import TrainConfig

    args = shlex.split(RunFolder(run).read_json("run.json")["command"])
    assert args[0] == "snella"
    name, settings = parse(args[1:])
    assert name == "train" and TrainConfig.from_flat(**settings) == RunFolder(run).read_config()


def test_evaluate_prints_and_writes_the_metrics(run, capsys, tmp_path, failing):
    assert main(["evaluate", str(run), "--out", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    text = capsys.readouterr().out
    assert f"accuracy {result['accuracy']:.4f}" in text and "cats" in text and "dogs" in text
    args = ["evaluate", str(run), "--out", str(run / "metrics.json")]
    assert "metrics.json exists; choose another name, or replace it with --overwrite" in failing(*args)
    assert main(["evaluate", str(run), "--out", str(tmp_path / "result.json"), "--overwrite"]) == 0
    assert yaml.safe_load((run / "commands" / "evaluate.yaml").read_text())["split"] == "auto"


def test_predict_prints_one_line_per_image(run, photos, capsys):
    images = [str(photos / "cats" / "000.png"), str(photos / "dogs" / "001.png")]
    assert main(["predict", str(run), "--skip-corrupt", *images]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(str(photos / "cats" / "000.png") + ": ") and "cats 0." in first and "dogs 0." in first
    assert second.startswith(str(photos / "dogs" / "001.png"))


def test_predict_writes_csv(run, photos, tmp_path, capsys):
    assert main(["predict", str(run), str(photos / "cats"), "--out", str(tmp_path / "p.csv"), "--top-k", "1"]) == 0
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and set(rows[0]) == {"image", "label", "probability"}
    assert "15 images" in capsys.readouterr().out


def test_predictions_do_not_replace_the_table_of_images(run, photos, tmp_path, failing):
    table = tmp_path / "list.csv"
    table.write_text(f"image\n{photos / 'cats' / '000.png'}\n")
    line = failing("predict", str(run), str(table), "--out", str(table), "--overwrite")
    assert "--out must not be one of the images, folders or tables" in line and table.read_text().startswith("image\n")


def test_predict_rejects_an_output_before_loading(run, photos, tmp_path, failing):
    (tmp_path / "p.csv").write_text("mine")
    args = ["predict", str(run), str(photos / "cats")]
    line = failing(*args, "--out", str(tmp_path / "p.csv"))
    assert line == f"snella: --out {tmp_path / 'p.csv'} exists; choose another name, or replace it with --overwrite\n"
    assert "--out must be a file, got the folder" in failing(*args, "--out", str(tmp_path))
    assert "--top-k must be at least 1, got 0" in failing(*args, "--top-k", "0")
    assert main([*args, "--out", str(tmp_path / "p.csv"), "--overwrite"]) == 0
    assert (tmp_path / "p.csv").read_text().startswith("image,label,probability")


def test_predict_reports_swapped_arguments(run, photos, failing):
    image = photos / "cats" / "000.png"
    assert "run must be the folder of a run, got the file" in failing("predict", str(image), str(run))
    assert "pass it before the images" in failing("predict", str(photos), str(run))


def test_merge_writes_a_file(run, tmp_path, capsys):
    assert main(["merge", str(run), "--out", str(tmp_path / "m.safetensors")]) == 0
    assert (tmp_path / "m.safetensors").stat().st_size > 1_000_000
    first, *lines = capsys.readouterr().out.splitlines()
    assert "plain timm weights; to load it:" in first
    names: dict = {}
    exec("\n".join(lines), names)
    images, loaded = torch.randn(2, 3, 32, 32), load_run(run)
    with torch.no_grad():
        assert torch.equal(names["model"](images), loaded.model(images))
        torch.testing.assert_close(names["logits_of"](images), loaded.network(images), atol=1e-5, rtol=1e-5)
    assert lines[0].startswith("# predict uses the final head on several layers; ")
    assert lines[1].startswith("# predict divides the outputs of the final head by the temperature ")
    assert loaded.info.tta == 2 and lines[2].startswith(
        "# predict averages the outputs for an image and its flip, unless --tta 1 is set; "
    )


def test_merge_writes_a_folder_of_timm(run, tmp_path, capsys):
    assert main(["merge", str(run), "--out", str(tmp_path / "model")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "a model in timm's format; to load it:" in first
    names: dict = {}
    exec("\n".join(lines), names)
    assert names["classes"] == load_run(run).classes


def test_skipped_images_are_listed(run, photos, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes((photos / "cats" / "000.png").read_bytes()[:99])
    args = ["predict", str(run), str(photos / "cats" / "000.png"), str(tmp_path / "cut.png"), "--skip-corrupt"]
    assert main([*args, "--out", str(tmp_path / "p.csv")]) == 0
    captured = capsys.readouterr()
    assert "1 image: " in captured.out and "skipped 1 image: '" in captured.err and "cut.png' (" in captured.err


def test_a_read_only_run_can_be_read(run, photos, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("commands"))
    (copy / "commands").write_text("in the way, since root may write into any folder")
    assert main(["predict", str(copy), str(photos / "cats" / "000.png")]) == 0
    assert main(["evaluate", str(copy)]) == 0
    assert main(["merge", str(copy), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().err == ""


def test_inspect_shows_the_budgets(run, capsys):
    assert main(["inspect", str(run), "--report"]) == 0
    text = capsys.readouterr().out
    assert "snella" in text and "report: " in text
    assert (run / "report.html").exists()


def test_the_command_line_takes_precedence_over_a_configuration_file(train_args, tmp_path, capsys):
    settings = {"epochs": 7, "method": "bias", "seed": 3}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    args = [arg for arg in train_args if arg not in ("--epochs", "--r", "2")]
    out = str(tmp_path / "run")
    assert main([args[0], "--config", str(tmp_path / "c.yaml"), *args[1:], "--epochs", "1", "--out", out]) == 0
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (values["epochs"], values["method"], values["seed"]) == (1, "bias", 3)


def test_a_finished_run_is_protected_and_reported_as_finished(run, train_args, failing, capsys):
    assert "contains a finished run" in failing(*train_args, "--out", str(run))
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert "is already finished" in capsys.readouterr().out


def test_ctrl_c_exits_with_130_and_the_resume_command(train_args, tmp_path, failing, monkeypatch):
    original = SnellaTrainer.training_step

    def press_ctrl_c(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(SnellaTrainer, "training_step", press_ctrl_c)
        line = failing(*train_args, "--out", str(out), status=130)
    command = line.strip().partition("resume with: snella ")[2].split()
    assert command == ["train", "--out", str(out), "--resume"]
    assert main(command) == 0 and RunFolder(out).status == "finished"


def test_ctrl_c_before_training_exits_with_130(train_args, tmp_path, failing, monkeypatch):
    def press_ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("snella_app.training.train.load", press_ctrl_c)
    assert failing(*train_args, "--out", str(tmp_path / "run"), status=130) == "snella: interrupted\n"


def test_ctrl_c_while_parsing_exits_with_130(failing, monkeypatch):
    def press_ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("snella_app.cli.parser.parse", press_ctrl_c)
    assert failing("train", status=130) == "snella: interrupted\n"


def test_a_nan_loss_is_a_one_line_error(train_args, tmp_path, failing):
    line = failing(
        *train_args,
        "--out",
        str(tmp_path / "run"),
        "--lr",
        "1e30",
        "--head-lr",
        "1e30",
        "--scalar-lr",
        "1e30",
        "--warmup-ratio",
        "0",
    )
    assert "epoch 1, step" in line and "lower --lr (now 1e+30)" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "folder:nowhere"], "nowhere"),
        (["--backbone", "tset_vit"], "test_vit"),
        (["--batch-size", "1000"], "--batch-size must be at most the number of training images"),
        (
            ["--backbone", "vit_base_patch16_xp_224", "--pretrained", "true"],
            "use random weights with --pretrained false",
        ),
        (["--method", "lorra"], "nearest: lora"),
    ],
)
def test_user_errors_are_one_line_and_create_no_folder(args, message, train_args, tmp_path, failing):
    out = tmp_path / "run"
    assert message in failing(*train_args, *args, "--out", str(out))
    assert not out.exists()


def test_a_truncated_image_is_reported_and_can_be_skipped(train_args, photos, tmp_path, failing, capsys):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    broken = tmp_path / "photos" / "cats" / "007.png"
    broken.write_bytes(broken.read_bytes()[:200])
    args = [f"folder:{tmp_path / 'photos'}" if arg.startswith("folder:") else arg for arg in train_args]
    assert "007.png" in failing(*args, "--out", str(tmp_path / "run"))
    assert main([*args, "--out", str(tmp_path / "run"), "--skip-corrupt", "--epochs", "1"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert any("007.png" in note for note in run["data"]["notes"])
    assert sum(run["data"]["sizes"].values()) == 29


def test_errors_of_other_packages_name_the_debug_option(monkeypatch, tmp_path, capsys):
    for package, is_named in (("snella.layer", False), ("another_package", True)):
        scope = {"__name__": package}
        exec("def fail(args): int('three')", scope)
        monkeypatch.setattr("snella_app.cli.main._run", scope["fail"])
        assert main(["evaluate", str(tmp_path)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("snella: invalid literal for int")
        assert line.endswith("(--debug shows the traceback)\n") == is_named


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["--debug", "evaluate", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--debug"]) == 2
    assert "FileNotFoundError" in capsys.readouterr().err


def test_exhausted_gpu_memory_is_a_one_line_error(train_args, tmp_path, failing, monkeypatch):
    def train(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 4 GiB")

    monkeypatch.setattr("snella_app.training.train._fit", train)
    line = failing(*train_args, "--out", str(tmp_path / "run"))
    assert line.startswith("snella: CUDA out of memory; use a smaller batch size")
