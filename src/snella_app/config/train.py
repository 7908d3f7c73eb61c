"""`TrainConfig`, the configuration of a training run, and `RunSettings`, the base class of stored configurations."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from snella_app.config.sections import (
    AUTO_METHOD,
    OPTION_SETTINGS,
    SCHEDULE_END,
    BaseMethodConfig,
    BaseOptimConfig,
    BaseRunConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from snella_app.data.options import DataConfig
from snella_app.files import expand_user
from snella_app.methods.defaults import TRAIN_PRESETS
from snella_app.settings import Config
from snella_app.text import nearest

SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "shard", "progress")
"""Settings that may change when a run is resumed."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Settings that apply to one call and are not stored in `config.yaml`."""


class RunSettings(Config):
    """Base class of run configurations; subclasses add the setting `data`.

    Attributes:
        required: Required settings of a new run, with example values.
        out_example: Example value of `out`, which is always required.
        purpose: Key in `Method.recipes` of the defaults for settings that are None; methods without this key are
            rejected. Empty for `snella train`, which uses `Method.defaults`.
    """

    required: ClassVar[dict[str, str]] = {}
    out_example: ClassVar[str] = ""
    purpose: ClassVar[str] = ""

    method: BaseMethodConfig
    optim: BaseOptimConfig
    run: BaseRunConfig

    def stored(self) -> dict[str, Any]:
        """Return the content of `config.yaml`: all settings except `UNSTORED_FIELDS`."""
        return {name: value for name, value in self.flat().items() if name not in UNSTORED_FIELDS}

    @property
    def planned_names(self) -> tuple[str, ...]:
        """Names of the settings for which a plan does not keep the given values."""
        return ()

    def differences(self, other: "RunSettings", names: Iterable[str] | None = None) -> list[str]:
        """Describe each setting that was given, or is not the default, and differs from `other`.

        A value of None or `auto` does not differ from any other, and a mapping only differs in its own entries. By
        default, `names` are all settings except `SESSION_FIELDS` and the settings that the plan `other` has replaced.
        """
        values = self.flat()
        other_values = other.flat()
        descriptions: list[str] = []
        for name in names or [name for name in values if name not in (*SESSION_FIELDS, *other.planned_names)]:
            value = values[name]
            other_value = other_values[name]
            is_given = name in self.given or value != self.settings()[name].default
            agrees = value in (None, "auto", other_value)
            if isinstance(value, dict) and isinstance(other_value, dict):
                agrees = {**other_value, **value} == other_value
            if is_given and not agrees:
                descriptions.append(f"{name} is {other_value!r} there and {value!r} here")
        return descriptions

    def resolved(self) -> Self:
        """Return a copy with the method's defaults in place of None, and the rank from the method's name (`lora-8`)."""
        from snella_app.methods import find_method, parse_method

        method = find_method(self.method.name)
        current = self.flat()
        defaults = method.defaults_of(self.purpose) or {}
        values: dict[str, Any] = {}
        for name, value in defaults.items():
            is_unset = name in current and current[name] is None
            if is_unset and name not in self.method.options:
                values[name] = value
        number = parse_method(self.method.name)[1]
        if method.suffix == "r" and number is not None and "r" not in self.method.options:
            values["r"] = number
        if method.is_head_only and current["lr"] is not None and current.get("head_lr", 0) is None:
            values["head_lr"] = current["lr"]  # the only learning rate that applies
        return self.replace(**values)

    def missing_errors(self, *, is_started: bool) -> list[str]:
        """Check the required settings; `is_started` means that a stored run supplies all but `out`."""
        examples = {**({} if is_started else self.required), "out": self.out_example}
        values = self.flat()
        missing = [name for name in examples if values[name] in (None, "")]
        example = " ".join(f"{name}={examples[name]!r}" for name in missing)
        return [f"missing required settings: {', '.join(missing)}, e.g. {example}"] if missing else []

    def method_errors(self) -> list[str]:
        """Check that the method supports this purpose, and has scalar parameters if `scalar_lr` is set."""
        from snella_app.methods import METHODS, parse_method

        try:
            family, _ = parse_method(self.method.name)
        except ValueError:
            return []  # reported by the section
        defaults: dict[str, Mapping[str, Any]] = {}
        for name, method in METHODS.items():
            method_defaults = method.defaults_of(self.purpose)
            if method_defaults is not None:
                defaults[name] = method_defaults
        if family not in defaults:
            return [f"method must be one of {', '.join(defaults)} for {self.purpose}, got {self.method.name!r}"]
        if self.optim.scalar_lr is None or "scalar_lr" in defaults[family]:
            return []
        *most, last = (name for name, values in defaults.items() if "scalar_lr" in values)
        return [
            f"scalar_lr applies to methods with scalar kernel parameters ({', '.join(most)} and {last}), got "
            f"{self.optim.scalar_lr} with method {self.method.name!r}"
        ]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunSettings):
    """Configuration of a training run.

        TrainConfig(data=DataConfig(spec="photos"), model=ModelConfig(backbone="test_vit"), run=RunConfig(out="run"))
        TrainConfig.from_flat(data="photos", backbone="test_vit", out="run")

    Options, configuration files and `snella.train` use flat names, which `from_flat`, `flat` and `replace` map to
    sections. A `preset` fills in settings of several sections, so only `from_flat` accepts it.

    Args:
        data: Images, labels, splits and augmentation.
        model: Backbone and its initialization.
        method: Fine-tuning method and its options.
        optim: Epochs, batches, loss, learning rates, heads and weight averages.
        run: Folder, seed, devices and trackers.
    """

    required: ClassVar[dict[str, str]] = {"data": "photos", "backbone": "vit_base_patch16_224.augreg_in21k"}
    out_example: ClassVar[str] = "runs/photos"
    basic: ClassVar[tuple[str, ...]] = (
        *("data", "backbone", "out", "task", "method", "weights", "img_size", "epochs", "batch_size", "augment"),
        *("columns", "folds", "channels", "skip_corrupt", "device", "workers", "resume", "overwrite"),
    )

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Validate the fields, and reject a preset that `from_flat` has not filled in."""
        super().__post_init__()
        preset = self.method.preset
        if preset is not None and "preset" not in self.method.options:
            raise ValueError(
                f"preset must be given to TrainConfig.from_flat, which fills in several sections, got "
                f"MethodConfig(preset={preset!r}); use TrainConfig.from_flat(preset={preset!r}, ...)"
            )

    @classmethod
    def from_flat(cls, **settings: Any) -> Self:
        """Create a configuration from flat names; see `Config.from_flat`.

        A `preset` supplies missing settings, except for `head_init` with `init_from`, which loads a trained head. Its
        method options are merged with the given ones.
        """
        preset = settings.get("preset")
        options = settings.get("method_options")
        defaults = TRAIN_PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        if defaults and isinstance(options, Mapping | None):  # `coerce_fields` reports other types
            options = options or {}
            missing = {name: value for name, value in defaults.items() if name not in options}
            if settings.get("init_from") is not None:
                missing.pop("head_init", None)
            settings = {**missing, **settings, "method_options": {**defaults["method_options"], **options}}
        return super().from_flat(**settings)

    @property
    def planned_names(self) -> tuple[str, ...]:
        """With a time budget, the number and length of the epochs; the epochs of a method that skipped them."""
        from snella_app.methods import find_method

        if self.optim.time_budget is not None:
            return "epochs", "epoch_images"
        return ("epochs",) if self.optim.epochs == 0 and find_method(self.method.name).is_head_only else ()

    def differences(self, other: RunSettings, names: Iterable[str] | None = None) -> list[str]:
        """Describe differences like `RunSettings.differences`, with class weights read from their file."""
        weights = self.optim.read_class_weights()
        config = self if weights == self.optim.class_weights else self.replace(class_weights=weights)
        return super(TrainConfig, config).differences(other, names)

    def resolved(self) -> Self:
        """Return a copy with the method's defaults in place of None, and class weights read from their file.

        For methods with a budget (the number of weights that an update may change), `early_stopping` changes the
        default of `schedule_end` to 0.7, so that the budget reaches its target before training can stop; a preset in
        `method_options` keeps its own value.

        Raises:
            ValueError: If the method is `auto`, the `weights` file is missing, the `class_weights` file is missing or
                invalid, or `min_lr` exceeds the method's default `lr`.
        """
        from snella_app.methods import find_method

        if (weights := self.model.weights) is not None and not os.path.isfile(expand_user(weights)):
            raise ValueError(f"weights must be an existing file, got {weights!r}")
        if self.method.name == AUTO_METHOD:
            raise ValueError(
                "method must be a specific method, got 'auto'; train(method='auto') and the command line select one"
            )
        result = super().resolved()
        method, optim = result.method, result.optim
        has_schedule_end = bool({"schedule_end", "preset"} & set(method.options))
        has_budgets = find_method(method.name).has_budgets
        if optim.early_stopping is not None and has_budgets and not has_schedule_end:
            method = replace(method, options={**method.options, "schedule_end": SCHEDULE_END})
        optim = replace(optim, class_weights=optim.read_class_weights())
        return replace(result, method=method, optim=optim)

    def errors(self) -> list[str]:
        """Check for missing settings and conflicts across sections, without loading the data or the model."""
        init_from = self.model.init_from
        is_started = self.run.resume or init_from is not None
        errors = [*self.missing_errors(is_started=is_started), *self.method_errors(), *self._task_errors()]
        if self.data.protocol == "final":
            errors += self._validation_errors()
        if init_from is not None:
            errors += self._start_errors(init_from)
        if self.run.shard:
            errors += self._shard_errors()
        return errors

    def method_errors(self) -> list[str]:
        """Check the method; 'auto' does not support method-specific settings, folds or segmentation."""
        if self.method.preset_errors():
            return []  # reported by the section; the preset also sets `scalar_lr`
        if self.method.name != AUTO_METHOD:
            return super().method_errors()
        names = (*OPTION_SETTINGS, "lr", "scalar_lr", "head_lr", "weight_decay", "method_options", "folds", "fold")
        values = self.flat()
        given = [f"{name} {value}" for name in names if (value := values[name]) not in (None, {})]
        errors = [
            f"{text} needs a specific method, got method 'auto'; set a method or leave the setting out"
            for text in given
        ]
        if self.data.task == "segmentation":
            errors.append("method must be a specific method for task 'segmentation', got 'auto'")
        return errors

    def _task_errors(self) -> list[str]:
        """Check settings that depend on the task."""
        from snella_app.tasks import TASKS, task_class

        name = self.data.task
        optim = self.optim
        values = self.flat()
        task = task_class(name)
        tasks = TASKS.values()
        errors: list[str] = []
        for setting in dict.fromkeys(setting for other in tasks for setting in other.settings):
            if setting not in task.settings and values[setting] != self.settings()[setting].default:
                owners = " or ".join(other.name for other in tasks if setting in other.settings)
                errors.append(f"{setting} applies to task {owners}, got {values[setting]!r} with task {name!r}")
        if optim.loss is not None and "loss" in task.settings and optim.loss not in task.losses:
            errors.append(f"loss must be {' or '.join(task.losses)} for task {name}, got {optim.loss!r}")
        if optim.monitor is not None and optim.monitor not in task.monitors:
            hint = nearest(optim.monitor.lower().replace("-", "_"), task.monitors, cutoff=0.4)
            known = ", ".join(task.monitors)
            errors.append(f"monitor must be one of {known} for task {name}, got {optim.monitor!r}{hint}")
        return errors

    def _validation_errors(self) -> list[str]:
        """Reject settings that need validation images, which protocol `final` lacks."""
        from snella_app.data.protocol import PROTOCOLS

        remedies = {"early_stopping": "leave one out", "soup": f"use --swa {self.optim.soup} instead"}
        summary = PROTOCOLS["final"].summary
        return [
            f"{name} needs validation images, got {value} with protocol 'final': {summary}; {remedy}"
            for name, remedy in remedies.items()
            if (value := getattr(self.optim, name)) is not None
        ]

    def _start_errors(self, init_from: str) -> list[str]:
        """Check the settings of a run that starts from another run."""
        errors = []
        if (head_init := self.optim.head_init) != "auto":
            errors.append(
                f"head_init does not apply with init_from, which loads a trained head, got {head_init!r}; leave it out"
            )
        if self.method.name == AUTO_METHOD:
            errors.append(
                "method must not be auto with init_from, which keeps the method of that run; leave method out"
            )
        if self.data.folds is not None and self.data.fold is None:
            errors.append("init_from does not support folds; start from the run of one fold, OUT/fold-1")
        if self.run.out is not None and Path(self.run.out).resolve() == Path(init_from).resolve():
            errors.append(f"out must differ from init_from, got {self.run.out!r} for both")
        return errors

    def _shard_errors(self) -> list[str]:
        """Reject settings that sharding does not support."""
        from snella_app.methods import METHODS, parse_method

        errors = []
        if self.optim.time_budget is not None:
            errors.append(
                f"time_budget must not be combined with shard, got {self.optim.time_budget}; it measures a training "
                "step in one process, so set epochs instead"
            )
        with contextlib.suppress(ValueError):  # the section reports unknown names
            reason = METHODS[parse_method(self.method.name)[0]].unsharded_reason
            if reason:
                errors.append(f"shard needs another method, got {self.method.name!r}, which {reason}; leave shard out")
        return errors


def command_line(settings: RunSettings, command: str) -> str:
    """Return the command line of `command`, without `UNSTORED_FIELDS` and settings that are None or the default.

    Settings that differ from the preset of `settings` are included even if they equal the default.
    """
    args = ["snella", command]
    # required settings have no defaults
    defaults = type(settings).from_flat(**dict.fromkeys((*settings.required, "out"), "-")).flat()
    values = settings.flat()
    preset = TRAIN_PRESETS.get(str(values.get("preset")), {})
    for name, value in values.items():
        is_default = value == defaults[name] and value == preset.get(name, value)
        if name in UNSTORED_FIELDS or value is None or is_default:
            continue
        option = "--" + name.replace("_", "-")
        if name == "class_weights" and isinstance(value, dict):
            args += [option, json.dumps(value, ensure_ascii=False)]  # class names may contain any character
        elif isinstance(value, dict):
            for key, inner in value.items():
                args += [f"{option}.{key}", "null" if inner is None else str(inner)]
        else:
            args += [option, str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(args)
