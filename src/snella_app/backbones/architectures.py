"""Infer timm architectures from the names and shapes of the tensors in weight files."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor

from snella_app.backbones.checkpoint import Checkpoint
from snella_app.text import first_line


@dataclass(frozen=True)
class InferredArchitecture:
    """timm architecture of a weight file.

    Attributes:
        name: Name of the timm model.
        img_size: Input size of the weights, or None for architectures without a fixed input size.
        options: Other arguments of `timm.create_model`.
    """

    name: str
    img_size: int | None
    options: dict[str, Any] = field(default_factory=dict)


# tensor names in Facebook's and timm's checkpoints
_STEM = ("downsample_layers.0.0.weight", "stem.0.weight")
_DOWNSAMPLE = ("downsample_layers.{}.1.weight", "stages.{}.downsample.1.weight")
_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:dwconv|conv_dw)\.weight$")
_CONVNEXT_STAGES = 4
_CONVNEXT_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
}
_CONVNEXTV2_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (3, 3, 9, 3)): "tiny",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
}


def _stage_depths(state: dict[str, Tensor], pattern: re.Pattern[str]) -> tuple[int, ...]:
    """Return the number of blocks of each stage, parsed from parameter names."""
    depths: dict[int, int] = {}
    for key in state:
        match = pattern.match(key)
        if match is None:
            continue
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    return tuple(depths[stage] for stage in sorted(depths))


def infer_convnext(state: dict[str, Tensor]) -> InferredArchitecture:
    """Infer the widths, depths, and version of a ConvNeXt; version 2 has global response normalization (`grn`)."""
    depths = _stage_depths(state, _BLOCK)
    stem = next(state[name] for name in _STEM if name in state)
    dims = [stem.shape[0]]
    for stage in range(1, len(depths)):
        weights = (state.get(name.format(stage)) for name in _DOWNSAMPLE)
        dims.append(next((weight.shape[0] for weight in weights if weight is not None), dims[-1]))
    is_v2 = any(".grn." in key for key in state)
    size = (_CONVNEXTV2_SIZES if is_v2 else _CONVNEXT_SIZES).get((dims[0], depths))
    family = "convnextv2" if is_v2 else "convnext"
    pointwise = next(
        (value for key, value in state.items() if key.endswith((".pwconv1.weight", ".mlp.fc1.weight"))), stem
    )
    has_conv_mlp = "stem.0.weight" in state and pointwise.ndim == 4
    if size is not None and dims == [dims[0] * 2**stage for stage in range(_CONVNEXT_STAGES)] and not has_conv_mlp:
        return InferredArchitecture(f"{family}_{size}", None)
    options: dict[str, Any] = {"depths": depths, "dims": tuple(dims), "patch_size": stem.shape[-1]}
    if has_conv_mlp:
        options["conv_mlp"] = True
    return InferredArchitecture(f"{family}_tiny", None, options)


_TABLE = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$")
_FIRST_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
_PATCH = "patch_embed.proj.weight"
# width of the first stage and depths; the head dimension is always 32
_SWIN_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}


def infer_swin(state: dict[str, Tensor]) -> InferredArchitecture:
    """Infer the width, depths, heads, window size, and input size of a Swin from the shapes of its tensors.

    The first position table has `(2w − 1)²` rows for window size `w`. The input size follows from the attention masks
    of shifted windows, `[n, w², w²]` for `n` windows, if the file has them (Microsoft's files do). Otherwise, it
    follows from the window size, since the last stage of every published model has exactly one window.
    """
    width, _, patch, _ = state[_PATCH].shape
    heads: dict[int, int] = {}
    for key, tensor in state.items():
        match = _TABLE.match(key)
        if match is not None:
            heads[int(match[1])] = tensor.shape[1]
    depths = _stage_depths(state, _TABLE)
    window = (math.isqrt(state[_FIRST_TABLE].shape[0]) + 1) // 2
    img_size = _masked_size(state, patch) or window * patch * 2 ** (len(depths) - 1)
    size = _SWIN_SIZES.get((width, depths))
    name = f"swin_{size}_patch{patch}_window{window}_{img_size}"
    if timm.is_model(name) and all(heads[stage] * 32 == width * 2**stage for stage in heads):
        return InferredArchitecture(name, img_size)
    options: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depths": depths,
        "num_heads": tuple(heads[stage] for stage in sorted(heads)),
        "window_size": window,
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    return InferredArchitecture("swin_tiny_patch4_window7_224", img_size, options)


def _masked_size(state: dict[str, Tensor], patch: int) -> int | None:
    """Return the input size from the first shifted-window mask, or None if the file has no masks."""
    for key, value in state.items():
        if key.startswith("layers.") and key.endswith(".attn_mask") and value.ndim == 3:
            stage = int(key.split(".")[1])
            # sides of square grids: windows per image, patches per window
            return math.isqrt(value.shape[0]) * math.isqrt(value.shape[1]) * patch * 2**stage
    return None


# The number of heads is not visible in the shapes; nearly all models of these widths and depths use `_HEADS`.
_VIT_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def infer_vit(state: dict[str, Tensor], *, source: str, num_heads: int | None = None) -> InferredArchitecture:
    """Infer the timm model of a ViT from its width, depth, patch size, layer scale, register tokens, and positions.

    Args:
        state: State dict with the key names of timm or DINOv2.
        source: File as the user typed it, for messages.
        num_heads: Number of attention heads, if known from the file or its publisher.

    Raises:
        ValueError: If the patch or position embedding is missing, the weights belong to a CLIP image tower, or timm has
            no name for the ViT.
    """
    patch = state.get(_PATCH)
    positions = state.get("pos_embed")
    if patch is None or patch.ndim != 4 or positions is None or positions.ndim != 3:
        first_tensors = list(state.items())[:4]
        seen = ", ".join(f"{key} {list(value.shape)}" for key, value in first_tensors)
        raise ValueError(
            f"cannot infer the architecture of '{source}' from its shapes: {_PATCH} (4 dimensions) or "
            f"pos_embed (3 dimensions) is missing; it contains {seen}, …; pass its timm name as the backbone and "
            f"weights={source!r}"
        )
    if "norm_pre.weight" in state:
        raise ValueError(
            f"cannot infer the architecture of '{source}' from its shapes: a norm before the blocks indicates a CLIP "
            "image tower, whose activation is not visible in the shapes; pass its timm name as the backbone, e.g. "
            f"vit_base_patch16_clip_224 or vit_base_patch16_clip_quickgelu_224, and weights={source!r}"
        )
    width = patch.shape[0]
    patch_size = patch.shape[-1]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    registers = next((state[key].shape[1] for key in ("reg_token", "register_tokens") if key in state), 0)
    is_scaled = "blocks.0.ls1.gamma" in state
    grid = _grid_side(positions.shape[1], registers)
    size = _VIT_SIZES.get((width, depth))
    name = f"vit_{size}_patch{patch_size}_224"
    if is_scaled:
        register_part = f"reg{registers}_" if registers else ""
        name = f"vit_{size}_patch{patch_size}_{register_part}dinov2"
    if not timm.is_model(name) or (registers and not is_scaled) or grid is None:
        raise ValueError(
            f"cannot infer the architecture of '{source}' from its shapes: a ViT of width {width}, depth {depth}, "
            f"patch size {patch_size}, {positions.shape[1]} positions, {registers} register tokens, "
            f"{'with' if is_scaled else 'without'} layer scale; "
            f"pass its timm name as the backbone and weights={source!r}"
        )
    options: dict[str, Any] = {"global_pool": "avg"} if "fc_norm.weight" in state else {}
    if num_heads is not None and num_heads != _HEADS[width]:
        options["num_heads"] = num_heads
    return InferredArchitecture(name, grid * patch_size, options)


def _grid_side(positions: int, registers: int) -> int | None:
    """Return the side of the patch grid (without class and register tokens), or None if the grid is not square."""
    # `pos_embed` covers the patches and the class token, only the patches, or all tokens including registers
    for num_tokens in (1, 0, 1 + registers):
        side = math.isqrt(max(positions - num_tokens, 0))
        if side and side * side == positions - num_tokens:
            return side
    return None


def infer_architecture(checkpoint: Checkpoint, *, source: str) -> InferredArchitecture:
    """Infer the timm model of a ViT, Swin, or ConvNeXt from tensor shapes and names (timm's or the authors').

    Args:
        checkpoint: Result of `read_checkpoint`.
        source: File as the user typed it, for messages.

    Raises:
        ValueError: If the architecture is not supported, tensors are missing, or timm has no name for the ViT.
    """
    state = checkpoint.state
    try:
        if _FIRST_TABLE in state and _PATCH in state and state[_PATCH].ndim == 4:
            return infer_swin(state)
        if any(name in state for name in _STEM) and len(_stage_depths(state, _BLOCK)) == _CONVNEXT_STAGES:
            return infer_convnext(state)
        return infer_vit(state, source=source, num_heads=checkpoint.num_heads)
    except LookupError as error:
        raise ValueError(
            f"cannot infer the architecture of '{source}' from its shapes: a tensor is missing or has too few "
            f"dimensions ({first_line(error)}); pass its timm name as the backbone and weights={source!r}"
        ) from error
