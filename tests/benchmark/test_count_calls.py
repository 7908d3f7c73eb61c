"""How much Python one adapted layer runs."""

import importlib.util
from pathlib import Path

import pytest

from snella import SnellaConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import count_calls

    return count_calls


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_an_adapted_linear_layer_takes_at_most_60_calls_in_6_files(counting):
    config = SnellaConfig(r=8, target_modules=["0"], target_sparsity=0.5, init_sparsity=0.5)
    layer, x = counting.adapted_linear_layer(config)
    calls = counting.count_calls(lambda: layer(x)).within(counting.PACKAGE)
    assert sum(calls.values()) <= 60, calls
    assert len(calls) <= 6, calls


def test_a_call_is_counted_with_its_file_and_built_in_functions_are_not(counting):
    def inner():
        return len("four")

    calls = counting.count_calls(lambda: (inner(), inner()))
    assert calls.by_file == {__file__: 3}
    assert calls.switches == 1
