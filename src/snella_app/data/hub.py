"""Hugging Face datasets (`hf:`), WebDataset shards (`wds:`), and dataset objects in Python.

A shard is a tar file with images and their labels.
"""

import glob
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset
from torchvision.transforms.functional import to_pil_image

from snella_app.data.collection import Samples, build_collection
from snella_app.data.columns import Columns
from snella_app.data.datasets import Collection
from snella_app.data.folder import PARTS
from snella_app.data.images import (
    DECODING_ERRORS,
    PILLOW_MODES,
    ImageMetadata,
    Reading,
    check_regular,
    decode_image,
    inspect_image,
    to_channels,
)
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import CachedImages
from snella_app.data.table import outside_reason
from snella_app.files import expand_user
from snella_app.text import first_line, listed, similar_paths

PYTHON_PREFIX = "python:"
"""Prefix under which a run records a dataset object, which cannot be loaded by name."""
_IMAGE = "<image>"
"""Placeholder for each image in a dataset's table, because images are not read into memory."""
_KEY = "__key__"
_URL = "__url__"
"""Columns that `datasets` adds to the samples of a shard: the name of the sample, and the path of the shard."""


def load_hf(path: str, config: DataConfig, target: TargetKind) -> Collection:
    """Load the images of a Hugging Face dataset.

    `path` is a folder written by `save_to_disk`, a folder of images with `metadata.csv`, a folder of Parquet files,
    or a Hub name `owner/name` or `owner/name:configuration`. The path column defaults to the first image column.

    Raises:
        FileNotFoundError: If the dataset does not exist.
        ConnectionError: If the Hub is unreachable and the dataset is not cached.
        ValueError: If the path is empty, the data cannot be read, there are several splits but no train split, a column
            does not contain what its role requires, or `build_collection` rejects the data.
        ImportError: If a required package is not installed.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    if not path.strip():
        raise ValueError("data must name a dataset after 'hf:', got 'hf:'; write hf:FOLDER or hf:OWNER/NAME")
    folder = expand_user(path)
    with _datasets_library(f"hf:{path}", folder) as library:
        if folder.is_dir():
            data = _load_folder(library, folder)
        else:
            name, _, configuration = path.partition(":")
            data = library.load_dataset(name, configuration or None)
    caches = (library.config.HF_DATASETS_CACHE, HF_HUB_CACHE)  # downloads and extracted archives
    roots = [*([folder] if folder.is_dir() else []), *map(Path, caches)]
    return _from_hf(data, f"hf:{path}", folder.name, config, target, roots, folder if folder.is_dir() else None)


def load_wds(path: str, config: DataConfig, target: TargetKind) -> Collection:
    """Load the images of WebDataset shards: a folder, a pattern (`train-*.tar`) or a range (`train-{000..009}.tar`).

    The files of a sample share a key, the name before the first dot: `0001.jpg`, and `0001.cls`, `0001.txt` or
    `0001.json` with the label. File extensions and JSON keys become columns, e.g. `label=json.species`. A shard whose
    name starts with the word `train`, `val`, `test` or a synonym belongs to that split; all others belong to `train`.
    Images are named by key, prefixed with the shard's path if the shards of a split repeat a key.
    """
    if not path.strip():
        raise ValueError("data must name shards after 'wds:', got 'wds:'; write wds:FOLDER or wds:train-{000..009}.tar")
    shards = _shards(path)
    by_part: dict[str, list[str]] = {}
    for shard in shards:
        first_word = re.split("[^a-z]", shard.name.lower(), maxsplit=1)[0]
        by_part.setdefault(PARTS.get(first_word, "train"), []).append(glob.escape(str(shard)))
    with _datasets_library(f"wds:{path}", shards[0]) as library:
        data = library.load_dataset("webdataset", data_files=by_part)
    return _from_hf(data, f"wds:{path}", shards[0].parent.name, config, target, [shards[0].parent])


def from_python(data: Any, config: DataConfig, target: TargetKind) -> Collection:
    """Load the images of a dataset object.

    Args:
        data: A `datasets.Dataset` or `DatasetDict`, a map-style torch dataset of (image, label) items without
            transform, e.g. from torchvision, or a mapping from split names to such datasets. A single split is treated
            as data without splits. Class indices refer to the attribute `classes` of their dataset, or of the first
            split that has it. Multi-hot vectors always refer to the first split that has it.
        config: Only `channels`, `white`, `skip_corrupt` and, for Hugging Face datasets, `columns` apply.
        target: Content of the label column.

    Raises:
        TypeError: If `data` is not a map-style dataset, or its items are not pairs.
        ValueError: If `build_collection` rejects the data, an image has an unsupported type, a split is unknown, a
            class index is out of range, or a setting does not apply to the data.
        ImportError: If a required package is not installed.
    """
    name = "data"
    where = f"{PYTHON_PREFIX}data"
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    for part_name, part in parts.items():
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
            raise TypeError(
                f"data must be a specification such as folder:photos, or map-style datasets of (image, label) items, "
                f"got {type(part).__name__}{f' for {part_name}' if isinstance(data, Mapping) else ''}"
            )
    if all(hasattr(part, "features") and hasattr(part, "column_names") for part in parts.values()):
        return _from_hf(data, where, name, config, target)
    kinds = {PARTS.get(str(part_name).lower()) for part_name in parts}
    if len(parts) > 1 and (None in kinds or "train" not in kinds):
        given = ", ".join(map(repr, parts))
        raise ValueError(f"data must map train and optionally val and test to datasets, got {given}")
    if config.columns is not None:
        raise ValueError(
            "columns applies only to datasets with columns, e.g. Hugging Face datasets, got "
            f"columns={config.columns!r} for (image, label) items"
        )
    if config.channels not in PILLOW_MODES:
        counts = ", ".join(map(str, PILLOW_MODES))
        raise ValueError(f"channels must be one of {counts} for a torch dataset, got {config.channels}")
    source = _ObjectImages(list(parts.values()), config.reading)
    labels: list[Any] = []
    broken: dict[int, str] = {}
    for part in parts.values():
        part_labels, reasons = _labels_of(part)
        broken |= {len(labels) + row: reason for row, reason in reasons.items()}
        labels += part_labels
    if target != "labels":  # e.g. labels of MedMNIST, which have the shape [images, 1]
        for row, label in enumerate(labels):
            if isinstance(label, list) and len(label) == 1:
                labels[row] = label[0]
    rows = [(part_name, row) for part_name, part in parts.items() for row in range(len(part))]
    names = [f"{part_name}/{row:06}" for part_name, row in rows]
    classes_by_part: dict[str, list[str]] = {}
    for part_name, part in parts.items():
        part_classes = getattr(part, "classes", None)
        classes_by_part[part_name] = [] if part_classes is None else list(map(str, part_classes))
    first_classes = next(filter(None, classes_by_part.values()), [])
    classes = first_classes if first_classes and target == "labels" else None  # by position in a multi-hot vector
    usable = [row for row in range(len(labels)) if row not in broken]
    if first_classes and target != "numbers" and all(isinstance(labels[row], int) for row in usable):
        classes = first_classes
        for row in usable:
            part_classes = classes_by_part[rows[row][0]] or first_classes
            if not 0 <= labels[row] < len(part_classes):
                raise ValueError(
                    f"label of {names[row]} must be a class index from 0 to {len(part_classes) - 1}, got {labels[row]}"
                )
            labels[row] = part_classes[labels[row]]
    table = {"label": labels, "split": [part_name for part_name, _ in rows]}
    roles = {role: role for role in table if role == "label" or len(parts) > 1}
    samples = Samples(name, where, source, names, table, roles, classes, broken)
    return build_collection(samples, config, target)


def _load_folder(library: Any, folder: Path) -> Any:
    """Load a folder written by `save_to_disk`, or a folder of images or Parquet files.

    `datasets` would take words such as `test` in file names for splits, and then ignore a metadata file that lists all
    images. If there is such a file, only top-level folders such as `train` and `test` define splits.

    Raises:
        ValueError: If there is such a file, but only some of its images are in folders of splits.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return library.load_from_disk(str(folder))
    names = [f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    tables = [path for name in names for path in (*folder.glob(name), *folder.glob(f"*/{name}"))]
    has_tables_of_splits = any(table.parent != folder and table.parent.name.lower() in PARTS for table in tables)
    has_image_columns = any(path.name not in names for path in folder.rglob("*.parquet"))
    if not tables or has_tables_of_splits or has_image_columns:
        return library.load_dataset(str(folder))
    rows = library.load_dataset(str(folder), data_files={"train": "**"})["train"]
    column = next((name for name, kind in rows.features.items() if isinstance(kind, library.Image)), None)
    first_folders: dict[str, list[int]] = {}
    for row, name in enumerate(_file_names([_encoded(rows, column)], column, folder) if column else []):
        first_folders.setdefault(name.partition("/")[0].lower(), []).append(row)
    others = [name for name in first_folders if name not in PARTS]
    if not first_folders or len(others) == len(first_folders):
        return rows
    if others:
        raise ValueError(
            f"images must all be in folders of splits, or none of them, got also {listed(map(repr, others))}; move them"
        )
    return {part: rows.select(indices) for part, indices in first_folders.items()}


class _HubImages(CachedImages):
    """Encoded images in a column of concatenated Hugging Face datasets.

    Args:
        parts: Datasets.
        column: Name of the image column.
        reading: As for `read_image`.
        roots: Folders that may contain referenced files. Relative paths refer to the first one. None allows all files.
    """

    def __init__(self, parts: Sequence[Any], column: str, reading: Reading, roots: Sequence[Path] | None) -> None:
        super().__init__(reading)
        self.rows: ConcatDataset[Any] = ConcatDataset(parts)
        self.column = column
        self.roots = roots

    def read(self, row: int) -> Any:
        """Decode one image."""
        return decode_image(*self._file(row), self.reading)

    def inspect(self, row: int) -> ImageMetadata:
        """Decode one image and return its metadata."""
        return inspect_image(*self._file(row), self.reading)

    def _file(self, row: int) -> tuple[io.BytesIO, str]:
        """Return the encoded image and its name."""
        item = self.rows[row][self.column]
        return io.BytesIO(self._bytes(item)), str(item["path"] or f"row {row + 1}")

    def content(self, row: int) -> bytes:
        """Return the encoded image."""
        return self._bytes(self.rows[row][self.column])

    def _bytes(self, item: Any) -> bytes:
        """Return the bytes of an image from its column or the referenced file; raise ValueError if neither has them."""
        if item is None or (item["bytes"] is None and item["path"] is None):
            raise ValueError("no image")
        if item["bytes"] is not None:
            content: bytes = item["bytes"]
            return content
        path = Path(item["path"])
        if self.roots is not None and not path.is_absolute():
            path = self.roots[0] / path
        reason = "" if self.roots is None else outside_reason(path, self.roots)
        if reason:
            raise ValueError(f"'{item['path']}' is not a readable image: {reason}")
        try:
            check_regular(path)
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"'{item['path']}' is not a readable image: {error}") from error


