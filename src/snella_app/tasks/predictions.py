"""Predictions of images outside a data set: what a model says about each, as text, in a table, as masks."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snella_app.data import read_image
from snella_app.files import made_folder, write_bytes, write_json, write_text
from snella_app.report.examples import overlay, write_mask
from snella_app.text import utf8_text

_OVERLAYS = "overlays"


@dataclass(frozen=True)
class MaskPrediction:
    """The class of each pixel of one image, at the image's own size.

    Attributes:
        path: The image.
        labels: `[height, width]`, uint8.
        classes: Names by label.
    """

    path: Path
    labels: np.ndarray
    classes: list[str]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels that each class has."""
        counts = np.bincount(self.labels.reshape(-1), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.labels.size).tolist(), strict=True))

    def text(self, top_k: int | None = None) -> str:
        """Shares of the classes in one line, the largest first."""
        shares = sorted(self.shares.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{name} {share:.1%}" for name, share in shares if share > 0)


def mask_predictions(
    classes: Sequence[str], paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
) -> list[MaskPrediction]:
    """Masks from class scores, which are brought to each image's own size before the best class is taken.

    Args:
        classes: Names by label.
        paths: Image files.
        images: The images, upright.
        outputs: `[images, classes, height, width]`.
    """
    found = []
    for path, image, scores in zip(paths, images, outputs.float(), strict=True):
        size = (image.height, image.width)
        labels = F.interpolate(scores[None], size, mode="bilinear", align_corners=False).argmax(1)[0]
        found.append(MaskPrediction(path, labels.to(torch.uint8).cpu().numpy(), list(classes)))
    return found


def write_mask_predictions(
    predictions: Iterable[MaskPrediction], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
) -> Path:
    """Write each mask as `OUT/NAME.png`, a palette PNG whose indices are the labels, and `OUT/overlays/NAME.png`.

    Args:
        predictions: Taken one after the other.
        out: Folder; created.
        top_k: For classification alone.
        overwrite: Write into a folder that holds files.

    Raises:
        FileExistsError: The folder holds files.
        ValueError: `out` is a file, `top_k` is given, or two images have the same name but for their folders.
    """
    check_mask_output(out, top_k, overwrite=overwrite)
    folder = Path(out)
    (folder / _OVERLAYS).mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for prediction in predictions:
        name = f"{prediction.path.stem}.png"
        if name in written:
            raise ValueError(
                f"images must differ in their names, got {written[name]} and {prediction.path}; predict them into "
                "folders of their own"
            )
        written[name] = prediction.path
        write_mask(prediction.labels, folder / name)
        overlaid = overlay(read_image(prediction.path), prediction.labels)
        png = io.BytesIO()
        overlaid.save(png, "PNG")
        write_bytes(folder / _OVERLAYS / name, png.getvalue())
    return folder


def check_mask_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Refuse an output that `write_mask_predictions` would refuse, before any image is segmented; raises as it does."""
    if top_k is not None:
        raise ValueError(f"top_k must be left out for a segmentation, which gives masks, got {top_k}")
    if out is None:
        return
    if Path(out).is_file():
        raise ValueError(f"out must be a folder for the masks, got the file {str(out)!r}")
    if Path(out).is_dir() and any(Path(out).iterdir()) and not overwrite:
        raise FileExistsError(
            f"out={out} holds files; choose another folder, or write into it with --overwrite (overwrite=True)"
        )


_SHOWN_CLASSES = 3
TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
"""Endings of the files that predictions are written to."""
_CSV_SUFFIXES = ("", ".csv", ".txt")
Row = dict[str, Any]
"""Values by column: texts, numbers, booleans, lists of texts."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: The image's file; of an image from elsewhere its place among the others, `[3]`.
        ranking: All classes with their probabilities, the likeliest first.
        unsure_below: Probability below which the prediction counts as unsure, if any.
    """

    path: Path
    ranking: list[tuple[str, float]]
    unsure_below: float | None = None

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.ranking[0][0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.ranking[0][1]

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each class, the likeliest first."""
        return dict(self.ranking)

    @property
    def is_unsure(self) -> bool:
        """Whether the probability is below the threshold that was asked for."""
        return self.unsure_below is not None and self.probability < self.unsure_below

    def text(self, top_k: int | None = None) -> str:
        """The likeliest classes in one line, after the word unsure where the prediction is."""
        ranking = ", ".join(f"{name} {p:.3f}" for name, p in self.ranking[: top_k or _SHOWN_CLASSES])
        return f"unsure: {ranking}" if self.is_unsure else ranking

    def row(self, top_k: int | None = None) -> Row:
        """`label`, `probability`, `unsure` where there is a threshold, and the others of the likeliest `top_k`."""
        unsure = {} if self.unsure_below is None else {"unsure": self.is_unsure}
        others = _ranked(self.ranking[1 : top_k or 1], first=2)
        return {"label": self.label, "probability": round(self.probability, 6), **unsure, **others}


def _ranked(ranking: Sequence[tuple[str, float]], first: int = 1) -> Row:
    """Columns of classes with their probabilities: `label_1`, `probability_1`, and so on."""
    found: Row = {}
    for rank, (name, p) in enumerate(ranking, start=first):
        found |= {f"label_{rank}": name, f"probability_{rank}": round(p, 6)}
    return found


def _beside(values: Mapping[str, float], others: Sequence[str], suffix: str) -> Row:
    """Columns named by `values`; a name that one of the `others` has gets a suffix."""
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
    """Write predictions as a table: a column `image`, and what `row` of each gives.

    Args:
        predictions: From `predict`.
        out: The file; its ending says what it is: CSV, `.json` (a list of objects), `.jsonl` (one object a line) or
            `.parquet`.
        top_k: How many classes an image; the likeliest alone if None.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file exists.
        ValueError: `top_k` is less than 1, or `out` is a folder or has another ending.
        ImportError: Parquet without pyarrow.
    """
    check_output(out, top_k, overwrite=overwrite)
    rows = [{"image": str(prediction.path), **prediction.row(top_k)} for prediction in predictions]
    path = Path(out)
    suffix = path.suffix.lower()
    with made_folder(path.parent):
        if suffix == ".parquet":
            write_bytes(path, _parquet(rows))
        elif suffix == ".json":
            write_json(path, _finite(rows))
        elif suffix == ".jsonl":
            write_text(path, "".join(json.dumps(row) + "\n" for row in _finite(rows)))
        else:
            write_text(path, _csv(rows))
    return path


def _csv(rows: Sequence[Row]) -> str:
    """Rows as CSV: yes and no, and lists with `|` between their texts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0] if rows else ["image"])
    for row in rows:
        writer.writerow([_cell(value) for value in row.values()])
    return text.getvalue()


def _cell(value: Any) -> str:
    """A value in CSV."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "|".join(value) if isinstance(value, list) else str(value)


def _finite(rows: Sequence[Row]) -> list[Row]:
    """The rows with None for numbers that JSON lacks, such as NaN."""
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]


