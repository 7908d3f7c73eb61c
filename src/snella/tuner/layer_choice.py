"""Which layer adapts a module of the model, and which modules none can."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.tuner.conv import Conv2d
from snella.tuner.layer import SnellaLayer
from snella.tuner.linear import Linear
from snella.tuner.quantized import find_quantization

# linear layers with a forward() of their own that is the same product
_PLAIN_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
# what serves where a module of another kind is to be trained
_INSTEAD = {
    nn.Embedding: "train rows of an embedding with trainable_token_indices, or all of it with modules_to_save",
    nn.Conv1d: "train it in full with modules_to_save",
    nn.Conv3d: "train it in full with modules_to_save",
}


def choose_layer_class(base: nn.Module, name: str) -> type[SnellaLayer]:
    """Return the layer that can adapt a module.

    Args:
        base: The module, without adapters.
        name: Its full name, for errors.

    Raises:
        NotImplementedError: It has a `forward` of its own, or a weight quantised in a way that is not supported.
        RuntimeError: It is to be quantised by bitsandbytes and is not yet.
        TypeError: It is neither linear nor a two-dimensional convolution.
    """
    if isinstance(base, nn.MultiheadAttention):
        raise NotImplementedError(
            f"target_modules matches {name!r}, a {class_name(base)} with a forward() of its own, which may use the "
            "weights in another way; leave it out with exclude_modules"
        )
    if find_quantization(base, name) is not None:
        return Linear
    kind = _kind(base)
    own = own_methods(base)
    if own:
        raise NotImplementedError(
            f"target_modules matches {name!r}, a {class_name(base)} with a {own[0]}() of its own, which the update "
            "would bypass; leave it out with exclude_modules"
        )
    if kind is not None:
        return Conv2d if kind is nn.Conv2d else Linear
    hint = next((f"; {hint}" for other, hint in _INSTEAD.items() if isinstance(base, other)), "")
    raise TypeError(
        f"target_modules matches {name!r}, a {type(base).__name__}; "
        f"SNELLA adapts torch.nn.Linear, torch.nn.Conv2d and transformers' Conv1D{hint}"
    )


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """`(m, n)` of the weight of a module that can be adapted, seen as a matrix."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features  # a quantised weight may have any shape
    weight: Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1:].numel()


def refuse_quantized_projection(weight: Tensor, name: str) -> None:
    """Raise `NotImplementedError` where a projection of a torch attention has a quantised weight."""
    if type(weight).__module__.startswith(("bitsandbytes.", "torchao.")) or not weight.is_floating_point():
        raise NotImplementedError(
            f"target_modules matches {name!r}, a projection of an nn.MultiheadAttention whose weight is a "
            f"{type(weight).__name__} of {weight.dtype}; only linear layers can be adapted where they are quantised; "
            "leave the attention unquantised"
        )


def class_name(module: nn.Module) -> str:
    """Full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__name__}"


def own_methods(base: nn.Module) -> list[str]:
    """Names of the methods by which a class changes what torch's computes, e.g. timm's `Conv2dSame`."""
    kind = _kind(base)
    if kind is None or class_name(base) in _PLAIN_LINEAR:
        return []
    methods = ("forward", "_conv_forward")
    return [method for method in methods if getattr(type(base), method, None) is not getattr(kind, method, None)]


def _kind(base: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that a module is, among those that can be adapted."""
    return next((kind for kind in (nn.Linear, Conv1D, nn.Conv2d) if isinstance(base, kind)), None)


__all__ = ["choose_layer_class", "class_name", "matrix_shape", "own_methods", "refuse_quantized_projection"]
