"""Comparisons in several processes: workers, concurrent and killed commands, Ray."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from snella_lab.comparison import executors
from snella_lab.comparison.compare import CellsFailedError, _RunLimit, compare
from snella_lab.comparison.options import ExecutionConfig
from snella_lab.comparison.run_cell import Outcome
from snella_lab.comparison.store import LOCKS, cell_lock

from .conftest import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMPARE = [sys.executable, "-m", "snella_app.cli.main", "compare"]


def compare_command(root):
    """Return the command line of a comparison with 8 cells."""
    return [
        *(*COMPARE, "--out", str(root), "--methods", "linear,bias", "--data", "digits", "--backbone", "test_vit"),
        *("--pretrained", "false", "--img-size", "32", "--epochs", "1", "--batch-size", "20", "--train-size", "60"),
        *("--val-size", "20", "--test-size", "30", "--device", "cpu", "--seeds", "2", "--lr-factors", "0.3,1"),
        *("--weight-decays", "none", "--extensions", "0", "--threads", "1"),
    ]


def start(root):
    return subprocess.Popen(compare_command(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(root):
    path = root / "results.jsonl"
    return [json.loads(line)["cell"] for line in path.read_text().splitlines()] if path.exists() else []


def trained(output):
    """Return the output lines of the cells that the command itself trained."""
    return [line for line in output.splitlines() if line.startswith("[") and "by another process" not in line]


def test_two_concurrent_commands_train_every_cell_once(tmp_path):
    root = tmp_path / "c"
    processes = [start(root), start(root)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(len(trained(out)) for out, _ in outputs) == 8
    assert sorted(lines_of(root)) == sorted(set(lines_of(root))) and len(lines_of(root)) == 8
    assert not list((root / "locks").glob("digits*"))


def test_killed_command_can_be_resumed(tmp_path):
    root = tmp_path / "c"
    process = start(root)
    while len(lines_of(root)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    process.communicate()
    finished_cells = set(lines_of(root))
    assert 2 <= len(finished_cells) < 8
    resumed = start(root)
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    assert len(trained(out)) == 8 - len(finished_cells) and len(lines_of(root)) == 8


def test_cell_with_a_killed_process_is_recorded_and_the_others_continue(tiny, tmp_path, monkeypatch):
    original, killed = executors.InProcesses.start, []

    def start_and_kill(self, cell):
        original(self, cell)
        if not killed:
            killed.append(cell.name)
            os.kill(next(iter(self._running.values()))[1].pid, signal.SIGKILL)

    monkeypatch.setattr(executors.InProcesses, "start", start_and_kill)
    with pytest.raises(CellsFailedError, match="SIGKILL"):
        compare(
            tiny(methods=["linear"]), tmp_path / "c", ExecutionConfig(workers=1, threads=1), Console(file=io.StringIO())
        )
    rows = rows_of(tmp_path / "c")
    assert rows[killed[0]]["status"] == "failed"
    assert rows[killed[0]]["error"] == "the process was killed by SIGKILL; the machine may be out of memory"
    final = rows["digits/linear/seed-0"]
    assert final["status"] == "success" and final["peak_rss_mib"] > final["training_mib"] > 1


def test_two_workers_give_the_same_results_as_one_process(tiny, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        compare(tiny(), tmp_path / name, ExecutionConfig(workers=workers, threads=1), Console(file=io.StringIO()))
    sequential, parallel = (rows_of(tmp_path / name) for name in ("a", "b"))
    assert set(sequential) == set(parallel) and len(sequential) == 6
    for cell, row in sequential.items():
        assert (row["val_loss"], row["test_loss"], row["train_loss"]) == tuple(
            parallel[cell][key] for key in ("val_loss", "test_loss", "train_loss")
        )


def test_rows_record_the_commit_of_the_loaded_code(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("snella_lab.provenance._state", ("feed", False))
    experiment = tiny(methods=["linear"], grid={"lr_factors": [1.0]})
    compare(experiment, tmp_path / "c", ExecutionConfig(workers=1, threads=1), Console(file=io.StringIO()))
    (row,) = rows_of(tmp_path / "c").values()
    assert row["package_info"]["snella-commit-hash"] == "feed" and row["git_dirty"] is False


def test_ray_trains_cells_on_a_local_cluster(tiny, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    experiment, output = tiny(methods=["linear", "bias"], grid={"lr_factors": [1.0]}), io.StringIO()
    compare(
        experiment, tmp_path / "c", ExecutionConfig(workers=2, threads=1, ray=True), Console(file=output, width=200)
    )
    assert not ray.is_initialized()
    rows = rows_of(tmp_path / "c")
    assert sorted(rows) == ["digits/bias/seed-0", "digits/linear/seed-0"]
    assert {row["status"] for row in rows.values()} == {"success"}
    assert all(row["peak_rss_mib"] > row["training_mib"] > 1 for row in rows.values())
    assert len(trained(output.getvalue())) == 2


@pytest.fixture
def cluster(monkeypatch):
    """Start a Ray cluster with one CPU at `RAY_ADDRESS`; tests can add machines."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.setattr(executors, "_NODE_REFRESH_S", 0.0)
    yield ray_cluster
    import ray

    ray.shutdown()
    ray_cluster.shutdown()


