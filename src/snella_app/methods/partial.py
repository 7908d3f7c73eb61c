"""`partial-k`: the last k blocks of the backbone, what follows them, and the head."""

from torch import Tensor, nn
from torch.nn import functional as F

from snella_app.methods.method import Batches, Method, Options, check_by, number, unchanged, whole_number
from snella_app.methods.model_parts import freeze_running_statistics, is_inside, require_blocks


def train_head(model: nn.Module, head: str) -> None:
    """Let the head learn, and keep batch statistics as pre-trained: what every method begins with.

    Args:
        model: With all parameters frozen; changed in place.
        head: Name of its head.
    """
    freeze_running_statistics(model)
    model.get_submodule(head).requires_grad_(True)


def _linear(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Linear probe: only the head learns."""
    train_head(model, head)
    return model


def _bias(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """BitFit: every bias and the head."""
    train_head(model, head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_inside(name, head) or name.rsplit(".", 1)[-1] == "bias")
    return model


def _full(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Full fine-tuning, running statistics included."""
    return model.requires_grad_(True)


LINEAR = Method(
    "only the head",
    "linear probing",
    _linear,
    merge=unchanged,
    defaults={"lr": 3e-3, "head_lr": 3e-3, "weight_decay": 1e-4},
    is_head_only=True,
)
BIAS = Method("all biases and the head", "BitFit, Ben Zaken et al., arXiv 2106.10199", _bias, merge=unchanged)
FULL = Method(
    "all weights",
    "full fine-tuning",
    _full,
    merge=unchanged,
    unsharded_reason="leaves no weight frozen",
    defaults={"lr": 5e-5, "head_lr": 1e-3, "weight_decay": 1e-2},
    recipes={"generation": {"lr": 5e-6}, "language": {"lr": 2e-5}},
    peft_type="full-finetuning",
)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalization that takes a single image by its running statistics, where a batch has none of its own."""

    saved_buffers = ("running_mean", "running_var", "num_batches_tracked")

    def forward(self, input: Tensor) -> Tensor:
        """The features, normalized."""
        if len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class MlpHead(nn.Module):
    """Linear layers with a ReLU, a batch normalization and dropout after each but the last.

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


def _build_mlp_head(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
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
    _build_mlp_head,
    ("layers", "dropout"),
    suffix="layers",
    check=check_by({"layers": whole_number(), "dropout": number(0, 1)}),
    unmerged_reason="puts several layers in the place of the head, where the backbone has one",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
    is_head_only=True,
)


def _build_partial(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train the parameters of the last `blocks` blocks and of every module that comes after them."""
    wanted = options.get("blocks", 1)
    blocks = require_blocks("partial", model, head)
    if wanted > len(blocks):
        raise ValueError(f"method 'partial': blocks must be at most {len(blocks)} for this model, got {wanted}")
    train_head(model, head)
    trained = {name for name, _ in blocks[-wanted:]}
    is_behind = False
    for name, parameter in model.named_parameters():
        in_block = any(is_inside(name, block) for block in trained)
        is_behind = is_behind or in_block
        if in_block or is_inside(name, head) or (is_behind and not any(is_inside(name, block) for block, _ in blocks)):
            parameter.requires_grad_(True)
    return model


PARTIAL = Method(
    "the last blocks, the final norm and the head",
    "Partial-k, Yosinski et al., arXiv 1411.1792; as compared in VPT, Jia et al., arXiv 2203.12119",
    _build_partial,
    ("blocks",),
    suffix="blocks",
    check=check_by({"blocks": whole_number()}),
    merge=unchanged,
    defaults={"lr": 1e-4, "head_lr": 1e-3, "weight_decay": 1e-2},
)
