"""A frozen weight that is kept in another form than a matrix and made anew wherever it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


__all__ = ["WeightSource"]
