"""The PEFT tuner: configuration, layers, injection, budget allocation."""

from snella.tuner.allocator import BudgetAllocator, allocate
from snella.tuner.callback import SnellaCallback
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.matrices import AdaptedMatrix, adapted_matrices
from snella.tuner.model import SnellaModel
from snella.tuner.optimizer import create_snella_optimizer
from snella.tuner.schedule import budget_at

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
