"""A cell belongs to one process at a time, and to another one soon after that process died.

A lock is a row of files `NAME.0`, `NAME.1`, …, each created whole and at once (a hard link, which fails if the name
exists). The highest number is the owner. Where it is dead, or has let go, the next number may be created, which one
contender alone can do; so two that find the same dead owner cannot both follow it, and nothing has to be deleted to
take over. On its own machine an owner is alive while its process is; elsewhere while it touches its file.
"""

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HEARTBEAT_S = 5.0
"""How often an owner touches its file."""
STALE_S = 60.0
"""After so long without a touch, an owner on another machine counts as dead."""


@contextmanager
def cell_lock(folder: Path, name: str, heartbeat_s: float = HEARTBEAT_S) -> Iterator[bool]:
    """Hold the lock of a cell, if it is free.

    Args:
        folder: Of all locks; created.
        name: The cell's, unique; slashes are replaced.
        heartbeat_s: How often to touch the file.

    Yields:
        Whether the lock is ours; if not, another process is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _acquire(folder, name.replace("/", "!"))
    if path is None:
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, done, heartbeat_s), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        _write(path, {**_identity(), "is_released": True})


def is_locked(folder: Path, name: str) -> bool:
    """Whether a living process holds the lock of a cell."""
    highest = _highest(folder, name.replace("/", "!"))
    return highest is not None and _is_held(highest[1])


def remove_locks(folder: Path, name: str) -> None:
    """Remove the files of a cell that is finished, which no contender asks for any more."""
    for _, path in _generations(folder, name.replace("/", "!")):
        path.unlink(missing_ok=True)


def _acquire(folder: Path, name: str) -> Path | None:
    """Become the owner; None where someone else is."""
    highest = _highest(folder, name)
    if highest is not None and _is_held(highest[1]):
        return None
    path = folder / f"{name}.{0 if highest is None else highest[0] + 1}"
    temporary = folder / f".{uuid.uuid4().hex}"
    temporary.write_text(json.dumps(_identity()))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return None
    finally:
        temporary.unlink()
    return path


def _generations(folder: Path, name: str) -> list[tuple[int, Path]]:
    """All files of one lock with their numbers, ascending."""
    found = []
    for path in folder.glob("*"):
        stem, _, number = path.name.rpartition(".")
        if stem == name and number.isdigit():
            found.append((int(number), path))
    return sorted(found)


def _highest(folder: Path, name: str) -> tuple[int, Path] | None:
    """The file of the present owner."""
    found = _generations(folder, name)
    return found[-1] if found else None


def _is_held(path: Path) -> bool:
    """Whether the owner in this file is alive and has not let go."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    if owner.get("is_released"):
        return False
    if owner.get("host") == socket.gethostname():
        return _is_running(owner)
    return _age_s(path) < STALE_S


def _is_running(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is the one that has its number now."""
    try:
        process = psutil.Process(owner["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1.0
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _age_s(path: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system that both owners share."""
    probe = path.with_name(f".{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return float("inf")
    finally:
        probe.unlink()


def _identity() -> dict[str, Any]:
    """Who we are."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _write(path: Path, owner: dict[str, Any]) -> None:
    """Change the content of our own file, whole or not at all."""
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(owner))
    temporary.replace(path)


def _beat(path: Path, done: threading.Event, every_s: float) -> None:
    """Touch the file until the work is done."""
    while not done.wait(every_s):
        try:
            os.utime(path)
        except OSError:
            return
