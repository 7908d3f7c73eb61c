"""One owner at a time, and a new one when it dies."""

import multiprocessing
import os
import signal
import time

import pytest

from snella.comparison.store import cell_lock, is_locked, remove_lock

FORK = multiprocessing.get_context("fork")


def hold(folder, ready):
    with cell_lock(folder, "a/b") as is_acquired:
        ready.put(is_acquired)
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
    with cell_lock(tmp_path, "a/b") as is_acquired:
        assert not is_acquired
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    assert not is_locked(tmp_path, "a/b")
    with cell_lock(tmp_path, "a/b") as is_acquired:
        assert is_acquired and is_locked(tmp_path, "a/b")
    assert not is_locked(tmp_path, "a/b")


def test_a_stopped_owner_is_alive(owner, tmp_path):
    os.kill(owner.pid, signal.SIGSTOP)
    assert is_locked(tmp_path, "a/b")


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), cell_lock(tmp_path, "x"):
        raise KeyError
    with cell_lock(tmp_path, "x") as is_acquired:
        assert is_acquired


def contend(folder, names):
    for name in names:
        with cell_lock(folder / "locks", name) as is_acquired:
            if is_acquired and not (folder / f"{name}.done").exists():
                with (folder / "log").open("a") as log:
                    log.write(f"{name}\n")
                time.sleep(0.002)
                (folder / f"{name}.done").touch()
        remove_lock(folder / "locks", name) if (folder / f"{name}.done").exists() else None


def test_of_many_contenders_one_does_each_cell(tmp_path):
    names = [f"cell-{i}" for i in range(25)]
    processes = [FORK.Process(target=contend, args=(tmp_path, names)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert sorted((tmp_path / "log").read_text().split()) == sorted(names)


def test_clocks_have_no_say(owner, tmp_path, monkeypatch):
    """A clock that is set while an owner works gives its cell to nobody else."""
    for step_s in (-86400, 86400):
        now = time.time() + step_s
        os.utime(tmp_path / "a!b.lock", (now, now))
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert is_locked(tmp_path, "a/b")
        with cell_lock(tmp_path, "a/b") as is_acquired:
            assert not is_acquired
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    with cell_lock(tmp_path, "a/b") as is_acquired:
        assert is_acquired


def test_children_of_a_killed_owner_do_not_hold_its_lock(tmp_path):
    """As the loaders' processes of a run that the system killed for its memory."""
    ready = FORK.Queue()

    def own():
        with cell_lock(tmp_path, "x"):
            child = FORK.Process(target=time.sleep, args=(30,))
            child.start()
            ready.put(child.pid)
            time.sleep(60)

    process = FORK.Process(target=own)
    process.start()
    child = ready.get(timeout=30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        os.kill(child, 0)
        with cell_lock(tmp_path, "x") as is_acquired:
            assert is_acquired
    finally:
        os.kill(child, signal.SIGKILL)


def test_looking_at_a_free_lock_takes_it_from_nobody(tmp_path):
    (tmp_path / "x.lock").touch()
    stop = FORK.Event()

    def look():
        while not stop.is_set():
            is_locked(tmp_path, "x")

    process = FORK.Process(target=look)
    process.start()
    try:
        for _ in range(100):
            with cell_lock(tmp_path, "x") as is_acquired:
                assert is_acquired
    finally:
        stop.set()
        process.join()


def test_names_that_begin_alike_are_different_locks(tmp_path):
    with cell_lock(tmp_path, "x") as first, cell_lock(tmp_path, "x.1") as second:
        assert first and second
