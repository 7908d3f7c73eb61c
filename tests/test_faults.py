"""Quick version of `make faults`, which must report no failures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARNESS = ROOT / "benchmarks" / "faults.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="requires fork and /proc")
def test_quick_fault_injection_finds_no_failures(tmp_path):
    command = [sys.executable, str(HARNESS), "--quick", "--out", str(tmp_path / "row.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    row = json.loads((tmp_path / "row.jsonl").read_text())
    assert row["quick"] and len(row["commit"]) in (0, 40)
    counts = row["counts"]
    groups = ("killed", "disk full", "finished", "checkpoint", "fuzzed", "together", "overwritten", "merged", "limits")
    assert set(counts) == {*groups, "exchanged", "forged", "objects", "bombs"}
    assert counts["exchanged"] == {"one line": 5} and counts["bombs"] == {"one line": 2}
    assert counts["killed"] == {"same bits": 2} and counts["disk full"]["same bits"] == 1
    assert set(counts["limits"]) <= {"one line with path", "no effect"}
    assert counts["finished"]["noticed"] > 0 and sum(counts["fuzzed"].values()) == 12
    assert "| killed | 2 | 2 same bits; 0 other results, 0 traceback, 0 not resumed |" in result.stdout
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in result.stdout.splitlines() if line[:2] == "| "}
    for group, zeros in {
        "forged": "0 traceback",
        "objects": "0 traceback, 0 executed",
        "bombs": "0 traceback, 0 executed",
        "limits": "0 traceback, 0 leftover files, 0 no path",
    }.items():
        assert rows[group].endswith(f"; {zeros} |")
