import contextlib
import json
import shutil
from itertools import count

import pytest

from snella_app.cli.parser import as_flags, parse
from snella_app.config.train import TrainConfig
from snella_app.files import create_folder, sealed, write_bytes, write_json
from snella_app.records.run import BackboneInfo, DataInfo, FoldResults, RunInfo
from snella_app.runs import RunFolder
from snella_app.runs.folder import sibling_path
from snella_app.training.session import lock_run
from snella_lab.analysis.plot import Plot, write_plots


def config(path, **changes):
    return TrainConfig.from_flat(**{"data": "digits", "backbone": "test_vit", "out": str(path), **changes})


def create_run(path, status):
    run = RunFolder(path)
    run.prepare(config(path).resolved(), is_resumed=False)
    run.update(status)
    return run


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("finished", "a finished run; choose another folder, or start over with --overwrite"),
        ("interrupted", r"an unfinished run \(interrupted\); resume it with --resume, choose another folder, or start"),
        ("running", r"an unfinished run \(running or killed\); resume it with --resume"),
    ],
)
def test_a_run_is_not_overwritten_by_default(status, message, tmp_path):
    run = create_run(tmp_path / "run", status)
    with pytest.raises(FileExistsError, match=f"out=.*run contains {message}"):
        run.resolve_settings(config(run.path))
    assert run.resolve_settings(config(run.path, overwrite=True)).run.overwrite


def test_a_kill_while_the_adapter_is_written_leaves_it_without_digests(tmp_path):
    run = create_run(tmp_path / "run", "running")
    backbone = BackboneInfo("test_vit", num_classes=2, img_size=32)
    run.write(RunInfo(method="full", backbone=backbone, classes=["a", "b"], data=DataInfo("digits"), status="running"))
    run.adapter.mkdir()
    weights = run.adapter / "adapter_model.safetensors"
    with run.writing_adapter():
        weights.write_text("epoch 1")
    with pytest.raises(KeyboardInterrupt), run.writing_adapter():
        weights.write_text("epoch 2")
        raise KeyboardInterrupt
    run.check_adapter()
    assert run.resolve_resume(config(run.path, resume=True))[1].status == "running"
    with run.writing_adapter():
        weights.write_text("epoch 2")
    weights.write_text("of another run")
    with pytest.raises(ValueError, match=r"adapter/adapter_model.safetensors changed after"):
        run.resolve_resume(config(run.path, resume=True))


def test_resuming_uses_the_stored_settings(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.prepare(config(run.path, epochs=7, method="lora-4").resolved(), is_resumed=False)
    run.update("running")
    settled = run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True))
    values = settled.flat()
    assert [values[name] for name in ("epochs", "method", "data", "resume")] == [7, "lora-4", "digits", True]
    with pytest.raises(
        ValueError,
        match=r"epochs is 7 there and 3 here; leave them out; to continue .* snella train --init-from ",
    ):
        run.resolve_settings(config(run.path, epochs=3, resume=True))
    settings = parse(["train", "--out", str(run.path), "--resume", "--epochs", "10"])[1]
    with pytest.raises(ValueError, match="but epochs is 7 there and 10 here; leave them out"):
        run.resolve_settings(TrainConfig.from_flat(**settings))


def test_per_call_settings_are_not_stored(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.prepare(config(run.path, overwrite=True, progress=False).resolved(), is_resumed=False)
    text = (run.path / "config.yaml").read_text()
    assert not any(name in text for name in ("overwrite", "resume", "progress"))
    (run.path / "config.yaml").write_text(text + "overwrite: true\nprogress: false\nresume: false\n")
    read = run.read_config()
    assert (read.run.overwrite, read.run.progress, read.run.resume) == (False, True, False)


def test_an_invalid_status_is_reported_as_damage(tmp_path):
    run = create_run(tmp_path / "run", "running")
    (run.path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json is damaged: it has no valid status; copy the file again, or train"):
        run.resolve_settings(config(run.path))


def test_resuming_without_a_run_requires_data_and_backbone(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"got .*run, which has no run; give data and backbone"):
        run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True))
    assert run.resolve_settings(config(run.path, resume=True)).optim.epochs == 10
    assert not run.path.exists()


def test_a_folder_with_other_files_is_rejected(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="contains files but no run"):
        RunFolder(tmp_path).resolve_settings(config(tmp_path))
    file = tmp_path / "thesis.txt"
    with pytest.raises(FileExistsError, match=r"out must be a folder, got the file .*thesis.txt'"):
        RunFolder(file).resolve_settings(config(file))


