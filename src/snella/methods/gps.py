"""`gps`: the input weights of every neuron with the largest gradients."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.methods.calibration import Loss, SelectionData, loss_of, selection_data, summed_gradients
from snella.methods.files import restoring
from snella.methods.method import Batches, Method, Options, check_by, number, one_of, whole_number
from snella.methods.model_parts import is_inside
from snella.methods.partial import train_head
from snella.methods.sparse_update import SparseUpdate, can_be_sparse, merge_sparse

_SELECTION_LOSSES = ("contrastive", "task")


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
    ("k", "selection_loss", "temperature", "calibration_batches"),
    suffix="k",
    check=check_by(
        {
            "k": whole_number(),
            "selection_loss": one_of(*_SELECTION_LOSSES),
            "temperature": number(0.001),
            "calibration_batches": whole_number(),
        }
    ),
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
