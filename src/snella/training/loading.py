"""A run's best model, ready to be used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snella.analysis.run_files import read_run
from snella.data import build_transform
from snella.methods import load_trained
from snella.tasks import Task, create_task, task_names
from snella.training.assembly import choose_device, make_backbone
from snella.training.run_folder import RunFolder

_COMMANDS_OF_OTHERS = {
    "generation": "snella generate and snella evaluate-generation use it",
    "language": "snella evaluate-language uses it",
}


@dataclass(frozen=True)
class LoadedRun:
    """The best model of a run with all that its use needs."""

    folder: RunFolder
    model: nn.Module
    transform: Callable[..., Tensor]
    classes: list[str]
    task: Task
    info: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def load_run(run: str | Path | RunFolder, device: str = "auto") -> LoadedRun:
    """Load the best adapter of a run onto a fresh backbone.

    Args:
        run: Folder of the run.
        device: auto, cpu or cuda.

    Returns:
        Model in evaluation mode, its transform, the class names and the content of `run.json`.

    Raises:
        FileNotFoundError: Not the folder of a run, no epoch was finished yet, or the adapter is missing.
        ValueError: `run.json` is damaged, or the run is of another kind, such as a personalised generator.
        AdapterFileError: The adapter is damaged or belongs to another model; names the tensor.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    info = folder.read_json("run.json")
    read_run(folder.path)
    task = task_of(info)
    folder.check_adapter()
    model = load_trained(folder.adapter, make_backbone(info["backbone"], task.name)).to(choose_device(device))
    transform = build_transform(info["data_config"], train=False, augment="none")
    return LoadedRun(folder, model, transform, list(info["classes"]), task, info)


def task_of(info: dict[str, Any]) -> Task:
    """The task of a run.

    Args:
        info: Content of `run.json`.

    Raises:
        ValueError: The run is of another kind, such as a personalised generator; names the commands that use it.
    """
    return create_task(task_name_of(info), info["classes"])


def task_name_of(info: dict[str, Any]) -> str:
    """The name of a run's task; runs that do not tell were classification. Raises as `task_of`."""
    name = str(info.get("task", "classification"))
    if name not in task_names():
        hint = _COMMANDS_OF_OTHERS.get(name, "another version of snella wrote it")
        raise ValueError(f"run must be of the task {' or '.join(task_names())}, got a run of {name!r}; {hint}")
    return name
