"""Resources of the compiled Triton kernels, as the committed rows state them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .triton_problems import needs_triton

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
ROWS = [json.loads(line) for line in (BENCHMARKS / "triton_resources.jsonl").read_text().splitlines()]
COMPILED = [row for row in ROWS if "registers" in row and row["warps"] == 4]


def test_there_is_a_row_for_each_kernel_rank_and_capability():
    keys = {(row["kernel"], row["rank"], row["capability"]) for row in COMPILED}
    names, ranks, capabilities = (set(values) for values in zip(*keys, strict=True))
    assert ranks == {8, 16, 32} and capabilities == {80, 86, 89, 90, 100, 120}
    assert all(sum(key[1] == rank for key in keys) >= 20 * len(capabilities) for rank in ranks) and len(names) >= 21


def test_hardly_a_kernel_spills():
    spilling = [row for row in COMPILED if row["spilled_bytes"]]
    assert len(spilling) <= 12 and max(row["spilled_bytes"] for row in spilling) <= 24


def test_amd_s_compiler_takes_every_kernel():
    assert not [row for row in ROWS if row["capability"] == "gfx942" and row["error"]]


@needs_triton
def test_occupancy_is_limited_by_registers_shared_memory_or_programs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from triton_resources import occupancy

    assert occupancy(32, 0, 4, 90) == 1.0  # 16 programs of 4 warps
    assert occupancy(128, 0, 4, 90) == 0.25  # 65,536 / (128 · 32 · 4) = 4 programs
    assert occupancy(32, 100 * 1024, 4, 90) == 0.125  # two programs of 101 KiB in 228 KiB
    assert occupancy(32, 0, 1, 86) == round(16 / 48, 3)  # at most 16 programs


@needs_triton
@pytest.mark.slow
def test_kernels_compiled_now_take_no_more_registers_than_the_rows_say(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "rows.jsonl"
    script = str(BENCHMARKS / "triton_resources.py")
    words = ["--capabilities", "90", "--ranks", "8", "--out", str(out)]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, script, *words], env=environment, check=True, capture_output=True)
    stored = {(row["kernel"], row["rank"], row["capability"]): row for row in COMPILED}
    for row in map(json.loads, out.read_text().splitlines()):
        if "registers" in row and row["triton"] == COMPILED[0]["triton"]:
            before = stored[row["kernel"], row["rank"], row["capability"]]
            assert row["registers"] <= before["registers"] and row["spilled_bytes"] <= before["spilled_bytes"], row
