"""What is compared: an experiment's entries for methods and for data."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from snella.methods import method_options
from snella.runs import TrainConfig

METHOD_SETTINGS = ("r", "target_sparsity", "scaling", "lr", "scalar_lr", "head_lr", "weight_decay")
"""Settings that a method's entry may set for itself; rates are the centre of its grid."""
_SPARSE_SETTINGS = ("target_sparsity", "scalar_lr")
DATA_SETTINGS = (
    *("train_size", "val_size", "test_size", "val_fraction", "test_fraction", "batch_size"),
    *("lr", "head_lr", "weight_decay", *_SPARSE_SETTINGS),
)
"""Settings that a data entry may set for itself; those of sparse methods pass the others over."""
SHARED_SETTINGS = (
    *("epochs", "img_size", "weights", "pretrained", "augment", "warmup", "max_grad_norm"),
    *("label_smoothing", *DATA_SETTINGS, "skip_broken", "check_sizes", "protocol", "head_start", "ema", "final_lr"),
    *("device", "precision", "workers"),
)
"""Settings that are the same in all cells."""


@dataclass(frozen=True)
class MethodEntry:
    """One contender.

    Args:
        name: Its label in tables, and its folder.
        method: A name for `build_method`, such as `lora-8`.
        options: Further options of the method.
        settings: Entries of `METHOD_SETTINGS`.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataEntry:
    """One task.

    Args:
        name: Its label in tables, and its folder.
        data: What `snella train --data` takes.
        group: The group that its mean belongs to.
        settings: Entries of `DATA_SETTINGS`.
    """

    name: str
    data: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def method_entry(value: Any) -> MethodEntry:
    """Read a method: its name alone, or a mapping with `method` and, if wanted, `name`, `options` and settings.

    Raises:
        ValueError: A key is unknown, or `method` is missing.
    """
    if isinstance(value, str):
        return MethodEntry(value, value)
    known = ("name", "method", "options", *METHOD_SETTINGS)
    entry = _mapping(value, "methods", known, "method")
    settings = {key: entry[key] for key in METHOD_SETTINGS if key in entry}
    return MethodEntry(
        str(entry.get("name", entry["method"])), str(entry["method"]), dict(entry.get("options", {})), settings
    )


def data_entry(value: Any) -> DataEntry:
    """Read a data set: its specification alone, or a mapping with `data` and, if wanted, `name`, `group` and sizes.

    Raises:
        ValueError: A key is unknown, or `data` is missing.
    """
    if isinstance(value, str):
        return DataEntry(value, value, value)
    entry = _mapping(value, "data", ("name", "data", "group", *DATA_SETTINGS), "data")
    name = str(entry.get("name", entry["data"]))
    settings = {key: entry[key] for key in DATA_SETTINGS if key in entry}
    return DataEntry(name, str(entry["data"]), str(entry.get("group", name)), settings)


def plain_entry(entry: MethodEntry | DataEntry) -> dict[str, Any]:
    """An entry as YAML holds it."""
    values = {k: v for k, v in dataclasses.asdict(entry).items() if k != "settings"}
    return {**values, **entry.settings}


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", label).strip("._") or "_"


def entry_faults(kind: str, entries: Iterable[MethodEntry | DataEntry]) -> list[str]:
    """Labels that cannot be told apart, one text each."""
    faults: list[str] = []
    seen: dict[str, str] = {}
    for entry in entries:
        folder = folder_name(entry.name).lower()
        if folder in seen:
            faults.append(
                f"{kind} must have names of their own, got {seen[folder]!r} and {entry.name!r}; give one another name"
            )
        seen[folder] = entry.name
    return faults


def unknown_keys(where: str, keys: Iterable[str], known: Iterable[str]) -> str | None:
    """One text about all keys that are not known, with the nearest that are; None where there are none."""
    choices, texts = list(known), []
    for key in keys:
        if key not in choices:
            near = difflib.get_close_matches(str(key), choices, n=2, cutoff=0.5)
            texts.append(f"{key!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
    return f"{where} has unknown settings: {', '.join(texts)}; it takes {', '.join(choices)}" if texts else None


def config_of(method: MethodEntry, data: DataEntry, shared: Mapping[str, Any], **values: Any) -> TrainConfig:
    """The settings of a run, the method's defaults resolved.

    Args:
        method: The contender.
        data: The task; its sizes go before the shared ones.
        shared: Entries of `SHARED_SETTINGS` that are set.
        **values: Further settings, which go before all others.

    Raises:
        ValueError: Whatever `TrainConfig` refuses.
    """
    is_sparse = "target_sparsity" in method_options(method.method)
    settings = {
        **shared,
        **{key: value for key, value in data.settings.items() if is_sparse or key not in _SPARSE_SETTINGS},
        **method.settings,
        "data": data.data,
        "method": method.method,
        "method_options": dict(method.options),
        "progress": False,
    }
    return TrainConfig(**{**settings, **values}).resolved()


def _mapping(value: Any, where: str, known: Iterable[str], needed: str) -> Mapping[str, Any]:
    """The value as a mapping with known keys."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must hold names or mappings with '{needed}', got {value!r}")
    fault = unknown_keys(f"{where} entry {value.get('name', value.get(needed, '?'))!r}", value, known)
    if fault:
        raise ValueError(fault)
    if not value.get(needed):
        raise ValueError(f"{where} must say '{needed}' in every entry, got {dict(value)!r}")
    return value
