"""A short name for the content of an adapter."""

import hashlib
from pathlib import Path


def adapter_digest(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of an adapter's weights; results that name it belong to these weights.

    Args:
        folder: `RUN/adapter`.
    """
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
