"""Methods that train weights of the model directly: `linear`, `bias`, `full`, `mlp` and `partial`."""

from torch import Tensor, nn
from torch.nn import functional as F

from snella_app.methods.method import Batches, Method, Options, check_by, integer, number, unchanged
from snella_app.methods.model_parts import freeze_running_statistics, is_inside, require_blocks


def train_head(model: nn.Module, head: str) -> None:
    """Make the head trainable and freeze the running statistics.

    Args:
        model: Model with frozen parameters; changed in place.
        head: Name of its head.
    """
    freeze_running_statistics(model)
    model.get_submodule(head).requires_grad_(True)


def _linear(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train only the head (linear probe)."""
    train_head(model, head)
    return model


def _bias(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train all biases and the head (BitFit)."""
    train_head(model, head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_inside(name, head) or name.endswith("bias"))
    return model


def _full(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train all weights, and update running statistics."""
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
    """Batch normalization that uses running statistics for a single image, for which there are no batch statistics."""

    saved_buffers = ("running_mean", "running_var", "num_batches_tracked")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the features."""
        if len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class MlpHead(nn.Module):
    """MLP head: linear layers with ReLU, batch normalization, and dropout after all but the last.

    h_0 = x;  h_i = dropout(norm(relu(W_i h_{i-1} + b_i)));  y = W_k h_{k-1} + b_k

    Hidden layers are as wide as the features. Weights are initialized with variance 2 / outputs (He et al., fan-out),
    and biases with torch's default.

    Args:
        features: Number of input features.
        classes: Number of outputs.
        layers: Number of layers k, at least 1.
        dropout: Dropout rate after each hidden layer.
    """

    def __init__(self, features: int, classes: int, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for _ in range(layers - 1):
            modules += [nn.Linear(features, features), nn.ReLU(), _BatchNorm(features), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*modules)
        self.last = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map features `[batch, features]` to class scores `[batch, classes]`."""
        return self.last(self.hidden(x))


def _build_mlp_head(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Replace the linear head with an `MlpHead`, or raise `ValueError` if the head is not linear."""
    old = model.get_submodule(head)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"method 'mlp' cannot be applied to {type(model).__name__}: its head {head!r} must be a linear layer, got "
            f"{type(old).__name__}; pass head=..."
        )
    train_head(model, head)
    new = MlpHead(old.in_features, old.out_features, options.get("layers", 3), options.get("dropout", 0.1))
    model.set_submodule(head, new.to(old.weight.device, old.weight.dtype))
    return model


MLP = Method(
    "an MLP head",
    "Mlp-k as compared in VPT, Jia et al., arXiv 2203.12119",
    _build_mlp_head,
    ("layers", "dropout"),
    suffix="layers",
    check=check_by({"layers": integer(), "dropout": number(0, 1)}),
    unmerged_reason="replaces the head of the backbone with an MLP",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
    is_head_only=True,
)


def _build_partial(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train the last `blocks` blocks, all later modules, and the head."""
    num_trained = options.get("blocks", 1)
    blocks = require_blocks("partial", model, head)
    if num_trained > len(blocks):
        raise ValueError(f"method 'partial': blocks must be at most {len(blocks)} for this model, got {num_trained}")
    train_head(model, head)
    trained_blocks = {name for name, _ in blocks[-num_trained:]}
    is_later = False  # True from the first trained block on; parameters are in the order of the modules
    for name, parameter in model.named_parameters():
        in_trained_block = any(is_inside(name, block) for block in trained_blocks)
        is_later = is_later or in_trained_block
        is_later_module = is_later and not any(is_inside(name, block) for block, _ in blocks)
        if in_trained_block or is_inside(name, head) or is_later_module:
            parameter.requires_grad_(True)
    return model


PARTIAL = Method(
    "the last blocks, the final norm and the head",
    "Partial-k, Yosinski et al., arXiv 1411.1792; as compared in VPT, Jia et al., arXiv 2203.12119",
    _build_partial,
    ("blocks",),
    suffix="blocks",
    check=check_by({"blocks": integer()}),
    merge=unchanged,
    defaults={"lr": 1e-4, "head_lr": 1e-3, "weight_decay": 1e-2},
)
