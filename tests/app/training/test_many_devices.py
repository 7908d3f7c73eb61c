"""The two cheapest settings of `benchmarks/many_devices.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "many_devices.py"
ENGINES = ("DDP", "FSDP2")
needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of two processes in a plain loop, by engine."""
    out = tmp_path_factory.mktemp("many") / "rows.jsonl"
    args = ["--loops", "torchrun", "--engines", *ENGINES, "--options", "plain", "--counts", "2", "--out", str(out)]
    process = subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    return {row["engine"]: row for row in map(json.loads, out.read_text().splitlines())}


@needs_processes
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_match_one_and_save_adapters(rows, engine):
    row = rows[engine]
    assert "error" not in row, row
    assert row["same_on_all_ranks"]
    assert row["processes_that_saved"] == 1
    assert row["largest_loss_difference"] < 1e-4
    assert row["budget_entries_moved"] <= 4  # differently rounded importance may move entries


@needs_processes
@pytest.mark.parametrize("engine", ENGINES)
def test_the_allocator_communicates_at_most_one_number_per_matrix_and_step(rows, engine):
    row = rows[engine]
    per_step = row["allocator_bytes_per_step"]
    expected = [0, 0, 8 * row["matrices"]] * 4  # every third step reallocates
    if engine == "FSDP2":
        expected[0] = row["matrices"]  # the check for missing gradients, one byte per matrix
    assert per_step == expected
