"""Driver costs of `snella compare` per cell."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare_driver

    from snella_lab.comparison import compare

    monkeypatch.setattr(compare, "_executor", compare._executor)
    monkeypatch.setattr(compare, "validate_inputs", compare.validate_inputs)
    return compare_driver


def test_fixed_cost_and_slope_are_a_least_squares_line(driver):
    rows = [{"cells": n, "cpu_s": 2 + 0.003 * n, "growth_mb": 20 + 0.004 * n} for n in (1000, 3000, 10_000)]
    assert driver.fit_line(rows) == {
        "sizes": [1000, 3000, 10_000],
        "fixed_s": 2.0,
        "slope_ms_per_cell": 3.0,
        "fixed_mb": 20.0,
        "slope_kb_per_cell": 4.0,
    }


def test_sentence_in_the_guide_matches_the_newest_line_of_the_rows(driver):
    rows = driver.read_rows(ROOT / "benchmarks" / "compare_driver.jsonl")
    sizes = {row["cells"]: row for row in rows if row["benchmark"] == "compare_driver"}
    line = [row for row in rows if row["benchmark"] == "compare_driver_line"][-1]
    fitted = driver.fit_line(list(sizes.values()))
    assert {name: line[name] for name in fitted} == fitted and fitted["sizes"] == [1000, 3000, 10_000, 30_000]
    assert not any(row["dirty"] for row in rows)
    text = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    time, memory = f"{line['slope_ms_per_cell']:.1f} ms", f"{line['slope_kb_per_cell']:.0f} KB"
    assert f"{time} of CPU time and {memory} of memory per cell" in text
    assert f"plus {line['fixed_s']:.1f} s and {line['fixed_mb']:.0f} MB" in text


def test_200_cells_stay_within_the_budget_of_calls_and_bytes(driver, tmp_path):
    from count_calls import count_calls

    from snella_lab.comparison import compare

    calls = count_calls(lambda: driver._compare(tmp_path / "c", 200)).within(str(Path(compare.__file__).parent))
    assert calls.total() <= 300 * 200, calls
    rows = (tmp_path / "c" / "results.jsonl").read_bytes()
    assert rows.count(b"\n") == 200 and len(rows) <= 200 * 5000
