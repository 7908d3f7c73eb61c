"""Objects that installed packages register for the application as entry points.

    [project.entry-points."snella.methods"]
    scale = "scale_wheel:SCALE"             # a `Method`, trained by --method scale

| group | object | what it adds |
|---|---|---|
| `snella.commands` | function decorated with `snella_app.cli.command.command` | `snella NAME` |
| `snella.methods` | `snella_app.methods.Method` | `--method NAME` |
| `snella.data` | function `() -> Collection`, or `(path) -> Collection` | `--data NAME`, or `--data NAME:PATH` |
| `snella.backbones` | `snella_app.backbones.NamedBackbone` | `--backbone NAME` |
| `snella.reports` | function `(run folder) -> path of the page` | reports of runs whose task is NAME |
| `snella.choices` | function `(config, console) -> config` | `--method auto` (the entry `method`) |
"""

import functools
import warnings
from importlib.metadata import entry_points
from typing import Any


def plugin(group: str, name: str) -> Any:
    """The object that an installed package registers as `name` in `snella.{group}`, None if none does.

    Args:
        group: As for `plugins`.
        name: Name of the entry point.

    Raises:
        ImportError: It cannot be imported.
    """
    found = list(entry_points(group=f"snella.{group}", name=name))
    return found[0].load() if found else None


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """The objects that installed packages register in `snella.{group}`, by name.

    An entry that cannot be imported is left out with a warning that names its package.

    Args:
        group: `commands`, `methods`, `data`, `backbones`, `reports` or `choices`.
    """
    found = {}
    entries = entry_points(group=f"snella.{group}")
    for entry in sorted(entries, key=lambda entry: (not entry.value.startswith("snella_"), entry.name)):
        package = entry.dist.name if entry.dist is not None else entry.module
        if entry.name in found:
            warnings.warn(f"{package} registers {entry.name!r} in snella.{group} a second time; ignored", stacklevel=2)
            continue
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            warnings.warn(
                f"{package} registers {entry.name!r} in snella.{group}, which cannot be imported "
                f"({type(error).__name__}: {error}); update or uninstall {package}",
                stacklevel=2,
            )
    return found
