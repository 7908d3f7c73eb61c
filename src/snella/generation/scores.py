"""What generated images are measured by, as functions of embeddings."""

import torch
from torch import Tensor

_TINY = 1e-12


def vendi_score(embeddings: Tensor) -> float:
    """How many different images there are, in effect.

    V = exp(−Σ_i λ_i ln λ_i),   λ the eigenvalues of K / n,   K[i, j] = cos(e_i, e_j)

    1 where all embeddings point the same way, n where they are orthogonal.

    Args:
        embeddings: `[n, d]`, none of them 0.

    Raises:
        ValueError: No embeddings, or some that are 0 or not finite.

    Source: Friedman and Dieng, arXiv 2210.02410.
    """
    unit = _normalised(embeddings)
    kernel = unit @ unit.T / len(unit)  # [n, n], trace 1
    eigenvalues = torch.linalg.eigvalsh(kernel).clamp_min(0.0)
    return float(torch.exp(-torch.special.xlogy(eigenvalues, eigenvalues.clamp_min(_TINY)).sum()))


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine similarity over all pairs of one embedding out of each set.

    Args:
        first: `[n, d]`.
        second: `[m, d]`.

    Raises:
        ValueError: No embeddings, or some that are 0 or not finite.
    """
    return float((_normalised(first) @ _normalised(second).T).mean())


def paired_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine similarity of embeddings that belong together, row by row.

    Args:
        first: `[n, d]`.
        second: `[n, d]`.

    Raises:
        ValueError: Different numbers of embeddings, none, or some that are 0 or not finite.
    """
    if first.shape != second.shape:
        raise ValueError(f"both sets of embeddings must have one shape, got {list(first.shape)}, {list(second.shape)}")
    return float((_normalised(first) * _normalised(second)).sum(dim=1).mean())


def _normalised(embeddings: Tensor) -> Tensor:
    """The embeddings as unit vectors in float64."""
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise ValueError(f"embeddings must be [n, d] with n of at least 1, got shape {list(embeddings.shape)}")
    values = embeddings.detach().double()
    norms = values.norm(dim=1, keepdim=True)
    bad = int((~torch.isfinite(norms) | (norms == 0)).sum())
    if bad:
        raise ValueError(f"embeddings must be finite and not 0, got {bad} of {len(values)} that are not")
    return values / norms
