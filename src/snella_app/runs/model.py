"""Load the best model of a run, and create its task and its initial model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from snella_app.backbones.local_files import located
from snella_app.data.images import PILLOW_MODES
from snella_app.data.options import FULL_WHITE, Reading
from snella_app.data.transforms import build_transform
from snella_app.device import choose_device
from snella_app.methods import load_trained
from snella_app.records.record import read, read_if_present
from snella_app.records.run import BackboneInfo, FoldResults, RunInfo, reject_cross_validation, status_text
from snella_app.runs.folder import RunFolder
from snella_app.runs.layer_probe import LayerProbe, read_layer_probe
from snella_app.tasks import TASKS, Task, create_task, task_class

_OTHER_COMMANDS = {
    "generation": "snella generate and snella evaluate-generation use it",
    "language": "snella evaluate-language uses it",
}
_LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
"""Errors that torch, timm, and PEFT raise if the configuration and the weights of a run do not match."""


@dataclass(frozen=True)
class LoadedRun:
    """Best model of a run, with its transform, classes, and task.

    For a cross-validation run, `model` is an ensemble of the folds, `task` is the task of this ensemble, and `probe` is
    None. The other attributes come from the first fold, but `info` has no calibration and no test-time augmentation,
    because each fold's model applies its own.

    Attributes:
        folder: Run folder.
        model: Backbone with trained parameters and head, or an `Ensemble`.
        transform: Image preprocessing.
        classes: Class names in the order of the outputs.
        task: Task of the run.
        info: Content of `run.json`.
        probe: `model` with the final head, which reads the features of several layers. None if the run kept the
            trained head.
    """

    folder: RunFolder
    model: nn.Module
    transform: Callable[..., Tensor]
    classes: list[str]
    task: Task
    info: RunInfo
    probe: LayerProbe | None = None

    @property
    def network(self) -> nn.Module:
        """Model used for predictions, with the final head of the run."""
        return self.model if self.probe is None else self.probe

    @property
    def reading(self) -> Reading:
        """Decoding options: channels, the 16-bit value that maps to white, and minimum side."""
        data = self.info.data
        return Reading(self.info.backbone.channels, data.white or FULL_WHITE, data.read_side)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device


def load_run(run: str | Path | RunFolder, device: str = "auto") -> LoadedRun:
    """Load the best model of a run, or the models of a cross-validation run as an ensemble.

    Args:
        run: Folder of the run.
        device: `"auto"`, or a torch device such as `"cpu"`, `"cuda:1"`, or `"mps"`.

    Returns:
        Model in evaluation mode with its transform, class names, and record.

    Raises:
        FileNotFoundError: If `run` is not a run folder, no epoch has finished, or the adapter or a fold is missing.
        ValueError: If a file of the run is damaged, if the run has an unsupported task, such as image generation, or if
            the device is not available.
        AdapterFileError: If the adapter is damaged or does not match the model.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    results = read_if_present(FoldResults, folder.path)
    if results is None:
        return load_single_run(folder, device)
    if len(results.rows) < results.folds:
        raise FileNotFoundError(
            f"{folder.path} has {len(results.rows)} of {results.folds} folds; finish it with "
            f"snella train --out {folder.path} --resume"
        )
    loaded = [load_single_run(folder.path / row.folder, device) for row in results.rows]
    first = loaded[0]
    task = first.task.for_ensemble([fold.task for fold in loaded])
    model = Ensemble(loaded, task).eval()
    info = replace(first.info, calibration=None, tta=1)  # each model applies its own
    return LoadedRun(first.folder, model, first.transform, first.classes, task, info)


