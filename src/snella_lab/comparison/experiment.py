"""Experiment of a comparison: methods, data, shared settings, and tuning grid.

A task is a dataset with its settings. An experiment trains every method on every task with several seeds.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from snella_app.config.train import TrainConfig
from snella_app.files import write_text
from snella_app.methods import find_method, parse_method
from snella_app.methods.defaults import PROBE_METHOD, REFERENCE_METHOD
from snella_app.records.record import plain
from snella_app.text import nearest
from snella_lab.comparison.rows import NUMBERS

OVER_TASKS = "mean over tasks"
OVER_GROUPS = "mean over groups"


def published_errors(published: Mapping[str, Any], tasks: Iterable[str], groups: Iterable[str]) -> list[str]:
    """Validate an experiment's `published` entry: numbers reported and orderings claimed in a paper.

    Args:
        published: Mapping with `source`, a string, and at least one of `values` and `orderings`; or an empty mapping.
            `values` contains percentages by method label, then by task, group, or mean. Each ordering has the method
            labels `higher` and `lower`, an optional `task`, and an optional result column `metric` (default:
            `test_accuracy`, or the main metric if the experiment does not measure accuracy).
        tasks: Labels of the experiment's data.
        groups: Groups of the data.

    Returns:
        Error messages. The list is empty if the entry is valid.
    """
    if not isinstance(published, Mapping):
        return [f"published must be a mapping, got {published!r:.200}"]
    if not published:
        return []
    values = published.get("values", {})
    claims = published.get("orderings", [])
    has_known_keys = set(published) <= {"source", "values", "orderings"} and len(published) > 1  # more than a source
    if not (has_known_keys and published.get("source") and isinstance(values, Mapping) and isinstance(claims, list)):
        return [
            "published must contain 'source', plus a mapping 'values', a list 'orderings', or both, and no other keys, "
            f"got {dict(published)!r:.200}"
        ]
    labels = list(tasks)
    errors = []
    score_columns = {f"{split}_{name}" for split in ("val", "test") for name in _SCORES}
    result_columns = sorted({*NUMBERS, *score_columns})
    for claim in claims:
        known = {"higher", "lower", "task", "metric"}
        if not isinstance(claim, Mapping) or set(claim) - known or not claim.get("higher") or not claim.get("lower"):
            errors.append(
                "every entry of published.orderings must contain 'higher' and 'lower', and may contain 'task' and "
                f"'metric', got {claim!r}"
            )
        elif claim.get("task") is not None and claim["task"] not in labels:
            errors.append(f"'task' in published.orderings must be one of {', '.join(labels)}, got {claim['task']!r}")
        elif "metric" in claim and claim["metric"] not in result_columns:
            hint = nearest(str(claim["metric"]), result_columns, most=2, cutoff=0.5)
            errors.append(f"'metric' in published.orderings must be a result column, got {claim['metric']!r}{hint}")
    columns = {*labels, *groups, OVER_TASKS, OVER_GROUPS}
    for method, numbers in values.items():
        if not isinstance(numbers, Mapping):
            errors.append(f"published.values {method!r} must map tasks to numbers, got {numbers!r}")
            continue
        for column, value in numbers.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if column not in columns or not is_number:
                errors.append(
                    f"published.values {method!r} must map tasks, groups, {OVER_TASKS!r} or {OVER_GROUPS!r} to "
                    f"percentages, got {column}: {value!r}"
                )
    return errors


MEASURES: dict[str, dict[str, str]] = {
    "classification": {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"},
    "multilabel": {"map": "mean average precision", "macro_f1": "macro F1"},
    "ordinal": {"kappa": "quadratic weighted kappa", "accuracy": "accuracy"},
    "regression": {"r2": "R²"},
}
"""Metric titles by task type and score name. The first metric of each type is its main metric, and every metric has a
maximum of 1."""
_SCORES = {"loss", *(name for measures in MEASURES.values() for name in measures)}
METHOD_SETTINGS = ("r", "target_sparsity", "scaling", "lr", "scalar_lr", "head_lr", "weight_decay")
"""Settings of a method entry. The tuning grid scales `lr` (and, for head-only methods, `head_lr`) and tries additional
values of `weight_decay`."""
_SPARSE_SETTINGS = ("target_sparsity", "scalar_lr")
DATA_SETTINGS = (
    *("train_size", "val_size", "test_size", "val_fraction", "test_fraction", "batch_size"),
    *("columns", "class_order", "channels", "white", "lr", "head_lr", "weight_decay", *_SPARSE_SETTINGS),
)
"""Settings of a data entry. Those in `_SPARSE_SETTINGS` apply only to sparse methods, i.e. methods with a
target sparsity."""
SHARED_SETTINGS = (
    *("task", "monitor", "loss", "class_weights", "sampler", "epochs", "epoch_images", "img_size", "weights"),
    *("pretrained", "augment", "tta", "warmup_ratio", "max_grad_norm", "label_smoothing", *DATA_SETTINGS),
    *("skip_corrupt", "strict_sizes"),
    *("protocol", "head_init", "head_norm", "final_head", "ema", "min_lr", "swa", "soup", "early_stopping"),
    *("accumulate", "layer_decay", "drop_path", "random_erasing", "mixup", "cutmix", "test_seed", "device"),
    *("precision", "grad_checkpointing", "workers"),
)
"""Settings of `TrainConfig` that an experiment may set for all of its runs."""


@dataclass(frozen=True)
class MethodEntry:
    """A method in a comparison.

    Args:
        name: Label in tables, from which the folder name is derived.
        method: Name for `build_method`, e.g. `lora-8`.
        options: Additional method options.
        settings: Values of settings in `METHOD_SETTINGS`, by name.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


