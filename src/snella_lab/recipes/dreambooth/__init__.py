"""DreamBooth: fine-tuning Stable Diffusion 3 on one subject, image generation and evaluation.

Public names are imported lazily, so the command line can read the settings without importing diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_lab.recipes.dreambooth.config import DreamBoothConfig
    from snella_lab.recipes.dreambooth.evaluate import evaluate_generation, mean_cosine, vendi_score
    from snella_lab.recipes.dreambooth.generate import SamplingConfig, sample_images
    from snella_lab.recipes.dreambooth.pipeline import load_pipeline
    from snella_lab.recipes.dreambooth.report import write_generation_report
    from snella_lab.recipes.dreambooth.train import FlowMatching, personalize

_MODULES = {
    "SamplingConfig": "generate",
    "DreamBoothConfig": "config",
    "FlowMatching": "train",
    "sample_images": "generate",
    "evaluate_generation": "evaluate",
    "load_pipeline": "pipeline",
    "mean_cosine": "evaluate",
    "personalize": "train",
    "vendi_score": "evaluate",
    "write_generation_report": "report",
}

__all__ = [
    "DreamBoothConfig",
    "FlowMatching",
    "SamplingConfig",
    "evaluate_generation",
    "load_pipeline",
    "mean_cosine",
    "personalize",
    "sample_images",
    "vendi_score",
    "write_generation_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError("DreamBooth requires diffusers; run pip install 'snella[generation]'") from error
