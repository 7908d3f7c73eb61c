"""Functions that find the head, the blocks, and the layers of a model.

The head is the module that computes the outputs of a model from its features. The blocks are the repeated modules of
its backbone.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snella.targets import all_linear_names


def freeze_running_statistics(model: nn.Module) -> None:
    """Make batch normalization layers use their running statistics in training mode.

    Otherwise, each batch would change the running statistics, which adapters do not save.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_use_stored_statistics)


def updated_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics that training updates, by name.

    These are the statistics of layers to which `freeze_running_statistics` was not applied.
    """
    statistics: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            continue
        if _use_stored_statistics in module._forward_pre_hooks.values():
            continue
        for buffer in ("running_mean", "running_var"):
            statistics[f"{name}.{buffer}"] = module.get_buffer(buffer)
    return statistics


def _use_stored_statistics(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Switch a batch normalization layer to evaluation mode before its forward pass (forward pre-hook)."""
    module.training = False


def find_head(model: nn.Module, head: str | None = None) -> str:
    """Return the name of the classifier head.

    timm models declare their head (`pretrained_cfg["classifier"]`, `get_classifier()`).

    Args:
        model: A classifier.
        head: Name of the head, for models that do not declare it. An empty name means the whole model.

    Returns:
        A module name, e.g. `"head"`, `"fc"` or `"head.fc"`.

    Raises:
        ValueError: If `head` names no module of the model, the model declares no head or several heads, or the head has
            no weights, e.g. with `num_classes=0`.
    """
    modules = dict(model.named_modules())
    name = _declared_head(model, modules) if head is None else head
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if name is None or name not in modules:
        if head is None:
            problem = f"{type(model).__name__} does not declare its classifier head; pass head=..."
        else:
            problem = f"head must name a module of the model, got {head!r}"
        raise ValueError(f"{problem}; the model's last linear layers are {linears[-3:]}")
    if not any(True for _ in modules[name].parameters()):
        if getattr(model, "num_classes", None) == 0:
            raise ValueError(
                f"the head {name!r} has no weights (num_classes=0); create the model with num_classes of at least 1"
            )
        raise ValueError(
            f"head must name a module with weights, got {name!r}; the model's last linear layers are {linears[-3:]}"
        )
    return name


def _declared_head(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the head that a timm model declares, or None if no head is declared.

    Raises:
        ValueError: If the model declares several heads.
    """
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(declared, str) and declared in modules:
        return declared
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, tuple):
        raise ValueError(
            f"{type(model).__name__} has {len(classifier)} heads, for distillation; use a model with one head"
        )
    return next((name for name, module in modules.items() if module is classifier), None)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model without its PEFT wrapper, if it has one."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the context, append the first input of each call to a module to the yielded list."""
    inputs_of_calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, inputs: inputs_of_calls.append(inputs[0]))
    try:
        yield inputs_of_calls
    finally:
        handle.remove()


def standardizes_weight(module: nn.Module) -> bool:
    """Return whether a module is a convolution from timm or transformers that standardizes its weight when called."""
    return isinstance(module, nn.Conv2d) and any(part in type(module).__name__ for part in ("StdConv", "Standardized"))


def is_inside(name: str, module_name: str) -> bool:
    """Return whether the module or parameter `name` is `module_name` or inside it."""
    return name == module_name or name.startswith(module_name + ".")


def adaptable_layers(model: nn.Module, head: str) -> list[str]:
    """Return the names of the layers that LoRA and SNELLA adapt by default.

    Like SNELLA's `"all-linear"`, selects all linear layers except the head, patch embedding, and patch merging.
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
    """Return the repeated blocks of a backbone in module order: `blocks.0`, `layers.1.blocks.5`, `layer4.2`.

    Blocks are the innermost numbered modules in containers named `blocks`, `layers`, `layer`, `layer1`, `stages`,
    `features` or `h`. This covers timm's ViT, Swin, ConvNeXt, EfficientNet and ResNet, and transformers' ViT.

    Args:
        model: Backbone with its head.
        head: Name of the head.
    """
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if _BLOCK.search(name) and not is_inside(name, head) and not isinstance(module, nn.Sequential | nn.ModuleList)
    ]
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in candidates:
        contains_other = any(is_inside(other, name) and other != name for other, _ in candidates)
        has_parameters = any(True for _ in module.parameters())
        if has_parameters and not contains_other:
            blocks.append((name, module))
    return blocks


def require_blocks(method: str, model: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Return the blocks that `find_blocks` finds, or raise `ValueError` if the model has none."""
    blocks = find_blocks(model, head)
    if not blocks:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: it needs numbered blocks "
            "(blocks.0, layers.0, stages.0.blocks.0), and this model has none"
        )
    return blocks


class AdapterFileError(ValueError):
    """Error for an adapter file that is damaged or does not fit the model."""
