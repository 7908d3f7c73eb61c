"""The rows of a comparison on disk, and the locks that give each cell to one process.

`results.jsonl` holds one line a cell, appended as cells finish, by several processes if need be; every cell also keeps
its row as `cell.json` in its folder, written atomically. Each row carries the SHA-256 of its other columns, and a row
without one is not checked. A line takes precedence over the folder's copy, and what is damaged or missing on one
side is restored from the other, with every column that it has.

Locks are those of the operating system, on files below `locks/` (`filelock`): they end with the process that holds
them, whatever ended it, and know no clock. They hold on one machine; several machines share a comparison through Ray.
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
"""How long to ask for a lock; more than `is_locked` takes to look at it."""
_WRITE_WAIT_S = 10.0
_CELL_NAME = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9._+-]+(/(?!\.\.?(/|$))[A-Za-z0-9._+-]+)*")


@contextmanager
def cell_lock(folder: Path, name: str, timeout_s: float = _WAIT_S) -> Iterator[bool]:
    """Hold the lock of a cell, if it is free.

    Args:
        folder: Of all locks; created.
        name: The cell's, unique; slashes are replaced.
        timeout_s: How long to wait for it.

    Yields:
        Whether it was acquired; if not, another process is at work.
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
    """Whether a living process holds the lock of a cell."""
    if not _lock_file(folder, name).exists():
        return False
    with cell_lock(folder, name, timeout_s=0) as is_acquired:
        return not is_acquired


def remove_lock(folder: Path, name: str) -> None:
    """Remove the lock file of a cell that has its row: whoever still acquires it reads the row first."""
    _lock_file(folder, name).unlink(missing_ok=True)


def _lock_file(folder: Path, name: str) -> Path:
    """The file of a lock."""
    return folder / (name.replace("/", "!") + ".lock")


def append_row(root: Path, folder: Path, row: CellRow) -> None:
    """Store the row of a cell, in its folder and at the end of the file.

    Args:
        root: Of the comparison.
        folder: Of the cell; created.
        row: Its row.
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
    """The row of one cell; None where it is not finished or its row is damaged."""
    columns = _parsed(_text(folder / CellRow.file))
    return _record(columns) if columns is not None and _row_error(columns) is None else None


def read_lines(path: Path) -> tuple[dict[str, CellRow], list[str]]:
    """The rows of a results file by cell, the last of each, and notes about lines that are none."""
    rows, notes = _columns_of_lines(path)
    return {name: _record(columns) for name, columns in rows.items()}, notes


def _columns_of_lines(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What `read_lines` returns, with the columns as they stand there."""
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is None:
            error: str | None = "is cut off in mid-line" if number == len(lines) else "is no row of a comparison"
        else:
            error = _row_error(row)
        if row is not None and error is None:
            rows[row["cell"]] = row
        else:
            notes.append(f"{path}, line {number} {error} ({len(line)} characters) and was left out")
    return rows, notes


def collect(root: Path) -> tuple[dict[str, CellRow], list[str]]:
    """All rows by cell, and notes about repairs.

    An intact line takes precedence over the row in its cell's folder. The file is rewritten where it lacks a row, holds
    one twice, or is damaged; a `cell.json` that differs from the line is rewritten from it.

    Args:
        root: Of the comparison.
    """
    rows, notes = _columns_of_lines(root / FILE)
    merged = dict(rows)
    for path in sorted((root / "cells").rglob(CellRow.file)):
        name = path.parent.relative_to(root / "cells").as_posix()
        row = _parsed(_text(path))
        error = "is no row of a comparison" if row is None else _row_error(row)
        if row is not None and error is None and row["cell"] != name:
            error = f"is the row of {row['cell']!r}, another cell"
        if row is not None and error is None and name not in merged:
            merged[name] = row
        elif name in merged and row != merged[name]:
            notes.append(f"{path} {error or 'differs from its line'}; it was restored from {FILE}")
            write_json(path, merged[name])
        elif error is not None:
            notes.append(f"{path} {error} and was left out")
    restored = [name for name in merged if name not in rows]
    if notes and restored:
        notes.append(f"{len(restored)} of the rows were restored from the cells' folders")
    if merged and (notes or merged != rows or _line_count(root / FILE) != len(merged)):
        with cell_lock(root / LOCKS, FILE) as is_acquired:
            if is_acquired:  # else another process is writing it
                _write(root / FILE, merged.values())
    return {name: _record(columns) for name, columns in merged.items()}, notes


def drop_failed(root: Path) -> list[str]:
    """Forget the cells that failed, so that they are trained again.

    Args:
        root: Of the comparison.

    Returns:
        Their names.

    Raises:
        TimeoutError: Another process is writing the file.
    """
    rows, _ = collect(root)
    failed = [name for name, row in rows.items() if row.status == "failed"]
    if failed:
        with cell_lock(root / LOCKS, FILE, timeout_s=_WRITE_WAIT_S) as is_acquired:
            if not is_acquired:
                raise TimeoutError(
                    f"{root / FILE} is being written by another process, for longer than {_WRITE_WAIT_S:g} s; end it, "
                    "then start again"
                )
            for name in failed:
                (root / "cells" / name / CellRow.file).unlink(missing_ok=True)
            kept, _ = _columns_of_lines(root / FILE)  # with what other processes have added meanwhile
            _write(root / FILE, [row for name, row in kept.items() if name not in failed])
    return failed


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows atomically."""
    ordered = sorted(rows, key=lambda row: (row["created_at"], row["cell"]))
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered))


def _parsed(text: str) -> dict[str, Any] | None:
    """The columns of a row out of JSON; None where the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    has_all = isinstance(value, dict) and all(key in value for key in ("cell", "status", "purpose", "created_at"))
    return value if has_all else None


def _record(columns: dict[str, Any]) -> CellRow:
    """The row that columns are."""
    return record_from(CellRow, CellRow.decoded(columns))


def _row_error(row: dict[str, Any]) -> str | None:
    """What is wrong with the columns of a row, to follow its file's name; None if it can be used.

    The name of a cell becomes a path below the comparison's folder, so that it must be one that leads nowhere else.
    """
    name = row["cell"]
    if not isinstance(name, str) or _CELL_NAME.fullmatch(name) is None:
        return f"names the cell {name!r}, which must be a path such as 'digits/lora-8/seed-0' below the comparison"
    if not is_intact(row):
        return f"was changed after it was written (the {SEAL} of {name!r} differs)"
    try:
        _record(row)
    except ValueError as error:
        return f"is no row of a comparison: {error}"
    return None


def _text(path: Path) -> str:
    """A file's text, `""` where there is none."""
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""


def _line_count(path: Path) -> int:
    """Lines of a file."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _ends_with_newline(path: Path) -> bool:
    """Whether the last line is complete."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
