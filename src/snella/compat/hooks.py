"""What others hang around a module: hooks of torch, accelerate and diffusers, and how a layer runs inside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_inside_hooks = threading.RLock()


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to run before or after the `forward` of a module's class."""
    return bool(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    )


def hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where a module keeps its hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def is_hooked_in_graph(module: nn.Module, dicts: tuple[dict[int, Any], ...]) -> bool:
    """`has_hooks` for `torch.compile`, which watches `dicts`, a module's `hook_dicts` kept elsewhere.

    A compiled layer is used again for another one unless what was looked at differs, and torch does not look at hooks
    where a module keeps them (`torch._dynamo.config.skip_nnmodule_hook_guards`).
    """
    is_replaced = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") or "forward" in module.__dict__
    return is_replaced or any([len(hooks) > 0 for hooks in dicts])


def call_inside_hooks(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module with `forward` in the place of its class's own, so that whatever was hung around it runs as ever.

    Raises:
        NotImplementedError: The module's `forward` was replaced by something other than the hooks of torch, accelerate
            and diffusers.
    """
    holder, name = _innermost_forward(module)
    with _inside_hooks:
        before = holder.__dict__.get(name)
        holder.__dict__[name] = forward
        try:
            return module(*args, **kwargs)
        finally:
            holder.__dict__.pop(name)
            if before is not None:
                holder.__dict__[name] = before


def _innermost_forward(module: nn.Module) -> tuple[Any, str]:
    """The object, and its attribute, where hooks find the `forward` of a module's class."""
    if "forward" not in module.__dict__:
        return module, "forward"
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ())
    places = [(module, "forward"), (module, "_old_forward")]
    places += [(reference, name) for reference in references for name in ("forward", "original_forward")]
    for holder, name in places:
        if getattr(holder.__dict__.get(name), "__func__", None) is type(module).forward:
            return holder, name
    raise NotImplementedError(
        f"the forward() of an adapted {type(module).__name__} was replaced by {module.__dict__['forward']!r}, which "
        "its update would bypass; replace it after get_peft_model, in the adapted layer"
    )


@contextmanager
def onloaded(layer: nn.Module, *, with_base: bool) -> Iterator[None]:
    """Bring the tensors of a layer's parts to its device for a while, where accelerate offloads them.

    PEFT's `onload_layer` keeps a copy of what a base layer held, as its merging needs.

    Args:
        layer: The layer.
        with_base: Whether the base layer too is meant; its own call brings it.
    """
    parts: list[Any] = [part for name, part in layer._modules.items() if with_base or name != "base_layer"]
    parts = [part for part in parts if "_hf_hook" in part.__dict__]
    for part in parts:
        part._hf_hook.pre_forward(part)
    try:
        yield
    finally:
        for part in parts:
            part._hf_hook.post_forward(part, None)