@pytest.mark.parametrize(
    "name", ["masks/drawn.png", "adapter/model.safetensors", "checkpoints/best.pt", "metrics.json", "config.yaml"]
)
def test_a_folder_with_files_named_like_those_of_a_run_is_rejected(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="contains files but no run"):
        RunFolder(tmp_path).resolve_settings(config(tmp_path))
    assert file.read_text() == "mine"


def test_a_start_that_was_killed_early_can_be_repeated(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.prepare(config(run.path).resolved(), is_resumed=False)
    (run.path / "selection").mkdir()
    assert run.resolve_settings(config(run.path)).run.out == str(run.path)
    (run.path / ".new-config.yaml").write_text("")  # killed while it removed an old run
    run.adapter.mkdir()
    assert run.resolve_settings(config(run.path)).run.out == str(run.path)


def test_overwrite_removes_only_the_run(tmp_path):
    run = create_run(tmp_path / "run", "finished")
    (run.path / "notes.txt").write_text("mine")
    (run.adapter).mkdir()
    (run.adapter / "old.safetensors").write_text("x")
    run.prepare(config(run.path).resolved(), is_resumed=False)
    assert (run.path / "notes.txt").read_text() == "mine"
    assert not run.adapter.exists() and run.status is None


def test_a_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run.json: this is not a run folder"):
        RunFolder(tmp_path).read_json("run.json")
    with pytest.raises(FileNotFoundError, match=r"config.yaml: this is not a run folder"):
        RunFolder(tmp_path).read_config()
    run = create_run(tmp_path / "run", "running")
    (run.path / "config.yaml").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"config.yaml: deleted; restore the file, or train again"):
        run.read_config()
    with pytest.raises(FileNotFoundError, match=r"metrics.json: not written yet"):
        run.read_json("metrics.json")


def test_damaged_files_are_reported(tmp_path):
    run = create_run(tmp_path / "run", "running")
    (run.path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics.json is damaged"):
        run.read_json("metrics.json")
    (run.path / "config.yaml").write_text("epoch: 3\n")
    with pytest.raises(
        ValueError, match=r"config.yaml was altered after it was written: the run was started with different"
    ):
        run.read_config()
    (run.path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"config.yaml is damaged: .*'epoch'"):
        run.read_config()
    (run.path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml is damaged"):
        run.read_config()


@pytest.mark.parametrize(
    ("old", "new"), [("label_smoothing: 0.0", "label_smoothing: 0.3"), ("epochs: 10", "epochs: 0")]
)
def test_edited_settings_of_an_unfinished_run_are_rejected(tmp_path, old, new):
    run = create_run(tmp_path / "run", "running")
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("workers: 0", "workers: 2"))
    assert run.read_config().data.workers == 2  # does not affect training
    assert old in text
    (run.path / "config.yaml").write_text(text.replace(old, new))
    with pytest.raises(
        ValueError, match=r"config.yaml was altered after it was written: .* restore the file, or train"
    ):
        run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True))


def test_errors_of_a_settings_file_use_field_names(tmp_path):
    (tmp_path / "config.yaml").write_text("data: digits\nbackbone: test_vit\nout: x\nepochs: -1\nbatch_size: -1\n")
    refused = (
        r"config.yaml is damaged: 'epochs' must be at least 0, got -1; 'batch_size' must be at least 1, got -1; train"
    )
    with pytest.raises(ValueError, match=refused) as error:
        RunFolder(tmp_path).read_config()
    assert as_flags(str(error.value)) == str(error.value)
    (tmp_path / "config.yaml").write_text("out: x\nema: 2.0\n")
    refused = (
        r"damaged: it lacks 'data', 'backbone'; 'ema' must be in \(0, 1\), got 2\.0; leave it out to disable it; train"
    )
    with pytest.raises(ValueError, match=refused) as error:
        RunFolder(tmp_path).read_config()
    assert as_flags(str(error.value)) == str(error.value)


def test_an_unfinished_run_of_an_early_version_is_rejected_and_a_finished_one_is_read(tmp_path):
    run = create_run(tmp_path / "run", "running")
    early = {"format": 1, "status": "running"}
    (run.path / "run.json").write_text(json.dumps(sealed(early)))
    with pytest.raises(
        ValueError, match=r"run was started by an early version of snella, whose checkpoints have no run id"
    ):
        run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True))
    (run.path / "run.json").write_text(json.dumps(sealed({**early, "status": "finished"})))
    assert run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True)).optim.epochs == 10


def test_a_new_run_gets_a_new_id_and_a_resumed_one_keeps_it(tmp_path):
    run = create_run(tmp_path / "run", "running")
    first = run.id
    run.update("interrupted")
    run.prepare(run.read_config(), is_resumed=True)
    assert run.id == first and len(first) == 32
    run.prepare(config(run.path).resolved(), is_resumed=False)
    run.update("running")
    assert run.id != first


