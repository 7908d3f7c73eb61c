"""Operations of adapted layers, their weights and inputs, and approximate weight gradients.

A layer's *op* computes the layer's output and gradients for a given weight. A *token* is one row of a linear layer's
input, flattened to `[T, n]`. An *update* is the matrix that an adapter adds to the weight.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MIN_TOKENS = 64
"""Minimum sample size, if there are that many tokens.

The product of fewer tokens costs little compared to merging an adapter's factors.
"""
MIN_SHARE = 2**-10
"""Minimum fraction of sampled tokens.

Floats between this and 1 have integer ratios that fit the int64 arguments of compiled graphs.
"""
WITHOUT_FLOAT64 = {"mps"}
"""Device types that reject float64 tensors. Some `xpu` devices reject them, too."""
_ROUNDS = 4  # iterations to find the tokens with probability 1


class LayerOp(Protocol):
    """Protocol of a layer's op: the output and the gradients, for a weight `[m, …]` with `m` output features."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        """Return ∂L/∂x, with shape `x_shape`."""

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        """Return ∂L/∂weight, with shape `weight_shape`."""

    def grad_bias(self, grad_y: Tensor) -> Tensor:
        """Return ∂L/∂bias, `[m]`."""

    def to_ints(self, weight_shape: torch.Size) -> list[int]:
        """Encode the op as integers for a `torch.compile` operator; `layer_op_from_ints` decodes them."""


