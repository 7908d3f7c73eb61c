"""CSV and Parquet tables of images."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snella_app.data.collection import Samples, build_collection
from snella_app.data.columns import Columns, paths_in
from snella_app.data.datasets import Collection
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import FileImages
from snella_app.files import expand_user
from snella_app.text import first_line, listed, similar_paths

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


def load_table(path: str, config: DataConfig, target: TargetKind, *, kind: str) -> Collection:
    """Load the images listed in a table.

    `kind` is csv or parquet. A CSV file has a header and is separated by commas, semicolons or tabs. Paths are relative
    to the table's folder or to `root=FOLDER`.
    """
    table, file = read_table(path, kind)
    where = f"{kind}:{path}"
    columns = Columns.parse(config.columns)
    roles = columns.resolve(table, ("path", "label"), where)
    try:
        names = paths_in(table, roles["path"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    root = columns.root or file.parent
    source = FileImages([_located(root, name) for name in names], config.reading)
    samples = Samples(file.stem, where, source, names, table, roles)
    for row, image in enumerate(source.paths):
        reason = outside_reason(image, [root]) if kind == "parquet" and names[row] else ""
        if not names[row]:
            reason = "no path"
        elif not reason and not os.path.isfile(image):  # False for names that are too long
            reason = "no such file"
        if reason:
            samples.broken[row] = reason
    return build_collection(samples, config, target)


def read_table(path: str, kind: str) -> tuple[dict[str, list[Any]], Path]:
    """Return the columns of a table and its absolute path.

    Args:
        path: Path as typed.
        kind: csv (strings separated by tabs, `;` or `,`) or parquet.

    Raises:
        FileNotFoundError: If the file does not exist or is not a regular file. The message suggests similar names.
        ValueError: If the file is not a table, is empty, or has duplicate columns or rows of unequal length.
        ImportError: If pyarrow is required but not installed.
    """
    file = expand_user(path)
    if not path.strip() or not os.path.isfile(file):  # False for a path that is too long
        hint = (
            similar_paths(file, cutoff=0.4, suffixes=TABLE_SUFFIXES)
            or f"; write {kind}:FILE, e.g. {kind}:photos/labels.{kind}"
        )
        got = "does not exist"
        if path.strip() and os.path.exists(file):
            got = "is a folder" if file.is_dir() else "is not a regular file"
        raise FileNotFoundError(f"data must name a table, got {kind}:{path}, which {got}{hint}")
    file = file.absolute()
    table = _read_parquet(file) if kind == "parquet" else _read_csv(file)
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"{kind}:{path} must have one row per image, got an empty table")
    return table, file


def outside_reason(path: Path, roots: Sequence[Path]) -> str:
    """Return why a row may not reference a file, or an empty string if it is below a root. Links are resolved."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # e.g. a link cycle or a NUL byte
        return f"no such file: {error}"
    if any(resolved.is_relative_to(root.resolve()) for root in roots):
        return ""
    return f"{str(resolved)!r} is outside {str(roots[0])!r}; allow a different folder with --columns root=FOLDER"


def table_paths(path: str | Path, columns: Columns, kind: str | None = None) -> list[Path]:
    """Return the image files listed in a table, in order. Rows without a path are left out.

    Args:
        path: CSV or Parquet file. A relative path gives relative image paths.
        columns: Column roles.
        kind: csv or parquet, or None to decide by the suffix.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If `read_table` rejects the table, the path column is missing, or a Parquet file lists an image
            outside its folder or `columns.root`.
        ImportError: If pyarrow is required but not installed.
    """
    kind = kind or ("parquet" if Path(path).suffix.lower() == ".parquet" else "csv")
    table, _ = read_table(str(path), kind)
    roles = columns.resolve(table, ("path",), str(path))
    folder = columns.root or expand_user(path).parent
    paths = [_located(folder, name) for name in paths_in(table, roles["path"]) if name]
    reasons = (outside_reason(image, [folder]) for image in paths) if kind == "parquet" else ()
    if reason := next(filter(None, reasons), None):
        raise ValueError(f"{path} must list images below its folder: {reason}")
    return paths


def _located(folder: Path, name: str) -> Path:
    r"""Return the path of an image; Windows separators (`a\b.png`) are replaced if there is no file of that name."""
    path = folder / name
    if "\\" in name and not os.path.isfile(path):
        other = folder / name.replace("\\", "/")
        return other if os.path.isfile(other) else path
    return path


def _read_csv(file: Path) -> dict[str, list[Any]]:
    """Read the columns of a CSV file as strings."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header = next((line for line in lines if line.strip("\r\n")), "")
            lines.seek(0)
            delimiter = max("\t;,", key=header.count)
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{file}' must be a CSV file in UTF-8: {error}; save it as CSV (UTF-8)") from error
    names, *rows = rows or [[]]
    names = [name.strip() for name in names]
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise ValueError(
            f"'{file}' must have unique column names, got duplicates of {listed([repr(name) for name in duplicates])}"
        )
    invalid = [f"row {number} has {len(row)}" for number, row in enumerate(rows, 1) if len(row) != len(names)]
    if invalid:
        raise ValueError(
            f"'{file}' must have {len(names)} values per line, one for each of {listed(names)}, but "
            f"{listed(invalid)}; quote values that contain {delimiter!r}"
        )
    columns: dict[str, list[Any]] = {}
    for index, name in enumerate(names):
        columns[name] = [row[index].strip() for row in rows]
    return columns


def _read_parquet(file: Path) -> dict[str, list[Any]]:
    """Read the columns of a Parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"'{file}' needs pyarrow; pip install 'snella[data]'") from error
    try:
        table: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: timestamps out of range
        raise ValueError(f"'{file}' must be a Parquet file: {first_line(error)}") from error
    return table
