"""CSV and Parquet tables of images: column roles, and conversion of rows to a `Collection`."""

import csv
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from snella_app.console import counted
from snella_app.data.datasets import (
    Annotations,
    CachedImages,
    Collection,
    FileImages,
    ImageDataset,
    Target,
    broken_rows,
)
from snella_app.data.folder import PARTS
from snella_app.data.images import RGB, Reading
from snella_app.text import listed, nearest

TargetKind = Literal["class", "labels", "numbers"]
"""Content of the label column: one class per row, any number of labels, or regression targets."""
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "path": (
        *("path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "imagename", "img", "imgpath"),
        *("images", "files", "picture", "photo"),
    ),
    "label": (
        *("label", "labels", "class", "classname", "labelname", "category", "target", "tags", "species", "cls", "y"),
    ),
    "split": ("split", "part", "subset", "partition", "phase"),
    "weight": ("weight", "weights", "sampleweight"),
    "group": (
        *("group", "groups", "groupid", "patient", "patientid", "subject", "subjectid", "site", "siteid"),
        *("video", "videoid", "scene", "sceneid"),
    ),
}
"""Column names by role, lower case without spaces and `_`, most likely first."""
ROLES = tuple(_SYNONYMS)
_ROOT = "root"
_NONE = "none"
_SEPARATORS = ("|", ";", ",")
_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "", "-1")
_BINS = 10
_FEW_CLASSES = 20
_MIN_IN_STRATUM = 3
_EXAMPLES = 3
_MAX_WEIGHT = 1e9  # Adam squares gradients, which scale with the weights, in float32


