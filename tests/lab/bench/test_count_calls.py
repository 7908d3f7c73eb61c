"""Readability metrics: Python calls of an adapted layer, functions that receive the configuration, dense statements."""

import ast
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch

from snella import SnellaConfig
from snella_app.config.train import TrainConfig
from snella_app.console import make_console
from snella_app.training.train import train

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import count_calls

    return count_calls


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_adapted_linear_layer_takes_at_most_80_python_calls_in_10_files(counting):
    config = SnellaConfig(r=8, target_modules=["0"], target_sparsity=0.5, init_sparsity=0.5)
    layer, x = counting.adapted_linear_layer(config)
    calls = counting.count_calls(lambda: layer(x)).by_file
    assert sum(calls.values()) <= 80, calls
    assert len(calls) <= 10, calls


def test_calls_of_a_training_step_occur_in_the_documented_order(counting):
    config = SnellaConfig(r=8, target_modules=["0"], target_sparsity=0.5, init_sparsity=0.5, impl="eager")
    layer, x = counting.adapted_linear_layer(config)
    calls = []

    def record(frame):
        callers, outer = [], frame
        while outer := outer.f_back:
            callers.append(outer.f_code.co_qualname)
        calls.append((frame.f_code.co_qualname.replace("TorchBackend", "Backend"), callers))

    with torch.autograd.set_multithreading_enabled(False):
        counting.profile_calls(lambda: layer(x.requires_grad_()).sum().backward(), record)
    text = (ROOT / "src" / "snella" / "DERIVATION.md").read_text()
    lines = text.partition("\n    SnellaLayer.forward")[2].partition("\n\n")[0].splitlines()
    callers = [(4, "SnellaLayer.forward")]
    position = 0
    for line in lines[1:]:
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        callers = [(d, caller) for d, caller in callers if d < depth]
        position += next(k for k, call in enumerate(calls[position:], 1) if call[0] == name)
        assert {caller for _, caller in callers} <= set(calls[position - 1][1]), name
        callers.append((depth, name))


def test_training_configuration_is_passed_to_at_most_10_files(counting, tmp_path):
    config = counting.small_training(str(tmp_path / "run"))
    console = make_console(file=io.StringIO())
    receivers = counting.functions_receiving(TrainConfig, lambda: train(config, console, render_report=False))
    assert len(receivers) <= 10, sorted(receivers)
    assert "train" in {name for names in receivers.values() for name in names}


def test_functions_receiving_an_argument_are_listed_by_file(counting):
    config = SnellaConfig(r=8)
    receivers = counting.functions_receiving(SnellaConfig, lambda: config.rank_of("fc1"))
    assert receivers == {str(Path(counting.PACKAGE, "config.py")): {"SnellaConfig.rank_of"}}
    assert counting.functions_receiving(SnellaConfig, lambda: TrainConfig) == {}


def test_calls_are_counted_by_file_without_built_in_functions(counting):
    def inner():
        return len("four")

    calls = counting.count_calls(lambda: (inner(), inner()))
    assert calls.by_file == {__file__: 2}
    assert calls.switches == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("names = [name for name in names if name]", False),
        ("x = [a if a else b for a in c]", False),
        ("x = {k: [f(v, k) if v else g(v, k) for v in vs if v] for k, vs in d.items() if k not in e}", True),
        ("x = f(a if b else c, d if e else g, h if i else j)", True),
        ("x = f(a + b * c, d[e], g(h, i), j.k(l, m=n), o=p.q + r[s])", True),
        ("x = f(\n    a + b * c,\n    d[e],\n    g(h, i),\n    j.k(l, m=n),\n    o=p.q + r[s],\n)", False),
        ("if any(a and b(c) for c in d for a in (x if c else y) if a(c, d)):\n    pass", True),
        ("for a in b:\n    x = [c for c in a]\n    y = d if e else f", False),
        ("class A:\n    pass", False),
    ],
)
def test_dense_statements_nest_or_combine_expressions(counting, source, expected):
    assert counting.is_dense(ast.parse(source).body[0]) == expected


@pytest.mark.parametrize("root", ["snella", "snella_app", "snella_lab"])
def test_dense_statements_are_rare(counting, root):
    size = counting.size_of(ROOT / "src" / root)
    assert 1000 * size.dense / size.lines <= 4


@pytest.mark.parametrize("root", ["snella", "snella_app", "snella_lab"])
def test_documented_sizes_of_packages_are_up_to_date(counting, root):
    size, text = counting.size_of(ROOT / "src" / root), (ROOT / "docs" / "architecture.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"| `{root}` | ") and line.count("|") == 5)
    modules, lines, dense = (float(cell.replace(",", "")) for cell in line.split("|")[2:5])
    assert modules == pytest.approx(size.modules, rel=0.05)
    assert lines == pytest.approx(size.lines, rel=0.02)
    assert dense == pytest.approx(1000 * size.dense / size.lines, abs=0.2)


def test_documented_counts_of_functions_are_up_to_date(counting, tmp_path):
    text = (ROOT / "docs" / "architecture.md").read_text()
    functions = counting.functions_before_first_step(counting.small_training(str(tmp_path / "first")))
    names = [name for found in functions.values() for name in found if not name.endswith(">")]
    console = make_console(file=io.StringIO())
    receivers = counting.functions_receiving(
        TrainConfig, lambda: train(counting.small_training(str(tmp_path / "second")), console)
    )
    outside = {file: found for file, found in receivers.items() if not re.search(r"config/|settings\.py", file)}
    measured = {
        "project functions called before the first training step": (len(names), len(functions)),
        "receive the whole `TrainConfig` in a training run": (sum(map(len, outside.values())), len(outside)),
    }
    for description, numbers in measured.items():
        count, files = map(int, re.search(rf"{re.escape(description)} \| (\d+) in (\d+) \|", text).groups())
        assert (count, files) == pytest.approx(numbers, rel=0.03)
