"""Ways of fine-tuning, each behind one name: `build_method("snella-8", model)`."""

from snella.methods.calibration import SelectionData
from snella.methods.files import AdapterFileError
from snella.methods.method import Batches, Method, MethodSpec
from snella.methods.registry import (
    METHODS,
    build_method,
    check_method,
    find_method,
    merge_trained,
    method_names,
    method_of,
    method_options,
    parse_method,
    restore_method,
    spec_of,
)
from snella.methods.saving import load_trained, load_trained_into, save_trained

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
    "method_names",
    "method_of",
    "method_options",
    "parse_method",
    "restore_method",
    "save_trained",
    "spec_of",
]
