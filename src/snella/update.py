"""The description of an update and of the layer that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from snella.kernels import KERNELS, Kernel, KernelScalars, check_factors
from snella.memory.sampling import sample_tokens
from snella.sparsify import KEEPS_EVERYTHING, SparsifyMode, keep_threshold, quantile_threshold

BACKENDS = ("eager", "reference", "numba", "triton")
"""What can compute an update: `eager` by torch operations, `reference` by autograd, the others by kernels of theirs."""
_MODES = get_args(SparsifyMode)


class Factors(NamedTuple):
    """Everything differentiable of an update, or the gradients of it.

    Args:
        A: Input-side factors, `[G, n, r]`.
        B: Output-side factors, `[m, r]`, the rows of all matrices one above the other.
        piece_coeff: `[G, P]`.
        alpha: `[G]`, as are `beta` and `temperature`; see `KernelScalars`.
        beta: `[G]`.
        temperature: `[G]`.
    """

    A: Tensor
    B: Tensor
    piece_coeff: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    temperature: Tensor | None = None


class MatrixFactors(NamedTuple):
    """What one matrix is merged from: `A` `[n, r]`, `B` `[rows, r]` and 0-dim or `[P]` scalars, at least float32."""

    A: Tensor
    B: Tensor
    scalars: KernelScalars


@dataclass(frozen=True)
class UpdateSpec:
    """How the sparse update `S` of a weight is computed: everything but the tensors, made once.

    The weight holds `G` matrices one above the other (3 in a fused qkv layer, else 1), which compete on their own.

    Args:
        kernel: How the factors are merged, with its pieces and its softmax.
        row_counts: Rows of each matrix, `G` integers that sum to `m`.
        mode: How `ΔW` is sparsified.
        scaling: Factor before `S`.
        backend: What computes it, one of `BACKENDS`; `snella.backends.choose_backend` finds the best one.

    Raises:
        ValueError: `mode` or `backend` is unknown.
    """

    kernel: Kernel
    row_counts: tuple[int, ...]
    mode: SparsifyMode = "soft"
    scaling: float = 1.0
    backend: str = "eager"
    rows: tuple[slice, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {list(_MODES)}, got {self.mode!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")
        rows = tuple(slice(*ends) for ends in pairwise(accumulate(self.row_counts, initial=0)))
        object.__setattr__(self, "rows", rows)

    @property
    def num_rows(self) -> int:
        """`m`, rows of all matrices together."""
        return sum(self.row_counts)

    def to_ints(self) -> list[int]:
        """The spec without `scaling` as integers, for an operator of `torch.compile`; `from_ints` reads them."""
        kernel = self.kernel
        names = (list(KERNELS).index(kernel.name), _MODES.index(self.mode), BACKENDS.index(self.backend))
        return [*names, kernel.num_pieces, kernel.softmax_dim, int(kernel.center_softmax), *self.row_counts]

    @classmethod
    def from_ints(cls, ints: Sequence[int], scaling: float) -> Self:
        """The spec that `to_ints` packed."""
        name, mode, backend, num_pieces, softmax_dim, center_softmax, *row_counts = ints
        kernel = KERNELS[list(KERNELS)[name]](num_pieces, softmax_dim, bool(center_softmax))
        return cls(kernel, tuple(row_counts), _MODES[mode], scaling, BACKENDS[backend])

    def matrices(self, factors: Factors) -> Iterator[MatrixFactors]:
        """Yield the factors and scalars of each matrix, half precision widened to float32."""
        A, B, *scalars = factors
        dtype = torch.promote_types(A.dtype, torch.float32)
        for group, rows in enumerate(self.rows):
            own = KernelScalars(*[value if value is None else value[group].to(dtype) for value in scalars])
            yield MatrixFactors(A[group].to(dtype), B[rows].to(dtype), own)

    def merge_matrix(self, factors: MatrixFactors) -> Tensor:
        """`ΔW` of one matrix, `[rows, n]`. Autocast does not reach it, wherever this is called from."""
        with torch.autocast(factors.A.device.type, enabled=False):
            return self.kernel.merge(*factors)

    def find_threshold(self, delta: Tensor, budget: int) -> Tensor:
        """The magnitude above which an entry of one merged matrix survives, 0-dim."""
        if self.mode == "none":
            return delta.new_full((), KEEPS_EVERYTHING)
        if self.mode == "official":
            return quantile_threshold(delta, 1 - budget / delta.numel())
        return keep_threshold(delta, budget)

    def check(self, factors: Factors, budgets: Sequence[int], weight_shape: torch.Size | None = None) -> None:
        """Raise `ValueError` unless spec, tensors, budgets and the weight `[m, n…]` fit together."""
        A, B = factors.A, factors.B
        if A.ndim != 3 or A.shape[0] != len(self.row_counts) or self.num_rows != B.shape[0]:
            raise ValueError(
                f"A must be [{len(self.row_counts)}, n, r] and B [{self.num_rows}, r] for matrices of "
                f"{list(self.row_counts)} rows, got {list(A.shape)} and {list(B.shape)}"
            )
        for budget, rows in zip(budgets, self.row_counts, strict=True):
            size = rows * A.shape[1]
            if not 0 <= budget <= size:
                raise ValueError(f"budget must be in [0, {size}] for a matrix {[rows, A.shape[1]]}, got {budget}")
            if self.mode == "none" and budget != size:
                raise ValueError(
                    f"mode='none' keeps every entry: budget must be {size} for a matrix {[rows, A.shape[1]]}, "
                    f"got {budget}"
                )
        for matrix in self.matrices(factors):
            check_factors(matrix.A, matrix.B, self.kernel, matrix.scalars)
        expected = [self.num_rows, A.shape[1]]
        if weight_shape is not None and [weight_shape[0], weight_shape[1:].numel()] != expected:
            raise ValueError(f"the update is {expected} but the weight is {list(weight_shape)}")


class Update(NamedTuple):
    """One update as the ops take it: its spec, and what changes from step to step.

    Args:
        spec: How it is computed.
        factors: Factors and scalars.
        budgets: Entries that each matrix may keep, `G` integers.
        thresholds: `[G]`, as an earlier call returned them for these factors and budgets; `None`: to be found.
    """

    spec: UpdateSpec
    factors: Factors
    budgets: tuple[int, ...]
    thresholds: Tensor | None = None


class LayerOp(Protocol):
    """What the adapted op needs to know of the layer it sits in. Weights are `[m, …]`, seen as `[m, n]`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        """Return ∂L/∂x, of shape `x_shape`."""

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        """Return ∂L/∂weight, of shape `weight_shape`."""

    def grad_bias(self, grad_y: Tensor) -> Tensor:
        """Return ∂L/∂bias, `[m]`."""

    def to_ints(self, weight_shape: torch.Size) -> list[int]:
        """The op as integers, for an operator of `torch.compile`; `layer_op_from_ints` reads them."""


