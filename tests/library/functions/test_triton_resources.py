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
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # per multiprocessor
# per rank: the most executed instructions per entry with aligned and with other sizes, then the fewest active warps of
# each, over all capabilities; the number of warps also bounds registers and shared memory
LIMITS = {
    "add sparse, official": {8: (12, 21, 48, 32), 16: (12, 21, 48, 32), 32: (12, 21, 48, 32)},
    "add sparse, soft": {8: (13, 22, 48, 32), 16: (13, 22, 48, 32), 32: (13, 22, 48, 32)},
    "count within bin, official": {8: (46, 68, 32, 32), 16: (46, 68, 32, 32), 32: (46, 68, 32, 32)},
    "count within bin, soft": {8: (32, 50, 40, 32), 16: (32, 50, 40, 32), 32: (32, 50, 40, 32)},
    "factor gradients, mix-k": {8: (408, 514, 16, 12), 16: (597, 791, 16, 12), 32: (976, 1344, 16, 12)},
    "factor gradients, normalized rbf": {8: (485, 577, 16, 12), 16: (789, 986, 16, 12), 32: (1165, 1530, 16, 12)},
    "factor gradients, p-linear": {8: (286, 388, 16, 12), 16: (434, 619, 16, 12), 32: (731, 1081, 16, 12)},
    "finish thresholds, official": {8: (478, 907, 40, 32), 16: (478, 907, 40, 32), 32: (478, 907, 40, 32)},
    "finish thresholds, soft": {8: (267, 475, 48, 40), 16: (267, 475, 48, 40), 32: (267, 475, 48, 40)},
    "merge and count, mix-k": {8: (149, 153, 24, 24), 16: (159, 156, 16, 16), 32: (243, 234, 32, 32)},
    "merge and count, normalized rbf": {8: (201, 203, 24, 24), 16: (251, 251, 16, 16), 32: (298, 299, 16, 16)},
    "merge and count, p-linear 2 pieces": {8: (125, 123, 24, 24), 16: (131, 130, 16, 16), 32: (209, 206, 32, 32)},
    "merge and count, p-linear 3 pieces": {8: (135, 138, 24, 24)},
    "merge and count, p-linear 4 pieces": {16: (184, 187, 16, 16), 32: (234, 230, 16, 16)},
    "merge, mix-k": {8: (132, 130, 24, 32), 16: (136, 136, 16, 16), 32: (214, 209, 32, 32)},
    "merge, normalized rbf": {8: (180, 176, 24, 24), 16: (227, 229, 16, 16), 32: (276, 276, 16, 16)},
    "scalar gradients, mix-k": {8: (89, 88, 48, 64), 16: (89, 88, 48, 64), 32: (89, 88, 48, 64)},
    "scalar gradients, normalized rbf": {8: (187, 182, 48, 64), 16: (207, 202, 48, 64), 32: (207, 202, 48, 64)},
    "softmax statistics, mix-k": {8: (219, 216, 32, 32), 16: (259, 257, 24, 24), 32: (298, 298, 24, 24)},
    "softmax statistics, normalized rbf": {8: (250, 250, 32, 32), 16: (330, 330, 24, 24), 32: (417, 416, 24, 24)},
    "softmax sums, mix-k": {8: (147, 137, 32, 32), 16: (168, 162, 32, 32), 32: (242, 234, 32, 32)},
    "softmax sums, normalized rbf": {8: (181, 197, 32, 32), 16: (235, 251, 24, 24), 32: (290, 303, 32, 32)},
}


def key(row):
    return row["kernel"], row["rank"], row["capability"], row["aligned"]


def test_committed_rows_are_complete():
    assert {row["rank"] for row in COMPILED} == {8, 16, 32}
    assert {row["capability"] for row in COMPILED} == {80, 86, 89, 90, 100, 120}
    assert len({key(row) for row in COMPILED}) == len(COMPILED) == 21 * 3 * 7


def test_compiled_kernels_do_not_spill():
    assert not [row for row in COMPILED if row["spilled_bytes"]]


def test_compiled_kernels_stay_within_their_limits():
    for row in COMPILED:
        executed, executed_other, warps, warps_other = LIMITS[row["kernel"]][row["rank"]]
        assert row["executed"] <= (executed if row["aligned"] else executed_other), row
        active_warps = round(row["occupancy"] * WARPS[row["capability"]])
        assert active_warps >= (warps if row["aligned"] else warps_other), row


@needs_triton
def test_no_other_tile_is_predicted_to_be_faster_and_the_readme_has_the_predictions(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from triton_resources import CANDIDATE_TILES, backend, ranked_candidates

    readme = Path(backend.__file__).with_name("README.md").read_text()
    ranked = ranked_candidates(ROWS)
    assert {name for name, _ in ranked} == {
        f"{kernel}, mix-k" for kernel in ("merge and count", "merge", "softmax sums", "factor gradients")
    }
    for (name, _), candidates in ranked.items():
        current = next(clocks for clocks, row in candidates if row["launch"] is None)
        best = [min(c for c, row in candidates if tuple(row["tile"].values()) == tile) for tile in CANDIDATE_TILES]
        assert CANDIDATE_TILES[0] == tuple(backend.TILE.values()) and best[0] == min(best)
        assert current < 1.12 * best[0]
        cells = " | ".join(f"{clocks:.2f}" for clocks in (current, *best))
        assert f"| {name.partition(',')[0]} | {cells} |" in readme


@needs_triton
def test_a_kernel_takes_the_longer_of_issuing_instructions_and_moving_bytes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from triton_resources import predicted_clocks

    tile = {"BLOCK_M": 32, "BLOCK_N": 64}
    row = {"kernel": "merge, mix-k", "rank": 8, "capability": 90, "tile": tile, "spilled_bytes": 0, "occupancy": 0.5}
    assert predicted_clocks({**row, "executed": 128.0}) == 1.0  # 8 warps per scheduler hide the latency
    assert predicted_clocks({**row, "executed": 1.0}) == 4 / 14  # a float32 per entry
    assert predicted_clocks({**row, "executed": 128.0, "occupancy": 1 / 16}) == 1 + 40 / 35  # one warp per scheduler
    gradients = {**row, "kernel": "factor gradients, mix-k", "executed": 1.0}
    assert predicted_clocks(gradients) == (4 + 2 + 8 * 8 * (1 / 32 + 1 / 64)) / 14
    assert predicted_clocks({**row, "executed": 1.0, "spilled_bytes": 8}) == float("inf")


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
        kernel, settings = kernels[row["kernel"], row["rank"]]
        settings = settings | {name: size for name, size in row["tile"].items() if name in settings}
        rank, pieces = settings.get("R", 1), settings.get("P", 1)
        launch = backend.launch_options(kernel.__name__, rank, pieces, row.get("aligned", True))
        options = row["launch"] or (launch["num_warps"], launch.get("maxnreg"))
        launch |= dict(zip(("num_warps", "maxnreg"), options, strict=True))
        launch = {name: value for name, value in launch.items() if value is not None}
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
