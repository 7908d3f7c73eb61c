"""`parallel_for` on torch's OpenMP threads and on Python threads."""

import threading
import time

import pytest
import torch

from snella.backends.numba import backend as threads


@pytest.fixture(params=["torch's threads", "ordinary threads"])
def runtime(request, monkeypatch):
    if request.param == "ordinary threads":
        monkeypatch.setattr(threads, "_torch_openmp", lambda: None)
    elif threads._torch_openmp() is None:
        pytest.skip("torch was built without GNU's OpenMP runtime")


def test_every_task_runs_once(runtime):
    completed = []
    threads.parallel_for([lambda k=k: completed.append(k) for k in range(50)], 3)
    assert sorted(completed) == list(range(50))


def test_two_tasks_run_concurrently(runtime):
    barrier = threading.Barrier(2, timeout=20)
    threads.parallel_for([barrier.wait, barrier.wait], 2)


def test_error_is_raised_after_all_tasks_end(runtime):
    completed = []

    def fail():
        raise ValueError("row 3 is broken")

    def slow():
        time.sleep(0.05)
        completed.append(1)

    with pytest.raises(ValueError, match="row 3 is broken"):
        threads.parallel_for([fail, slow, slow], 2)
    assert completed == [1, 1]


def test_torch_products_work_afterwards(runtime):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        x = torch.randn(300, 300)
        expected = x @ x
        threads.parallel_for([lambda: time.sleep(0.01)] * 4, 2)
        assert torch.equal(x @ x, expected)
    finally:
        torch.set_num_threads(before)


def test_two_foreign_openmp_runtimes_fall_back_to_python_threads(monkeypatch):
    class Maps:
        def is_file(self):
            return True

        def read_text(self):
            return "\n".join(f"7f00-7f01 r-xp 0000 00:00 1 /lib/{name}/libgomp.so.1" for name in "ab")

    original = threads.Path
    monkeypatch.setattr(threads, "Path", lambda path: Maps() if path == "/proc/self/maps" else original(path))
    assert threads._torch_openmp.__wrapped__() is None
