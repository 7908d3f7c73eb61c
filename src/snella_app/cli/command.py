"""`Command`, the table of commands, and what their functions share."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Device = str
"""auto, or a device of torch."""
_Function = TypeVar("_Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        function: What it calls. Parameters before the `/` stand on the line as they are, the others as options; a
            dataclass as the only parameter gives its fields. The docstring is the help.
        library: Module that is imported before the call, while Ctrl-C ends the program at once.
        is_recorded: Whether its settings are left in the run's folder as `commands/NAME.yaml`.
        is_research: List it under research commands in the help.
    """

    function: Callable[..., None]
    library: str
    is_recorded: bool = False
    is_research: bool = False


COMMANDS: dict[str, Command] = {}


def command(library: str, *, is_recorded: bool = False, is_research: bool = False) -> Callable[[_Function], _Function]:
    """Enter a function under its name, with dashes; ValueError if there is one of that name."""

    def enter(function: _Function) -> _Function:
        if function.__name__.replace("_", "-") in COMMANDS:
            raise ValueError(f"there is a command {function.__name__!r} already")
        COMMANDS[function.__name__.replace("_", "-")] = Command(function, library, is_recorded, is_research)
        return function

    return enter


def record(name: str, settings: dict[str, Any]) -> None:
    """Leave a command's settings in the run's folder, `commands/NAME.yaml`, where that can be written."""
    import yaml

    from snella_app.files import write_text

    folder = Path(settings["run"]) / "commands"
    with contextlib.suppress(OSError):  # the result does not depend on it: a run may lie on a read-only disk
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))


def listed(name: str, value: str, kind: Callable[[str], Any]) -> list[Any]:
    """The values between commas; raises a ValueError where one is not a number."""
    try:
        return [kind(part.strip()) for part in str(value).split(",") if part.strip()]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} separated by commas, e.g. 4,16; got {value!r}") from None
