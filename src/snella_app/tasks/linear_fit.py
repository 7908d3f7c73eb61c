"""Linear head with an L2 penalty."""

from collections.abc import Callable

import torch
from torch import Tensor

_TOLERANCE = 1e-5
"""Convergence tolerance on the largest gradient entry."""


def fit_head(
    inputs: Tensor, outputs: int, loss: Callable[[Tensor], Tensor], penalty: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Minimize `loss(X Wᵀ + b) + penalty · ‖W‖²` over `W` and `b` by L-BFGS, starting from zeros.

    Unlike scikit-learn's logistic regression, it supports any loss and GPUs.

    Args:
        inputs: X, `[images, width]`.
        outputs: Number of rows of `W`.
        loss: Maps outputs `[images, outputs]` to a 0-dim loss.
        penalty: Weight of the squared norm.
        iterations: Maximum number of iterations.

    Returns:
        `W`, `[outputs, width]`, and `b`, `[outputs]`.
    """
    weight = torch.zeros(outputs, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(outputs, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=_TOLERANCE, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = loss(inputs @ weight.T + bias) + penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach(), bias.detach()
