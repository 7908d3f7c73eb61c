"""Two real processes agree on every budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_rank_has_the_same_budgets_and_weights(tmp_path):
    worker = Path(__file__).with_name("ddp_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # the ranks meet on this machine, whatever its name resolves to
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail(f"the ranks never met or never ended: {[process.communicate() for process in processes]}")
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert len(first["history"]) == 5
    assert list(first["history"][-1]["budgets"]) == ["0", "2"]
    assert first["history"][-1]["budgets"] == first["nonzeros"]
    assert sum(first["nonzeros"].values()) == 216 - round(0.7 * 216)
