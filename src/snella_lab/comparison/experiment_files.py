"""Experiments from YAML files, given by path or bundled name, and from command-line options."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

import snella_lab
from snella_app.files import expand_user
from snella_app.text import nearest
from snella_lab.comparison.experiment import FILE, Experiment, as_list, data_entry, method_entry, plain_entry
from snella_lab.comparison.options import CompareOptions


def bundled_experiments() -> dict[str, Path]:
    """Return the files of bundled experiments by name, from the installed package or a source checkout.

    The folders also contain files for other commands. Only files with `methods` and `data` are experiments.
    """
    package = Path(snella_lab.__file__).parent
    folders = (package.parents[1] / "experiments", package / "experiments")
    files = (path for folder in folders for path in sorted(folder.rglob("*.yaml")))
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    return {path.stem: path for path, text in texts.items() if "\nmethods:" in text and "\ndata:" in text}


def read_experiment(name: str, changes: dict[str, Any] | None = None) -> Experiment:
    """Read an experiment file. If the file has no entry `name`, the experiment is named after the file.

    Args:
        name: Path of a YAML file, or name of a bundled experiment.
        changes: Entries that override those of the file, as described in `merged`.

    Raises:
        FileNotFoundError: If `name` is neither a file nor a bundled experiment.
        ValueError: If the file is not a YAML mapping, or a setting is unknown or invalid.
    """
    path = expand_user(name)
    if not path.is_file():
        bundled = bundled_experiments()
        if name not in bundled:
            hint = nearest(name, bundled, most=2, cutoff=0.4)
            names = ", ".join(bundled) or "none"
            raise FileNotFoundError(f"experiment must be a YAML file or one of {names}, got {name!r}{hint}")
        path = bundled[name]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: invalid UTF-8 or date
        raise ValueError(f"experiment {path} must be a YAML text file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"experiment {path} must contain settings such as 'seeds: 3', got {type(values).__name__}")
    values["name"] = values.get("name") or path.stem
    try:
        return Experiment.from_dict(merged(values, changes or {}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"experiment {path}: {error}") from None


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge changes into settings, one level deep: mappings such as `train` and `grid` are merged key by key.

    In `methods` and `data`, a string selects the existing entry with this label (or, for tasks, with this data). A
    reference that is no longer among the methods is removed. If the changes select a different set of tasks, only
    published numbers and orderings that refer to one of the selected tasks are kept.
    """
    methods = {entry.name: entry for entry in map(method_entry, as_list(values.get("methods") or []))}
    data = [data_entry(value) for value in as_list(values.get("data") or [])]
    # labels take precedence over data, and earlier entries over later ones with the same data
    tasks = {entry.data: entry for entry in reversed(data)} | {entry.name: entry for entry in data}
    entries: dict[str, dict[str, Any]] = {"methods": methods, "data": tasks}
    result = {**values}
    for key, value in changes.items():
        old_value = result.get(key)
        if key in entries:
            known = entries[key]
            changed_entries: list[Any] = []
            for entry in value:
                is_known = isinstance(entry, str) and entry in known
                changed_entries.append(plain_entry(known[entry]) if is_known else entry)
            result[key] = changed_entries
        elif isinstance(old_value, dict) and isinstance(value, dict):
            result[key] = {**old_value, **value}
        else:
            result[key] = value
    if "methods" in changes and "reference" not in changes:
        names = [method_entry(value).name for value in result["methods"]]
        result["reference"] = result["reference"] if result.get("reference") in names else None
    if "data" in changes and "published" in values and "published" not in changes:
        selected = {data_entry(value).name for value in result["data"]}
        if selected != {entry.name for entry in data}:
            result["published"] = _published_on(selected, result.get("published"))
    return result


def _published_on(tasks: Collection[str], published: Any) -> Any:
    """Return the published results of `tasks`, without means and groups, which refer to the original tasks.

    Returns an empty mapping if nothing remains. A value that is not a mapping is returned unchanged, because
    `published_errors` reports it.
    """
    if not isinstance(published, Mapping):
        return published
    values = published.get("values")
    orderings = published.get("orderings")
    kept = dict(published)
    if isinstance(values, Mapping):
        kept_values: dict[Any, dict[Any, Any]] = {}
        for method, numbers in values.items():
            if not isinstance(numbers, Mapping):
                continue
            kept_numbers = {column: number for column, number in numbers.items() if column in tasks}
            if kept_numbers:
                kept_values[method] = kept_numbers
        kept["values"] = kept_values
    if isinstance(orderings, list):
        kept["orderings"] = [claim for claim in orderings if isinstance(claim, Mapping) and claim.get("task") in tasks]
    return kept if kept.get("values") or kept.get("orderings") else {}


_NONE = "none"
"""Option value that stands for an empty list."""


def experiment_from_options(options: CompareOptions) -> Experiment | None:
    """Build an experiment from command-line options, based on a file or the experiment in the output folder, if any.

    Returns:
        The experiment, or None if no option other than `out` and the execution options is set.

    Raises:
        FileNotFoundError: If `experiment` is neither a file nor a bundled experiment.
        ValueError: If a setting is missing, unknown, out of range or not a number.
    """
    values = {name: value for name, value in options.flat().items() if value is not None}
    changes: dict[str, Any] = {key: values[key] for key in ("backbone", "seeds", "reference") if key in values}
    changes.update({key: as_list(values[key]) for key in ("methods", "data") if key in values})
    if "forgetting" in values:
        changes["forgetting"] = [] if values["forgetting"] == _NONE else as_list(values["forgetting"])
    grid_names = {"tune_seeds": "seeds", "extensions": "max_extensions"}
    grid: dict[str, Any] = {name: values[key] for key, name in grid_names.items() if key in values}
    grid |= {key: _numbers(key, values[key]) for key in ("lr_factors", "weight_decays") if key in values}
    train: dict[str, Any] = dict(options.train)
    train |= {key: values[key] for key in ("task", "monitor") if key in values}
    if grid:
        changes["grid"] = grid
    if train:
        changes["train"] = train
    if options.experiment is not None:
        return read_experiment(options.experiment, changes)
    if not changes:
        return None
    stored = Path(options.out) / FILE
    base: dict[str, Any] = {}
    if stored.is_file():
        base = read_experiment(str(stored)).as_dict()
    return Experiment.from_dict(merged(base, changes))


def _numbers(name: str, text: str) -> list[float]:
    """Parse comma-separated numbers, where `none` stands for an empty list."""
    try:
        return [] if text == _NONE else [float(number) for number in as_list(text)]
    except ValueError:
        raise ValueError(f"{name} must be numbers separated by commas, e.g. 0.3,1,3, got {text!r}") from None
