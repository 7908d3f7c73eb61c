"""SAM from its authors' checkpoint (`sam_vit_b_01ec64.pth`) or from a folder of transformers."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from transformers import SamConfig, SamModel

from snella.backbones.checkpoint import read_checkpoint
from snella.backbones.sam_shapes import infer_sam_config
from snella.backbones.strict_fit import faults, listed

__all__ = ["load_sam"]

_logger = logging.getLogger(__name__)
_IMAGE_POSITIONS = "shared_image_embedding.positional_embedding"
_PROMPT_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_PIXEL_BUFFERS = {"pixel_mean", "pixel_std"}  # constants of the authors' preprocessing, in some copies of the file

# the authors' names to transformers'; applied in this order, each where it matches
_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^image_encoder\.", "vision_encoder."),
    (r"^(vision_encoder\.)blocks\.", r"\1layers."),
    (r"^(vision_encoder\.patch_embed)\.proj\.", r"\1.projection."),
    (r"^(vision_encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^(vision_encoder\.neck)\.([02])\.", lambda m: f"{m[1]}.conv{int(m[2]) // 2 + 1}."),
    (r"^(vision_encoder\.neck)\.([13])\.", lambda m: f"{m[1]}.layer_norm{int(m[2]) // 2 + 1}."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", _PROMPT_POSITIONS),
    (r"^(prompt_encoder)\.point_embeddings\.", r"\1.point_embed."),
    (r"^(prompt_encoder)\.mask_downscaling\.([036])\.", lambda m: f"{m[1]}.mask_embed.conv{int(m[2]) // 3 + 1}."),
    (r"^(prompt_encoder)\.mask_downscaling\.([14])\.", lambda m: f"{m[1]}.mask_embed.layer_norm{int(m[2]) // 3 + 1}."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^(mask_decoder\.transformer)\.norm_final_attn\.", r"\1.layer_norm_final_attn."),
    (r"^(mask_decoder)\.output_upscaling\.0\.", r"\1.upscale_conv1."),
    (r"^(mask_decoder)\.output_upscaling\.1\.", r"\1.upscale_layer_norm."),
    (r"^(mask_decoder)\.output_upscaling\.3\.", r"\1.upscale_conv2."),
]
_MLP = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\.")


def load_sam(path: str | Path, *, image_size: int | None = None) -> SamModel:
    """Load SAM with every one of its weights.

    ViT-B, L, H or any other size, told from the shapes. For another image size the absolute positions are resampled
    bicubically and the relative ones of the global blocks linearly, as the model itself would do on the fly.

    Args:
        path: The authors' `.pth`, a single weight file in the names of transformers, or a local folder that
            `SamModel.save_pretrained` wrote; recognised by content.
        image_size: Side of the square input in pixels, by default the one that the weights were trained with (1024).

    Returns:
        Model in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: Another network, tensors that are missing or extra (each is named), or an `image_size` that the
            patches cannot tile.
    """
    location = Path(path).expanduser()
    if location.is_dir():
        config, state = _read_folder(location)
    else:
        state = _in_transformers_names(read_checkpoint(location).state, location)
        config = infer_sam_config(state, source=str(location))
    if image_size is not None:
        config, state = _resized(config, state, image_size)
    model = SamModel(config)
    reference = model.state_dict()
    found = faults(state, reference)
    if found:
        raise ValueError(f"weights '{location}' do not fit SAM: {'; '.join(found)}")
    model.load_state_dict(state)
    return model.eval()


def _in_transformers_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict of a file in transformers' names, whichever of the two layouts it has."""
    names = set(state)
    if not any(name.startswith(("image_encoder.patch_embed.", "vision_encoder.patch_embed.")) for name in names):
        raise ValueError(
            f"weights '{path}' are no SAM: neither image_encoder.patch_embed (the authors' names) nor "
            f"vision_encoder.patch_embed (transformers') is there, it holds {listed(sorted(names))}"
        )
    if any(name.startswith("image_encoder.") for name in names):
        depths = _mlp_depths(names)
        state = {_renamed(name, depths): value for name, value in state.items() if name not in _PIXEL_BUFFERS}
    # one matrix under two names; files hold it under either
    for one, other in ((_IMAGE_POSITIONS, _PROMPT_POSITIONS), (_PROMPT_POSITIONS, _IMAGE_POSITIONS)):
        if one in state:
            state.setdefault(other, state[one])
    return state


def _mlp_depths(names: set[str]) -> dict[str, int]:
    """Number of layers in each small perceptron of the mask decoder."""
    depths: dict[str, int] = {}
    for match in filter(None, map(_MLP.match, names)):
        depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def _renamed(name: str, depths: dict[str, int]) -> str:
    """One of the authors' names in transformers'."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    match = _MLP.match(name)
    if match is None:
        return name
    layer, last = int(match[2]), depths[match[1]] - 1
    place = "proj_in" if layer == 0 else "proj_out" if layer == last else f"layers.{layer - 1}"
    return f"{match[1]}.{place}.{name[match.end() :]}"


def _read_folder(folder: Path) -> tuple[SamConfig, dict[str, Tensor]]:
    """Configuration and weights of a folder in transformers' format."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"SAM folder '{folder}' needs config.json and model.safetensors; no config.json there")
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{file}' is not a readable configuration: {error}") from error
    if kind != "sam":
        raise ValueError(f"'{file}' must be of a transformers model of model_type 'sam', got {kind!r}")
    loaded: Any = SamModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = cast(SamModel, loaded[0]), loaded[1]
    found = [
        f"{len(keys)} {kind} ({listed(sorted(map(str, keys)))})"
        for kind, keys in (
            ("missing", info["missing_keys"]),
            ("unexpected", info["unexpected_keys"]),
            ("of another shape", info["mismatched_keys"]),
        )
        if keys
    ]
    if found:
        raise ValueError(f"weights in '{folder}' do not fit its config.json: {'; '.join(found)}")
    return model.config, model.state_dict()


def _resized(config: SamConfig, state: dict[str, Tensor], image_size: int) -> tuple[SamConfig, dict[str, Tensor]]:
    """Configuration and weights for another image size."""
    vision: Any = config.vision_config
    patch, before = vision.patch_size, vision.image_size // vision.patch_size
    if image_size < patch or image_size % patch:
        raise ValueError(f"image_size must be a multiple of SAM's patch size {patch}, got {image_size}")
    grid = image_size // patch
    if grid == before:
        return config, state
    _logger.info("SAM's positions resampled from %dx%d to %dx%d patches", before, before, grid, grid)
    settings = config.to_dict()
    settings["vision_config"] |= {"image_size": image_size}
    settings["prompt_encoder_config"] |= {"image_size": image_size, "image_embedding_size": grid}
    state = dict(state)
    positions = state["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    resampled = F.interpolate(positions.float(), size=(grid, grid), mode="bicubic", antialias=True)
    state["vision_encoder.pos_embed"] = resampled.permute(0, 2, 3, 1).to(positions.dtype)
    for block in vision.global_attn_indexes:
        for axis in "hw":
            name = f"vision_encoder.layers.{block}.attn.rel_pos_{axis}"
            table = state[name].T[None]
            state[name] = F.interpolate(table.float(), size=2 * grid - 1, mode="linear")[0].T.to(table.dtype)
    return SamConfig.from_dict(settings), state
