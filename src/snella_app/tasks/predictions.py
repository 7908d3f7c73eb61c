"""Predictions for images outside a dataset, and their output as text, tables or masks."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella_app.data.images import read_image
from snella_app.files import check_new, create_folder, write_bytes, write_png
from snella_app.records.record import plain
from snella_app.report.examples import mask_image, overlay, png_data_uri, write_mask
from snella_app.text import utf8_text

_OVERLAYS = "overlays"


@dataclass(frozen=True)
class MaskPrediction:
    """Predicted mask of one image at the image's resolution.

    Attributes:
        path: Image file, or position as for `Prediction`.
        labels: `[height, width]`, uint8.
        classes: Class names by label.
    """

    path: Path
    labels: np.ndarray
    classes: list[str]

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of pixels by class."""
        counts = np.bincount(self.labels.reshape(-1), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.labels.size).tolist(), strict=True))

    def text(self, top_k: int | None = None) -> str:
        """Format the nonzero class fractions as one line, largest first."""
        shares = sorted(self.shares.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{name} {share:.1%}" for name, share in shares if share > 0)

    def fields(self) -> dict[str, Any]:
        """Return `shares`, and the labels as a palette PNG in a data URI (`mask`)."""
        return {"shares": _rounded(self.shares), "mask": png_data_uri(mask_image(self.labels), optimize=False)}


def write_mask_predictions(
    predictions: Iterable[MaskPrediction], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
) -> Path:
    """Write each mask as a palette PNG of labels, `OUT/NAME.png`, and an overlay on its image, `OUT/overlays/NAME.png`.

    Predictions are consumed lazily. `top_k` must be None; only single-label, multi-label, and ordinal tasks support it.

    Raises:
        FileExistsError: If the folder is not empty, unless `overwrite` is set.
        ValueError: If `out` is a file, `top_k` is set, a mask would replace its image, or two images have the same name
            apart from folder and suffix.
    """
    check_mask_output(out, top_k, overwrite=overwrite)
    folder = Path(out)
    (folder / _OVERLAYS).mkdir(parents=True, exist_ok=True)
    names: dict[str, Path] = {}
    for prediction in predictions:
        add_mask_name(names, prediction.path)
        _check_mask_path(folder, prediction.path)
        name = f"{prediction.path.stem}.png"
        write_mask(prediction.labels, folder / name)
        write_png(folder / _OVERLAYS / name, overlay(read_image(prediction.path), prediction.labels))
    return folder


def check_mask_names(images: Sequence[Path], out: str | Path) -> None:
    """Raise ValueError if the masks of two images would have the same name, or a mask would replace its image."""
    names: dict[str, Path] = {}
    for image in images:
        add_mask_name(names, image)
        _check_mask_path(Path(out), image)


def _check_mask_path(folder: Path, image: Path) -> None:
    """Raise ValueError if the mask or overlay of an image would replace the image."""
    name = f"{image.stem}.png"
    if image.resolve() in ((folder / name).resolve(), (folder / _OVERLAYS / name).resolve()):
        raise ValueError(f"out={folder} contains {image}, which its mask would replace; choose another folder")


def add_mask_name(names: dict[str, Path], image: Path) -> None:
    """Add the stem of an image to `names`; raise ValueError if another image has it."""
    other = names.setdefault(image.stem, image)
    if other is not image and other.resolve() == image.resolve():
        raise ValueError(f"each image may be given only once, got {image} twice")
    if other is not image:
        raise ValueError(f"image names must be unique, got {other} and {image}; use separate output folders")


def check_mask_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Check the output arguments of `write_mask_predictions` before prediction.

    Conflicts between masks and images are left to `check_mask_names`.
    """
    if top_k is not None:
        raise ValueError(f"top_k must be omitted for segmentation, got {top_k}")
    if out is None:
        return
    if Path(out).is_file():
        raise ValueError(f"out must be a folder for the masks, got the file {str(out)!r}")
    if Path(out).is_dir() and any(Path(out).iterdir()) and not overwrite:
        raise FileExistsError(
            f"out={out} is not empty; choose another folder, or write into it with --overwrite (overwrite=True)"
        )


_SHOWN_CLASSES = 3
"""Number of classes in the text of a prediction without `top_k`."""
TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
"""Suffixes of prediction files, each of which selects a format."""
Row = dict[str, Any]
"""Values by column: strings, numbers, booleans, or lists of strings."""


@dataclass(frozen=True)
class Prediction:
    """Class prediction for one image.

    Attributes:
        path: Image file, or the position of an in-memory image, e.g. `[3]`.
        ranking: All classes with their probabilities. The first one is the predicted class, which is the median rank
            for ordered classes. The others follow, most likely first.
        unsure_below: Probability below which the prediction is unsure, or None for no threshold.
    """

    path: Path
    ranking: list[tuple[str, float]]
    unsure_below: float | None = None

    @property
    def label(self) -> str:
        """Predicted class."""
        return self.ranking[0][0]

    @property
    def probability(self) -> float:
        """Probability of the predicted class."""
        return self.ranking[0][1]

    @property
    def probabilities(self) -> dict[str, float]:
        """Probability of each class, in the order of `ranking`."""
        return dict(self.ranking)

    @property
    def is_unsure(self) -> bool:
        """True if the probability is below `unsure_below`."""
        return self.unsure_below is not None and self.probability < self.unsure_below

    def text(self, top_k: int | None = None) -> str:
        """Format the first classes of `ranking` as one line, prefixed with "unsure" if `is_unsure`."""
        shown = self.ranking[: top_k or _SHOWN_CLASSES]
        text = ", ".join(f"{name} {p:.3f}" for name, p in shown)
        return f"unsure: {text}" if self.is_unsure else text

    def row(self, top_k: int | None = None) -> Row:
        """Return `label`, `probability`, `unsure` (if there is a threshold), and the remaining top-k classes."""
        unsure = {} if self.unsure_below is None else {"unsure": self.is_unsure}
        others = _ranked(self.ranking[1 : top_k or 1], first=2)
        return {"label": self.label, "probability": round(self.probability, 6), **unsure, **others}

    def fields(self) -> dict[str, Any]:
        """Return `label`, `probability`, `unsure` (if there is a threshold), and `probabilities` of all classes."""
        return {**self.row(), "probabilities": _rounded(self.probabilities)}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return values rounded to six decimals."""
    return {name: round(value, 6) for name, value in values.items()}


def _ranked(ranking: Sequence[tuple[str, float]], first: int = 1) -> Row:
    """Return class and probability columns: `label_1`, `probability_1`, and so on."""
    columns: Row = {}
    for rank, (name, p) in enumerate(ranking, start=first):
        columns |= {f"label_{rank}": name, f"probability_{rank}": round(p, 6)}
    return columns


def _with_unique_names(values: Mapping[str, float], others: Sequence[str], suffix: str) -> Row:
    """Return `values` as columns. Names that collide with `others` get a suffix."""
    columns: Row = {}
    for name, value in values.items():
        column = name
        while column in others or (column != name and column in values):
            column += suffix
        columns[column] = value
    return columns


def write_predictions(
    predictions: "Iterable[Prediction | LabelSetPrediction | NumberPrediction]",
    out: str | Path,
    top_k: int | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write predictions as a table with the column `image` and the columns of `row`.

    Args:
        predictions: Predictions from `predict`.
        out: Output file. The suffix selects the format: `.csv`, `.json` (list of objects), `.jsonl` (one object per
            line), or `.parquet`.
        top_k: Number of classes per image. None writes the predicted class or, for multi-label predictions,
            all probabilities.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: If the file exists and `overwrite` is not set.
        ValueError: If `top_k` is smaller than 1, or `out` is a folder or has an unknown suffix.
        ImportError: If pyarrow is required but not installed.
    """
    check_output(out, top_k, overwrite=overwrite)
    path = Path(out)
    content = table_bytes(predictions, path.suffix.lower(), top_k)
    with create_folder(path.parent):
        write_bytes(path, content)
    return path


def table_bytes(
    predictions: "Iterable[Prediction | LabelSetPrediction | NumberPrediction]", suffix: str, top_k: int | None = None
) -> bytes:
    """Return the content of the file that `write_predictions` writes, in the format for `suffix`."""
    rows = [{"image": str(prediction.path), **prediction.row(top_k)} for prediction in predictions]
    if suffix == ".parquet":
        return _parquet(rows)
    if suffix == ".json":
        text = json.dumps(plain(rows), indent=1, allow_nan=False) + "\n"
    elif suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in plain(rows))
    else:
        text = _csv(rows)
    return text.encode(errors="surrogateescape")


def _csv(rows: Sequence[Row]) -> str:
    """Format rows as CSV, with booleans as yes/no and lists joined by `|`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0] if rows else ["image"])
    for row in rows:
        writer.writerow([_cell(value) for value in row.values()])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Format a CSV value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "|".join(value) if isinstance(value, list) else value