class _ObjectImages(CachedImages):
    """Images of concatenated torch datasets."""

    def __init__(self, parts: Sequence[Any], reading: Reading) -> None:
        super().__init__(reading)
        self.items: ConcatDataset[Any] = ConcatDataset(parts)

    def read(self, row: int) -> Any:
        """Return the image of an item; raise ValueError if the dataset cannot decode it."""
        try:
            return to_channels(_pil_image(self.items[row][0]), self.reading)
        except DECODING_ERRORS as error:
            raise ValueError(str(error) or type(error).__name__) from error

    def content(self, row: int) -> bytes:
        """Return the size and the pixels."""
        image = self.read(row)
        return repr(image.size).encode() + image.tobytes()


def _pil_image(item: Any) -> Image.Image:
    """Convert an item's image to PIL; raise ValueError if it is neither a PIL image nor a uint8 array or tensor."""
    if isinstance(item, Tensor | np.ndarray):
        if item.dtype not in (np.dtype(np.uint8), torch.uint8):
            raise ValueError(
                f"images must be PIL images or uint8, got {type(item).__name__} of {item.dtype}; remove the dataset's "
                "transform"
            )
        item = to_pil_image(item)
    if not isinstance(item, Image.Image):
        raise ValueError(
            f"the first element of an item must be an image, got {type(item).__name__}; return (image, label)"
        )
    return item


