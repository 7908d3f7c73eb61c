"""Column roles of tables, and conversion of table values."""

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snella_app.files import expand_user
from snella_app.text import nearest

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "path": (
        *("path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "imagename", "img", "imgpath"),
        *("images", "files", "picture", "photo"),
    ),
    "label": (
        *("label", "labels", "class", "classname", "labelname", "category", "target", "tags", "species", "cls", "y"),
        *("txt",),
    ),
    "split": ("split", "part", "subset", "partition", "phase"),
    "weight": ("weight", "weights", "sampleweight"),
    "group": (
        *("group", "groups", "groupid", "patient", "patientid", "subject", "subjectid", "site", "siteid"),
        *("video", "videoid", "scene", "sceneid"),
    ),
}
"""Column names by role, most likely first, in lowercase and without spaces, `_`, `-` and `.`."""
_ROOT = "root"
_NONE = "none"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Columns:
    """Column roles of a table, as in `--columns path=file,label=species,group=patient`.

    Attributes:
        names: Column name by role (path, label, split, weight, group). Several label columns are joined by `+`, and
            `none` means no column. A path may be a template, e.g. `train/{id}.jpg`.
        root: Base folder of relative paths, `root=FOLDER`; None uses the folder of the data. Rows of Parquet files and,
            if `root` is set, of Hugging Face datasets may only reference files below this folder.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Columns":
        """Parse `role=name,role=name`.

        Raises:
            ValueError: If a role is unknown or repeated, or an entry is not `role=name`.
        """
        names: dict[str, str] = {}
        roles = (*_SYNONYMS, _ROOT)
        for entry in filter(None, (part.strip() for part in (text or "").split(","))):
            role, sign, name = (part.strip() for part in entry.partition("="))
            if role not in roles or not sign or not name:
                hint = nearest(role, roles) if role not in roles else ""
                raise ValueError(
                    f"columns must be ROLE=NAME pairs such as path=file,label=species with roles {', '.join(roles)}, "
                    f"got {entry!r}{hint}"
                )
            if role in names:
                hint = f"; for several label columns, use label={names[role]}+{name}" if role == "label" else ""
                got = f"{names[role]!r} and {name!r} for {role}"
                raise ValueError(f"columns must name each role once, got {got}{hint}")
            names[role] = name
        root = names.pop(_ROOT, None)
        return cls(names, None if root is None else expand_user(root))

    def resolve(self, table: Mapping[str, Sequence[Any]], needed: Sequence[str], where: str) -> dict[str, str]:
        """Return the column of each role: a column name, a path template, or label columns joined by `+`.

        Roles without a column in `names` get the first matching column that has no other role in `names`.

        Args:
            table: Values by column.
            needed: Required roles.
            where: Name of the table, for messages.

        Raises:
            ValueError: If a named column does not exist or a required role has no column.
        """
        names = list(table)
        # the full name takes precedence over the part after the last dot, and earlier columns over later ones
        by_plain_name = {re.sub(r"[\s_\-.]", "", name.lower().rpartition(".")[2]): name for name in reversed(names)}
        by_plain_name |= {re.sub(r"[\s_\-.]", "", name.lower()): name for name in reversed(names)}
        roles: dict[str, str] = {}
        assigned: set[str] = set()
        for role, named_column in self.names.items():
            if role == "path":
                assigned.add(named_column)
            else:
                assigned.update(columns_in(role, named_column, table))
        errors: list[str] = []
        for role, words in _SYNONYMS.items():
            column = self.names.get(role)
            if column is None:
                matches = (by_plain_name[word] for word in words if word in by_plain_name)
                column = next((match for match in matches if match not in assigned), None)
                if column is not None:
                    roles[role] = column
                elif role in needed:
                    errors.append(f"no {role} column ({role} or a similar name); set it with --columns {role}=NAME")
            elif column != _NONE:
                unknown = [name for name in columns_in(role, column, table) if name not in table]
                for name in unknown:
                    errors.append(f"no column {name!r} for {role}" + nearest(name, table, form=" (nearest: '{}')"))
                if not unknown:
                    roles[role] = column
            elif role in needed:
                errors.append(f"columns must name a column for {role}, got {role}={_NONE}")
        if errors:
            described = ", ".join(_describe_column(name, values) for name, values in table.items())
            raise ValueError(f"{where}: {'; '.join(errors)}. Columns: {described}")
        return roles


def with_absolute_root(text: str) -> str:
    """Make the folder of `root=FOLDER` absolute, so that stored columns do not depend on the current folder."""
    entries = []
    for entry in text.split(","):
        role, sign, name = (part.strip() for part in entry.partition("="))
        is_root = role == _ROOT and name
        entries.append(f"{role}{sign}{expand_user(name).absolute()}" if is_root else entry)
    return ",".join(entries)


def columns_in(role: str, column: str, table: Container[str]) -> list[str]:
    """Return the columns that a role's value in `--columns` references, e.g. both columns of `label=age+height`.

    Column names may themselves contain `+`, so the longest match counts.
    """
    if role == "path" and (names := _PLACEHOLDER.findall(column)):
        return names
    if role != "label":
        return [column]
    parts = column.split("+")
    columns = []
    while parts:
        size = len(parts)
        while size > 1 and "+".join(parts[:size]) not in table:
            size -= 1
        columns.append("+".join(parts[:size]))
        parts = parts[size:]
    return columns


def _describe_column(name: str, values: Sequence[Any]) -> str:
    """Describe a column: its name and up to three examples."""
    examples = dict.fromkeys(format_value(value) for value in values if value is not None and value != "")
    shown: list[str] = []
    for example in list(examples)[:3]:
        text = repr(example)
        shown.append(f"{text[:40]}…" if len(text) > 40 else text)
    return f"{name!r} ({', '.join(shown)})" if shown else repr(name)


def paths_in(table: Mapping[str, Sequence[Any]], column: str) -> list[str]:
    """Return the paths from a column or template, with empty strings for missing values.

    Raises:
        ValueError: If the column contains images instead of paths.
    """
    parts = _PLACEHOLDER.split(column)
    if len(parts) == 1:
        if any(isinstance(value, Mapping | bytes) for value in table[column]):
            raise ValueError(f"column {column!r} must contain paths, got images; load them with hf:FOLDER")
        return [text_of(value) for value in table[column]]
    literals, names = parts[::2], parts[1::2]
    texts_by_column = [list(map(text_of, table[name])) for name in names]
    paths: list[str] = []
    for texts in zip(*texts_by_column, strict=True):
        if not all(texts):
            paths.append("")
            continue
        path = literals[0]
        for text, literal in zip(texts, literals[1:], strict=True):
            path += text + literal
        paths.append(path)
    return paths


def text_of(value: Any) -> str:
    """Convert a value to a string, without the decimal point of integral floats. Missing values become empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def number_of(value: Any) -> float:
    """Convert a value to a number, or to NaN if that is impossible."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def format_value(value: Any) -> str:
    """Format a value for a message, with the entries of a list joined by `|`."""
    return "|".join(map(str, value)) if isinstance(value, list | tuple) else text_of(value)
