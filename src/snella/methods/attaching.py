"""Adding small modules to a backbone without touching its code, its module tree or the names of its weights.

A child module is registered on the module that it belongs to, and a hook (a plain function that finds the child on the
module it is called for) puts it to work. Copies of the model, `state_dict` and `.to(device)` treat it as any module.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


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
