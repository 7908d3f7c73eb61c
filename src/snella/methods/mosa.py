"""`mosa-r`: an adapter whose weights are split among sparse adapters that take turns."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snella.methods.adapter import Adapter, add_adapters
from snella.methods.method import Batches, Method, Options
from snella.methods.option_checks import check_by, number, whole_number


class SparseAdapters(Adapter):
    """A mixture of sparse adapters: one bottleneck, of which each training step uses a random part.

    training:    y = h + scale · (n · (U ⊙ M_i) dropout(gelu(D h + d)) + u),  i drawn anew from 1 … n in each pass
    evaluation:  y = h + scale · (U gelu(D h + d) + u)

    The masks M_1 … M_n share out the entries of `U` `[width, r]` evenly and at random. The down projection and the
    biases belong to all of them (the paper's hierarchical split). `n (U ⊙ M_i)` has the mean `U` over i, so that the
    merged adapter, the mean of the sparse ones, is `U` itself and nothing but one adapter is stored.

    Args:
        width: Channels of a token.
        r: Width of the bottleneck.
        experts: n.
        seed: Decides the masks; they are drawn again when an adapter is loaded.
        scale: As for `Adapter`.
        dropout: As for `Adapter`.
    """

    def __init__(
        self, width: int, r: int = 8, *, experts: int = 4, seed: int = 0, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__(width, r, scale=scale, dropout=dropout)
        self.experts = experts
        generator = torch.Generator().manual_seed(seed)
        owner = torch.randperm(width * r, generator=generator).remainder(experts).view(width, r)
        self.register_buffer("owner", owner.to(torch.uint8), persistent=False)

    def bottleneck(self, h: Tensor) -> Tensor:
        """What is added to `h`: by one sparse adapter while training, by all of them together otherwise."""
        if not self.training:
            return super().bottleneck(h)
        active = int(torch.randint(self.experts, ()))
        sparse = self.up.weight * (self.owner == active) * self.experts
        return F.linear(self.dropout(self.act(self.down(h))), sparse, self.up.bias)


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """`SparseAdapters` where `adapter-r` has its adapters; masks differ from block to block."""
    own = {name: options[name] for name in ("experts", "scale", "dropout") if name in options}
    seed = options.get("mask_seed", 0)

    def make(width: int, index: int) -> nn.Module:
        return SparseAdapters(width, options.get("r", 8), seed=seed + index, **own)

    return add_adapters("mosa", model, head, make)


MOSA = Method(
    "a bottleneck after the MLP of each block, trained in random parts",
    "MoSA, Zhang et al., arXiv 2312.02923",
    _build,
    ("r", "experts", "scale", "dropout", "mask_seed"),
    suffix="r",
    check=check_by(
        {
            "r": whole_number(),
            "experts": whole_number(),
            "scale": number(),
            "dropout": number(0, 1),
            "mask_seed": whole_number(0),
        }
    ),
    unmerged_reason="adds a nonlinear bottleneck to each block",
)
