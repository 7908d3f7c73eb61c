"""Support for hooks of torch, accelerate, and diffusers on base layers.

A base layer is the pre-trained layer inside an adapted layer. Its hooks run around the adapted layer's computation,
which replaces the base layer's `forward` for the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

replacement_lock = threading.RLock()
"""Serializes temporary replacements of a shared module's `forward` or parameters across threads."""

NO_DATA_PARALLEL = (
    "nn.DataParallel does not support adapted attention layers or trained parameters such as cls_token; use "
    "DistributedDataParallel (torchrun), or make a single GPU visible"
)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks or a replaced `forward`."""
    return "forward" in module.__dict__ or any(hook_dicts(module))


def hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the dicts that contain a module's hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_hooked_in_graph(module: nn.Module, dicts: tuple[dict[int, Any], ...]) -> bool:
    """Return whether a module has hooks or a replaced `forward`, like `has_hooks`, but in a compiled graph.

    `torch.compile` reuses the graph of one layer for another unless a guard differs. It does not guard the hooks of a
    module (`torch._dynamo.config.skip_nnmodule_hook_guards`), but it does guard `dicts`: the module's `hook_dicts`,
    stored in another module.
    """
    has_new_forward = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") or "forward" in module.__dict__
    return has_new_forward or any([len(hooks) > 0 for hooks in dicts])


def call_inside_hooks(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module and all its hooks, with `forward` in place of the `forward` method of its class.

    Raises:
        NotImplementedError: If the module's `forward` was replaced by anything other than the hooks of accelerate and
            diffusers.
    """
    with replacement_lock:
        owner, name = _innermost_forward(module)
        previous = owner.__dict__.get(name)
        owner.__dict__[name] = forward
        try:
            return module(*args, **kwargs)
        finally:
            if previous is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = previous


def _innermost_forward(module: nn.Module) -> tuple[Any, str]:
    """Return the object and attribute through which hooks call the `forward` method of a module's class."""
    if "forward" not in module.__dict__:
        return module, "forward"
    # accelerate keeps the original method as `_old_forward`, and diffusers keeps it in the references of its hooks
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ())
    candidates: list[tuple[Any, str]] = [(module, "forward"), (module, "_old_forward")]
    for reference in references:
        candidates += [(reference, "forward"), (reference, "original_forward")]
    for owner, name in candidates:
        if getattr(owner.__dict__.get(name), "__func__", None) is type(module).forward:
            return owner, name
    raise NotImplementedError(
        f"the forward() of an adapted {type(module).__name__} was replaced by {module.__dict__['forward']!r}, which "
        "the update would bypass; replace it after get_peft_model, in the adapted layer"
    )


@contextmanager
def onloaded(layer: nn.Module, *, with_base: bool) -> Iterator[None]:
    """Temporarily load those tensors of a layer's children that accelerate has offloaded.

    Unlike PEFT's `onload_layer`, this does not copy the base layer's tensors.

    Args:
        layer: The layer.
        with_base: If True, also load the base layer. Calling the base layer loads it anyway.
    """
    children: list[Any] = [child for name, child in layer._modules.items() if with_base or name != "base_layer"]
    with ExitStack() as stack:
        for child in children:
            if "_hf_hook" in child.__dict__:
                child._hf_hook.pre_forward(child)
                stack.callback(child._hf_hook.post_forward, child, None)
        yield
