"""`Experiment`: methods, data, shared settings and the tuning grid of a comparison."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from snella_app.config import TrainConfig
from snella_app.files import write_text
from snella_app.methods import method_options, parse_method
from snella_app.methods.defaults import PROBE_METHOD, REFERENCE_METHOD
from snella_app.text import nearest

OVER_TASKS, OVER_GROUPS = "mean over tasks", "mean over groups"


def reported_errors(published: Mapping[str, Any], tasks: Iterable[str], groups: Iterable[str]) -> list[str]:
    """Errors in an experiment's `published`, numbers reported by a paper.

    Args:
        published: `source`, a string; `values`: from a method's label to numbers in percent, by task, group or mean;
            and `orderings`: `higher` and `lower`, labels of two methods, where wanted a `task`, and `metric`, a
            column of the results other than the accuracy.
        tasks: Labels of the experiment's data.
        groups: Their groups.
    """
    if not published:
        return []
    unknown = [key for key in published if key not in ("source", "values", "orderings")]
    values, claims = published.get("values", {}), published.get("orderings", [])
    is_empty = not {"values", "orderings"} & set(published)
    if unknown or is_empty or not published.get("source") or not isinstance(values, Mapping):
        return [f"published must hold 'source' and 'values' or 'orderings', got {', '.join(map(str, published))}"]
    labels = list(tasks)
    columns = {*labels, *groups, OVER_TASKS, OVER_GROUPS}
    errors = [error for claim in claims for error in _ordering_errors(claim, labels)]
    for method, numbers in values.items():
        if not isinstance(numbers, Mapping):
            errors.append(f"published.values {method!r} must hold numbers by task, got {numbers!r}")
            continue
        errors += [
            f"published.values {method!r} must be numbers in percent by task, group or mean, got {column}: {value!r}"
            for column, value in numbers.items()
            if column not in columns or isinstance(value, bool) or not isinstance(value, int | float)
        ]
    return errors


def _ordering_errors(claim: Any, tasks: Sequence[str]) -> list[str]:
    """Errors in one ordering that a paper claims."""
    known = ("higher", "lower", "task", "metric")
    is_one = isinstance(claim, Mapping) and set(claim) <= set(known) and claim.get("higher") and claim.get("lower")
    if not is_one:
        return [f"published.orderings must hold 'higher' and 'lower', and may hold 'task' and 'metric', got {claim!r}"]
    if claim.get("task") is not None and claim["task"] not in tasks:
        return [f"published.orderings must be of a 'task' among {', '.join(tasks)}, got {claim['task']!r}"]
    return []


MEASURES: dict[str, dict[str, str]] = {
    "classification": {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"},
    "multilabel": {"map": "mean average precision", "macro_f1": "macro F1"},
    "ordinal": {"kappa": "quadratic weighted kappa", "accuracy": "accuracy"},
    "regression": {"r2": "R²"},
}
"""What methods are compared by, in each kind of task: entries of its scores, of which 1 is the most."""
METHOD_SETTINGS = ("r", "target_sparsity", "scaling", "lr", "scalar_lr", "head_lr", "weight_decay")
"""Settings of a method's entry; learning rate and weight decay are the center of its grid."""
_SPARSE_SETTINGS = ("target_sparsity", "scalar_lr")
DATA_SETTINGS = (
    *("train_size", "val_size", "test_size", "val_fraction", "test_fraction", "batch_size"),
    *("columns", "class_order", "channels", "white", "lr", "head_lr", "weight_decay", *_SPARSE_SETTINGS),
)
"""Settings of a data entry; those of sparse methods do not apply to the others."""
SHARED_SETTINGS = (
    *(
        "task",
        "monitor",
        "loss",
        "class_weights",
        "sampler",
        "epochs",
        "img_size",
        "weights",
        "pretrained",
        "augment",
        "tta",
        "warmup_ratio",
        "max_grad_norm",
    ),
    *(
        "label_smoothing",
        *DATA_SETTINGS,
        "skip_corrupt",
        "strict_sizes",
        "protocol",
        "head_init",
        "head_norm",
        "final_head",
        "ema",
        "min_lr",
    ),
    *("swa", "soup", "early_stopping", "accumulate", "layer_decay", "drop_path", "random_erasing", "mixup", "cutmix"),
    "test_seed",
    *("device", "precision", "grad_checkpointing", "workers"),
)
"""Settings that are the same in all runs."""