class Killed(BaseException):
    """Simulated SIGKILL."""


def test_a_kill_during_overwrite_leaves_the_old_or_the_new_run(tmp_path, monkeypatch):
    """Kill before each rename and removal, then resume."""
    new_config, outcomes = config(tmp_path / "run", epochs=3).resolved(), []
    for number in count():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = create_run(tmp_path / "run", "running")
        (run.checkpoints / "checkpoint-4").mkdir()
        run.adapter.mkdir()
        (run.path / "metrics.json").write_text("{}")
        with monkeypatch.context() as patch:
            changes = count(0)

            def killing(original, changes=changes, number=number):
                def change(*args, **kwargs):
                    if next(changes) == number:
                        raise Killed
                    return original(*args, **kwargs)

                return change

            patch.setattr(type(run.path), "replace", killing(type(run.path).replace))
            patch.setattr(type(run.path), "unlink", killing(type(run.path).unlink))
            patch.setattr("shutil.rmtree", killing(shutil.rmtree))
            with contextlib.suppress(Killed):
                run.prepare(new_config, is_resumed=False)
        with monkeypatch.context() as patch:
            patch.setattr("snella_app.runs.folder.read_if_present", lambda *_: None)  # `create_run` writes no results
            resolved, _ = run.resolve_resume(TrainConfig.from_flat(out=str(run.path), resume=True))
        outcomes.append(resolved.optim.epochs)
        assert (run.status is None) == (resolved.optim.epochs == 3) and not (run.path / ".new-config.yaml").exists()
        if next(changes) <= number:
            break
    assert outcomes[0] == 10 and outcomes[-1] == 3 and outcomes == sorted(outcomes, reverse=True)


def test_checkpoints_without_run_json_are_not_removed(tmp_path):
    run = create_run(tmp_path / "run", "running")
    (run.checkpoints / "checkpoint-4").mkdir()
    (run.path / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run has checkpoints but no run.json; restore that file"):
        run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True, data="digits", backbone="test_vit"))
    with pytest.raises(FileNotFoundError, match=r"run has checkpoints but no run.json; restore that file"):
        run.resolve_settings(TrainConfig.from_flat(out=str(run.path), resume=True))
    (run.path / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"run has checkpoints but no run.json; restore that file"):
        run.resolve_settings(config(run.path, resume=True))


def test_a_full_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*a.json'"):
        write_json(tmp_path / "a.json", {"x": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_leaves_no_empty_folder(error, tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/new/inner'"),
        create_folder(tmp_path / "new/inner"),
    ):
        raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"No space left on device"), create_folder(tmp_path / "new/inner"):
        (tmp_path / "new/inner").rmdir()
        raise error
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError, match="bug"), create_folder(tmp_path / "there"):
        raise KeyError("bug")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]  # existed before


def test_a_failed_plot_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    plot = Plot("a", [{"x": 1}], lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*plots'"):
        write_plots([plot], tmp_path / "plots")
    assert not list(tmp_path.iterdir())


def test_edited_settings_of_a_cross_validation_are_rejected(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(config(tmp_path, folds=3).resolved())
    folder.write(FoldResults(3))
    assert folder.read_config().data.folds == 3
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("folds: 3", "folds: 2"))
    with pytest.raises(ValueError, match=r"config.yaml was altered after it was written"):
        folder.read_config()


def test_a_symlink_at_the_lock_is_rejected(tmp_path):
    run = create_run(tmp_path / "run", "running")
    (tmp_path / "mine.txt").write_text("mine")
    run.lock.symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match=r"run/\.lock must be a file, got a symbolic link; remove it"), lock_run(run):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine" and run.lock.is_symlink()


def test_a_symlink_at_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "mine.txt")
    write_json(tmp_path / "a.json", {"x": 1})
    assert (tmp_path / "mine.txt").read_text() == "mine" and (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'


def test_an_error_is_stored_and_cleared_on_resume(tmp_path):
    run = create_run(tmp_path / "run", "running")
    run.update("failed", error="boom")
    assert run.read_json("run.json")["error"] == "boom"
    run.update("running")
    assert "error" not in run.read_json("run.json")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a.json", "text")
    assert (tmp_path / "a.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_outputs_next_to_the_current_run_have_its_name(tmp_path, monkeypatch):
    assert str(sibling_path("runs/photos/", ".onnx")) == "runs/photos.onnx"
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert sibling_path(".", ".onnx") == tmp_path / "photos.onnx"
