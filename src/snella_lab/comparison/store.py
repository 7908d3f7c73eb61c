"""Storage of a comparison's rows, and locks that assign each cell to one process.

`results.jsonl` holds one line per cell, appended by any number of processes. Each cell's folder holds a copy of the
row in `cell.json`, written atomically. Each row carries the SHA-256 of its other columns; rows without a hash are not
checked. A valid line takes precedence over the copy, and a damaged or missing row is restored from the other place
with all its columns.

Locks are operating system locks (`filelock`) on files below `locks/`. They are released when the process exits, for
any reason, and have no timeout. They work on one machine; use Ray to share a comparison between machines.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from snella_app.files import SEAL, is_intact, sealed, write_json, write_text
from snella_app.records import CellRow, plain, record_from, write

FILE = "results.jsonl"
LOCKS = "locks"
_WAIT_S = 0.5
"""Timeout for acquiring a lock; longer than `is_locked` holds it."""
_WRITE_WAIT_S = 10.0
_CELL_NAME = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9._+-]+(/(?!\.\.?(/|$))[A-Za-z0-9._+-]+)*")


@contextmanager
def cell_lock(folder: Path, name: str, timeout_s: float = _WAIT_S) -> Iterator[bool]:
    """Try to acquire the lock of a cell.

    Args:
        folder: Folder of all locks; created if missing.
        name: Unique cell name; slashes are replaced.
        timeout_s: Maximum waiting time.

    Yields:
        True if acquired, False if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_file(folder, name))
    try:
        lock.acquire(timeout=timeout_s, poll_interval=0.02)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_locked(folder: Path, name: str) -> bool:
    """Return True if a running process holds the lock of a cell."""
    if not _lock_file(folder, name).exists():
        return False
    with cell_lock(folder, name, timeout_s=0) as is_acquired:
        return not is_acquired


def remove_lock(folder: Path, name: str) -> None:
    """Remove the lock file of a finished cell.

    Safe once the row is stored, because every process reads the row after acquiring the lock.
    """
    _lock_file(folder, name).unlink(missing_ok=True)


def _lock_file(folder: Path, name: str) -> Path:
    """Return the path of a lock file."""
    return folder / (name.replace("/", "!") + ".lock")


def append_row(root: Path, folder: Path, row: CellRow) -> None:
    """Store the row of a cell in its folder and append it to the results file.

    Args:
        root: Folder of the comparison.
        folder: Folder of the cell; created if missing.
        row: Row of the cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(row, folder)
    path = root / FILE
    line = json.dumps(sealed(plain(row)), allow_nan=False) + "\n"
    if path.is_file() and path.stat().st_size and not _ends_with_newline(path):
        line = "\n" + line
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_row(folder: Path) -> CellRow | None:
    """Read the row of one cell; None if it is missing or damaged."""
    columns = _parsed(_text(folder / CellRow.file))
    return _record(columns) if columns is not None and _row_error(columns) is None else None


def read_lines(path: Path) -> tuple[dict[str, CellRow], list[str]]:
    """Read the last row of each cell from a results file, and notes about invalid lines."""
    rows, notes = _columns_of_lines(path)
    return {name: _record(columns) for name, columns in rows.items()}, notes


def _columns_of_lines(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return rows as plain columns, and notes about invalid lines; see `read_lines`."""
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is None:
            error: str | None = "is truncated" if number == len(lines) else "is not a comparison row"
        else:
            error = _row_error(row)
        if row is not None and error is None:
            rows[row["cell"]] = row
        else:
            notes.append(f"{path}, line {number} {error} ({len(line)} characters) and was skipped")
    return rows, notes


def collect(root: Path) -> tuple[dict[str, CellRow], list[str]]:
    """Read and repair all rows.

    A valid line takes precedence over the `cell.json` of its cell. The results file is rewritten if rows are missing,
    duplicate or damaged; a `cell.json` that differs from its line is rewritten.

    Args:
        root: Folder of the comparison.

    Returns:
        Rows by cell name, and notes about repairs.
    """
    rows, notes = _columns_of_lines(root / FILE)
    merged = dict(rows)
    for path in sorted((root / "cells").rglob(CellRow.file)):
        name = path.parent.relative_to(root / "cells").as_posix()
        row = _parsed(_text(path))
        error = "is not a comparison row" if row is None else _row_error(row)
        if row is not None and error is None and row["cell"] != name:
            error = f"holds the row of another cell, {row['cell']!r}"
        if row is not None and error is None and name not in merged:
            merged[name] = row
        elif name in merged and row != merged[name]:
            notes.append(f"{path} {error or f'differs from {FILE}'}; restored from {FILE}")
            write_json(path, merged[name])
        elif error is not None:
            notes.append(f"{path} {error} and was skipped")
    restored = [name for name in merged if name not in rows]
    if notes and restored:
        notes.append(f"{len(restored)} rows restored from cell folders")
    if merged and (notes or merged != rows or _line_count(root / FILE) != len(merged)):
        with cell_lock(root / LOCKS, FILE) as is_acquired:
            if is_acquired:  # else another process is writing it
                _write(root / FILE, merged.values())
    return {name: _record(columns) for name, columns in merged.items()}, notes


def drop_failed(root: Path) -> list[str]:
    """Remove the rows of failed cells, so that they are trained again.

    Args:
        root: Folder of the comparison.

    Returns:
        Names of the failed cells.

    Raises:
        TimeoutError: If another process is writing the results file.
    """
    rows, _ = collect(root)
    failed = [name for name, row in rows.items() if row.status == "failed"]
    if failed:
        with cell_lock(root / LOCKS, FILE, timeout_s=_WRITE_WAIT_S) as is_acquired:
            if not is_acquired:
                raise TimeoutError(
                    f"{root / FILE} has been locked by another process for more than {_WRITE_WAIT_S:g} s; stop that "
                    "process, then start again"
                )
            for name in failed:
                (root / "cells" / name / CellRow.file).unlink(missing_ok=True)
            current, _ = _columns_of_lines(root / FILE)  # includes concurrent additions by other processes
            _write(root / FILE, [row for name, row in current.items() if name not in failed])
    return failed


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows atomically."""
    ordered = sorted(rows, key=lambda row: (row["created_at"], row["cell"]))
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered))


def _parsed(text: str) -> dict[str, Any] | None:
    """Parse the columns of a row from JSON; None if invalid."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    has_all = isinstance(value, dict) and all(key in value for key in ("cell", "status", "purpose", "created_at"))
    return value if has_all else None


def _record(columns: dict[str, Any]) -> CellRow:
    """Convert columns to a row."""
    return record_from(CellRow, CellRow.decoded(columns))


def _row_error(row: dict[str, Any]) -> str | None:
    """Return the error of a row's columns, phrased to follow a file name, or None if valid.

    The cell name becomes a path below the comparison's folder and must not escape it.
    """
    name = row["cell"]
    if not isinstance(name, str) or _CELL_NAME.fullmatch(name) is None:
        return f"has the cell name {name!r}, which must be a relative path such as 'digits/lora-8/seed-0'"
    if not is_intact(row):
        return f"was modified after it was written (the {SEAL} of {name!r} differs)"
    try:
        _record(row)
    except ValueError as error:
        return f"is not a comparison row: {error}"
    return None


def _text(path: Path) -> str:
    """Return the text of a file, empty if missing."""
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""


def _line_count(path: Path) -> int:
    """Return the number of lines in a file."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _ends_with_newline(path: Path) -> bool:
    """Return True if the last line is complete."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
