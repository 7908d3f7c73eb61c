"""Settings of `benchmarks/many_devices.py` that run with two processes, and its tables."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SETTINGS = (
    ("torchrun", "DDP"),
    ("torchrun", "FSDP2"),
    ("torchrun", "FSDP1"),
    ("snella train", "DDP"),
    ("snella train", "shard"),
)
needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Return a function that runs two processes with an option once and returns the rows by loop and engine."""

    @functools.cache
    def run(option):
        out = tmp_path_factory.mktemp(option) / "rows.jsonl"
        loops, engines = (list(dict.fromkeys(values)) for values in zip(*SETTINGS, strict=True))
        args = ["--loops", *loops, "--engines", *engines, "--options", option, "--counts", "2", "--out", str(out)]
        script = str(BENCHMARKS / "many_devices.py")
        process = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=280)
        assert process.returncode == 0, process.stderr
        rows = map(json.loads, out.read_text().splitlines())
        return {(row["loop"], row["engine"]): row for row in rows if row["option"] == option}

    return run


@needs_processes
@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
def test_two_processes_match_one_and_save_adapters(measure, setting):
    row = measure("plain")[setting]
    assert "error" not in row, row
    assert row["same_on_all_ranks"]
    assert row["processes_that_saved"] == 1
    assert row["largest_loss_difference"] < 1e-4
    assert row["budget_entries_moved"] <= 4  # differently rounded importance may move entries


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
def test_bfloat16_matches_one_process_with_the_same_casts(measure, setting):
    row = measure("bf16")[setting]
    assert "error" not in row, row
    assert row["same_on_all_ranks"]
    assert row["processes_that_saved"] == 1
    assert row["largest_loss_difference"] < 5e-3


@needs_processes
@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
def test_the_allocator_communicates_at_most_one_number_per_matrix_and_step(measure, setting):
    row = measure("plain")[setting]
    expected = [0, 0, 8 * row["matrices"]] * 4  # every third step reallocates
    if setting[1].startswith("FSDP"):
        expected[0] = row["matrices"]  # the check for missing gradients, one byte per matrix
    if setting[1] == "FSDP1":
        expected[0] += 8 * 2 * 2 * row["matrices"]  # the shard sizes of both factors in both processes, once
    assert row["allocator_bytes_per_step"] == expected


@pytest.fixture
def many_devices(monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("many_devices")


def result(**changes):
    """Return a row of the benchmark."""
    row = {
        **{"loop": "torchrun", "engine": "DDP", "option": "plain", "allocator": True, "processes": 2},
        **{"resumed_from": None, "same_on_all_ranks": True, "largest_loss_difference": 2e-7, "matrices": 12},
        **{"allocator_bytes_per_step": [0, 96], "processes_that_saved": 1},
    }
    return {**row, **changes}


def test_the_tables_group_equal_results_and_list_errors_by_setting(many_devices):
    rows = [
        result(),
        result(engine="FSDP2", largest_loss_difference=5e-7),
        result(engine="FSDP2", processes=4, resumed_from=2, error="RuntimeError: no"),
        result(loop="snella train", engine="shard", same_on_all_ranks=False),
        result(engine="ZeRO-1", error="NotImplementedError: hidden"),
        result(engine="ZeRO-2", error="NotImplementedError: hidden"),
    ]
    results, errors = many_devices.table(rows).split("\n\n")
    assert results.splitlines()[2:] == [
        "| DDP | torchrun | plain | yes | < 1e-06 | – | once | – | – | 0 | 96 |",
        "| FSDP2 | torchrun | plain | yes | < 1e-06 | – | once | error | – | 0 | 96 |",
        "| `--shard` | `snella train` | plain | **no** | < 1e-06 | – | once | – | – | 0 | 96 |",
    ]
    assert errors.splitlines()[2:] == [
        "| FSDP2 | torchrun | plain | 2 → 4 | `RuntimeError: no` |",
        "| ZeRO-1 with an allocator, ZeRO-2 with an allocator | torchrun | plain | 2 | `NotImplementedError: hidden` |",
    ]


def test_bfloat16_is_compared_with_a_single_process_that_casts_in_the_same_way(many_devices):
    reference = many_devices._reference
    assert reference("torchrun", "DDP", "bf16") == ("torchrun", "one process", "bf16", True)
    assert reference("torchrun", "FSDP2", "bf16")[1] == many_devices.SINGLE_CAST
    assert reference("torchrun", "ZeRO-3", "bf16") == ("torchrun", many_devices.SINGLE_CAST, "bf16", False)
    assert reference("snella train", "shard", "bf16")[1] == "one process"
    assert reference("torchrun", "FSDP1", "compile") == ("torchrun", "one process", "plain", True)
