"""Plugins: objects that installed packages register as entry points.

    [project.entry-points."snella.methods"]
    scale = "scale_wheel:SCALE"             # a `Method`, used as --method scale

| group | object | adds |
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
    """Load the object registered as `name` in `snella.{group}`; None if no package registers it.

    Args:
        group: `reports` or `choices`.
        name: Name of the entry point.

    Raises:
        ImportError: If the object cannot be imported.
    """
    entries = list(entry_points(group=f"snella.{group}", name=name))
    return entries[0].load() if entries else None


@functools.cache
def plugins(group: str, reserved: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Load all objects registered in `snella.{group}`, by name.

    Entries that cannot be imported, or whose name is taken, are skipped with a warning that names their package.

    Args:
        group: `commands`, `methods`, `data` or `backbones`.
        reserved: Names that the application itself uses.
    """
    objects = {}
    entries = entry_points(group=f"snella.{group}")
    for entry in sorted(entries, key=lambda entry: (not entry.value.startswith("snella_"), entry.name)):
        package = entry.dist.name if entry.dist is not None else entry.module
        if entry.name in objects or entry.name in reserved:
            warnings.warn(
                f"{package} registers {entry.name!r} in snella.{group}, which is taken; ignored", stacklevel=2
            )
            continue
        try:
            objects[entry.name] = entry.load()
        except Exception as error:
            warnings.warn(
                f"{package} registers {entry.name!r} in snella.{group}, which cannot be imported "
                f"({type(error).__name__}: {error}); update or uninstall {package}",
                stacklevel=2,
            )
    return objects
