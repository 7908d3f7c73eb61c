"""Several processes on one comparison: workers, two commands at once, a killed one, Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from snella_lab.comparison import CellsFailedError
from snella_lab.comparison.compare import compare

from .conftest import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMPARE = [sys.executable, "-m", "snella_app.cli.main", "compare"]


def words(root):
    """A comparison of 8 cells as a user types it."""
    return [
        *(*COMPARE, "--out", str(root), "--methods", "linear,bias", "--data", "digits", "--backbone", "test_vit"),
        *("--pretrained", "false", "--img-size", "32", "--epochs", "1", "--batch-size", "20", "--train-size", "60"),
        *("--val-size", "20", "--test-size", "30", "--device", "cpu", "--seeds", "2", "--lr-factors", "0.3,1"),
        *("--weight-decays", "none", "--extensions", "0", "--threads", "1"),
    ]


def start(root):
    return subprocess.Popen(words(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(root):
    path = root / "results.jsonl"
    return [json.loads(line)["cell"] for line in path.read_text().splitlines()] if path.exists() else []


def trained(output):
    """Cells that a command says it has trained itself."""
    return [line for line in output.splitlines() if line.startswith("[") and "by another process" not in line]


def test_two_commands_at_once_train_every_cell_once(tmp_path):
    root = tmp_path / "c"
    both = [start(root), start(root)]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum(len(trained(out)) for out, _ in outputs) == 8
    assert sorted(lines_of(root)) == sorted(set(lines_of(root))) and len(lines_of(root)) == 8
    assert not list((root / "locks").glob("digits*"))


def test_a_killed_command_is_gone_on_with(tmp_path):
    root = tmp_path / "c"
    process = start(root)
    while len(lines_of(root)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    process.communicate()
    done = set(lines_of(root))
    assert 2 <= len(done) < 8
    again = start(root)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert len(trained(out)) == 8 - len(done) and len(lines_of(root)) == 8


def test_a_cell_whose_process_is_killed_is_recorded_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    from snella_lab.comparison import executors

    original, killed = executors.InProcesses.start, []

    def start_and_kill(self, cell):
        original(self, cell)
        if not killed:
            killed.append(cell.name)
            os.kill(next(iter(self._running.values()))[1].pid, signal.SIGKILL)

    monkeypatch.setattr(executors.InProcesses, "start", start_and_kill)
    with pytest.raises(CellsFailedError, match="SIGKILL"):
        compare(tiny(methods=["linear"]), tmp_path / "c", workers=1, threads=1, console=Console(file=io.StringIO()))
    rows = rows_of(tmp_path / "c")
    assert rows[killed[0]]["status"] == "failed"
    assert rows[killed[0]]["error"] == "the process was killed by SIGKILL; the machine may be out of memory"
    final = rows["digits/linear/seed-0"]
    assert final["status"] == "success" and final["peak_rss_mib"] > final["training_mib"] > 1


def test_two_workers_give_the_same_numbers_as_this_process(tiny, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        compare(tiny(), tmp_path / name, workers=workers, threads=1, console=Console(file=io.StringIO()))
    here, there = (rows_of(tmp_path / name) for name in ("a", "b"))
    assert set(here) == set(there) and len(here) == 6
    for cell, row in here.items():
        assert (row["val_loss"], row["test_loss"], row["train_loss"]) == tuple(
            there[cell][key] for key in ("val_loss", "test_loss", "train_loss")
        )


def test_rows_name_the_code_that_was_loaded_and_not_what_the_checkout_has_become(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("snella_lab.comparison.cells._state", ("feed", False))
    experiment = tiny(methods=["linear"], grid={"lr_factors": [1.0]})
    compare(experiment, tmp_path / "c", workers=1, threads=1, console=Console(file=io.StringIO()))
    (row,) = rows_of(tmp_path / "c").values()
    assert row["package_info"]["snella-commit-hash"] == "feed" and row["git_dirty"] is False


def test_ray_trains_the_cells_on_a_local_cluster_of_several_processes(tiny, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    experiment, output = tiny(methods=["linear", "bias"], grid={"lr_factors": [1.0]}), io.StringIO()
    compare(experiment, tmp_path / "c", workers=2, threads=1, ray=True, console=Console(file=output, width=200))
    assert not ray.is_initialized()
    rows = rows_of(tmp_path / "c")
    assert sorted(rows) == ["digits/bias/seed-0", "digits/linear/seed-0"]
    assert {row["status"] for row in rows.values()} == {"success"}
    assert all(row["peak_rss_mib"] > row["training_mib"] > 1 for row in rows.values())
    assert len(trained(output.getvalue())) == 2