def _parquet(rows: Sequence[Row]) -> bytes:
    """Serialize rows as Parquet with valid UTF-8 strings."""
    import pyarrow
    from pyarrow import parquet

    def clean(value: Any) -> Any:
        """Return a value whose strings are valid UTF-8."""
        if isinstance(value, list):
            return [clean(text) for text in value]
        return utf8_text(value) if isinstance(value, str) else value

    content = io.BytesIO()
    table: list[Row] = []
    for row in plain(rows):
        clean_row = {utf8_text(name): clean(value) for name, value in row.items()}
        table.append(clean_row)
    parquet.write_table(pyarrow.Table.from_pylist(table), content)
    return content.getvalue()


def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Check the output arguments of `write_predictions` before prediction, and raise the same errors.

    With `out=None`, only `top_k` is checked.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; omit it for the default, or set --top-k all")
    if out is None:
        return
    if Path(out).is_dir():
        raise ValueError(f"out must be a file, got the folder {str(out)!r}; use {str(Path(out, 'p.csv'))!r}")
    suffix = Path(out).suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(
            f"out must end with {', '.join(TABLE_SUFFIXES)}, got {str(out)!r}; write "
            f"{str(Path(out).with_suffix('.csv'))!r}, or omit it to print the predictions"
        )
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{out} needs pyarrow: pip install 'snella[data]', or write .csv") from error
    check_new("out", out, overwrite=overwrite)


