"""Run folders, and operations on trained runs: evaluation, prediction, merging, export, and serving.

Public names are imported on first use, because most of their modules import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_app.runs.folder import RunFolder
    from snella_app.runs.merge import load_merged
    from snella_app.runs.model import LoadedRun, load_run
    from snella_app.runs.task_bank import TaskBank

_MODULES = {
    "LoadedRun": "model",
    "RunFolder": "folder",
    "TaskBank": "task_bank",
    "load_merged": "merge",
    "load_run": "model",
}
"""Module that defines each public name."""

__all__ = ["LoadedRun", "RunFolder", "TaskBank", "load_merged", "load_run"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
