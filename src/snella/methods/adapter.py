"""`adapter-r`: a bottleneck after the MLP of every block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snella.methods.method import Batches, Method, Options, check_by, number, one_of, whole_number
from snella.methods.model_parts import attach, mlps
from snella.methods.partial import train_head

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Adapter(nn.Module):
    """A bottleneck beside the identity: nothing at first, since what leads out of it starts at zero.

    y = h + scale · (U · dropout(act(D h + d)) + u),   act = gelu, or relu as A.1 of arXiv 2510.24037 describes it

    `D` `[r, width]` starts uniform after Glorot, `U` `[width, r]` and both biases at zero.

    Args:
        width: Channels of a token, the last dimension of the input.
        r: Width of the bottleneck.
        scale: Factor on what is added.
        dropout: Rate inside of the bottleneck, while training.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(
        self, width: int, r: int = 8, *, scale: float = 1.0, dropout: float = 0.0, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(r, width)
        self.scale = scale
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def bottleneck(self, h: Tensor) -> Tensor:
        """What is added to `h`, before the scale."""
        return self.up(self.dropout(self.act(self.down(h))))

    def forward(self, h: Tensor) -> Tensor:
        """`h` and what the bottleneck adds, `[..., width]`."""
        return h + self.scale * self.bottleneck(h)


def apply_adapter(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: pass the output of a module on to its child `adapter`."""
    return module.adapter(output)  # type: ignore[operator]


def add_adapters(method: str, model: nn.Module, head: str, make: Callable[[int, int], nn.Module]) -> nn.Module:
    """Attach one adapter to the MLP of each block, as its child `adapter`.

    Args:
        method: Name, for the error.
        model: Frozen; changed in place.
        head: Name of its head, which learns too.
        make: `(width, index) -> nn.Module`.

    Raises:
        ValueError: No block has an MLP.
    """
    places = list(mlps(model, head))
    if not places:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: it adapts the MLP of each block, "
            "and no module of this model is called mlp and ends with a linear layer"
        )
    train_head(model, head)
    for index, (_, module, width) in enumerate(places):
        attach(module, "adapter", make(width, index), after=apply_adapter)
    return model


def _build_adapter(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """One `Adapter` after each MLP, inside of the residual branch."""
    own = {name: options[name] for name in ("scale", "dropout", "activation") if name in options}
    return add_adapters("adapter", model, head, lambda width, index: Adapter(width, options.get("r", 8), **own))


ADAPTER = Method(
    "a bottleneck after the MLP of each block",
    "adapters, Houlsby et al., arXiv 1902.00751, in the place that Pfeiffer et al., arXiv 2005.00247, found to do: "
    "after the MLP only, as compared in VPT and NOAH",
    _build_adapter,
    ("r", "scale", "dropout", "activation"),
    suffix="r",
    check=check_by(
        {"r": whole_number(), "scale": number(), "dropout": number(0, 1), "activation": one_of(*ACTIVATIONS)}
    ),
    unmerged_reason="adds a nonlinear bottleneck to each block",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4, "r": 8},
)


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


def _build_mosa(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """`SparseAdapters` where `adapter-r` has its adapters; masks differ from block to block."""
    own = {name: options[name] for name in ("experts", "scale", "dropout") if name in options}
    seed = options.get("mask_seed", 0)

    def make(width: int, index: int) -> nn.Module:
        return SparseAdapters(width, options.get("r", 8), seed=seed + index, **own)

    return add_adapters("mosa", model, head, make)


MOSA = Method(
    "a bottleneck after the MLP of each block, trained in random parts",
    "MoSA, Zhang et al., arXiv 2312.02923",
    _build_mosa,
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
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-2, "r": 16},
)
