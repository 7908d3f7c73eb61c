"""`spt-adapter`: sensitive weights one by one, and an adapter behind a matrix that has many of them."""

from torch import Tensor

from snella.methods import spt
from snella.methods.adapter import Adapter


class AdapterBehind(spt.StructuredModule):
    """A bottleneck on the output of one matrix: h + U gelu(D h + d) + u; see `Adapter`.

    Args:
        rows: Of the matrix, the width of its output.
        columns: Of the matrix.
        r: Width of the bottleneck.
    """

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__()
        self.adapter = Adapter(rows, r)

    def forward(self, layer: spt.SptLayer, x: Tensor, h: Tensor) -> Tensor:
        """`h` and what the bottleneck adds, channel by channel."""
        dim = layer.channel_dim
        changed: Tensor = self.adapter(h.movedim(dim, -1)).movedim(-1, dim)
        return changed


def count_adapter(rows: int, columns: int, r: int) -> int:
    """Parameters of an `AdapterBehind`."""
    return 2 * r * rows + r + rows


SPT_ADAPTER = spt.spt_method(
    "the most sensitive weights, and an adapter behind a matrix that has many of them",
    "SPT-Adapter, He et al., arXiv 2303.08566",
    AdapterBehind,
    count_adapter,
    unmerged_reason="adds nonlinear bottlenecks behind matrices",
)
"""As `SPT_LORA`, with h + U gelu(D h + d) + u behind a matrix that has at least `(2·r·rows + r + rows) / alpha` weights
above the cut."""
