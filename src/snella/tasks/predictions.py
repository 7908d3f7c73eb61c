"""Predictions of images outside a data set: what a model says about each, as text, as CSV, as masks."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snella._files import made_folder, write_bytes, write_text
from snella.data import read_image
from snella.report.examples import overlay, write_mask

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
_CSV_SUFFIXES = ("", ".csv", ".txt")


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

    def cells(self, top_k: int | None = None) -> list[tuple[str, str]]:
        """Cells of a table by column: `unsure` where there is a threshold, `class_1`, `probability_1`, and so on."""
        unsure = [] if self.unsure_below is None else [("unsure", "yes" if self.is_unsure else "no")]
        return [*unsure, *_ranked(self.ranking[:top_k])]


def _ranked(ranking: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Cells of classes with their probabilities."""
    return [
        (f"{column}_{rank}", cell)
        for rank, (name, p) in enumerate(ranking, start=1)
        for column, cell in (("class", name), ("probability", f"{p:.6f}"))
    ]


def write_predictions(
    predictions: "Iterable[Prediction | LabelSetPrediction | NumberPrediction]",
    out: str | Path,
    top_k: int | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write predictions as CSV: a column `image`, and what `cells` of each gives.

    Args:
        predictions: From `predict`.
        out: The file.
        top_k: How many classes an image; all if None.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file exists.
        ValueError: `top_k` is less than 1, or `out` is a folder.
    """
    check_output(out, top_k, overwrite=overwrite)
    rows: list[list[str]] = []
    for prediction in predictions:
        cells = prediction.cells(top_k)
        rows = rows or [["image", *(column for column, _ in cells)]]
        rows.append([str(prediction.path), *(cell for _, cell in cells)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows or [["image"]])
    path = Path(out)
    with made_folder(path.parent):
        write_text(path, text.getvalue())
    return path


def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Refuse an output that `write_predictions` would refuse, before any image is classified; raises as it does.

    `out` is None where no file is wanted.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out for all classes")
    if out is None:
        return
    if Path(out).is_dir():
        raise ValueError(f"out must be a CSV file, got the folder {str(out)!r}; write {str(Path(out, 'p.csv'))!r}")
    if Path(out).suffix.lower() not in _CSV_SUFFIXES:
        raise ValueError(
            f"out must be a CSV file, got {str(out)!r}; write {str(Path(out).with_suffix('.csv'))!r}, or leave it out "
            "for a table on the terminal"
        )
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

    def cells(self, top_k: int | None = None) -> list[tuple[str, str]]:
        """Cells of a table by column: `labels` with `|` between them, and every class, or the likeliest `top_k`."""
        of_classes = [(name, f"{p:.6f}") for name, p in self.probabilities.items()]
        return [("labels", "|".join(self.labels)), *(of_classes if top_k is None else _ranked(self.ranking[:top_k]))]


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

    def cells(self, top_k: int | None = None) -> list[tuple[str, str]]:
        """Cells of a table, a column a target."""
        return [(name, f"{value:.7g}") for name, value in self.values.items()]


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
