"""Images to predict: files, folders, patterns, tables, standard input, watched folders, PIL images, arrays, tensors."""

import difflib
import glob
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors

from snella_app.data import read_image, split_spec
from snella_app.data.folder import listed
from snella_app.data.images import DECODING_ERRORS, IMAGE_SUFFIXES, RGB, Reading, decode_image, is_image, to_channels
from snella_app.data.table import TABLE_SUFFIXES, Columns, table_paths

__all__ = ["ImageInput", "expand", "near_name", "new_files", "read_input", "separate"]

ImageInput = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""One image: a file, its bytes, a PIL image, `[height, width]` or `[height, width, 1, 3 or 4]` as an array, or
`[height, width]` or `[1, 3 or 4, height, width]` as a tensor; values 0 to 255 (uint8) or 0 to 1 (floating point)."""

_STANDARD_INPUT = "-"
_PICTURES = (1, 3, 4)
"""Numbers of channels that PIL images have."""
_PATTERN = "*?["
_POLL_S = 0.5


def separate(
    images: Any, columns: str | None = None, own: str | None = None, *, keep_missing: bool = False
) -> tuple[list[ImageInput], bool]:
    """The images one by one, and whether it is just one that was given.

    Args:
        images: An image, or several: a folder, a pattern or a table of files, a batch as an array or a tensor of four
            dimensions, or a list or another iterable of all these.
        columns: As for `expand`.
        own: As for `expand`.
        keep_missing: As for `expand`.

    Raises:
        FileNotFoundError: A file that is not there (near names are given), or a folder without images.
        ValueError: None at all.
        TypeError: Something that is no image.
    """
    if isinstance(images, str | Path):
        files = expand([images], columns, own, keep_missing=keep_missing)
        return list(files), len(files) == 1 and Path(images) == files[0]
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images), False
    if isinstance(images, bytes | Image.Image | np.ndarray | Tensor):
        return [images], True
    if not isinstance(images, Iterable):
        raise TypeError(
            "images must be files, PIL images, arrays or tensors, one or several of them, got "
            f"{type(images).__name__} {images!r}"
        )
    single: list[ImageInput] = []
    for image in images:
        if isinstance(image, str | Path):
            single += expand([image], columns, own, keep_missing=keep_missing)
        else:
            single.append(image)
    if not single:
        raise ValueError("images must name at least one file or folder, got none")
    return single, False


def expand(
    images: Iterable[str | Path], columns: str | None = None, own: str | None = None, *, keep_missing: bool = False
) -> list[Path]:
    """The files that some words stand for.

    Args:
        images: Files as they are; folders for the images in them, at any depth; patterns such as `photos/**/*.jpg`;
            tables (CSV, TSV, Parquet; `csv:FILE`, `parquet:FILE`) with a column of paths; `-` for standard input, a
            path a line.
        columns: Column of the paths in a table, `path=file`; if not given, the usual names, then `own`.
        own: The columns that the run's own table had.
        keep_missing: Whether files that a table or a list on standard input names and that are not there stay, to be
            left out with the broken ones.

    Raises:
        FileNotFoundError: A path does not exist (near names are given), or a folder holds no images.
        ValueError: No words, or a table without a column of paths.
    """
    paths: list[Path] = []
    named = list if keep_missing else _all_there
    for word in images:
        prefix, rest = split_spec(str(word))
        is_table = prefix in ("csv:", "parquet:") and bool(rest)
        image = Path(rest if is_table and rest else word)
        if str(word) == _STANDARD_INPUT:
            paths += named(Path(line) for line in sys.stdin.read().splitlines() if line.strip())
        elif is_table or (image.suffix.lower() in TABLE_SUFFIXES and image.is_file()):
            paths += named(_paths_in_table(image, columns, own))
        elif image.is_dir():
            inside = _images_in(image)
            if not inside:
                raise FileNotFoundError(
                    f"the folder {image} holds no images; known endings are {', '.join(sorted(IMAGE_SUFFIXES))}"
                )
            paths += inside
        elif not image.exists() and any(sign in str(word) for sign in _PATTERN):
            matches = sorted(Path(match) for match in glob.glob(str(Path(word).expanduser()), recursive=True))
            paths += _existing(match for match in matches if match.is_file() and is_image(match)) or _existing([image])
        else:
            paths += _existing([image])
    if not paths:
        raise ValueError("images must name at least one file or folder, got none")
    return paths


def read_input(image: Any, name: str, reading: Reading = RGB) -> Any:
    """One image, upright, as `read_image` gives it: 8-bit RGB, gray or RGBA, or an array of other channels.

    Args:
        image: See `ImageInput`.
        name: For messages.
        reading: What the model takes.

    Raises:
        ValueError: A file that is no image, an array of another shape or type, values outside their range.
        TypeError: Something that is no image.
    """
    if isinstance(image, str | Path):
        return read_image(image, reading)
    if isinstance(image, bytes):
        return decode_image(io.BytesIO(image), name, reading)
    if isinstance(image, Image.Image) and reading.channels in _PICTURES:
        try:
            image.load()
            return to_channels(ImageOps.exif_transpose(image), reading)
        except DECODING_ERRORS as error:
            raise ValueError(f"{name!r} is not a readable image: {error or type(error).__name__}") from error
    if isinstance(image, np.ndarray | Tensor):
        return _from_array(image, name, reading.channels)
    pictures = "PIL images, " if reading.channels in _PICTURES else ""
    raise TypeError(f"images must be files, {pictures}arrays or tensors, got {type(image).__name__} as {name}")


def new_files(folders: Sequence[Path], known: Iterable[Path], poll_s: float = _POLL_S) -> Iterator[list[Path]]:
    """Images that appear in folders, in the order of their names, as soon as they have stopped growing; never ends.

    Files are compared at intervals, which works on network drives too. A file counts as whole when its size and its
    time are those of the look before.

    Args:
        folders: Watched at any depth.
        known: Images that are not new.
        poll_s: Seconds between two looks.

    Yields:
        New images, possibly none.
    """
    seen = {path.resolve() for path in known}
    growing: dict[Path, tuple[int, int]] = {}
    while True:
        whole, before = [], growing
        growing = {}
        for path in (path for folder in folders for path in _images_in(folder) if path.resolve() not in seen):
            try:
                state = path.stat()
            except OSError:  # gone again
                continue
            growing[path] = (state.st_size, state.st_mtime_ns)
            if before.get(path) == growing[path] and state.st_size:
                whole.append(path)
        seen.update(path.resolve() for path in whole)
        yield whole
        time.sleep(poll_s)


def near_name(missing: Path) -> str:
    """Why there may be no such file: a pattern without a match, a missing folder, a mistyped name."""
    if any(sign in missing.name for sign in _PATTERN):
        return f"; no file in {missing.parent} matches the pattern, or give the folder itself"
    if not missing.parent.is_dir():
        return f"; there is no folder {missing.parent}"
    near = difflib.get_close_matches(missing.name, sorted(child.name for child in missing.parent.iterdir()), n=1)
    return f"; nearest there: {near[0]!r}" if near else f"; {missing.parent} has no similar name"


def _images_in(folder: Path) -> list[Path]:
    """The images of a folder, at any depth, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path))


