"""Typed access to the fields of one JSON file, with errors that name the file, the field and the way out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from snella._files import is_intact

T = TypeVar("T")

FORMAT = 1
"""The run-folder format that this version of snella writes and reads."""

_NAMES: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}
_MISSING = object()


class Fields:
    """The fields of one JSON object, each read with the type it must have.

    Args:
        file: File that the object came from, for messages.
        values: The object itself.
        where: Path of the object inside the file, such as `history[3]`.
    """

    def __init__(self, file: Path, values: Any, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{file}: {where or 'the file'} must hold a mapping, got {_shown(values)}; {_way_out(file)}"
            )
        self.file = file
        self.values = values
        self.where = where

    def get(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        """Return field `key` as a `kind`; a whole number passes as a float.

        Args:
            key: Name of the field.
            kind: `str`, `int`, `float`, `list` or `dict`.
            default: Returned where the field is absent or null; without one, absence is an error.

        Raises:
            ValueError: The field is absent and has no default, or is of another kind.
        """
        value = self.values.get(key)
        if value is None:
            if default is not _MISSING:
                return default
            near = difflib.get_close_matches(key, [str(name) for name in self.values], n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(f"{self.file}: {self._path(key)} is missing{hint}; {_way_out(self.file)}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)  # type: ignore[return-value]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{self.file}: {self._path(key)} must be {_NAMES[kind]}, got {_shown(value)}; {_way_out(self.file)}"
            )
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """Return field `key`, which must be one of `allowed`.

        Raises:
            ValueError: It is none of them.
        """
        value = self.get(key, str)
        if value not in allowed:
            raise ValueError(
                f"{self.file}: {self._path(key)} must be one of {', '.join(map(repr, allowed))}, "
                f"got {value!r}; {_way_out(self.file)}"
            )
        return value

    def inner(self, key: str) -> Fields:
        """Return the mapping at `key` as fields of their own."""
        return Fields(self.file, self.get(key, dict), self._path(key, quoted=False))

    def each(self, key: str, default: Any = _MISSING) -> list[Fields]:
        """Return the list of mappings at `key`, each as fields of its own."""
        path = self._path(key, quoted=False)
        return [Fields(self.file, item, f"{path}[{i}]") for i, item in enumerate(self.get(key, list, default))]

    def numbers(self, key: str, kind: type[T], default: Any = _MISSING) -> dict[str, T]:
        """Return the mapping of names to numbers at `key`; `default` stands for a null (JSON has no NaN)."""
        inner = Fields(self.file, self.get(key, dict), self._path(key, quoted=False))
        return {str(name): inner.get(name, kind, default) for name in inner.values}

    def _path(self, key: str, quoted: bool = True) -> str:
        """Where `key` is inside the file."""
        path = f"{self.where}.{key}" if self.where else key
        return f"'{path}'" if quoted else path


def read_fields(file: Path) -> Fields:
    """Read a JSON file that holds one object, and check its format number.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, not an object, or of a format that this version does not know.
    """
    if not file.is_file():
        folder = file.parent
        state = "the folder is not a run of snella" if folder.is_dir() else "there is no such folder"
        if (folder / "run.json").is_file():
            state = "the run did not get that far or the file was removed"
        hint = "give the folder that `snella train --out` wrote" if file.name == "run.json" else _way_out(file)
        raise FileNotFoundError(f"{file} is missing: {state}; {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: byte {error.start} is not UTF-8 text; {_way_out(file)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged: {error.msg} in line {error.lineno}, column {error.colno}; {_way_out(file)}"
        ) from error
    if not is_intact(values):
        raise ValueError(f"{file} was altered after it was written: its SHA-256 is another; {_way_out(file)}")
    fields = Fields(file, values)
    number = values.get("format", FORMAT)
    if number != FORMAT:
        raise ValueError(
            f"{file} has format {number!r}, this version of snella reads format {FORMAT}; "
            "install the version that wrote it (named under 'versions' in run.json)"
        )
    return fields


def _way_out(file: Path) -> str:
    """What to do about a file that cannot be used."""
    if file.name == "comparison.json":
        return f"run `snella compare` again or delete {file.name}"
    if file.name == "run.json":
        return "copy the file again, or train again with `--overwrite`"
    return f"go on with `snella train --resume --out {file.parent}`, or train again with `--overwrite`"


def _shown(value: Any) -> str:
    """A value with its kind, short enough for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