@dataclass(frozen=True)
class Columns:
    """Column roles of a table, as in `--columns path=file,label=species,group=patient`.

    Attributes:
        names: Column name by role (path, label, split, weight, group). Several label columns are joined by `+`, `none`
            means no column, and a path may be a template: `train/{id}.jpg`.
        root: Base folder of relative paths, `root=FOLDER`; None uses the folder of the data. Rows of Parquet files and
            Hugging Face datasets may only reference files below it.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Columns":
        """Parse `role=name,role=name`.

        Raises:
            ValueError: If a role is unknown or an entry has no `=`.
        """
        names: dict[str, str] = {}
        roles = (*ROLES, _ROOT)
        for entry in filter(None, (part.strip() for part in (text or "").split(","))):
            role, sign, name = (part.strip() for part in entry.partition("="))
            if role not in roles or not sign or not name:
                hint = nearest(role, roles) if role not in roles else ""
                raise ValueError(
                    f"columns must be ROLE=NAME pairs like path=file,label=species with roles {', '.join(roles)}, "
                    f"got {entry!r}{hint}"
                )
            names[role] = name
        root = names.pop(_ROOT, None)
        return cls(names, None if root is None else Path(root).expanduser())

    def resolve(self, table: Mapping[str, Sequence[Any]], needed: Sequence[str], where: str) -> dict[str, str]:
        """Return the column name of each role in the table.

        Args:
            table: Values by column.
            needed: Required roles.
            where: Name of the table, for messages.

        Raises:
            ValueError: If a named column does not exist or a required role has no column.
        """
        names = list(table)
        by_plain_name = {re.sub(r"[\s_\-.]", "", name.lower().rpartition(".")[2]): name for name in reversed(names)}
        by_plain_name |= {re.sub(r"[\s_\-.]", "", name.lower()): name for name in reversed(names)}
        roles: dict[str, str] = {}
        errors: list[str] = []
        for role in ROLES:
            column = self.names.get(role)
            if column is None:
                name = next((by_plain_name[word] for word in _SYNONYMS[role] if word in by_plain_name), None)
                if name is not None and name not in roles.values():
                    roles[role] = name
                elif role in needed:
                    errors.append(f"no {role} column ({role} or a similar name); set it with --columns {role}=NAME")
                continue
            if column == _NONE:
                if role in needed:
                    errors.append(f"columns must name a column for {role}, got {role}={_NONE}")
                continue
            unknown = [name for name in _columns_in(role, column) if name not in table]
            for name in unknown:
                errors.append(f"no column {name!r} for {role}" + nearest(name, table, form=" (nearest: '{}')"))
            if not unknown:
                roles[role] = column
        if errors:
            raise ValueError(f"{where}: {'; '.join(errors)}. Columns: {_describe_columns(table)}")
        return roles


@dataclass(frozen=True)
class RowOptions:
    """Options for converting table rows to labeled images.

    Attributes:
        columns: Column roles; other roles are detected by column name.
        target: Content of the label column.
        skip_corrupt: Skip unusable rows (missing or broken image, no label) with a note instead of raising an error.
        reading: As for `read_image`.
    """

    columns: Columns
    target: TargetKind = "class"
    skip_corrupt: bool = False
    reading: Reading = RGB


@dataclass
class Samples:
    """Raw rows of a table, before conversion to a `Collection`.

    Attributes:
        name: Short name of the data.
        where: Data as the user typed it, for messages.
        source: Images, one per row.
        names: Name of each image.
        labels: Raw values of the label column; tuples for several columns.
        label_columns: Names of the label columns.
        splits: Raw split of each image; None without splits.
        weights: Raw sample weight of each image; None without weights.
        groups: Raw group of each image; None without groups.
        classes: Class names by index, if the data defines them.
        broken: Reason by unusable row.
        notes: Notes for the user.
    """

    name: str
    where: str
    source: CachedImages
    names: list[str]
    labels: list[Any]
    label_columns: list[str]
    splits: list[Any] | None = None
    weights: list[Any] | None = None
    groups: list[Any] | None = None
    classes: list[str] | None = None
    broken: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_table(
        cls,
        name: str,
        where: str,
        source: CachedImages,
        names: list[str],
        table: Mapping[str, list[Any]],
        roles: Mapping[str, str],
    ) -> "Samples":
        """Build samples from a table; `roles` maps column roles to names, see `Columns.resolve`."""
        labels = _columns_in("label", roles["label"])
        values = zip(*(table[label] for label in labels), strict=True)
        splits, weights, groups = (
            table[roles[role]] if role in roles else None for role in ("split", "weight", "group")
        )
        return cls(
            name,
            where,
            source,
            names,
            labels=[value[0] if len(labels) == 1 else value for value in values],
            label_columns=labels,
            splits=splits,
            weights=weights,
            groups=groups,
            notes=[f"columns: {', '.join(f'{role} {column!r}' for role, column in roles.items())}"],
        )


def load_table(path: str, options: RowOptions, *, kind: str) -> Collection:
    """Load the images listed in a table.

    Args:
        path: CSV file (separator `,`, `;` or tab, with a header) or Parquet file. Paths are relative to its folder.
        options: Conversion options.
        kind: csv or parquet.

    Raises:
        FileNotFoundError: If the file does not exist; the message suggests similar names.
        ValueError: If the file is not a table, columns are missing, rows are unusable, or there are fewer than two
            classes.
        ImportError: If pyarrow is required but not installed.
    """
    table, file = read_table(path, kind)
    where = f"{kind}:{path}"
    roles = options.columns.resolve(table, ("path", "label"), where)
    names = _paths(table, roles["path"])
    root = options.columns.root or file.parent
    source = FileImages([root / name for name in names], reading=options.reading)
    broken = {row: "no path" for row, name in enumerate(names) if not name}
    if kind == "parquet":
        outside = {row: outside_reason(image, [root]) for row, image in enumerate(source.paths) if row not in broken}
        broken |= {row: reason for row, reason in outside.items() if reason}
    broken |= {
        row: "no such file" for row, image in enumerate(source.paths) if row not in broken and not image.is_file()
    }
    samples = Samples.from_table(file.stem, where, source, names, table, roles)
    samples.broken = broken
    return build_collection(samples, options)


def build_collection(samples: Samples, options: RowOptions) -> Collection:
    """Convert rows to images with labels, weights and groups in their splits.

    Labels become class indices (`class`) or strata for splitting: the rarest label of an image (`labels`), or one of
    up to ten ranges of the first number (`numbers`). `ImageDataset.annotations` contains the raw labels.

    Args:
        samples: Raw rows.
        options: Conversion options.

    Raises:
        ValueError: If rows are unusable, splits are unknown, training images are missing, there are fewer than two
            classes, or labels do not match `target`.
    """
    parts, target = _parts(samples), options.target
    values, broken = _targets(samples, target)
    weights = None if samples.weights is None else [_number(value) for value in samples.weights]
    for row, weight in enumerate(samples.weights or []):
        if not 0 <= _number(weight) <= _MAX_WEIGHT:
            broken[row] = f"weight {weight!r} is not in [0, {_MAX_WEIGHT:g}]"
    broken |= samples.broken
    usable = [row for row in range(len(samples.names)) if row not in broken]
    broken |= broken_rows(samples.source, usable)
    notes = list(samples.notes)
    if broken:
        if not options.skip_corrupt:
            raise ValueError(
                f"{_broken_text(broken, samples)}. Fix or remove them, or skip them with --skip-corrupt "
                "(skip_corrupt=True)"
            )
        notes.append(f"skipped {_broken_text(broken, samples)}")
    rows = [row for row in usable if row not in broken]
    rows = _drop_duplicates(rows, samples, parts, values, notes)
    if not rows:
        reason = f"all are unusable: {_broken_text(broken, samples)}" if broken else f"got {len(samples.names)} rows"
        raise ValueError(f"{samples.where} has no images to train on, {reason}")
    indices, classes, strata = _labels(rows, samples, values, target)
    if target == "class":
        _check_classes(classes, indices, rows, parts, samples)
    groups = samples.groups and [_text(value) or f"(row {row + 1})" for row, value in enumerate(samples.groups)]

    def dataset(part: str) -> ImageDataset | None:
        chosen = [row for row in rows if parts[row] == part]
        if not chosen:
            return None
        annotations = Annotations(
            [values[row] for row in chosen],
            None if weights is None else [weights[row] for row in chosen],
            None if groups is None else [groups[row] for row in chosen],
        )
        labels, names = [indices[row] for row in chosen], [samples.names[row] for row in chosen]
        return ImageDataset(samples.source, chosen, labels, names, annotations=annotations)

    train = dataset("train")
    if train is None:
        raise ValueError(
            f"{samples.where} has no training images, got splits {listed(sorted(set(parts)))}; "
            "--columns split=none creates new splits"
        )
    if weights is not None and not any(train.annotations.weights or []):
        raise ValueError(
            f"{samples.where}: at least one training image must have a weight above 0, got 0 for all {len(train)}; "
            "--columns weight=none ignores the column"
        )
    has_parts = samples.splits is not None
    collection = Collection(
        samples.name, classes, train, dataset("val"), dataset("test"), has_parts, notes, strata=strata
    )
    collection.broken = {samples.names[row] or f"row {row + 1}": broken[row] for row in sorted(broken)}
    return collection


def read_table(path: str, kind: str) -> tuple[dict[str, list[Any]], Path]:
    """Read the columns of a table; return them and the resolved file.

    Args:
        path: Path as typed. CSV values are strings, separated by tabs, `;` or `,`.
        kind: csv or parquet.

    Raises:
        FileNotFoundError: If the file does not exist; the message suggests similar names.
        ValueError: If the file is not a table, is empty, or has duplicate columns or rows of unequal length.
        ImportError: If pyarrow is required but not installed.
    """
    file = Path(path).expanduser()
    if not path.strip() or not file.is_file():
        names = [p.name for p in file.parent.iterdir() if p.suffix in TABLE_SUFFIXES] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.4)
        hint = (
            f"nearest: {', '.join(map(repr, near))}" if near else f"write {kind}:FILE, e.g. {kind}:photos/labels.{kind}"
        )
        got = "is a folder" if path.strip() and file.is_dir() else "does not exist"
        raise FileNotFoundError(f"data must name a table, got {kind}:{path}, which {got}; {hint}")
    file = file.absolute()
    table = _read_parquet(file) if kind == "parquet" else _read_csv(file)
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"{kind}:{path} must have one row per image, got an empty table")
    return table, file


def outside_reason(path: Path, roots: Sequence[Path]) -> str:
    """Return the reason a row may not reference a file; empty for files in the allowed folders.

    Args:
        path: File referenced by the row; links are resolved.
        roots: Allowed folders.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # e.g. a link cycle or a NUL byte
        return f"no such file: {error}"
    if any(resolved.is_relative_to(root.resolve()) for root in roots):
        return ""
    return f"{str(resolved)!r} is outside {str(roots[0])!r}; allow another folder with --columns root=FOLDER"


