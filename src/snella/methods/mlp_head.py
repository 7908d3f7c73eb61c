"""`mlp-k`: a head of k layers on a frozen backbone."""

from torch import Tensor, nn
from torch.nn import functional as F

from snella.methods.method import Batches, Method, Options
from snella.methods.option_checks import check_by, number, whole_number
from snella.methods.own_weights import train_head


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a single image by its running statistics, where a batch has none of its own."""

    saved_buffers = ("running_mean", "running_var", "num_batches_tracked")

    def forward(self, input: Tensor) -> Tensor:
        """The features, normalised."""
        if len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class MlpHead(nn.Module):
    """Linear layers with a ReLU, a batch normalisation and dropout after each but the last.

    h_0 = x;  h_i = dropout(norm(relu(W_i h_{i-1} + b_i)));  y = W_k h_{k-1} + b_k

    The hidden layers are as wide as the features. Weights start as normal with variance 2 / outputs (He et al., fan
    out), biases as torch's default.

    Args:
        features: Width of the input.
        classes: Number of outputs.
        layers: k, at least 1.
        dropout: Rate after each hidden layer.
    """

    def __init__(self, features: int, classes: int, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(features, features), nn.ReLU(), _BatchNorm(features), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*parts)
        self.last = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[batch, classes]` from features `[batch, features]`."""
        return self.last(self.hidden(x))


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Put an `MlpHead` in the place of the linear head."""
    old = model.get_submodule(head)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"method 'mlp' cannot be applied to {type(model).__name__}: its head {head!r} is a {type(old).__name__}, "
            "and one linear layer is needed; pass head=..."
        )
    train_head(model, head)
    new = MlpHead(old.in_features, old.out_features, options.get("layers", 3), options.get("dropout", 0.1))
    model.set_submodule(head, new.to(old.weight.device, old.weight.dtype))
    return model


MLP = Method(
    "a head of several layers",
    "Mlp-k as compared in VPT, Jia et al., arXiv 2203.12119",
    _build,
    ("layers", "dropout"),
    suffix="layers",
    check=check_by({"layers": whole_number(), "dropout": number(0, 1)}),
    unmerged_reason="puts several layers in the place of the head, where the backbone has one",
)