def _parquet(rows: Sequence[Row]) -> bytes:
    """Rows as a Parquet file, whose texts are UTF-8."""
    import pyarrow
    from pyarrow import parquet

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(text) for text in value]
        return utf8_text(value) if isinstance(value, str) else value

    content = io.BytesIO()
    table = [{utf8_text(name): plain(value) for name, value in row.items()} for row in _finite(rows)]
    parquet.write_table(pyarrow.Table.from_pylist(table), content)
    return content.getvalue()


def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Refuse an output that `write_predictions` would refuse, before any image is classified; raises as it does.

    `out` is None where no file is wanted.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out for the default, or set --top-k all")
    if out is None:
        return
    if Path(out).is_dir():
        raise ValueError(f"out must be a file, got the folder {str(out)!r}; write {str(Path(out, 'p.csv'))!r}")
    suffix = Path(out).suffix.lower()
    if suffix not in (*_CSV_SUFFIXES, *TABLE_SUFFIXES):
        raise ValueError(
            f"out must end with {', '.join(TABLE_SUFFIXES)}, got {str(out)!r}; write "
            f"{str(Path(out).with_suffix('.csv'))!r}, or leave it out for a table on the terminal"
        )
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{out} needs pyarrow: pip install 'snella[data]', or write .csv") from error
    if Path(out).exists() and not overwrite:
        raise FileExistsError(f"out={out} exists; choose another name, or replace it with --overwrite (overwrite=True)")


