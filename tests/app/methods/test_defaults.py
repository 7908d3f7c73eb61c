"""Method names occur only in the `methods/` packages."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import snella_app
from snella_app.config.train import TrainConfig
from snella_app.methods import METHODS, find_method
from snella_app.methods.defaults import (
    DEFAULT_METHOD,
    MEMORY_METHODS,
    PROBE_METHOD,
    RECIPE_METHOD,
    REFERENCE_METHOD,
    SPARSE_DEFAULTS,
    SPARSE_RECIPES,
)

SOURCES = Path(snella_app.__file__).parents[1]
OTHER_MEANINGS = {
    "snella": "the program and the package",
    "linear": "a kernel function, a schedule, a mode of interpolation",
    "bias": "a parameter",
    "adapter": "the folder of an adapter",
}
"""Method names with another meaning in the code, and that meaning."""
ALLOWED = {
    "snella_app/methods/": "registry",
    "snella_lab/methods/": "registry of snella_lab",
    "snella_lab/bench/": "its baselines are benchmark functions, not registered methods",
    "snella_lab/recipes/demo.py": "it demonstrates three methods",
}
ALLOWED_NAMES = {
    "snella_app/runs/export.py": "lora",
    "snella_app/cli/commands.py": "lora",
    "snella_app/settings.py": "full",
}
"""Files that use a method name for an export format or for 32-bit precision."""


def strings_of(path):
    """Return the strings of a file with line numbers, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def lines_with(path, names):
    """Return the lines of a file with a method name in a string, with or without a number."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))})(-\d*)?")
    return [f"{path}:{line}: {text!r}" for line, text in strings_of(path) if pattern.fullmatch(text)]


def test_method_names_occur_only_in_the_methods_packages():
    names = [name for name in METHODS if name not in OTHER_MEANINGS]
    relative_paths = {path: path.relative_to(SOURCES).as_posix() for path in sorted(SOURCES.rglob("*.py"))}
    searched = [path for path, relative in relative_paths.items() if not relative.startswith(tuple(ALLOWED))]
    of_file = {path: [name for name in names if name != ALLOWED_NAMES.get(relative_paths[path])] for path in searched}
    lines = [line for path in searched for line in lines_with(path, of_file[path])]
    assert len(searched) > 80 and not lines, "a method's needs are fields of `Method`:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "folder",
    [
        "snella_app/runs",
        "snella_app/tasks",
        "snella_app/report",
        "snella_app/cli",
        "snella_app/data",
        "snella_lab/comparison",
        "snella_lab/recipes/instruct",
    ],
)
def test_other_meanings_are_not_mistaken_for_methods(folder):
    names = [name for name in OTHER_MEANINGS if name not in ("adapter", "snella")]
    lines = [line for path in sorted((SOURCES / folder).rglob("*.py")) for line in lines_with(path, names)]
    is_schedule = [line for line in lines if "recipes/instruct/train.py" in line and "'linear'" in line]
    assert len(lines) == len(is_schedule) <= 1, "\n".join(lines)


def test_method_names_are_detected(tmp_path):
    (tmp_path / "a.py").write_text('"""lora"""\nx = "lora-8"\nname = f"snell-{x}"\ny = "a lora"\n')
    assert lines_with(tmp_path / "a.py", ["lora", "snell"]) == [
        f"{tmp_path / 'a.py'}:2: 'lora-8'",
        f"{tmp_path / 'a.py'}:3: 'snell-'",
    ]


@pytest.mark.parametrize(("method", "purpose"), [(DEFAULT_METHOD, ""), (RECIPE_METHOD, "generation"),
                                                 (RECIPE_METHOD, "language")])  # fmt: skip
def test_help_shows_the_defaults_of_the_default_method(method, purpose):
    assert SPARSE_RECIPES.get(purpose, SPARSE_DEFAULTS) == find_method(method).defaults_of(purpose)


def test_missing_learning_rates_and_weight_decay_of_a_method_have_defaults(monkeypatch):
    monkeypatch.setitem(METHODS, "own", dataclasses.replace(find_method("bias"), defaults={"head_lr": 0.01}))
    optim = TrainConfig.from_flat(data="photos", backbone="test_vit", out="run", method="own").resolved().optim
    assert (optim.lr, optim.head_lr, optim.weight_decay) == (1e-3, 0.01, 0.0)


def test_documented_methods_are_in_the_table():
    for name in (PROBE_METHOD, REFERENCE_METHOD, *(name.format(r=8) for name in MEMORY_METHODS)):
        assert find_method(name) is not None
    assert find_method(PROBE_METHOD).is_head_only
