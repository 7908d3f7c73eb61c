"""Functions that find the head, blocks, MLPs and layers of a model, and attach modules."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snella.targets import all_linear_names


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
        name: Attribute name of the child; must be unused.
        child: Module to add; it is moved to the device of the module's parameters.
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


def find_attached(model: nn.Module, name: str, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield `(module name, module, child)` for each module with a child `name` of class `kind`."""
    for module_name, module in list(model.named_modules()):
        child = module._modules.get(name)
        if isinstance(child, kind):
            yield module_name, module, child


def remove_hooks(module: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Remove the forward hooks and forward pre-hooks with the given functions.

    Hooks of a copied model cannot be removed by the original's `RemovableHandle`.
    """
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in table.items() if hook in hooks]:
            del table[key]


def freeze_running_statistics(model: nn.Module) -> None:
    """Make batch normalization layers use their running statistics in training mode.

    Otherwise, each batch would change the running statistics, which adapters do not save.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_use_stored_statistics)


def _use_stored_statistics(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Switch a module to evaluation mode (forward pre-hook)."""
    module.training = False


def find_head(model: nn.Module, head: str | None = None) -> str:
    """Return the name of the classifier head.

    timm models declare their head (`pretrained_cfg["classifier"]`, `get_classifier()`).

    Args:
        model: A classifier.
        head: Name of the head, for models that do not declare it.

    Returns:
        A module name, e.g. `"head"`, `"fc"` or `"head.fc"`.

    Raises:
        ValueError: If the module does not exist, the model declares no head, or the head has no weights
            (`num_classes=0`).
    """
    modules = dict(model.named_modules())
    name = _declared_head(model, modules) if head is None else head
    if name is None or name not in modules:
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        problem = (
            f"{type(model).__name__} does not declare its classifier head; pass head=..."
            if head is None
            else f"head must name a module of the model, got {head!r}"
        )
        raise ValueError(f"{problem}; the model's last linear layers are {linears[-3:]}")
    if not any(True for _ in modules[name].parameters()):
        raise ValueError(
            f"the head {name!r} has no weights (num_classes={getattr(model, 'num_classes', None)}); "
            "create the model with num_classes of at least 1"
        )
    return name


def _declared_head(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """Return the head that a timm model declares; None for other models."""
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if declared in modules:
        return str(declared)
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    return next((name for name, module in modules.items() if module is classifier), None)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model without its PEFT wrapper, if it has one."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Append the first input of each call of a module to the returned list inside the context."""
    inputs_of_calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, inputs: inputs_of_calls.append(inputs[0]))
    try:
        yield inputs_of_calls
    finally:
        handle.remove()


def is_inside(name: str, module_name: str) -> bool:
    """Return whether the module or parameter `name` is `module_name` or inside it."""
    return name == module_name or name.startswith(module_name + ".")


def adaptable_layers(model: nn.Module, head: str) -> list[str]:
    """Return the names of the layers that LoRA and SNELLA adapt.

    Like SNELLA's `"all-linear"`, selects all `Linear` layers except the head, patch embedding and patch merging.
    If there are none, selects all ungrouped `Conv2d` layers except the first (the stem) and the head.

    Args:
        model: Backbone with its head.
        head: Name of the head.

    Raises:
        ValueError: If the model has no layer to adapt.
    """
    linears = [name for name in all_linear_names(model) if not is_inside(name, head)]
    if linears:
        return linears
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    chosen = [name for name, module in convolutions[1:] if module.groups == 1 and not is_inside(name, head)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d layer to adapt besides its head {head!r}")
    return chosen


_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?\d*|stages|features|h)(?:\.\d+)+$")


def find_blocks(model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks of a backbone in forward order: `blocks.0`, `layers.1.blocks.5`, `layer4.2`.

    Blocks are the innermost numbered modules in containers named `blocks`, `layers`, `layer1`, `stages`, `features` or
    `h`. This covers timm's ViT, Swin, ConvNeXt, EfficientNet and ResNet, and transformers' ViT.

    Args:
        model: Backbone with its head.
        head: Name of the head.
    """
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if _BLOCK.search(name) and not is_inside(name, head) and not isinstance(module, nn.Sequential | nn.ModuleList)
    ]
    return [
        (name, module)
        for name, module in candidates
        if not any(is_inside(other, name) and other != name for other, _ in candidates)
        and any(True for _ in module.parameters())
    ]


def require_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the result of `find_blocks`; raise `ValueError` if the model has no blocks."""
    blocks = find_blocks(model, head)
    if not blocks:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: it needs numbered blocks "
            "(blocks.0, layers.0, stages.0.blocks.0), and this model has none"
        )
    return blocks


def token_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a plain vision transformer, which map tokens `[batch, tokens, width]` to tokens.

    Raises:
        ValueError: If the model has no blocks, the head takes feature maps, the blocks do not share one token sequence
            (windows, convolutions) or lack `attn`, `mlp` or a normalization layer `norm1`, or attention uses rotary or
            relative positions, which added tokens lack.
    """
    blocks = require_blocks(method, model, head)
    has_prefix = isinstance(getattr(model, "num_prefix_tokens", None), int)
    position_parts = ("relative_position_bias_table", "rel_pos", "rel_pos_h", "attention_biases")
    attentions = [getattr(block, "attn", None) for _, block in blocks]
    if not has_prefix and not isinstance(model.get_submodule(head), nn.Linear):
        reason = f"its {head!r} takes feature maps, to which tokens cannot be added"
    elif not has_prefix or any(name.count(".") > 1 for name, _ in blocks):
        reason = "its blocks do not share one token sequence"
    elif any(block_width(block) is None for _, block in blocks):
        reason = "its blocks lack attn, mlp or a normalization layer norm1"
    elif any(getattr(model, name, None) is not None for name in ("rope", "shared_rel_pos_bias")) or any(
        getattr(attention, name, None) is not None for attention in attentions for name in position_parts
    ):
        reason = "its attention uses rotary or relative positions, which added tokens lack"
    else:
        return blocks
    raise ValueError(
        f"method {method!r} cannot be applied to {type(model).__name__}: {reason}; use a plain ViT classifier (timm's "
        "VisionTransformer)"
    )


def block_width(block: nn.Module) -> int | None:
    """Return the token width of a transformer block with `norm1`, `attn` and `mlp`; None for other blocks."""
    parts = [getattr(block, name, None) for name in ("norm1", "attn", "mlp")]
    shape = getattr(parts[0], "normalized_shape", None)
    if not all(isinstance(part, nn.Module) for part in parts) or not shape:
        return None
    return int(shape[-1])


def mlps(model: nn.Module, head: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield `(name, module, output width)` for the MLP of each block; MLP outputs are channels-last.

    An MLP is a module named `mlp` or `ffn`; its last linear layer defines the width.
    """
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("mlp", "ffn") and not is_inside(name, head):
            linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
            if linears:
                yield name, module, linears[-1].out_features


class AdapterFileError(ValueError):
    """Error for a damaged adapter file, or one that does not fit the model."""
