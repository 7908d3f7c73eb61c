"""Parts of a model that methods change: its head, blocks, MLPs and layers, and what is attached to them."""

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
    """Make `child` a part of `module`, under `name`.

    Args:
        module: Of the backbone.
        name: Attribute of the child; it must be free.
        child: What is added; it is moved to the device of the module's own parameters.
        after: Forward hook: `(module, inputs, output) -> output`. A function of a Python module, not a closure, so
            that copies of the model work.
        before: Forward pre-hook: `(module, inputs) -> inputs`.

    Raises:
        ValueError: The name is taken, as when a method is applied twice.
    """
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__} has a {name!r} already, a {type(getattr(module, name)).__name__}; "
            "apply a method to a fresh backbone, once"
        )
    device = next((parameter.device for parameter in module.parameters()), None)
    module.add_module(name, child if device is None else child.to(device))
    if before is not None:
        module.register_forward_pre_hook(before)
    if after is not None:
        module.register_forward_hook(after)


def attached(model: nn.Module, name: str, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module of `model` with a child `name` of a certain class, as `(module's name, module, child)`."""
    for module_name, module in list(model.named_modules()):
        child = module._modules.get(name)
        if isinstance(child, kind):
            yield module_name, module, child


def detach(module: nn.Module, name: str, *hooks: Callable[..., Any]) -> None:
    """Take a child and its hooks away again.

    Args:
        module: Of the backbone.
        name: As for `attach`.
        hooks: The functions that `attach` was given.
    """
    delattr(module, name)
    remove_hooks(module, *hooks)


def remove_hooks(module: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Take forward hooks away by the functions that they call.

    Torch removes a hook by the handle that registering gave, which a copy of the model does not share.
    """
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in table.items() if hook in hooks]:
            del table[key]


def freeze_running_statistics(model: nn.Module) -> int:
    """Make every batch normalization layer normalize with its stored statistics, in training too.

    Otherwise "frozen" layers would drift with each batch, and the drift would be missing from the saved adapter.

    Args:
        model: The backbone; changed in place.

    Returns:
        How many layers were frozen.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.register_forward_pre_hook(_use_stored_statistics)
    return len(layers)


def _use_stored_statistics(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook: leave training mode, which `model.train()` set."""
    module.training = False


def find_head(model: nn.Module, head: str | None = None) -> str:
    """Name of the module that turns features into class scores.

    timm models say it themselves (`pretrained_cfg["classifier"]`, `get_classifier()`).

    Args:
        model: A classifier.
        head: The name, for a model that does not say.

    Returns:
        A name out of `model.named_modules()`, e.g. `"head"`, `"fc"` or `"head.fc"`.

    Raises:
        ValueError: The model has no such module, does not say which it is, or it has no weights (`num_classes=0`).
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
    """The head that a timm model declares."""
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
        f"{type(model).__name__} does not say which module is its classifier head; "
        f"pass head=..., its last linear layers are {linears[-3:]}"
    )


def base_model(model: nn.Module) -> nn.Module:
    """The backbone with its head that PEFT wraps, if it does."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


def is_inside(name: str, module_name: str) -> bool:
    """Whether `name` is the module `module_name` or lies within it."""
    return name == module_name or name.startswith(module_name + ".")


def adaptable_layers(model: nn.Module, head: str) -> list[str]:
    """Names of the layers that LoRA and SNELLA adapt.

    Those of SNELLA's `"all-linear"`: every `Linear` except head, patch embedding and patch merging. In a network
    without any, every ungrouped `Conv2d` except the first, which is the stem.

    Args:
        model: The backbone with its head.
        head: Name of the head.

    Raises:
        ValueError: Nothing is left to adapt.
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
    if not isinstance(model.get_submodule(head), nn.Linear) and not hasattr(model, "num_prefix_tokens"):
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: its {head!r} reads feature maps, to which "
            "tokens cannot be added; it needs a classifier that is a plain ViT (timm's VisionTransformer)"
        )
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


class AdapterFileError(ValueError):
    """An adapter file is damaged, or belongs to another model."""


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Say of an error inside that the stored choice does not fit the model.

    Raises:
        AdapterFileError: A layer is missing, is of another kind or has fewer weights.
    """
    try:
        yield
    except (AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise AdapterFileError(
            f"the adapter does not fit {type(model).__name__}: {error}; load it into the architecture it was trained on"
        ) from error