@contextlib.contextmanager
def on_ray(monkeypatch, root, work, *, device="cpu", slots=None, gpus=None):
    """Yield a Ray executor whose workers call `work` instead of training."""
    monkeypatch.setattr(executors.Job, "run", work)
    executor = executors.OnRay(root, SimpleNamespace(settings={"device": device}), slots, 1, gpus)
    try:
        yield executor
    finally:
        executor.close()


def finish(executor, count, limit_s=200):
    """Wait for `count` finished cells or the time limit, start lost cells again, and return the outcomes by name."""
    ended, end = {}, time.monotonic() + limit_s
    while len(ended) < count and time.monotonic() < end:
        for outcome in executor.wait(1.0):
            if outcome.row is None and not outcome.error:
                executor.start(outcome.cell)
            else:
                ended[outcome.cell.name] = outcome
    return ended


def cells(*names):
    return [SimpleNamespace(name=name) for name in names]


def test_ray_restarts_cells_of_killed_workers_up_to_a_limit(cluster, tmp_path, monkeypatch):
    def work(job, cell):
        import os
        import signal

        attempts = job.root / cell.name
        with attempts.open("a") as file:
            file.write("x")
        if cell.name == "never" or attempts.stat().st_size == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(cell, "row")

    with on_ray(monkeypatch, tmp_path, work) as executor:
        for cell in cells("once", "never"):
            executor.start(cell)
        ended = finish(executor, 2)
    assert not ended["once"].error and (tmp_path / "once").read_text() == "xx"
    outcome = ended["never"]
    assert outcome.row is None and outcome.error.endswith("(after 2 restarts)")
    assert (tmp_path / "never").read_text() == "xxx"


def test_ray_cell_of_a_lost_worker_has_the_full_run_limit_again(cluster, tmp_path, monkeypatch):
    def work(job, cell):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with on_ray(monkeypatch, tmp_path, work) as executor, cell_lock(tmp_path / LOCKS, "lost"):
        (lost,), limit, now = cells("lost"), _RunLimit(tmp_path, executor, 10.0), [0.0]
        monkeypatch.setattr("snella_lab.comparison.compare.time", SimpleNamespace(monotonic=lambda: now[0]))
        executor.start(lost)
        assert not limit.stop_overdue([lost], [])
        while not (ended := executor.wait(1.0)):
            pass
        now[0] = 11.0
        assert [(outcome.row, outcome.error) for outcome in ended] == [(None, "")]
        assert not limit.stop_overdue([lost], ended)
        assert not limit.stop_overdue([lost], [])


def test_ray_restarts_cells_of_a_lost_machine(cluster, tmp_path, monkeypatch):
    def work(job, cell):
        import time

        with (job.root / cell.name).open("a") as file:
            file.write("x")
        while not (job.root / "removed").exists():
            time.sleep(0.1)
        return Outcome(cell, "row")

    def start(cell):
        executor.start(cell)
        while not (tmp_path / cell.name).exists():
            assert finish(executor, 1, limit_s=0.2) == {}

    with on_ray(monkeypatch, tmp_path, work) as executor:
        stays, lost = cells("stays", "lost")
        start(stays)  # occupies the first machine
        node = cluster.add_node(num_cpus=1)
        start(lost)
        cluster.remove_node(node, allow_graceful=False)
        while executor.slots != 1:
            time.sleep(0.2)
        (tmp_path / "removed").touch()
        assert {name: outcome.error for name, outcome in finish(executor, 2).items()} == {"stays": "", "lost": ""}
    assert [(tmp_path / name).read_text() for name in ("stays", "lost")] == ["x", "xx"]


def test_ray_stops_a_hanging_cell_and_the_others_continue(cluster, tmp_path, monkeypatch):
    def work(job, cell):
        import time

        (job.root / cell.name).touch()
        if cell.name == "hangs":
            time.sleep(10_000)
        return Outcome(cell, "row")

    with on_ray(monkeypatch, tmp_path, work) as executor:
        hangs, other = cells("hangs", "other")
        executor.start(hangs)
        while not (tmp_path / "hangs").exists():
            executor.wait(0.2)
        executor.start(other)
        assert finish(executor, 1, limit_s=3) == {}
        executor.stop(hangs)
        assert {name: outcome.error for name, outcome in finish(executor, 1).items()} == {"other": ""}