def load_single_run(run: str | Path | RunFolder, device: str) -> LoadedRun:
    """Load the best model of a run.

    Raises:
        FileNotFoundError, AdapterFileError: As for `load_run`.
        ValueError: As for `load_run`, or if `run` is a cross-validation run.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    reject_cross_validation(folder.path)
    info = read(RunInfo, folder.path)
    try:
        with torch.random.fork_rng(devices=[]):  # initializing weights must not advance the caller's generators
            return _load_model(folder, info, choose_device(device))
    except (NotImplementedError, torch.OutOfMemoryError):  # subclasses of RuntimeError that do not indicate damage
        raise
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{folder.path} cannot be loaded: run.json or the adapter settings do not fit the weights: {reason:.300}; "
            "copy the run again, or train again with `--overwrite`"
        ) from error


def _load_model(folder: RunFolder, info: RunInfo, device: torch.device) -> LoadedRun:
    """Load the model of a run, and check that it matches the classes and the transform."""
    task = get_task(info)
    num_outputs = info.backbone.num_classes
    if num_outputs not in (None, task.count_outputs(info.classes)):
        raise ValueError(
            f"run.json must name the classes of {num_outputs} outputs, got {len(info.classes)} names; copy the run "
            "again, or train again with `--overwrite`"
        )
    folder.check_adapter()
    backbone = make_backbone(info.backbone, task.name)
    size = configured_image_size(backbone, is_strict=True)
    model = load_trained(folder.adapter, backbone).to(device)
    probe = read_layer_probe(folder.adapter, model)
    if probe is not None:
        if num_outputs not in (None, probe.head.out_features):
            raise ValueError(
                f"the final head must have {num_outputs} outputs, got {probe.head.out_features}; copy the run again"
            )
        probe = probe.to(device).eval()
    try:
        transform = build_transform(info.data_config)
        _check_transform(transform, info, size)
    except ValueError as error:
        raise ValueError(
            f"{folder.path / info.file}: data_config: {error}; copy it again, or train again with `--overwrite`"
        ) from error
    return LoadedRun(folder, model, transform, list(info.classes), task, info, probe)


def configured_image_size(model: nn.Module, *, is_strict: bool = False) -> int | None:
    """Return the side of the square images that a model is configured for, or None if it has no configured size.

    If `is_strict`, also return None if the model accepts other sizes.
    """
    patches: Any = getattr(getattr(model, "encoder", model), "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None or (is_strict and not getattr(patches, "strict_img_size", False)):
        return None
    return int(size[0])


def _check_transform(transform: Callable[..., Tensor], info: RunInfo, size: int | None) -> None:
    """Check that a transform of a blank image gives finite values in the input shape of the model."""
    channels = info.backbone.channels
    blank: Any = tv_tensors.Image(torch.zeros(channels, 8, 8, dtype=torch.uint8))
    output = transform(Image.new(PILLOW_MODES[channels], (8, 8)) if channels in PILLOW_MODES else blank)
    side = output.shape[-1] if size is None else size
    if list(output.shape) != [channels, side, side] or not bool(output.isfinite().all()):
        raise ValueError(f"it must produce finite images of shape {[channels, side, side]}, got {list(output.shape)}")


def unfinished_note(loaded: LoadedRun) -> str | None:
    """Return a note on the model of an unfinished run; None for a finished run."""
    if loaded.info.is_finished:
        return None
    return (
        f"the run is not finished ({status_text(loaded.info.status)}): this is its best epoch so far; finish it with "
        f"snella train --out {loaded.folder.path} --resume"
    )


class Ensemble(nn.Module):
    """Ensemble that averages the outputs of several runs with the same input and output shapes."""

    def __init__(self, runs: Sequence[LoadedRun], task: Task) -> None:
        super().__init__()
        self.models = nn.ModuleList(run.network for run in runs)
        self.runs = list(runs)
        self.task = task

    def forward(self, images: Tensor) -> Tensor:
        """Apply each model's test-time augmentation and temperature, and average the outputs."""
        outputs = [run.task.outputs(run.network, images, run.info.tta) / run.info.temperature for run in self.runs]
        return self.task.average_outputs(outputs, [run.task for run in self.runs])


def get_task(info: RunInfo) -> Task:
    """Return the task of a run.

    Raises:
        ValueError: If the run has an unsupported task, such as image generation. The message names the commands that
            support the task, if there are any.
    """
    return create_task(get_task_name(info), info.classes, **(info.task_state or {}))


def get_task_name(info: RunInfo) -> str:
    """Return the name of a run's task.

    Raises:
        ValueError: If the task is unsupported, as for `get_task`.
    """
    if info.task not in TASKS:
        hint = _OTHER_COMMANDS.get(info.task, "another version of snella wrote it")
        raise ValueError(f"run must have task {' or '.join(TASKS)}, got a {info.task!r} run; {hint}")
    return info.task


def make_backbone(backbone: BackboneInfo, task: str = "classification") -> nn.Module:
    """Create the model of a run as it was before training.

    New parameters are initialized from the run's seed. A run without a recorded value for `pretrained` used pre-trained
    weights.

    Raises:
        ValueError: If a local file of the pre-trained weights has changed.
    """
    backbone = located(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(backbone.seed or 0)
        return task_class(task).build_model(
            backbone.name,
            num_classes=backbone.num_classes,
            weights=backbone.weights,
            pretrained=backbone.pretrained is not False,
            img_size=backbone.img_size,
            **({} if backbone.channels == 3 else {"channels": backbone.channels}),  # segmenters support only 3
        )


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError if the batch size is less than 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
