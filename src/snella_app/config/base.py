"""`Config`: nested configurations with flat names for users."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache, reduce
from typing import Any, ClassVar, Self, get_type_hints

from snella_app.settings import coerce, describe_type, short_repr, suggest_choice, suggest_setting


@dataclass(frozen=True)
class Setting:
    """Leaf field of a configuration.

    Attributes:
        name: Flat name, unique in the configuration, e.g. `lr` or `method`.
        path: Attribute path to the value, e.g. `("optim", "lr")` or `("method", "name")`.
        type: Type annotation.
        default: Default value; `MISSING` if required.
        owner: Class that declares the field; its docstring, or that of a base class, describes the setting.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any
    owner: type

    def fresh_default(self) -> Any:
        """Return the default value; dictionaries are copied."""
        return copy.deepcopy(self.default) if isinstance(self.default, dict) else self.default

    def value_in(self, config: "Config") -> Any:
        """Return the value of the setting in a configuration."""
        return reduce(getattr, self.path, config)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of frozen, self-validating configurations.

    A field is a value or a section: a nested `Config`. Users write flat names: options, YAML keys and keyword arguments
    of `from_flat` omit the section. The flat name of a field is its name unless `flat_names` overrides it.

    Attributes:
        flat_names: Flat names that differ from the field name, by field.
        basic: Flat names of the settings that most users need; they come first in help and files.
        positional: Flat names of positional arguments on the command line.
        minimums: Minimum value by field.
        nonnegative: Fields that are finite and at least 0.
        fractions: Fields in [0, 1).
    """

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
            TypeError: If a name is unknown; suggests the closest one.
            ValueError: If values are invalid; one message lists all errors.
        """
        spellings = {name: name for name in cls.settings()}
        hints = {name: suggest_setting(name, spellings) for name in settings if name not in spellings}
        if hints:
            unknown = ", ".join(f"{name!r}{hint and f' ({hint})'}" for name, hint in hints.items())
            raise TypeError(f"{cls.__name__} has no setting {unknown}; see help({cls.__name__})")
        config, errors = cls._collect(settings)
        if errors:
            raise ValueError("; ".join(errors))
        return config

    def flat(self) -> dict[str, Any]:
        """Return all values by flat name, as plain values for YAML and JSON."""
        return {name: copy.deepcopy(setting.value_in(self)) for name, setting in self.settings().items()}

    def replace(self, **settings: Any) -> Self:
        """Return a copy with some settings changed, by flat name."""
        return self.from_flat(**{**self.flat(), **settings})

    def coerce_fields(self) -> list[str]:
        """Convert each value to its annotated type, and return the errors.

        Invalid values are reset to their defaults, so that later checks can run and all errors are reported together.
        Paths are converted to strings and NumPy numbers to Python numbers.
        """
        errors = []
        for setting in type(self).settings().values():
            if len(setting.path) > 1:
                continue  # checked by its section
            value = setting.value_in(self)
            try:
                value = coerce(setting.type, value)
            except ValueError:
                hint = suggest_choice(setting.type, value)
                errors.append(f"{setting.name} must be {describe_type(setting.type)}, got {short_repr(value)}{hint}")
                value = setting.fresh_default()
            object.__setattr__(self, setting.path[0], value)  # only during construction
        return errors

    def errors(self) -> list[str]:
        """Check the declared ranges; subclasses also check combinations. Sections check themselves."""
        errors = []
        for name, minimum in self.minimums.items():
            if isinstance(value := getattr(self, name), int) and value < minimum:
                errors.append(f"{name} must be at least {minimum}, got {value}")
        for name in self.fractions:
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                errors.append(f"{name} must be in [0, 1), got {value}")
        for name in self.nonnegative:
            if (value := getattr(self, name)) is not None and not 0.0 <= value < float("inf"):
                errors.append(f"{name} must be at least 0 and finite, got {value}")
        return errors

    @classmethod
    def _collect(cls, settings: Mapping[str, Any]) -> tuple[Self, list[str]]:
        """Create a configuration without raising, and return its errors."""
        config, errors = object.__new__(cls), []
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
    """Call a function and return the message of its ValueError or TypeError; empty if it succeeds."""
    try:
        check(*args)
    except (ValueError, TypeError) as error:
        return [str(error)]
    return []


@cache
def _settings(kind: type[Config]) -> dict[str, Setting]:
    """Return the settings of a class, including its sections."""
    settings: dict[str, Setting] = {}
    sections, hints = _sections(kind), get_type_hints(kind)  # type: ignore[arg-type]
    for f in dataclasses.fields(kind):
        if f.name in sections:
            inner = sections[f.name].settings().values()
            settings |= {setting.name: dataclasses.replace(setting, path=(f.name, *setting.path)) for setting in inner}
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