def _labels_of(part: Any) -> tuple[list[Any], dict[int, str]]:
    """Return the labels of a torch dataset and, by row, the errors of unreadable items.

    The dataset's own list of labels is preferred to the labels of its items unless there is a `target_transform`.
    """
    broken: dict[int, str] = {}
    attributes: Iterator[Any] = (getattr(part, name, None) for name in ("targets", "labels", "_labels"))
    values = next((values for values in attributes if hasattr(values, "__len__") and len(values) == len(part)), None)
    # items are read only if necessary, because reading decodes the images; `target_transform` affects only items
    if values is None or getattr(part, "target_transform", None) is not None:
        values = []
        for row in range(len(part)):
            try:
                item = part[row]
            except DECODING_ERRORS as error:
                values.append(None)
                broken[row] = str(error) or type(error).__name__
                continue
            try:
                values.append(item[1])
            except (TypeError, LookupError) as error:
                raise TypeError(
                    f"items must be (image, label), got {type(item).__name__} from {type(part).__name__}"
                ) from error
    return [value.tolist() if hasattr(value, "tolist") else value for value in values], broken


def _from_hf(
    data: Any,
    where: str,
    name: str,
    config: DataConfig,
    target: TargetKind,
    roots: Sequence[Path] | None = None,
    folder: Path | None = None,
) -> Collection:
    """Convert Hugging Face datasets to a `Collection`. Image files below `folder` are named by their path in it.

    Rows may reference only files below `roots`. A `root` in `config.columns` replaces them. None allows all files.
    """
    import datasets

    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    notes: list[str] = []
    others: list[str] = []
    if len(parts) > 1:
        others = [part for part in parts if part.lower() not in PARTS]
        if others:
            notes.append(f"skipped {listed([f'{part!r} with {len(parts[part])} rows' for part in others])}")
        parts = {part: rows for part, rows in parts.items() if part not in others}
    # if unknown splits are skipped, a training split must remain
    if not parts or (others and "train" not in {PARTS[part.lower()] for part in parts}):
        given = f"splits {', '.join(data)}" if data else "no splits"
        raise ValueError(f"{where} must have a train split if it has several splits, got {given}")
    first_part = next(iter(parts.values()))
    image_columns = [column for column, kind in first_part.features.items() if isinstance(kind, datasets.Image)]
    part_tables = [_values(rows, image_columns) for rows in parts.values()]
    sizes = [len(rows) for rows in parts.values()]
    table: dict[str, list[Any]] = {column: [_IMAGE] * sum(sizes) for column in image_columns}
    for column in dict.fromkeys(column for part_table in part_tables for column in part_table):
        values: list[Any] = []
        for part_table, size in zip(part_tables, sizes, strict=True):
            values += part_table.get(column, [None] * size)  # splits may lack columns
        table[column] = values
    urls = table.pop(_URL, None)
    columns = Columns.parse(config.columns)
    if columns.root is not None:
        roots = [columns.root]
    if image_columns:
        columns = Columns({"path": image_columns[0], **columns.names})
    roles = columns.resolve(table, ("path", "label"), where)
    if roles["path"] not in image_columns:
        first_values = table.get(roles["path"], [])[:1]
        raise ValueError(f"{where}: column {roles['path']!r} must contain images, got {first_values}")
    without_images = [
        part for part, rows in parts.items() if not isinstance(rows.features.get(roles["path"]), datasets.Image)
    ]
    if without_images:
        raise ValueError(
            f"{where}: column {roles['path']!r} must contain images in every split, got none in "
            f"{listed(map(repr, without_images))}"
        )
    part_names = [part for part, rows in parts.items() for _ in range(len(rows))]
    replaces_splits = columns.names.get("split") is not None  # with those of a column, or with new ones for `none`
    if len(parts) > 1 and not replaces_splits:
        table["split"] = part_names
        roles["split"] = "split"
    encoded = [_encoded(rows, roles["path"]) for rows in parts.values()]
    names = table.get(_KEY) or ([] if folder is None else _file_names(encoded, roles["path"], folder))
    if not names:
        names = [f"{part}/{row:06}" for part, rows in parts.items() for row in range(len(rows))]
    keys = names if replaces_splits else list(zip(part_names, names, strict=True))
    if urls is not None and len(set(keys)) < len(names):  # shards repeat keys; add the shard's path
        stems = {url: Path(url).with_suffix("") for url in urls}
        common = os.path.commonpath([str(stem.parent) for stem in stems.values()])
        shards = {url: stem.relative_to(common) for url, stem in stems.items()}
        names = [f"{shards[url]}/{name}" for url, name in zip(urls, names, strict=True)]
    source = _HubImages(encoded, roles["path"], config.reading, roots)
    samples = Samples(name, where, source, names, table, roles, notes=notes)
    if target != "numbers" and len(samples.label_columns) == 1:
        samples.classes = _class_names(first_part.features.get(samples.label_columns[0]))
    return build_collection(samples, config, target)


