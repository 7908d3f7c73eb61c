"""Atomic writing and SHA-256 digests of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Name a file in the errors of writing it, such as a full disk, where the system or a library names none.

    Args:
        path: The file that is written inside.

    Raises:
        OSError: Writing failed.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = next((number for sign, number in WRITE_FAILURES.items() if sign in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


WRITE_FAILURES = {
    "No space left": errno.ENOSPC,
    "File too large": errno.EFBIG,
    "PytorchStreamWriter": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,
    "iostream": errno.ENOSPC,
}
"""Substrings of library errors that mean a failed write, with their errno."""


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; remove those that were made and are empty where what is done inside fails.

    Args:
        folder: The folder; may exist.

    Raises:
        OSError: It cannot be made, or writing inside failed; names a file or the folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with naming_file(folder):
            yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write text as `write_bytes` does; names of files that are not UTF-8 keep their bytes."""
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, sync, rename.

    Raises:
        OSError: The disk is full or not writable; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming_file(path):
        try:
            if temporary.is_symlink():
                temporary.unlink()
            with open(temporary, "wb", opener=_open_no_link) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _open_no_link(path: str, flags: int) -> int:
    """Open a file that is no link, so that nothing else is written over."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_text` does; numbers that JSON lacks (NaN) are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Force the files of a folder, and the folder itself, onto the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (a rename) onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SEAL = "sha256"
"""The entry of a sealed JSON object that holds the digest of all its others."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Refuse files that are not what was written; missing ones pass, whoever needs them says so.

    Args:
        folder: Where they lie.
        digests: SHA-256 by name, relative to `folder`.

    Raises:
        ValueError: A file's digest is not the stated one; all such files are named.
    """
    present = ((name, digest) for name, digest in digests.items() if (folder / name).is_file())
    altered = [name for name, digest in present if sha256_of(folder / name) != digest]
    if altered:
        raise ValueError(
            f"{folder}: {', '.join(altered)}: damaged: altered after it was written (SHA-256 is not the one in "
            "run.json); copy it again, or train again with `--overwrite`"
        )


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 digest of all its other entries as entry `sha256`."""
    return {**{name: value for name, value in values.items() if name != SEAL}, SEAL: _digest(values)}


def is_intact(values: Any) -> bool:
    """Whether a JSON object holds what it held when it was sealed; True for one that was not."""
    return not isinstance(values, Mapping) or values.get(SEAL, _digest(values)) == _digest(values)


def _digest(values: Mapping[str, Any]) -> str:
    """Digest of the entries but the seal, in whatever order they stand."""
    # read back first, as keys become texts
    plain = json.loads(json.dumps({name: value for name, value in values.items() if name != SEAL}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
