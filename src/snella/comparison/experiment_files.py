"""Experiment files: YAML, found by path, or by the name of one that ships with snella."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import snella
from snella.comparison.entries import DataEntry, MethodEntry, data_entry, method_entry, plain_entry
from snella.comparison.experiment import Experiment, listed


def bundled_experiments() -> dict[str, Path]:
    """Comparisons that ship with snella, by name: inside the installed package, or beside `src` in a checkout.

    Files of other commands lie in the same folders; a comparison is what names methods.
    """
    package = Path(snella.__file__).parent
    folders = (package.parents[1] / "experiments", package / "experiments")
    files = (path for folder in folders for path in sorted(folder.rglob("*.yaml")))
    return {path.stem: path for path in files if "\nmethods:" in path.read_text(encoding="utf-8")}


def read_experiment(name: str, changes: dict[str, Any] | None = None) -> Experiment:
    """Read an experiment.

    Args:
        name: Path of a YAML file, or the name of one that ships with snella.
        changes: Entries that go before the file's; those of `train` and `grid` one by one.

    Raises:
        FileNotFoundError: Neither a file nor a name.
        ValueError: The file is no YAML mapping, or holds unknown or wrong settings; names the file.
    """
    path = _find(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(f"experiment {path} must be a YAML text file: {' '.join(str(fault).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"experiment {path} must hold settings such as 'seeds: 3', got {type(values).__name__}")
    values.setdefault("name", path.stem)
    try:
        return Experiment.from_dict(merged(values, changes or {}))
    except (ValueError, TypeError) as fault:
        raise ValueError(f"experiment {path}: {fault}") from None


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, one level deep.

    A method or task that is asked for by its label, or a task by its data, keeps what the entry says of it. A reference
    that other methods no longer hold is forgotten.
    """
    result, changes = {**values}, {**changes}
    if "methods" in changes:
        methods = {e.name: e for e in map(method_entry, listed(values.get("methods") or []))}
        changes["methods"] = [_as_known(asked, methods) for asked in changes["methods"]]
    if "data" in changes:
        data = [data_entry(value) for value in listed(values.get("data") or [])]
        tasks = {e.data: e for e in reversed(data)} | {e.name: e for e in data}
        changes["data"] = [_as_known(asked, tasks) for asked in changes["data"]]
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    if "methods" in changes and "reference" not in changes:
        names = [method_entry(value).name for value in changes["methods"]]
        result["reference"] = result["reference"] if result.get("reference") in names else None
    return result


def _as_known(asked: Any, known: Mapping[str, MethodEntry] | Mapping[str, DataEntry]) -> Any:
    """The known entry of that name; what was asked for where there is none."""
    return plain_entry(known[asked]) if isinstance(asked, str) and asked in known else asked


def _find(name: str) -> Path:
    """The file that a name stands for."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = bundled_experiments()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise FileNotFoundError(
        f"experiment must be a YAML file or one of {', '.join(known) or 'none'}, got {name!r}{hint}"
    )
