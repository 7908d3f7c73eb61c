"""A training run from the first image to the report, and what is done with it afterwards.

The names are imported when they are first used: the command line reads `TrainConfig` without waiting for the libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella.training.checkpoints import CheckpointError
    from snella.training.config import TrainConfig
    from snella.training.demo import run_demo
    from snella.training.evaluating import evaluate
    from snella.training.loading import LoadedRun, load_run
    from snella.training.merging import load_merged, merge
    from snella.training.predicting import predict
    from snella.training.run_folder import RunFolder
    from snella.training.running import train
    from snella.training.session import RunInUseError
    from snella.training.stopping import NonFiniteLossError, TrainingInterrupted

_HOMES = {
    "CheckpointError": "checkpoints",
    "LoadedRun": "loading",
    "NonFiniteLossError": "stopping",
    "RunFolder": "run_folder",
    "RunInUseError": "session",
    "TrainConfig": "config",
    "TrainingInterrupted": "stopping",
    "evaluate": "evaluating",
    "load_merged": "merging",
    "load_run": "loading",
    "merge": "merging",
    "predict": "predicting",
    "run_demo": "demo",
    "train": "running",
}

__all__ = [
    "CheckpointError",
    "LoadedRun",
    "NonFiniteLossError",
    "RunFolder",
    "RunInUseError",
    "TrainConfig",
    "TrainingInterrupted",
    "evaluate",
    "load_merged",
    "load_run",
    "merge",
    "predict",
    "run_demo",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
