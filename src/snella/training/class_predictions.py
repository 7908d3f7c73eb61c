"""What a classifier says about images: classes with their probabilities, and the CSV file of them."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from snella.tasks import ClassificationTask
from snella.training.atomic_files import write_text
from snella.training.loading import LoadedRun

_SHOWN_CLASSES = 3


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image: all classes with their probabilities, the likeliest first."""

    path: Path
    ranking: list[tuple[str, float]]

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.ranking[0][0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.ranking[0][1]


def write_predictions(
    predictions: Sequence[Prediction], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
) -> Path:
    """Write predictions as CSV with the columns `image`, `class_1`, `probability_1`, `class_2` and so on.

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
    ranks = min(top_k or len(predictions[0].ranking), len(predictions[0].ranking)) if predictions else 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(f"{name}_{rank + 1}" for rank in range(ranks) for name in ("class", "probability"))])
    for prediction in predictions:
        cells = [cell for name, p in prediction.ranking[:ranks] for cell in (name, f"{p:.6f}")]
        writer.writerow([str(prediction.path), *cells])
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    return path


def check_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Refuse an output that `write_predictions` would refuse, before any image is classified.

    Args:
        out: As for `write_predictions`; None where no file is wanted.
        top_k: As for `write_predictions`.
        overwrite: As for `write_predictions`.

    Raises:
        FileExistsError: The file exists.
        ValueError: `top_k` is less than 1, or `out` is a folder.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out for all classes")
    if out is None:
        return
    if Path(out).is_dir():
        raise ValueError(f"out must be a CSV file, got the folder {str(out)!r}; write {str(Path(out, 'p.csv'))!r}")
    if Path(out).exists() and not overwrite:
        raise FileExistsError(f"out={out} exists; choose another name, or replace it with --overwrite (overwrite=True)")


def class_predictions(loaded: LoadedRun, paths: Sequence[Path], outputs: Tensor) -> list[Prediction]:
    """Predictions from logits.

    Args:
        loaded: The run.
        paths: Images.
        outputs: `[images, classes]`.
    """
    rows = ClassificationTask(len(loaded.classes)).probabilities(outputs).cpu().tolist()
    return [
        Prediction(path, sorted(zip(loaded.classes, row, strict=True), key=lambda pair: -pair[1]))
        for path, row in zip(paths, rows, strict=True)
    ]


def class_text(prediction: Prediction, top_k: int | None) -> str:
    """The likeliest classes in one line."""
    return ", ".join(f"{name} {p:.3f}" for name, p in prediction.ranking[: top_k or _SHOWN_CLASSES])
