"""Storage of a comparison's rows, and locks that assign each cell to one process.

A cell is one run of the comparison, and its row contains the settings and results. `results.jsonl` contains one line
per cell, appended by any number of processes. Each cell's folder contains a copy of the row in `cell.json`, written
atomically. Rows are written with the SHA-256 of their columns; rows without this hash are not checked. A valid line
takes precedence over the copy. A damaged or missing line is restored from the copy, and a damaged copy from the line.

Locks are operating-system locks (`filelock`) on files below `locks/`. They do not expire and are released when the
process exits. They work on a single machine; on a cluster, the Ray driver or the parts of the Slurm job assign the
cells.
"""

import io
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock, Timeout

from snella_app.console import counted
from snella_app.files import SEAL, is_intact, sealed, write_json, write_text
from snella_app.records.record import plain, record_from, write
from snella_lab.comparison.experiment import DataEntry, MethodEntry, folder_name
from snella_lab.comparison.rows import CellRow

FILE = "results.jsonl"
LOCKS = "locks"
_WAIT_S = 0.5
"""Timeout for acquiring a lock, longer than `is_locked` holds one."""
_WRITE_WAIT_S = 10.0
"""Timeout for locking the results file to remove rows."""
_CELL_NAME = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9._+-]+(/(?!\.\.?(/|$))[A-Za-z0-9._+-]+)*")
"""Valid cell names: relative paths of folders, which must not leave the folder of the comparison."""


@contextmanager
def cell_lock(folder: Path, name: str, timeout_s: float = _WAIT_S) -> Iterator[bool]:
    """Try to acquire the lock of a cell, and release it at the end of the context.

    Args:
        folder: Folder of all locks, which is created if missing.
        name: Unique cell name. Slashes are replaced in the file name.
        timeout_s: Maximum waiting time in seconds. -1 waits until the lock is free.

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

    This is safe once the row is stored, because every process reads the row after acquiring the lock.
    """
    _lock_file(folder, name).unlink(missing_ok=True)


def _lock_file(folder: Path, name: str) -> Path:
    """Return the path of a lock file."""
    return folder / (name.replace("/", "!") + ".lock")


def append_row(root: Path, folder: Path, row: CellRow) -> None:
    """Store the row of a cell in its folder, which is created if missing, and append it to the results file."""
    folder.mkdir(parents=True, exist_ok=True)
    write(row, folder)
    path = root / FILE
    line = json.dumps(sealed(plain(row)), allow_nan=False) + "\n"
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line  # ends a truncated line
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_row(folder: Path) -> CellRow | None:
    """Read the row of one cell, or return None if it is missing or damaged."""
    row, _ = _checked(_parsed(_text(folder / CellRow.file)), {})
    return row


def read_lines(path: Path) -> tuple[dict[str, CellRow], list[str]]:
    """Read the last valid row of each cell from a results file, plain or compressed (`.xz`).

    Returns:
        The rows by cell name, and notes about invalid lines.
    """
    with _open(path) as file:
        lines, notes = _read_lines(file, path)
    return {name: line.row for name, line in lines.items()}, notes


@dataclass(frozen=True)
class _Line:
    """A valid line of the results file: its offset and size in bytes, and its row."""

    start: int
    size: int
    row: CellRow


def _open(path: Path) -> BinaryIO:
    """Open a results file, plain or compressed (`.xz`), for reading. A missing file is treated as empty."""
    if not path.is_file():
        return io.BytesIO()
    return cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _read_lines(file: BinaryIO, path: Path, is_brief: bool = False) -> tuple[dict[str, _Line], list[str]]:
    """Read the last valid line of each cell, and return the lines by cell name with notes about invalid lines.

    If `is_brief`, the rows contain no `train_config`, which saves memory.
    """
    lines: dict[str, _Line] = {}
    notes: list[str] = []
    pool: dict[str, Any] = {}
    start = 0
    for number, line in enumerate(file, start=1):
        text = line.decode("utf-8", "replace").removesuffix("\n")
        if text.strip():
            columns = _parsed(text)
            row, error = _checked(columns, pool)
            if columns is None and not line.endswith(b"\n"):
                error = "is truncated"
            if row is None:
                notes.append(f"{path}, line {number} {error} ({len(text)} characters) and was skipped")
            else:
                row = replace(row, train_config={}) if is_brief else row
                lines[row.cell] = _Line(start, len(line), row)
        start += len(line)
    return lines, notes


def collect(root: Path) -> tuple[dict[str, CellRow], list[str]]:
    """Read all rows and repair damaged files.

    A valid line takes precedence over the `cell.json` of its cell. The results file is rewritten if rows are missing,
    duplicated, or damaged, unless another process is writing it. A `cell.json` that differs from its line is rewritten.

    Returns:
        The rows by cell name, without `train_config` to save memory, and notes about damaged files.
    """
    path = root / FILE
    with _open(path) as file:
        lines, notes = _read_lines(file, path, is_brief=True)
        rows = {name: line.row for name, line in lines.items()}
        restored: dict[str, dict[str, Any]] = {}
        pool: dict[str, Any] = {}
        for copy in _copies(root / "cells"):
            name = copy.parent.relative_to(root / "cells").as_posix()
            columns = _parsed(_text(copy))
            if name in lines:
                stored = _columns_of(file, lines[name])
                if columns == stored:
                    continue
            row, error = _checked(columns, pool)
            if row is not None and row.cell != name:
                error = f"contains the row of another cell, {row.cell!r}"
            if name in lines:
                notes.append(f"{copy} {error or f'differs from {FILE}'}; restored from {FILE}")
                write_json(copy, stored)
            elif error is not None:
                notes.append(f"{copy} {error} and was skipped")
            elif row is not None and columns is not None:
                rows[name] = replace(row, train_config={})
                restored[name] = columns
        if notes and restored:
            notes.append(f"{counted(len(restored), 'row')} restored from cell folders")
        line_count = path.read_bytes().count(b"\n") if path.is_file() else 0
        if rows and (notes or restored or line_count != len(rows)):
            with cell_lock(root / LOCKS, FILE) as is_acquired:
                if is_acquired:  # otherwise another process is writing the file
                    with _open(path) as current:  # it may contain rows that other processes have added since
                        latest, _ = _read_lines(current, path, is_brief=True)
                        remaining = [_columns_of(current, line) for line in latest.values()]
                    remaining += [columns for name, columns in restored.items() if name not in latest]
                    _write(path, remaining)
    return rows, notes


