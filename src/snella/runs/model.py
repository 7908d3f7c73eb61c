"""The best model of a run, with its transform, classes and task."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from snella.data import build_transform
from snella.data.images import FULL_WHITE, Reading
from snella.methods import load_trained
from snella.records import BackboneInfo, FoldResults, RunInfo, read, read_if_present
from snella.runs.folder import RunFolder, status_text
from snella.tasks import Task, create_task, task_class, task_names

_COMMANDS_OF_OTHERS = {
    "generation": "snella generate and snella evaluate-generation use it",
    "language": "snella evaluate-language uses it",
}


@dataclass(frozen=True)
class LoadedRun:
    """The best model of a run, with its transform, classes and task."""

    folder: RunFolder
    model: nn.Module
    transform: Callable[..., Tensor]
    classes: list[str]
    task: Task
    info: RunInfo

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
    task = get_task(info)
    folder.check_adapter()
    model = load_trained(folder.adapter, make_backbone(info.backbone, task.name)).to(choose_device(device))
    transform = build_transform(info.data_config, train=False, augment="none")
    return LoadedRun(folder, model, transform, list(info.classes), task, info)


def unfinished_note(loaded: LoadedRun) -> str | None:
    """What to know of the model of a run that is not finished; None for a finished one."""
    if loaded.info.is_finished:
        return None
    return (
        f"the run is not finished ({status_text(loaded.info.status)}): this is its best epoch so far; finish it with "
        f"snella train --out {loaded.folder.path} --resume"
    )


class Ensemble(nn.Module):
    """The mean of several models' outputs.

    Args:
        models: From the same images to outputs of the same shape.
        temperatures: What each model's outputs are divided by.
        average: From the models' outputs to one.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        temperatures: Sequence[float],
        average: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.temperatures, self.average = temperatures, average

    def forward(self, images: Tensor) -> Tensor:
        """The mean over the models."""
        pairs = zip(self.models, self.temperatures, strict=True)
        return self.average([model(images) / temperature for model, temperature in pairs])


def _load_ensemble(folder: RunFolder, results: FoldResults, device: str) -> LoadedRun:
    """The models of all folds as one."""
    if len(results.rows) < results.folds:
        raise FileNotFoundError(
            f"{folder.path} has {len(results.rows)} of {results.folds} folds; finish it with "
            f"snella train --out {folder.path} --resume"
        )
    loaded = [load_run(folder.path / row.folder, device) for row in results.rows]
    first, tasks = loaded[0], [one.task for one in loaded]
    task = first.task.of_ensemble(tasks)
    models, temperatures = [one.model for one in loaded], [one.info.temperature for one in loaded]
    model = Ensemble(models, temperatures, lambda outputs: task.average_outputs(outputs, tasks)).eval()
    info = dataclasses.replace(first.info, calibration=None)  # each model has its own
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


def device_named(name: str) -> torch.device:
    """The device of torch that has this name, which need not be in this machine.

    Raises:
        ValueError: torch knows no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "; did you mean cuda?" if name.partition(":")[0].lower() in ("gpu", "nvidia", "0", "1") else ""
        raise ValueError(
            f"device must be auto or a device of torch such as cpu, cuda, cuda:1 or mps, got {name!r}{hint}"
        ) from None
    if device.type == "meta":
        raise ValueError("device must be one that computes, got 'meta'; leave it at auto")
    return device


def choose_device(name: str) -> torch.device:
    """The device that `auto` or a name of torch means here.

    Raises:
        ValueError: torch does not know it, or it is not in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_named(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = f"torch {torch.__version__} sees no {'GPU' if device.type == 'cuda' else 'such device'}"
        if device.type == "cuda" and torch.cuda.is_available():
            reason = f"torch sees {torch.cuda.device_count()} of them, from cuda:0"
        raise ValueError(f"device must be usable here, got {name!r}, but {reason}; leave it at auto") from error
    return device