LINEAR_PROBE = MethodEntry(PROBE_METHOD, PROBE_METHOD)
"""Linear probe with default settings, used to validate the data and the backbone."""


@dataclass(frozen=True)
class DataEntry:
    """A task in a comparison.

    Args:
        name: Label in tables, from which the folder name is derived.
        data: Data specification, as in `snella train --data`.
        group: Task group, for the mean over groups.
        settings: Values of settings in `DATA_SETTINGS`, by name.
    """

    name: str
    data: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_MAX_NAME = 100
"""Maximum length of the folder name of a method or task. It keeps the names of lock and temporary files within the
file systems' limit of 255 bytes."""


def method_entry(value: Any) -> MethodEntry:
    """Parse a method: a name, or a mapping with `method` and, optionally, `name`, `options`, and settings.

    Raises:
        ValueError: If the value is neither a string nor a mapping, a key is unknown, `method` is missing, or `options`
            is not a mapping.
    """
    entry = _entry(value, "methods", "method", ("name", "options", *METHOD_SETTINGS))
    settings = {key: entry[key] for key in METHOD_SETTINGS if key in entry}
    options = {} if entry.get("options") is None else entry["options"]
    if not isinstance(options, Mapping):
        raise ValueError(f"methods entry {entry['name']!r} must have a mapping 'options', got {options!r}")
    return MethodEntry(entry["name"], str(entry["method"]), dict(options), settings)


def data_entry(value: Any) -> DataEntry:
    """Parse a task: a data specification, or a mapping with `data` and, optionally, `name`, `group`, and settings.

    Raises:
        ValueError: If the value is neither a string nor a mapping, a key is unknown, or `data` is missing.
    """
    entry = _entry(value, "data", "data", ("name", "group", *DATA_SETTINGS))
    settings = {key: entry[key] for key in DATA_SETTINGS if key in entry}
    return DataEntry(entry["name"], str(entry["data"]), str(entry.get("group") or entry["name"]), settings)


