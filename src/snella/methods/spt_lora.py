"""`spt-lora`: sensitive weights one by one, and a low-rank update where a matrix has many of them."""

from math import sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.methods import spt
from snella.ops.spec import LinearProduct


class LowRank(spt.StructuredModule):
    """A low-rank update of one matrix: h + B A x.

    `A` `[r, columns]` starts uniform in ±1/sqrt(columns), as in LoRA, `B` `[rows, r]` at zero.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        r: Rank.
    """

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, columns))
        self.B = nn.Parameter(torch.zeros(rows, r))
        nn.init.kaiming_uniform_(self.A, a=sqrt(5))

    def forward(self, layer: spt.SptLayer, x: Tensor, h: Tensor) -> Tensor:
        """`h` and what the update adds."""
        if isinstance(layer.product, LinearProduct):
            return h + self.update(x)
        A = self.A.to(x.dtype).view(len(self.A), *layer.base_layer.weight.shape[1:])
        return h + F.conv2d(layer.product(x, A, None), self.B.to(x.dtype)[:, :, None, None])

    def update(self, x: Tensor) -> Tensor:
        """B A x for `x` `[..., columns]`."""
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def delta(self) -> Tensor:
        """B A."""
        return self.B @ self.A


def add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: a linear layer's child `low_rank` adds its update to the output."""
    return output + cast(LowRank, module.low_rank).update(inputs[0])


def count_low_rank(rows: int, columns: int, r: int) -> int:
    """Parameters of a `LowRank`."""
    return r * (rows + columns)


SPT_LORA = spt.spt_method(
    "the most sensitive weights, in low-rank updates where a matrix has many of them",
    "SPT-LoRA, He et al., arXiv 2303.08566",
    LowRank,
    count_low_rank,
    merge=spt.merge_selection,
)
"""Trains exactly `budget` million parameters besides the head, where the task is most sensitive to them.

Sensitivity of a weight: Σ_batches (∂loss/∂w)², over `calibration_batches` batches (8), the loss being the cross entropy
of the untrained head. All weights of the adapted matrices, biases, norms and layer scales are ranked together. A matrix
with at least `r·(rows + columns) / alpha` of its weights above the cut gets h + B A x instead of single weights; a
vector with a share of at least `1 / beta` is trained in full; the rest of what is above the cut is trained weight by
weight. The class token is always trained. Defaults: `r` 8, `alpha` 10, `beta` 5, and `budget` 0.4 on a ViT-B/16 and in
proportion to the adapted weights elsewhere. Where the next module would not fit into what is left of the budget, the
next single weights take its place, so that the count is met exactly; the authors' code takes the nearest count instead.
"""
