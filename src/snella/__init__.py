"""Sparse, high-rank fine-tuning of pre-trained vision models (SNELLA, arXiv 2510.24037).

Importing the package registers the method with PEFT, so it is used like PEFT's own methods:

    model = get_peft_model(model, SnellaConfig(r=8, target_modules="all-linear", modules_to_save=["head"]))
    BudgetAllocator(model, total_epochs=10, steps_per_epoch=len(loader)).attach(optimizer)

`snella.train` runs the same training as the command `snella train`, and `snella.load` returns a predictor. Both
functions and `snella.TaskBank` require the optional application (`pip install 'snella[app]'`):

    run = snella.train(data="photos", backbone="vit_base_patch16_224.augreg_in21k", out="runs/photos")
    snella.load(run).predict("new.jpg").label
"""

import importlib
from typing import TYPE_CHECKING, Any

from snella.allocator import BudgetAllocator
from snella.compat import registration as _registration  # noqa: F401 - registers the method with PEFT
from snella.compat.hotswap import hotswap
from snella.compat.sparse_file import load_sparse
from snella.config import SnellaConfig
from snella.model import SnellaModel
from snella.optimizer import create_snella_optimizer

if TYPE_CHECKING:
    from snella.callback import SnellaCallback

_APPLICATION_NAMES = ("TaskBank", "load", "train")

__all__ = [
    "BudgetAllocator",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaModel",
    "TaskBank",
    "create_snella_optimizer",
    "hotswap",
    "load",
    "load_sparse",
    "train",
]


def __dir__() -> list[str]:
    """List the public names, including lazily imported ones."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a name on first access: `SnellaCallback`, whose import loads the Trainer, or an application name."""
    if name == "SnellaCallback":
        return importlib.import_module("snella.callback").SnellaCallback
    if name not in _APPLICATION_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("snella_app"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("snella"):
            raise  # extras install only dependencies, so they do not help if one of our modules is missing
        raise ImportError(f"snella.{name} needs {error.name}: pip install 'snella[app]'") from error
