"""Configuration shared by the recipes (DreamBooth and instruction fine-tuning)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from snella_app.config.sections import BaseMethodConfig, BaseOptimConfig
from snella_app.methods.defaults import RECIPE_METHOD


@dataclass(frozen=True, kw_only=True)
class RecipeMethodConfig(BaseMethodConfig):
    """Fine-tuning method and its options.

    Args:
        name: snella, snell, lora, dora or full; a number at the end sets the rank (lora-8).
    """

    name: str = RECIPE_METHOD


@dataclass(frozen=True, kw_only=True)
class RecipeOptimConfig(BaseOptimConfig):
    """Batches, optimizer and precision.

    Args:
        batch_size: Samples per forward pass (micro-batch size).
        accumulation: Gradient accumulation steps.
        optimizer: adamw, adamw8bit (requires bitsandbytes), or auto: 8-bit AdamW if bitsandbytes works, else AdamW.
        gradient_checkpointing: Recompute the activations of each block instead of storing them.
        precision: fp32, or bf16 for autocast.
    """

    minimums: ClassVar = {"batch_size": 1, "accumulation": 1}

    batch_size: int = 1
    accumulation: int = 4
    optimizer: Literal["auto", "adamw", "adamw8bit"] = "auto"
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
