"""The paper's analyses of your runs, as figures and tables.

Every plot function takes run folders and returns `Plot`s for `write_plots`. Public names are imported lazily.
"""

import importlib
from typing import TYPE_CHECKING, Any

from snella_lab.analysis.plot import KINDS, Plot, csv_text, plot_function, write_plots

if TYPE_CHECKING:
    from snella_lab.analysis.budgets import allocation, evolution
    from snella_lab.analysis.matrix_fit import FitConfig, definiteness, fit_matrices
    from snella_lab.analysis.pictures import features, gradcam, images, masks, samples
    from snella_lab.analysis.profiles import memory, radar
    from snella_lab.analysis.updates import overlap, read_updates, update

_MODULES = {**KINDS, "read_updates": "updates"} | dict.fromkeys(
    ("FitConfig", "definiteness", "fit_matrices"), "matrix_fit"
)

__all__ = [
    "KINDS",
    "FitConfig",
    "Plot",
    "allocation",
    "csv_text",
    "definiteness",
    "evolution",
    "features",
    "fit_matrices",
    "gradcam",
    "images",
    "masks",
    "memory",
    "overlap",
    "plot_function",
    "radar",
    "read_updates",
    "samples",
    "update",
    "write_plots",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
