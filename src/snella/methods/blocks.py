"""Where a backbone repeats itself: its blocks, in the order of their names, and the layers inside of them."""

import re
from collections.abc import Iterator

from torch import nn

from snella.methods.head import is_inside

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?\d*|stages|features|h)(?:\.\d+)+$")


def find_blocks(model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a backbone, in forward order: `blocks.0`, `layers.1.blocks.5`, `layer4.2`.

    Numbered modules in a container called `blocks`, `layers`, `layer1`, `stages`, `features` or `h`, of which none
    holds another: those of a timm ViT, Swin, ConvNeXt, EfficientNet or ResNet, and of transformers' ViT.

    Args:
        model: The backbone with its head.
        head: Name of its head.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _BLOCK.search(name) and not is_inside(name, head) and not isinstance(module, nn.Sequential | nn.ModuleList)
    ]
    return [
        (name, module)
        for name, module in found
        if not any(is_inside(other, name) and other != name for other, _ in found) and _has_weights(module)
    ]


def require_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """As `find_blocks`, for a method that needs some.

    Raises:
        ValueError: The model has none; names the method and the model.
    """
    blocks = find_blocks(model, head)
    if not blocks:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: it works on numbered blocks "
            "(blocks.0, layers.0, stages.0.blocks.0), and this model has none"
        )
    return blocks


def token_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """The blocks of a plain vision transformer, all of which take and give tokens `[batch, tokens, width]`.

    Raises:
        ValueError: The blocks are of another kind (windows, convolutions) or the model gives each token a position
            that an added token would lack; names the method and the model.
    """
    blocks = require_blocks(method, model, head)
    reason = ""
    is_one_row = isinstance(getattr(model, "num_prefix_tokens", None), int)
    if not is_one_row or any(name.count(".") > 1 for name, _ in blocks):
        reason = "its blocks do not share one row of tokens"
    elif any(width_of_block(block) is None for _, block in blocks):
        reason = "its blocks are not an attention and an MLP behind one norm each"
    elif getattr(model, "rope", None) is not None or getattr(model, "shared_rel_pos_bias", None) is not None:
        reason = "it rotates or biases tokens by their place, which added tokens lack"
    elif any(_has_position_bias(getattr(block, "attn", None)) for _, block in blocks):
        reason = "it biases tokens by their place, which added tokens lack"
    if reason:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: {reason}; "
            "it needs a plain ViT (timm's VisionTransformer)"
        )
    return blocks


def _has_position_bias(attention: nn.Module | None) -> bool:
    """Whether an attention adds a bias that depends on the places of two tokens."""
    names = ("relative_position_bias_table", "rel_pos", "rel_pos_h", "attention_biases")
    return any(getattr(attention, name, None) is not None for name in names)


def width_of_block(block: nn.Module) -> int | None:
    """The number of channels of a token in a transformer block with `norm1`, `attn` and `mlp`; None for others."""
    parts = [getattr(block, name, None) for name in ("norm1", "attn", "mlp")]
    shape = getattr(parts[0], "normalized_shape", None)
    if not all(isinstance(part, nn.Module) for part in parts) or not shape:
        return None
    return int(shape[-1])


def mlps(model: nn.Module, head: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Every block's MLP with the width of what it gives, as `(name, module, width)`; its channels come last.

    An MLP is a module called `mlp` or `ffn`, whose last linear layer tells the width.
    """
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("mlp", "ffn") and not is_inside(name, head):
            linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
            if linears:
                yield name, module, linears[-1].out_features


def _has_weights(module: nn.Module) -> bool:
    """Whether there is a parameter in it."""
    return next(module.parameters(), None) is not None
