"""Fine-tuning methods by name: `build_method("snella-8", model)`.

Public names are imported on first use, so that help texts can use `defaults` without importing torch or PEFT.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snella_app.methods.method import Batches, Method, MethodSpec, SelectionData
    from snella_app.methods.model_parts import AdapterFileError
    from snella_app.methods.registry import (
        METHODS,
        build_method,
        check_method,
        find_method,
        merge_trained,
        method_of,
        parse_method,
        restore_method,
        spec_of,
    )
    from snella_app.methods.saving import load_trained, load_trained_into, save_trained

_MODULES = {
    "AdapterFileError": "model_parts",
    **dict.fromkeys(("Batches", "Method", "MethodSpec", "SelectionData"), "method"),
    **dict.fromkeys(("load_trained", "load_trained_into", "save_trained"), "saving"),
}

__all__ = [
    "METHODS",
    "AdapterFileError",
    "Batches",
    "Method",
    "MethodSpec",
    "SelectionData",
    "build_method",
    "check_method",
    "find_method",
    "load_trained",
    "load_trained_into",
    "merge_trained",
    "method_of",
    "parse_method",
    "restore_method",
    "save_trained",
    "spec_of",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'registry')}"), name)
