"""`results.jsonl`: one line a cell, appended as cells finish, by several processes if need be.

Every cell also keeps its row as `cell.json` in its folder, written whole or not at all; the file of all rows is mended
from these, and rows whose folder is gone are kept.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snella.comparison.locks import cell_lock
from snella.training.atomic_files import write_json, write_text

FILE = "results.jsonl"
CELL_FILE = "cell.json"


def append_row(root: Path, folder: Path, row: dict[str, Any]) -> None:
    """Store the row of a cell, in its folder and at the end of the file.

    Args:
        root: Of the comparison.
        folder: Of the cell; created.
        row: Its row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CELL_FILE, row)
    path = root / FILE
    line = json.dumps(row, allow_nan=False) + "\n"
    if path.is_file() and path.stat().st_size and not _ends_with_newline(path):
        line = "\n" + line
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_row(folder: Path) -> dict[str, Any] | None:
    """The row of one cell; None where it is not finished."""
    try:
        row = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return row if _is_row(row) else None


def read_lines(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The rows of a results file by cell, the last of each, and notes about lines that are none."""
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    content = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    lines = content.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if _is_row(row):
            rows[row["cell"]] = row
        else:
            cut = "cut off in mid-line" if number == len(lines) else "no row of a comparison"
            notes.append(f"{path}, line {number} is {cut} ({len(line)} characters) and was left out")
    return rows, notes


def collect(root: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All rows there are, by cell, and notes about what was mended.

    The rows of the cells' folders go before those of the file; the file is written anew where it lacks one, holds one
    twice, or is damaged.
    """
    rows, notes = read_lines(root / FILE)
    found = [read_row(path.parent) for path in sorted((root / "cells").rglob(CELL_FILE))]
    merged = rows | {row["cell"]: row for row in found if row is not None}
    restored = [name for name in merged if name not in rows]
    if notes and restored:
        notes.append(f"{len(restored)} of the rows were restored from the cells' folders")
    if merged and (notes or merged != rows or _line_count(root / FILE) != len(merged)):
        with cell_lock(root / "locks", FILE) as is_ours:
            if is_ours:  # else another process is writing it
                _write(root / FILE, merged.values())
    return merged, notes


def drop_failed(root: Path) -> list[str]:
    """Forget the cells that failed, so that they are trained again; their names."""
    rows, _ = collect(root)
    failed = [name for name, row in rows.items() if row["status"] == "failed"]
    for name in failed:
        (root / "cells" / name / CELL_FILE).unlink(missing_ok=True)
    if failed:
        _write(root / FILE, [row for name, row in rows.items() if name not in failed])
    return failed


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    ordered = sorted(rows, key=lambda row: (row["created_at"], row["cell"]))
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered))


def _is_row(value: Any) -> bool:
    """Whether a value has what every row has."""
    return isinstance(value, dict) and all(key in value for key in ("cell", "status", "purpose", "created_at"))


def _line_count(path: Path) -> int:
    """Lines of a file."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _ends_with_newline(path: Path) -> bool:
    """Whether the last line is complete."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
