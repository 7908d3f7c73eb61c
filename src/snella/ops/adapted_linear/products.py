"""The product of an input with a weight, and its two gradients: a linear layer or a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(Protocol):
    """What the adapted op needs to know of the layer it sits in. Weights are `[m, …]`, seen as `[m, n]`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        """Return ∂L/∂x, of shape `x_shape`."""

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        """Return ∂L/∂weight, of shape `weight_shape`."""

    def grad_bias(self, grad_y: Tensor) -> Tensor:
        """Return ∂L/∂bias, `[m]`."""


@dataclass(frozen=True)
class LinearProduct:
    """`y = x Wᵀ + bias` for `x` `[…, n]` and `W` `[m, n]`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.linear(x, weight, bias)

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y @ weight

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.reshape(-1, grad_y.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.reshape(-1, grad_y.shape[-1]).sum(0)


@dataclass(frozen=True)
class Conv2dProduct:
    """A two-dimensional convolution of `x` `[N, c, h, w]` with `W` `[m, c/groups, kh, kw]`, zero padding."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.conv2d(x, weight, bias, self.stride, self.padding_sizes(weight.shape), self.dilation, self.groups)

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return self._backward(grad_y, grad_y.new_empty(1).expand(x_shape), weight, (True, False, False))[0]

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return self._backward(grad_y, x, x.new_empty(1).expand(weight_shape), (False, True, False))[1]

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.sum((0, 2, 3)) if grad_y.ndim == 4 else grad_y.sum((1, 2))

    def _backward(self, grad_y: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> list[Tensor]:
        """Both gradients of the convolution through torch's own operator; unbatched input gets a batch axis."""
        batched = x.ndim == 4
        grads = torch.ops.aten.convolution_backward(
            grad_y if batched else grad_y[None],
            x if batched else x[None],
            weight,
            None,
            self.stride,
            self.padding_sizes(weight.shape),
            self.dilation,
            False,
            [0, 0],
            self.groups,
            mask,
        )
        return [grad if grad is None or batched or k == 1 else grad[0] for k, grad in enumerate(grads)]

    def padding_sizes(self, weight_shape: torch.Size) -> tuple[int, ...]:
        """Padding in pixels, also where it was given as a word.

        Raises:
            NotImplementedError: `padding="same"` needs a different padding on both sides.
        """
        if self.padding == "valid":
            return (0, 0)
        if isinstance(self.padding, str):
            totals = [dil * (size - 1) for dil, size in zip(self.dilation, weight_shape[2:], strict=True)]
            if any(total % 2 for total in totals):
                raise NotImplementedError(
                    f"padding='same' needs an odd kernel, got kernel_size={list(weight_shape[2:])} with "
                    f"dilation={list(self.dilation)}; pad the input yourself and use padding=0"
                )
            return (totals[0] // 2, totals[1] // 2)
        return self.padding


@dataclass(frozen=True)
class WeightItself:
    """The weight `W` `[m, …]` alone, for a model that multiplies with it elsewhere; `x` and a bias play no part."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return weight

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.new_zeros(x_shape)

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.reshape(weight_shape)

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.new_zeros(len(grad_y))


def without_view(y: Tensor) -> Tensor:
    """`y` as a tensor of its own over the same memory.

    torch forbids in-place operations on a view that a hand-written autograd function returns, and a product is one
    wherever torch reshapes it (a bias and three axes, a convolution without a batch).
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
