"""Packages import only what stands to their right in `docs/architecture.md`, and modules in no circle."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
ROOTS = ("snella_lab", "snella_app", "snella")
"""From left to right."""
OF_ALL = {"snella_app": {"__init__", "console", "device", "files", "plugins", "records", "settings", "text"}}
"""What all packages of a root use."""
LIBRARY_NEEDS = {"numba", "numpy", "peft", "regex", "safetensors", "torch", "transformers", "triton"} | {
    "bitsandbytes",
    "huggingface_hub",
    "llvmlite",
    "torchao",
}
"""Packages that the library imports: its own dependencies, what PEFT depends on, and the optional backends."""


def layers(root):
    """The sets of packages in the diagram of one root, from left to right."""
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"    {root}: "))
    return [set(re.findall(r"\w+", part)) for part in line.partition(": ")[2].split("→")]


def parts_of(path):
    """The name of a module or package below `src`, from its file."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(tree, *, at_once=False):
    """Dotted names of this project that a module imports; with `at_once` not those within functions or conditions."""
    nodes = list(tree.body) if at_once else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOTS:
            yield from ((*node.module.split("."), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names if a.name.split(".")[0] in ROOTS)


def home_of(name):
    """The module or package that a dotted name is or stands in."""
    while not ((SOURCES.joinpath(*name)).is_dir() or SOURCES.joinpath(*name).with_suffix(".py").is_file()):
        name = name[:-1]
    return name


def modules(root):
    """Parsed modules of a root, by their file."""
    return {path: ast.parse(path.read_text()) for path in sorted((SOURCES / root).rglob("*.py"))}


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_imports_only_from_roots_to_its_right(root):
    allowed = ROOTS[ROOTS.index(root) :]
    wrong = {
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for path, tree in modules(root).items()
        for name in imported(tree)
        if name[0] not in allowed
    }
    assert not wrong


def test_the_library_needs_torch_and_peft_alone():
    found = set()
    for tree in modules("snella").values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    assert found - set(sys.stdlib_module_names) - {"snella"} <= LIBRARY_NEEDS


@pytest.mark.parametrize("root", ["snella_app", "snella_lab"])
def test_a_package_imports_only_from_packages_to_its_right(root):
    order, of_all = layers(root), OF_ALL.get(root, {"__init__"})
    there = {path.stem for path in (SOURCES / root).glob("*.py")}
    there |= {path.parent.name for path in (SOURCES / root).glob("*/__init__.py")}
    assert there - of_all - {"__init__", "__main__"} == set().union(*order)
    rank = {package: number for number, names in enumerate(order) for package in names}
    wrong = []
    for path, tree in modules(root).items():
        package = (*parts_of(path), "__init__")[1]
        if package in ("__init__", "__main__"):
            continue
        for name in imported(tree):
            used = (*home_of(name), "__init__")[1]
            ok = name[0] != root or used in of_all or used == package or rank.get(package, len(order)) < rank[used]
            if not ok:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for root in ROOTS:
        for path, tree in modules(root).items():
            module = parts_of(path)
            names = (home_of(name) for name in imported(tree, at_once=True))
            graph[module] = {name for name in names if name not in (module, module[:-1], (root,))}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join('.'.join(name) for name in error.args[1])}")
