"""Python API of the application: fine-tune, evaluate, and use vision models.

run = train(data="photos", backbone="vit_base_patch16_224.augreg_in21k", out="runs/photos")
load(run).predict("new.jpg").label
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_app.api import train
    from snella_app.config.train import TrainConfig
    from snella_app.runs.predict import load
    from snella_app.runs.task_bank import TaskBank

_MODULES = {"TaskBank": "runs.task_bank", "TrainConfig": "config.train", "load": "runs.predict", "train": "api"}

__all__ = ["TaskBank", "TrainConfig", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `--help` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
