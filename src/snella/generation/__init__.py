"""Teaching an image generator one subject, drawing pictures with it, and measuring them.

The names are imported when they are first used: the command line reads the settings without waiting for the libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella.generation.config import DreamBoothConfig
    from snella.generation.drawing import Drawing, draw_images
    from snella.generation.evaluating import evaluate_generation
    from snella.generation.flow_matching import FlowMatching
    from snella.generation.generating import generate
    from snella.generation.personalising import personalise
    from snella.generation.pipeline import load_pipeline
    from snella.generation.report import write_generation_report
    from snella.generation.scores import mean_cosine, vendi_score

_HOMES = {
    "Drawing": "drawing",
    "DreamBoothConfig": "config",
    "FlowMatching": "flow_matching",
    "draw_images": "drawing",
    "evaluate_generation": "evaluating",
    "generate": "generating",
    "load_pipeline": "pipeline",
    "mean_cosine": "scores",
    "personalise": "personalising",
    "vendi_score": "scores",
    "write_generation_report": "report",
}

__all__ = [
    "Drawing",
    "DreamBoothConfig",
    "FlowMatching",
    "draw_images",
    "evaluate_generation",
    "generate",
    "load_pipeline",
    "mean_cosine",
    "personalise",
    "vendi_score",
    "write_generation_report",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as fault:
        if fault.name != "diffusers":
            raise
        raise ImportError("personalised generation needs diffusers; pip install 'snella[generation]'") from fault
