"""One owner at a time, and a new one when it dies."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from snella.comparison import locks
from snella.comparison.locks import cell_lock, is_locked, remove_locks

FORK = multiprocessing.get_context("fork")


def hold(folder, ready):
    with cell_lock(folder, "a/b") as is_ours:
        ready.put(is_ours)
        time.sleep(60)


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=30)
    yield process
    if process.is_alive():
        process.kill()
    process.join()


def test_a_lock_that_another_process_holds_is_refused_and_a_killed_owner_is_followed(owner, tmp_path):
    assert is_locked(tmp_path, "a/b")
    with cell_lock(tmp_path, "a/b") as is_ours:
        assert not is_ours
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    assert not is_locked(tmp_path, "a/b")
    with cell_lock(tmp_path, "a/b") as is_ours:
        assert is_ours and is_locked(tmp_path, "a/b")
    assert not is_locked(tmp_path, "a/b")


def test_a_stopped_owner_is_alive(owner, tmp_path):
    os.kill(owner.pid, signal.SIGSTOP)
    assert is_locked(tmp_path, "a/b")


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), cell_lock(tmp_path, "x"):
        raise KeyError
    with cell_lock(tmp_path, "x") as is_ours:
        assert is_ours


def contend(folder, names):
    for name in names:
        with cell_lock(folder / "locks", name) as is_ours:
            if is_ours and not (folder / f"{name}.done").exists():
                with (folder / "log").open("a") as log:
                    log.write(f"{name}\n")
                time.sleep(0.002)
                (folder / f"{name}.done").touch()
        remove_locks(folder / "locks", name) if (folder / f"{name}.done").exists() else None


def test_of_many_contenders_one_does_each_cell(tmp_path):
    names = [f"cell-{i}" for i in range(25)]
    processes = [FORK.Process(target=contend, args=(tmp_path, names)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert sorted((tmp_path / "log").read_text().split()) == sorted(names)


def test_an_owner_on_another_machine_lives_by_its_heartbeat(tmp_path, monkeypatch):
    (tmp_path / "x.0").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0}))
    assert is_locked(tmp_path, "x")
    old = time.time() - locks.STALE_S - 5
    os.utime(tmp_path / "x.0", (old, old))
    assert not is_locked(tmp_path, "x")
    with cell_lock(tmp_path, "x", heartbeat_s=0.02) as is_ours:
        assert is_ours and (tmp_path / "x.1").exists()
        os.utime(tmp_path / "x.1", (old, old))
        time.sleep(0.2)
        assert locks._age_s(tmp_path / "x.1") < 5


def test_a_process_number_that_was_given_again_is_not_the_owner(tmp_path):
    (tmp_path / "x.0").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0}))
    assert not is_locked(tmp_path, "x")


def test_a_damaged_lock_is_free(tmp_path):
    (tmp_path / "x.0").write_text('{"host": ')
    assert not is_locked(tmp_path, "x")


def test_names_that_begin_alike_are_different_locks(tmp_path):
    with cell_lock(tmp_path, "x") as first, cell_lock(tmp_path, "x.1") as second:
        assert first and second
