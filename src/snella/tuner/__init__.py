"""The PEFT tuner: configuration, layers, injection, budget allocation."""

from .allocator import BudgetAllocator, allocate
from .callback import SnellaCallback
from .config import SnellaConfig
from .layer import SnellaLayer
from .matrices import AdaptedMatrix, adapted_matrices
from .model import SnellaModel
from .optimizer import create_snella_optimizer
from .schedule import budget_at

__all__ = [
    "AdaptedMatrix",
    "BudgetAllocator",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaModel",
    "adapted_matrices",
    "allocate",
    "budget_at",
    "create_snella_optimizer",
]
