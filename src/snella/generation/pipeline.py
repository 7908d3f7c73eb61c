"""Loading Stable Diffusion 3 from a folder in diffusers' format, or by its name on the hub."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from huggingface_hub.errors import HfHubHTTPError

from snella.backbones.hub import cache_only_if_unreachable
from snella.generation.quietness import quiet_libraries

_INDEX = "model_index.json"
_OPTIONAL = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
_NEEDED = (
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)


def load_pipeline(name: str, *, encoder_dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """Load a pipeline onto the CPU; transformer and image autoencoder in float32.

    Args:
        name: A local folder in diffusers' format, or a name on the hub, `owner/repo`.
        encoder_dtype: Dtype of the three text encoders, which are never trained. The third may be missing, as diffusers
            allows.

    Raises:
        FileNotFoundError: A folder that is not there, or one that lacks components; all of them are named.
        ValueError: A folder of another pipeline, or the hub does not give it out.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """
    folder = Path(name).expanduser()
    dtypes: dict[str, Any] = {"default": torch.float32}
    dtypes |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), encoder_dtype)
    if folder.is_dir():
        absent = dict.fromkeys(_check_folder(folder))
        with quiet_libraries():
            return StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True, **absent)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise FileNotFoundError(f"pipeline must be a folder or a hub name (owner/repo), got {name!r}{_near(folder)}")
    with cache_only_if_unreachable() as reason, quiet_libraries():
        try:
            return StableDiffusion3Pipeline.from_pretrained(name, dtype=dtypes, local_files_only=bool(reason))
        except (OSError, ValueError, HfHubHTTPError) as fault:
            if reason is None:
                raise ValueError(
                    f"the hub does not give out pipeline {name!r}: {_first_line(fault)}; accept its licence there, or "
                    "download it elsewhere and pass the folder"
                ) from fault
            raise ConnectionError(
                f"pipeline {name!r} is no folder here, and the hub could not be reached ({reason}), nor is it in its "
                f"cache; pass a local folder in diffusers' format (it holds {_INDEX}, transformer/, vae/, …)"
            ) from fault


def _check_folder(folder: Path) -> list[str]:
    """Refuse a folder that is no such pipeline or lacks something, all faults in one message.

    Returns:
        Optional parts that the pipeline does without; diffusers wants to be told.
    """
    index = folder / _INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"pipeline folder '{folder}' has no {_INDEX}; it must be in diffusers' format, as "
            "pipeline.save_pretrained writes it"
        )
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        kind = components.get("_class_name")
    except (ValueError, AttributeError) as fault:
        raise ValueError(f"'{index}' is damaged: {fault}; copy the folder again") from None
    if kind != StableDiffusion3Pipeline.__name__:
        raise ValueError(
            f"pipeline folder '{folder}' must hold a StableDiffusion3Pipeline, got {kind}; SNELLA's generation is "
            "written for Stable Diffusion 3"
        )
    absent = [part for part in _NEEDED if part not in components or components[part][0] is None]
    faults = [f"{part} is missing from {_INDEX}" for part in absent if part not in _OPTIONAL]
    for part in _NEEDED:
        if part not in absent:
            faults += _component_faults(folder / part)
    if faults:
        raise FileNotFoundError(
            f"pipeline folder '{folder}' is incomplete: {'; '.join(faults)}; copy or download it again"
        )
    return absent


def _component_faults(folder: Path) -> list[str]:
    """What a component's folder lacks."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return [f"there is no {folder.name}/"]
    if folder.name.startswith("tokenizer") or folder.name == "scheduler":
        return [] if any(folder.glob("*.json")) else [f"{folder.name}/ holds no configuration"]
    faults = [] if (folder / "config.json").is_file() else [f"{folder.name}/ holds no config.json"]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return faults if weights else [*faults, f"{folder.name}/ holds no weights"]


def _near(folder: Path) -> str:
    """Folders of a like name beside the one that is missing."""
    if not folder.parent.is_dir():
        return f"; there is no folder '{folder.parent}'"
    names = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    near = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.5)
    return f"; nearest there: {', '.join(map(repr, near))}" if near else ""


def _first_line(fault: BaseException) -> str:
    """The first line of an error, which says what happened."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
