"""The best model of a run, with its transform, classes and task."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from snella_app.data import build_transform
from snella_app.data.images import FULL_WHITE, Reading
from snella_app.device import choose_device
from snella_app.methods import load_trained
from snella_app.records import BackboneInfo, FoldResults, RunInfo, read, read_if_present
from snella_app.runs.folder import RunFolder, status_text
from snella_app.runs.layer_probe import LayerProbe, read_layer_probe
from snella_app.tasks import Task, create_task, task_class, task_names

_COMMANDS_OF_OTHERS = {
    "generation": "snella generate and snella evaluate-generation use it",
    "language": "snella evaluate-language uses it",
}


@dataclass(frozen=True)
class LoadedRun:
    """The best model of a run, with its transform, classes and task.

    Attributes:
        folder: Of the run.
        model: The backbone with what was trained, its head included.
        transform: Of images.
        classes: By output.
        task: Of the run.
        info: `run.json`.
        probe: The final head of a run that has one besides the trained head, with the model in it.
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
        """What predictions come from: the model with the run's final head."""
        return self.model if self.probe is None else self.probe

    @property
    def reading(self) -> Reading:
        """How its images are read."""
        data = self.info.data
        return Reading(self.info.backbone.channels, data.white or FULL_WHITE, data.read_side)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device


def load_run(run: str | Path | RunFolder, device: str = "auto") -> LoadedRun:
    """Load the best adapter of a run onto a fresh backbone; of a cross-validation, all its models as an ensemble.

    Args:
        run: Folder of the run, or of a cross-validation.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.

    Returns:
        Model in evaluation mode, its transform, the class names and the run's record.

    Raises:
        FileNotFoundError: Not the folder of a run, no epoch was finished yet, or the adapter is missing.
        ValueError: `run.json` is damaged, or the run is of another kind, such as a personalized generator.
        AdapterFileError: The adapter is damaged or belongs to another model; names the tensor.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    results = read_if_present(FoldResults, folder.path)
    if results is not None:
        return _load_ensemble(folder, results, device)
    info = read(RunInfo, folder.path)
    with _naming(folder.path):
        task = get_task(info)
        _check_outputs(info, task)
        folder.check_adapter()
        backbone = make_backbone(info.backbone, task.name)
        size = built_in_size(backbone, is_only=True)
        model = load_trained(folder.adapter, backbone).to(choose_device(device))
        probe = read_layer_probe(folder.adapter, model)
        if probe is not None:
            _check_head(probe, info)
            probe = probe.to(next(model.parameters()).device).eval()
        try:
            transform = build_transform(info.data_config, train=False, augment="none")
            _check_transform(transform, info, size)
        except ValueError as error:
            raise ValueError(
                f"{folder.path / info.file}: data_config: {error}; copy it again, or train again with `--overwrite`"
            ) from error
    return LoadedRun(folder, model, transform, list(info.classes), task, info, probe)


_LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError)
"""What torch, timm and PEFT raise for values that they cannot use."""


@contextmanager
def _naming(run: Path) -> Iterator[None]:
    """Report what libraries say of values of a run's files as one error that names the run."""
    try:
        yield
    except NotImplementedError:
        raise
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{run} cannot be loaded: run.json or the settings of its adapter do not fit its weights: {reason:.300}; "
            "copy the run again, or train again with `--overwrite`"
        ) from error


def _check_outputs(info: RunInfo, task: Task) -> None:
    """Refuse class names that are not as many as the model's outputs."""
    expected, found = task.count_outputs(info.classes), info.backbone.num_classes
    if found is not None and expected != found:
        raise ValueError(
            f"run.json must name the classes of {found} outputs, got {len(info.classes)} names; copy the run again, or "
            "train again with `--overwrite`"
        )


def _check_head(probe: LayerProbe, info: RunInfo) -> None:
    """Refuse a final head with another number of outputs than the trained one."""
    expected, found = info.backbone.num_classes, probe.linear.out_features
    if expected not in (None, found):
        raise ValueError(f"the final head must have {expected} outputs, got {found}; copy the run again")


