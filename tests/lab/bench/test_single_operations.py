"""Benchmarks of single operations."""

from pathlib import Path

import pytest

from snella.backends.numba import backend as numba_backend

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_matrix_is_timed_against_its_product():
    from single_operations import measure_matrix

    row = measure_matrix(96, 64, tokens=50, rounds=3)
    assert row["shape"] == [96, 64]
    assert row["effective_over_product"] > 0
    assert 1 <= row["extra_over_matrix"] < 400


def test_importance_selection_and_allocation_are_timed_separately():
    from single_operations import measure_competition
    from step_tables import performance_section

    row = measure_competition("test_vit", batch=2, r=4, rounds=2)
    assert row["step_s"] > row["importance_s"] > 0 and row["allocate_s"] > 0
    assert row["merge_and_select_s"] > 0 and row["select_s"] == pytest.approx(
        row["merge_and_select_s"] - row["merge_s"], abs=2e-5
    )
    text = performance_section([row])
    assert "**Overhead of importance, selection and allocation** · cpu, 1 threads" in text
    assert f"| test_vit, batch 2 | {row['step_s']:.2f} s | {row['importance_s']:.3f} s |" in text


def test_sampling_without_entries_is_rejected():
    from single_operations import measure_sampling

    with pytest.raises(RuntimeError, match=r"density must select at least one entry, got 0\.0"):
        measure_sampling(8, 8, density=0.0)


def test_wrong_op_is_not_timed(monkeypatch):
    from single_operations import measure_matrix

    original = numba_backend.select_threshold
    monkeypatch.setattr(numba_backend, "select_threshold", lambda *args: original(*args) * 1.5)
    with pytest.raises(RuntimeError, match=r"impl='numba' does not match the reference: \w+ \[\d+, \d+\] \w+ differs"):
        measure_matrix(8, 8, impl="numba", rounds=1)
