"""Which layers an adapter method changes when nobody says otherwise."""

from torch import nn

from snella.methods.head import is_inside
from snella.tuner.targets import all_linear_names


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
