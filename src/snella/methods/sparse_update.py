"""Sparse updates of a frozen weight: int32 positions and as many values, no dense tensor."""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.ops.fixed_support import fold_entries, layer_with_entries
from snella.ops.spec import Conv2dOp, LayerOp, LinearOp


class SparseUpdate(nn.Module):
    """A `Linear` or `Conv2d` of which single weights are trained.

    y = product(x, W) + bias,   W = W0, W[indices[k]] += values[k]

    Kept for the backward pass are the input and the values; `W` is made anew there, and the gradient reaches the
    values alone. Optimizer and file hold `2·len(indices)` numbers, not a masked matrix.

    Args:
        base_layer: The frozen layer.
        indices: Positions in its weight, flattened, strictly ascending.

    Raises:
        TypeError: A layer of another class, or with a forward pass of its own.
        ValueError: Positions out of range, repeated or not in order.
    """

    saved_buffers: tuple[str, ...] = ("indices",)
    base_layer: nn.Linear | nn.Conv2d
    indices: Tensor

    def __init__(self, base_layer: nn.Module, indices: Tensor) -> None:
        super().__init__()
        if not can_be_sparse(base_layer):
            raise TypeError(
                f"base_layer must be a torch.nn.Linear or Conv2d with its own forward pass, got {type(base_layer)}"
            )
        weight = base_layer.weight
        size = weight.numel()
        in_order = indices.ndim == 1 and bool((indices[1:] > indices[:-1]).all())
        if not in_order or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < size):
            raise ValueError(
                f"indices must be positions in [0, {size}), one-dimensional and strictly ascending, got {indices}"
            )
        self.base_layer = base_layer
        self.register_buffer("indices", indices.to(weight.device, torch.int32))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(len(indices), dtype=dtype, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """`W`, differentiable, for models that read a layer's weight past the layer."""
        return fold_entries(self.base_layer.weight, self.values, self.indices)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the layer."""
        return self.base_layer.bias

    @property
    def product(self) -> LayerOp:
        """The product of the base layer."""
        base = self.base_layer
        if isinstance(base, nn.Conv2d):
            padding = base.padding if base.padding_mode == "zeros" else (0, 0)
            return Conv2dOp(base.stride, padding, base.dilation, base.groups)
        return LinearOp()

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, such as `in_features`, is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copying asks for __deepcopy__
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def prepare_input(self, x: Tensor) -> Tensor:
        """What happens to the input before the product: padding other than by zeros, and autocast's dtype."""
        base = self.base_layer
        if isinstance(base, nn.Conv2d) and base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the trained entries in its weight."""
        base, x = self.base_layer, self.prepare_input(x)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return layer_with_entries(x, base.weight, bias, self.values, self.indices, self.product)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with the trained entries in its own weight; outputs stay the same bit for bit."""
        self.base_layer.weight.copy_(self.weight)
        return self.base_layer

    def extra_repr(self) -> str:
        """How many entries are trained."""
        return f"{len(self.indices)} of {self.base_layer.weight.numel()} weights"


class SparseEntries(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) that trains some entries of a small frozen vector.

    v = v0, v[indices[k]] += values[k]

    Args:
        vector: The frozen parameter.
        indices: Positions in it, strictly ascending.
    """

    saved_buffers = ("indices",)
    indices: Tensor

    def __init__(self, vector: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices.to(vector.device, torch.int32))
        self.values = nn.Parameter(
            vector.new_zeros(len(indices), dtype=torch.promote_types(vector.dtype, torch.float32))
        )

    def forward(self, vector: Tensor) -> Tensor:
        """The vector with the trained entries in it."""
        return fold_entries(vector, self.values, self.indices)


def can_be_sparse(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether `SparseUpdate` can wrap a module: a `Linear` or `Conv2d` that computes what these classes do."""
    return any(
        isinstance(module, kind) and all(getattr(type(module), f, None) is getattr(kind, f, None) for f in methods)
        for kind, methods in ((nn.Linear, ("forward",)), (nn.Conv2d, ("forward", "_conv_forward")))
    )


def merge_sparse(model: nn.Module) -> nn.Module:
    """Put every layer that `SparseUpdate` wraps back into its place, with the trained entries in its weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseUpdate):
            model.set_submodule(name, module.merged())
    return model