def table_paths(path: str | Path, columns: Columns) -> list[Path]:
    """Return the image files listed in a table, in order.

    Args:
        path: CSV or Parquet file; a relative path returns relative image paths.
        columns: Column roles.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If the path column is missing, or a Parquet file lists an image outside its folder or
            `columns.root`.
    """
    kind = "parquet" if Path(path).suffix == ".parquet" else "csv"
    table, _ = read_table(str(path), kind)
    roles = columns.resolve(table, ("path",), str(path))
    folder = columns.root or Path(path).expanduser().parent
    paths = [folder / name for name in _paths(table, roles["path"]) if name]
    reasons = (outside_reason(image, [folder]) for image in paths) if kind == "parquet" else ()
    if reason := next(filter(None, reasons), None):
        raise ValueError(f"{path} must list images below its folder: {reason}")
    return paths


def _read_csv(file: Path) -> dict[str, list[Any]]:
    """Read the columns of a CSV file as strings."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
            lines.seek(0)
            delimiter = max("\t;,", key=head.count)
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{file}' must be a CSV file in UTF-8: {error}; save it as CSV (UTF-8)") from error
    names, *rows = rows or [[]]
    names = [name.strip() for name in names]
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise ValueError(
            f"'{file}' must have unique column names, got {listed([repr(name) for name in duplicates])} twice"
        )
    invalid = [f"row {number} has {len(row)}" for number, row in enumerate(rows, 1) if len(row) != len(names)]
    if invalid:
        raise ValueError(
            f"'{file}' must have {len(names)} values per line, one for each of {listed(names)}, but "
            f"{listed(invalid)}; quote values that contain {delimiter!r}"
        )
    return {name: [row[index].strip() for row in rows] for index, name in enumerate(names)}


def _read_parquet(file: Path) -> dict[str, list[Any]]:
    """Read the columns of a Parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"'{file}' needs pyarrow; pip install 'snella[data]'") from error
    try:
        table: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: timestamps out of range
        raise ValueError(f"'{file}' must be a Parquet file: {str(error).splitlines()[0]}") from error
    return table


