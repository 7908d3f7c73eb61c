"""Tables of images, CSV and Parquet: which column holds what, and rows as a `Collection`."""

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
"""What the label column holds: one class a row, any number of labels, or numbers to be predicted."""
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
"""By role, names of columns without capitals, spaces and `_`, the likeliest first."""
ROLES = tuple(_SYNONYMS)
_ROOT = "root"
_NONE = "none"
_SEPARATORS = ("|", ";", ",")
_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "", "-1")
_BINS = 10
_FEW_CLASSES = 20
_LEAST_IN_STRATUM = 3
_EXAMPLES = 3
_MOST_WEIGHT = 1e9  # losses are float32 at most, and are squared by optimizers


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what, as `--columns path=file,label=species,group=patient` says.

    Attributes:
        names: By role (path, label, split, weight, group) the column's name; several label columns are joined by `+`,
            `none` is for no column, and a path may be made of columns: `train/{id}.jpg`.
        root: Folder that paths are relative to, `root=FOLDER`; None for the folder of the data. Rows of Parquet files
            and Hugging Face data sets, which nobody reads before, may only name files below it.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Columns":
        """Read `role=name,role=name`.

        Raises:
            ValueError: No such role (the nearest is given), or an entry without `=`.
        """
        names: dict[str, str] = {}
        roles = (*ROLES, _ROOT)
        for entry in filter(None, (part.strip() for part in (text or "").split(","))):
            role, sign, name = (part.strip() for part in entry.partition("="))
            if role not in roles or not sign or not name:
                hint = nearest(role, roles) if role not in roles else ""
                raise ValueError(
                    f"columns must be such as path=file,label=species, with {', '.join(roles)} before the '=', "
                    f"got {entry!r}{hint}"
                )
            names[role] = name
        root = names.pop(_ROOT, None)
        return cls(names, None if root is None else Path(root).expanduser())

    def of(self, table: Mapping[str, Sequence[Any]], needed: Sequence[str], where: str) -> dict[str, str]:
        """The column of each role that the table has.

        Args:
            table: Values by column.
            needed: Roles that must be there.
            where: What the table is called, for messages.

        Raises:
            ValueError: A column that is not there, or a needed role without one; says what each column holds.
        """
        names = list(table)
        plain = {re.sub(r"[\s_\-.]", "", name.lower().rpartition(".")[2]): name for name in reversed(names)}
        plain |= {re.sub(r"[\s_\-.]", "", name.lower()): name for name in reversed(names)}
        found: dict[str, str] = {}
        errors: list[str] = []
        for role in ROLES:
            given = self.names.get(role)
            if given is None:
                name = next((plain[word] for word in _SYNONYMS[role] if word in plain), None)
                if name is not None and name not in found.values():
                    found[role] = name
                elif role in needed:
                    errors.append(
                        f"no column for {role}, called {role} or the like; name it with --columns {role}=NAME"
                    )
                continue
            if given == _NONE:
                if role in needed:
                    errors.append(f"columns must name a column for {role}, got {role}={_NONE}")
                continue
            unknown = [name for name in _columns_in(role, given) if name not in table]
            for name in unknown:
                errors.append(f"no column {name!r} for {role}" + nearest(name, table, form=" (nearest: '{}')"))
            if not unknown:
                found[role] = given
        if errors:
            raise ValueError(f"{where}: {'; '.join(errors)}. It has {_described(table)}")
        return found


@dataclass(frozen=True)
class RowOptions:
    """How the rows of data with columns become images with labels.

    Attributes:
        columns: Which columns hold what; others are found by their names.
        target: What the label column holds.
        skip_corrupt: Leave out rows that cannot be used (their image is missing or broken, or they have no label), and
            note how many, instead of refusing.
        reading: As for `read_image`.
    """

    columns: Columns
    target: TargetKind = "class"
    skip_corrupt: bool = False
    reading: Reading = RGB


