"""The description of an update and of the layer that it changes: factors, budgets, products, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from snella.ops.kernels import Kernel, KernelScalars, check_factors
from snella.ops.sparsify import KEEPS_EVERYTHING, SparsifyMode, keep_threshold, quantile_threshold, sparsify


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


@dataclass(frozen=True)
class WeightSource:
    """Where the adapted op gets a weight `[m, …]` that nobody holds as a matrix, such as a quantised one.

    The op asks for it in the forward and again in the backward pass, and keeps nothing of its size in between.

    Args:
        shape: `[m, …]`.
        tensors: What the weight is made of; they stay alive until the backward pass, which refuses to run where torch
            counts a change of one of them in between. Their identities and versions tell caches whether the weight is
            the same.
        make: Returns the weight, floating point, in memory that the caller may write over.
    """

    shape: torch.Size
    tensors: tuple[Tensor, ...]
    make: Callable[[], Tensor]

    def versions(self) -> tuple[int, ...]:
        """How often torch saw each of `tensors` change."""
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in self.tensors)

    def check_unchanged(self, versions: tuple[int, ...]) -> None:
        """Raise `RuntimeError` where the weight is not the one of `versions`, as autograd does for a saved tensor."""
        if self.versions() != versions:
            raise RuntimeError(
                f"a weight {list(self.shape)} that is kept in another form was changed in place between forward and "
                f"backward pass: its tensors had versions {list(versions)}, now {list(self.versions())}; change it "
                "before the one or after the other"
            )

    def make_wide(self) -> Tensor:
        """The weight in at least float32, in which updates are added to it."""
        weight = self.make()
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


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


_FADING = 0.7  # what is left of a miss after a step
_WINDOW_OVER_MISS = 3.0  # 92 to 95 of 100 thresholds then lie in the window, with factor rates of 1e-4 to 5e-3


class GroupFactors(NamedTuple):
    """What one of an update's matrices is merged from: `A` `[n, r]`, `B` `[rows, r]` and 0-dim or `[P]` scalars."""

    A: Tensor
    B: Tensor
    scalars: KernelScalars


class Guess(NamedTuple):
    """Where the next threshold is looked for first: in `expected · (1 ± window)`, or nowhere if `window` is 0.

    A threshold is expected to go on as it went last. How far it was from there (`miss`, relative, the largest of the
    last few) says how wide to look.
    """

    last: float
    expected: float
    miss: float = 0.0
    window: float = 0.0

    def follow(self, threshold: float, widths: tuple[float, float]) -> Guess:
        """The guess after the next threshold turned out to be `threshold`; `widths` are least and most of a window."""
        if not math.isfinite(threshold):  # a factor that is not: nothing follows from it
            return Guess(0.0, 0.0)
        if min(threshold, self.last, self.expected) <= 0:
            return Guess(threshold, threshold)
        least, most = widths
        miss = max(abs(threshold / self.expected - 1), _FADING * self.miss)
        window = max(_WINDOW_OVER_MISS * miss, least)
        miss = min(miss, most / _WINDOW_OVER_MISS)  # after a jump, a new budget's for one, there are no such jumps
        return Guess(threshold, threshold * threshold / self.last, miss, window if window <= most else 0.0)


