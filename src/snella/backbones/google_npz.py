"""Google's original ViT checkpoints (`.npz`), brought into timm's names by timm's own reader."""

import logging
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ["read_google_npz"]

_logger = logging.getLogger(__name__)
_Arrays = dict[str, tuple[int, ...]]
# a layer between features and classes that only the first releases have; timm's ViT has none
_REPRESENTATION = ("pre_logits/kernel", "pre_logits/bias")


def read_google_npz(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read a ViT in the layout of google-research/vision_transformer.

    A model of exactly the file's sizes is built and filled by timm's `VisionTransformer.load_pretrained`; its state is
    what comes out, so that everything after it is the same for all kinds of file.

    Args:
        path: `.npz` file.

    Returns:
        State dict in timm's names and the number of attention heads.

    Raises:
        ValueError: The file is damaged, or an array is missing, extra or of a shape that does not agree with the
            others.
        NotImplementedError: A ResNet-ViT hybrid or a big_vision checkpoint.
    """
    shapes = _shapes(path)
    prefix = "opt/target/" if "opt/target/embedding/kernel" in shapes else ""
    if f"{prefix}conv_root/kernel" in shapes:
        raise NotImplementedError(f"weights '{path}': a ResNet-ViT hybrid; only plain ViT files are read from .npz")
    if any(key.startswith("params/") or key == f"{prefix}pos_embedding" for key in shapes):
        raise NotImplementedError(
            f"weights '{path}': big_vision's layout; only that of google-research/vision_transformer is read from .npz"
        )
    sizes = _sizes(shapes, prefix, path)
    _check(shapes, prefix, sizes, path)
    model = VisionTransformer(weight_init="skip", **sizes)
    model.load_pretrained(str(path))
    return {key: value.detach() for key, value in model.state_dict().items()}, sizes["num_heads"]


def _shapes(path: Path) -> _Arrays:
    """Shapes of all arrays; objects are not unpickled."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {key: arrays[key].shape for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"weights '{path}' are not a readable .npz file: {error}") from error


def _sizes(shapes: _Arrays, prefix: str, path: Path) -> dict[str, Any]:
    """Arguments of the `VisionTransformer` that the arrays were taken from."""
    block = f"{prefix}Transformer/encoderblock_0/"
    needed = {
        "patch": f"{prefix}embedding/kernel",
        "positions": f"{prefix}Transformer/posembed_input/pos_embedding",
        "query": f"{block}MultiHeadDotProductAttention_1/query/kernel",
        "hidden": f"{block}MlpBlock_3/Dense_0/kernel",
    }
    missing = [key for key in needed.values() if key not in shapes]
    if missing:
        raise ValueError(f"weights '{path}' are no ViT of Google's layout: {', '.join(missing)} missing")
    patch, positions = shapes[needed["patch"]], shapes[needed["positions"]]
    query, hidden = shapes[needed["query"]], shapes[needed["hidden"]]
    grid = math.isqrt(positions[1] - 1) if len(positions) == 3 else 0
    if len(patch) != 4 or len(query) != 3 or len(hidden) != 2 or not grid or grid * grid + 1 != positions[1]:
        found = ", ".join(f"{key} {list(shapes[key])}" for key in needed.values())
        raise ValueError(f"weights '{path}' are no ViT of Google's layout with a class token: {found}")
    depth = sum(key.startswith(f"{prefix}Transformer/encoderblock_") and key.endswith("query/kernel") for key in shapes)
    head = shapes.get(f"{prefix}head/bias", (0,))
    return {
        "img_size": grid * patch[0],
        "patch_size": patch[0],
        "embed_dim": patch[3],
        "depth": depth,
        "num_heads": query[1],
        "mlp_ratio": hidden[1] / hidden[0],
        "num_classes": head[0],
    }


def _check(shapes: _Arrays, prefix: str, sizes: dict[str, Any], path: Path) -> None:
    """Refuse arrays that are missing or do not agree: copying would broadcast them silently."""
    width, heads, depth = sizes["embed_dim"], sizes["num_heads"], sizes["depth"]
    per_head, hidden, patch = width // heads, round(sizes["mlp_ratio"] * width), sizes["patch_size"]
    wanted: _Arrays = {
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, (sizes["img_size"] // patch) ** 2 + 1, width),
        **{f"Transformer/encoder_norm/{leaf}": (width,) for leaf in ("scale", "bias")},
    }
    if sizes["num_classes"]:
        wanted["head/kernel"] = (width, sizes["num_classes"])
        wanted["head/bias"] = (sizes["num_classes"],)
    for index in range(depth):
        block = f"Transformer/encoderblock_{index}/"
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            wanted[f"{attention}{part}/kernel"] = (width, heads, per_head)
            wanted[f"{attention}{part}/bias"] = (heads, per_head)
        wanted[f"{attention}out/kernel"] = (heads, per_head, width)
        wanted[f"{attention}out/bias"] = (width,)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            wanted.update({f"{block}{norm}/{leaf}": (width,) for leaf in ("scale", "bias")})
        wanted[f"{block}MlpBlock_3/Dense_0/kernel"] = (width, hidden)
        wanted[f"{block}MlpBlock_3/Dense_0/bias"] = (hidden,)
        wanted[f"{block}MlpBlock_3/Dense_1/kernel"] = (hidden, width)
        wanted[f"{block}MlpBlock_3/Dense_1/bias"] = (width,)
    faults = [
        f"{prefix}{key}: file {list(shapes[f'{prefix}{key}']) if f'{prefix}{key}' in shapes else 'lacks it'}, "
        f"needed {list(shape)}"
        for key, shape in wanted.items()
        if shapes.get(f"{prefix}{key}") != shape
    ]
    extra = [key for key in shapes if key.startswith(prefix) and key.removeprefix(prefix) not in wanted]
    representation = [key for key in extra if key.removeprefix(prefix) in _REPRESENTATION]
    faults += [f"{key}: file {list(shapes[key])}, not part of a ViT" for key in extra if key not in representation]
    if representation and not faults:
        _logger.info("representation layer before the head in '%s' left out: %s", path, ", ".join(representation))
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"weights '{path}' do not hold together: {'; '.join(faults[:5])}{more}")
