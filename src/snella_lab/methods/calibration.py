"""Weight sensitivities from gradients on a few batches before training."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from snella_app.methods.method import Batches, SelectionData

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Loss function, `(model, images, labels) -> 0-dim loss`."""


def squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss, limit: int | None = None
) -> dict[str, Tensor]:
    """Compute SPT's sensitivity of each weight.

    s[w] = Σ_batches g[w]²,   g = ∂loss/∂w

    Up to a constant factor, this is the first-order decrease -g·Δw = ε g² of the loss after a gradient step Δw = -ε g
    on that weight.

    Args:
        model: Model; runs in evaluation mode and is restored afterwards.
        names: Names of the parameters.
        batches: Callable that returns a new iterable over the training batches.
        loss: Loss of a batch.
        limit: Maximum number of batches; None uses all.

    Returns:
        float32 tensors on the parameters' devices, with their shapes.

    Raises:
        ValueError: If `batches` is empty, a loss is not finite, or a name is not a parameter.
    """
    return _accumulate(model, names, batches, loss, limit, lambda total, grad: total.addcmul_(grad, grad))


def summed_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss, limit: int | None = None
) -> dict[str, Tensor]:
    """Sum the gradient over batches, Σ_batches ∂loss/∂w; see `squared_gradients` for the arguments."""
    return _accumulate(model, names, batches, loss, limit, lambda total, grad: total.add_(grad))


def rank_entries(values: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest entries of several tensors, in descending order.

    The result is exact and deterministic; ties are ordered by tensor, then by position. Peak memory is the result plus
    one boolean mask per tensor; no copy of the entries is sorted.

    Args:
        values: Nonnegative float32 tensors of any shape.
        count: Number of entries.

    Returns:
        Tensor indices and flat positions, `[count]` int64 each, on the CPU.

    Raises:
        ValueError: If `count` is negative or exceeds the total number of entries.
    """
    total = sum(tensor.numel() for tensor in values)
    if not 0 <= count <= total:
        raise ValueError(f"count must be in [0, {total}] (total number of entries), got {count}")
    # nonnegative floats sort like their bit patterns, so integer bisection finds the exact threshold
    bits = [tensor.reshape(-1).view(torch.int32) for tensor in values]
    threshold = _kth_largest(bits, count)
    indices_above = [torch.nonzero(tensor > threshold).flatten() for tensor in bits]
    magnitudes = torch.cat([tensor[indices].cpu() for tensor, indices in zip(bits, indices_above, strict=True)])
    order = magnitudes.argsort(descending=True, stable=True)
    tensor_indices = [torch.cat([torch.full((len(indices),), k) for k, indices in enumerate(indices_above)])[order]]
    positions = [torch.cat([indices.cpu() for indices in indices_above])[order]]
    missing = count - len(order)
    for k, tensor in enumerate(bits):
        if missing <= 0:
            break
        ties = torch.nonzero(tensor == threshold).flatten()[:missing].cpu()
        tensor_indices.append(torch.full((len(ties),), k))
        positions.append(ties)
        missing -= len(ties)
    return torch.cat(tensor_indices), torch.cat(positions)


def _kth_largest(bits: Sequence[Tensor], count: int) -> int:
    """Return the `count`-th largest nonnegative integer, or the maximum int32 if `count` is 0."""
    low, high = 0, torch.iinfo(torch.int32).max
    if count == 0:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int((tensor >= middle).sum()) for tensor in bits) >= count:
            low = middle
        else:
            high = middle - 1
    return low


def _accumulate(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    loss: Loss,
    limit: int | None,
    add: Callable[[Tensor, Tensor], object],
) -> dict[str, Tensor]:
    """Accumulate a function of each gradient in hooks that free the gradient immediately."""
    parameters = dict(model.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise ValueError(f"names must be parameters of {type(model).__name__}, got {unknown[:3]}")
    totals = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in names}

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                add(totals[name], parameter.grad.float())
            parameter.grad = None

        return hook

    device = next(iter(parameters.values())).device
    with _calibration_mode(model, [parameters[name] for name in names]), torch.enable_grad():
        handles = [parameters[name].register_post_accumulate_grad_hook(collect(name)) for name in names]
        try:
            num_batches = 0
            for images, labels in islice(batches(), limit):
                value = loss(model, images.to(device), labels.to(device))
                if not math.isfinite(value.item()):
                    raise ValueError(
                        f"the loss must be finite, got {value.item()} in batch {num_batches + 1}; check the images "
                        "and weights"
                    )
                value.backward()
                num_batches += 1
        finally:
            for handle in handles:
                handle.remove()
    if not num_batches:
        raise ValueError("batches() must yield at least one batch of images and labels, got none")
    return totals


@contextmanager
def _calibration_mode(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enter evaluation mode with gradients for `parameters` only; restore the state on exit."""
    modes = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    selected = set(parameters)
    try:
        model.eval()
        for parameter in requires_grad:
            parameter.requires_grad_(parameter in selected)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, is_trainable in requires_grad.items():
            parameter.requires_grad_(is_trainable)


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
    """Return the task's loss as a function of model and batch."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return data.loss(model(images), labels)

    return loss
