"""Packages import only packages to their right in `docs/architecture.md`, without circular imports."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
ROOTS = ("snella_lab", "snella_app", "snella")
"""Root packages, left to right."""
SHARED = {"snella_app": {"__init__", "console", "device", "files", "plugins", "records", "settings", "text"}}
"""Modules that all packages of a root may import."""
LIBRARY_DEPENDENCIES = {"numba", "numpy", "peft", "regex", "safetensors", "torch", "transformers", "triton"} | {
    "bitsandbytes",
    "huggingface_hub",
    "llvmlite",
    "torchao",
}
"""Packages that the library may import: its dependencies, PEFT's dependencies and optional backends."""


def layers(root):
    """Return the layers in the diagram of a root, left to right."""
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"    {root}: "))
    return [set(re.findall(r"\w+", part)) for part in line.partition(": ")[2].split("→")]


def module_parts(path):
    """Return the dotted name of a module file as a tuple."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_names(tree, *, top_level=False):
    """Yield the project names that a module imports; `top_level` excludes imports in functions and conditions."""
    nodes = list(tree.body) if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOTS:
            yield from ((*node.module.split("."), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names if a.name.split(".")[0] in ROOTS)


def module_of(name):
    """Return the module or package of a dotted name."""
    while not ((SOURCES.joinpath(*name)).is_dir() or SOURCES.joinpath(*name).with_suffix(".py").is_file()):
        name = name[:-1]
    return name


def modules(root):
    """Return the syntax trees of a root by file."""
    return {path: ast.parse(path.read_text()) for path in sorted((SOURCES / root).rglob("*.py"))}


@pytest.mark.parametrize("root", ROOTS)
def test_root_packages_import_only_packages_to_their_right(root):
    allowed = ROOTS[ROOTS.index(root) :]
    wrong = {
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for path, tree in modules(root).items()
        for name in imported_names(tree)
        if name[0] not in allowed
    }
    assert not wrong


def test_library_imports_only_its_dependencies():
    imported = set()
    for tree in modules("snella").values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - set(sys.stdlib_module_names) - {"snella"} <= LIBRARY_DEPENDENCIES


@pytest.mark.parametrize("root", ["snella_app", "snella_lab"])
def test_packages_import_only_packages_to_their_right(root):
    order, shared = layers(root), SHARED.get(root, {"__init__"})
    packages = {path.stem for path in (SOURCES / root).glob("*.py")}
    packages |= {path.parent.name for path in (SOURCES / root).glob("*/__init__.py")}
    assert packages - shared - {"__init__", "__main__"} == set().union(*order)
    rank = {package: number for number, names in enumerate(order) for package in names}
    wrong = []
    for path, tree in modules(root).items():
        package = (*module_parts(path), "__init__")[1]
        if package in ("__init__", "__main__"):
            continue
        for name in imported_names(tree):
            target = (*module_of(name), "__init__")[1]
            is_allowed = (
                name[0] != root or target in shared or target == package or rank.get(package, len(order)) < rank[target]
            )
            if not is_allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
    assert not wrong


def test_there_are_no_circular_imports():
    graph = {}
    for root in ROOTS:
        for path, tree in modules(root).items():
            module = module_parts(path)
            names = (module_of(name) for name in imported_names(tree, top_level=True))
            graph[module] = {name for name in names if name not in (module, module[:-1], (root,))}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circular import: {' → '.join('.'.join(name) for name in error.args[1])}")
