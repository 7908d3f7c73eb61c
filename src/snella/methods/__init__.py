"""Ways of fine-tuning, each behind one name: `build_method("snella-8", model)`."""

from snella.methods.adapter_files import AdapterFileError
from snella.methods.registry import (
    MethodSpec,
    build_method,
    check_method,
    method_names,
    method_options,
    parse_method,
    spec_of,
)
from snella.methods.saving import load_trained, load_trained_into, save_trained

__all__ = [
    "AdapterFileError",
    "MethodSpec",
    "build_method",
    "check_method",
    "load_trained",
    "load_trained_into",
    "method_names",
    "method_options",
    "parse_method",
    "save_trained",
    "spec_of",
]
