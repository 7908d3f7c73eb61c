"""Helpers for subprocesses: two distributed ranks and the command line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def run_in_two_processes(worker: Path, folder: Path, *arguments: str, timeout: float) -> list[Any]:
    """Run a worker script in two processes and return the JSON in the last line of each output.

    Args:
        worker: Script, called with the rank, the rendezvous file and `arguments`.
        folder: Folder of the rendezvous file.
        arguments: Additional arguments.
        timeout: Time limit per process in seconds.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder / "meeting"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # use the loopback interface, independent of the hostname
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail(f"the ranks timed out: {[process.communicate() for process in processes]}")
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@contextlib.contextmanager
def command(args: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run `snella` with `args` in a process that handles Ctrl-C; kill it on exit."""
    program = (
        # child processes of a background shell ignore SIGINT by default
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from snella_app.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