def test_ray_uses_an_existing_cluster_and_machines_added_later(cluster, tmp_path, monkeypatch):
    import ray

    def work(job, cell):
        import time

        (job.root / cell.name).touch()
        while len(list(job.root.iterdir())) < 2:
            time.sleep(0.1)
        return Outcome(cell, "row")

    with on_ray(monkeypatch, tmp_path / "runs", work) as executor:
        (tmp_path / "runs").mkdir()
        assert executor.slots == 1
        first, second = cells("first", "second")
        executor.start(first)
        assert finish(executor, 1, limit_s=3) == {}
        node = cluster.add_node(num_cpus=2)
        assert executor.slots == 3
        executor.start(second)
        assert {name: outcome.error for name, outcome in finish(executor, 2).items()} == {"first": "", "second": ""}
        cluster.remove_node(node)
        while executor.slots != 1:
            time.sleep(0.2)
    assert not ray.is_initialized()
    with on_ray(monkeypatch, tmp_path, work, slots=5) as executor:  # the cluster is still running
        assert executor.slots == 1


def test_ray_shares_a_gpu_among_cells(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)

    def work(job, cell):
        import ray

        return Outcome(cell, error=str(ray.get_gpu_ids()))

    try:
        with on_ray(monkeypatch, tmp_path, work, gpus=0.5) as executor:
            assert executor.slots == 2
            for cell in cells("a", "b"):
                executor.start(cell)
            assert {name: outcome.error for name, outcome in finish(executor, 2).items()} == {"a": "[0]", "b": "[0]"}
        with on_ray(monkeypatch, tmp_path, work, device="cuda", slots=3) as executor:
            assert executor.slots == 3
        with on_ray(monkeypatch, tmp_path, work, device="cpu") as executor:
            assert executor.slots == 4
        message = r"a run needs 1 CPUs and 2 GPUs on one machine, but the Ray cluster has 4 CPUs, 1 GPUs"
        with pytest.raises(ValueError, match=message), on_ray(monkeypatch, tmp_path, work, gpus=2):
            pass
    finally:
        ray.shutdown()


def test_unreachable_ray_cluster_is_reported(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")

    def fail(**options):
        raise ConnectionError("Could not connect to the GCS.\nMore lines")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(
        ConnectionError, match=r"no Ray cluster is reachable at RAY_ADDRESS=127\.0\.0\.1:1 \(Could not connect"
    ):
        executors.OnRay(tmp_path, SimpleNamespace(settings={}), None, 1)


def test_killed_ray_driver_resumes_from_checkpoints(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = tmp_path / "c"
    command = [*compare_command(root), "--ray", "--workers", "2", "--lr-factors", "1", "--epochs", "12", "--seeds", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(root.glob("cells/*/*/*/checkpoints/checkpoint-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.communicate()
    before = lines_of(root)
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(lines_of(root)) == ["digits/bias/seed-0", "digits/linear/seed-0"]
    assert len(trained(resumed.stdout)) == 2 - len(before)
    assert any("resuming from" in log.read_text() for log in (root / "logs").glob("*.txt"))


def ray_workers(process):
    """Return the processes of a comparison that train a cell on Ray."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            workers += [child] if "".join(child.cmdline()[:1]).startswith("ray::run") else []
    return workers


def test_ray_cell_resumes_from_its_checkpoint_after_its_worker_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = tmp_path / "c"
    options = ("--ray", "--workers", "2", "--methods", "bias", "--lr-factors", "1", "--epochs", "60", "--seeds", "1")
    process = subprocess.Popen(
        [*compare_command(root), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(root.glob("cells/*/*/*/checkpoints/checkpoint-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (worker,) = ray_workers(process)
    worker.kill()
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err
    assert lines_of(root) == ["digits/bias/seed-0"] and len(trained(out)) == 1
    (row,) = rows_of(root).values()
    assert row["status"] == "success" and row["epochs"] == 60
    (log,) = (root / "logs").glob("*.txt")
    assert log.read_text().count("resuming from") == 1


def test_ray_stops_runs_at_the_run_limit(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = tmp_path / "c"
    endless = ("--methods", "bias", "--lr-factors", "1", "--epochs", "1000000", "--seeds", "1")
    command = [*compare_command(root), *endless, "--ray", "--workers", "2", "--run-limit", "0.2"]
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert stopped.returncode == 1, stopped.stderr
    message = "no result within 0.2 minutes (run_limit); the run was stopped"
    assert message in stopped.stdout + stopped.stderr
    (row,) = rows_of(root).values()
    assert (row["status"], row["error"]) == ("failed", message)
    assert not list((root / "locks").glob("digits*"))
