"""How much Python one adapted layer runs."""

import importlib.util
import io
from pathlib import Path

import pytest

from snella import SnellaConfig
from snella_app.config import TrainConfig
from snella_app.console import make_console
from snella_app.training.train import train

ROOT = Path(__file__).resolve().parents[3]


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


def test_the_configuration_of_a_training_enters_at_most_10_files(counting, tmp_path):
    config = counting.small_training(str(tmp_path / "run"))
    console = make_console(file=io.StringIO())
    given = counting.functions_given(TrainConfig, lambda: train(config, console, draw_report=False))
    assert len(given) <= 10, sorted(given)
    assert "train" in {name for names in given.values() for name in names}


def test_who_gets_an_argument_is_told_by_file_and_function(counting):
    config = SnellaConfig(r=8)
    given = counting.functions_given(SnellaConfig, lambda: config.rank_of("fc1"))
    assert given == {str(Path(counting.PACKAGE, "config.py")): {"SnellaConfig.rank_of"}}
    assert counting.functions_given(SnellaConfig, lambda: TrainConfig) == {}


def test_a_call_is_counted_with_its_file_and_built_in_functions_are_not(counting):
    def inner():
        return len("four")

    calls = counting.count_calls(lambda: (inner(), inner()))
    assert calls.by_file == {__file__: 3}
    assert calls.switches == 1
