"""`load` and `predict`: a run's best model, ready to say what is in images."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from snella_app.methods import spec_of
from snella_app.methods.model_parts import base_model
from snella_app.records import FoldResults, RunInfo, read, read_if_present
from snella_app.runs.folder import RunFolder
from snella_app.runs.image_inputs import ImageInput, near_name, read_input, separate
from snella_app.runs.model import Ensemble, LoadedRun, get_task_name, load_run
from snella_app.tasks import Task, task_class
from snella_app.tasks.predictions import Prediction

__all__ = ["MOST_VIEWS", "Predictor", "check_order", "columns_of", "load", "predict", "predict_each", "task_of_run"]

_RUN_FILE = "run.json"
_THREADS = 4  # decoding and resizing release the interpreter lock
_ENLARGED = 8 / 7  # of the image that corners are cut from: 256 to 224 pixels
_CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))
MOST_VIEWS = 2 * (1 + len(_CORNERS))
"""Views of an image that test-time augmentation knows: the whole and four corners, each of them flipped too."""

Unsure = float | Literal["auto"] | None
"""The probability below which a prediction counts as unsure: a number, or that of the run's calibration."""


class Predictor:
    """The best model of a run with its preparation of images, class names and calibration.

        model = snella.load("runs/photos")
        model.predict("new.jpg").label
        [(p.path, p.label, p.probability) for p in model.predict(["a.jpg", "folder", "more/*.png"])]

    Several threads may use one: they read and prepare images side by side, and enter the model one at a time.

    Args:
        loaded: From `load_run`.
        batch_size: Images at a time.

    Raises:
        ValueError: `batch_size` is less than 1.
    """

    def __init__(self, loaded: LoadedRun, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.loaded = loaded
        self.batch_size = batch_size
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """The run, its method, the number of classes and the device."""
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
        """Where the model is."""
        return self.loaded.device

    @property
    def temperature(self) -> float:
        """What logits are divided by; 1 for a run that was not calibrated."""
        return self.loaded.info.temperature

    def predict(
        self, images: Any, *, tta: int | None = None, unsure: Unsure = None, skip_corrupt: bool = False
    ) -> Any | list[Any]:
        """Predict one image or several.

        Args:
            images: A file, a PIL image, an array or a tensor (see `snella_app.runs.image_inputs`); or several: a
                folder, a pattern, a table, a batch, a list of all these.
            tta: Test-time augmentation: number of views (the image, flipped, corners of the enlarged image, flipped)
                whose probabilities are averaged; the run's own if None.
            unsure: Probability below which a prediction is marked as unsure; `auto` for that of the run's calibration.
            skip_corrupt: Leave out images that cannot be read; where one alone is given, it is an error anyway.

        Returns:
            One object of `snella_app.tasks.predictions` for one image, a list of them for several, in their order.

        Raises:
            FileNotFoundError: A path does not exist (near names are given), or a folder holds no images.
            ValueError: An image cannot be read, or a setting that the task does not take.
            TypeError: Something that is no image.
        """
        single, is_one = separate(images, own=self._columns, keep_missing=skip_corrupt)
        each = self.each(single, tta=tta, unsure=unsure, skip_corrupt=skip_corrupt and not is_one)
        found = list(each)
        return found[0] if is_one else found

    def features(self, images: Any) -> np.ndarray:
        """The inputs of the classifier's head, what the model makes of an image before it decides.

        Args:
            images: As for `predict`.

        Returns:
            `[images, width]`, or `[width]` for one image; float32.

        Raises:
            ValueError: A model without a head that takes one vector an image.
        """
        single, is_one = separate(images, own=self._columns)
        rows: list[np.ndarray] = []
        for _ in self.each(single, on_features=rows.append):
            pass
        return rows[0] if is_one else np.stack(rows)

    def prepare(self, images: Sequence[ImageInput]) -> Tensor:
        """What the model takes: `[images, channels, height, width]`, resized, cut and normalized."""
        named = [(image, str(_name(index, image))) for index, image in enumerate(images)]
        read = [read_input(image, name, self.loaded.reading) for image, name in named]
        return torch.stack([self.loaded.transform(image) for image in read])

    def picture(self, prepared: Tensor) -> Image.Image:
        """What `prepare` made of one image, as RGB again; of other channels than 1 and 3 or 4 their mean as gray."""
        config = self.loaded.info.data_config
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
        shares = (prepared.cpu() * std + mean).clamp(0, 1)
        shares = shares[:3] if len(shares) in (3, 4) else shares.mean(0, keepdim=True).expand(3, -1, -1)
        return Image.fromarray((shares * 255).round().to(torch.uint8).movedim(0, -1).numpy())

    def each(
        self,
        images: Sequence[ImageInput],
        *,
        tta: int | None = None,
        unsure: Unsure = None,
        skip_corrupt: bool = False,
        on_skipped: Callable[[Path, str], None] = lambda path, reason: None,
        on_features: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[Any]:
        """Predict as `predict` does, one after the other, so that masks need not all be held at once.

        Args:
            images: One by one, as `snella_app.runs.image_inputs.separate` gives them.
            tta: As for `predict`.
            unsure: As for `predict`.
            skip_corrupt: As for `predict`.
            on_skipped: Called with each skipped image and the reason.
            on_features: Called with the features of each image, before its prediction is yielded.
        """
        threshold = self.check_settings(tta, unsure)
        for paths, pictures, tensors in self._batches(images, skip_corrupt, on_skipped):
            outputs, features = self._outputs(tensors, tta, on_features is not None)
            made = self.loaded.task.image_predictions(self.classes, paths, pictures, outputs)
            for index, prediction in enumerate(made):
                if on_features is not None and features is not None:
                    on_features(features[index])
                yield prediction if threshold is None else _marked(prediction, threshold)

    @property
    def _columns(self) -> str | None:
        """The columns of the run's own table."""
        return columns_of(self.loaded.folder.path)

    def check_settings(self, tta: int | None, unsure: Unsure) -> float | None:
        """Refuse settings that `each` would refuse; the probability that `unsure` means."""
        if tta is not None and not 1 <= tta <= MOST_VIEWS:
            raise ValueError(f"tta must be between 1 and {MOST_VIEWS}, the views of an image, got {tta}")
        if tta is not None and isinstance(self.loaded.model, Ensemble):
            raise ValueError(
                f"tta must be left out for a cross-validation, whose models average their own views, got {tta}"
            )
        calibration = self.loaded.info.calibration
        if unsure == "auto":
            if calibration is None:
                raise ValueError(
                    "unsure must be a probability for a run with no calibration, got 'auto'; give e.g. 0.5"
                )
            return calibration.threshold  # None where no threshold was found
        if unsure is not None and not 0.0 < unsure <= 1.0:
            raise ValueError(f"unsure must be auto or a probability in (0, 1], got {unsure}")
        return unsure

    def _batches(
        self, images: Sequence[ImageInput], skip_corrupt: bool, on_skipped: Callable[[Path, str], None]
    ) -> Iterator[tuple[list[Path], list[Image.Image], Tensor]]:
        """Names, images and what the model takes, `batch_size` at a time."""

        def prepare(entry: tuple[int, ImageInput]) -> tuple[Path, Image.Image, Tensor] | tuple[Path, str]:
            name = _name(*entry)
            try:
                image = read_input(entry[1], str(name), self.loaded.reading)
            except ValueError as error:
                if skip_corrupt:
                    return name, str(error).partition("image: ")[2] or str(error)
                raise ValueError(f"{error}; leave it out, or pass --skip-corrupt (skip_corrupt=True)") from error
            return name, image, self.loaded.transform(image)

        entries = iter(enumerate(images))
        with ThreadPoolExecutor(_THREADS) as threads:
            while chunk := list(islice(entries, self.batch_size)):
                whole = []
                for prepared in threads.map(prepare, chunk):
                    if len(prepared) == 2:
                        on_skipped(*prepared)
                    else:
                        whole.append(prepared)
                if whole:
                    paths, pictures, tensors = zip(*whole, strict=True)
                    yield list(paths), list(pictures), torch.stack(tensors)

    def _outputs(self, images: Tensor, tta: int | None, wants_features: bool) -> tuple[Tensor, np.ndarray | None]:
        """Calibrated outputs of a batch, averaged over views, and the features of the first view."""
        seen: list[Any] = []
        with self._lock, torch.inference_mode(), contextlib.ExitStack() as hooks:
            if wants_features:
                head = _head(self.loaded)
                hooks.callback(head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])).remove)
            is_own = tta in (None, self.loaded.info.tta)  # the temperature was fitted to the average
            outputs = [self._of_view(images.to(self.device), view) for view in range(tta or self.loaded.info.tta)]
            outputs = outputs if is_own else [output / self.temperature for output in outputs]
            averaged = outputs[0] if len(outputs) == 1 else self.loaded.task.average_outputs(outputs)
            averaged = averaged / self.temperature if is_own else averaged
        if not wants_features:
            return averaged, None
        if not seen or not isinstance(seen[0], Tensor) or seen[0].flatten(1).shape[0] != len(images):
            raise ValueError("features are the inputs of a classifier's head, which this model does not have")
        return averaged, seen[0].flatten(1)[:, : _feature_width(self.loaded)].float().cpu().numpy()

    def _of_view(self, images: Tensor, view: int) -> Tensor:
        """The model's outputs for one view of a batch; maps are turned back."""
        outputs = self.loaded.network(_view(images, view))
        if outputs.ndim == 4 and view > 1:
            raise ValueError(f"tta must be 1 or 2 (flipped) for masks, which corners do not cover, got {view + 1}")
        return outputs.flip(-1) if outputs.ndim == 4 and view == 1 else outputs