@dataclass
class Samples:
    """Images with what is known of each, row by row, before they become a `Collection`.

    Attributes:
        name: Short name of the data.
        where: The data as it was typed, for messages.
        source: The images, a row each.
        names: Name of each image.
        labels: Values of the label column as they stand there, of several columns as tuples.
        label_columns: Their names.
        splits: Part of each image as it stands there; None where the data is not divided.
        weights: Sample weight of each image as it stands there; None for none.
        groups: Group of each image as it stands there; None for none.
        classes: Class names in their order, where the data itself has one.
        broken: Why rows cannot be used, by row.
        notes: What a user should know.
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
    def of_table(
        cls,
        name: str,
        where: str,
        source: CachedImages,
        names: list[str],
        table: Mapping[str, list[Any]],
        found: Mapping[str, str],
    ) -> "Samples":
        """Those of a table, of whose columns `found` says the roles, as `Columns.of` does."""
        labels = _columns_in("label", found["label"])
        values = zip(*(table[label] for label in labels), strict=True)
        splits, weights, groups = (
            table[found[role]] if role in found else None for role in ("split", "weight", "group")
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
            notes=[f"columns: {', '.join(f'{role} {column!r}' for role, column in found.items())}"],
        )


def load_table(path: str, options: RowOptions, *, kind: str) -> Collection:
    """Collect the images that a table names.

    Args:
        path: A CSV file (`,`, `;` or tab between the values, a line of names first) or a Parquet file; the paths in it
            are relative to its folder.
        options: How rows are read.
        kind: csv or parquet.

    Raises:
        FileNotFoundError: There is no such file; near names are given.
        ValueError: No table, columns that are not there (says what each holds), rows that cannot be used, fewer than
            two classes.
        ImportError: Parquet without pyarrow.
    """
    table, file = read_table(path, kind)
    where = f"{kind}:{path}"
    found = options.columns.of(table, ("path", "label"), where)
    names = _paths(table, found["path"])
    root = options.columns.root or file.parent
    source = FileImages([root / name for name in names], reading=options.reading)
    broken = {row: "no path" for row, name in enumerate(names) if not name}
    if kind == "parquet":
        outside = {row: outside_reason(image, [root]) for row, image in enumerate(source.paths) if row not in broken}
        broken |= {row: reason for row, reason in outside.items() if reason}
    broken |= {
        row: "no such file" for row, image in enumerate(source.paths) if row not in broken and not image.is_file()
    }
    samples = Samples.of_table(file.stem, where, source, names, table, found)
    samples.broken = broken
    return collection_of(samples, options)


def collection_of(samples: Samples, options: RowOptions) -> Collection:
    """Images with labels, weights and groups, in the parts that their rows name.

    Labels become class numbers (`class`), or strata that splits are made by: the rarest label of an image (`labels`),
    or one of ten ranges of the first number (`numbers`). What stands in the label column is kept in
    `ImageDataset.annotations`.

    Args:
        samples: The rows.
        options: How they are read.

    Raises:
        ValueError: Rows that cannot be used (counted and named), unknown parts, no training images, fewer than two
            classes, or labels of another kind than `target`.
    """
    parts, target = _parts(samples), options.target
    values, broken = _targets(samples, target)
    weights = None if samples.weights is None else [_number(value) for value in samples.weights]
    for row, weight in enumerate(samples.weights or []):
        if not 0 <= _number(weight) <= _MOST_WEIGHT:
            broken[row] = f"weight {weight!r} is not in [0, {_MOST_WEIGHT:g}]"
    broken |= samples.broken
    usable = [row for row in range(len(samples.names)) if row not in broken]
    broken |= broken_rows(samples.source, usable)
    notes = list(samples.notes)
    if broken:
        if not options.skip_corrupt:
            raise ValueError(
                f"{_broken_text(broken, samples)}. Fix or remove them, or leave them out with --skip-corrupt "
                "(skip_corrupt=True)"
            )
        notes.append(f"left out {_broken_text(broken, samples)}")
    rows = [row for row in usable if row not in broken]
    rows = _without_repetitions(rows, samples, values, notes)
    if not rows:
        reason = f"none can be used: {_broken_text(broken, samples)}" if broken else f"got {len(samples.names)} rows"
        raise ValueError(f"{samples.where} holds no image to train on, {reason}")
    numbers, classes, strata = _labels(rows, samples, values, target)
    if target == "class":
        _check_classes(classes, numbers, rows, parts, samples)
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
        labels, names = [numbers[row] for row in chosen], [samples.names[row] for row in chosen]
        return ImageDataset(samples.source, chosen, labels, names, annotations=annotations)

    train = dataset("train")
    if train is None:
        raise ValueError(
            f"{samples.where} has no training image, got parts {listed(sorted(set(parts)))}; "
            "columns split=none divides all images anew"
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
    """The columns of a table, and its file.

    Args:
        path: As typed; a CSV's values are strings, with tabs, `;` or `,` between them.
        kind: csv or parquet.

    Raises:
        FileNotFoundError: There is no such file; near names are given.
        ValueError: It is no such table, is empty, has two columns of one name, or lines of other lengths.
        ImportError: Parquet without pyarrow.
    """
    file = Path(path).expanduser()
    if not path.strip() or not file.is_file():
        names = [p.name for p in file.parent.iterdir() if p.suffix in TABLE_SUFFIXES] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.4)
        hint = (
            f"nearest there: {', '.join(map(repr, near))}"
            if near
            else f"write {kind}:FILE, e.g. {kind}:photos/labels.{kind}"
        )
        got = "is a folder" if path.strip() and file.is_dir() else "is not there"
        raise FileNotFoundError(f"data must name a table, got {kind}:{path}, which {got}; {hint}")
    file = file.absolute()
    table = _read_parquet(file) if kind == "parquet" else _read_csv(file)
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"{kind}:{path} must hold a row an image, got an empty table")
    return table, file


def outside_reason(path: Path, roots: Sequence[Path]) -> str:
    """Why a row may not name a file: it lies in none of some folders; empty where it lies in one, links followed.

    Args:
        path: The file that the row names.
        roots: The folders.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name with a zero byte
        return f"no such file: {error}"
    if any(resolved.is_relative_to(root.resolve()) for root in roots):
        return ""
    return f"{str(resolved)!r} is outside of {str(roots[0])!r}, which --columns root=FOLDER widens"


