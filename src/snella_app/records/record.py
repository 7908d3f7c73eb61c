"""`Record`: dataclasses stored as JSON files.

Fields are keys of the file. Fields with a default may be missing or null; unknown keys are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from snella_app.files import is_intact, sealed, write_json
from snella_app.text import nearest

FORMAT = 1
"""Run folder format that this version of snella writes and reads."""

T = TypeVar("T")
R = TypeVar("R", bound="Record")


class Record:
    """Base class of dataclasses that are stored as one JSON file.

    Attributes:
        file: File name in the run folder.
        is_sealed: If True, the file stores the SHA-256 of its other entries.
    """

    file: ClassVar[str]
    is_sealed: ClassVar[bool] = False

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Map the entries of a file to field names."""
        return values

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Map field values to the entries of the file."""
        return values

    def check_folder(self, folder: Path) -> None:
        """Raise ValueError if other files in the folder contradict this record."""


OPTIONAL = {"is_optional": True}
"""Metadata of a field that is omitted from the file at its default value."""


def plain(value: Any) -> Any:
    """Convert a record or a field value to plain JSON values; NaN becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        values = {
            f.name: plain(getattr(value, f.name))
            for f in fields(value)
            if not (f.metadata.get("is_optional") and _is_same(getattr(value, f.name), f.default))
        }
        return value.encoded(values) if isinstance(value, Record) else values
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(record: Record, folder: str | Path) -> Path:
    """Atomically write a record to a run folder and return the file."""
    file = Path(folder) / record.file
    values = plain(record)
    write_json(file, sealed(values) if record.is_sealed else values)
    return file


def read(kind: type[R], folder: str | Path) -> R:
    """Read a record from a run folder.

    Args:
        kind: Record class.
        folder: Run folder.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or has an unknown format, a field is missing or has the wrong type, or
            `check_folder` fails.
    """
    file = Path(folder) / kind.file
    record = record_from(kind, kind.decoded(read_object(file)), file)
    record.check_folder(Path(folder))
    return record


def read_if_present(kind: type[R], folder: str | Path) -> R | None:
    """Read a record like `read`; return None if the file does not exist."""
    return read(kind, folder) if (Path(folder) / kind.file).exists() else None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file with one object and check its SHA-256 and format number.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a JSON object, was modified, or has an unknown format.
    """
    if not file.is_file():
        folder, hint = file.parent, _hint(file)
        if (folder / "run.json").is_file():
            state = "not written yet, or deleted"
        elif folder.is_dir():
            state, hint = "this is not a run folder", "pass the folder that `snella train --out` wrote"
        else:
            state, hint = "no such folder", "pass the folder that `snella train --out` wrote"
        raise FileNotFoundError(f"no file {file}: {state}; {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: byte {error.start} is not UTF-8; {_hint(file)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged: {error.msg} in line {error.lineno}, column {error.colno}; {_hint(file)}"
        ) from error
    except RecursionError:
        raise ValueError(f"{file} is damaged: nested too deeply; {_hint(file)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: the file must contain a mapping, got {_format_value(values)}; {_hint(file)}")
    if not is_intact(values):
        raise ValueError(f"{file} was altered after it was written: SHA-256 mismatch; {_hint(file)}")
    if values.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{file} has format {values['format']!r}, this version of snella reads format {FORMAT}; "
            "install the version that wrote it (see 'versions' in run.json)"
        )
    return values


def record_from(kind: type[T], values: Any, file: Path | None = None, where: str = "") -> T:
    """Build a dataclass from plain values, and check each value's type.

    Args:
        kind: Dataclass.
        values: Mapping; unknown keys are ignored.
        file: Source of the values, for error messages.
        where: Path of the mapping inside the file, e.g. `history[3]`.

    Raises:
        ValueError: If `values` is not a mapping, a field is missing or has the wrong type, or the dataclass rejects
            the values.
    """
    if not isinstance(values, Mapping):
        raise _error(file, f"{_quote(where)} must be a mapping, got {_format_value(values)}")
    hints = _hints(kind)  # type: ignore[arg-type]
    arguments = {}
    for f in fields(kind):  # type: ignore[arg-type]
        value, path = values.get(f.name), f"{where}.{f.name}" if where else f.name
        has_default = f.default is not MISSING or f.default_factory is not MISSING
        if value is None and has_default and not (f.name in values and _accepts_none(hints[f.name])):
            continue
        if value is None and not _accepts_none(hints[f.name]):
            near = nearest(f.name, map(str, values), form=" (nearest: '{}')")
            raise _error(file, f"{_quote(path)} is missing{near}")
        arguments[f.name] = _convert(hints[f.name], value, file, path)
    try:
        return kind(**arguments)
    except ValueError as error:
        raise _error(file, f"{where}: {error}" if where else str(error)) from None


def _convert(kind: Any, value: Any, file: Path | None, where: str) -> Any:
    """Convert a value of a file to a field type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        options = [option for option in inner if option is not NoneType]
        if value is None and len(options) < len(inner):
            return None
        return _convert(_best_match(options, value), value, file, where)
    if is_dataclass(kind):
        return record_from(kind, value, file, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in inner:
            raise _error(file, f"{_quote(where)} must be one of {', '.join(map(repr, inner))}, got {value!r}")
        return value
    if origin in (list, tuple):
        items = _check_type(list, value, file, where)
        converted = [_convert(inner[0], item, file, f"{where}[{i}]") for i, item in enumerate(items)]
        return tuple(converted) if origin is tuple else converted
    if origin is dict:
        entries = _check_type(dict, value, file, where)
        return {str(key): _convert(inner[1], item, file, f"{where}.{key}") for key, item in entries.items()}
    if kind is float and value is None:
        return math.nan  # JSON stores NaN in lists and mappings as null
    return _check_type(kind, value, file, where)


_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def _check_type(kind: type, value: Any, file: Path | None, where: str) -> Any:
    """Check that a value has a plain type; integers are accepted as floats."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _error(file, f"{_quote(where)} must be {_NAMES[kind]}, got {_format_value(value)}")
    return value


def _best_match(options: list[Any], value: Any) -> Any:
    """Return the first type with the most required fields in the value."""

    def count(option: Any) -> int:
        if not is_dataclass(option) or not isinstance(value, Mapping):
            return 0
        return sum(f.name in value for f in fields(option) if f.default is MISSING and f.default_factory is MISSING)

    return max(options, key=count)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the field types of a dataclass."""
    return get_type_hints(kind)


def _accepts_none(kind: Any) -> bool:
    """Return whether a field of this type accepts None."""
    return kind is Any or NoneType in get_args(kind)


def _is_same(value: Any, default: Any) -> bool:
    """Return whether a value equals the default, treating NaN as equal to NaN."""
    pair = (value, default)
    return value is default or value == default or all(isinstance(v, float) and math.isnan(v) for v in pair)


def _quote(where: str) -> str:
    """Quote a path inside a file."""
    return f"'{where}'" if where else "the file"


def _error(file: Path | None, message: str) -> ValueError:
    """Return an error with the file and a remedy."""
    return ValueError(message if file is None else f"{file}: {message}; {_hint(file)}")


def _hint(file: Path) -> str:
    """Return the remedy for an unusable file."""
    if file.name == "comparison.json":
        return f"run `snella compare` again or delete {file.name}"
    if file.name == "run.json":
        return "copy the file again, or train again with `--overwrite`"
    return f"resume with `snella train --resume --out {file.parent}`, or train again with `--overwrite`"


def _format_value(value: Any) -> str:
    """Format a value and its type for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
