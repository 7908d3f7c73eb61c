"""Locks of run folders, released by the kernel."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from snella_app.cli.main import main
from snella_app.config.train import TrainConfig
from snella_app.runs import RunFolder
from snella_app.training.session import InterruptCallback, RunInUseError, TrainingInterrupted, lock_run, record_status
from snella_app.training.train import train

HOLDER = """
import os, sys, time
from snella_app.runs.folder import RunFolder
from snella_app.training.session import lock_run
with lock_run(RunFolder(sys.argv[1])):
    if os.fork() == 0:
        print("held", flush=True)  # the child has closed its copy of the lock
        time.sleep(60)  # like a data loader worker that outlives its parent
        os._exit(0)
    time.sleep(60)
"""


@pytest.fixture
def locked(tmp_path):
    """Run folder and the process that holds its lock."""
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield folder, process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_a_locked_run_is_rejected_with_the_process_id(mode, locked):
    folder, process = locked
    run = RunFolder(folder)
    run.update("running")
    before = (folder / "run.json").read_bytes()
    config = TrainConfig.from_flat(data="digits", backbone="test_vit", out=str(folder), **{mode: True})
    with pytest.raises(
        RunInUseError, match=rf"^{re.escape(str(folder))} is locked by running process {process.pid}; wait"
    ):
        train(config)
    assert (folder / "run.json").read_bytes() == before


def test_a_killed_process_releases_the_lock_despite_surviving_children(locked):
    folder, process = locked
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock_run(RunFolder(folder)):
        assert (folder / ".lock").read_text() == str(os.getpid())
    assert not folder.exists() or not list(folder.iterdir())


def test_a_killed_run_is_distinguished_from_a_running_one(locked, monkeypatch):
    folder, process = locked
    run = RunFolder(folder)
    assert not run.was_killed  # no run yet
    run.update("running")
    assert not run.was_killed
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run.was_killed
    (folder / ".lock").unlink()
    assert run.was_killed
    run.update("interrupted")
    assert not run.was_killed


def test_inspect_reports_a_killed_run_and_its_report_stops_refreshing(tmp_path, capsys):
    out = str(tmp_path / "run")
    args = ["--data", "digits", "--backbone", "test_vit", "--pretrained", "false", "--img-size", "32", "--epochs", "1"]
    args += ["--method", "linear", "--train-size", "20", "--val-size", "10", "--test-size", "10", "--out", out]
    assert main(["train", *args]) == 0 and main(["inspect", out]) == 0
    assert "no process is training it" not in capsys.readouterr().out
    RunFolder(out).update("running")
    assert main(["inspect", out, "--report"]) == 0
    text = capsys.readouterr().out
    assert f"resume it with snella train --out {out} --resume" in text
    assert re.search(r"^status +killed$", text, re.MULTILINE)
    assert ">stopped<" in RunFolder(out).report.read_text()
    RunFolder(out).update("running", command="snella dreambooth --steps 3 --out here")
    assert main(["inspect", out]) == 0
    assert f"resume it with snella dreambooth --out {out} --resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "lines", "message"),
    [
        (ValueError, "ValueError: not an image; remove it\nor skip it", "not an image; remove it\nor skip it"),
        (RunInUseError, "snella_app.training.session.RunInUseError: locked", "locked"),
        (ValueError, "KeyError: 'x'\n\nDuring handling\n\nTraceback:\nValueError: wrong", "wrong"),
        (ValueError, "ValueError", "ValueError"),
    ],
)
def test_an_error_of_a_data_loader_worker_is_stored_without_its_traceback(error, lines, message, tmp_path):
    run = RunFolder(tmp_path)
    text = (
        f"Caught {error.__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  at\n"
    )
    with pytest.raises(error) as caught, record_status(run, "train"):
        raise error(f"{text}{lines}\n")
    assert str(caught.value) == run.read_json("run.json")["error"] == message


def test_an_unused_folder_is_removed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"), lock_run(RunFolder(tmp_path / "a" / "run")):
        raise FileNotFoundError("no folder")
    assert not list(tmp_path.iterdir())
    with lock_run(RunFolder(tmp_path / "a" / "run")) as _:
        (tmp_path / "a" / "run" / "run.json").write_text("{}")
    assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == ["run.json"]


def test_a_lock_also_excludes_the_same_process(tmp_path):
    with (
        lock_run(RunFolder(tmp_path)),
        pytest.raises(RunInUseError, match=f"process {os.getpid()}"),
        lock_run(RunFolder(tmp_path)),
    ):
        pass
    with lock_run(RunFolder(tmp_path)):
        pass


@pytest.mark.parametrize(("name", "shown"), [("caf\udce9", r"caf\udce9"), ("my\xa0run", r"my\xa0run")])
def test_a_folder_name_with_unprintable_characters_is_rejected_before_training(name, shown, tmp_path):
    config = TrainConfig.from_flat(data="digits", backbone="test_vit", out=f"{tmp_path}/{name}")
    message = f"out must contain only printable characters, got '{tmp_path}/{shown}'; choose another folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("processes", "repeat"), [("1", "; repeat to stop immediately"), ("2", "")])
def test_an_interrupted_run_offers_to_stop_immediately_only_in_a_single_process(processes, repeat, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", processes)
    InterruptCallback()._handle(signal.SIGINT, None)
    assert capfd.readouterr().err == f"\nsnella: finishing this step and saving, then stopping{repeat}\n"


@contextmanager
def without_write_permission(folder):
    """Remove write permissions inside the context; root switches to another user, since it may write anywhere."""
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def public():
    """Folder that other users can access, unlike pytest's temporary folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_resuming_a_finished_run_on_a_read_only_disk_reports_it_as_finished(status, finished, public):
    run = RunFolder(shutil.copytree(finished.path, public / "run"))
    run.update(status)
    output = io.StringIO()
    with without_write_permission(run.path):
        if status == "finished":
            train(TrainConfig.from_flat(out=str(run.path), resume=True), Console(file=output, width=200))
            assert "run is already finished; report" in output.getvalue()
        else:
            with pytest.raises(PermissionError, match="Permission denied"):
                train(TrainConfig.from_flat(out=str(run.path), resume=True), Console(file=output))
    assert not (run.path / ".lock").exists()


