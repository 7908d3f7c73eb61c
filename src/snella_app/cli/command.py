"""`Command`, the command registry, and helpers for commands."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Device = str
"""auto, or a torch device."""
_Function = TypeVar("_Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Command:
    """Command of the `snella` program.

    Attributes:
        function: Function to call. Positional-only parameters become positional arguments; all others become options.
            If the only parameter is a `Config`, its settings become the arguments. The docstring is the help text.
        library: Module to import before the call. During this import, Ctrl-C exits immediately.
        is_recorded: If True, store the settings in the run folder as `commands/NAME.yaml`.
        is_research: If True, list the command under the research commands.
    """

    function: Callable[..., None]
    library: str
    is_recorded: bool = False
    is_research: bool = False


COMMANDS: dict[str, Command] = {}


def command(library: str, *, is_recorded: bool = False, is_research: bool = False) -> Callable[[_Function], _Function]:
    """Register the decorated function under its name with dashes; raise ValueError if the name is taken."""

    def register(function: _Function) -> _Function:
        name = function.__name__.replace("_", "-")
        if name in COMMANDS:
            raise ValueError(f"command {name!r} is already registered")
        COMMANDS[name] = Command(function, library, is_recorded, is_research)
        return function

    return register


def record(name: str, settings: dict[str, Any]) -> None:
    """Store a command's settings in the run folder as `commands/NAME.yaml`, if the folder is writable."""
    import yaml

    from snella_app.files import write_text

    folder = Path(settings["run"]) / "commands"
    with contextlib.suppress(OSError):  # optional: the run may be on a read-only file system
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))