@dataclass(frozen=True)
class LinearOp:
    """`y = x Wᵀ + bias` for `x` `[…, n]` and `W` `[m, n]`.

    Args:
        token_share: Fraction of the tokens from which the gradient of an update is estimated (see `sample_tokens`). A
            value of 1 uses all tokens. The other gradients are always exact.
        is_rounded: If True, compute the gradient of an update in bfloat16.
    """

    token_share: float = 1.0
    is_rounded: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.linear(x, weight, bias)

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y @ weight

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.reshape(-1, grad_y.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def gradient_tokens(self, grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂y `[k, m]` and `x` `[k, n]` of all tokens, or the result of `sample_tokens`."""
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        return (grad_y, x) if self.token_share == 1 else sample_tokens(grad_y, x, self.token_share)

    def product(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """Return an update's gradient `(∂L/∂y)ᵀ x` `[m, n]` from `gradient_tokens`, in bfloat16 if `is_rounded`."""
        if self.is_rounded:
            grad_y, x = grad_y.to(torch.bfloat16), x.to(torch.bfloat16)
        return grad_y.T @ x

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.reshape(-1, grad_y.shape[-1]).sum(0)

    def to_ints(self, weight_shape: torch.Size) -> list[int]:  # noqa: D102
        return [] if self == LinearOp() else [*self.token_share.as_integer_ratio(), int(self.is_rounded)]


@dataclass(frozen=True)
class Conv2dOp:
    """2D convolution of `x` `[N, c, h, w]` with `W` `[m, c/groups, kh, kw]` and zero padding."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, base: nn.Conv2d) -> Self:
        """Return the op of a convolution, for an input that has passed through `pad_input`."""
        padding = base.padding if base.padding_mode == "zeros" else (0, 0)
        return cls(base.stride, padding, base.dilation, base.groups)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.conv2d(x, weight, bias, self.stride, self.padding_sizes(weight.shape), self.dilation, self.groups)

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        # only the shape of `x` matters here; likewise, only the shape of the weight matters in `grad_weight`
        return self._backward(grad_y, grad_y.new_empty(1).expand(x_shape), weight, (True, False, False))[0]

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return self._backward(grad_y, x, x.new_empty(1).expand(weight_shape), (False, True, False))[1]

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.sum((0, 2, 3)) if grad_y.ndim == 4 else grad_y.sum((1, 2))

    def to_ints(self, weight_shape: torch.Size) -> list[int]:  # noqa: D102
        return [*self.stride, *self.padding_sizes(weight_shape), *self.dilation, self.groups]

    def _backward(self, grad_y: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> list[Tensor]:
        """Return the gradients of the input, weight, and bias, or `None` for those that `mask` does not select.

        An unbatched input gets a batch axis for this computation.
        """
        is_batched = x.ndim == 4
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_y if is_batched else grad_y[None],
            x if is_batched else x[None],
            weight,
            None,  # sizes of the bias
            self.stride,
            self.padding_sizes(weight.shape),
            self.dilation,
            False,  # not transposed
            [0, 0],  # output padding
            self.groups,
            mask,
        )
        if not is_batched and grad_x is not None:
            grad_x = grad_x[0]
        return [grad_x, grad_weight, grad_bias]

    def padding_sizes(self, weight_shape: torch.Size) -> tuple[int, ...]:
        """Return the padding of both spatial axes in pixels, including for `"same"` and `"valid"`.

        Raises:
            NotImplementedError: If `padding="same"` requires asymmetric padding.
        """
        if self.padding == "valid":
            return (0, 0)
        if isinstance(self.padding, str):
            totals = same_padding_totals(weight_shape[2:], self.dilation)
            if any(total % 2 for total in totals):
                raise NotImplementedError(
                    "padding='same' requires an odd kernel size or an even dilation, got "
                    f"kernel_size={list(weight_shape[2:])} with dilation={list(self.dilation)}; pad the input manually "
                    "and use padding=0"
                )
            return (totals[0] // 2, totals[1] // 2)
        return self.padding


def same_padding_totals(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the padding that `padding="same"` adds to each axis in pixels, summed over both ends of the axis."""
    return [step * (size - 1) for step, size in zip(dilation, kernel_size, strict=True)]


@dataclass(frozen=True)
class WeightOp:
    """Op that returns the weight `W` `[m, …]` and ignores the input and bias, for models that read `layer.weight`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return weight

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.new_zeros(x_shape)

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.reshape(weight_shape)

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.new_zeros(len(grad_y))

    def to_ints(self, weight_shape: torch.Size) -> list[int]:  # noqa: D102
        raise NotImplementedError("a compiled graph cannot use WeightOp(); apply LinearOp() to the identity instead")


def layer_op_from_ints(ints: Sequence[int]) -> LayerOp:
    """Decode an op from the result of `LinearOp.to_ints` or `Conv2dOp.to_ints`."""
    if len(ints) <= 3:  # a linear op has 3 integers, or none if it is `LinearOp()`; a convolution has 7
        return LinearOp(ints[0] / ints[1], bool(ints[2])) if ints else LinearOp()
    return Conv2dOp(stride=tuple(ints[:2]), padding=tuple(ints[2:4]), dilation=tuple(ints[4:6]), groups=ints[6])


def without_view(y: Tensor) -> Tensor:
    """Return `y` as a non-view tensor over the same memory.

    torch forbids in-place operations on a view returned by a custom autograd function. The output of an op is a view if
    torch reshapes it, e.g. in a convolution of an unbatched input.
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


# weights and inputs of base layers ---------------------------------------------------------------------------------


def orient(base: Any, weight: Tensor) -> Tensor:
    """Convert a weight between the base layer's layout and `[m, …]`, outputs first.

    The two layouts differ only for transformers' `Conv1D`, which stores `[in, out]`.
    """
    return weight.T if isinstance(base, Conv1D) else weight


def pad_input(base: nn.Module, x: Tensor) -> Tensor:
    """Pad the input of a convolution unless its padding mode is `zeros`, the only mode that its op supports."""
    if not isinstance(base, nn.Conv2d) or base.padding_mode == "zeros":
        return x
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)


@dataclass(frozen=True)
class LazyWeight:
    """Weight `[m, …]` that is not a dense matrix in memory, e.g. a quantized weight.

    The layer materializes it in the forward pass and again in the backward pass, and frees it in between.

    Args:
        shape: `[m, …]`.
        tensors: Source tensors of the weight. They stay alive until the backward pass, which raises an error if one has
            changed since the forward pass. Caches use their identities and versions to detect changes.
        materialize: Returns the floating-point weight in memory that the caller may overwrite.
    """

    shape: torch.Size
    tensors: tuple[Tensor, ...]
    materialize: Callable[[], Tensor]

    def versions(self) -> tuple[int, ...]:
        """Return torch's version counter of each source tensor, or 0 for inference tensors, which have none."""
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in self.tensors)

    def check_unchanged(self, versions: tuple[int, ...]) -> None:
        """Raise `RuntimeError` if the weight has changed since `versions`, as autograd does for saved tensors."""
        if self.versions() != versions:
            raise RuntimeError(
                f"the source tensors of a weight {list(self.shape)} must not change between forward and backward "
                f"passes; their versions were {list(versions)}, now {list(self.versions())}; change them before the "
                "forward pass or after the backward pass"
            )


# weight gradients of linear layers: exact, rounded to bfloat16, or estimated from sampled tokens -------------------