def _paths_in_table(table: Path, columns: str | None, own: str | None) -> list[Path]:
    """The images that a table names, by the given column, the usual names, or the column that the run had."""
    if columns is not None:
        return table_paths(table, Columns.parse(columns))
    try:
        return table_paths(table, Columns())
    except ValueError:
        path = Columns.parse(own).names.get("path")
        if path is None:
            raise
        return table_paths(table, Columns({"path": path}))


def _existing(paths: Iterable[Path]) -> list[Path]:
    """The same paths, all of which are there."""
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no image {path}{near_name(path)}")
        found.append(path)
    return found


def _all_there(paths: Iterable[Path]) -> list[Path]:
    """The paths of a table or a list, all of which are there."""
    found = list(paths)
    missing = [path for path in found if not path.exists()]
    if not missing:
        return found
    few = f"no image {missing[0]}{near_name(missing[0])}"
    many = f"{len(missing):,} of {len(found):,} images are not there: {listed([str(path) for path in missing])}"
    raise FileNotFoundError(
        f"{few if len(missing) == 1 else many}; fix the list, or pass --skip-corrupt (skip_corrupt=True), which "
        "leaves out what is missing or broken"
    )


def _from_array(image: np.ndarray | Tensor, name: str, channels: int) -> Any:
    """An image from an array with the channels last, or a tensor with the channels first."""
    shape = list(image.shape)
    if isinstance(image, Tensor):
        moved = image.detach().cpu()
        moved = moved.float() if moved.is_floating_point() else moved
        values = (moved.movedim(0, -1) if moved.ndim == 3 else moved).numpy()
    else:
        values = image
    allowed = _PICTURES if channels in _PICTURES else (channels,)
    given = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or given not in allowed or 0 in values.shape:
        words = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}" if len(allowed) > 1 else str(channels)
        raise ValueError(
            f"an image must have the shape [height, width] or [height, width, {words}] as an array, [height, width] "
            f"or [{words}, height, width] as a tensor, got {shape} as {name}"
        )
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"floating-point images must have values from 0 to 1, got {low:g} to {high:g} as {name}; give the "
                "image before it is normalized, or 0 to 255 as uint8"
            )
    elif values.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 or floating point, got {values.dtype} as {name}")
    if channels not in _PICTURES:
        array = values if values.dtype == np.uint8 else values.astype(np.float32)
        return tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0))))
    pixels = values if values.dtype == np.uint8 else (values * 255).round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.ndim == 3 and given == 1 else pixels
    return to_channels(Image.fromarray(np.ascontiguousarray(pixels)), Reading(channels))