@dataclass
class Update:
    """The sparse update `S` of a weight that holds `G` matrices one above the other (3 in a fused qkv layer, else 1).

    The matrices compete on their own: each has its own factors, scalars, budget and threshold.

    Args:
        A: Input-side factors, `[G, n, r]`.
        B: Output-side factors, `[m, r]`, the rows of all matrices one above the other.
        scalars: As in `KernelScalars` with one more leading axis `G`: `piece_coeff` `[G, P]`, the others `[G]`.
        kernel: How the factors are merged.
        budgets: Entries each matrix may keep, `G` integers.
        row_counts: Rows of each matrix, `G` integers that sum to `m`.
        scaling: Factor before `S`.
        mode: How `ΔW` is sparsified.
        thresholds: Thresholds of the current factors, one a matrix, if somebody computed them before; an
            implementation that finds this list empty computes and stores them here.
        guesses: Thresholds of earlier factors, one a matrix: where a backend may look first. It keeps them up to date.
        handover: A place for what a recomputation leaves to the backward pass; shared like `thresholds`.
    """

    A: Tensor
    B: Tensor
    scalars: KernelScalars
    kernel: Kernel
    budgets: tuple[int, ...]
    row_counts: tuple[int, ...]
    scaling: float = 1.0
    mode: SparsifyMode = "soft"
    thresholds: list[Tensor] = field(default_factory=list)
    handover: list[Any] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in get_args(SparsifyMode):
            raise ValueError(f"mode must be one of {list(get_args(SparsifyMode))}, got {self.mode!r}")

    @property
    def num_rows(self) -> int:
        """`m`, rows of all matrices together."""
        return self.B.shape[0]

    @property
    def rows(self) -> list[slice]:
        """Rows of the weight that each matrix occupies."""
        slices, start = [], 0
        for count in self.row_counts:
            slices.append(slice(start, start + count))
            start += count
        return slices

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything differentiable, in a fixed order that `with_tensors` takes back."""
        return (self.A, self.B, *self.scalars)

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> Update:
        """Return the same update over other tensors, sharing the thresholds."""
        A, B, *scalars = tensors
        if A is None or B is None:
            raise TypeError("an update needs both factors, got None")
        settings = (self.kernel, self.budgets, self.row_counts, self.scaling, self.mode, self.thresholds, self.handover)
        return Update(A, B, KernelScalars(*scalars), *settings, self.guesses)

    def group_factors(self) -> Iterator[GroupFactors]:
        """Yield the factors and scalars of each matrix, half precision widened to float32."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        for group, rows in enumerate(self.rows):
            scalars = KernelScalars(*(value if value is None else value[group].to(dtype) for value in self.scalars))
            yield GroupFactors(self.A[group].to(dtype), self.B[rows].to(dtype), scalars)

    def merge(self, factors: GroupFactors) -> Tensor:
        """`ΔW` of one matrix, `[rows, n]`. Autocast does not reach it, wherever this is called from."""
        with torch.autocast(factors.A.device.type, enabled=False):
            return self.kernel.merge(*factors)

    def threshold_of(self, group: int, delta: Tensor) -> Tensor:
        """Threshold of matrix `group` whose merged value is `delta`, from the list where it is known."""
        if len(self.thresholds) <= group:
            budget = self.budgets[group]
            if self.mode == "none":
                threshold = delta.new_full((), KEEPS_EVERYTHING)
            elif self.mode == "official":
                threshold = quantile_threshold(delta, 1 - budget / delta.numel())
            else:
                threshold = keep_threshold(delta, budget)
            self.thresholds.append(threshold)
        return self.thresholds[group]

    def sparse_groups(self) -> list[Tensor]:
        """Merge and sparsify every matrix by plain torch operations: `G` tensors `[rows, n]`, without `scaling`."""
        groups = []
        for group, factors in enumerate(self.group_factors()):
            delta = self.merge(factors)
            threshold = self.threshold_of(group, delta)
            groups.append(sparsify(delta, threshold, self.mode))
        return groups

    def check(self, weight_shape: torch.Size | None = None) -> None:
        """Raise `ValueError` unless tensors, settings and the weight `[m, n…]` fit together."""
        if self.A.ndim != 3 or self.A.shape[0] != len(self.row_counts) or sum(self.row_counts) != self.num_rows:
            raise ValueError(
                f"A must be [{len(self.row_counts)}, n, r] and B [{sum(self.row_counts)}, r] for matrices of "
                f"{list(self.row_counts)} rows, got {list(self.A.shape)} and {list(self.B.shape)}"
            )
        for budget, rows in zip(self.budgets, self.row_counts, strict=True):
            if not 0 <= budget <= rows * self.A.shape[1]:
                raise ValueError(
                    f"budget must be in [0, {rows * self.A.shape[1]}] for a matrix {[rows, self.A.shape[1]]}, "
                    f"got {budget}"
                )
            if self.mode == "none" and budget != rows * self.A.shape[1]:
                raise ValueError(
                    f"mode='none' keeps every entry: budget must be {rows * self.A.shape[1]} for a matrix "
                    f"{[rows, self.A.shape[1]]}, got {budget}"
                )
        for A, B, scalars in self.group_factors():
            check_factors(A, B, self.kernel, scalars)
        expected = [self.num_rows, self.A.shape[1]]
        if weight_shape is not None and [weight_shape[0], weight_shape[1:].numel()] != expected:
            raise ValueError(f"the update is {expected} but the weight is {list(weight_shape)}")
