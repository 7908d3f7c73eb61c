"""`Record`, the base class of dataclasses that are stored as JSON files and validated by pydantic.

Fields are keys of the file. Fields with a default may be missing, and unknown keys are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import BeforeValidator, Strict, ValidationError
from pydantic_core import ErrorDetails

from snella_app.files import is_intact, sealed, write_json
from snella_app.settings import short_repr, type_adapter
from snella_app.text import listed

FORMAT = 1
"""Run folder format that this version of snella writes and reads."""
Float = Annotated[float, Strict(), BeforeValidator(lambda value: math.nan if value is None else value)]
"""Float whose NaN and infinite values are stored as null. When a file is read, null becomes NaN."""

T = TypeVar("T")
R = TypeVar("R", bound="Record")


class Record:
    """Base class of dataclasses that are stored as one JSON file.

    Attributes:
        file: File name in the run folder.
        is_sealed: True if the file stores the SHA-256 of its other entries, which shows whether it was altered.
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
    """Convert a record or a field value to plain JSON values. NaN and infinity become null."""
    if is_dataclass(value) and not isinstance(value, type):
        values = {}
        for field in fields(value):
            entry = plain(getattr(value, field.name))
            if "is_optional" not in field.metadata or entry != plain(field.default):
                values[field.name] = entry
        return value.encoded(values) if isinstance(value, Record) else values
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(record: Record, folder: str | Path) -> Path:
    """Atomically write a record to a run folder and return the path of the file."""
    file = Path(folder) / record.file
    values = plain(record)
    write_json(file, sealed(values) if record.is_sealed else values)
    return file


def read(kind: type[R], folder: str | Path) -> R:
    """Read a record from a run folder.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or has an unknown format, a field is missing or has the wrong type, or
            `check_folder` fails.
    """
    file = Path(folder) / kind.file
    values = kind.decoded(read_object(file))
    try:
        record = record_from(kind, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_hint(file)}") from None
    record.check_folder(Path(folder))
    return record


def read_if_present(kind: type[R], folder: str | Path) -> R | None:
    """Read a record like `read`, or return None if the file does not exist."""
    return read(kind, folder) if (Path(folder) / kind.file).exists() else None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file with one object and check its SHA-256 and format number.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a JSON object, was modified, or has an unknown format.
    """
    if not file.is_file():
        state = "this is not a run folder" if file.parent.is_dir() else "no such folder"
        hint = "pass the folder that `snella train --out` wrote"
        if (file.parent / "run.json").is_file():
            state = "not written yet, or deleted"
            hint = _hint(file)
        raise FileNotFoundError(f"no file {file}: {state}; {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}; {_hint(file)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must contain an object, got {short_repr(values)}; {_hint(file)}")
    if not is_intact(values):
        raise ValueError(f"{file} was altered after it was written: SHA-256 mismatch; {_hint(file)}")
    if values.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{file} has format {values['format']!r}, but this version of snella reads format {FORMAT}; "
            "install the version that wrote it (see 'versions' in run.json)"
        )
    return values


def record_from(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from plain values and check the type of each value.

    Raises:
        ValueError: If a field is missing or has the wrong type, or the dataclass rejects the values.
    """
    try:
        # not `validate_json`, which rejects the surrogates of file names that are not UTF-8
        record: T = type_adapter(cast(Any, kind)).validate_python(values)
    except ValidationError as error:
        errors = map(_describe, error.errors(include_url=False))
        raise ValueError(listed(errors, most=3, separator="; ")) from None
    return record


def _describe(error: ErrorDetails) -> str:
    """Describe a validation error with the path of its field: `'backbone.name' is missing`."""
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"'{path}' is missing"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    requirement = error["msg"].replace("Input should", "must")
    return f"{path!r} {requirement}, got {short_repr(error['input'])}" if path else f"it {requirement}"


def _hint(file: Path) -> str:
    """Return the remedy for an unusable file."""
    if file.name == "comparison.json":
        return f"run `snella demo --overwrite`, or delete {file.name}"
    if file.name in ("generation.json", "language.json"):
        return f"delete {file.name}, and evaluate the run again"
    if file.name == "run.json":
        return "copy the file again, or train again with `--overwrite`"
    return "resume an unfinished run with `--resume`, copy the file again, or train again with `--overwrite`"
