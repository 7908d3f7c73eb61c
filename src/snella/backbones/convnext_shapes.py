"""Which ConvNeXt a state dict belongs to, told from its shapes."""

import re
from typing import Any

from torch import Tensor

from snella.backbones.inferred import InferredArchitecture

__all__ = ["infer_convnext", "is_convnext"]

# names of the same parts in Facebook's checkpoints and in timm's
_STEM = ("downsample_layers.0.0.weight", "stem.0.weight")
_DOWNSAMPLE = ("downsample_layers.{}.1.weight", "stages.{}.downsample.1.weight")
_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:dwconv|conv_dw)\.weight$")
_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
}
_SIZES_V2: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (3, 3, 9, 3)): "tiny",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
}


def is_convnext(state: dict[str, Tensor]) -> bool:
    """Whether these are weights of a ConvNeXt, in Facebook's names or timm's."""
    return any(name in state for name in _STEM) and any(map(_BLOCK.match, state))


def infer_convnext(state: dict[str, Tensor]) -> InferredArchitecture:
    """Find widths, blocks and version (V2 normalises responses); it takes images of any size.

    Args:
        state: State dict in Facebook's or timm's names.
    """
    blocks: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.match, state)):
        stage = int(match[1])
        blocks[stage] = max(blocks.get(stage, 0), int(match[2]) + 1)
    depths = tuple(blocks[stage] for stage in sorted(blocks))
    stem = next(state[name] for name in _STEM if name in state)
    dims = [stem.shape[0]]
    for stage in range(1, len(depths)):
        found = (state.get(name.format(stage)) for name in _DOWNSAMPLE)
        dims.append(next((weight.shape[0] for weight in found if weight is not None), dims[-1]))
    is_v2 = any(".grn." in key for key in state)
    size = (_SIZES_V2 if is_v2 else _SIZES).get((dims[0], depths))
    family = "convnextv2" if is_v2 else "convnext"
    pointwise = next(
        (value for key, value in state.items() if key.endswith((".pwconv1.weight", ".mlp.fc1.weight"))), stem
    )
    is_convolution = "stem.0.weight" in state and pointwise.ndim == 4
    if size is not None and dims == [dims[0] * 2**stage for stage in range(4)] and not is_convolution:
        return InferredArchitecture(f"{family}_{size}", None)
    options: dict[str, Any] = {"depths": depths, "dims": tuple(dims), "patch_size": stem.shape[-1]}
    if is_convolution:
        options["conv_mlp"] = True
    return InferredArchitecture(f"{family}_tiny", None, options)
