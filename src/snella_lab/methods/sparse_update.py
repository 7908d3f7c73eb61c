"""`gps-k`, and the sparse updates that it shares with SPT: int32 positions and as many values, no dense tensor."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.fixed_support import fold_entries, layer_with_entries
from snella.update import Conv2dOp, LayerOp, LinearOp
from snella_app.methods.method import Batches, Method, Options, check_by, number, one_of, whole_number
from snella_app.methods.model_parts import is_inside, restoring
from snella_app.methods.partial import train_head
from snella_lab.methods.calibration import Loss, SelectionData, loss_of, selection_data, summed_gradients


class SparseUpdate(nn.Module):
    """A `Linear` or `Conv2d` of which single weights are trained.

    y = product(x, W) + bias,   W = W0, W[indices[k]] += values[k]

    Kept for the backward pass are the input and the values; `W` is made anew there, and the gradient reaches the
    values alone. Optimizer and file hold `2·len(indices)` numbers, not a masked matrix.

    Args:
        base_layer: The frozen layer.
        indices: Positions in its weight, flattened, strictly ascending.

    Raises:
        TypeError: A layer of another class, or with a forward pass of its own.
        ValueError: Positions out of range, repeated or not in order.
    """

    saved_buffers: tuple[str, ...] = ("indices",)
    base_layer: nn.Linear | nn.Conv2d
    indices: Tensor

    def __init__(self, base_layer: nn.Module, indices: Tensor) -> None:
        super().__init__()
        if not can_be_sparse(base_layer):
            raise TypeError(
                f"base_layer must be a torch.nn.Linear or Conv2d with its own forward pass, got {type(base_layer)}"
            )
        weight = base_layer.weight
        size = weight.numel()
        in_order = indices.ndim == 1 and bool((indices[1:] > indices[:-1]).all())
        if not in_order or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < size):
            raise ValueError(
                f"indices must be positions in [0, {size}), one-dimensional and strictly ascending, got {indices}"
            )
        self.base_layer = base_layer
        self.register_buffer("indices", indices.to(weight.device, torch.int32))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(len(indices), dtype=dtype, device=weight.device))

    def sparse_entries(self) -> tuple[Tensor, Tensor]:
        """Positions in the flattened weight, int64, and what is added there, for `snella export`."""
        return self.indices.long(), self.values.detach().clone()

    @property
    def weight(self) -> Tensor:
        """`W`, differentiable, for models that read a layer's weight past the layer."""
        return fold_entries(self.base_layer.weight, self.values, self.indices)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the layer."""
        return self.base_layer.bias

    @property
    def product(self) -> LayerOp:
        """The product of the base layer."""
        base = self.base_layer
        if isinstance(base, nn.Conv2d):
            padding = base.padding if base.padding_mode == "zeros" else (0, 0)
            return Conv2dOp(base.stride, padding, base.dilation, base.groups)
        return LinearOp()

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, such as `in_features`, is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copying asks for __deepcopy__
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def prepare_input(self, x: Tensor) -> Tensor:
        """What happens to the input before the product: padding other than by zeros, and autocast's dtype."""
        base = self.base_layer
        if isinstance(base, nn.Conv2d) and base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the trained entries in its weight."""
        base, x = self.base_layer, self.prepare_input(x)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return layer_with_entries(x, base.weight, bias, self.values, self.indices, self.product)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with the trained entries in its own weight; outputs stay the same bit for bit."""
        self.base_layer.weight.copy_(self.weight)
        return self.base_layer

    def extra_repr(self) -> str:
        """How many entries are trained."""
        return f"{len(self.indices)} of {self.base_layer.weight.numel()} weights"


class SparseEntries(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) that trains some entries of a small frozen vector.

    v = v0, v[indices[k]] += values[k]

    Args:
        vector: The frozen parameter.
        indices: Positions in it, strictly ascending.
    """

    saved_buffers = ("indices",)
    indices: Tensor

    def __init__(self, vector: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices.to(vector.device, torch.int32))
        self.values = nn.Parameter(
            vector.new_zeros(len(indices), dtype=torch.promote_types(vector.dtype, torch.float32))
        )

    def forward(self, vector: Tensor) -> Tensor:
        """The vector with the trained entries in it."""
        return fold_entries(vector, self.values, self.indices)


def can_be_sparse(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether `SparseUpdate` can wrap a module: a `Linear` or `Conv2d` that computes what these classes do."""
    return any(
        isinstance(module, kind) and all(getattr(type(module), f, None) is getattr(kind, f, None) for f in methods)
        for kind, methods in ((nn.Linear, ("forward",)), (nn.Conv2d, ("forward", "_conv_forward")))
    )