def _columns_in(role: str, column: str) -> list[str]:
    """Return the columns that a value of `--columns` references."""
    if role == "path" and "{" in column:
        return re.findall(r"\{([^{}]*)\}", column)
    return column.split("+") if role == "label" else [column]


def _paths(table: Mapping[str, Sequence[Any]], column: str) -> list[str]:
    """Return the paths from a column or template; empty strings for missing values."""
    if "{" not in column:
        return [_text(value) for value in table[column]]
    parts = re.split(r"\{([^{}]*)\}", column)
    texts = [[_text(value) for value in table[name]] for name in parts[1::2]]
    paths = []
    for row in zip(*texts, strict=True):
        pieces = [piece for pair in zip(parts[::2], (*row, ""), strict=True) for piece in pair]
        paths.append("".join(pieces) if all(row) else "")
    return paths


def _text(value: Any) -> str:
    """Convert a value to a string: integral floats without decimal point, missing values to an empty string."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(value: Any) -> float:
    """Convert a value to a number; NaN if impossible."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _describe_columns(table: Mapping[str, Sequence[Any]]) -> str:
    """Describe each column: name, type and three examples."""
    texts = []
    for name, values in table.items():
        present = [value for value in values if not isinstance(value, str) or value]
        present = [value for value in present if value is not None]
        shown = ", ".join(
            f"{text[:40]}…" if len(text) > 40 else text
            for text in map(repr, list(dict.fromkeys(map(_format_value, present)))[:_EXAMPLES])
        )
        texts.append(f"{name!r} ({_value_type(present)}{': ' if shown else ''}{shown})")
    return ", ".join(texts)


def _format_value(value: Any) -> str:
    """Format a value for an error message."""
    return "|".join(map(str, value)) if isinstance(value, list | tuple) else _text(value)


def _value_type(values: Sequence[Any]) -> str:
    """Describe the type of a column's values: integers, numbers, text, lists or empty."""
    if not values:
        return "empty"
    if isinstance(values[0], list | tuple):
        return "lists"
    numbers = [_number(value) for value in values]
    if any(math.isnan(number) for number in numbers):
        return "text"
    return "integers" if all(number.is_integer() for number in numbers) else "numbers"


def _parts(samples: Samples) -> list[str]:
    """Return the split of each row; `train` for data without splits."""
    if samples.splits is None:
        return ["train"] * len(samples.names)
    texts = [_text(value) for value in samples.splits]
    unknown = Counter(text for text in texts if text.lower() not in PARTS)
    if unknown:
        named = listed([f"{text!r} ({counted(count, 'row')})" for text, count in unknown.most_common()])
        raise ValueError(
            f"{samples.where}: values of the split column must be {', '.join(sorted(PARTS))}, got {named}; "
            "--columns split=none creates new splits"
        )
    return [PARTS[text.lower()] for text in texts]


