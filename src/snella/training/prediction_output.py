"""What predictions of each task become: objects, a line of text, files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from snella.training.class_predictions import check_output, class_predictions, class_text, write_predictions
from snella.training.loading import LoadedRun, task_name_of
from snella.training.mask_predictions import check_mask_output, mask_predictions, mask_text, write_mask_predictions
from snella.training.run_folder import RunFolder


class _Check(Protocol):
    def __call__(self, out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None: ...


class _Write(Protocol):
    def __call__(
        self, predictions: Any, out: str | Path, top_k: int | None = None, *, overwrite: bool = False
    ) -> Path: ...


@dataclass(frozen=True)
class PredictionOutput:
    """The output of one task.

    Attributes:
        make: From a run, paths, images and the model's outputs to one object an image.
        check: Refuses what `write` would refuse, before anything is predicted.
        write: Writes the file or the folder, and returns it.
        text: An object in one line.
    """

    make: Callable[[LoadedRun, Sequence[Path], Sequence[Image.Image], Tensor], Iterable[Any]]
    check: _Check
    write: _Write
    text: Callable[[Any, int | None], str]


_OUTPUTS = {
    "classification": PredictionOutput(
        lambda loaded, paths, images, outputs: class_predictions(loaded, paths, outputs),
        check_output,
        lambda predictions, out, top_k=None, *, overwrite=False: write_predictions(
            list(predictions), out, top_k, overwrite=overwrite
        ),
        class_text,
    ),
    "segmentation": PredictionOutput(mask_predictions, check_mask_output, write_mask_predictions, mask_text),
}


def output_of(task: str) -> PredictionOutput:
    """The output of a task by its name."""
    return _OUTPUTS[task]


def output_of_run(run: str | Path) -> PredictionOutput:
    """The output of a run's task; that of classification where there is no run, which is told later."""
    folder = RunFolder(run)
    has_run = (folder.path / "run.json").is_file()
    return output_of(task_name_of(folder.read_json("run.json")) if has_run else "classification")
