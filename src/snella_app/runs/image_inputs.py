"""Inputs for prediction: files, folders, patterns, tables, standard input, PIL images, arrays, and tensors.

A `Reading` specifies how the images of a model are decoded: the number of channels, the 16-bit value that maps to
white, and the resolution.
"""

import glob
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors

from snella_app.data.columns import Columns
from snella_app.data.folder import walk_visible
from snella_app.data.images import (
    DECODING_ERRORS,
    IMAGE_SUFFIXES,
    PILLOW_MODES,
    RGB,
    Reading,
    array_tensor,
    decode_image,
    eight_bits,
    is_image,
    read_image,
    to_channels,
)
from snella_app.data.load import split_spec
from snella_app.data.table import TABLE_SUFFIXES, table_paths
from snella_app.files import expand_user
from snella_app.text import listed, similar_paths

ImageInput = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""One image: a file, its bytes, a PIL image, an array `[height, width]` or `[height, width, channels]`, or a tensor
`[height, width]` or `[channels, height, width]`. Values are 0 to 255 (uint8), 0 to the run's white value (uint16;
65,535 by default), or 0 to 1 (floating point). Models with 1, 3, or 4 channels accept any of these channel counts.
Other models require their own count and reject PIL images."""

_PATTERN_CHARS = "*?["
_POLL_S = 0.5  # seconds between polls of watched folders


def split_inputs(
    images: Any, columns: str | None = None, run_columns: str | None = None, *, keep_missing: bool = False
) -> tuple[list[ImageInput], bool]:
    """Split inputs into single images.

    `images` is one image, or several: a folder, a pattern, a table of files, a batch as a 4-dim array or tensor, or an
    iterable of images, folders, patterns, and tables. The other arguments are as for `expand`.

    Returns:
        List of images, and True if the input was a single image.

    Raises:
        FileNotFoundError: If a file does not exist, or a folder has no images. The message suggests similar names.
        ValueError: If there are no images, a table has no column of paths, or `columns` is set without a table.
        TypeError: If `images` is neither an image nor an iterable.
    """
    if isinstance(images, str | Path):
        check_columns(columns, [images])
        files = expand([images], columns, run_columns, keep_missing=keep_missing)
        is_single = files == [expand_user(images)]  # folders, patterns, and tables expand to different paths
        return list(files), is_single
    is_batch = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    if isinstance(images, bytes | Image.Image | np.ndarray | Tensor) and not is_batch:
        check_columns(columns, ())
        return [images], True
    if not isinstance(images, Iterable):
        raise TypeError(
            f"images must be one or more files, PIL images, arrays or tensors, got {type(images).__name__} {images!r}"
        )
    if columns is not None:
        images = list(images)
        check_columns(columns, images)
    inputs: list[ImageInput] = []
    for image in images:
        is_path = isinstance(image, str | Path)
        inputs += expand([image], columns, run_columns, keep_missing=keep_missing) if is_path else [image]
    if not inputs:
        raise ValueError("images must name at least one file or folder, got none")
    return inputs, False


def expand(
    images: Iterable[str | Path],
    columns: str | None = None,
    run_columns: str | None = None,
    *,
    keep_missing: bool = False,
) -> list[Path]:
    """Expand file, folder, pattern, and table arguments into image files.

    Args:
        images: Files; folders, which are searched recursively, except for hidden files and folders; patterns such as
            `photos/**/*.jpg`; tables (CSV, TSV, Parquet; `csv:FILE`, `parquet:FILE`) with a column of paths; `-` for
            standard input, which lists one image file per line.
        columns: Path column of a table, e.g. `path=file`. None tries the usual names of this column, then
            `run_columns`.
        run_columns: Columns of the run's table.
        keep_missing: Keep missing files that a table or standard input lists, so that the caller can skip them.

    Raises:
        FileNotFoundError: If a path does not exist, a folder has no images, or a pattern matches none. The message
            suggests similar names.
        ValueError: If `images` is empty, or a table has no column of paths.
        ImportError: If pyarrow is required but not installed.
    """
    paths: list[Path] = []
    check_listed = list if keep_missing else _require_all
    for entry in images:
        prefix, rest = split_spec(str(entry))
        table = rest if prefix in ("csv:", "parquet:") else None
        if not str(entry).strip():
            raise ValueError(f"images must name a file or folder, got {str(entry)!r}")
        image = expand_user(table or entry)
        if str(entry) == "-":
            paths += check_listed(Path(line) for line in _input_lines() if line.strip())
        elif _is_table(entry):
            kind = prefix.rstrip(":") if table else None
            paths += check_listed(_paths_in_table(image, kind, columns, run_columns))
        elif image.is_dir():
            images_in_folder = _images_in(image)
            if not images_in_folder:
                raise FileNotFoundError(
                    f"the folder {image} has no images; supported suffixes are {', '.join(sorted(IMAGE_SUFFIXES))}"
                )
            paths += images_in_folder
        elif image.exists():
            paths.append(image)
        else:
            matches = sorted(Path(match) for match in glob.glob(str(image), recursive=True))
            matching = [match for match in matches if match.is_file() and is_image(match)]
            if not matching:
                raise FileNotFoundError(f"no image {image}{missing_path_hint(image)}")
            paths += matching
    if not paths:
        raise ValueError("images must name at least one file or folder, got none")
    return paths


def check_columns(columns: str | None, images: Iterable[Any]) -> None:
    """Raise `ValueError` if `columns` is set and none of the images is a table."""
    if columns is not None and not any(isinstance(image, str | Path) and _is_table(image) for image in images):
        raise ValueError(
            f"columns applies only to tables such as photos.csv, got columns={columns!r} without a table; leave it out"
        )


def _is_table(entry: str | Path) -> bool:
    """Return whether an entry names a table of images."""
    if split_spec(str(entry))[0] in ("csv:", "parquet:"):
        return True
    path = expand_user(entry)
    return path.suffix.lower() in TABLE_SUFFIXES and path.is_file()


def read_input(image: Any, name: str, reading: Reading = RGB) -> Any:
    """Read one image like `read_image`, applying EXIF orientation.

    Args:
        image: See `ImageInput`.
        name: Name for error messages.
        reading: Decoding options of the model.

    Returns:
        8-bit PIL image in RGB, gray, or RGBA, or a tensor for other channel counts.

    Raises:
        ValueError: If a file is not an image, or an array has a wrong shape, type, or value range.
        TypeError: If the input has an unsupported type.
    """
    if isinstance(image, str | Path):
        return read_image(image, reading)
    if isinstance(image, bytes):
        return decode_image(io.BytesIO(image), name, reading)
    if isinstance(image, Image.Image) and reading.channels in PILLOW_MODES:
        try:
            image.load()
            return to_channels(ImageOps.exif_transpose(image), reading)
        except DECODING_ERRORS as error:
            raise ValueError(f"{name!r} is not a readable image: {error or type(error).__name__}") from error
    if isinstance(image, np.ndarray | Tensor):
        return _from_array(image, name, reading)
    pil_text = "PIL images, " if reading.channels in PILLOW_MODES else ""
    raise TypeError(f"images must be files, bytes, {pil_text}arrays or tensors, got {type(image).__name__} for {name}")


def new_files(folders: Sequence[Path], done: Set[Path]) -> Iterator[list[Path]]:
    """Watch folders for new images indefinitely.

    Folders are polled, because polling also works on network drives. A nonempty file is complete once its size and
    modification time are unchanged between two polls. An image is yielded again if it changes before it is done, for
    example because it was not yet complete.

    Args:
        folders: Folders to watch, recursively.
        done: Resolved paths of images that are not new. The caller may add images at any time.

    Yields:
        New images after each poll, sorted by path within each folder. The list is empty if there are none.
    """
    yielded: dict[Path, tuple[int, int]] = {}
    states: dict[Path, tuple[int, int]] = {}
    while True:
        complete = []
        previous_states = states
        states = {}
        for path in (path for folder in folders for path in _images_in(folder)):
            if path.resolve() in done:
                continue
            try:
                stat = path.stat()
            except OSError:  # the file was deleted
                continue
            states[path] = (stat.st_size, stat.st_mtime_ns)
            is_complete = previous_states.get(path) == states[path] and stat.st_size
            resolved = path.resolve()
            if is_complete and yielded.get(resolved) != states[path]:
                complete.append(path)
                yielded[resolved] = states[path]
        yield complete
        time.sleep(_POLL_S)


def missing_path_hint(missing: Path, *, may_be_pattern: bool = True) -> str:
    """Return a hint for a missing path: a pattern without a match, a missing folder, or a similar name."""
    text = missing.name if missing.parent.is_dir() else str(missing)
    if may_be_pattern and any(char in text for char in _PATTERN_CHARS):
        return "; no image file matches the pattern; fix it, or pass the folder"
    folder = "the current folder" if missing.parent == Path() else missing.parent
    return similar_paths(missing, most=1) or f"; {folder} has no similar name"


def _input_lines() -> list[str]:
    """Return the lines of standard input, with surrogates in place of undecodable bytes, as in file names."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin.read().split("\n")  # `splitlines` would also split at characters that file names can contain


