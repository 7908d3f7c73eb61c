"""Instruction fine-tuning of causal language models and evaluation on the commonsense benchmark.

Public names are imported lazily, so the command line can read the settings without importing transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_lab.recipes.instruct.config import LanguageConfig
    from snella_lab.recipes.instruct.data import CHOICES, extract_answer
    from snella_lab.recipes.instruct.evaluate import evaluate_language
    from snella_lab.recipes.instruct.train import fine_tune

_MODULES = {
    "CHOICES": "data",
    "LanguageConfig": "config",
    "evaluate_language": "evaluate",
    "extract_answer": "data",
    "fine_tune": "train",
}

__all__ = ["CHOICES", "LanguageConfig", "evaluate_language", "extract_answer", "fine_tune"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
