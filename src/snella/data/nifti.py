"""NIfTI-1 volumes of bytes, as anatomical templates are stored."""

import gzip
import zlib
from pathlib import Path

import numpy as np

__all__ = ["read_nifti"]

_HEADER_BYTES = 348
_FIRST_VOXEL = 352
_UINT8 = 2


def read_nifti(path: Path) -> np.ndarray:
    """Read a compressed single-file NIfTI-1 volume of unsigned bytes, without its scaling and its place in space.

    Args:
        path: `.nii.gz`.

    Returns:
        `[x, y, z]`, uint8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    if len(content) < _FIRST_VOXEL or content[344:347] != b"n+1":
        raise ValueError(f"'{path}' is no NIfTI-1 file: it must have {_FIRST_VOXEL} bytes of header and begin so")
    order = "<" if int.from_bytes(content[:4], "little") == _HEADER_BYTES else ">"
    dimensions = np.frombuffer(content, f"{order}i2", 8, 40).tolist()
    kind = int(np.frombuffer(content, f"{order}i2", 1, 70)[0])
    shape = tuple(dimensions[1 : 1 + dimensions[0]])
    if dimensions[0] != 3 or kind != _UINT8:
        raise ValueError(f"'{path}' must hold a volume of bytes, got shape {list(shape)} and data type {kind}")
    start = max(int(np.frombuffer(content, f"{order}f4", 1, 108)[0]), _FIRST_VOXEL)
    if len(content) - start < np.prod(shape):
        raise ValueError(f"'{path}' is damaged: {list(shape)} announced, {len(content) - start} bytes there")
    return np.frombuffer(content, np.uint8, int(np.prod(shape)), start).reshape(shape, order="F")
