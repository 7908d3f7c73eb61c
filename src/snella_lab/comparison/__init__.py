"""Method comparisons on identical images, epochs and batches: tuned on validation, evaluated once on test.

Public names are imported lazily, so that the command line's help does not wait for the libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_lab.comparison.experiment import Experiment, Grid
    from snella_lab.comparison.experiment_files import bundled_experiments, read_experiment

_HOMES = {
    "Experiment": "experiment",
    "Grid": "experiment",
    "bundled_experiments": "experiment_files",
    "read_experiment": "experiment_files",
}

__all__ = ["CellsFailedError", "Experiment", "Grid", "bundled_experiments", "read_experiment"]


class CellsFailedError(RuntimeError):
    """Error for failed runs, raised after the report is written."""

    exit_status = 1


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