def table_paths(path: str | Path, columns: Columns) -> list[Path]:
    """The image files that a table names, in its order, relative where the table's own path is.

    Args:
        path: Of a CSV or Parquet file.
        columns: Which column holds the paths.

    Raises:
        FileNotFoundError: There is no such table.
        ValueError: It has no such column, or a Parquet file names an image outside of its folder or `columns.root`.
    """
    kind = "parquet" if Path(path).suffix == ".parquet" else "csv"
    table, _ = read_table(str(path), kind)
    found = columns.of(table, ("path",), str(path))
    folder = columns.root or Path(path).expanduser().parent
    paths = [folder / name for name in _paths(table, found["path"]) if name]
    reasons = (outside_reason(image, [folder]) for image in paths) if kind == "parquet" else ()
    if reason := next(filter(None, reasons), None):
        raise ValueError(f"{path} must name images below its folder, got one that does not: {reason}")
    return paths


def _read_csv(file: Path) -> dict[str, list[Any]]:
    """The columns of a CSV file as strings."""
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
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"'{file}' must have one column of each name, got {listed([repr(name) for name in twice])} twice"
        )
    wrong = [f"row {number} has {len(row)}" for number, row in enumerate(rows, 1) if len(row) != len(names)]
    if wrong:
        raise ValueError(
            f"'{file}' must have {len(names)} values a line, one for each of {listed(names)}, but "
            f"{listed(wrong)}; put values with {delimiter!r} inside in quotes"
        )
    return {name: [row[index].strip() for row in rows] for index, name in enumerate(names)}