def _encoded(rows: Any, column: str) -> Any:
    """Return only the image column, without decoding its images."""
    from datasets import Image

    return rows.select_columns([column]).cast_column(column, Image(decode=False))


def _file_names(parts: Sequence[Any], column: str, folder: Path) -> list[str]:
    """Return the paths of encoded images relative to `folder`, or an empty list unless all are files below it."""
    first = next((rows[0][column] for rows in parts if len(rows)), None)
    if first is None or first["bytes"] is not None:  # do not read all images
        return []
    items = [item for rows in parts for item in rows[column]]
    if any(item is None or item["path"] is None for item in items):
        return []
    paths = [Path(item["path"]) for item in items]
    for root in (Path(os.path.abspath(folder)), folder.resolve()):  # `datasets` resolves links in some layouts
        if all(path.is_relative_to(root) for path in paths):
            return [path.relative_to(root).as_posix() for path in paths]
    return []


def _values(rows: Any, image_columns: Sequence[str]) -> dict[str, list[Any]]:
    """Return all columns except images. Class indices become names; mappings become columns such as `json.label`."""
    table: dict[str, list[Any]] = {}
    try:
        columns = rows.remove_columns([column for column in image_columns if column in rows.features]).to_dict()
    except (ValueError, OverflowError) as error:  # timestamps out of range
        raise ValueError(f"data cannot be read: {first_line(error)}") from error
    for column, values in columns.items():
        names = _class_names(rows.features[column])
        if names:
            values = [_index_to_name(value, names, column, row) for row, value in enumerate(values, 1)]
        example = next((value for value in values if value is not None), None)
        if isinstance(example, dict):
            mappings: list[Any] = [{} if value is None else value for value in values]
            for key in example:
                table[f"{column}.{key}"] = [mapping.get(key) for mapping in mappings]
        else:
            table[column] = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]
    return table