def _targets(samples: Samples, target: TargetKind) -> tuple[list[Target], dict[int, str]]:
    """Return the target of each row, and the reason by unusable row."""
    if target == "numbers":
        return _numbers(samples)
    if target == "labels":
        return list(_label_lists(samples)), {}
    if len(samples.label_columns) > 1:
        raise ValueError(
            f"{samples.where}: columns must name one label column for classification, got "
            f"{'+'.join(samples.label_columns)}"
        )
    row = next((row for row, value in enumerate(samples.labels) if isinstance(value, list | tuple)), None)
    if row is not None:
        raise ValueError(
            f"{samples.where}: column {samples.label_columns[0]!r} must contain one class per image, got the list "
            f"{_format_value(samples.labels[row])!r} in row {row + 1}; use --task multilabel for several labels per "
            "image"
        )
    texts = [_text(value) for value in samples.labels]
    return list(texts), {row: "no label" for row, text in enumerate(texts) if not text}


def _numbers(samples: Samples) -> tuple[list[Target], dict[int, str]]:
    """Return the number of each row (a tuple for several columns), and the reason by unusable row."""
    values: list[Target] = []
    broken = {}
    for row, value in enumerate(samples.labels):
        is_scalar = not isinstance(value, list | tuple)
        numbers = tuple(_number(part) for part in ([value] if is_scalar else value))
        if not all(map(math.isfinite, numbers)):
            broken[row] = f"label {_format_value(value)!r} is not a number"
        values.append(numbers[0] if is_scalar else numbers)
    if broken and len(broken) == len(values):
        names = " and ".join(map(repr, samples.label_columns))
        raise ValueError(
            f"{samples.where}: column {names} must contain numbers for task regression, got "
            f"{_format_value(samples.labels[0])!r} in row 1 and no number in "
            f"{len(values)} rows; select another column with --columns label=NAME, or remove --task regression"
        )
    return values, broken


def _label_lists(samples: Samples) -> Iterable[tuple[str, ...]]:
    """Yield the labels of each row, from a list, text with separators, or several 0/1 columns."""
    if len(samples.label_columns) > 1:
        for row, value in enumerate(samples.labels):
            texts = [_text(part).lower() for part in value]
            invalid = [text for text in texts if text not in (*_TRUE, *_FALSE)]
            if invalid:
                raise ValueError(
                    f"{samples.where}: multiple label columns must contain only 0 and 1, "
                    f"got {invalid[0]!r} in row {row + 1}"
                )
            yield tuple(name for name, text in zip(samples.label_columns, texts, strict=True) if text in _TRUE)
        return
    texts = [value for value in samples.labels if isinstance(value, str)]
    separator = next((s for s in _SEPARATORS if any(s in text for text in texts)), _SEPARATORS[0])
    for value in samples.labels:
        items = value if isinstance(value, list | tuple) else _text(value).split(separator)
        yield tuple(dict.fromkeys(filter(None, map(_text, items))))


