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


def test_200_cells_stay_within_the_budget_of_calls_and_bytes(driver, tmp_path):
    from count_calls import count_calls

    from snella_lab.comparison import compare

    calls = count_calls(lambda: driver._compare(tmp_path / "c", 200)).within(str(Path(compare.__file__).parent))
    assert calls.total() <= 300 * 200, calls
    rows = (tmp_path / "c" / "results.jsonl").read_bytes()
    assert rows.count(b"\n") == 200 and len(rows) <= 200 * 5000
