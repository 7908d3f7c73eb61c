"""Functions that find the head, blocks, MLPs and layers of a model, and attach modules."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
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
            f"{type(module).__name__} already has a {name!r} ({type(getattr(module, name)).__name__}); "
            "apply a method only once, to a fresh backbone"
        )
    device = next((parameter.device for parameter in module.parameters()), None)
    module.add_module(name, child if device is None else child.to(device))
    if before is not None:
        module.register_forward_pre_hook(before)
    if after is not None:
        module.register_forward_hook(after)


def attached(model: nn.Module, name: str, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield `(module name, module, child)` for each module with a child `name` of class `kind`."""
    for module_name, module in list(model.named_modules()):
        child = module._modules.get(name)
        if isinstance(child, kind):
            yield module_name, module, child


def detach(module: nn.Module, name: str, *hooks: Callable[..., Any]) -> None:
    """Remove a child and its hooks.

    Args:
        module: Module of the backbone.
        name: As for `attach`.
        hooks: Functions passed to `attach`.
    """
    delattr(module, name)
    remove_hooks(module, *hooks)


def remove_hooks(module: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Remove forward hooks by their functions.

    Hooks of a copied model cannot be removed by the original's `RemovableHandle`.
    """
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in table.items() if hook in hooks]:
            del table[key]


def freeze_running_statistics(model: nn.Module) -> int:
    """Make batch normalization layers use their running statistics in training mode.

    Otherwise, each batch would change the running statistics, which adapters do not save.

    Args:
        model: Backbone; changed in place.

    Returns:
        Number of frozen layers.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.register_forward_pre_hook(_use_stored_statistics)
    return len(layers)


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
    if head is not None:
        if head not in modules:
            linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"head must name a module of the model, got {head!r}; its last linear layers are {linears[-3:]}"
            )
        name = head
    else:
        name = _declared_head(model, modules)
    if not any(True for _ in modules[name].parameters()):
        raise ValueError(
            f"the head {name!r} has no weights (num_classes={getattr(model, 'num_classes', None)}); "
            "create the model with num_classes of at least 2"
        )
    return name


def _declared_head(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Return the head that a timm model declares."""
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(declared, str) and declared in modules:
        return declared
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    for name, module in modules.items():
        if module is classifier:
            return name
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    raise ValueError(
        f"{type(model).__name__} does not declare its classifier head; "
        f"pass head=..., its last linear layers are {linears[-3:]}"
    )


def base_model(model: nn.Module) -> nn.Module:
    """Return the model without its PEFT wrapper, if it has one."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


def is_inside(name: str, module_name: str) -> bool:
    """Return whether `name` is `module_name` or one of its submodules."""
    return name == module_name or name.startswith(module_name + ".")


def adaptable_layers(model: nn.Module, head: str) -> list[str]:
    """Return the names of the layers that LoRA and SNELLA adapt.

    Like SNELLA's `"all-linear"`, selects all `Linear` layers except the head, patch embedding and patch merging.
    Networks without such layers use all ungrouped `Conv2d` layers except the first (the stem).

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
    `h`. This covers ViT, Swin, ConvNeXt, EfficientNet and ResNet of timm, and ViT of transformers.

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
        if not any(is_inside(other, name) and other != name for other, _ in candidates) and _has_weights(module)
    ]


def require_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the blocks as `find_blocks` does, or raise an error if there are none.

    Raises:
        ValueError: If the model has no blocks.
    """
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
        ValueError: If the blocks do not share one token sequence (windows, convolutions), or attention uses token
            positions, which added tokens lack.
    """
    blocks = require_blocks(method, model, head)
    reason = ""
    is_token_model = isinstance(getattr(model, "num_prefix_tokens", None), int)
    if not isinstance(model.get_submodule(head), nn.Linear) and not hasattr(model, "num_prefix_tokens"):
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: its {head!r} takes feature maps, to which "
            "tokens cannot be added; use a plain ViT classifier (timm's VisionTransformer)"
        )
    if not is_token_model or any(name.count(".") > 1 for name, _ in blocks):
        reason = "its blocks do not share one token sequence"
    elif any(width_of_block(block) is None for _, block in blocks):
        reason = "its blocks are not pre-norm attention and MLP"
    elif getattr(model, "rope", None) is not None or getattr(model, "shared_rel_pos_bias", None) is not None:
        reason = "it rotates or biases tokens by their position, which added tokens lack"
    elif any(_has_position_bias(getattr(block, "attn", None)) for _, block in blocks):
        reason = "it biases tokens by their position, which added tokens lack"
    if reason:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: {reason}; "
            "use a plain ViT (timm's VisionTransformer)"
        )
    return blocks


def _has_position_bias(attention: nn.Module | None) -> bool:
    """Return whether an attention module has a relative position bias."""
    names = ("relative_position_bias_table", "rel_pos", "rel_pos_h", "attention_biases")
    return any(getattr(attention, name, None) is not None for name in names)


def width_of_block(block: nn.Module) -> int | None:
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


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module has parameters."""
    return next(module.parameters(), None) is not None


class AdapterFileError(ValueError):
    """Error for a damaged adapter file, or one that does not fit the model."""


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Convert errors raised while a saved selection is restored into `AdapterFileError`.

    Raises:
        AdapterFileError: If a layer is missing, has another type or has fewer weights.
    """
    try:
        yield
    except (AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise AdapterFileError(
            f"the adapter does not fit {type(model).__name__}: {error}; load it into the architecture it was trained on"
        ) from error