@dataclass(frozen=True)
class MethodEntry:
    """A method of the comparison.

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


PROBE = MethodEntry(PROBE_METHOD, PROBE_METHOD)
"""A method with no settings of its own, for checks of everything else."""


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


def entry_errors(kind: str, entries: Iterable[MethodEntry | DataEntry]) -> list[str]:
    """Errors of labels that give the same folder."""
    errors: list[str] = []
    seen: dict[str, str] = {}
    for entry in entries:
        folder = folder_name(entry.name).lower()
        if folder in seen:
            errors.append(
                f"{kind} must have distinct names, got {seen[folder]!r} and {entry.name!r}; give one another name"
            )
        seen[folder] = entry.name
    return errors


def unknown_keys(where: str, keys: Iterable[str], known: Iterable[str]) -> str | None:
    """The error of unknown keys, with the nearest known ones; None if all are known."""
    choices, texts = list(known), []
    for key in keys:
        if key not in choices:
            texts.append(f"{key!r}" + nearest(str(key), choices, most=2, cutoff=0.5, form=" (nearest: {})"))
    return f"{where} has unknown settings: {', '.join(texts)}; it takes {', '.join(choices)}" if texts else None


def make_config(method: MethodEntry, data: DataEntry, shared: Mapping[str, Any], **values: Any) -> TrainConfig:
    """The settings of a run, the method's defaults resolved.

    Args:
        method: The method.
        data: The task; its sizes override the shared ones.
        shared: Entries of `SHARED_SETTINGS` that are set.
        **values: Further settings, which override all others.

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
    error = unknown_keys(f"{where} entry {value.get('name', value.get(needed, '?'))!r}", value, known)
    if error:
        raise ValueError(error)
    if not value.get(needed):
        raise ValueError(f"{where} must say '{needed}' in every entry, got {dict(value)!r}")
    return value


_TEXTS = ("name", "about", "command", "cost", "expected")
_GROWING = ("methods", "data", "seeds", *_TEXTS, "reference", "published")
"""Fields that may change between two calls on one folder: no finished cell depends on them."""
FILE = "experiment.yaml"


@dataclass(frozen=True)
class Grid:
    """The tuning grid of learning rate and weight decay, the same for all methods.

    Args:
        lr_factors: Times the method's own default learning rate.
        weight_decays: Tried at the best learning rate, besides the method's default.
        max_extensions: While the best value lies on the edge, the grid grows by its outermost ratio; the maximum
            number of times on either axis.
        seeds: Seeds of each candidate.
    """

    lr_factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    max_extensions: int = 2
    seeds: int = 1


