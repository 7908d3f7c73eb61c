"""Configurations: `TrainConfig` and its sections, and base classes for the recipes."""

from snella_app.config.sections import (
    AUTO_METHOD,
    DEFAULT_BATCH_SIZE,
    SCHEDULE_END,
    BaseMethodConfig,
    BaseOptimConfig,
    BaseRunConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    budget_seconds,
)
from snella_app.config.train import SESSION_FIELDS, UNSTORED_FIELDS, RunSettings, TrainConfig, command_line
from snella_app.data.options import DataConfig

__all__ = [
    "AUTO_METHOD",
    "DEFAULT_BATCH_SIZE",
    "SCHEDULE_END",
    "SESSION_FIELDS",
    "UNSTORED_FIELDS",
    "BaseMethodConfig",
    "BaseOptimConfig",
    "BaseRunConfig",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "RunSettings",
    "TrainConfig",
    "budget_seconds",
    "command_line",
]
