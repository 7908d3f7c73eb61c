"""A local folder in the hub's timm format."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import timm

__all__ = ["LocalFolder", "read_folder"]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass(frozen=True)
class LocalFolder:
    """What a folder holds: the architecture its `config.json` names and its weight file."""

    architecture: str
    weights: Path
    has_fixed_input_size: bool


def read_folder(path: Path) -> LocalFolder:
    """Read `config.json` and find the weight file beside it.

    Args:
        path: Folder as `timm.models.save_for_hf` writes it or a download of a timm repository.

    Raises:
        FileNotFoundError: There is no `config.json` or no weight file.
        ValueError: The configuration is damaged, of another library or names an architecture that timm lacks.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"backbone folder '{path}' needs config.json and {_WEIGHT_FILES[0]}; no config.json there"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{config_file}' is not readable JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if architecture is None:
        other = config.get("architectures") if isinstance(config, dict) else None
        of = f" but the transformers model {other}" if other else ""
        raise ValueError(f"'{config_file}' must name a timm model under 'architecture', it names none{of}")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(
            f"'{config_file}' names the architecture {architecture!r}, which timm lacks; nearest: {nearest}"
        )
    weights = next((path / file for file in _WEIGHT_FILES if (path / file).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"backbone folder '{path}' holds none of {', '.join(_WEIGHT_FILES)}")
    cfg = config.get("pretrained_cfg", config)
    default = timm.get_pretrained_cfg(architecture)
    fixed = cfg.get("fixed_input_size", bool(default is not None and default.fixed_input_size))
    return LocalFolder(architecture, weights, bool(fixed))