def merge_sparse(model: nn.Module) -> nn.Module:
    """Put every layer that `SparseUpdate` wraps back into its place, with the trained entries in its weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseUpdate):
            model.set_submodule(name, module.merged())
    return model


_RULES = {
    "k": whole_number(),
    "selection_loss": one_of("contrastive", "task"),
    "temperature": number(0.001),
    "calibration_batches": whole_number(),
}


def neuron_layers(model: nn.Module, head: str) -> list[str]:
    """Layers whose neurons GPS selects inputs for: every `Linear` and `Conv2d` but the head, patch embedding included.

    Left frozen are layers with a forward pass of their own and the projection inside of `nn.MultiheadAttention`, whose
    weight is read past the layer.
    """
    past = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return [
        name
        for name, module in model.named_modules()
        if can_be_sparse(module) and not is_inside(name, head) and not any(is_inside(name, outer) for outer in past)
    ]


def strongest_inputs(gradient: Tensor, k: int) -> Tensor:
    """Positions of the `k` inputs of each neuron with the largest magnitude of gradient.

    A neuron is a row of the weight seen as a matrix; of equal inputs the first ones count.

    Args:
        gradient: `[m, ...]`.
        k: Inputs a neuron; all where it has fewer.

    Returns:
        Flattened positions, ascending, `[m · min(k, n)]` int64.
    """
    magnitude = gradient.reshape(len(gradient), -1).abs()
    columns = magnitude.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    rows = torch.arange(len(magnitude), device=gradient.device)[:, None]
    return (rows * magnitude.shape[1] + columns).flatten()


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """How much nearer each feature should be to those of its own class: a loss that needs no head.

    loss = mean_i( -1/|P(i)| Σ_{p in P(i)} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) ) ),   z = features/‖features‖

    `P(i)` are the other features of the class of `i`; features without any are left out of the mean.

    Args:
        features: `[n, width]`.
        labels: `[n]`.
        temperature: τ.

    Returns:
        0-dim, float32; 0 where no two features share a class.

    Source: Khosla et al., arXiv 2004.11362, eq. 2.
    """
    z = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_shares = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    counts = positive.sum(dim=1)
    means = -log_shares.masked_fill(~positive, 0.0).sum(dim=1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


def contrastive_loss(head: str, temperature: float = 0.07) -> Loss:
    """`supervised_contrastive` of what the head reads, over each image and its mirror image; refuses masks."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim != 1:
            raise ValueError(
                "selection_loss='contrastive' compares images by their classes and needs one label an image, got "
                f"labels of shape {list(labels.shape)}; use selection_loss='task'"
            )
        read: list[Tensor] = []
        handle = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            model(torch.cat([images, images.flip(-1)]))
        finally:
            handle.remove()
        return supervised_contrastive(read[0].flatten(1), torch.cat([labels, labels]), temperature)

    return loss


def _selection_loss(data: SelectionData, head: str, options: Options) -> Loss:
    """The loss that is asked for; by default the contrastive one for images with a class each, the task's for masks."""
    asked, task = options.get("selection_loss"), loss_of(data)
    contrastive = contrastive_loss(head, options.get("temperature", 0.07))

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        is_contrastive = asked == "contrastive" or (asked is None and labels.ndim == 1)
        return (contrastive if is_contrastive else task)(model, images, labels)

    return loss


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Measure the gradient, pick each neuron's inputs, wrap the layers."""
    data, names = selection_data(batches), neuron_layers(model, head)
    loss = _selection_loss(data, head, options)
    weights = [f"{name}.weight" for name in names]
    gradients = summed_gradients(model, weights, data, loss, options.get("calibration_batches"))
    chosen = {name: strongest_inputs(gradients.pop(f"{name}.weight"), options.get("k", 1)) for name in names}
    return _apply(model, head, chosen)


def _apply(model: nn.Module, head: str, chosen: Mapping[str, Tensor]) -> nn.Module:
    """Train the chosen weights, the neurons' biases, what scales whole layers, and the head."""
    train_head(model, head)
    for name in neuron_layers(model, head):
        bias: Any = model.get_submodule(name).bias
        if bias is not None:
            bias.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith("gamma"):
            parameter.requires_grad_(True)
    for name, indices in chosen.items():
        model.set_submodule(name, SparseUpdate(model.get_submodule(name), indices))
    return model


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The same structure from the stored positions."""
    with restoring(model):
        stored = {key.removesuffix(".indices"): value for key, value in tensors.items() if key.endswith(".indices")}
        return _apply(model, head, stored)


GPS = Method(
    "the k weights of each neuron with the largest gradient, and all biases but those of norms",
    "gradient-based parameter selection, Zhang et al., arXiv 2312.10136",
    _build,
    tuple(_RULES),
    suffix="k",
    check=check_by(_RULES),
    needs_batches=True,
    restore=_restore,
    merge=merge_sparse,
)
"""Trains of every neuron (a row of a `Linear` or `Conv2d` weight) the `k` inputs whose gradient is the largest,

    M[i, j] = 1 where |Σ_batches ∂loss/∂W[i, j]| is among the k largest of row i,

its bias, layer scales, and the head; norms, tokens and positions stay frozen. With `k = 1` on a ViT-B/16 these are
83,712 weights and as many biases. The gradient is that of `selection_loss`, before training: `contrastive` (as in the
paper; the default where every image has one class) compares what the head reads within a batch, so that the head's
random values play no part; `task` (the default for masks) is the loss of training and goes through the head. The
paper's two augmented views of each image are here the image and its mirror image. `calibration_batches` limits how many
batches are looked at; by default one pass over all.
"""
