"""Local files and folders of a run's pre-trained weights: their absolute paths and digests."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

from snella_app.backbones.create import SAM_PREFIX, as_path
from snella_app.files import current_path, expand_user, sha256_of
from snella_app.records.run import BackboneInfo


def with_local_files(backbone: BackboneInfo) -> BackboneInfo:
    """Return a copy with the absolute paths of local weights, and the SHA-256 of those that are files."""
    paths: dict[str, Path] = {}
    for name in ("name", "weights"):
        _, path = _split(name, getattr(backbone, name))
        if path is not None and path.exists():
            paths[name] = path.resolve()
    if not paths:
        return backbone
    digests = {name: _digest(path) for name, path in paths.items() if path.is_file()}
    return dataclasses.replace(backbone, paths={name: str(path) for name, path in paths.items()}, digests=digests)


def located(backbone: BackboneInfo) -> BackboneInfo:
    """Return a copy with the current paths of local weights (see `current_path`).

    Raises:
        ValueError: If a file has changed since it was used for training.
    """
    current: dict[str, Any] = {}
    for name, absolute in (backbone.paths or {}).items():
        value = getattr(backbone, name)
        prefix, path = _split(name, value)
        if path is None:  # the path was replaced by a model name
            continue
        file = current_path(path, absolute)
        digest = (backbone.digests or {}).get(name)
        if digest is not None and file.is_file() and _digest(file) != digest:
            raise ValueError(
                f"the pre-trained weights of the run have changed: {file} differs from the file used for training; "
                "restore it, or train again"
            )
        current[name] = value if file is path else f"{prefix}{file}"
    return dataclasses.replace(backbone, **current)


def _split(name: str, value: str | None) -> tuple[str, Path | None]:
    """Split the value of a field of `BackboneInfo` into a prefix and a path, which is None for a model name."""
    if value is None:
        return "", None
    if name == "weights":
        return "", expand_user(value)
    prefix = SAM_PREFIX if value.startswith(SAM_PREFIX) else ""
    return prefix, expand_user(value.removeprefix(prefix)) if prefix else as_path(value, must_exist=False)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is read again only if its size or modification time has changed."""
    status = path.stat()
    return _cached_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _cached_digest(path: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file of this size and modification time."""
    return sha256_of(path)
