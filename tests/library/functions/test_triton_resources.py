"""Committed resource rows of the compiled Triton kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .triton_problems import needs_triton

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
ROWS = [json.loads(line) for line in (BENCHMARKS / "triton_resources.jsonl").read_text().splitlines()]
COMPILED = [row for row in ROWS if row.get("launch", "") is None and "registers" in row]
MIN_OCCUPANCY = {"factor gradients": 0.188, "merge": 0.25, "softmax": 0.375, "count within bin": 0.5}
SPILLED_BYTES = {("softmax sums, normalized rbf", 32, 120, True): 24}


def key(row):
    return row["kernel"], row["rank"], row["capability"], row["aligned"]


def test_committed_rows_are_complete():
    assert {row["rank"] for row in COMPILED} == {8, 16, 32}
    assert {row["capability"] for row in COMPILED} == {80, 86, 89, 90, 100, 120}
    assert len({key(row) for row in COMPILED}) == len(COMPILED) == 21 * 3 * 7


def test_compiled_kernels_do_not_spill_more_than_documented():
    spilled = {key(row): row["spilled_bytes"] for row in COMPILED if row["spilled_bytes"]}
    assert spilled == SPILLED_BYTES


def test_occupancy_of_compiled_kernels_reaches_the_documented_minimum():
    for row in COMPILED:
        family = next((name for name in MIN_OCCUPANCY if row["kernel"].startswith(name)), "")
        assert row["occupancy"] >= MIN_OCCUPANCY.get(family, 0.5), row


@needs_triton
def test_occupancy_is_limited_by_registers_shared_memory_or_programs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from triton_resources import occupancy

    assert occupancy(32, 0, 4, 90) == 1.0  # 16 programs of 4 warps
    assert occupancy(128, 0, 4, 90) == 0.25  # 65,536 / (128 · 32 · 4) = 4 programs
    assert occupancy(32, 100 * 1024, 4, 90) == 0.125  # two programs of 101 KiB in 228 KiB
    assert occupancy(32, 0, 1, 86) == round(16 / 48, 3)  # at most 16 programs


@needs_triton
def test_rows_were_compiled_from_the_current_kernels_and_launch_options(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from triton_resources import backend, source_digest, variants

    kernels = {(name, rank): branch for rank in (8, 16, 32) for name, *branch in variants(rank)}
    for row in ROWS:
        if row.get("launch", "") is None:
            kernel, settings = kernels[row["kernel"], row["rank"]]
            rank, pieces = settings.get("R", 1), settings.get("P", 1)
            launch = backend.launch_options(kernel.__name__, rank, pieces, row.get("aligned", True))
            remedy = "recompile with: python benchmarks/triton_resources.py"
            assert row["source"] == source_digest(settings, launch), f"{row['kernel']} has changed; {remedy}"


@needs_triton
@pytest.mark.parametrize("part", [("--capabilities", "90"), ("--ranks", "8", "64")])
def test_a_part_of_the_kernels_does_not_replace_the_committed_rows(part, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import triton_resources

    monkeypatch.setattr(triton_resources, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(triton_resources, "compile_for", lambda *_: pytest.fail("kernels are compiled"))
    monkeypatch.setattr(sys, "argv", ["triton_resources.py", *part])
    with pytest.raises(SystemExit):
        triton_resources.main()
    assert "would replace all rows; pass --out, --launch or --check" in capsys.readouterr().err


@needs_triton
def test_source_digest_covers_code_settings_and_launch_but_no_comments(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import triton_resources
    from triton_resources import source_digest

    original = Path(triton_resources.forward.__file__).read_text()

    def digest(text=original, settings=None, **launch):
        file = tmp_path / "forward.py"
        file.write_text(text)
        monkeypatch.setattr(triton_resources.forward, "__file__", str(file))
        triton_resources.kernel_code.cache_clear()
        return source_digest(settings or {"P": 2}, launch or {"num_warps": 8})

    commented = original.replace("k = tl.floor(", "# a comment\n    k = tl.floor(")
    documented = original.replace('"""Compute `exp(x)`', '"""Approximate `exp(x)`')
    changed = original.replace("tl.fma(p, r, 0.5)", "tl.fma(p, r, 0.25)")
    assert original not in (commented, documented) and digest() == digest(commented) == digest(documented)
    assert len({digest(), digest(changed), digest(settings={"P": 4}), digest(num_warps=4)}) == 4
    monkeypatch.undo()
    triton_resources.kernel_code.cache_clear()


@needs_triton
@pytest.mark.slow
def test_compiled_kernels_match_the_rows(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "rows.jsonl"
    script = str(BENCHMARKS / "triton_resources.py")
    fields = ["--capabilities", "90", "--ranks", "8", "--out", str(out)]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, script, *fields], env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if row.get("error")]  # AMD's compiler accepts every kernel
    compiled = [row for row in rows if "registers" in row]
    assert len(compiled) == 42
    if compiled[0]["triton"] != COMPILED[0]["triton"]:
        pytest.skip("the committed rows are from another Triton version")
    stored = {key(row): row for row in COMPILED}
    for row in compiled:
        committed = stored[key(row)]
        assert row["registers"] <= committed["registers"] and row["spilled_bytes"] <= committed["spilled_bytes"], row
        assert row["occupancy"] == pytest.approx(committed["occupancy"], rel=0.05), row
        assert row["executed"] == pytest.approx(committed["executed"], rel=0.05), row
        assert row["source"] == committed["source"], row
