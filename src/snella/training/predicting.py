"""Class names and probabilities for any images."""

import csv
import difflib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snella.data import read_image
from snella.data.images import IMAGE_SUFFIXES
from snella.tasks import ClassificationTask
from snella.training.atomic_files import write_text
from snella.training.loading import LoadedRun, load_run

_RUN_FILE = "run.json"


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


def predict(
    run: str | Path | LoadedRun,
    images: Sequence[str | Path],
    *,
    batch_size: int = 32,
    skip_broken: bool = False,
    device: str = "auto",
) -> list[Prediction]:
    """Classify images with the best model of a run.

    Args:
        run: Folder of the run, or a loaded one.
        images: Files and folders; a folder stands for all images in it, at any depth.
        batch_size: Images at a time.
        skip_broken: Leave out images that cannot be read, instead of stopping.
        device: auto, cpu or cuda.

    Returns:
        One prediction per image, in the order given.

    Raises:
        FileNotFoundError: A path does not exist (near names are given), or a folder holds no images.
        ValueError: An image cannot be read, or an image stands where the run belongs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(run, LoadedRun):
        _check_order(Path(run), images)
    paths = _expand(images)
    loaded = run if isinstance(run, LoadedRun) else load_run(run, device)
    task = ClassificationTask(len(loaded.classes))
    predictions: list[Prediction] = []
    for batch in _batches(paths, loaded, batch_size, skip_broken):
        with torch.inference_mode():
            logits = loaded.model(torch.stack([image for _, image in batch]).to(loaded.device))
        for (path, _), row in zip(batch, task.probabilities(logits).cpu().tolist(), strict=True):
            ranking = sorted(zip(loaded.classes, row, strict=True), key=lambda pair: -pair[1])
            predictions.append(Prediction(path, ranking))
    return predictions


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


def _check_order(run: Path, images: Sequence[str | Path]) -> None:
    """Refuse an image, or a folder of them, where the run belongs."""
    if run.is_file():
        raise ValueError(f"run must be the folder of a run, got the file {str(run)!r}; the run comes before the images")
    swapped = [image for image in map(Path, images) if (image / _RUN_FILE).is_file()]
    if swapped and not (run / _RUN_FILE).is_file():
        raise ValueError(
            f"run must be the folder of a run, got {str(run)!r}; {str(swapped[0])!r} is one: it comes before the images"
        )


def _expand(images: Iterable[str | Path]) -> list[Path]:
    """Files as given, folders as the images in them."""
    paths: list[Path] = []
    for image in map(Path, images):
        if image.is_dir():
            inside = sorted(path for path in image.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(
                    f"the folder {image} holds no images; known endings are {', '.join(sorted(IMAGE_SUFFIXES))}"
                )
            paths += inside
        elif image.exists():
            paths.append(image)
        else:
            raise FileNotFoundError(f"no image {image}{_hint(image)}")
    if not paths:
        raise ValueError("images must name at least one file or folder, got none")
    return paths


def _hint(missing: Path) -> str:
    """Why there may be no such image: a pattern without a match, a missing folder, a mistyped name."""
    if any(sign in missing.name for sign in "*?["):
        return f"; no file in {missing.parent} matches the pattern, or give the folder itself"
    if not missing.parent.is_dir():
        return f"; there is no folder {missing.parent}"
    near = difflib.get_close_matches(missing.name, sorted(child.name for child in missing.parent.iterdir()), n=1)
    return f"; nearest there: {near[0]!r}" if near else f"; {missing.parent} has no file of a like name"


def _batches(paths: list[Path], loaded: LoadedRun, size: int, skip_broken: bool) -> Iterable[list[tuple[Path, Tensor]]]:
    """Transformed images, `size` at a time."""
    batch: list[tuple[Path, Tensor]] = []
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as fault:
            if skip_broken:
                continue
            raise ValueError(f"{fault}; leave it out, or pass --skip-broken") from fault
        batch.append((path, loaded.transform(image)))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
