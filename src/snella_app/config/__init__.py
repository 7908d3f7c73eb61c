"""Configurations: `TrainConfig` and its sections, and base classes for the recipes."""
