"""Readers of safetensors files, with errors that name the file and the tensor."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

_MAX_HEADER_BYTES = 100_000_000
_SHOWN = 3
REMEDY = "copy the adapter again, or train again with `--overwrite`"
"""What to do about an adapter that is damaged or incomplete; `snella inspect` says the same."""


class AdapterFileError(ValueError):
    """An adapter file is damaged, or belongs to another model."""


class HeaderError(ValueError):
    """What is wrong with a safetensors file, without its name."""


def read_header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in an adapter's safetensors file, without reading them.

    Raises:
        FileNotFoundError: No such file.
        AdapterFileError: The file is cut off (says which tensors are incomplete) or is not a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}; {REMEDY}")
    try:
        return parse_header(path)
    except HeaderError as error:
        raise AdapterFileError(f"{path} is damaged: {error}; {REMEDY}") from None


def parse_header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in an existing safetensors file.

    Raises:
        HeaderError: The file is cut off or of another kind.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise HeaderError(f"a safetensors header of {length} bytes cannot be in a file of {size} bytes")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = {name: 8 + length + int(entry["data_offsets"][1]) for name, entry in tensors.items()}
            shapes = {name: [int(n) for n in entry["shape"]] for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise HeaderError(f"its safetensors header is unreadable ({error})") from None
    cut = [name for name, end in ends.items() if end > size]
    if cut:
        raise HeaderError(f"cut off at {size} of {max(ends.values())} bytes, so {_some(cut)} is incomplete")
    if max(ends.values(), default=8 + length) != size:
        raise HeaderError(f"{size} bytes, its header describes {max(ends.values(), default=8 + length)}")
    return shapes


def check_fits(path: Path, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """Compare the tensors of a file with those that the model needs.

    Args:
        path: The file, for the message.
        found: Shapes in the file, as `read_header` gives them.
        wanted: Shapes that the model needs.

    Raises:
        AdapterFileError: A shape differs, a tensor is missing, or one is left over; all three are reported together.
    """
    errors = [
        f"{name!r} is {found[name]} in the file and {shape} in the model"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if len(errors) > _SHOWN:
        errors = [*errors[:_SHOWN], f"{len(errors) - _SHOWN} more tensors differ in shape"]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing:
        errors.append(f"the file lacks {_some(missing)}")
    if extra:
        errors.append(f"the model lacks {_some(extra)}")
    if errors:
        raise AdapterFileError(f"{path} belongs to another model: {'; '.join(errors)}")


def _some(names: list[str]) -> str:
    """The first names, and how many there are besides."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Say of an error inside that the stored choice does not fit the model.

    Raises:
        AdapterFileError: A layer is missing, is of another kind or has fewer weights.
    """
    try:
        yield
    except (AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise AdapterFileError(
            f"the adapter does not fit {type(model).__name__}: {error}; load it into the architecture it was trained on"
        ) from error
