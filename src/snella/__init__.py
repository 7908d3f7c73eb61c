"""Sparse, high-rank fine-tuning of pre-trained vision models (SNELLA, arXiv 2510.24037).

Importing the package makes PEFT know the method:

    model = get_peft_model(model, SnellaConfig(r=8, target_modules="all-linear", modules_to_save=["head"]))
    BudgetAllocator(model, total_epochs=10, steps_per_epoch=len(loader)).attach(optimizer)

`snella.train` trains as the command line does, and `snella.load` predicts:

    run = snella.train(data="photos", backbone="vit_base_patch16_224.augreg_in21k", out="runs/photos")
    snella.load(run).predict("new.jpg").label
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella._api import train
    from snella.runs.predict import load
    from snella.runs.task_bank import TaskBank
    from snella.tuner import (
        BudgetAllocator,
        SnellaCallback,
        SnellaConfig,
        SnellaModel,
        create_snella_optimizer,
        hotswap,
        load_sparse,
    )

_HOMES = {"TaskBank": "snella.runs", "load": "snella.runs.predict", "train": "snella._api"}

__version__ = "0.1.0"
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


class _RegisterAfterImport(MetaPathFinder):
    """Registers the tuner once PEFT is imported, so that importing this package alone does not wait for PEFT."""

    _modules = ("peft", "snella.tuner")  # the latter too: it may be what imports PEFT

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, followed by `_registration`."""
        if fullname not in self._modules:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if fullname == "snella.tuner":
                    importlib.import_module("snella._registration")
                elif "snella.tuner" not in sys.modules:
                    importlib.import_module("snella.tuner")

            loader.exec_module = execute_and_register
        return spec


if "peft" in sys.modules:
    importlib.import_module("snella._registration")
else:
    sys.meta_path.insert(0, _RegisterAfterImport())


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*__all__, "__version__"})


def __getattr__(name: str) -> Any:
    """Import the tuner, or what uses runs, on first use of a public name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES.get(name, "snella.tuner"))
    except ModuleNotFoundError as error:
        if name not in _HOMES or (error.name or "").startswith("snella"):
            raise
        raise ImportError(f"snella.{name} needs {error.name}: pip install 'snella[cli]'") from error
    return getattr(module, name)
