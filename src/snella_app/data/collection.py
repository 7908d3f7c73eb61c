"""Conversion of table rows (images with the values of named columns) to a `Collection`.

Splits are stratified by class. For regression and multi-label data, strata replace the classes: ranges of a number, or
the rarest label of an image.
"""

import ast
import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snella_app.console import counted
from snella_app.data.columns import columns_in, format_value, number_of, text_of
from snella_app.data.datasets import Annotations, Collection, ImageDataset, Target
from snella_app.data.folder import PARTS
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import CachedImages, broken_rows
from snella_app.text import listed

_SEPARATORS = ("|", ";", ",")
"""Separators of several labels in a text. The first of them that occurs in the column is used."""
_TRUE = ("1", "1.0", "true", "yes")
_FALSE = ("0", "0.0", "false", "no", "", "-1")
_BINS = 10
"""Maximum number of strata for numeric targets, and minimum average number of rows per stratum."""
_FEW_CLASSES = 20
"""Number of classes that is accepted regardless of the number of images."""
_MIN_IN_STRATUM = 3
"""Minimum number of rows in a stratum, enough for one row in each split."""
_MAX_WEIGHT = 1e9  # Adam squares gradients, which scale with the weights, in float32


@dataclass
class Samples:
    """Raw rows of a table, before conversion to a `Collection`.

    Attributes:
        name: Short name of the data.
        where: Data as the user typed it, for messages.
        source: Images, one per row.
        names: Name of each image.
        table: Values by column.
        roles: Column name by role, as returned by `Columns.resolve`. The role `label` is required.
        classes: Class names by index, if the data defines them.
        broken: Reason for each row that is known to be unusable before labels and images are checked.
        notes: Notes for the user.
    """

    name: str
    where: str
    source: CachedImages
    names: list[str]
    table: Mapping[str, Sequence[Any]]
    roles: Mapping[str, str]
    classes: list[str] | None = None
    broken: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def label_columns(self) -> list[str]:
        """Names of the label columns."""
        return columns_in("label", self.roles["label"], self.table)

    @property
    def labels(self) -> list[Any]:
        """Raw values of the label column, or tuples of values if there are several label columns."""
        columns = [self.table[name] for name in self.label_columns]
        return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))

    @property
    def has_columns(self) -> bool:
        """True if `--columns` applies, which is not the case for torch datasets."""
        return "path" in self.roles

    def column(self, role: str) -> Sequence[Any] | None:
        """Return the raw values of the column with this role, or None if no column has it."""
        return self.table[self.roles[role]] if role in self.roles else None