def load(run: str | Path | RunFolder, device: str = "auto", *, batch_size: int = 32) -> Predictor:
    """Load the best model of a run, to predict with.

    Args:
        run: Folder of the run, or what `snella.train` returned.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
        batch_size: Images at a time.

    Raises:
        FileNotFoundError: Not the folder of a run (near names are given), or no epoch was finished yet.
        ValueError: A file of the run is damaged, or the run is of another kind, such as a personalized generator.
    """
    folder = run.path if isinstance(run, RunFolder) else Path(run)
    if not folder.is_dir() and not folder.is_file():
        raise FileNotFoundError(f"no run {folder}{near_name(folder)}")
    return Predictor(load_run(folder, device), batch_size=batch_size)


def columns_of(run: str | Path) -> str | None:
    """The columns of a run's own table; None for other data, and where there is no run, which is reported later."""
    return RunFolder(run).read_config().columns if (Path(run) / "config.yaml").is_file() else None


def task_of_run(run: str | Path) -> type[Task]:
    """The kind of task of a run; classification where there is no run, which is reported later."""
    results = read_if_present(FoldResults, run)
    run = run if results is None or not results.rows else Path(run) / results.rows[0].folder
    has_run = (Path(run) / _RUN_FILE).is_file()
    return task_class(get_task_name(read(RunInfo, run)) if has_run else "classification")