def parse_weight_gradient(weight_gradient: str) -> tuple[float, bool]:
    """Parse `SnellaConfig.weight_gradient` into the fraction of sampled tokens and whether to round to bfloat16.

    Args:
        weight_gradient: `"exact"`, `"bfloat16"`, or `"sample:P"` with a number or fraction `P` from 1/1024 to 1, e.g.
            `sample:1/2`.

    Raises:
        ValueError: If the value is invalid.
    """
    if weight_gradient in ("exact", "bfloat16"):
        return 1.0, weight_gradient == "bfloat16"
    mode, _, fraction = weight_gradient.partition(":")
    try:
        # limit the digits, because `Fraction` would take minutes for a large exponent
        number_pattern = r"(\d{1,20}\.?\d{0,20}|\.\d{1,20})(e[+-]?\d{1,2})?(/\d{1,20})?"
        is_number = re.fullmatch(number_pattern, fraction, re.ASCII) is not None
        share = float(Fraction(fraction)) if mode == "sample" and is_number else math.nan
    except (ValueError, ArithmeticError):
        share = math.nan
    if not MIN_SHARE <= share <= 1:
        raise ValueError(
            "weight_gradient must be 'exact', 'bfloat16' or 'sample:P' with P from 1/1024 to 1, got "
            f"{weight_gradient!r}; 'sample:1/2' samples half of the tokens"
        )
    return share, False


def sample_tokens(grad_y: Tensor, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Sample tokens so that the product of the results is an unbiased estimate of `grad_yᵀ x`.

        E[Ĝ] = G = Σ_t g_t x_tᵀ,   Ĝ = Σ_{t drawn} g_t x_tᵀ / π_t,   π_t = min(1, c·‖g_t‖·‖x_t‖),   Σ_t π_t = k

    Token `t` is drawn with probability `π_t`. The sample size is `k = ⌈share·T⌉`, at least `MIN_TOKENS`. For
    independent draws, this `π` minimizes `E‖Ĝ − G‖² = Σ_t (1/π_t − 1) ‖g_t‖² ‖x_t‖²` for the given `k`. Systematic
    sampling (one random offset shifts `k` equally spaced points over the cumulative sum of `π`) draws exactly `k`
    tokens. No shape depends on values, so sampling does not synchronize with a GPU.

    Args:
        grad_y: `g`, the gradient of the layer's output, `[T, m]`.
        x: The layer's input, `[T, n]`.
        share: Fraction of the tokens, in `(0, 1]`.

    Returns:
        `g_t / π_t` `[k, m]` and `x_t` `[k, n]` of the drawn tokens, or `grad_y` and `x` unchanged if `k` reaches `T`.
    """
    num_tokens = len(x)
    k = max(math.ceil(share * num_tokens), min(num_tokens, MIN_TOKENS))
    if k >= num_tokens:
        return grad_y, x
    norms = torch.linalg.vector_norm(grad_y, dim=1, dtype=torch.float32)
    norms *= torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    # if all gradients are zero, sample uniformly; the estimate is zero
    norms = norms.clamp(min=torch.finfo(torch.float32).tiny)
    probs = norms * (k / norms.sum())
    # clip probabilities at 1 and rescale the others so that all sum to `k`; this may raise some above 1
    for _ in range(_ROUNDS):
        is_certain = probs >= 1
        uncertain_norms = torch.where(is_certain, 0, norms)
        probs = torch.where(is_certain, 1, norms * ((k - is_certain.sum()) / uncertain_norms.sum()))
    # recompute the probabilities from the rounded cumulative sum, which determines the draws
    cumulative = probs.cumsum(0)
    cumulative = cumulative * (k / cumulative[-1])
    probs = torch.diff(cumulative, prepend=cumulative.new_zeros(1))
    positions = torch.arange(k, device=x.device, dtype=torch.float32)  # the default dtype may have fewer digits
    points = positions + torch.rand(1, device=x.device, dtype=torch.float32)
    # the last point may round up to the total, beyond all tokens with a positive probability
    points = torch.minimum(points, torch.nextafter(cumulative[-1], cumulative.new_zeros(())))
    # with non-finite gradients, the search finds no valid index, but their values must propagate
    indices = torch.searchsorted(cumulative, points, right=True).clamp(max=num_tokens - 1)
    # divide in float32: 1/π can overflow float16 even if the quotient does not
    return (grad_y[indices] / probs[indices, None]).to(grad_y.dtype), x[indices]


def check_floating_point(x: Tensor, layer_name: str) -> None:
    """Raise `TypeError` unless the input is floating-point, because the output would be converted to its dtype."""
    if not x.is_floating_point():
        raise TypeError(f"the input of {layer_name!r} must be floating-point, got {x.dtype}; convert it first")


def widest_dtype(device_type: str) -> torch.dtype:
    """Return float64, or float32 on devices without it."""
    has_float64 = device_type not in WITHOUT_FLOAT64
    if device_type == "xpu":
        has_float64 = torch.xpu.get_device_properties().has_fp64
    return torch.float64 if has_float64 else torch.float32


def has_bfloat16_instructions() -> bool:
    """Return whether the processor has native bfloat16 instructions."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
