"""Scores of class probabilities, the same function for all products."""

import numpy as np

LEAST = 1e-6  # smaller probabilities count as this in the logarithm
_BINS = 15


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy, negative log-likelihood and expected calibration error.

    Args:
        probabilities: `[images, classes]`, rows sum to 1.
        labels: `[images]`, class numbers.

    Returns:
        Balanced accuracy is the mean recall of the classes that occur; the calibration error has 15 equal bins.

    Raises:
        ValueError: A row does not sum to 1, or the shapes do not match.
    """
    if probabilities.ndim != 2 or len(probabilities) != len(labels):
        raise ValueError(f"probabilities must be [{len(labels)}, classes], got {list(probabilities.shape)}")
    sums = probabilities.sum(1)
    if np.abs(sums - 1).max() > 1e-3:
        raise ValueError(f"rows of probabilities must sum to 1, got {sums[np.abs(sums - 1).argmax()]:.4f}")
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    is_right = predicted == labels
    recalls = [is_right[labels == label].mean() for label in np.unique(labels)]
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(is_right[bins == b].sum() - confidence[bins == b].sum()) for b in range(_BINS)]
    return {
        "accuracy": float(is_right.mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "nll": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], LEAST)).mean()),
        "ece": float(sum(gaps) / len(labels)),
    }
