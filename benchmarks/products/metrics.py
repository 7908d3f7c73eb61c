"""Metrics of class probabilities, shared by all products."""

import numpy as np

MIN_PROBABILITY = 1e-6  # probabilities are clipped to this before the logarithm
_BINS = 15


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute accuracy, balanced accuracy, negative log-likelihood and expected calibration error.

    Args:
        probabilities: Class probabilities, `[images, classes]`; rows sum to 1.
        labels: Class indices, `[images]`.

    Returns:
        Metrics by name. Balanced accuracy is the mean recall of the classes present; ECE uses 15 equal-width bins.

    Raises:
        ValueError: If a row does not sum to 1, or the shapes do not match.
    """
    if probabilities.ndim != 2 or len(probabilities) != len(labels):
        raise ValueError(f"probabilities must be [{len(labels)}, classes], got {list(probabilities.shape)}")
    sums = probabilities.sum(1)
    if not np.abs(sums - 1).max() <= 1e-3:  # also for NaN
        raise ValueError(f"rows of probabilities must sum to 1, got {sums[np.abs(sums - 1).argmax()]:.4f}")
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    is_correct = predicted == labels
    recalls = [is_correct[labels == label].mean() for label in np.unique(labels)]
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=is_correct - confidence)
    return {
        "accuracy": float(is_correct.mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "nll": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], MIN_PROBABILITY)).mean()),
        "ece": float(np.abs(gaps).sum() / len(labels)),
    }
