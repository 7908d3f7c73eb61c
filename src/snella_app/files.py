"""Atomic file writes, SHA-256 digests, and sealed JSON objects, which contain their own digest."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from PIL.Image import Image

SEAL = "sha256"
"""Key of the digest in a sealed JSON object."""
WRITE_FAILURES = {
    "No space left": errno.ENOSPC,
    "File too large": errno.EFBIG,
    "PytorchStreamWriter": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,
    "iostream": errno.ENOSPC,
}
"""Substrings of library errors that indicate a failed write, with their errno."""
_MAX_NAME_BYTES = 200
"""Maximum length of a file name that is repeated in the names of its temporary files. Longer names are hashed, because
the temporary names would otherwise exceed the limit of the file system."""


@contextmanager
def annotate_write_errors(path: Path) -> Iterator[None]:
    """Add the file name to write errors, e.g. on a full disk.

    Library errors whose message contains a substring from `WRITE_FAILURES` are re-raised as OSError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        error_code = next((code for text, code in WRITE_FAILURES.items() if text in str(error)), None)
        if error_code is None:
            raise
        raise OSError(error_code, os.strerror(error_code), str(path)) from error


@contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its parents unless they exist.

    If the context fails, new folders that are empty are removed.

    Raises:
        OSError: If the folder cannot be created, or a write in the context fails.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with annotate_write_errors(folder):
            yield
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise


def expand_user(path: str | Path) -> Path:
    """Replace a leading `~` or `~USER` with the home folder. The path of an unknown user is unchanged."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError for unknown users


def current_path(path: Path, absolute: str | None) -> Path:
    """Return the current path of a file or folder that was stored as typed and as an absolute path.

    This is the absolute path, unless both refer to the same file or the absolute path is missing.
    """
    if absolute is None or not os.path.exists(absolute) or (path.exists() and str(path.resolve()) == absolute):
        return path
    return Path(absolute)


def check_new(name: str, path: str | Path, *, overwrite: bool, is_folder: bool = False) -> None:
    """Check that an output does not exist or may be replaced.

    Args:
        name: Argument that names the output.
        path: Output file or folder.
        overwrite: Accept an existing output of the same kind.
        is_folder: True if the output is a folder.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is not set, or a file would replace a folder or vice versa.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != is_folder:
        old, new = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise FileExistsError(f"{name}={path} is a {old}, which cannot be replaced by a {new}; choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{name}={path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )


def write_text(path: Path, text: str) -> None:
    """Write text atomically. Surrogate escapes, from file names that are not UTF-8, become the original bytes."""
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: sync a temporary file in the same folder, then rename it.

    Several processes may write the same file. Leftover temporary files of killed processes are removed.

    Raises:
        OSError: If the disk is full or not writable. In this case, the old file is unchanged.
    """
    name = _short_name(path)
    # identifies the process, so that `_remove_leftovers` can check whether it is still running
    process = f"{_machine()}-{os.getpid()}"
    temporary = path.with_name(f".{name}.{process}-{secrets.token_hex(4)}.tmp")
    with annotate_write_errors(path):
        _remove_leftovers(path)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """Return a short ID of this machine, which distinguishes equal process IDs on different machines."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _short_name(path: Path) -> str:
    """Return the file name, or its hash if it is longer than `_MAX_NAME_BYTES`."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= _MAX_NAME_BYTES else hashlib.sha256(name).hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` left by terminated processes on this machine."""
    for leftover in path.parent.glob(f".{glob.escape(_short_name(path))}.{_machine()}-*-*.tmp"):
        pid = leftover.name.rsplit("-", 2)[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            leftover.unlink(missing_ok=True)


def write_png(path: Path, image: Image, **options: Any) -> None:
    """Write a Pillow image as PNG, atomically. Options are as for `Image.save`."""
    content = io.BytesIO()
    image.save(content, "PNG", **options)
    write_bytes(path, content.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; raise ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything below it to disk."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Sync a file, or the entries of a folder (e.g. after a rename), to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Verify the SHA-256 of files, given by name relative to a folder. Missing files are ignored.

    Raises:
        ValueError: If digests differ. The message lists all changed files.
    """
    present = ((name, digest) for name, digest in digests.items() if (folder / name).is_file())
    changed = [name for name, digest in present if sha256_of(folder / name) != digest]
    if changed:
        raise ValueError(
            f"{folder} is damaged: {', '.join(changed)} changed after the run wrote it (SHA-256 differs from "
            "run.json); copy it again, or train again with `--overwrite`"
        )


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the additional entry `sha256`, the digest of all other entries."""
    return {**values, SEAL: _digest(values)}


def is_intact(values: Any) -> bool:
    """Return whether a sealed JSON object is unchanged. A value without a seal counts as unchanged."""
    return not isinstance(values, Mapping) or SEAL not in values or values[SEAL] == _digest(values)


def _digest(values: Mapping[str, Any]) -> str:
    """Return the digest of all entries except the seal, independent of their order."""
    # converted as by writing and reading the file, which turns all keys into strings
    stored = json.loads(json.dumps({name: value for name, value in values.items() if name != SEAL}))
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
