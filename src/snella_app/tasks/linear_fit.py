"""Linear heads with an L2 penalty, fitted to features."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE_PENALTY = 0.1
"""Inverse regularization strength of the linear probe, scikit-learn's `C`, for features scaled to mean variance 1."""
_MAX_ITERATIONS = 200
_TOLERANCE = 1e-5
"""Convergence tolerance on the largest gradient entry."""
_CONSTANT_LOGIT = 4.0
"""Magnitude of the logit if all labels are equal, which gives a probability of 98% or 2%."""
_HISTORY_BYTES = 2**30
"""Memory for the history of L-BFGS, which holds as many steps as fit, within the following limits."""
_HISTORY = 100
"""Maximum number of steps in the history."""
_MIN_HISTORY = 10
"""Minimum number of steps in the history, even if they need more memory."""


def fit_head(
    inputs: Tensor, outputs: int, loss: Callable[[Tensor], Tensor], penalty: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Minimize `loss(X Wᵀ + b) + penalty · ‖W‖²` over `W` and `b` by L-BFGS, starting from zeros.

    Unlike scikit-learn's logistic regression, this supports any differentiable loss and GPUs.

    Args:
        inputs: X, `[images, width]`.
        outputs: Number of outputs, the rows of `W`.
        loss: Maps outputs `[images, outputs]` to a 0-dim loss.
        penalty: Weight of the squared norm.
        iterations: Maximum number of iterations.

    Returns:
        `W`, `[outputs, width]`, and `b`, `[outputs]`.
    """
    weight = torch.zeros(outputs, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(outputs, device=inputs.device, requires_grad=True)
    history = _HISTORY_BYTES // (2 * (weight.nbytes + bias.nbytes))  # two vectors per step
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=_TOLERANCE,
        history_size=max(_MIN_HISTORY, min(_HISTORY, history)),
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        """Return the penalized loss, and compute its gradients."""
        optimizer.zero_grad()
        value = loss(inputs @ weight.T + bias) + penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach(), bias.detach()


def feature_scale(features: np.ndarray) -> float:
    """Return the square root of the mean variance of features `[images, width]`, or 1 for constant features."""
    return float(np.sqrt(features.var(0).mean())) or 1.0


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    inverse_penalty: float = INVERSE_PENALTY,
    weights: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression.

    Args:
        features: `[images, width]`.
        labels: Class index of each image.
        classes: Number of classes. Classes without images get zero weight and bias.
        inverse_penalty: scikit-learn's `C`: weight of the summed losses relative to `‖w‖²/2`, for features divided by
            their `feature_scale`.
        weights: Sample weights `[images]`; None means equal weights.

    Returns:
        Weight `[classes, width]` and bias `[classes]` of a softmax classifier, float64.
    """
    scale = feature_scale(features)
    present, label_indices = np.unique(labels, return_inverse=True)
    inputs = torch.from_numpy(features / scale).float()
    targets = torch.from_numpy(label_indices)
    sample_weights = None if weights is None else torch.from_numpy(weights).float()
    num_images = len(inputs)
    penalty = 1 / (2 * inverse_penalty * num_images)
    if len(present) == 2:
        penalty *= 2  # scikit-learn fits one row w; the equivalent rows −w/2 and w/2 have half its squared norm

    def loss(logits: Tensor) -> Tensor:
        """Return the mean of the weighted losses."""
        losses = F.cross_entropy(logits, targets, reduction="none")
        return (losses if sample_weights is None else losses * sample_weights).sum() / num_images

    weight, bias = fit_head(inputs, len(present), loss, penalty, _MAX_ITERATIONS)
    full_weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    full_bias = torch.zeros(classes).double()
    full_weight[present], full_bias[present] = weight.double() / scale, bias.double()
    return full_weight, full_bias


def fit_binary_probe(
    features: np.ndarray, positives: np.ndarray, weights: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Fit a binary logistic regression with `fit_probe` and its default penalty.

    If all labels are equal, the weights are zero and the bias is ±4. If there are no images, both are 0.

    Args:
        features: `[images, width]`.
        positives: True for positive images, `[images]`.
        weights: Sample weights.

    Returns:
        Weight, `[width]`, and bias, 0-dim, of the logit of the positive class, float64.
    """
    values = set(positives.tolist())
    if len(values) < 2:
        constant = _CONSTANT_LOGIT * sum(1 if value else -1 for value in values)
        return torch.zeros(features.shape[1], dtype=torch.float64), torch.tensor(constant, dtype=torch.float64)
    weight, bias = fit_probe(features, positives.astype(int), 2, weights=weights)
    return weight[1] - weight[0], bias[1] - bias[0]
