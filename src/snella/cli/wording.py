"""Messages in the words of the command line: `--skip-broken` where Python users read `skip_broken=True`."""

import re
from dataclasses import fields
from typing import get_type_hints

from snella.cli.generation_options import EvaluateGenerationOptions, GenerateOptions
from snella.cli.language_options import EvaluateLanguageOptions
from snella.cli.options import (
    CompareOptions,
    DataOptions,
    DemoOptions,
    EvaluateOptions,
    InspectOptions,
    MergeOptions,
    PredictOptions,
)
from snella.recipes.dreambooth.config import DreamBoothConfig
from snella.recipes.instruct.config import LanguageConfig
from snella.runs.config import TrainConfig

_ALL = (
    *(TrainConfig, EvaluateOptions, PredictOptions, MergeOptions, InspectOptions, DataOptions, CompareOptions),
    *(DreamBoothConfig, GenerateOptions, EvaluateGenerationOptions, LanguageConfig, EvaluateLanguageOptions),
    DemoOptions,
)
_SETTINGS = "|".join(sorted({f.name for options in _ALL for f in fields(options)}))
_FLAGS = "|".join(sorted({name for options in _ALL for name, kind in get_type_hints(options).items() if kind is bool}))
_POSITIONAL = ("run", "images", "action", "folder")
_HINTS: tuple[tuple[str, str], ...] = (
    # said both ways already: Python's goes
    (rf" \((?:{_FLAGS})=(?:True|False)\)", ""),
    (r"\bresume and overwrite exclude\b", "--resume and --overwrite exclude"),
    (r"\bwith overwrite\b", "with --overwrite"),
    (r"\bwith val_fraction and test_fraction\b", "with --val-fraction and --test-fraction"),
    (r" \(test_fraction=0\)", ""),
    (r"\bweights=PATH\b", "--weights PATH"),
)


def as_flags(message: str) -> str:
    """Replace Python's spelling of settings in a message by options that can be typed.

    Args:
        message: One line that names settings as `name=value`, or at the start of a fault as `name must be …`.
    """
    for pattern, typed in _HINTS:
        message = re.sub(pattern, typed, message)
    message = re.sub(rf"(?<![-\w.])({_FLAGS})=(True|False)\b", _flag, message)
    message = re.sub(rf"^({_SETTINGS})=", lambda match: f"{_option(match[1])} ", message)
    return re.sub(rf"(^|; )({_SETTINGS})(?= must\b)", lambda match: match[1] + _option(match[2]), message)


def _flag(match: re.Match[str]) -> str:
    """`--skip-broken` or `--pretrained false`."""
    return _option(match[1]) + ("" if match[2] == "True" else " false")


def _option(name: str) -> str:
    """A setting's name as it is typed."""
    return name if name in _POSITIONAL else "--" + name.replace("_", "-")