def _images_in(folder: Path) -> list[Path]:
    """Return the images in a folder and its visible subfolders, sorted. Links to folders elsewhere are followed."""
    return sorted(path for path in walk_visible(folder, root=folder) if path.is_file() and is_image(path))


def _paths_in_table(table: Path, kind: str | None, columns: str | None, run_columns: str | None) -> list[Path]:
    """Return the images listed in a table. `columns` names their column; None tries usual names, then `run_columns`."""
    if columns is not None:
        return table_paths(table, Columns.parse(columns), kind)
    try:
        return table_paths(table, Columns(), kind)
    except ValueError:
        parsed = Columns.parse(run_columns)
        path = parsed.names.get("path")
        if path is None:  # the run names no path column either, so the first error applies
            raise
        return table_paths(table, Columns({"path": path}, parsed.root), kind)


def _require_all(paths: Iterable[Path]) -> list[Path]:
    """Return the paths of a table or list; raise one FileNotFoundError for all missing files."""
    all_paths = list(paths)
    missing = [path for path in all_paths if not path.exists()]
    if not missing:
        return all_paths
    problem = f"no image {missing[0]}{missing_path_hint(missing[0])}"
    if len(missing) > 1:
        names = listed([str(path) for path in missing])
        problem = f"{len(missing):,} of {len(all_paths):,} images are missing: {names}"
    raise FileNotFoundError(
        f"{problem}; fix the list, or skip missing and corrupt images with --skip-corrupt (skip_corrupt=True)"
    )