def _labels(
    rows: Sequence[int], samples: Samples, values: Sequence[Any], target: TargetKind
) -> tuple[dict[int, int], list[str], list[str] | None]:
    """Return the class or stratum of each row, the class names, and stratum names if they differ."""
    if target == "numbers":
        first = np.array([values[row] if isinstance(values[row], float) else values[row][0] for row in rows])
        bins = max(1, min(_BINS, len(rows) // _BINS))
        edges = np.unique(np.quantile(first, np.linspace(0, 1, bins + 1)[1:-1])) if bins > 1 else np.array([])
        in_range = np.bincount(np.digitize(first, edges), minlength=len(edges) + 1)
        while len(edges) and in_range.min() < _MIN_IN_STRATUM:  # merge small ranges caused by ties
            edges = np.delete(edges, max(int(in_range.argmin()) - 1, 0))
            in_range = np.bincount(np.digitize(first, edges), minlength=len(edges) + 1)
        strata = np.digitize(first, edges)
        return dict(zip(rows, strata.tolist(), strict=True)), samples.label_columns, _ranges(edges)
    if target == "labels":
        counts = Counter(label for row in rows for label in values[row])
        classes = samples.classes or _sort_names(counts)
        rarest = {row: min(values[row], key=lambda name: (counts[name], name), default=_NONE) for row in rows}
        sizes = Counter(rarest.values())
        names = [name for name in _sort_names(sizes) if sizes[name] >= _MIN_IN_STRATUM]
        few = sum(size for name, size in sizes.items() if name not in names)
        has_others = few >= _MIN_IN_STRATUM or not names
        rest = len(names) if has_others else names.index(max(names, key=sizes.__getitem__))
        strata_names = [*names, "others"] if has_others and few else names
        return (
            {row: names.index(name) if name in names else rest for row, name in rarest.items()},
            classes,
            strata_names,
        )
    known = samples.classes or _sort_names({values[row] for row in rows})
    index = {name: number for number, name in enumerate(known)}
    return {row: index[values[row]] for row in rows}, known, None


def _ranges(edges: np.ndarray) -> list[str]:
    """Name the ranges between edges: `lowest to 1`, `1 to highest`."""
    texts = [f"{edge:g}" for edge in edges]
    return [f"{low} to {high}" for low, high in zip(["lowest", *texts], [*texts, "highest"], strict=True)]


def _sort_names(names: Iterable[str]) -> list[str]:
    """Sort class names numerically if all are numbers, else alphabetically."""
    unique = set(names)
    is_numeric = not any(math.isnan(_number(name)) for name in unique)
    return sorted(unique, key=lambda name: (_number(name) if is_numeric else 0.0, name))


def _check_classes(
    classes: Sequence[str], indices: Mapping[int, int], rows: Sequence[int], parts: Sequence[str], samples: Samples
) -> None:
    """Reject fewer than two classes, too many classes, and classes without training images."""
    if len(classes) < 2:
        raise ValueError(
            f"{samples.where}: at least two classes are required, column {samples.label_columns[0]!r} has one: "
            f"{classes[0]!r}"
        )
    if len(classes) > max(len(rows) / 2, _FEW_CLASSES):
        raise ValueError(
            f"{samples.where}: column {samples.label_columns[0]!r} must contain classes, got {len(classes)} different "
            f"values in {len(rows)} rows, e.g. {', '.join(map(repr, classes[:_EXAMPLES]))}; select another column with "
            "--columns label=NAME"
        )
    train_classes = {indices[row] for row in rows if parts[row] == "train"}
    counts = Counter(classes[indices[row]] for row in rows if indices[row] not in train_classes)
    if counts and train_classes:
        named = listed([f"{name!r} ({count} in other splits)" for name, count in sorted(counts.items())])
        raise ValueError(
            f"{samples.where}: {len(counts)} of {len(classes)} classes have no training image: {named}; add training "
            "images, remove their rows, or create new splits with --columns split=none"
        )


def _drop_duplicates(
    rows: list[int], samples: Samples, parts: Sequence[str], values: Sequence[Any], notes: list[str]
) -> list[int]:
    """Drop rows that repeat an image within a split; add notes about repeated and contradicting rows."""
    first: dict[tuple[str, str], int] = {}
    unique, repeated, contradicting = [], 0, []
    for row in rows:
        key = (samples.names[row], parts[row])
        earlier = first.setdefault(key, row)
        if earlier == row:
            unique.append(row)
        elif values[earlier] == values[row]:
            repeated += 1
        else:
            unique.append(row)
            contradicting.append(
                f"{samples.names[row]} ({_format_value(values[earlier])}, {_format_value(values[row])})"
            )
    if repeated:
        notes.append(f"skipped {counted(repeated, 'repeated row')}")
    if contradicting:
        notes.append(
            f"{counted(len(contradicting), 'row')} with a different label than an earlier row: {listed(contradicting)}"
        )
    return unique


def _broken_text(broken: Mapping[int, str], samples: Samples) -> str:
    """Summarize unusable rows with count, reasons and examples."""
    kinds = Counter(_error_kind(reason) for reason in broken.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    named = listed([f"{samples.names[row] or f'row {row + 1}'} ({broken[row]})" for row in sorted(broken)])
    return f"{len(broken)} of {len(samples.names)} rows of {samples.where}, {counts}: {named}"


_SIMPLE = ("no path", "no such file", "no label")


def _error_kind(reason: str) -> str:
    """Return the category of a row's error."""
    if reason in _SIMPLE:
        return reason
    return {"weight": "invalid weight", "label": "invalid label"}.get(reason.partition(" ")[0], "unreadable")
