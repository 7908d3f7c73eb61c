"""`Config`: nested configurations with flat names for users, type checks, and suggestions for names and values."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache, reduce
from numbers import Number
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from snella_app.text import nearest

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "run": ("model",),
    "backbone": ("model", "model_name", "model_name_or_path", "arch", "architecture"),
    "backbones": ("model",),
    "model": ("model_name", "model_name_or_path"),
    "weights": ("checkpoint", "ckpt"),
    "resume": ("resume_from_checkpoint", "continue"),
    "lr": ("learning_rate", "base_lr", "lr0"),
    "out": ("output_dir", "output", "outdir", "out_dir", "save_dir", "logging_dir", "format"),
    "batch_size": (
        *("batch", "bs", "batchsize", "train_batch_size"),
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
    ),
    "batch": ("batch_size",),
    "accumulate": ("gradient_accumulation_steps", "grad_accum"),
    "accumulation": ("gradient_accumulation_steps", "grad_accum"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "max_epochs"),
    "data": ("dataset", "dataset_name", "data_dir", "data_path", "train_dir", "input", "source"),
    "images": ("image", "source", "input"),
    "img_size": ("image_size", "imgsz", "input_size", "resolution"),
    "workers": ("num_workers", "dataloader_num_workers"),
    "weight_decay": ("wd",),
    "r": ("rank", "lora_r", "lora_rank"),
    "scaling": ("alpha",),
    "target_sparsity": ("sparsity",),
    "method": ("peft", "peft_type", "peft_method"),
    "precision": ("dtype", "amp", "fp16", "bf16", "mixed_precision"),
    "grad_checkpointing": ("gradient_checkpointing",),
    "early_stopping": ("patience",),
    "label_smoothing": ("smoothing",),
    "max_grad_norm": ("clip_grad",),
    "val_fraction": ("val_split", "validation_split"),
    "test_fraction": ("test_split",),
    "device": ("gpu", "gpus"),
    "overwrite": ("force",),
    "track": ("report_to", "logger"),
    "augment": ("augmentation", "aug"),
}
"""Names that other tools use for a setting, by the name in snella."""

_OTHER_VALUES = {
    "bfloat16": "bf16",
    "half": "fp16",
    "float16": "fp16",
    "full": "fp32",
    "float": "fp32",
    "float32": "fp32",
    "semantic-segmentation": "segmentation",
    "image-classification": "classification",
    "multi-class": "classification",
}
"""Values in snella, by the name that other tools use for them."""


@dataclass(frozen=True)
class Setting:
    """Leaf field of a configuration.

    Attributes:
        name: Flat name, unique in the configuration, e.g. `lr` or `method`.
        path: Attribute path to the value, e.g. `("optim", "lr")` or `("method", "name")`.
        type: Type annotation.
        default: Default value; `MISSING` if required.
        owner: Class that has or inherits the field. Its docstring, or that of a base class, describes the setting.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any
    owner: type

    def fresh_default(self) -> Any:
        """Return the default value. Dictionaries are copied, so that configurations do not share them."""
        return copy.deepcopy(self.default) if isinstance(self.default, dict) else self.default

    def value_in(self, config: Config) -> Any:
        """Return the value of the setting in a configuration."""
        return reduce(getattr, self.path, config)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of frozen, self-validating configurations.

    A field is a value or a section: a nested `Config`. Users write flat names: options, YAML keys, and keyword
    arguments of `from_flat` omit the section. The flat name of a field is its name unless `flat_names` overrides it.

    Attributes:
        given: Flat names of the settings passed to `from_flat`, except those that `replace` has changed since.
        flat_names: Flat names that differ from the field name, by field.
        basic: Flat names of the settings that most users need, which come first in help texts and settings files.
        positional: Flat names of positional arguments on the command line.
        minimums: Minimum value by field.
        nonnegative: Fields that must be finite and at least 0.
        fractions: Fields that must be in [0, 1).
    """

    given: ClassVar[frozenset[str]] = frozenset()
    flat_names: ClassVar[Mapping[str, str]] = {}
    basic: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[tuple[str, ...]] = ()
    minimums: ClassVar[Mapping[str, int]] = {}
    nonnegative: ClassVar[tuple[str, ...]] = ()
    fractions: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Validate the fields and report all errors together."""
        if errors := [*self.coerce_fields(), *self.errors()]:
            raise ValueError("; ".join(errors))

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Return the settings of all sections by flat name."""
        return _settings(cls)  # type: ignore[arg-type]

    @classmethod
    def command_options(cls) -> dict[str, Setting]:
        """Return the command-line options for this configuration."""
        return cls.settings()

    @classmethod
    def from_flat(cls, **settings: Any) -> Self:
        """Create a configuration from flat names.

        Args:
            **settings: Values by flat name; omitted settings get their defaults.

        Raises:
            TypeError: If a name is unknown. The message suggests similar names, if there are any.
            ValueError: If values are invalid or required settings are missing. One message lists all errors.
        """
        spellings = {name: name for name in cls.settings()}
        unknown: list[str] = []
        for name in settings:
            if name not in spellings:
                hint = suggest_setting(name, spellings)
                unknown.append(f"{name!r} ({hint})" if hint else repr(name))
        if unknown:
            names = ", ".join(unknown)
            raise TypeError(f"{cls.__name__} has no setting {names}; {cls.__name__}.settings() lists all")
        config, errors = cls._collect(settings)
        if errors:
            raise ValueError("; ".join(errors))
        return config

    def flat(self) -> dict[str, Any]:
        """Return all values by flat name, as plain values for YAML and JSON."""
        return {name: copy.deepcopy(setting.value_in(self)) for name, setting in self.settings().items()}

    def replace(self, **settings: Any) -> Self:
        """Return a copy with some settings changed, by flat name."""
        config = self.from_flat(**{**self.flat(), **settings})
        object.__setattr__(config, "given", self.given - settings.keys())
        return config

    def coerce_fields(self) -> list[str]:
        """Check each value against its annotation, convert it to a plain value, and return the errors.

        Invalid values are reset to their defaults, so that later checks can run and all errors are reported together.
        Paths are converted to strings, tuples to lists, and NumPy numbers to Python numbers, also inside lists and
        dictionaries. Sections are skipped.
        """
        errors = []
        for setting in type(self).settings().values():
            if len(setting.path) > 1:
                continue  # checked by its section
            value = setting.value_in(self)
            try:
                value = coerce(setting.type, value)
            except ValueError:
                requirement = "set"
                if value is not MISSING:
                    hint = suggest_choice(setting.type, value)
                    requirement = f"{describe_type(setting.type)}, got {short_repr(value)}{hint}"
                errors.append(f"{setting.name} must be {requirement}")
                value = setting.fresh_default()
            object.__setattr__(self, setting.path[0], value)  # the class is frozen; this runs only during construction
        return errors

    def errors(self) -> list[str]:
        """Return an error for each value outside its declared range; subclasses also check combinations of values.

        Sections check themselves.
        """
        errors = []
        for name, minimum in self.minimums.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < minimum:
                errors.append(f"{name} must be at least {minimum}, got {value}")
        for name in self.fractions:
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                errors.append(f"{name} must be in [0, 1), got {value}")
        for name in self.nonnegative:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                errors.append(f"{name} must be at least 0 and finite, got {value}")
        return errors

    @classmethod
    def _collect(cls, settings: Mapping[str, Any]) -> tuple[Self, list[str]]:
        """Create a configuration without raising an error, and return it with all errors."""
        config = object.__new__(cls)
        object.__setattr__(config, "given", frozenset(settings))
        errors = []
        for name, section in _sections(cls).items():  # type: ignore[arg-type]
            value, section_errors = section._collect(settings)
            object.__setattr__(config, name, value)
            errors += section_errors
        for setting in cls.settings().values():
            if len(setting.path) == 1:
                value = settings[setting.name] if setting.name in settings else setting.fresh_default()
                object.__setattr__(config, setting.path[0], value)
        return config, [*config.coerce_fields(), *config.errors(), *errors]


def errors_of(check: Callable[..., Any], *args: Any) -> list[str]:
    """Call a function; return a list with the message of its ValueError or TypeError, or an empty list on success."""
    try:
        check(*args)
    except (ValueError, TypeError) as error:
        return [str(error)]
    return []


@cache
def _settings(kind: type[Config]) -> dict[str, Setting]:
    """Return the settings of a class, including those of its sections."""
    settings: dict[str, Setting] = {}
    sections = _sections(kind)  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.name in sections:
            for setting in sections[f.name].settings().values():
                settings[setting.name] = dataclasses.replace(setting, path=(f.name, *setting.path))
        else:
            name = kind.flat_names.get(f.name, f.name)
            default = f.default if f.default_factory is MISSING else f.default_factory()
            settings[name] = Setting(name, (f.name,), hints[f.name], default, kind)
    return {name: settings[name] for name in (*kind.basic, *settings)}


@cache
def _sections(kind: type[Config]) -> dict[str, type[Config]]:
    """Return the classes of the sections by field name."""
    hints = get_type_hints(kind)
    types = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return {name: hint for name, hint in types.items() if isinstance(hint, type) and issubclass(hint, Config)}


def describe_type(kind: Any) -> str:
    """Describe a type annotation for error messages: `an integer or auto`."""
    if get_origin(kind) in (Union, UnionType):
        parts = [describe_type(part) for part in get_args(kind) if part is not NoneType]
        if len(parts) == 1:
            return parts[0]
        return " or ".join(part.removeprefix("one of ") for part in parts)
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is list:
        return "a list such as [a, b]"
    names = {
        **{int: "an integer", float: "a number", bool: "true or false", str: "a string"},
        dict[str, float]: "numbers by name such as {cat: 1, dog: 2.5}",
    }
    return names.get(kind, "settings such as {kernel: rbf}")


def coerce(kind: Any, value: Any) -> Any:
    """Check a value against its annotation; paths become strings, tuples lists, and NumPy numbers Python numbers.

    Raises:
        ValueError: If the value does not match the annotation.
    """
    value = _plain(value)
    result = type_adapter(kind).validate_python(value, strict=True)
    if type(value) is int and isinstance(result, float):
        return value  # keeps `1` in settings files, which pydantic would convert to 1.0
    return result


def _plain(value: Any) -> Any:
    """Convert paths, tuples, and NumPy numbers, also inside lists and dictionaries, to values for YAML."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    is_numpy_number = isinstance(value, Number) and hasattr(value, "item")
    return value.item() if is_numpy_number else value