def _entry(value: Any, where: str, required: str, optional: Iterable[str]) -> dict[str, Any]:
    """Parse a name, or a mapping that contains the key in `required`.

    Returns:
        The mapping with the key `name`, which defaults to the value of the required key.
    """
    if isinstance(value, str):
        value = {required: value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must contain names or mappings with '{required}', got {value!r}")
    label = f"{where} entry {value.get('name', value.get(required, '?'))!r}"
    if errors := unknown_keys(label, value, (required, *optional)):
        raise ValueError(errors[0])
    if not value.get(required):
        raise ValueError(f"every entry of {where} must have '{required}', got {dict(value)!r}")
    return {**value, "name": str(value.get("name") or value[required])}


def plain_entry(entry: MethodEntry | DataEntry) -> dict[str, Any]:
    """Convert an entry to plain values for YAML, with the settings at the same level as the other keys."""
    values = {k: v for k, v in dataclasses.asdict(entry).items() if k != "settings"}
    return {**values, **entry.settings}


def folder_name(label: str) -> str:
    """Convert a label to a folder name.

    The name ends with a digest if the label has more than `_MAX_NAME` characters or characters outside ASCII.
    """
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", label).strip("._") or "_"
    if len(name) <= _MAX_NAME and label.isascii():
        return name
    digest = hashlib.sha256(label.encode()).hexdigest()[:16]
    return f"{name[: _MAX_NAME - len(digest) - 1]}-{digest}"


def entry_errors(kind: str, entries: Iterable[MethodEntry | DataEntry]) -> list[str]:
    """Return errors for labels that share a folder name, ignoring case."""
    errors: list[str] = []
    seen: dict[str, str] = {}
    for entry in entries:
        folder = folder_name(entry.name).lower()
        if folder in seen:
            errors.append(
                f"{kind} must have distinct folder names, got {seen[folder]!r} and {entry.name!r} (both use the folder "
                f"{folder!r}); rename one"
            )
        seen[folder] = entry.name
    return errors


def unknown_keys(where: str, keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return a list with one error message that names all unknown keys, or an empty list if all keys are known."""
    choices = list(known)
    unknown = [
        f"{key!r}" + nearest(str(key), choices, most=2, cutoff=0.5, form=" (nearest: {})")
        for key in keys
        if key not in choices
    ]
    if not unknown:
        return []
    return [f"{where} has unknown settings: {', '.join(unknown)}; choose from {', '.join(choices)}"]


def make_config(method: MethodEntry, data: DataEntry, shared: Mapping[str, Any], **values: Any) -> TrainConfig:
    """Build the settings of a run, with the method's defaults resolved.

    Args:
        method: The method, whose settings override the task's.
        data: The task, whose settings override the shared ones.
        shared: Values of settings in `SHARED_SETTINGS`, by name.
        **values: Additional settings, which override all of the above.

    Raises:
        ValueError: If `TrainConfig` rejects a setting.
    """
    is_sparse = "target_sparsity" in find_method(method.method).options
    settings = {
        "precision": "fp32",  # auto would depend on the hardware
        **shared,
        **{key: value for key, value in data.settings.items() if is_sparse or key not in _SPARSE_SETTINGS},
        **method.settings,
        "data": data.data,
        "method": method.method,
        "method_options": dict(method.options),
        "progress": False,
    }
    return TrainConfig.from_flat(**{**settings, **values}).resolved()


def default_weight_decay(config: TrainConfig) -> float:
    """Return the weight decay of resolved settings, which is 0 for methods without one."""
    return config.optim.weight_decay or 0.0


_DESCRIPTIONS = ("name", "about", "command", "cost", "expected")
"""Fields that describe the experiment and have no effect on training."""
_ENTRIES = ("methods", "data")
_MUTABLE = (*_ENTRIES, "seeds", *_DESCRIPTIONS, "reference", "published")
"""Fields that may differ from the stored experiment. Existing entries of `methods` and `data` must stay the same."""
FILE = "experiment.yaml"


@dataclass(frozen=True)
class Grid:
    """Tuning grid of learning rates and weight decays, shared by all methods.

    Args:
        lr_factors: Learning rates to try, as multiples of the method's default.
        weight_decays: Weight decays to try at the best learning rate, in addition to the method's default.
        max_extensions: Maximum number of extensions per axis. An axis is extended while its best value is on the edge:
            the learning rates continue their pattern (1, 3, 10 is followed by 30), and the largest weight decay is
            multiplied by 10.
        seeds: Number of tuning runs per candidate, each with a different seed. A candidate is one learning rate with
            one weight decay.
    """

    lr_factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    max_extensions: int = 2
    seeds: int = 1

    def other_weight_decays(self, default: float) -> list[float]:
        """Return the weight decays that differ from the method's default, in ascending order."""
        return sorted({decay for decay in self.weight_decays if decay != default})


_GRID_AXES = ("lr_factors", "weight_decays")


@dataclass(frozen=True)
class Experiment:
    """Configuration of a comparison.

    Args:
        methods: The methods.
        data: The tasks.
        backbone: Pre-trained model, as in `snella train --backbone`.
        name: Short name.
        seeds: Number of final runs per method and task, with seeds 0, 1, …
        grid: Tuning grid.
        settings: Settings shared by all runs. Their names are entries of `SHARED_SETTINGS`.
        reference: Label of the method that the others are compared with. None selects the first LoRA method, or the
            first method if there is none.
        forgetting: Datasets for the linear probe that measures forgetting, i.e. how much accuracy the probe loses on
            other data. Each task uses the first dataset that differs from its own. `()` disables the probe. None
            selects the data of the first two tasks (for classification, unless `columns` is set), then `digits`.
        forgetting_images: Maximum number of images for the probe.
        about: Purpose of the comparison.
        command: Command that starts the comparison.
        cost: Estimated cost.
        expected: Expected results.
        published: Numbers reported in a paper, in the format that `published_errors` describes.
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
        """Validate all settings that can be checked without the data and the model, and report all errors together."""
        errors = [*self._size_errors(), *entry_errors("methods", self.methods), *entry_errors("data", self.data)]
        names = [entry.name for entry in self.methods]
        if self.reference is not None and self.reference not in names:
            hint = nearest(self.reference, names, most=2, cutoff=0.4, form=" (nearest: {})")
            errors.append(f"reference must be one of the methods {', '.join(names)}, got {self.reference!r}{hint}")
        task = self.settings.get("task", "classification")
        if task not in list(MEASURES):  # a list: YAML values may be unhashable
            errors.append(f"task must be one of {', '.join(MEASURES)} in a comparison, got {task!r}")
        errors += unknown_keys("train", self.settings, SHARED_SETTINGS) or self._cell_errors()
        errors += published_errors(self.published, [d.name for d in self.data], [d.group for d in self.data])
        if self.settings.get("protocol") == "official" and not errors and self.has_search:
            errors.append(
                "grid.lr_factors must be one number and grid.weight_decays must be [] or the default with protocol "
                "'official', which has no validation set for tuning, got "
                f"{list(self.grid.lr_factors)} and {list(self.grid.weight_decays)}"
            )
        if errors:
            raise ValueError("; ".join(dict.fromkeys(errors)))

    @property
    def has_search(self) -> bool:
        """True if the grid has several learning rates, or weight decays to try."""
        return len(set(self.grid.lr_factors)) > 1 or self.tunes_weight_decay

    @property
    def tunes_weight_decay(self) -> bool:
        """True if the grid has a weight decay that differs from the default of a method."""
        pairs = itertools.product(self.methods, self.data) if self.grid.weight_decays else ()
        return any(self.grid.other_weight_decays(default_weight_decay(self.config(*pair))) for pair in pairs)

    @property
    def measures(self) -> dict[str, str]:
        """Metric titles by score name. The `monitor` metric comes first if the comparison measures it."""
        titles = MEASURES[self.settings.get("task", "classification")]
        monitor = self.settings.get("monitor")
        return {monitor: titles[monitor], **titles} if monitor in titles else titles

    @property
    def metric(self) -> str:
        """Main metric, the first of `measures`."""
        return next(iter(self.measures))

    @property
    def published_metric(self) -> str:
        """Result column of published numbers: test accuracy, or the main metric if accuracy is not measured."""
        return f"test_{'accuracy' if 'accuracy' in self.measures else self.metric}"

    @property
    def reference_name(self) -> str:
        """Label of the reference method."""
        lora_names = [entry.name for entry in self.methods if parse_method(entry.method)[0] == REFERENCE_METHOD]
        return self.reference or (lora_names[0] if lora_names else self.methods[0].name)

    def config(self, method: MethodEntry, data: DataEntry) -> TrainConfig:
        """Return the settings of a run at the method's default learning rate and weight decay."""
        return make_config(method, data, self.settings, backbone=self.backbone, out="-")

    def probe_data(self, task: DataEntry) -> str | None:
        """Return the first dataset in `forgetting` that differs from the data of `task`, or None if there is none."""
        for data in self.with_probes().forgetting or ():
            if data != task.data:
                return data
        return None

    def with_probes(self) -> "Experiment":
        """Return the experiment with the default of `forgetting` filled in, so that adding tasks does not change it."""
        if self.forgetting is not None:
            return self
        datasets: list[str] = []
        if self.settings.get("task", "classification") == "classification":
            for entry in self.data[:2]:
                if "columns" not in {**self.settings, **entry.settings}:  # the probe loads data without settings
                    datasets.append(entry.data)
        return replace(self, forgetting=(*datasets, "digits"))

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values in the format of an experiment file, with lists instead of tuples."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["methods"] = [plain_entry(entry) for entry in self.methods]
        values["data"] = [plain_entry(entry) for entry in self.data]
        values["grid"] = dataclasses.asdict(self.grid)
        values["train"] = values.pop("settings")
        converted: dict[str, Any] = plain(values)
        return converted

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        """Create an experiment from plain values, where None selects the default.

        Raises:
            ValueError: If a key is unknown or missing, or a value is invalid.
        """
        values = {key: value for key, value in values.items() if value is not None}
        grid = values.get("grid") or {}
        train = values.get("train") or {}
        for key, value in (("grid", grid), ("train", train)):
            if not isinstance(value, Mapping):
                raise ValueError(f"{key} must be a mapping, got {value!r}")
        known = [*(f.name for f in fields(cls) if f.name != "settings"), "train"]
        errors = unknown_keys("the experiment", values, known)
        errors += unknown_keys("grid", grid, [f.name for f in fields(Grid)])
        errors += [
            f"{key} is required, e.g. {key}: {example}"
            for key, example in (("methods", "[lora-8, snella-8]"), ("data", "[digits]"), ("backbone", "NAME"))
            if not values.get(key)
        ]
        if errors:
            raise ValueError("; ".join(errors))
        numbers = {key: _numbers(f"grid.{key}", grid[key]) for key in _GRID_AXES if key in grid}
        texts = {key: str(values[key]) for key in (*_DESCRIPTIONS, "reference") if key in values}
        methods = tuple(method_entry(value) for value in as_list(values["methods"]))
        data = tuple(data_entry(value) for value in as_list(values["data"]))
        forgetting = values.get("forgetting")
        parsed: dict[str, Any] = {
            **texts,
            "methods": methods,
            "data": data,
            "grid": Grid(**{**grid, **numbers}),
            "settings": dict(train),
            "forgetting": None if forgetting is None else tuple(as_list(forgetting)),
        }
        given_fields = {key: value for key, value in values.items() if key != "train"}
        return cls(**{**given_fields, **parsed})

    def write(self, folder: Path) -> None:
        """Write `experiment.yaml`."""
        write_text(folder / FILE, yaml.safe_dump(self.as_dict(), sort_keys=False))

    def merged_with(self, stored: "Experiment", folder: Path) -> "Experiment":
        """Merge with the experiment stored in `folder`.

        The result has the methods and tasks of both, the larger number of seeds, merged published numbers, and the name
        and descriptions of this experiment. The reference is this experiment's or, if it has none, the stored one.

        Raises:
            ValueError: If the experiments differ in a setting that affects finished runs.
        """
        stored = stored.with_probes()
        forgetting = stored.forgetting if self.forgetting is None else self.forgetting
        new_values = replace(self, forgetting=forgetting).as_dict()
        stored_values = stored.as_dict()
        errors: list[str] = []
        for key, new in new_values.items():
            old = stored_values[key]
            if key in _MUTABLE or new == old:
                continue
            if isinstance(new, dict):
                changed = [name for name in {**old, **new} if new.get(name) != old.get(name)]
                errors += [f"{key}.{name} is {old.get(name)!r}, got {new.get(name)!r}" for name in changed]
            else:
                errors.append(f"{key} is {old!r}, got {new!r}")
        for kind in _ENTRIES:
            stored_entries = {entry["name"]: entry for entry in stored_values[kind]}
            for entry in new_values[kind]:
                if stored_entries.get(entry["name"], entry) != entry:
                    errors.append(f"{kind} entry {entry['name']!r} has different settings")
        if errors:
            raise ValueError(
                f"{folder} contains a comparison with different settings: {'; '.join(errors)}; results would "
                f"not be comparable; choose another folder, use the stored settings, or delete {folder}"
            )
        stored_methods = [entry.name for entry in stored.methods]
        stored_tasks = [entry.name for entry in stored.data]
        new_methods = [entry for entry in self.methods if entry.name not in stored_methods]
        new_tasks = [entry for entry in self.data if entry.name not in stored_tasks]
        return replace(
            self,
            methods=(*stored.methods, *new_methods),
            data=(*stored.data, *new_tasks),
            seeds=max(self.seeds, stored.seeds),
            reference=self.reference or stored.reference,
            forgetting=forgetting,
            published=_merge_published(stored.published, self.published),
        )

    def _size_errors(self) -> list[str]:
        """Return errors for empty lists, invalid numbers, and an automatic batch size."""
        grid = self.grid
        errors = [
            f"{name} must be an integer of at least {minimum}, got {value!r}"
            for name, value, minimum in (
                ("seeds", self.seeds, 1),
                ("grid.seeds", grid.seeds, 1),
                ("grid.max_extensions", grid.max_extensions, 0),
                ("forgetting_images", self.forgetting_images, 10),
            )
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum
        ]
        errors += [f"{kind} must have at least one entry, got none" for kind in _ENTRIES if not getattr(self, kind)]
        if "auto" in (self.settings.get("batch_size"), *(entry.settings.get("batch_size") for entry in self.data)):
            errors.append("batch_size must be an integer, the same for all methods on a task, got 'auto'")
        if not grid.lr_factors or not all(0 < f < float("inf") for f in grid.lr_factors):
            errors.append(f"grid.lr_factors must be positive numbers, got {list(grid.lr_factors)}")
        if not all(0 <= w < float("inf") for w in grid.weight_decays):
            errors.append(f"grid.weight_decays must be at least 0, got {list(grid.weight_decays)}")
        for name, values in (("lr_factors", grid.lr_factors), ("weight_decays", grid.weight_decays)):
            if len({f"{value:g}" for value in values}) < len(set(values)):  # the format of `Candidate.label`
                errors.append(f"grid.{name} must differ within six digits, got {list(values)}")
        return errors

    def _cell_errors(self) -> list[str]:
        """Return the errors of each method on the first task, and of the linear probe on the other tasks.

        This checks every method and every task without resolving the settings of all pairs.
        """
        pairs = [(method, data) for method in self.methods for data in self.data[:1]]
        pairs += [(LINEAR_PROBE, data) for data in self.data[1:]]
        errors = []
        for method, data in pairs:
            try:
                self.config(method, data)
            except (ValueError, TypeError) as error:
                errors.append(str(error))
        return errors


def as_list(value: Any) -> Sequence[Any]:
    """Return the items of a list, a tuple, or a comma-separated string. Return any other value as the only item."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value if isinstance(value, list | tuple) else [value]


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """Parse numbers from a list or a comma-separated string."""
    numbers = as_list(value)
    try:
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError  # float(True) would be 1.0
        return tuple(float(number) for number in numbers)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, e.g. [0.3, 1, 3], got {value!r}") from None


def _merge_published(stored: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """Merge published numbers and orderings, where new numbers override stored ones.

    If the sources differ, only the new entries are kept. If one of the arguments is empty, the other is returned
    unchanged.
    """
    if not new or not stored or new.get("source") != stored.get("source"):
        return new or stored
    stored_values = stored.get("values", {})
    new_values = new.get("values", {})
    values = {
        method: {**stored_values.get(method, {}), **new_values.get(method, {})}
        for method in {**stored_values, **new_values}
    }
    claims = list(stored.get("orderings", []))
    claims += [claim for claim in new.get("orderings", []) if claim not in claims]
    merged: dict[str, Any] = {"source": new["source"]}
    if values:
        merged["values"] = values
    if claims:
        merged["orderings"] = claims
    return merged