def class_predictions(classes: Sequence[str], paths: Sequence[Path], probabilities: Tensor) -> list[Prediction]:
    """Predictions from class probabilities.

    Args:
        classes: Names by label.
        paths: Images.
        probabilities: `[images, classes]`.
    """
    return [
        Prediction(path, sorted(zip(classes, row, strict=True), key=lambda pair: -pair[1]))
        for path, row in zip(paths, probabilities.cpu().tolist(), strict=True)
    ]


@dataclass(frozen=True)
class LabelSetPrediction:
    """The prediction for one image that may have any number of labels.

    Attributes:
        path: The image.
        labels: Those whose probability reaches their threshold, the likeliest first.
        probabilities: By class, in the run's order.
    """

    path: Path
    labels: list[str]
    probabilities: dict[str, float]

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """All classes with their probabilities, the likeliest first."""
        return sorted(self.probabilities.items(), key=lambda pair: -pair[1])

    def text(self, top_k: int | None = None) -> str:
        """The labels with their probabilities in one line, or the likeliest classes where `top_k` says how many."""
        if top_k is not None:
            return ", ".join(f"{name} {p:.3f}" for name, p in self.ranking[:top_k])
        return ", ".join(f"{name} {self.probabilities[name]:.3f}" for name in self.labels) or "no label"

    def row(self, top_k: int | None = None) -> Row:
        """`labels`, and the probability of every class, or the likeliest `top_k`."""
        rounded = {name: round(p, 6) for name, p in self.probabilities.items()}
        of_classes = _beside(rounded, ("image", "labels"), "_probability")
        return {"labels": self.labels, **(of_classes if top_k is None else _ranked(self.ranking[:top_k]))}


def label_set_predictions(
    classes: Sequence[str], paths: Sequence[Path], probabilities: Tensor, thresholds: Sequence[float]
) -> list[LabelSetPrediction]:
    """Predictions from probabilities of classes that do not exclude each other.

    Args:
        classes: Names by number.
        paths: Images.
        probabilities: `[images, classes]`.
        thresholds: Probability from which an image has a label, by class.
    """
    made = []
    for path, row in zip(paths, probabilities.double().cpu().tolist(), strict=True):
        given = [(name, p) for name, p, least in zip(classes, row, thresholds, strict=True) if p >= least]
        labels = [name for name, _ in sorted(given, key=lambda pair: -pair[1])]
        made.append(LabelSetPrediction(path, labels, dict(zip(classes, row, strict=True))))
    return made


@dataclass(frozen=True)
class NumberPrediction:
    """The numbers that are predicted for one image, by the name of the target, in its own unit."""

    path: Path
    values: dict[str, float]

    def text(self, top_k: int | None = None) -> str:
        """The numbers in one line."""
        return ", ".join(f"{name} {value:.6g}" for name, value in self.values.items())

    def row(self, top_k: int | None = None) -> Row:
        """A column a target."""
        return _beside({name: float(f"{value:.7g}") for name, value in self.values.items()}, ("image",), "_value")


def check_number_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Refuse an output that `write_numbers` would refuse; raises as it does."""
    if top_k is not None:
        raise ValueError(f"top_k must be left out for a regression, which gives numbers, got {top_k}")
    check_output(out, top_k, overwrite=overwrite)


def write_numbers(
    predictions: Iterable[NumberPrediction], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
) -> Path:
    """Write numbers as `write_predictions` does; `top_k`, which is for classes alone, is refused."""
    check_number_output(out, top_k, overwrite=overwrite)
    return write_predictions(predictions, out, overwrite=overwrite)
