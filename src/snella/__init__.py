"""Sparse, high-rank fine-tuning of pre-trained vision models at LoRA's memory and speed (SNELLA, arXiv 2510.24037).

Importing the package makes PEFT know the method:

    model = get_peft_model(model, SnellaConfig(r=8, target_modules="all-linear", modules_to_save=["head"]))
    BudgetAllocator(model, total_epochs=10, steps_per_epoch=len(loader)).attach(optimizer)
"""

from snella._registration import register
from snella.tuner import (
    BudgetAllocator,
    SnellaCallback,
    SnellaConfig,
    SnellaModel,
    create_snella_optimizer,
)

__version__ = "0.1.0"
__all__ = [
    "BudgetAllocator",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaModel",
    "create_snella_optimizer",
]

register()