@dataclass(frozen=True)
class Experiment:
    """The configuration of a comparison.

    Args:
        methods: The methods.
        data: The tasks.
        backbone: Pre-trained model, as `snella train --backbone` takes it.
        name: Short name.
        seeds: Final runs of each method on each task, with seeds 0, 1, …
        grid: The tuning grid.
        settings: What all runs share: entries of `SHARED_SETTINGS`.
        reference: The method that others are compared to in pairs; the first LoRA, else the first method, if None.
        forgetting: Data whose linear probe measures forgetting; a task that is itself the first of them takes the
            second. `()` measures nothing, None takes the first two tasks, then digits.
        forgetting_images: Maximum number of images of that probe.
        about: Its purpose.
        command: The command that starts it.
        cost: Its cost.
        expected: The expected results.
        published: Numbers reported by a paper: `source`, and `values` in percent, from a method's label and
            a task, a group, `mean over tasks` or `mean over groups`; `orderings`, what the paper says is above what.
    """

    methods: tuple[MethodEntry, ...]
    data: tuple[DataEntry, ...]
    backbone: str
    name: str = "comparison"
    seeds: int = 3
    grid: Grid = field(default_factory=Grid)
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    forgetting: tuple[str, ...] | None = None
    forgetting_images: int = 400
    about: str = ""
    command: str = ""
    cost: str = ""
    expected: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check everything that can be known before data and model are there, and report all errors together."""
        errors = [*self._size_errors(), *entry_errors("methods", self.methods), *entry_errors("data", self.data)]
        error = unknown_keys("train", self.settings, SHARED_SETTINGS)
        names = [entry.name for entry in self.methods]
        if self.reference is not None and self.reference not in names:
            hint = nearest(self.reference, names, most=2, cutoff=0.4, form=" (nearest: {})")
            errors.append(f"reference must be one of the methods {', '.join(names)}, got {self.reference!r}{hint}")
        task = self.settings.get("task", "classification")
        if task not in MEASURES:
            errors.append(f"task must be one of {', '.join(MEASURES)} to be compared, got {task!r}")
        errors += [error] if error else self._cell_errors()
        errors += reported_errors(self.published, [d.name for d in self.data], [d.group for d in self.data])
        has_search = len(set(self.grid.lr_factors)) > 1 or len(self.grid.weight_decays) > 0
        if self.settings.get("protocol") == "official" and has_search:
            errors.append(
                "protocol official has no validation images to tune on; set grid.lr_factors to one number and "
                f"grid.weight_decays to [], got {list(self.grid.lr_factors)} and {list(self.grid.weight_decays)}"
            )
        if errors:
            raise ValueError("; ".join(dict.fromkeys(errors)))

    @property
    def measures(self) -> dict[str, str]:
        """Names of what methods are compared by, by its entry of the scores; what `monitor` names comes first."""
        found = MEASURES[self.settings.get("task", "classification")]
        first = self.settings.get("monitor")
        return {first: found[first], **found} if first in found else found

    @property
    def metric(self) -> str:
        """The first of `measures`."""
        return next(iter(self.measures))

    @property
    def reference_name(self) -> str:
        """The label of the method that others are compared to."""
        usual = [entry.name for entry in self.methods if parse_method(entry.method)[0] == REFERENCE_METHOD]
        return self.reference or (usual[0] if usual else self.methods[0].name)

    def probe_data(self, task: DataEntry) -> str | None:
        """Data on which forgetting is measured after training on `task`: never the task's own; None for none."""
        return next((data for data in self.with_probes().forgetting or () if data != task.data), None)

    def with_probes(self) -> "Experiment":
        """This experiment with the data of its probes fixed, so that tasks added later do not change them."""
        has_classes = self.settings.get("task", "classification") == "classification"
        own = [
            entry.data
            for entry in self.data[:2]
            if has_classes and "columns" not in {**self.settings, **entry.settings}
        ]
        usual = (*own, "digits")
        return replace(self, forgetting=usual if self.forgetting is None else self.forgetting)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as an experiment file holds them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["methods"] = [plain_entry(entry) for entry in self.methods]
        values["data"] = [plain_entry(entry) for entry in self.data]
        values["grid"] = {f.name: _plain(getattr(self.grid, f.name)) for f in fields(Grid)}
        values["train"] = dict(values.pop("settings"))
        values["forgetting"] = _plain(self.forgetting)
        values["published"] = dict(self.published)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        """Read plain values.

        Raises:
            ValueError: Unknown keys, missing ones, or values out of range.
        """
        known = [f.name for f in fields(cls) if f.name != "settings"] + ["train"]
        errors: list[str | None] = [
            f"{key} must be a mapping, got {values[key]!r}"
            for key in ("grid", "train")
            if not isinstance(values.get(key) or {}, Mapping)
        ]
        if errors:
            raise ValueError("; ".join(map(str, errors)))
        errors = [unknown_keys("the experiment", values, known)]
        errors += [unknown_keys("grid", dict(values.get("grid") or {}), [f.name for f in fields(Grid)])]
        errors += [
            f"{key} must be given, e.g. {key}: {example}"
            for key, example in (("methods", "[lora-8, snella-8]"), ("data", "[digits]"), ("backbone", "NAME"))
            if not values.get(key)
        ]
        if any(errors):
            raise ValueError("; ".join(error for error in errors if error))
        plain = {k: v for k, v in values.items() if k not in ("methods", "data", "grid", "train", "forgetting")}
        grid = dict(values.get("grid") or {})
        for key in {"lr_factors", "weight_decays"} & grid.keys():
            grid[key] = _numbers(f"grid.{key}", grid[key])
        return cls(
            methods=tuple(method_entry(value) for value in listed(values["methods"])),
            data=tuple(data_entry(value) for value in listed(values["data"])),
            grid=Grid(**grid),
            settings=dict(values.get("train") or {}),
            forgetting=None if values.get("forgetting") is None else tuple(listed(values["forgetting"])),
            **plain,
        )

    def write(self, folder: Path) -> None:
        """Write `experiment.yaml`."""
        write_text(folder / FILE, yaml.safe_dump(self.as_dict(), sort_keys=False))

    def joined_with(self, stored: "Experiment", folder: Path) -> "Experiment":
        """This experiment merged with the methods, tasks and seeds that `folder` has already.

        Raises:
            ValueError: Something that finished cells depend on differs.
        """
        if self.forgetting is None:
            return replace(self, forgetting=stored.with_probes().forgetting).joined_with(stored.with_probes(), folder)
        mine, theirs = self.as_dict(), stored.with_probes().as_dict()
        changed = [key for key in mine if key not in _GROWING and mine[key] != theirs[key]]
        for kind in ("methods", "data"):
            old = {entry["name"]: entry for entry in theirs[kind]}
            changed += [f"{kind} {e['name']!r}" for e in mine[kind] if old.get(e["name"], e) != e]
        if changed:
            texts = [_difference(key, mine, theirs) for key in changed]
            raise ValueError(
                f"{folder} holds a comparison with other settings: {'; '.join(texts)}; its rows would not be "
                "comparable: choose another folder, or leave these settings as they were"
            )
        return replace(
            self,
            methods=(*stored.methods, *(e for e in self.methods if e.name not in [s.name for s in stored.methods])),
            data=(*stored.data, *(e for e in self.data if e.name not in [s.name for s in stored.data])),
            seeds=max(self.seeds, stored.seeds),
            reference=self.reference or stored.reference,
            published=_joined_reports(stored.published, self.published),
        )

    def _size_errors(self) -> list[str]:
        """Numbers out of range."""
        grid = self.grid
        errors = [
            f"{name} must be an integer of at least {least}, got {value!r}"
            for name, value, least in (
                ("seeds", self.seeds, 1),
                ("grid.seeds", grid.seeds, 1),
                ("grid.max_extensions", grid.max_extensions, 0),
                ("forgetting_images", self.forgetting_images, 10),
            )
            if not isinstance(value, int) or isinstance(value, bool) or value < least
        ]
        if "auto" in (self.settings.get("batch_size"), *(entry.settings.get("batch_size") for entry in self.data)):
            errors.append("batch_size must be the same number for all runs of a comparison, got 'auto'")
        if not grid.lr_factors or not all(0 < f < float("inf") for f in grid.lr_factors):
            errors.append(f"grid.lr_factors must be positive numbers, got {list(grid.lr_factors)}")
        if not all(0 <= w < float("inf") for w in grid.weight_decays):
            errors.append(f"grid.weight_decays must be at least 0, got {list(grid.weight_decays)}")
        return errors

    def _cell_errors(self) -> list[str]:
        """Errors of the settings of any cell."""
        errors = []
        for method in self.methods:
            for data in self.data[:1]:
                try:
                    make_config(method, data, self.settings, backbone=self.backbone, out="-")
                except (ValueError, TypeError) as error:
                    errors.append(str(error))
        for data in self.data[1:]:
            try:
                make_config(PROBE, data, self.settings, backbone=self.backbone, out="-")
            except (ValueError, TypeError) as error:
                errors.append(str(error))
        return errors


