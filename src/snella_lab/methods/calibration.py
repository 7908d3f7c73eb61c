"""Calibration: sums of gradients or squared gradients over training batches, by which methods select weights."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from snella_app.device import move_to
from snella_app.methods.method import Batches, SelectionData

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Loss function, `(model, images, labels) -> 0-dim loss`."""


def squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss, limit: int | None = None
) -> dict[str, Tensor]:
    """Compute the sensitivity of each weight, as defined by SPT (He et al., arXiv 2303.08566).

    s[w] = Σ_batches g[w]²,   g = ∂loss/∂w

    Up to a constant factor, this is the decrease in the loss, -g·Δw = ε g² to first order, after a gradient step
    Δw = -ε g on that weight.

    Args:
        model: Model, which runs in evaluation mode. Its state is restored afterwards.
        names: Names of the parameters to measure.
        batches: Callable that returns a new iterable over the training batches.
        loss: Function that computes the loss of a batch.
        limit: Maximum number of batches, at least 1. None uses all batches.

    Returns:
        float32 tensors by name, with the shapes and devices of the parameters.

    Raises:
        ValueError: If `batches` is empty, a loss is not finite, a gradient contains NaN, or a name is not a parameter.
    """
    return _accumulate(model, names, batches, loss, limit, lambda total, grad: total.addcmul_(grad, grad))


def summed_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss, limit: int | None = None
) -> dict[str, Tensor]:
    """Sum the gradient over batches, Σ_batches ∂loss/∂w; see `squared_gradients` for the arguments."""
    return _accumulate(model, names, batches, loss, limit, lambda total, grad: total.add_(grad))


def rank_entries(values: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest entries of several tensors, in descending order.

    The result is deterministic; ties are ordered by tensor, then by position.

    Args:
        values: Floating-point tensors of any shape without NaN.
        count: Number of entries.

    Returns:
        Tensor indices and flat positions, `[count]` int64 each, on the CPU.

    Raises:
        ValueError: If `count` is negative or exceeds the total number of entries.
    """
    flat = torch.cat([tensor.flatten() for tensor in values])
    if not 0 <= count <= len(flat):
        raise ValueError(f"count must be in [0, {len(flat)}] (total number of entries), got {count}")
    threshold = flat.kthvalue(len(flat) - count + 1).values if count else torch.inf  # the `count`-th largest entry
    above = torch.nonzero(flat > threshold).flatten()
    ties = torch.nonzero(flat == threshold).flatten()[: count - len(above)]
    order = flat[above].argsort(descending=True, stable=True)
    ranked = torch.cat([above[order], ties]).cpu()
    sizes = torch.tensor([tensor.numel() for tensor in values])
    ends = sizes.cumsum(0)
    starts = ends - sizes
    tensor_indices = torch.bucketize(ranked, ends, right=True)
    return tensor_indices, ranked - starts[tensor_indices]


def _accumulate(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    loss: Loss,
    limit: int | None,
    add: Callable[[Tensor, Tensor], object],
) -> dict[str, Tensor]:
    """Accumulate a function of each gradient, using hooks that free the gradient immediately.

    `add` receives the float32 total of a parameter and its gradient for one batch, and changes the total in place.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise ValueError(f"names must be parameters of {type(model).__name__}, got {unknown[:3]}")
    totals = {parameters[name]: torch.zeros_like(parameters[name], dtype=torch.float32) for name in names}

    def collect(parameter: Tensor) -> None:
        if parameter.grad is not None:
            add(totals[parameter], parameter.grad.float())  # type: ignore[index]
        parameter.grad = None

    device = next(model.parameters()).device
    with _calibration_mode(model, totals), torch.enable_grad():
        handles = [parameter.register_post_accumulate_grad_hook(collect) for parameter in totals]
        try:
            num_batches = 0
            for images, labels in islice(batches(), limit):
                batch_loss = loss(model, images.to(device), move_to(labels, device))
                if not math.isfinite(batch_loss.item()):
                    raise ValueError(
                        f"the loss must be finite, got {batch_loss.item()} in batch {num_batches + 1}; check the "
                        "images and weights"
                    )
                batch_loss.backward()
                num_batches += 1
        finally:
            for handle in handles:
                handle.remove()
    if not num_batches:
        raise ValueError("batches() must yield at least one batch of images and labels, got none")
    invalid = [name for name in names if totals[parameters[name]].isnan().any()]
    if invalid:
        raise ValueError(f"the gradients of {invalid[:3]} contain NaN; check the model's weights and the loss")
    return {name: totals[parameters[name]] for name in names}


@contextmanager
def _calibration_mode(model: nn.Module, selected: Collection[Tensor]) -> Iterator[None]:
    """Enter evaluation mode, enable gradients only for the selected parameters, and restore the state on exit."""
    modes = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    grads = {parameter: parameter.grad for parameter in selected}
    try:
        model.eval()
        for parameter in selected:
            parameter.grad = None  # otherwise, the first batch would add to an earlier gradient
        for parameter in requires_grad:
            parameter.requires_grad_(parameter in selected)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, is_trainable in requires_grad.items():
            parameter.requires_grad_(is_trainable)
        for parameter, grad in grads.items():
            parameter.grad = grad


def selection_data(batches: Batches | None) -> SelectionData:
    """Convert the `batches` argument of a method's `build` to `SelectionData`.

    Raises:
        TypeError: If `batches` is not callable.
    """
    if isinstance(batches, SelectionData):
        return batches
    if not callable(batches):
        raise TypeError(
            f"batches must be a callable that returns a new iterable of (images, labels), got {batches!r:.80}; "
            "pass batches=lambda: loader"
        )
    return SelectionData(batches)


def loss_of(data: SelectionData) -> Loss:
    """Return the task's loss as a function of the model and the batch."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return data.loss(model(images), labels)

    return loss
