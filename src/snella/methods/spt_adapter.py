"""`spt-adapter`: sensitive weights one by one, and an adapter behind a matrix that has many of them."""

from collections.abc import Mapping

from torch import Tensor, nn

from snella.methods import spt
from snella.methods.adapter import Adapter
from snella.methods.method import Batches, Method, Options
from snella.methods.selection_data import selection_data


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


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Select from data, then make it trainable."""
    selection = spt.select(model, head, options, selection_data(batches), count_adapter)
    return spt.apply_selection(model, head, selection, options.get("r", 8), AdapterBehind)


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The same structure from a file."""
    return spt.restore_selection(model, head, options, tensors, AdapterBehind)


SPT_ADAPTER = Method(
    "the most sensitive weights, and an adapter behind a matrix that has many of them",
    "SPT-Adapter, He et al., arXiv 2303.08566",
    _build,
    spt.OPTIONS,
    suffix="r",
    check=spt.CHECK,
    needs_batches=True,
    restore=_restore,
    unmerged_reason="adds nonlinear bottlenecks behind matrices",
)
"""As `SPT_LORA`, with h + U gelu(D h + d) + u behind a matrix that has at least `(2·r·rows + r + rows) / alpha` weights
above the cut."""
