"""`predict`: classes or masks of images, by the best model of a run."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from snella.data import read_image
from snella.data.datasets import IMAGE_SUFFIXES, is_image
from snella.records import RunInfo, read
from snella.runs.build import LoadedRun, get_task_name, load_run
from snella.tasks import Task, task_class

_RUN_FILE = "run.json"


def task_of_run(run: str | Path) -> type[Task]:
    """The kind of task of a run; classification where there is no run, which is reported later."""
    has_run = (Path(run) / _RUN_FILE).is_file()
    return task_class(get_task_name(read(RunInfo, run)) if has_run else "classification")


def predict(
    run: str | Path | LoadedRun,
    images: Sequence[str | Path],
    *,
    batch_size: int = 32,
    skip_broken: bool = False,
    device: str = "auto",
) -> list[Any]:
    """Classify or segment images with the best model of a run.

    Args:
        run: Folder of the run, or a loaded one.
        images: Files and folders; a folder stands for all images in it, at any depth.
        batch_size: Images at a time.
        skip_broken: Skip images that cannot be read, instead of stopping.
        device: auto, cpu or cuda.

    Returns:
        One object of `snella.tasks.predictions` per image, in the order given; which one says `Task.image_predictions`.

    Raises:
        FileNotFoundError: A path does not exist (near names are given), or a folder holds no images.
        ValueError: An image cannot be read, or an image is given in place of the run.
    """
    each = predict_each(run, images, batch_size=batch_size, skip_broken=skip_broken, device=device)
    return list(each)


def predict_each(
    run: str | Path | LoadedRun,
    images: Sequence[str | Path],
    *,
    batch_size: int = 32,
    skip_broken: bool = False,
    device: str = "auto",
    on_skipped: Callable[[Path, str], None] = lambda path, reason: None,
) -> Iterator[Any]:
    """Predict as `predict` does, one after the other, so that masks need not all be held at once.

    `on_skipped` is called with each skipped image and the reason.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(run, LoadedRun):
        _check_order(Path(run), images)
    paths = _expand(images)
    loaded = run if isinstance(run, LoadedRun) else load_run(run, device)
    for batch in _batches(paths, loaded, batch_size, skip_broken, on_skipped):
        with torch.inference_mode():
            outputs = loaded.model(torch.stack([tensor for _, _, tensor in batch]).to(loaded.device))
        yield from loaded.task.image_predictions(
            loaded.classes, [path for path, _, _ in batch], [image for _, image, _ in batch], outputs
        )


def _check_order(run: Path, images: Sequence[str | Path]) -> None:
    """Refuse images given in place of the run."""
    if run.is_file():
        raise ValueError(f"run must be the folder of a run, got the file {str(run)!r}; the run comes before the images")
    swapped = [image for image in map(Path, images) if (image / _RUN_FILE).is_file()]
    if swapped and not (run / _RUN_FILE).is_file():
        raise ValueError(
            f"run must be the folder of a run, got {str(run)!r}; {str(swapped[0])!r} is one: it comes before the images"
        )
    if not run.is_dir():
        raise FileNotFoundError(f"no run {run}{_hint(run)}")


def _expand(images: Iterable[str | Path]) -> list[Path]:
    """Files as given, folders as the images in them."""
    paths: list[Path] = []
    for image in map(Path, images):
        if image.is_dir():
            inside = sorted(path for path in image.rglob("*") if path.is_file() and is_image(path))
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
    return f"; nearest there: {near[0]!r}" if near else f"; {missing.parent} has no similar name"


def _batches(
    paths: list[Path], loaded: LoadedRun, size: int, skip_broken: bool, on_skipped: Callable[[Path, str], None]
) -> Iterator[list[tuple[Path, Image.Image, Tensor]]]:
    """Images and their transformed tensors, `size` at a time."""
    batch: list[tuple[Path, Image.Image, Tensor]] = []
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as error:
            if skip_broken:
                on_skipped(path, str(error).partition("image: ")[2])
                continue
            raise ValueError(f"{error}; leave it out, or pass --skip-broken") from error
        batch.append((path, image, loaded.transform(image)))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


__all__ = ["predict", "predict_each", "task_of_run"]