@pytest.fixture
def read_only(public):
    """Return a function that copies a folder to a read-only file system."""
    mount_points = []

    def mount(source):
        mount_point = public / "disk"
        mount_point.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mount_point)], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        mount_points.append(mount_point)
        copy = Path(shutil.copytree(source, mount_point / "run"))
        subprocess.run(["mount", "-o", "remount,ro", str(mount_point)], check=True)
        return copy

    yield mount
    for mount_point in mount_points:
        subprocess.run(["umount", str(mount_point)], check=True)


def test_every_command_reads_a_run_on_a_read_only_file_system(finished, photos, read_only, tmp_path):
    run, image = read_only(finished.path), str(next(Path(photos).rglob("*.png")))
    with pytest.raises(OSError, match="Read-only file system"):
        (run / "x").touch()
    commands = {
        "predict": [str(run), image, "--out", str(tmp_path / "p.csv")],
        "evaluate": [str(run), "--out", str(tmp_path / "e.json")],
        "merge": [str(run), "--out", str(tmp_path / "merged")],
        "inspect": [str(run)],
        "train": ["--out", str(run), "--resume"],
    }
    for name, args in commands.items():
        assert main([name, *args]) == 0, name
    expected = finished.read_json("metrics.json")["test"]
    measured = json.loads((tmp_path / "e.json").read_text())
    assert {name: measured[name] for name in expected} == expected
    assert (tmp_path / "p.csv").stat().st_size
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("name", ["metrics.json", "predictions.json"])
def test_resuming_a_finished_run_names_its_missing_results(name, finished, tmp_path):
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    (run.path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"run is finished, but lacks {name}; restore from a copy, or train"):
        train(TrainConfig.from_flat(out=str(run.path), resume=True), Console(file=io.StringIO()))


def test_an_error_that_torch_replaces_is_kept(tmp_path):
    text = (
        "Caught UnicodeDecodeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  at\n"
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff\n"
    )
    with pytest.raises(RuntimeError, match="codec can't decode byte 0xff"), record_status(RunFolder(tmp_path), "train"):
        raise RuntimeError(text)


def test_an_interruption_is_reported_if_the_status_cannot_be_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    run = RunFolder(tmp_path)
    monkeypatch.setattr(run, "update", full)
    with pytest.raises(TrainingInterrupted, match="resume with") as caught, record_status(run, "train"):
        raise KeyboardInterrupt
    assert "no space left on device" in caught.value.__notes__[0]
