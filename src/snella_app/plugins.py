"""Plugins: objects that installed packages register as entry points.

    [project.entry-points."snella.methods"]
    scale = "scale_wheel:SCALE"             # a `Method`, used as --method scale

| group | object | adds |
|---|---|---|
| `snella.commands` | function decorated with `snella_app.cli.command.command` | `snella FUNCTION-NAME` |
| `snella.methods` | `snella_app.methods.Method` | `--method NAME` |
| `snella.kernels` | subclass of `snella.kernels.Kernel` | `--method-options.kernel NAME` |
| `snella.data` | function `() -> Collection`, or `(path) -> Collection` | `--data NAME`, or `--data NAME:PATH` |
| `snella.backbones` | `snella_app.backbones.create.NamedBackbone` | `--backbone NAME` |
| `snella.reports` | function `(run folder) -> report path` | `snella inspect RUN --report` for runs of task NAME |
| `snella.choices` | `method`: function `(config, console) -> config` | `--method auto` |
| `snella.estimates` | `step-time`: same signature as `snella_lab.bench.machines.forecast` | times in `snella inspect` |
"""

import functools
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any


def plugin(group: str, name: str, reserved: frozenset[str] = frozenset()) -> Any:
    """Load the object registered as `name` in `snella.{group}`, or return None if no package registers it.

    An entry with a reserved name, or with the name of an earlier entry, is skipped with a warning.

    Raises:
        ImportError: If the module cannot be imported.
        AttributeError: If the module does not define the object.
    """
    entry = _entries(group, reserved).get(name)
    return None if entry is None else entry.load()


@functools.cache
def plugins(group: str, reserved: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Load all objects registered in `snella.{group}`, by name.

    Entries that cannot be imported, or whose name is reserved or taken, are skipped with a warning.
    """
    objects = {}
    for name, entry in _entries(group, reserved).items():
        try:
            objects[name] = entry.load()
        except Exception as error:
            package = _package_name(entry)
            warnings.warn(
                f"{package} registers {name!r} in snella.{group}, but it cannot be imported "
                f"({type(error).__name__}: {error}); update or uninstall {package}",
                stacklevel=2,
            )
    return objects


@functools.cache
def _entries(group: str, reserved: frozenset[str] = frozenset()) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name.

    Entries of this project take precedence. An entry whose name is taken or reserved is skipped with a warning.
    """
    entries: dict[str, EntryPoint] = {}
    installed = entry_points(group=f"snella.{group}")
    for entry in sorted(installed, key=lambda entry: (_package_name(entry) != "snella", entry.name)):
        if entry.name in entries or entry.name in reserved:
            package = _package_name(entry)
            text = f"{package} registers {entry.name!r} in snella.{group}, but the name is taken; ignored"
            warnings.warn(text, stacklevel=3)
        else:
            entries[entry.name] = entry
    return entries


def _package_name(entry: EntryPoint) -> str:
    """Return the name of an entry point's package, or of its module if the package is unknown."""
    return entry.module if entry.dist is None else entry.dist.name
