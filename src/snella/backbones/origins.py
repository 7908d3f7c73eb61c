"""Who published a weight file, told from its content: what its images were normalised with, and what else it fixes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

__all__ = ["GOOGLE", "Origin", "encoder_alone", "origin_of"]

_CLOSE = 2e-3  # half precision keeps sines to about 5e-4


@dataclass(frozen=True)
class Origin:
    """Whose weights these are.

    Attributes:
        label: Name for messages.
        mean: Of the normalisation that the network was trained with, red, green, blue.
        std: Its standard deviation.
        num_heads: Attention heads of the widths that have another number of them than usual.
    """

    label: str
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    num_heads: Mapping[int, int] = field(default_factory=dict)


GOOGLE = Origin("Google's ViT", IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
_MAE = Origin("MAE")
_MOCO = Origin("MoCo v3", num_heads={384: 12})
_SWIN = Origin("Microsoft's Swin")
_CONVNEXT = Origin("Facebook's ConvNeXt")


def origin_of(state: dict[str, Tensor]) -> Origin | None:
    """Tell the publisher of a state dict; None where nothing tells it, so that timm's own configuration holds.

    MAE and MoCo v3 never train their positions: sines and cosines of the patch's column and row, a zero for the class
    token. MAE has the column first, MoCo v3 the row.

    Args:
        state: State dict in the names of the file, without wrapper prefixes.
    """
    if "layers.0.downsample.reduction.weight" in state:
        return _SWIN
    if "downsample_layers.0.0.weight" in state:
        return _CONVNEXT
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[-1] % 4:
        return None
    grid = math.isqrt(positions.shape[1] - 1)
    if grid < 2 or grid * grid + 1 != positions.shape[1] or positions[0, 0].any():
        return None
    patches = positions[0, 1:].detach().float().cpu()
    row, column = _sines(grid, patches.shape[1])
    for origin, expected in ((_MAE, torch.cat([column, row], 1)), (_MOCO, torch.cat([row, column], 1))):
        if (patches - expected).abs().max() < _CLOSE:
            return origin
    return None


def encoder_alone(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """Take the network out of a checkpoint that holds all that its pre-training needed.

    MAE's full checkpoints add a decoder, MoCo v3's hold two encoders with projection heads and a predictor.

    Args:
        state: State dict without wrapper prefixes.

    Returns:
        The encoder's tensors, and what was left out in words (None where nothing was).
    """
    if "decoder_pos_embed" in state:
        kept = {key: value for key, value in state.items() if not key.startswith("decoder_") and key != "mask_token"}
        return kept, f"MAE's decoder and mask token ({len(state) - len(kept)} tensors)"
    if any(key.startswith("base_encoder.") for key in state):
        prefix = "base_encoder."
        kept = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix) and not key.startswith(f"{prefix}head.")
        }
        return kept, f"MoCo v3's momentum encoder, projection head and predictor ({len(state) - len(kept)} tensors)"
    return state, None


def _sines(grid: int, width: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines of each patch's row and of its column, `[grid², width/2]` each, in reading order."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    encoded = torch.cat([angles.sin(), angles.cos()], 1).float()  # [grid, width/2]
    return encoded.repeat_interleave(grid, 0), encoded.repeat(grid, 1)
