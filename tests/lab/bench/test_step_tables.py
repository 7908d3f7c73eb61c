"""Tables of step times, memory and single operations."""

from pathlib import Path

import pytest
from rich.console import Console

from snella_lab.bench.bench import BenchConfig, bench
from snella_lab.bench.rows import append_rows

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_memory_table_lists_saved_tensors_by_backbone_size():
    from step_tables import performance_section

    common = {"benchmark": "kept_bytes", "batch": 4, "r": 8, "sparsity": 0.7, "dtype": "float32", "device": "cpu, x"}
    common |= {"commit": "a", "dirty": False, "date": "2026-11-26", "rounds": 2, "step_s": 1.0}
    rows = [
        {**common, "backbone": backbone, "method": name, "weights": weights, "trainable": 2**18, "saved_mib": saved}
        for backbone, weights, lora_mib, snella_mib in (("big", 40 * 2**20, 90, 60), ("small", 10 * 2**20, 50, 30))
        for name, saved in (("lora", lora_mib), ("snella", snella_mib))
    ]
    section = performance_section(rows)
    assert "| small, 10 M | 50 MiB | 30 MiB (0.60) |" in section
    assert section.index("| small, 10 M") < section.index("| big, 42 M | 90 MiB | 60 MiB (0.67) |")


def test_document_without_markers_is_rejected(tmp_path):
    from step_tables import update_document

    (tmp_path / "page.md").write_text("nothing here")
    append_rows(tmp_path / "rows.jsonl", [])
    with pytest.raises(ValueError, match=r"page.md must contain the markers"):
        update_document(tmp_path / "page.md", tmp_path / "rows.jsonl")


def test_run_is_dropped_if_a_later_run_covers_its_methods():
    from step_tables import performance_section

    shared = {"benchmark": "step_time", "backbone": "b", "batch": 1, "r": 8, "sparsity": 0.7, "dtype": "float32"}
    shared |= {"device": "cpu", "commit": "c", "dirty": False, "date": "2026-01-01", "saved_mib": 1.0}
    runs = [
        (4, "lora", 1.0),
        (4, "snella", 2.0),
        (2, "lora", 1.5),
        (2, "paper", 9.0),
        (6, "lora", 1.2),
        (6, "snella", 1.3),
    ]
    rows = [shared | {"rounds": n, "method": name, "step_s": seconds} for n, name, seconds in runs]
    text = performance_section(rows)
    assert "median of 4" not in text and "median of 6" in text
    assert "| paper | 9.00 s" in text, "a run with an additional method and its reference remains"
    assert "| lora | 1.50 s" in text
    later = [row | {"date": "2026-01-02", "step_s": 7.0} for row in rows[-1:]]
    text = performance_section([*rows, *later])
    assert text.count("median of 6") == 2, "ratios are comparable only within a run"
    assert "| snella | 1.30 s" in text and "| snella | 7.00 s" in text


def test_tables_show_device_and_settings(tmp_path):
    from single_operations import measure_matrix, measure_sampling
    from step_tables import performance_section

    config = BenchConfig(["test_vit"], [2], ["lora", "snella"], r=[4], rounds=1)
    sampling = {"tokens": 10, "rounds": 1}
    rows = [*bench(config, Console(quiet=True)), measure_matrix(64, 48, tokens=10, rounds=1)]
    rows += [measure_sampling(64, 48, density=density, **sampling) for density in (0.02, 0.5)]
    text = performance_section(rows)
    assert "**test_vit, batch 2, r 4, sparsity 0.7, float32** · cpu, 1 threads" in text
    assert "| lora | " in text
    assert "| 64×48 | " in text
    assert f"| 64×48 | 10 | {rows[-2]['sampled_over_dense']:.2f} | {rows[-1]['sampled_over_dense']:.2f} |" in text
    assert "density 2.0% | density 50.0%" in text