def _class_names(kind: Any) -> list[str] | None:
    """Return the class names of a column of class indices or lists of indices, or None for other columns."""
    names = getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)
    return None if names is None else [str(name) for name in names]


def _index_to_name(value: Any, names: Sequence[str], column: str, row: int) -> Any:
    """Convert a class index, or each index in a list, to its class name.

    A negative index, usually -1, means unlabeled. It becomes None, or is dropped from a list.
    """
    numbers = value if isinstance(value, list) else [value]
    invalid = [number for number in numbers if number is not None and number >= len(names)]
    if invalid:
        raise ValueError(f"column {column!r}, row {row} must be a class index below {len(names)}, got {invalid[0]}")
    named = [None if number is None or number < 0 else names[number] for number in numbers]
    return [name for name in named if name is not None] if isinstance(value, list) else named[0]


def _shards(path: str) -> list[Path]:
    """Return the tar files of a folder, a pattern or a range in braces; raise FileNotFoundError if any is missing."""
    folder = expand_user(path)
    if folder.is_dir():
        shards = sorted(folder.glob("*.tar"))
    else:
        match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(folder))
        if match is not None:
            before, first, last, after = match.groups()
            numbers = range(int(first), int(last) + 1)
            shards = [Path(f"{before}{number:0{len(first)}}{after}") for number in numbers]
        else:
            shards = [Path(name) for name in sorted(glob.glob(str(folder)))] or [folder]
    if not shards:
        raise FileNotFoundError(f"data must contain tar files, got none in '{folder}'")
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        hint = similar_paths(folder) or "; write wds:FOLDER or wds:train-{000..009}.tar"
        raise FileNotFoundError(f"data must name existing tar files, got wds:{path}, missing: {listed(missing)}{hint}")
    return [shard.absolute() for shard in shards]


@contextmanager
def _datasets_library(where: str, place: Path) -> Iterator[Any]:
    """Yield the `datasets` package without progress bars and warnings.

    An error inside the context becomes an error with a one-line message.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data {where} requires the datasets package; pip install 'snella[data]'") from error
    has_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield datasets
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = first_line(cause)
        nearest = similar_paths(place) if place.parent.is_dir() else ""
        if isinstance(error, ConnectionError):
            raise ConnectionError(
                f"data {where} is neither a folder nor in the cache, and the Hub could not be reached ({text}); pass a "
                f"local copy as hf:FOLDER{nearest}"
            ) from error
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"data {where} cannot be read: {text}{nearest}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if has_bars:
            datasets.enable_progress_bars()