def _copies(cells: Path) -> Iterator[Path]:
    """Yield the `cell.json` of each cell in alphabetical order, without descending into the run folders."""
    for folder, folders, files in os.walk(cells):
        if CellRow.file in files:
            folders.clear()
            yield Path(folder, CellRow.file)
        folders.sort()


def _columns_of(file: Any, line: _Line) -> dict[str, Any]:
    """Read the columns of a valid line from the file."""
    file.seek(line.start)
    columns: dict[str, Any] = json.loads(file.read(line.size))
    return columns


def read_part(root: Path, pairs: Iterable[tuple[DataEntry, MethodEntry]]) -> dict[str, CellRow]:
    """Read the rows of the given pairs of task and method from their folders, without repairing files."""
    folders = {root / "cells" / folder_name(data.name) / folder_name(method.name) for data, method in pairs}
    rows = (read_row(copy.parent) for folder in sorted(folders) for copy in _copies(folder))
    return {row.cell: row for row in rows if row is not None}


def drop_failed(root: Path) -> list[str]:
    """Remove the rows of failed cells, so that the cells are trained again, and return the names of these cells.

    If a method has a successful final run on a task, its tuning runs on this task are not repeated, and the rows of
    those that diverged are kept.

    Raises:
        TimeoutError: If another process is writing the results file.
    """
    rows, _ = collect(root)
    tuned: set[tuple[str, str]] = set()
    for row in rows.values():
        if row.purpose == "final" and row.status == "success":
            tuned.add((row.task_name, row.experiment_name))
    failed: set[str] = set()
    for name, row in rows.items():
        is_needed = not row.is_diverged_trial or (row.task_name, row.experiment_name) not in tuned
        if row.status == "failed" and is_needed:
            failed.add(name)
    if failed:
        with cell_lock(root / LOCKS, FILE, timeout_s=_WRITE_WAIT_S) as is_acquired:
            if not is_acquired:
                raise TimeoutError(
                    f"another process has locked {root / FILE} for more than {_WRITE_WAIT_S:g} s; stop it and try again"
                )
            for name in failed:
                (root / "cells" / name / CellRow.file).unlink(missing_ok=True)
            with _open(root / FILE) as file:
                lines, _ = _read_lines(file, root / FILE)  # includes rows added by other processes
                remaining = [_columns_of(file, line) for name, line in lines.items() if name not in failed]
            _write(root / FILE, remaining)
    return sorted(failed)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows to a results file atomically, sorted by date and cell."""
    ordered = sorted(rows, key=lambda row: (row["created_at"], row["cell"]))
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered))


def _parsed(text: str) -> dict[str, Any] | None:
    """Parse the columns of a row from JSON, or return None if the text is not a row."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(value, dict) and all(key in value for key in ("cell", "status", "purpose", "created_at"))
    return value if is_row else None


def _checked(columns: dict[str, Any] | None, pool: dict[str, Any]) -> tuple[CellRow | None, str | None]:
    """Convert parsed columns to a row, or return an error that continues a sentence about the line or file.

    `pool` contains the values that the row shares with earlier rows.
    """
    if columns is None:
        return None, "is not a comparison row"
    name = columns["cell"]
    if not isinstance(name, str) or _CELL_NAME.fullmatch(name) is None:
        return None, f"has the cell name {name!r}, which must be a relative path such as 'digits/lora-8/seed-0'"
    if not is_intact(columns):
        return None, f"was modified after it was written (the {SEAL} of {name!r} differs)"
    try:
        return _shared(record_from(CellRow, CellRow.decoded(columns)), pool), None
    except ValueError as error:
        return None, f"is not a comparison row: {error}"


_REPEATED = ("package_info", "system_info", "search")
_REPEATED_RESULTS = ("peft_config", "sizes", "split")
_REPEATED_STRINGS = ("task_name", "group", "experiment_name", "comparison", "method", "model_id", "created_at")


def _shared(row: CellRow, pool: dict[str, Any]) -> CellRow:
    """Replace values that repeat in other rows with the objects in `pool`, to save memory."""

    def share(value: Any) -> Any:
        return value if value is None else pool.setdefault(repr(value), value)

    results = row.results
    if results is not None:
        results = replace(results, **{name: share(getattr(results, name)) for name in _REPEATED_RESULTS})
    names = (*_REPEATED, *_REPEATED_STRINGS)
    return replace(row, results=results, **{name: share(getattr(row, name)) for name in names})


def _text(path: Path) -> str:
    """Return the text of a file, which is empty if the file is missing."""
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