def predict(
    run: str | Path | LoadedRun,
    images: Any,
    *,
    batch_size: int = 32,
    skip_corrupt: bool = False,
    device: str = "auto",
    tta: int | None = None,
    unsure: Unsure = None,
    columns: str | None = None,
) -> list[Any]:
    """Predict images with the best model of a run; to predict more than once, `load` it.

    Args:
        run: Folder of the run, or a loaded one.
        images: As for `Predictor.predict`.
        batch_size: Images at a time.
        skip_corrupt: Skip images that cannot be read, instead of stopping.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
        tta: As for `Predictor.predict`.
        unsure: As for `Predictor.predict`.
        columns: Column of the paths in a table, `path=file`; if not given, the usual names or the run's own.

    Returns:
        One object of `snella_app.tasks.predictions` per image, in the order given; `Task.image_predictions`
        says which one.

    Raises:
        FileNotFoundError: A path does not exist (near names are given), or a folder holds no images.
        ValueError: An image cannot be read, or an image is given in place of the run.
    """
    options = {"skip_corrupt": skip_corrupt, "tta": tta, "unsure": unsure}
    return list(predict_each(run, images, batch_size=batch_size, device=device, columns=columns, **options))


def predict_each(
    run: str | Path | LoadedRun,
    images: Any,
    *,
    batch_size: int = 32,
    device: str = "auto",
    columns: str | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Predict as `predict` does, one after the other; more options as for `Predictor.each`.

    What can be wrong with the names is found before the model is loaded.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(run, LoadedRun):
        check_order(Path(run), images)
    folder = run.folder.path if isinstance(run, LoadedRun) else run
    single, _ = separate(images, columns, columns_of(folder), keep_missing=options.get("skip_corrupt", False))
    loaded = run if isinstance(run, LoadedRun) else load_run(run, device)
    yield from Predictor(loaded, batch_size=batch_size).each(single, **options)


def check_order(run: Path, images: Any) -> None:
    """Refuse images given in place of the run."""
    if run.is_file():
        raise ValueError(f"run must be the folder of a run, got the file {str(run)!r}; the run comes before the images")
    words = [Path(image) for image in images if isinstance(image, str | Path)] if isinstance(images, list) else []
    swapped = [image for image in words if (image / _RUN_FILE).is_file()]
    if swapped and not (run / _RUN_FILE).is_file():
        raise ValueError(
            f"run must be the folder of a run, got {str(run)!r}; {str(swapped[0])!r} is one: it comes before the images"
        )
    if not run.is_dir():
        raise FileNotFoundError(f"no run {run}{near_name(run)}")


def _name(index: int, image: ImageInput) -> Path:
    """The file of an image, or its place among the others: `[3]`."""
    if isinstance(image, str | Path):
        return Path(image)
    return Path(getattr(image, "filename", "") or f"[{index}]")


def _head(loaded: LoadedRun) -> nn.Module:
    """The head that predictions come from, within PEFT's wrapping where there is one."""
    return _trained_head(loaded) if loaded.probe is None else loaded.probe.linear


def _trained_head(loaded: LoadedRun) -> nn.Module:
    """The head that was trained with the model."""
    return base_model(loaded.model).get_submodule(spec_of(loaded.model).head)


def _feature_width(loaded: LoadedRun) -> int | None:
    """How many of the head's inputs are the model's own pooled features, the first ones; None for all."""
    if loaded.probe is None:
        return None
    head = _trained_head(loaded)
    return int(head.in_features) if isinstance(head.in_features, int) else None


def _view(images: Tensor, view: int) -> Tensor:
    """View number `view` of a batch, `[images, channels, height, width]`: even ones as they are, odd ones flipped."""
    place, is_flipped = divmod(view, 2)
    if place:
        height, width = images.shape[-2:]
        size = (round(height * _ENLARGED), round(width * _ENLARGED))
        enlarged = F.interpolate(images, size, mode="bicubic", align_corners=False)
        bottom, right = _CORNERS[place - 1]
        top, left = bottom * (size[0] - height), right * (size[1] - width)
        images = enlarged[..., top : top + height, left : left + width]
    return images.flip(-1) if is_flipped else images


def _marked(prediction: Any, threshold: float) -> Any:
    """A prediction that knows below which probability it is unsure."""
    if not isinstance(prediction, Prediction):
        raise ValueError(f"unsure is for one class an image, which has a probability, got {threshold:g}")
    return dataclasses.replace(prediction, unsure_below=threshold)
