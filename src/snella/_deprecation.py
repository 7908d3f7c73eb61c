"""Settings and modules by their former names, accepted for one release."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar, cast

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])

FORMER_OPTIONS = {
    "head_start": "head_init",
    "check_sizes": "strict_sizes",
    "skip_broken": "skip_corrupt",
    "final_lr": "min_lr",
    "warmup": "warmup_ratio",
}
"""Options of commands by the names they had until 2026-11, each with the present one."""


def renamed(settings: Mapping[str, Any], names: Mapping[str, str], *, warns: bool = True) -> dict[str, Any]:
    """Settings under their present names.

    Args:
        settings: By present or former name.
        names: Former names, each with the present one.
        warns: Whether each former name causes a `FutureWarning`; not where it stands in a file.

    Raises:
        TypeError: A setting is given by both names.
    """
    result = {name: value for name, value in settings.items() if name not in names}
    for name in settings.keys() & names.keys():
        if names[name] in result:
            raise TypeError(f"{name} is the former name of {names[name]}, got both; leave {name} out")
        if warns:
            warnings.warn(f"{name} is called {names[name]} now; the former name goes in 0.3", FutureWarning, 3)
        result[names[name]] = settings[name]
    return result


def accept_former_names(
    names: Mapping[str, str], is_from_file: Callable[[Mapping[str, Any]], bool] = lambda _: False
) -> Callable[[C], C]:
    """Class decorator: keyword arguments of the constructor by their former names, with a warning.

    Args:
        names: Former names, each with the present one.
        is_from_file: Whether these arguments were read from a file, which nobody is warned of.
    """

    def decorate(cls: C) -> C:
        constructor: Any = cls
        constructor.__init__ = _with_former_names(constructor.__init__, names, is_from_file)
        return cls

    return decorate


def accept_former_arguments(function: F) -> F:
    """Function decorator: keyword arguments by the names of `FORMER_OPTIONS`, with a warning."""
    return _with_former_names(function, FORMER_OPTIONS, lambda _: False)


def _with_former_names(function: F, names: Mapping[str, str], is_from_file: Callable[[Mapping[str, Any]], bool]) -> F:
    """The same function, which takes former names too."""

    @functools.wraps(function)
    def with_former_names(*args: Any, **settings: Any) -> Any:
        if settings.keys() & names.keys():
            settings = renamed(settings, names, warns=not is_from_file(settings))
        return function(*args, **settings)

    return cast(F, with_former_names)


def from_new_home(former: str, home: str) -> Any:
    """The object that stood at `former` and is in the module `home` now, with a `FutureWarning`."""
    name = former.rpartition(".")[2]
    warnings.warn(f"{former} is {home}.{name} now; the former place goes in 0.3", FutureWarning, 3)
    return getattr(importlib.import_module(home), name)


class FormerModule(ModuleType):
    """A module at its former place, whose names are those of its present one.

    Args:
        name: The former place.
        home: The present one, which is imported when a name is used.
    """

    def __init__(self, name: str, home: str) -> None:
        super().__init__(name)
        self.home = home

    def __getattr__(self, name: str) -> Any:
        """A name of the module, with a `FutureWarning`; what only Python itself asks for is not there."""
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return from_new_home(f"{self.__name__}.{name}", self.home)
