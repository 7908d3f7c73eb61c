"""Prediction with the best model of a run.

A `Predictor` preprocesses images, runs the model, and divides the outputs by the calibration temperature of the run.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from snella_app.data.images import check_shape
from snella_app.methods import spec_of
from snella_app.methods.model_parts import base_model, recorded_inputs
from snella_app.records.record import read_if_present
from snella_app.records.run import FoldResults, RunInfo
from snella_app.runs.folder import RunFolder
from snella_app.runs.image_inputs import ImageInput, missing_path_hint, read_input, split_inputs
from snella_app.runs.model import Ensemble, LoadedRun, check_batch_size, get_task_name, load_run
from snella_app.tasks import Task, task_class
from snella_app.tasks.classification import ClassificationTask
from snella_app.tasks.task import MAX_VIEWS

_THREADS = 4  # threads rather than processes, because decoding and resizing release the GIL

Unsure = float | Literal["auto"] | None
"""Probability below which a prediction is unsure; `"auto"` selects the threshold of the run's calibration."""


class Predictor:
    """Best model of a run, with preprocessing, class names, and calibration.

        model = snella.load("runs/photos")
        model.predict("new.jpg").label
        [(p.path, p.label, p.probability) for p in model.predict(["a.jpg", "folder", "more/*.png"])]

    Predictors are thread-safe: threads read and preprocess images in parallel and take turns running the model.

    Args:
        loaded: Run from `load_run`.
        batch_size: Batch size.

    Raises:
        ValueError: If `batch_size` is less than 1.
    """

    def __init__(self, loaded: LoadedRun, *, batch_size: int = 32) -> None:
        check_batch_size(batch_size)
        self.loaded = loaded
        self.batch_size = batch_size
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """Describe the run, task, method, number of classes, and device."""
        info = self.loaded.info
        return (
            f"Predictor({str(self.loaded.folder.path)!r}: {info.task} by {info.method}, {len(self.classes)} classes, "
            f"on {self.device})"
        )

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the model's outputs."""
        return self.loaded.classes

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.loaded.device

    @property
    def temperature(self) -> float:
        """Calibration temperature, which divides the logits; 1 for an uncalibrated run."""
        return self.loaded.info.temperature

    @functools.cached_property
    def _columns(self) -> str | None:
        """Table columns of the run, read once."""
        return table_columns(self.loaded.folder.path)

    def predict(
        self,
        images: Any,
        *,
        tta: int | None = None,
        unsure: Unsure = None,
        skip_corrupt: bool = False,
        columns: str | None = None,
    ) -> Any | list[Any]:
        """Return the predictions for one or more images.

        Args:
            images: One image: a file, its bytes, a PIL image, an array, or a tensor (see
                `snella_app.runs.image_inputs`). Or several: a folder, glob pattern, table or batch, or a list of
                images, folders, patterns, and tables.
            tta: Test-time augmentation: number of views whose predictions are averaged (the image, its flip, corner
                crops of the enlarged image, and their flips). None uses the run's setting, and is required for a
                cross-validation run.
            unsure: Probability below which predictions are marked as unsure. `"auto"` selects the run's threshold.
            skip_corrupt: Skip images that cannot be read. A single image that cannot be read is always an error.
            columns: Path column of a table, such as `path=file`. None tries the usual names, then the run's column.

        Returns:
            A prediction object from `snella_app.tasks.predictions` (see `Task.image_predictions`), or, for several
            images, a list of such objects in input order.

        Raises:
            FileNotFoundError: If a path does not exist, or a folder has no images. The message suggests similar names.
            ValueError: If an image cannot be read, or a setting does not apply to the task.
            TypeError: If an input is not an image.
        """
        inputs, is_single = split_inputs(images, columns, self._columns, keep_missing=skip_corrupt)
        can_skip = None if is_single else skip_corrupt
        predictions = list(self.iter_predictions(inputs, tta=tta, unsure=unsure, skip_corrupt=can_skip))
        return predictions[0] if is_single else predictions

    def features(self, images: Any) -> np.ndarray:
        """Compute the features of images: the inputs of the classifier head.

        Args:
            images: As for `predict`.

        Returns:
            `[images, width]`, or `[width]` for one image; float32.

        Raises:
            FileNotFoundError: As for `predict`.
            ValueError: If the model has no head that takes one vector per image, the run is a cross-validation run, or
                an image cannot be read.
            TypeError: As for `predict`.
        """
        inputs, is_single = split_inputs(images, run_columns=self._columns)
        features: list[np.ndarray] = []
        list(self.iter_predictions(inputs, skip_corrupt=None, on_features=features.append))  # predictions are discarded
        return features[0] if is_single else np.stack(features)

    def preprocess(self, images: Sequence[ImageInput]) -> Tensor:
        """Preprocess images into a batch `[images, channels, height, width]`."""
        decoded = [read_input(image, str(_name(i, image)), self.loaded.reading) for i, image in enumerate(images)]
        return torch.stack([self.loaded.transform(image) for image in decoded])

    def to_pil_image(self, preprocessed: Tensor) -> Image.Image:
        """Undo the normalization of an image and return it in RGB; images without 3 or 4 channels become gray."""
        config = self.loaded.info.data_config
        mean = torch.tensor(config["mean"])[:, None, None]
        std = torch.tensor(config["std"])[:, None, None]
        pixels = (preprocessed.cpu() * std + mean).clamp(0, 1)
        if len(pixels) in (3, 4):
            pixels = pixels[:3]
        else:
            gray = pixels.mean(0, keepdim=True)
            pixels = gray.expand(3, -1, -1)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).movedim(0, -1).numpy())

    def iter_predictions(
        self,
        images: Iterable[ImageInput],
        *,
        tta: int | None = None,
        unsure: Unsure = None,
        skip_corrupt: bool | None = False,
        on_skipped: Callable[[Path, str], None] = lambda path, reason: None,
        on_features: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[Any]:
        """Yield the predictions for images one by one, keeping the predictions of only one batch in memory.

        `on_skipped` is called with each skipped image and the reason. `on_features` is called with the features of each
        image before its prediction is yielded. `skip_corrupt=None` rejects corrupt images as False does, but the
        error does not suggest `skip_corrupt`. The other arguments are as for `predict`.
        """
        threshold = self.resolve_threshold(tta, unsure)
        for paths, originals, tensors in self._batches(images, skip_corrupt, on_skipped):
            outputs, features = self._outputs(tensors, tta, on_features is not None)
            for index, prediction in enumerate(self.loaded.task.image_predictions(paths, originals, outputs)):
                if on_features is not None and features is not None:
                    on_features(features[index])
                yield prediction if threshold is None else dataclasses.replace(prediction, unsure_below=threshold)

    def resolve_threshold(self, tta: int | None, unsure: Unsure) -> float | None:
        """Return the threshold for unsure predictions, or None if there is no threshold.

        Raises:
            ValueError: If `tta` or `unsure` is invalid or does not apply to the run.
        """
        if tta is not None and not 1 <= tta <= MAX_VIEWS:
            raise ValueError(f"tta must be between 1 and {MAX_VIEWS} views, got {tta}")
        if tta is not None and isinstance(self.loaded.model, Ensemble):
            raise ValueError(
                f"tta must be left out for a cross-validation run (got {tta}); its models use the tta of their runs"
            )
        if tta is not None and tta > 2 and self.loaded.task.target == "masks":
            raise ValueError(f"tta must be 1 or 2 (with flip) for masks, got {tta}")
        if unsure is not None and not isinstance(self.loaded.task, ClassificationTask):
            raise ValueError(
                f"unsure={unsure} needs a task with one class per image, not {self.loaded.task.name}; leave it out"
            )
        calibration = self.loaded.info.calibration
        if unsure == "auto":
            if calibration is None:
                raise ValueError("unsure must be a probability for a run without calibration, got 'auto'; use e.g. 0.5")
            return calibration.threshold  # None if no threshold halves the error rate
        if unsure is not None and (isinstance(unsure, str) or not 0.0 < unsure <= 1.0):
            raise ValueError(f"unsure must be auto or a probability in (0, 1], got {unsure!r}")
        return unsure

    def _batches(
        self, images: Iterable[ImageInput], skip_corrupt: bool | None, on_skipped: Callable[[Path, str], None]
    ) -> Iterator[tuple[list[Path], list[Image.Image], Tensor]]:
        """Yield batches of file names, images, and model inputs."""

        def prepare(entry: tuple[int, ImageInput]) -> tuple[Path, Image.Image, Tensor] | tuple[Path, str]:
            """Return the name, image, and model input of an entry, or its name and the reason for skipping it."""
            name = _name(*entry)
            try:
                image = read_input(entry[1], str(name), self.loaded.reading)
                check_shape(image, name)
            except ValueError as error:
                if skip_corrupt:
                    return name, str(error).partition(" is not a readable image: ")[2] or str(error)
                remedies = ["remove it"] if isinstance(entry[1], str | Path) else []
                if skip_corrupt is not None:
                    remedies.append("pass --skip-corrupt (skip_corrupt=True)")
                hint = f"; {', or '.join(remedies)}" if remedies else ""
                raise ValueError(f"{error}{hint}") from error
            return name, image, self.loaded.transform(image)

        entries = iter(enumerate(images))
        with ThreadPoolExecutor(_THREADS) as threads:
            while chunk := list(islice(entries, self.batch_size)):
                readable = []
                for prepared in threads.map(prepare, chunk):
                    if len(prepared) == 2:
                        on_skipped(*prepared)
                    else:
                        readable.append(prepared)
                if readable:
                    paths, originals, tensors = zip(*readable, strict=True)
                    yield list(paths), list(originals), torch.stack(tensors)

    def _outputs(self, images: Tensor, tta: int | None, wants_features: bool) -> tuple[Tensor, np.ndarray | None]:
        """Return the outputs of a batch, divided by the temperature and averaged over views.

        The second value contains the features of the first view if `wants_features` is set; otherwise, it is None.
        """
        head_inputs: list[Any] = []
        width: int | None = None
        with self._lock, torch.inference_mode(), contextlib.ExitStack() as hooks:
            if wants_features:
                head, width = _head(self.loaded)
                head_inputs = hooks.enter_context(recorded_inputs(head))
            task = self.loaded.task
            network = self.loaded.network
            views = tta or self.loaded.info.tta
            batch = images.to(self.device)
            # the temperature was fitted to outputs averaged over the run's views
            if views == self.loaded.info.tta:
                averaged = task.outputs(network, batch, views) / self.temperature
            else:
                averaged = task.outputs(lambda view: network(view) / self.temperature, batch, views)
        if not wants_features:
            return averaged, None
        if not head_inputs or not isinstance(head_inputs[0], Tensor) or len(head_inputs[0]) != len(images):
            raise ValueError("features need a classifier head with one input vector per image; this model has none")
        return averaged, head_inputs[0].flatten(1)[:, :width].float().cpu().numpy()


def load(run: str | Path | RunFolder, device: str = "auto", *, batch_size: int = 32) -> Predictor:
    """Load the best model of a run for prediction.

    Args:
        run: Folder of the run, or the result of `snella.train`.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"`, or `"mps"`.
        batch_size: Batch size.

    Raises:
        FileNotFoundError: As for `load_run`. The message suggests similar names.
        ValueError: As for `load_run`, or if `run` is a file or `batch_size` is less than 1.
    """
    folder = run.path if isinstance(run, RunFolder) else Path(run)
    check_order(folder)
    return Predictor(load_run(folder, device), batch_size=batch_size)


def table_columns(run: str | Path) -> str | None:
    """Return the table columns set for a run, or None if none are set or the run is missing (reported later)."""
    if not (Path(run) / "config.yaml").is_file():
        return None
    return RunFolder(run).read_config().data.columns


def run_task_class(run: str | Path) -> type[Task]:
    """Return the task class of a run, or the classification task for a missing run, which is reported later."""
    results = read_if_present(FoldResults, run)
    if results is not None and results.rows:  # all folds have the same task
        run = Path(run) / results.rows[0].folder
    info = read_if_present(RunInfo, run)
    return task_class("classification" if info is None else get_task_name(info))


def check_order(run: Path, images: Sequence[str | Path] = ()) -> None:
    """Raise an error for a missing run, and for images that precede the run in the arguments."""
    if run.is_file():
        raise ValueError(f"run must be the folder of a run, got the file {str(run)!r}; pass the run before the images")
    swapped = [Path(image) for image in images if (Path(image) / RunInfo.file).is_file()]
    if swapped and not (run / RunInfo.file).is_file():
        raise ValueError(
            f"run must be the folder of a run, got {str(run)!r}; {str(swapped[0])!r} is a run; pass it "
            "before the images"
        )
    if not run.is_dir():
        raise FileNotFoundError(f"no run {run}{missing_path_hint(run, may_be_pattern=False)}")


def _name(index: int, image: ImageInput) -> Path:
    """Return the file of an image, or the index in brackets, such as `[3]`, if the image is not a file."""
    if isinstance(image, str | Path):
        return Path(image)
    return Path(getattr(image, "filename", "") or f"[{index}]")


def _head(loaded: LoadedRun) -> tuple[nn.Module, int | None]:
    """Return the head used for predictions, and the number of its inputs that are pooled features.

    The pooled features come first. The number is None if all inputs are pooled features.
    """
    if isinstance(loaded.model, Ensemble):
        raise ValueError(
            "features need one model, but a cross-validation run has several; use one of its runs, e.g. "
            f"{loaded.folder.path}"
        )
    trained_head = base_model(loaded.model).get_submodule(spec_of(loaded.model).head)
    if loaded.probe is None:
        return trained_head, None
    # the pooled features, the input of the trained head, are the first inputs of the final head
    layers = [module for module in trained_head.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    widths = [layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels for layer in layers]
    return loaded.probe.head, next(iter(widths), None)
