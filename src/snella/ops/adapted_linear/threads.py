"""Work for several threads at once, on the threads that torch computes with where they can be reached.

Between two products torch's OpenMP threads wait in a loop for some milliseconds, each on its own core. Other threads
would have to share these cores with them: inside a training step of ViT-B on two cores our loops took 1.3 to 1.6 times
as long on threads of their own (one profile, no benchmark row). So the work is given to those very threads, through the
entry point that compilers call for a parallel region. Where torch was built with another runtime, ordinary threads do
it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def run_together(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Run all tasks, up to `threads` of them at a time, and wait for them.

    A task's error is raised here, once all others have ended.
    """
    if threads < 2 or len(tasks) < 2:
        for task in tasks:
            task()
        return
    remaining, faults = iter(tasks), []

    def work(_: object = None) -> None:
        for task in remaining:  # an iterator gives each task to one thread only
            try:
                task()
            except BaseException as fault:
                faults.append(fault)

    library = _torch_openmp()
    if library is not None:
        library.GOMP_parallel(_CALLBACK(work), None, threads, 0)
    else:
        pending = [_pool(threads).submit(work) for _ in range(threads - 1)]
        work()
        for one in pending:
            one.result()
    if faults:
        raise faults[0]


def _pool(threads: int) -> ThreadPoolExecutor:
    """Ordinary threads, kept for the next call."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="snella")
    return _pools[threads]


@lru_cache(maxsize=1)
def _torch_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime that torch has loaded, or `None`."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    home = Path(torch.__file__).parent
    loaded = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    own = sorted(path for path in loaded if Path(path).is_relative_to(home))
    others = sorted(loaded)
    # a wheel brings its own copy; elsewhere torch uses the only one there is
    path = own[0] if own else others[0] if len(others) == 1 else None
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library