def build_collection(samples: Samples, config: DataConfig, target: TargetKind) -> Collection:
    """Convert rows to images with labels, weights and groups in their splits.

    For the target `class`, `ImageDataset.labels` contains class indices. Otherwise, it contains indices of strata: the
    rarest label of an image (`labels`), or one of up to ten ranges of the first number (`numbers`).
    `ImageDataset.annotations` contains the labels themselves, the weights and the groups.

    Args:
        samples: Raw rows.
        config: Only `skip_corrupt` applies.
        target: Content of the label column.

    Raises:
        ValueError: If rows are unusable and `skip_corrupt` is not set, splits are unknown, there are no training images
            in total or for a class, all training weights are 0, or labels do not match `target`.
        ImportError: If tifffile is required but not installed.
    """
    split_names = _split_names(samples)
    values, broken = _targets(samples, target)
    raw_weights = samples.column("weight")
    raw_groups = samples.column("group")
    weights = None if raw_weights is None else [number_of(value) for value in raw_weights]
    for row, value in enumerate(raw_weights or []):
        if not 0 <= number_of(value) <= _MAX_WEIGHT:
            broken[row] = f"weight {value!r} is not in [0, {_MAX_WEIGHT:g}]"
    broken |= samples.broken
    usable = [row for row in range(len(samples.names)) if row not in broken]
    broken |= broken_rows(samples.source, usable)
    notes = list(samples.notes)
    if samples.has_columns:
        roles = ", ".join(f"{role} {column!r}" for role, column in samples.roles.items())
        notes.append(f"columns: {roles}")
    if broken:
        if not config.skip_corrupt:
            raise ValueError(
                f"{_broken_text(broken, samples)}. Fix or remove them, or skip them with --skip-corrupt "
                "(skip_corrupt=True)"
            )
        notes.append(f"skipped {_broken_text(broken, samples)}")
    rows = [row for row in usable if row not in broken]
    rows = _drop_duplicates(rows, samples, split_names, values, notes)
    if not rows:
        reason = f"all are unusable: {_broken_text(broken, samples)}" if broken else f"got {len(samples.names)} rows"
        raise ValueError(f"{samples.where} has no images to train on; {reason}")
    indices, classes, strata = _labels(rows, samples, values, target)
    problems: list[str] = []
    if target == "class":
        problems = _check_classes(classes, indices, rows, split_names, samples)
    elif not classes:
        columns = " and ".join(map(repr, samples.label_columns))
        problems = [f"{samples.where}: at least one label is required, got none in column {columns}"]
    groups: list[str] | None = None
    if raw_groups is not None:
        groups = [text_of(value) or f"(row {row + 1})" for row, value in enumerate(raw_groups)]
    annotations = Annotations(values, weights, groups).subset(rows)
    labels = [indices[row] for row in rows]
    names = [samples.names[row] for row in rows]
    images = ImageDataset(samples.source, rows, labels, names, annotations)
    splits: dict[str, ImageDataset] = {}
    for part in ("train", "val", "test"):
        positions = [position for position, row in enumerate(rows) if split_names[row] == part]
        if positions:
            splits[part] = images.subset(positions)
    if "train" not in splits:
        raise ValueError(
            f"{samples.where} has no training images, got splits {listed(sorted(set(split_names)))}; "
            "--columns split=none creates new splits"
        )
    train = splits["train"]
    if train.annotations.weights is not None and not any(train.annotations.weights):
        raise ValueError(
            f"{samples.where}: at least one training image must have a weight above 0, got 0 for all {len(train)}; "
            "--columns weight=none ignores the column"
        )
    return Collection(
        samples.name,
        classes,
        train,
        splits.get("val"),
        splits.get("test"),
        has_parts="split" in samples.roles,
        notes=notes,
        strata=strata,
        broken=_by_unique_name(samples.names, broken),
        problems=problems,
    )


def unordered(target: Target) -> Any:
    """Return a tuple of labels as a set, because their order is irrelevant, and any other target unchanged."""
    if isinstance(target, tuple) and all(isinstance(label, str) for label in target):
        return frozenset(target)
    return target


def _by_unique_name(names: Sequence[str], broken: Mapping[int, str]) -> dict[str, str]:
    """Return the reason for each unusable row by image name.

    The row number replaces an empty name, and makes repeated names unique.
    """
    counts = Counter(names[row] for row in broken)
    reasons: dict[str, str] = {}
    for row in sorted(broken):
        name = names[row]
        if not name:
            key = f"row {row + 1}"
        elif counts[name] > 1:
            key = f"{name} in row {row + 1}"
        else:
            key = name
        reasons[key] = broken[row]
    return reasons


def _split_names(samples: Samples) -> list[str]:
    """Return the split of each row, which is `train` for all rows of data without splits."""
    splits = samples.column("split")
    if splits is None:
        return ["train"] * len(samples.names)
    texts = [text_of(value) for value in splits]
    unknown = Counter(text for text in texts if text.lower() not in PARTS)
    if unknown:
        named = listed([f"{text!r} ({counted(count, 'row')})" for text, count in unknown.most_common()])
        raise ValueError(
            f"{samples.where}: values of the split column must be {', '.join(sorted(PARTS))}, got {named}; "
            "--columns split=none creates new splits"
        )
    return [PARTS[text.lower()] for text in texts]