def _from_array(image: np.ndarray | Tensor, name: str, reading: Reading) -> Any:
    """Convert a channels-last array or a channels-first tensor to an image with the channels of `reading`."""
    channels = reading.channels
    shape = list(image.shape)
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        values = (tensor.movedim(0, -1) if tensor.ndim == 3 else tensor).numpy()
    else:
        values = image.astype(image.dtype.newbyteorder("="), copy=False)
    # Pillow converts between 1, 3, and 4 channels
    allowed_channels = tuple(PILLOW_MODES) if channels in PILLOW_MODES else (channels,)
    num_channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or num_channels not in allowed_channels or 0 in values.shape:
        counts = str(channels)
        if len(allowed_channels) > 1:
            all_but_last = ", ".join(map(str, allowed_channels[:-1]))
            counts = f"{all_but_last} or {allowed_channels[-1]}"
        gray = "[height, width] or " if 1 in allowed_channels else ""
        raise ValueError(
            f"an image must have the shape {gray}[height, width, {counts}] as an array, {gray}[{counts}, height, "
            f"width] as a tensor, got {shape} for {name}"
        )
    if values.dtype.kind == "f":
        low = float(values.min())
        high = float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # also for NaN
            raise ValueError(
                f"floating-point images must have values from 0 to 1, got {low:g} to {high:g} for {name}; pass the "
                "image before normalization, or 0 to 255 as uint8"
            )
    elif values.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"an image must be uint8, uint16, or floating point from 0 to 1, got {values.dtype} for {name}"
        )
    if channels not in PILLOW_MODES:
        return tv_tensors.Image(array_tensor(np.moveaxis(values, -1, 0), reading.white))
    if values.dtype == np.uint16:
        values = eight_bits(values, reading.white)
    pixels = values if values.dtype == np.uint8 else (values * 255).round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.ndim == 3 and num_channels == 1 else pixels
    return to_channels(Image.fromarray(np.ascontiguousarray(pixels)), Reading(channels))
