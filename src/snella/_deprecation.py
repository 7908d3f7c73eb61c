"""Settings by their former names, accepted for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


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
    names: Mapping[str, str], is_from_file: Callable[[Mapping[str, Any]], bool]
) -> Callable[[C], C]:
    """Class decorator: keyword arguments of the constructor by their former names, with a warning.

    Args:
        names: Former names, each with the present one.
        is_from_file: Whether these arguments were read from a file, which nobody is warned of.
    """

    def decorate(cls: C) -> C:
        constructor: Any = cls
        initialize = constructor.__init__

        @functools.wraps(initialize)
        def with_former_names(self: Any, *args: Any, **settings: Any) -> None:
            if settings.keys() & names.keys():
                settings = renamed(settings, names, warns=not is_from_file(settings))
            initialize(self, *args, **settings)

        constructor.__init__ = with_former_names
        return cls

    return decorate
