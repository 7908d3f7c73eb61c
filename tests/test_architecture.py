"""Packages import only what stands to their right in `docs/architecture.md`, and modules in no circle."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "snella"
SHARED = {"records", "__init__", "_console", "_files", "_settings", "_text"}
"""What all packages use; `snella` itself names the tuner's classes."""
JOINS = {"__init__", "__main__", "_api", "_registration"}
"""Modules at the top that tie packages to the outside."""


def layers():
    """The sets of packages of the diagram, from left to right."""
    line = next(line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if "cli →" in line)
    return [set(re.findall(r"\w+", part)) for part in line.split("→")]


def parts_of(path):
    """The name of a module or package below `snella`, from its file."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imported(tree, *, at_once=False):
    """Dotted names below `snella` that a module imports; with `at_once` not those within functions or conditions."""
    nodes = list(tree.body) if at_once else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "snella":
            yield from ((*node.module.split(".")[1:], alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "snella")


def home_of(name):
    """The module that a dotted name is or stands in."""
    while name and not ((SOURCES.joinpath(*name)).is_dir() or SOURCES.joinpath(*name).with_suffix(".py").is_file()):
        name = name[:-1]
    return name or ("__init__",)


def test_a_package_imports_only_from_packages_to_its_right():
    order = layers()
    packages = {path.name for path in SOURCES.iterdir() if (path / "__init__.py").is_file()}
    assert packages - SHARED == set().union(*order)
    rank = {package: number for number, names in enumerate(order) for package in names}
    wrong = []
    for path in sorted(SOURCES.rglob("*.py")):
        package = parts_of(path)[0]
        if package in JOINS:
            continue
        for name in imported(ast.parse(path.read_text())):
            used = home_of(name)[0]
            allowed = used in SHARED or used == package or rank.get(package, len(order)) < rank[used]
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for path in sorted(SOURCES.rglob("*.py")):
        module = parts_of(path)
        names = (home_of(name) for name in imported(ast.parse(path.read_text()), at_once=True))
        graph[module] = {name for name in names if name not in (module, module[:-1], ("__init__",))}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join('.'.join(name) for name in error.args[1])}")
