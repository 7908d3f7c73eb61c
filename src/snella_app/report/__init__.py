"""Figures, tables and the HTML report of a run.

Names are imported lazily so that predictions do not import matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_app.report.card import model_card
    from snella_app.report.inspect import inspect_run, inspect_summary
    from snella_app.report.report import write_report

_MODULES = {"inspect_run": "inspect", "inspect_summary": "inspect", "model_card": "card", "write_report": "report"}

__all__ = ["inspect_run", "inspect_summary", "model_card", "write_report"]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
