import errno
import json

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from snella_app.files import sealed
from snella_app.runs import RunFolder
from snella_app.training.checkpoints import (
    CheckpointError,
    checkpoint_to_resume,
    convert_read_errors,
    convert_write_errors,
    find_damage,
    is_write_failure,
    latest_checkpoint,
    prune_checkpoints,
    stage_checkpoint,
)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.update("running")
    return folder


def checkpoint(run, name):
    with stage_checkpoint(run, name) as staging:
        (staging / name / "weights").write_text(name)
    return run.checkpoints / name


def test_the_latest_checkpoint_has_the_highest_step(run):
    assert latest_checkpoint(run.path / "missing") is None
    for step in (5, 20, 100):
        checkpoint(run, f"checkpoint-{step}")
    (run.checkpoints / "checkpoint-x").mkdir()
    assert latest_checkpoint(run.checkpoints) == run.checkpoints / "checkpoint-100"


def test_a_checkpoint_of_another_run_is_rejected_or_skipped(run, tmp_path, console):
    other = RunFolder(tmp_path / "other")
    other.checkpoints.mkdir(parents=True)
    other.update("running")
    foreign = checkpoint(other, "checkpoint-9").rename(run.checkpoints / "checkpoint-9")
    message = rf"checkpoint-9: it belongs to another run \({other.id}; this run is {run.id}\); start over"
    with pytest.raises(CheckpointError, match=message):
        checkpoint_to_resume(run, console)
    expected = checkpoint(run, "checkpoint-4")
    assert checkpoint_to_resume(run, console) == expected and not foreign.exists()
    assert f"note: removed the damaged checkpoint {foreign}: it belongs to another run" in console.file.getvalue()


def test_a_checkpoint_without_a_run_id_is_rejected(run):
    path = checkpoint(run, "checkpoint-1")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(sealed({"files": manifest["files"]})))
    assert find_damage(path, run.id) == f"it belongs to another run (None; this run is {run.id})"


def test_an_unlisted_file_is_rejected_before_loading(run, tmp_path, console):
    path = checkpoint(run, "checkpoint-1")
    (path / ".DS_Store").write_text("written by the file manager")
    assert find_damage(path, run.id) == ""
    (path / "scaler.pt").write_text("x")
    assert find_damage(path, run.id) == "files not listed in manifest.json: scaler.pt"
    message = r"manifest.json: scaler.pt; remove these files and run again with --resume, start over with"
    with pytest.raises(CheckpointError, match=message):
        checkpoint_to_resume(run, console)
    (path / "scaler.pt").unlink()
    (path / "scaler.pt").symlink_to(tmp_path / "nowhere")
    assert "manifest.json: scaler.pt" in find_damage(path, run.id)


def test_incomplete_and_old_checkpoints_are_ignored_and_removed(run):
    checkpoint(run, "checkpoint-5")
    checkpoint(run, "checkpoint-10")
    (run.checkpoints / ".staging-checkpoint-15" / "checkpoint-15").mkdir(parents=True)
    (run.checkpoints / "stray").write_text("x")
    (run.checkpoints / "checkpoint-2").symlink_to(run.path)
    assert latest_checkpoint(run.checkpoints) == run.checkpoints / "checkpoint-10"
    prune_checkpoints(run.checkpoints)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-10", "stray"]
    prune_checkpoints(run.path / "missing")
    assert run.status == "running", "a link is removed without its folder"


def test_a_checkpoint_is_published_atomically(run):
    with stage_checkpoint(run, "checkpoint-1") as staging:
        (staging / "checkpoint-1" / "weights").write_text("x")
        assert latest_checkpoint(run.checkpoints) is None
    assert (run.checkpoints / "checkpoint-1" / "weights").read_text() == "x"
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-1"]


def test_a_failed_write_keeps_the_previous_checkpoint(run):
    checkpoint(run, "checkpoint-1")
    with (
        pytest.raises(
            CheckpointError,
            match=r"checkpoint-2: the disk is full \(\d+ MiB free\); the previous one, .*checkpoint-1, is intact",
        ),
        stage_checkpoint(run, "checkpoint-2"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-1"]


def test_a_checkpoint_whose_publication_failed_is_not_the_previous_one(run, monkeypatch):
    first = checkpoint(run, "checkpoint-1")
    monkeypatch.setattr("snella_app.training.checkpoints.sync_folder", lambda _: (_ for _ in ()).throw(OSError("EIO")))
    with pytest.raises(CheckpointError, match=rf"write .*checkpoint-2: EIO .*; the previous one, {first}, is intact"):
        checkpoint(run, "checkpoint-2")


def test_the_error_states_that_no_earlier_checkpoint_exists(run, tmp_path):
    with pytest.raises(CheckpointError, match="no earlier one exists"), stage_checkpoint(run, "checkpoint-2"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")
    with (
        pytest.raises(
            CheckpointError, match=r"adapter: the disk quota is exceeded .*; no earlier one exists; free some"
        ),
        convert_write_errors(tmp_path / "adapter"),
    ):
        raise OSError(errno.EDQUOT, "Quota exceeded")


def test_an_unreadable_safetensors_file_is_a_damaged_checkpoint(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(b"x")
    message = f"the checkpoint {tmp_path} cannot be read: SafetensorError: .*; start over with --overwrite, or remove"
    with pytest.raises(CheckpointError, match=message), convert_read_errors(tmp_path):
        load_file(tmp_path / "ema.safetensors")


def test_other_errors_pass_through(run, tmp_path):
    with pytest.raises(KeyError, match="bug"), stage_checkpoint(run, "checkpoint-2"):
        raise KeyError("bug")
    with pytest.raises(KeyError, match="bug"), convert_write_errors(tmp_path):
        raise KeyError("bug")
    assert not is_write_failure(ValueError("shapes differ")) and not is_write_failure(FileNotFoundError("x"))
    assert is_write_failure(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not list(run.checkpoints.iterdir())


def test_torch_disk_full_errors_are_translated_and_an_empty_folder_is_no_earlier_adapter(run, tmp_path):
    (tmp_path / "adapter").mkdir()
    message = r"adapter: the disk is full or the file size limit is reached \(\d+ MiB free\); no earlier one exists"
    with pytest.raises(CheckpointError, match=message), convert_write_errors(tmp_path / "adapter"):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with (
        pytest.raises(CheckpointError, match=r"the previous one, .*adapter, is intact"),
        convert_write_errors(tmp_path / "adapter"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
