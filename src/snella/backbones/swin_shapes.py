"""Which Swin transformer a state dict belongs to, told from its shapes."""

import math
import re
from typing import Any

import timm
from torch import Tensor

from snella.backbones.inferred import InferredArchitecture

__all__ = ["infer_swin", "is_swin"]

_TABLE = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$")
_FIRST_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
_PATCH = "patch_embed.proj.weight"
# width of the first stage and number of blocks in each; heads are always 32 wide
_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}


def is_swin(state: dict[str, Tensor]) -> bool:
    """Whether these are weights of a Swin transformer, in Microsoft's names or timm's (which differ little)."""
    return _FIRST_TABLE in state and _PATCH in state


def infer_swin(state: dict[str, Tensor]) -> InferredArchitecture:
    """Find width, blocks, heads, window and input size; any Swin can be told from its shapes.

    The window follows from the first position table, `(2w − 1)²` rows. The input size follows from the masks of
    shifted windows where the file holds them (Microsoft's does: `[n, w², w²]` for `n` windows), else from the window,
    which the last stage of every published model fits exactly once.

    Args:
        state: State dict in Microsoft's or timm's names.
    """
    width, _, patch, _ = state[_PATCH].shape
    heads: dict[int, int] = {}
    blocks: dict[int, int] = {}
    for match in filter(None, map(_TABLE.match, state)):
        stage = int(match[1])
        blocks[stage] = max(blocks.get(stage, 0), int(match[2]) + 1)
        heads[stage] = state[match[0]].shape[1]
    depths = tuple(blocks[stage] for stage in sorted(blocks))
    window = (math.isqrt(state[_FIRST_TABLE].shape[0]) + 1) // 2
    img_size = _masked_size(state, patch) or window * patch * 2 ** (len(depths) - 1)
    size = _SIZES.get((width, depths))
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
    """Input size from the first mask of shifted windows, None where the file holds none."""
    for key, value in state.items():
        if key.startswith("layers.") and key.endswith(".attn_mask") and value.ndim == 3:
            stage = int(key.split(".")[1])
            # both square: windows in the picture, and patches in a window
            return math.isqrt(value.shape[0]) * math.isqrt(value.shape[1]) * patch * 2**stage
    return None