def _targets(samples: Samples, target: TargetKind) -> tuple[list[Target], dict[int, str]]:
    """Return the target of each row, and the reason for each unusable row."""
    if target == "numbers":
        return _numbers(samples)
    if target == "labels":
        return _label_lists(samples)
    if len(samples.label_columns) > 1:
        raise ValueError(
            f"{samples.where}: columns must name one label column for classification, got "
            f"{'+'.join(samples.label_columns)}"
        )
    list_row = next((row for row, value in enumerate(samples.labels) if isinstance(value, list | tuple)), None)
    if list_row is not None:
        raise ValueError(
            f"{samples.where}: column {samples.label_columns[0]!r} must contain one class per image, got the list "
            f"{format_value(samples.labels[list_row])!r} in row {list_row + 1}; use --task multilabel for several "
            "labels per image"
        )
    texts = [text_of(value) for value in samples.labels]
    return list(texts), {row: "no label" for row, text in enumerate(texts) if not text}


def _numbers(samples: Samples) -> tuple[list[Target], dict[int, str]]:
    """Return the number of each row (a tuple for several columns), and the reason for each unusable row."""
    values: list[Target] = []
    broken = {}
    for row, value in enumerate(samples.labels):
        is_scalar = not isinstance(value, list | tuple)
        numbers = tuple(number_of(part) for part in ([value] if is_scalar else value))
        if len(numbers) != len(samples.label_columns) or not all(map(math.isfinite, numbers)):
            broken[row] = f"label {format_value(value)!r} is not a finite number"
        values.append(numbers[0] if is_scalar else numbers)
    if broken and len(broken) == len(values):
        names = " and ".join(map(repr, samples.label_columns))
        raise ValueError(
            f"{samples.where}: column {names} must contain numbers for the regression task, got "
            f"{format_value(samples.labels[0])!r} in row 1 and no number in any "
            f"of {len(values)} rows; select another column with --columns label=NAME, or remove --task regression"
        )
    return values, broken


def _label_lists(samples: Samples) -> tuple[list[Target], dict[int, str]]:
    """Return the labels of each row, from a list, a class name, text with separators, or several 0/1 columns.

    Also return the reason for each unusable row.
    """
    if len(samples.label_columns) > 1:
        return _binary_columns(samples)
    values: list[Any] = []
    for raw_value in samples.labels:
        value = _parsed_list(raw_value)
        is_missing = not isinstance(value, list | tuple) and not text_of(value)
        values.append(() if is_missing else value)  # a row without a value has no labels
    nonempty_values = [value for value in values if not isinstance(value, list | tuple) or value]
    names = _multi_hot_names(nonempty_values, samples.classes)
    labels: list[Target] = []
    if names is not None:
        for value in values:
            labels.append(tuple(names[index] for index, is_set in enumerate(value) if is_set))
        return labels, {}
    classes = samples.classes or ()
    texts = [value for value in values if isinstance(value, str) and value not in classes]
    used_separators = (separator for separator in _SEPARATORS if any(separator in text for text in texts))
    separator = next(used_separators, _SEPARATORS[0])
    for value in values:
        items: Sequence[Any]
        if isinstance(value, list | tuple):
            items = value
        elif value in classes:
            items = [value]
        else:
            items = text_of(value).split(separator)
        unique_names = dict.fromkeys(filter(None, map(text_of, items)))
        labels.append(tuple(unique_names))
    return labels, {}


def _binary_columns(samples: Samples) -> tuple[list[Target], dict[int, str]]:
    """Return the names of the label columns that are 1 in each row, and the reason for each unusable row."""
    labels: list[Target] = []
    broken: dict[int, str] = {}
    first_invalid = ""
    for row, value in enumerate(samples.labels):
        texts = list(map(text_of, value))
        invalid = next((text for text in texts if text.lower() not in (*_TRUE, *_FALSE)), None)
        if invalid is not None:
            broken[row] = f"label {invalid!r} is not 0 or 1"
            first_invalid = first_invalid or invalid
        labels.append(
            tuple(name for name, text in zip(samples.label_columns, texts, strict=True) if text.lower() in _TRUE)
        )
    if broken and len(broken) == len(labels):
        raise ValueError(
            f"{samples.where}: multiple label columns must contain only 0 and 1, got {first_invalid!r} in row 1 and "
            "no valid row"
        )
    return labels, broken


