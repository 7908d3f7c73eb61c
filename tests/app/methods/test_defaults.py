"""Method names occur only in the `methods/` packages."""

import ast
import re
from pathlib import Path

import pytest

import snella_app
from snella_app.methods import METHODS, find_method
from snella_app.methods.defaults import (
    DEFAULT_METHOD,
    MEMORY_METHODS,
    PROBE_METHOD,
    RECIPE_METHOD,
    REFERENCE_METHOD,
    shown_defaults,
)

SOURCES = Path(snella_app.__file__).parents[1]
OTHER_MEANINGS = {
    "snella": "the program and the package",
    "linear": "a kernel function, a schedule, a mode of interpolation",
    "bias": "a parameter",
    "adapter": "the folder of an adapter",
}
"""Method names that are also other terms, with the other meaning."""
ALLOWED = {
    "snella_app/methods/": "registry",
    "snella_lab/methods/": "registry of snella_lab",
    "snella_lab/bench/": "its baselines are benchmark functions, not registered methods",
    "snella_app/training/cost_model.py": "it has formulas of individual methods",
    "snella_lab/recipes/demo.py": "it demonstrates three methods",
}
ALLOWED_WORDS = {
    "snella_app/runs/export.py": "lora",
    "snella_app/cli/commands.py": "lora",
    "snella_app/settings.py": "full",
}
"""Files that use one method name as an export format or as the name of 32-bit precision."""


def texts_of(path):
    """Return the strings of a file with line numbers, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def names_in(path, words):
    """Return the lines of a file with a method name in a string, with or without a number."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, words))})(-\d*)?")
    return [f"{path}:{line}: {text!r}" for line, text in texts_of(path) if pattern.fullmatch(text)]


def test_method_names_occur_only_in_the_methods_packages():
    words = [name for name in METHODS if name not in OTHER_MEANINGS]
    places = {path: path.relative_to(SOURCES).as_posix() for path in sorted(SOURCES.rglob("*.py"))}
    searched = [path for path, place in places.items() if not place.startswith(tuple(ALLOWED))]
    of_file = {path: [word for word in words if word != ALLOWED_WORDS.get(places[path])] for path in searched}
    lines = [line for path in searched for line in names_in(path, of_file[path])]
    assert len(searched) > 80 and not lines, "a method's needs are fields of `Method`:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "place",
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
def test_other_words_are_not_mistaken_for_methods(place):
    words = [word for word in OTHER_MEANINGS if word not in ("adapter", "snella")]
    lines = [line for path in sorted((SOURCES / place).rglob("*.py")) for line in names_in(path, words)]
    is_schedule = [line for line in lines if "recipes/instruct/train.py" in line and "'linear'" in line]
    assert len(lines) == len(is_schedule) <= 1, "\n".join(lines)


def test_method_names_are_detected(tmp_path):
    (tmp_path / "a.py").write_text('"""lora"""\nx = "lora-8"\nname = f"snell-{x}"\ny = "a lora"\n')
    assert names_in(tmp_path / "a.py", ["lora", "snell"]) == [
        f"{tmp_path / 'a.py'}:2: 'lora-8'",
        f"{tmp_path / 'a.py'}:3: 'snell-'",
    ]


@pytest.mark.parametrize(("method", "purpose"), [(DEFAULT_METHOD, ""), (RECIPE_METHOD, "generation"),
                                                 (RECIPE_METHOD, "language")])  # fmt: skip
def test_help_shows_the_default_methods_defaults(method, purpose):
    assert shown_defaults(purpose) == find_method(method).defaults_of(purpose)


def test_documented_methods_are_in_the_table():
    for name in (PROBE_METHOD, REFERENCE_METHOD, *(name.format(r=8) for name in MEMORY_METHODS)):
        assert find_method(name) is not None
    assert find_method(PROBE_METHOD).is_head_only
