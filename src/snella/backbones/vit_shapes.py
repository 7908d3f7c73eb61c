"""Which ViT of timm a state dict belongs to, told from its shapes."""

import math
from typing import Any

import timm
from torch import Tensor

from snella.backbones.inferred import InferredArchitecture

__all__ = ["infer_vit"]

# Heads are not visible in the shapes; these widths and depths have the same number of them almost everywhere.
_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_PATCH = "patch_embed.proj.weight"


def infer_vit(state: dict[str, Tensor], *, source: str, num_heads: int | None = None) -> InferredArchitecture:
    """Find timm's ViT by width, depth, patch size, layer scale and register tokens.

    Args:
        state: State dict in timm's or DINOv2's own names.
        source: The file as the user typed it, for messages.
        num_heads: Attention heads, where the file or its publisher tells their number.

    Raises:
        ValueError: Not a ViT, or one that timm has no plain name for; the message says what was seen.
    """
    patch, positions = state.get(_PATCH), state.get("pos_embed")
    if patch is None or patch.ndim != 4 or positions is None or positions.ndim != 3:
        seen = ", ".join(f"{key} {list(value.shape)}" for key, value in list(state.items())[:4])
        raise ValueError(
            f"the architecture of '{source}' cannot be read from its shapes: {_PATCH} or pos_embed is missing, "
            f"it holds {seen}, …; give its timm name as the backbone and weights={source!r}"
        )
    if "norm_pre.weight" in state:
        raise ValueError(
            f"the architecture of '{source}' cannot be read from its shapes: a norm before the blocks, as in CLIP's "
            "image towers, whose activation the shapes do not tell; give its timm name as the backbone, for example "
            f"vit_base_patch16_clip_224 or vit_base_patch16_clip_quickgelu_224, and weights={source!r}"
        )
    width, side = patch.shape[0], patch.shape[-1]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    registers = next((state[key].shape[1] for key in ("reg_token", "register_tokens") if key in state), 0)
    is_scaled = "blocks.0.ls1.gamma" in state
    grid = _grid(positions.shape[1], registers)
    name = _name(_SIZES.get((width, depth)), side, is_scaled, registers)
    if name is None or grid is None:
        raise ValueError(
            f"the architecture of '{source}' cannot be read from its shapes: a ViT of width {width}, depth {depth}, "
            f"patch size {side}, {positions.shape[1]} positions, {registers} register tokens, "
            f"{'with' if is_scaled else 'without'} layer scale; "
            f"give its timm name as the backbone and weights={source!r}"
        )
    options: dict[str, Any] = {"global_pool": "avg"} if "fc_norm.weight" in state else {}
    if num_heads is not None and num_heads != _HEADS[width]:
        options["num_heads"] = num_heads
    return InferredArchitecture(name, grid * side, options)


def _name(size: str | None, patch: int, is_scaled: bool, registers: int) -> str | None:
    """Timm's name, None where it has none."""
    if size is None:
        return None
    if is_scaled:
        name = f"vit_{size}_patch{patch}_{f'reg{registers}_' if registers else ''}dinov2"
    else:
        name = f"vit_{size}_patch{patch}_224"
    return name if timm.is_model(name) and (is_scaled or not registers) else None


def _grid(positions: int, registers: int) -> int | None:
    """Side of the square grid of patches, with or without positions of class and register tokens before it."""
    for extra in (1, 0, 1 + registers):
        side = math.isqrt(max(positions - extra, 0))
        if side and side * side == positions - extra:
            return side
    return None