@dataclass(frozen=True)
class LinearOp:
    """`y = x Wᵀ + bias` for `x` `[…, n]` and `W` `[m, n]`.

    Args:
        token_share: Share of the tokens from which the gradient of an update is estimated, see `sample_tokens`; 1 is
            all of them. Every other gradient is exact.
        is_rounded: Whether that gradient is a product in bfloat16.
    """

    token_share: float = 1.0
    is_rounded: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.linear(x, weight, bias)

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y @ weight

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.reshape(-1, grad_y.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def tokens_of(self, grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """∂L/∂y `[k, m]` and `x` `[k, n]`, whose product is the gradient of an update or its estimate."""
        grad_y, x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        return (grad_y, x) if self.token_share == 1 else sample_tokens(grad_y, x, self.token_share)

    def product(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """`∂L/∂yᵀ x` of `tokens_of`, in bfloat16 where they are rounded to it."""
        if self.is_rounded:
            grad_y, x = grad_y.to(torch.bfloat16), x.to(torch.bfloat16)
        return grad_y.T @ x

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.reshape(-1, grad_y.shape[-1]).sum(0)

    def to_ints(self, weight_shape: torch.Size) -> list[int]:  # noqa: D102
        return [] if self == LinearOp() else [*self.token_share.as_integer_ratio(), int(self.is_rounded)]


@dataclass(frozen=True)
class Conv2dOp:
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

    def to_ints(self, weight_shape: torch.Size) -> list[int]:  # noqa: D102
        return [*self.stride, *self.padding_sizes(weight_shape), *self.dilation, self.groups]

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
class WeightOp:
    """The weight `W` `[m, …]` alone, for a model that multiplies with it elsewhere; `x` and a bias play no part."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return weight

    def grad_input(self, grad_y: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.new_zeros(x_shape)

    def grad_weight(self, grad_y: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:  # noqa: D102
        return grad_y.reshape(weight_shape)

    def grad_bias(self, grad_y: Tensor) -> Tensor:  # noqa: D102
        return grad_y.new_zeros(len(grad_y))

    def to_ints(self, weight_shape: torch.Size) -> list[int]:  # noqa: D102
        raise NotImplementedError("a compiled graph reads a weight as LinearOp() of the identity, got WeightOp()")


def layer_op_from_ints(ints: Sequence[int]) -> LayerOp:
    """The op that `LinearOp.to_ints` or `Conv2dOp.to_ints` packed."""
    if len(ints) <= 3:
        return LinearOp(ints[0] / ints[1], bool(ints[2])) if ints else LinearOp()
    return Conv2dOp(tuple(ints[:2]), tuple(ints[2:4]), tuple(ints[4:6]), ints[6])


def without_view(y: Tensor) -> Tensor:
    """`y` as a tensor of its own over the same memory.

    torch forbids in-place operations on a view that a hand-written autograd function returns, and a product is one
    wherever torch reshapes it (a bias and three axes, a convolution without a batch).
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


@dataclass(frozen=True)
class LazyWeight:
    """Where the adapted op gets a weight `[m, …]` that nobody holds as a matrix, such as a quantized one.

    The op asks for it in the forward and again in the backward pass, and keeps nothing of its size in between.

    Args:
        shape: `[m, …]`.
        tensors: What the weight is made of; they stay alive until the backward pass, which refuses to run where torch
            counts a change of one of them in between. Their identities and versions tell caches whether the weight is
            the same.
        materialize: Returns the weight, floating point, in memory that the caller may write over.
    """

    shape: torch.Size
    tensors: tuple[Tensor, ...]
    materialize: Callable[[], Tensor]

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

    def materialize_wide(self) -> Tensor:
        """The weight in at least float32, in which updates are added to it."""
        weight = self.materialize()
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
