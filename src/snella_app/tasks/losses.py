"""Losses that torch lacks: focal losses and the ordinal loss CORN."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

FOCAL_GAMMA = 2.0
"""Exponent of the focal losses, the default of the paper."""


def full_precision(outputs: Tensor) -> Tensor:
    """Cast half precision to float32 for softmax, sigmoid and their logarithms; other dtypes are unchanged."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted mean `Σ_i w_i l_i / n`, 0-dim.

    The divisor is the number of samples, not the sum of weights, so a sample's gradient does not depend on the rest
    of the batch. Balanced class weights have mean 1 over the training images.

    Args:
        losses: `[batch]`.
        weights: `[batch]`; None means equal weights.
    """
    return (losses if weights is None else losses * weights.to(losses)).mean()


def focal(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the focal loss of each sample, which down-weights well-classified samples, `[batch]`.

    l_i = -Σ_c q[i, c] (1 - p[i, c])^γ log p[i, c],   p = softmax(logits),   q = (1 - ε) target + ε / classes,   γ = 2

    Source: Lin et al., 2017, arXiv 1708.02002, eq. 4, for several classes.

    Args:
        logits: `[batch, classes]`, float32 or float64.
        labels: `[batch]` int64, or targets `[batch, classes]` that sum to 1, e.g. from mixup.
        label_smoothing: ε.
    """
    log_p = logits.log_softmax(-1)
    q = labels.to(log_p) if labels.ndim > 1 else F.one_hot(labels, logits.shape[-1]).to(log_p)
    q = q * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    return -(q * (1 - log_p.exp()) ** FOCAL_GAMMA * log_p).sum(-1)


def binary_focal(logits: Tensor, targets: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Compute the binary focal loss of each entry, γ = 2, without α, `[batch, classes]`.

    Source: Lin et al., 2017, arXiv 1708.02002, eq. 4 (`torchvision.ops.sigmoid_focal_loss`).

    Args:
        logits: `[batch, classes]`, float32 or float64.
        targets: `[batch, classes]`, in [0, 1].
        positive_weights: Weights of positive labels, `[classes]`; None means equal weights.
    """
    losses = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=FOCAL_GAMMA, reduction="none")
    return losses if positive_weights is None else losses * (1 + (positive_weights - 1) * targets)


def corn(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the CORN loss of each sample from logits of `P(y > k | y ≥ k)`.

    l_i = -1/(K - 1) Σ_{k ≤ y_i, k < K - 1} ( [y_i > k] log σ(z[i, k]) + [y_i = k] log σ(-z[i, k]) )

    A sample of rank y contributes to the first min(y + 1, K - 1) binary outputs. The mean over a batch is Shi et al.'s
    loss with divisor n (K - 1) instead of the number of conditional samples.

    Source: CORN, Shi, Cao and Raschka, 2023, arXiv 2111.08851, eq. 5.

    Args:
        logits: `[batch, K - 1]`, float32 or float64.
        labels: `[batch]`, ranks from 0 to K - 1, int64.

    Returns:
        `[batch]`.
    """
    thresholds = torch.arange(logits.shape[-1], device=logits.device)
    is_above = (labels[:, None] > thresholds).to(logits)
    is_conditioned = (labels[:, None] >= thresholds).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, is_above, reduction="none")
    return (losses * is_conditioned).sum(-1) / logits.shape[-1]


def corn_probabilities(logits: Tensor) -> Tensor:
    """Compute class probabilities from CORN's logits, `[batch, K]`.

    P(y > k) = Π_{j ≤ k} σ(z[j]),   P(y = k) = P(y > k - 1) - P(y > k)

    Args:
        logits: `[batch, K - 1]`, float32 or float64.
    """
    above = F.logsigmoid(logits).cumsum(-1).exp()  # ONNX has no cumulative product
    first = above[:, :1]  # a shape would be baked into a traced graph
    return torch.cat([torch.ones_like(first), above], -1) - torch.cat([above, torch.zeros_like(first)], -1)


NUMBER_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""Regression losses of standardized targets by value of `--loss`; Huber is quadratic up to one standard deviation."""
