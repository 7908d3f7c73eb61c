"""Configurations: `TrainConfig` and its sections, and base classes for the recipes."""

from snella_app.config.base import Config, Setting
from snella_app.config.data import DataConfig
from snella_app.config.model import AUTO_METHOD, BaseMethodConfig, MethodConfig, ModelConfig
from snella_app.config.optim import DEFAULT_BATCH_SIZE, SCHEDULE_END, BaseOptimConfig, OptimConfig, budget_seconds
from snella_app.config.run import (
    SESSION_FIELDS,
    UNSTORED_FIELDS,
    BaseRunConfig,
    RunConfig,
    RunSettings,
    command_line,
)
from snella_app.config.train import TrainConfig

__all__ = [
    "AUTO_METHOD",
    "DEFAULT_BATCH_SIZE",
    "SCHEDULE_END",
    "SESSION_FIELDS",
    "UNSTORED_FIELDS",
    "BaseMethodConfig",
    "BaseOptimConfig",
    "BaseRunConfig",
    "Config",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "RunSettings",
    "Setting",
    "TrainConfig",
    "budget_seconds",
    "command_line",
]
