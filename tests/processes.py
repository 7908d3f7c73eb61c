"""Other processes: two of one training, which meet through a file, and a command line of its own."""

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


def in_two_processes(worker: Path, folder: Path, *arguments: str, timeout: float) -> list[Any]:
    """What both processes print in their last line, as JSON.

    Args:
        worker: A script, started with a rank, a path where the ranks meet, and `arguments`.
        folder: Where that path is.
        arguments: The others.
        timeout: Seconds that a process may take.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder / "meeting"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # the ranks meet on this machine, whatever its name resolves to
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail(f"the ranks never met or never ended: {[process.communicate() for process in processes]}")
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@contextlib.contextmanager
def command(words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`snella` with `words` in a process, which takes Ctrl-C and is killed if it is still there at the end."""
    program = (
        # a shell that started the tests in the background lets its children ignore the signal
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from snella_app.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
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