@cache
def type_adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator for an annotation, cached because building it takes a few milliseconds."""
    return TypeAdapter(kind)


def suggest_choice(kind: Any, value: Any) -> str:
    """Suggest the choice closest to an invalid value: `; did you mean bf16?`. The text is empty if none is similar."""
    kinds = [kind, *get_args(kind)]
    choices = [str(choice) for part in kinds if get_origin(part) is Literal for choice in get_args(part)]
    text = str(value).lower()
    suggestion = _OTHER_VALUES.get(text.replace("_", "-"))
    if suggestion not in choices:
        # compare without separators
        compact = re.sub(r"[-_ ]", "", text)
        suggestion = next((choice for choice in choices if re.sub(r"[-_ ]", "", choice) == compact), None)
    return f"; did you mean {suggestion}?" if suggestion else nearest(text, choices, form="; did you mean {}?")


def suggest_setting(name: str, spellings: Mapping[str, str]) -> str:
    """Suggest a setting for an unknown name.

    Args:
        name: Unknown name.
        spellings: Known names, mapped to their spelling in the suggestion.

    Returns:
        `use lr` for another tool's name, `nearest: lr, r` for a typo, and an empty string for any other name.
    """
    name = name.replace("-", "_")
    for setting, others in _OTHER_NAMES.items():
        if name in others and setting in spellings:
            return f"use {spellings[setting]}"
    near = difflib.get_close_matches(name, spellings, n=2, cutoff=0.5)
    return f"nearest: {', '.join(spellings[setting] for setting in near)}" if near else ""


def short_repr(value: Any) -> str:
    """Return the `repr` of a value on one line, truncated to 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