def built_in_size(model: nn.Module, *, is_only: bool = False) -> int | None:
    """The side of an image that a model is built for; None for models that are built for any.

    Args:
        model: A backbone, or a segmenter around one.
        is_only: None too for models that also take other sides.
    """
    patches: Any = getattr(getattr(model, "encoder", model), "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None or (is_only and not getattr(patches, "strict_img_size", False)):
        return None
    return int(size[0])


def _check_transform(transform: Callable[..., Tensor], info: RunInfo, size: int | None) -> None:
    """Refuse a transform that gives other tensors than the model takes, before the first image comes."""
    channels = info.backbone.channels
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    blank: Any = tv_tensors.Image(torch.zeros(channels, 8, 8, dtype=torch.uint8))
    made = transform(Image.new(modes[channels], (8, 8)) if channels in modes else blank)
    side = made.shape[-1] if size is None else size
    if list(made.shape) != [channels, side, side] or not bool(made.isfinite().all()):
        raise ValueError(f"it must make finite images of {[channels, side, side]}, got {list(made.shape)}")


def unfinished_note(loaded: LoadedRun) -> str | None:
    """What to know of the model of a run that is not finished; None for a finished one."""
    if loaded.info.is_finished:
        return None
    return (
        f"the run is not finished ({status_text(loaded.info.status)}): this is its best epoch so far; finish it with "
        f"snella train --out {loaded.folder.path} --resume"
    )


class Ensemble(nn.Module):
    """The mean of the outputs of several runs' models.

    Args:
        runs: Their models take the same images and give outputs of the same shape.
        task: Averages them.
    """

    def __init__(self, runs: Sequence[LoadedRun], task: Task) -> None:
        super().__init__()
        self.models = nn.ModuleList(run.network for run in runs)
        self.runs, self.task = list(runs), task

    def forward(self, images: Tensor) -> Tensor:
        """The mean over the models, each with its own temperature and views."""
        outputs = [run.task.outputs(run.network, images, run.info.tta) / run.info.temperature for run in self.runs]
        return self.task.average_outputs(outputs, [run.task for run in self.runs])


def _load_ensemble(folder: RunFolder, results: FoldResults, device: str) -> LoadedRun:
    """The models of all folds as one."""
    if len(results.rows) < results.folds:
        raise FileNotFoundError(
            f"{folder.path} has {len(results.rows)} of {results.folds} folds; finish it with "
            f"snella train --out {folder.path} --resume"
        )
    loaded = [load_run(folder.path / row.folder, device) for row in results.rows]
    first = loaded[0]
    task = first.task.of_ensemble([one.task for one in loaded])
    model = Ensemble(loaded, task).eval()
    info = dataclasses.replace(first.info, calibration=None, tta=1)  # each model has its own
    return LoadedRun(first.folder, model, first.transform, first.classes, task, info)


def get_task(info: RunInfo) -> Task:
    """The task of a run.

    Args:
        info: Its record.

    Raises:
        ValueError: The run is of another kind, such as a personalized generator; names the commands that use it.
    """
    return create_task(get_task_name(info), info.classes, **(info.task_state or {}))


def get_task_name(info: RunInfo) -> str:
    """The name of a run's task. Raises as `get_task`."""
    if info.task not in task_names():
        hint = _COMMANDS_OF_OTHERS.get(info.task, "another version of snella wrote it")
        raise ValueError(f"run must be of the task {' or '.join(task_names())}, got a run of {info.task!r}; {hint}")
    return info.task


def make_backbone(backbone: BackboneInfo, task: str = "classification") -> nn.Module:
    """Create the model that a run began with; what is not pre-trained in it comes from the run's seed."""
    torch.manual_seed(backbone.seed or 0)
    return task_class(task).build_model(
        backbone.name,
        num_classes=backbone.num_classes,
        weights=backbone.weights,
        pretrained=backbone.pretrained is not False,
        img_size=backbone.img_size,
        **({} if backbone.channels == 3 else {"channels": backbone.channels}),
    )
