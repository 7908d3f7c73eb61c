"""Weight sensitivity: gradients on a few batches before training."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from snella_app.methods.method import Batches, SelectionData

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""`(model, images, labels) -> 0-dim loss`."""


def squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss, limit: int | None = None
) -> dict[str, Tensor]:
    """SPT's sensitivity of each weight: the loss that one step of gradient descent on this weight alone would save.

    s[w] = Σ_batches g[w]²,   g = ∂loss/∂w

    To first order the loss changes by g·Δw, and a step of gradient descent is Δw = -ε g; ε is the same for all.

    Args:
        model: Left as it was; works in evaluation mode, so that nothing random is drawn.
        names: Parameters to measure.
        batches: Gives a fresh pass over training data.
        loss: Of a batch.
        limit: Use so many batches at most.

    Returns:
        float32 tensors in the shapes of the parameters, on their devices.

    Raises:
        ValueError: There is no batch, a loss is not finite, or a name is no parameter.
    """
    return _accumulate(model, names, batches, loss, limit, lambda total, grad: total.addcmul_(grad, grad))


def summed_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss, limit: int | None = None
) -> dict[str, Tensor]:
    """The gradient of the loss over all batches, Σ_batches ∂loss/∂w; arguments and errors of `squared_gradients`."""
    return _accumulate(model, names, batches, loss, limit, lambda total, grad: total.add_(grad))


def rank_entries(values: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The largest entries of several tensors together, in descending order.

    Exact and the same every time: equal entries stand in the order of their tensors, then of their positions. Needs
    memory for what it returns and one tensor's mask, not for a sorted copy.

    Args:
        values: float32 tensors without negative entries, of any shapes.
        count: How many entries, at most all.

    Returns:
        Which tensor and which position in it, flattened, `[count]` int64 each, on the CPU.

    Raises:
        ValueError: `count` is negative or more than there are.
    """
    total = sum(tensor.numel() for tensor in values)
    if not 0 <= count <= total:
        raise ValueError(f"count must be in [0, {total}], the entries of all tensors together, got {count}")
    # the bits of floats without sign are ordered as the floats are, so that bisection finds a value exactly
    bits = [tensor.reshape(-1).view(torch.int32) for tensor in values]
    threshold = _kth_largest(bits, count)
    kept = [torch.nonzero(one > threshold).flatten() for one in bits]
    magnitudes = torch.cat([one[where].cpu() for one, where in zip(bits, kept, strict=True)])
    order = magnitudes.argsort(descending=True, stable=True)
    owners = [torch.cat([torch.full((len(where),), k) for k, where in enumerate(kept)])[order]]
    positions = [torch.cat([where.cpu() for where in kept])[order]]
    missing = count - len(order)
    for k, one in enumerate(bits):
        if missing <= 0:
            break
        ties = torch.nonzero(one == threshold).flatten()[:missing].cpu()
        owners.append(torch.full((len(ties),), k))
        positions.append(ties)
        missing -= len(ties)
    return torch.cat(owners), torch.cat(positions)


def _kth_largest(bits: Sequence[Tensor], count: int) -> int:
    """The `count`-th largest of all integers, which are not negative; more than any for 0."""
    low, high = 0, torch.iinfo(torch.int32).max
    if count == 0:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int((one >= middle).sum()) for one in bits) >= count:
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
    """Add up something of each gradient, which is freed at once: no two weights' gradients need to exist together."""
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
    with _measuring(model, [parameters[name] for name in names]), torch.enable_grad():
        handles = [parameters[name].register_post_accumulate_grad_hook(collect(name)) for name in names]
        try:
            seen = 0
            for images, labels in islice(batches(), limit):
                value = loss(model, images.to(device), labels.to(device))
                if not math.isfinite(value.item()):
                    raise ValueError(
                        f"the loss of batch {seen + 1} is {value.item()}; check the images and the weights"
                    )
                value.backward()
                seen += 1
        finally:
            for handle in handles:
                handle.remove()
    if not seen:
        raise ValueError("batches() must give at least one batch of images and labels, got none")
    return totals


@contextmanager
def _measuring(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for these parameters alone; everything is put back."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    measured = set(parameters)
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(parameter in measured)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


def selection_data(batches: Batches | None) -> SelectionData:
    """What a method's `build` was given, as `SelectionData`.

    Raises:
        TypeError: `batches` cannot be called.
    """
    if isinstance(batches, SelectionData):
        return batches
    if not callable(batches):
        raise TypeError(
            f"batches must be a callable that gives a fresh pass over pairs of images and labels, got {batches!r:.80}; "
            "write batches=lambda: loader"
        )
    return SelectionData(batches)


def loss_of(data: SelectionData) -> Loss:
    """The task's loss of a model on a batch."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return data.loss(model(images), labels)

    return loss
