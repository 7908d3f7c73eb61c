"""`Config`: configurations made of parts, with flat names for users."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache, reduce
from typing import Any, ClassVar, Self, get_type_hints

from snella_app.settings import KindError, described, fitted, hint_at_choice, ours, short
from snella_app.text import nearest


@dataclass(frozen=True)
class Setting:
    """One value of a configuration.

    Attributes:
        name: Flat name, unique in the configuration, e.g. `lr` or `method`.
        path: Attributes that lead to the value, e.g. `("optim", "lr")` or `("method", "name")`.
        type: Type annotation.
        default: Default value; `MISSING` if required.
        owner: Class with the field; its docstring, or that of a base class, describes the setting.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any
    owner: type

    def fresh_default(self) -> Any:
        """Return the default value; a copy of a dictionary."""
        return copy.deepcopy(self.default) if isinstance(self.default, dict) else self.default

    def of(self, config: "Config") -> Any:
        """Return the value in a configuration."""
        return reduce(getattr, self.path, config)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of configurations: frozen dataclasses that check their own fields.

    A field is a value or a part, another `Config`. Users write flat names: options, keys of YAML files and keyword
    arguments of `from_flat` do not name the part. The flat name of a field is its name, except for `flat_names`.

    Attributes:
        flat_names: Flat names of fields that differ from the name of the field.
        order: Flat names that come first in help and files, in this order.
        minimums: Smallest value by field.
        nonnegative: Fields that are finite and at least 0.
        fractions: Fields in [0, 1).
    """

    flat_names: ClassVar[Mapping[str, str]] = {}
    order: ClassVar[tuple[str, ...]] = ()
    minimums: ClassVar[Mapping[str, int]] = {}
    nonnegative: ClassVar[tuple[str, ...]] = ()
    fractions: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the fields, and report all errors together."""
        _raise([*self.fit(), *self.errors()])

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Return the values of all parts by flat name."""
        return _settings(cls)  # type: ignore[arg-type]

    @classmethod
    def command_options(cls) -> dict[str, Setting]:
        """Return the options of a command with this configuration."""
        return cls.settings()

    @classmethod
    def from_flat(cls, **settings: Any) -> Self:
        """Create a configuration from flat names.

        Args:
            **settings: Values by flat name; missing ones get their default.

        Raises:
            TypeError: If a name is unknown; suggests the closest one.
            ValueError: If values are invalid; reports the errors of all parts together.
        """
        known = list(cls.settings())
        unknown = [name for name in settings if name not in known]
        if unknown:
            listed = ", ".join(f"{name!r}{_other_name(name, known)}" for name in unknown)
            raise TypeError(f"{cls.__name__} has no setting {listed}; see help({cls.__name__})")
        config, errors = cls._collect(settings)
        _raise(errors)
        return config

    def flat(self) -> dict[str, Any]:
        """Return the values of all parts by flat name, as plain values for YAML and JSON."""
        return {name: copy.deepcopy(setting.of(self)) for name, setting in self.settings().items()}

    def replace(self, **settings: Any) -> Self:
        """Return a copy with other values, given by flat name."""
        return self.from_flat(**{**self.flat(), **settings})

    def fit(self) -> list[str]:
        """Check each value against its type annotation.

        Invalid values are reset to their default, so that later checks can run and all errors are reported together.
        Paths are converted to strings and NumPy numbers to Python numbers.
        """
        errors = []
        for setting in type(self).settings().values():
            if len(setting.path) > 1:
                continue  # checked by its part
            value = setting.of(self)
            try:
                value = fitted(setting.type, value)
            except KindError:
                hint = hint_at_choice(setting.type, value)
                errors.append(f"{setting.name} must be {described(setting.type)}, got {short(value)}{hint}")
                value = setting.fresh_default()
            object.__setattr__(self, setting.path[0], value)  # only during construction
        return errors

    def errors(self) -> list[str]:
        """Check the declared ranges; subclasses also check combinations. Parts have checked their own fields."""
        errors = []
        for name, least in self.minimums.items():
            if isinstance(value := getattr(self, name), int) and value < least:
                errors.append(f"{name} must be at least {least}, got {value}")
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
        for name, part in _parts(cls).items():  # type: ignore[arg-type]
            value, part_errors = part._collect(settings)
            object.__setattr__(config, name, value)
            errors += part_errors
        for setting in cls.settings().values():
            if len(setting.path) == 1:
                value = settings[setting.name] if setting.name in settings else setting.fresh_default()
                object.__setattr__(config, setting.path[0], value)
        return config, [*config.fit(), *config.errors(), *errors]


def _raise(errors: list[str]) -> None:
    """Raise all errors as one."""
    if errors:
        raise ValueError("; ".join(errors))


@cache
def _settings(kind: type[Config]) -> dict[str, Setting]:
    """Return the settings of a class and of its parts."""
    settings: dict[str, Setting] = {}
    parts, hints = _parts(kind), get_type_hints(kind)  # type: ignore[arg-type]
    for f in dataclasses.fields(kind):
        if f.name in parts:
            inner = parts[f.name].settings().values()
            settings |= {setting.name: dataclasses.replace(setting, path=(f.name, *setting.path)) for setting in inner}
        else:
            name = kind.flat_names.get(f.name, f.name)
            default = f.default if f.default_factory is MISSING else f.default_factory()
            settings[name] = Setting(name, (f.name,), hints[f.name], default, kind)
    return {name: settings[name] for name in (*kind.order, *settings)}


@cache
def _parts(kind: type[Config]) -> dict[str, type[Config]]:
    """Return the classes of the fields that are parts."""
    hints = get_type_hints(kind)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return {name: hint for name, hint in kinds.items() if isinstance(hint, type) and issubclass(hint, Config)}


def _other_name(name: str, known: Iterable[str]) -> str:
    """Suggest the setting that an unknown name refers to, in parentheses; empty if none is similar."""
    setting = ours(name, known)
    return f" (it is called {setting})" if setting else nearest(name, known, most=2, form=" (nearest: {})")