def listed(value: Any) -> Sequence[Any]:
    """A list as it is; a string split at its commas."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value if isinstance(value, list | tuple) else [value]


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """Numbers in a list, or between commas."""
    try:
        return tuple(float(number) for number in listed(value))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, e.g. [0.3, 1, 3], got {value!r}") from None


def _plain(value: Any) -> Any:
    """Tuples as lists."""
    return list(value) if isinstance(value, tuple) else value


def _joined_reports(stored: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """The paper's numbers and orderings, stored ones first; the new ones alone where they are of another source."""
    if not new or not stored or new.get("source") != stored.get("source"):
        return new or stored
    values = {
        method: {**stored.get("values", {}).get(method, {}), **new.get("values", {}).get(method, {})}
        for method in {**stored.get("values", {}), **new.get("values", {})}
    }
    claims = list(stored.get("orderings", []))
    claims += [claim for claim in new.get("orderings", []) if claim not in claims]
    parts = {"values": values, "orderings": claims}
    return {"source": new["source"], **{key: part for key, part in parts.items() if part}}


def _difference(key: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What a changed setting is there and here; only the inner entries that differ."""
    if key.partition(" ")[0] in ("methods", "data") and " " in key:
        return f"{key} is set up in another way"
    if isinstance(mine[key], dict):
        inner = [k for k in {**theirs[key], **mine[key]} if mine[key].get(k) != theirs[key].get(k)]
        return ", ".join(f"{k} is {theirs[key].get(k)!r} there and {mine[key].get(k)!r} here" for k in inner)
    return f"{key} is {theirs[key]!r} there and {mine[key]!r} here"