def _read_parquet(file: Path) -> dict[str, list[Any]]:
    """The columns of a Parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"'{file}' needs pyarrow; pip install 'snella[data]'") from error
    try:
        table: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last two of times out of range
        raise ValueError(f"'{file}' must be a Parquet file: {str(error).splitlines()[0]}") from error
    return table


def _columns_in(role: str, given: str) -> list[str]:
    """The columns that a value of `--columns` names."""
    if role == "path" and "{" in given:
        return re.findall(r"\{([^{}]*)\}", given)
    return given.split("+") if role == "label" else [given]


def _paths(table: Mapping[str, Sequence[Any]], column: str) -> list[str]:
    """The paths as they stand in a column, or made of several; empty where there is none."""
    if "{" not in column:
        return [_text(value) for value in table[column]]
    parts = re.split(r"\{([^{}]*)\}", column)
    texts = [[_text(value) for value in table[name]] for name in parts[1::2]]
    made = []
    for row in zip(*texts, strict=True):
        between = [piece for pair in zip(parts[::2], (*row, ""), strict=True) for piece in pair]
        made.append("".join(between) if all(row) else "")
    return made


def _text(value: Any) -> str:
    """A value as text: whole numbers without a point, nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(value: Any) -> float:
    """A value as a number, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _described(table: Mapping[str, Sequence[Any]]) -> str:
    """What each column holds: name, kind and three examples."""
    texts = []
    for name, values in table.items():
        there = [value for value in values if not isinstance(value, str) or value]
        there = [value for value in there if value is not None]
        shown = ", ".join(
            f"{text[:40]}…" if len(text) > 40 else text
            for text in map(repr, list(dict.fromkeys(map(_shown, there)))[:_EXAMPLES])
        )
        texts.append(f"{name!r} ({_kind(there)}{': ' if shown else ''}{shown})")
    return ", ".join(texts)


def _shown(value: Any) -> str:
    """A value for an error."""
    return "|".join(map(str, value)) if isinstance(value, list | tuple) else _text(value)


def _kind(values: Sequence[Any]) -> str:
    """What the values of a column are."""
    if not values:
        return "empty"
    if isinstance(values[0], list | tuple):
        return "lists"
    numbers = [_number(value) for value in values]
    if any(math.isnan(number) for number in numbers):
        return "text"
    return "integers" if all(number.is_integer() for number in numbers) else "numbers"


def _parts(samples: Samples) -> list[str]:
    """The part of each row, all `train` where the data is not divided."""
    if samples.splits is None:
        return ["train"] * len(samples.names)
    texts = [_text(value) for value in samples.splits]
    unknown = Counter(text for text in texts if text.lower() not in PARTS)
    if unknown:
        named = listed([f"{text!r} ({count} rows)" for text, count in unknown.most_common()])
        raise ValueError(
            f"{samples.where}: the split column must hold {', '.join(sorted(PARTS))}, got {named}; "
            "columns split=none divides all images anew"
        )
    return [PARTS[text.lower()] for text in texts]


def _targets(samples: Samples, target: TargetKind) -> tuple[list[Target], dict[int, str]]:
    """What the label column says of each row, and the rows where it says nothing that can be used."""
    if target == "numbers":
        return _numbers(samples)
    if target == "labels":
        return list(_label_lists(samples)), {}
    if len(samples.label_columns) > 1:
        raise ValueError(
            f"{samples.where}: columns must name one label column for one class an image, got "
            f"{'+'.join(samples.label_columns)}"
        )
    row = next((row for row, value in enumerate(samples.labels) if isinstance(value, list | tuple)), None)
    if row is not None:
        raise ValueError(
            f"{samples.where}: column {samples.label_columns[0]!r} must hold one class an image, got the list "
            f"{_shown(samples.labels[row])!r} in row {row + 1}; several labels an image are --task multilabel"
        )
    texts = [_text(value) for value in samples.labels]
    return list(texts), {row: "no label" for row, text in enumerate(texts) if not text}


def _numbers(samples: Samples) -> tuple[list[Target], dict[int, str]]:
    """A number a row, or a tuple of those of several columns."""
    values: list[Target] = []
    broken = {}
    for row, value in enumerate(samples.labels):
        is_one = not isinstance(value, list | tuple)
        numbers = tuple(_number(part) for part in ([value] if is_one else value))
        if not all(map(math.isfinite, numbers)):
            broken[row] = f"label {_shown(value)!r} is not a number"
        values.append(numbers[0] if is_one else numbers)
    if broken and len(broken) == len(values):
        names = " and ".join(map(repr, samples.label_columns))
        raise ValueError(
            f"{samples.where}: column {names} must hold numbers for task regression, got {_shown(samples.labels[0])!r} "
            f"in row 1 and no number in {len(values)} rows; name another column with --columns label=NAME, or leave "
            "--task regression out"
        )
    return values, broken


def _label_lists(samples: Samples) -> Iterable[tuple[str, ...]]:
    """The labels of each row: a list, a text with separators, or several columns of zeros and ones."""
    if len(samples.label_columns) > 1:
        for row, value in enumerate(samples.labels):
            texts = [_text(part).lower() for part in value]
            odd = [text for text in texts if text not in (*_TRUE, *_FALSE)]
            if odd:
                raise ValueError(
                    f"{samples.where}: several label columns must hold 0 and 1, got {odd[0]!r} in row {row + 1}"
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
    """Class or stratum of each row, names of the classes, and those of the strata where they are others."""
    if target == "numbers":
        first = np.array([values[row] if isinstance(values[row], float) else values[row][0] for row in rows])
        bins = max(1, min(_BINS, len(rows) // _BINS))
        edges = np.unique(np.quantile(first, np.linspace(0, 1, bins + 1)[1:-1])) if bins > 1 else np.array([])
        in_range = np.bincount(np.digitize(first, edges), minlength=len(edges) + 1)
        while len(edges) and in_range.min() < _LEAST_IN_STRATUM:  # many equal numbers: a range joins its neighbor
            edges = np.delete(edges, max(int(in_range.argmin()) - 1, 0))
            in_range = np.bincount(np.digitize(first, edges), minlength=len(edges) + 1)
        strata = np.digitize(first, edges)
        return dict(zip(rows, strata.tolist(), strict=True)), samples.label_columns, _ranges(edges)
    if target == "labels":
        counts = Counter(label for row in rows for label in values[row])
        classes = samples.classes or _in_order(counts)
        rarest = {row: min(values[row], key=lambda name: (counts[name], name), default=_NONE) for row in rows}
        sizes = Counter(rarest.values())
        names = [name for name in _in_order(sizes) if sizes[name] >= _LEAST_IN_STRATUM]
        few = sum(size for name, size in sizes.items() if name not in names)
        has_others = few >= _LEAST_IN_STRATUM or not names
        rest = len(names) if has_others else names.index(max(names, key=sizes.__getitem__))
        strata_names = [*names, "others"] if has_others and few else names
        return (
            {row: names.index(name) if name in names else rest for row, name in rarest.items()},
            classes,
            strata_names,
        )
    known = samples.classes or _in_order({values[row] for row in rows})
    index = {name: number for number, name in enumerate(known)}
    return {row: index[values[row]] for row in rows}, known, None


def _ranges(edges: np.ndarray) -> list[str]:
    """Names of the ranges between edges."""
    texts = [f"{edge:g}" for edge in edges]
    return [f"{low} to {high}" for low, high in zip(["lowest", *texts], [*texts, "highest"], strict=True)]


def _in_order(names: Iterable[str]) -> list[str]:
    """Class names in order: numbers by their value, others by the alphabet."""
    unique = set(names)
    is_numeric = not any(math.isnan(_number(name)) for name in unique)
    return sorted(unique, key=lambda name: (_number(name) if is_numeric else 0.0, name))


def _check_classes(
    classes: Sequence[str], numbers: Mapping[int, int], rows: Sequence[int], parts: Sequence[str], samples: Samples
) -> None:
    """Refuse fewer than two classes, numbers that look like a quantity, and classes that training does not have."""
    if len(classes) < 2:
        raise ValueError(
            f"{samples.where}: at least two classes are needed, column {samples.label_columns[0]!r} holds one: "
            f"{classes[0]!r}"
        )
    if len(classes) > max(len(rows) / 2, _FEW_CLASSES):
        raise ValueError(
            f"{samples.where}: column {samples.label_columns[0]!r} must hold classes, got {len(classes)} different "
            f"values in {len(rows)} rows, e.g. {', '.join(map(repr, classes[:_EXAMPLES]))}; name another column with "
            "--columns label=NAME"
        )
    trained = {numbers[row] for row in rows if parts[row] == "train"}
    counts = Counter(classes[numbers[row]] for row in rows if numbers[row] not in trained)
    if counts and trained:
        named = listed([f"{name!r} ({count} in other parts)" for name, count in sorted(counts.items())])
        raise ValueError(
            f"{samples.where}: {len(counts)} of {len(classes)} classes have no training image: {named}; add training "
            "images of them, remove their rows, or divide all images anew with --columns split=none"
        )


def _without_repetitions(rows: list[int], samples: Samples, values: Sequence[Any], notes: list[str]) -> list[int]:
    """The rows without those that name an image of the same part again; notes about these and about contradictions."""
    parts = _parts(samples)
    first: dict[tuple[str, str], int] = {}
    kept, again, contradicting = [], 0, []
    for row in rows:
        key = (samples.names[row], parts[row])
        before = first.setdefault(key, row)
        if before == row:
            kept.append(row)
        elif values[before] == values[row]:
            again += 1
        else:
            kept.append(row)
            contradicting.append(f"{samples.names[row]} ({_shown(values[before])}, {_shown(values[row])})")
    if again:
        notes.append(f"left out {again} rows that repeat others")
    if contradicting:
        notes.append(
            f"{len(contradicting)} rows give an image another label than an earlier row: {listed(contradicting)}"
        )
    return kept


def _broken_text(broken: Mapping[int, str], samples: Samples) -> str:
    """How many rows cannot be used, why, and the first of them."""
    kinds = Counter(_error_kind(reason) for reason in broken.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    named = listed([f"{samples.names[row] or f'row {row + 1}'} ({broken[row]})" for row in sorted(broken)])
    return f"{len(broken)} of {len(samples.names)} rows of {samples.where}, {counts}: {named}"


_SIMPLE = ("no path", "no such file", "no label")


def _error_kind(reason: str) -> str:
    """What is wrong with a row, in a word or two."""
    if reason in _SIMPLE:
        return reason
    return {"weight": "wrong weight", "label": "wrong label"}.get(reason.partition(" ")[0], "unreadable")
