"""The PEFT tuner: configuration, layers, injection, budget allocation."""

import importlib
from typing import TYPE_CHECKING, Any

from snella.tuner.allocation import budget_at
from snella.tuner.allocator import BudgetAllocator, allocate
from snella.tuner.config import SnellaConfig
from snella.tuner.hotswap import AdapterValues, hotswap
from snella.tuner.layer import SnellaLayer
from snella.tuner.matrices import AdaptedMatrix, adapted_matrices
from snella.tuner.model import SnellaModel
from snella.tuner.optimizer import create_snella_optimizer
from snella.tuner.sparse_file import SparsePatch, load_sparse

if TYPE_CHECKING:
    from snella.tuner.callback import SnellaCallback

__all__ = [
    "AdaptedMatrix",
    "AdapterValues",
    "BudgetAllocator",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaModel",
    "SparsePatch",
    "adapted_matrices",
    "allocate",
    "budget_at",
    "create_snella_optimizer",
    "hotswap",
    "load_sparse",
]


def __getattr__(name: str) -> Any:
    """Import the callback on first use: transformers' module of callbacks may be what imports PEFT and so the tuner."""
    if name != "SnellaCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("snella.tuner.callback").SnellaCallback
