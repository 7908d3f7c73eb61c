"""What a backend computes of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from snella.ops.kernels import MergeGradients
from snella.ops.spec import GroupFactors, Update


@dataclass
class Merged:
    """A merged matrix, and what its implementation can use again within the same pass.

    Args:
        delta: `ΔW`, `[rows, n]`; without entries where a fused backend goes from the factors to the result without it.
        extra: Whatever `factor_gradients` of the same backend can use; never kept between passes.
    """

    delta: Tensor
    extra: Any = None


class GroupBackend(Protocol):
    """One way to compute an update, matrix by matrix; values as `TorchBackend` to within rounding."""

    name: str

    def merge(self, update: Update, group: int, factors: GroupFactors) -> Merged:
        """Merge one matrix, and make sure that its threshold is known."""

    def add_sparse(self, update: Update, group: int, merged: Merged, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`, both `[rows, n]`; they may be the same tensor."""

    def factor_gradients(
        self, update: Update, group: int, factors: GroupFactors, merged: Merged, grad: Tensor
    ) -> MergeGradients:
        """Gradients to the factors and scalars, given `grad` = ∂L/∂W of these rows, `[rows, n]`."""


class FusedBackend(ABC):
    """One way to compute an update, all of its matrices at once; values as `TorchBackend` to within rounding.

    A matrix without budget is `None` in the list of merged matrices.
    """

    name: str

    @abstractmethod
    def merge_groups(self, update: Update) -> list[Merged | None]:
        """Merge every matrix, and make sure that its threshold is known."""

    @abstractmethod
    def add_groups(self, update: Update, merged: Sequence[Merged | None], base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`, both `[m, n]`, contiguous, of any two dtypes; they may be the same."""

    keeps_delta = True
    """Whether `keep_delta` has anything to keep: not where rebuilding a matrix takes no longer than reading it."""

    adds_while_differentiating = False
    """Whether `group_gradients` takes `base` and `out`."""

    @abstractmethod
    def group_gradients(
        self,
        update: Update,
        merged: Sequence[Merged | None],
        grad: Tensor,
        base: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients to `update.tensors()`, given `grad` = ∂L/∂W `[m, n]`.

        With `base` and `out` the same pass also does what `add_groups` does.
        """

    def samples_gradient(self, update: Update, group: int) -> bool:
        """Whether ∂L/∂W of one matrix is cheaper at its kept entries alone than as a whole product."""
        return False

    def sample_gradient(
        self, update: Update, group: int, merged: Merged, grad_y: Tensor, x: Tensor, out: Tensor
    ) -> None:
        """Write ∂L/∂W of one matrix's kept entries into `out`.

        Args:
            update: The update.
            group: Which of its matrices; one that `samples_gradient` agreed to.
            merged: From `merge_groups`.
            grad_y: The matrix's columns of ∂L/∂y, `[tokens, rows]`.
            x: `[tokens, n]`, in the dtype of `grad_y`.
            out: Zeros, `[rows, n]`, float32.
        """
        raise NotImplementedError


Backend: TypeAlias = GroupBackend | FusedBackend
