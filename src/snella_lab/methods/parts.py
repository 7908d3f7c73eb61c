"""Functions that attach modules to a model, and find the token blocks and MLPs of a backbone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from snella_app.methods.model_parts import is_inside, require_blocks


def attach(
    module: nn.Module,
    name: str,
    child: nn.Module,
    *,
    after: Callable[[nn.Module, tuple[Any, ...], Any], Any] | None = None,
    before: Callable[[nn.Module, tuple[Any, ...]], Any] | None = None,
) -> None:
    """Add `child` to `module` as submodule `name`, with optional hooks.

    Args:
        module: Module of the backbone.
        name: Attribute name of the child, which must be unused.
        child: Module to add. It is moved to the device of the first parameter of `module`.
        after: Forward hook, `(module, inputs, output) -> output`. Use a module-level function, not a closure, so that
            the model can be copied.
        before: Forward pre-hook, `(module, inputs) -> inputs`.

    Raises:
        ValueError: If the name is in use, e.g. because a method was applied twice.
    """
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__} already has an attribute {name!r} ({type(getattr(module, name)).__name__}); "
            "apply a method only once, to a fresh backbone"
        )
    device = next((parameter.device for parameter in module.parameters()), None)
    module.add_module(name, child if device is None else child.to(device))
    if before is not None:
        module.register_forward_pre_hook(before)
    if after is not None:
        module.register_forward_hook(after)


def token_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a plain vision transformer, which map tokens `[batch, tokens, width]` to tokens.

    Raises:
        ValueError: If the model has no blocks, its head takes feature maps, its blocks do not share one token sequence
            or are not in timm's format, a block lacks `attn`, `mlp`, or a normalization layer `norm1`, or the
            attention uses rotary or relative positions, which added tokens lack.
    """
    blocks = require_blocks(method, model, head)
    has_prefix = isinstance(getattr(model, "num_prefix_tokens", None), int)
    has_stages = any(name.count(".") > 1 for name, _ in blocks)  # e.g. layers.0.blocks.1
    has_convolutions = any(hasattr(block, "local_mp") for _, block in blocks)  # in the blocks of XCiT
    model_positions = ("rope", "shared_rel_pos", "rel_pos_bias")
    attention_positions = ("relative_position_bias_table", "rel_pos", "rel_pos_h", "attention_biases", "pos_proj")
    attentions = [getattr(block, "attn", None) for _, block in blocks]
    if not has_prefix and not isinstance(model.get_submodule(head), nn.Linear):
        reason = f"its {head!r} takes feature maps, to which tokens cannot be added"
    elif not has_prefix or has_stages or has_convolutions:
        reason = "its blocks do not share one token sequence, or are not in timm's format (num_prefix_tokens, blocks.0)"
    elif any(block_width(block) is None for _, block in blocks):
        reason = "its blocks lack attn, mlp or a normalization layer norm1"
    elif _has_any(model, model_positions) or any(_has_any(attn, attention_positions) for attn in attentions):
        reason = "its attention uses rotary or relative positions, which added tokens lack"
    else:
        return blocks
    raise ValueError(
        f"method {method!r} cannot be applied to {type(model).__name__}: {reason}; use a plain ViT classifier (timm's "
        "VisionTransformer)"
    )


def _has_any(owner: object, names: Sequence[str]) -> bool:
    """Return True if at least one of the attributes of `owner` exists and is not None."""
    return any(getattr(owner, name, None) is not None for name in names)


def block_width(block: nn.Module) -> int | None:
    """Return a block's token width, or None if the block lacks `attn`, `mlp`, or a normalization layer `norm1`."""
    norm = getattr(block, "norm1", None)
    children = [norm, getattr(block, "attn", None), getattr(block, "mlp", None)]
    shape = getattr(norm, "normalized_shape", None)
    if not all(isinstance(child, nn.Module) for child in children) or not shape:
        return None
    return int(shape[-1])


def mlps(model: nn.Module, head: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield `(name, module, output width)` for each MLP outside the head.

    An MLP is a module named `mlp` or `ffn` with linear layers. The last of these layers defines the width, which is
    the size of the output's last dimension.
    """
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("mlp", "ffn") and not is_inside(name, head):
            linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
            if linears:
                yield name, module, linears[-1].out_features
