"""`adapter-r`: a bottleneck after the MLP of every block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from snella.methods.attaching import attach
from snella.methods.blocks import mlps
from snella.methods.method import Batches, Method, Options
from snella.methods.option_checks import check_by, number, whole_number
from snella.methods.own_weights import train_head


class Adapter(nn.Module):
    """A bottleneck beside the identity: nothing at first, since what leads out of it starts at zero.

    y = h + scale · (U · dropout(gelu(D h + d)) + u)

    `D` `[r, width]` starts uniform after Glorot, `U` `[width, r]` and both biases at zero.

    Args:
        width: Channels of a token, the last dimension of the input.
        r: Width of the bottleneck.
        scale: Factor on what is added.
        dropout: Rate inside of the bottleneck, while training.
    """

    def __init__(self, width: int, r: int = 8, *, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.act = nn.GELU()
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


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """One `Adapter` after each MLP, inside of the residual branch."""
    own = {name: options[name] for name in ("scale", "dropout") if name in options}
    return add_adapters("adapter", model, head, lambda width, index: Adapter(width, options.get("r", 8), **own))


ADAPTER = Method(
    "a bottleneck after the MLP of each block",
    "adapters, Houlsby et al., arXiv 1902.00751, in the place that Pfeiffer et al., arXiv 2005.00247, found to do: "
    "after the MLP only, as compared in VPT and NOAH",
    _build,
    ("r", "scale", "dropout"),
    suffix="r",
    check=check_by({"r": whole_number(), "scale": number(), "dropout": number(0, 1)}),
    unmerged_reason="adds a nonlinear bottleneck to each block",
)