@dataclass(frozen=True)
class LabelSetPrediction:
    """Multi-label prediction for one image.

    Attributes:
        path: Image file, or position as for `Prediction`.
        labels: Labels whose probabilities reach their thresholds, most likely first.
        probabilities: Probability by class, in the run's order of classes.
    """

    path: Path
    labels: list[str]
    probabilities: dict[str, float]

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """All classes with probabilities, most likely first."""
        return sorted(self.probabilities.items(), key=lambda pair: -pair[1])

    def text(self, top_k: int | None = None) -> str:
        """Format the labels, or the top-k classes, with probabilities as one line."""
        if top_k is not None:
            return ", ".join(f"{name} {p:.3f}" for name, p in self.ranking[:top_k])
        return ", ".join(f"{name} {self.probabilities[name]:.3f}" for name in self.labels) or "no label"

    def row(self, top_k: int | None = None) -> Row:
        """Return `labels`, and the probabilities of all classes or the top-k classes."""
        class_columns = _with_unique_names(_rounded(self.probabilities), ("image", "labels"), "_probability")
        return {"labels": self.labels, **(class_columns if top_k is None else _ranked(self.ranking[:top_k]))}

    def fields(self) -> dict[str, Any]:
        """Return `labels`, and `probabilities` of all classes."""
        return {"labels": self.labels, "probabilities": _rounded(self.probabilities)}


@dataclass(frozen=True)
class NumberPrediction:
    """Regression prediction for one image.

    Attributes:
        path: Image file, or position as for `Prediction`.
        values: Values by target name, in the target's unit.
    """

    path: Path
    values: dict[str, float]

    def text(self, top_k: int | None = None) -> str:
        """Format the values as one line."""
        return ", ".join(f"{name} {value:.6g}" for name, value in self.values.items())

    def row(self, top_k: int | None = None) -> Row:
        """Return one column per target."""
        return _with_unique_names(self.fields()["values"], ("image",), "_value")

    def fields(self) -> dict[str, Any]:
        """Return `values`, the value of each target with seven significant digits."""
        return {"values": {name: float(f"{value:.7g}") for name, value in self.values.items()}}