def _parsed_list(value: Any) -> Any:
    """Parse a list or NumPy array that pandas has written to CSV; return other values unchanged."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        # NumPy separates entries by spaces; Python would join adjacent strings
        gap = r"(?<=['\"])\s+(?=['\"])" if "'" in value or '"' in value else r"(?<=[\d.])\s+(?=[\d-])"
        text = re.sub(gap, ", ", value) if "," not in value else value
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    return value


def _multi_hot_names(values: Sequence[Any], classes: Sequence[str] | None) -> Sequence[str] | None:
    """Return the class names, or indices as names, if all values are 0/1 lists of equal length.

    Returns None otherwise.
    """
    is_list = all(isinstance(value, list | tuple) and len(value) > 1 for value in values)
    if not is_list or len({len(value) for value in values}) != 1:
        return None
    if not all(isinstance(entry, int | float) and entry in (0, 1) for value in values for entry in value):
        return None
    count = len(values[0])
    if classes is not None and len(classes) == count:
        return classes
    return [str(index) for index in range(count)]


def _labels(
    rows: Sequence[int], samples: Samples, values: Sequence[Any], target: TargetKind
) -> tuple[dict[int, int], list[str], list[str] | None]:
    """Return the index of each row's class or stratum, the class names, and the stratum names.

    The stratum names are None if the classes are the strata.
    """
    if target == "numbers":
        first_numbers: list[float] = []
        for row in rows:
            value = values[row]
            first_numbers.append(value if isinstance(value, float) else value[0])
        numbers = np.array(first_numbers)
        bins = max(1, min(_BINS, len(rows) // _BINS))
        edges: np.ndarray = np.array([])
        if bins > 1:
            fractions = np.linspace(0, 1, bins + 1)[1:-1]
            edges = np.unique(np.quantile(numbers, fractions))
        in_range = np.bincount(np.digitize(numbers, edges), minlength=len(edges) + 1)
        while len(edges) and in_range.min() < _MIN_IN_STRATUM:  # merge small ranges caused by ties
            edges = np.delete(edges, max(int(in_range.argmin()) - 1, 0))
            in_range = np.bincount(np.digitize(numbers, edges), minlength=len(edges) + 1)
        strata = np.digitize(numbers, edges)
        return dict(zip(rows, strata.tolist(), strict=True)), samples.label_columns, _ranges(edges)
    if target == "labels":
        counts = Counter(label for row in rows for label in values[row])
        classes = samples.classes or []
        if not set(counts) <= set(classes):
            classes = _sort_names(counts)
        strata_of_rows, strata_names = rarest_label_strata({row: values[row] for row in rows})
        return strata_of_rows, classes, strata_names
    known = samples.classes or _sort_names({values[row] for row in rows})
    index = {name: number for number, name in enumerate(known)}
    unknown_row = next((row for row in rows if values[row] not in index), None)
    if unknown_row is not None:
        raise ValueError(
            f"{samples.where}: classes of all splits must be {listed(known)}, got {values[unknown_row]!r} in "
            f"{samples.names[unknown_row]}"
        )
    return {row: index[values[row]] for row in rows}, known, None


def rarest_label_strata(labels: Mapping[Any, Sequence[str]]) -> tuple[dict[Any, int], list[str]]:
    """Assign each image to the stratum of its rarest label, or to the stratum `none` if it has no label.

    Strata with fewer than three images are merged. If the result is still too small, it joins the largest stratum.

    Args:
        labels: Labels by image.

    Returns:
        Stratum index by image, and the names of the strata.
    """
    counts = Counter(label for names in labels.values() for label in names)
    rarest = {
        image: min(names, key=lambda name: (counts[name], name), default="none") for image, names in labels.items()
    }
    sizes = Counter(rarest.values())
    names = [name for name in _sort_names(sizes) if sizes[name] >= _MIN_IN_STRATUM]
    others_size = sum(size for name, size in sizes.items() if name not in names)
    has_others = others_size >= _MIN_IN_STRATUM or not names
    others_index = len(names)
    if not has_others:
        others_index = names.index(max(names, key=sizes.__getitem__))
    strata_names = [*names, "others"] if has_others and others_size else names
    stratum_indices = {name: number for number, name in enumerate(names)}
    return {image: stratum_indices.get(name, others_index) for image, name in rarest.items()}, strata_names


def _ranges(edges: np.ndarray) -> list[str]:
    """Return names of the ranges between edges, e.g. `lowest to 1` and `1 to highest` for the edge 1."""
    texts = [f"{edge:g}" for edge in edges]
    return [f"{low} to {high}" for low, high in zip(["lowest", *texts], [*texts, "highest"], strict=True)]


def _sort_names(names: Iterable[str]) -> list[str]:
    """Sort class names numerically if all are numbers, else alphabetically."""
    unique = set(names)
    is_numeric = not any(math.isnan(number_of(name)) for name in unique)
    return sorted(unique, key=lambda name: (number_of(name) if is_numeric else 0.0, name))


def _check_classes(
    classes: Sequence[str],
    indices: Mapping[int, int],
    rows: Sequence[int],
    split_names: Sequence[str],
    samples: Samples,
) -> list[str]:
    """Return `Collection.problems`, or raise ValueError if a class has images but no training images."""
    problems = []
    if len(classes) < 2:
        problems.append(
            f"{samples.where}: at least two classes are required; column {samples.label_columns[0]!r} has one: "
            f"{classes[0]!r}"
        )
    present = sorted({indices[row] for row in rows})
    if len(present) > max(len(rows) / 2, _FEW_CLASSES):
        examples = ", ".join(repr(classes[index]) for index in present[:3])
        remedy = "for numbers, set --task regression"
        if samples.has_columns:
            remedy = "select another column with --columns label=NAME"
        problems.append(
            f"{samples.where}: column {samples.label_columns[0]!r} must contain classes, got {len(present)} different "
            f"values in {len(rows)} rows, e.g. {examples}; {remedy}"
        )
    train_classes = {indices[row] for row in rows if split_names[row] == "train"}
    counts = Counter(classes[indices[row]] for row in rows if indices[row] not in train_classes)
    if counts and train_classes:
        named = listed([f"{name!r} ({count} in other splits)" for name, count in sorted(counts.items())])
        remedy = "add training images or remove these classes"
        if samples.has_columns:
            remedy = "add training images, remove their rows, or create new splits with --columns split=none"
        raise ValueError(
            f"{samples.where}: {len(counts)} of {len(classes)} classes have no training image: {named}; {remedy}"
        )
    return problems


def _drop_duplicates(
    rows: list[int], samples: Samples, split_names: Sequence[str], values: Sequence[Any], notes: list[str]
) -> list[int]:
    """Return the rows without those that repeat an image and its label within a split, and add notes.

    Rows that repeat an image with a different label are kept and listed in a note.
    """
    kept: dict[tuple[str, str], list[int]] = {}
    unique = []
    repeated = 0
    contradicting = []
    for row in rows:
        earlier = kept.setdefault((samples.names[row], split_names[row]), [])
        if any(unordered(values[other]) == unordered(values[row]) for other in earlier):
            repeated += 1
            continue
        if earlier:
            texts = ", ".join(format_value(values[other]) for other in (earlier[0], row))
            contradicting.append(f"{samples.names[row]} ({texts})")
        earlier.append(row)
        unique.append(row)
    if repeated:
        notes.append(f"skipped {counted(repeated, 'repeated row')}")
    if contradicting:
        notes.append(
            f"{counted(len(contradicting), 'row')} with a different label than an earlier row: {listed(contradicting)}"
        )
    return unique


_KINDS = {
    **{reason: reason for reason in ("no path", "no such file", "no label")},
    **{"weight": "invalid weight", "label": "invalid label"},
}
"""Category of a row's error, by the reason or its first word."""


def _broken_text(broken: Mapping[int, str], samples: Samples) -> str:
    """Summarize unusable rows with count, reasons and examples."""
    kinds = Counter(
        _KINDS.get(reason, _KINDS.get(reason.partition(" ")[0], "unreadable")) for reason in broken.values()
    )
    most_frequent_first = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(f"{count} {kind}" for kind, count in most_frequent_first)
    examples: list[str] = []
    for row in sorted(broken):
        name = samples.names[row] or f"row {row + 1}"
        examples.append(f"{name} ({broken[row]})")
    return f"{len(broken)} of {len(samples.names)} rows of {samples.where}, {counts}: {listed(examples)}"
