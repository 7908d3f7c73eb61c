"""Temperature scaling of a classifier, and a confidence threshold below which its predictions are unsure.

A temperature T divides the logits before the softmax, so that the confidence (the probability of the predicted class)
matches the fraction of correct predictions.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snella_app.records.run import Calibration, Reliability, ReliabilityBin

MAX_BINS = 15  # maximum number of confidence bins of a split
_MIN_BIN_SIZE = 12  # minimum images per bin; keeps the standard error of the bin's accuracy below 15 percentage points
_MIN_TEMPERATURE = 0.05
_MAX_TEMPERATURE = 20.0
_TINY = 1e-38  # replaces probabilities that float32 rounds to 0, which have no logarithm


def calibrate(measured: Mapping[str, tuple[Tensor, Tensor]]) -> Calibration | None:
    """Fit a temperature on the validation split, and measure calibration on the validation and test splits.

    Args:
        measured: Probabilities `[images, classes]` and labels `[images]`, by split.

    Returns:
        The calibration, or None if there are no validation images. Test images must not be used for fitting.
    """
    if "val" not in measured or not len(measured["val"][1]):
        return None
    logits_and_labels: dict[str, tuple[Tensor, Tensor]] = {}
    for split, (probabilities, labels) in measured.items():
        # log probabilities and logits differ by a constant per image, which does not change the softmax
        logits_and_labels[split] = (probabilities.double().clamp_min(_TINY).log(), labels)
    val_logits, val_labels = logits_and_labels["val"]
    temperature = fit_temperature(val_logits, val_labels)
    confidence, predicted = (val_logits / temperature).softmax(1).max(1)
    threshold, coverage, accuracy = unsure_threshold(confidence, predicted == val_labels)
    measured_splits = [split for split in ("val", "test") if split in logits_and_labels]
    reliability = [_reliability(split, *logits_and_labels[split], temperature) for split in measured_splits]
    return Calibration(temperature, threshold, coverage, accuracy, reliability)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature in [0.05, 20] that minimizes the cross entropy.

    T = argmin_T mean_i( -Σ_c q[i, c] log softmax(logits / T)[i, c] ),  q = (1 - ε) onehot + ε / classes

    with `ε = 1 / (images + 2)`. As in Platt scaling, the smoothing prevents infinite confidence if all predictions are
    correct. The loss is convex in `1 / T`, so every local minimum is a global one.

    Args:
        logits: Logits or log probabilities, `[images, classes]`, floating point.
        labels: `[images]`, class indices.

    Returns:
        The temperature, rounded to six decimals.

    Sources:
        Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599); Platt, Probabilistic Outputs for
        Support Vector Machines (1999).
    """
    from scipy.optimize import minimize_scalar  # slow import

    smoothing = 1 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        scaled = logits.double() * float(np.exp(-log_temperature))
        return float(F.cross_entropy(scaled, labels, label_smoothing=smoothing))

    bounds = (float(np.log(_MIN_TEMPERATURE)), float(np.log(_MAX_TEMPERATURE)))
    result = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return round(float(np.exp(result.x)), 6)


def expected_calibration_error(bins: list[ReliabilityBin]) -> float:
    """Compute the expected calibration error, `Σ_b count_b / count · |accuracy_b - confidence_b|`."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total


def reliability_bins(confidence: Tensor, is_correct: Tensor) -> list[ReliabilityBin]:
    """Group images by confidence into up to 15 bins of about equal size, with at least 12 images each.

    Bins ascend in confidence, and images with equal confidence share a bin. If there are fewer than 12 images, they
    form a single bin; if there are none, the list is empty.

    Args:
        confidence: Highest probability of each image, `[images]`, in [0, 1].
        is_correct: True for correct predictions, `[images]`, boolean.
    """
    if not len(confidence):
        return []
    order = confidence.argsort(stable=True)
    ranked = confidence[order].double()
    correct = is_correct[order].double()
    num_bins = max(1, min(MAX_BINS, len(ranked) // _MIN_BIN_SIZE))
    quantiles = [round(number * len(ranked) / num_bins) for number in range(1, num_bins)]
    quantile_indices = torch.tensor(quantiles, dtype=torch.long)
    bounds = [0]
    # each edge moves down to the first image with the same confidence, so that ties share a bin
    for edge in torch.searchsorted(ranked, ranked[quantile_indices]).tolist():
        if edge - bounds[-1] >= _MIN_BIN_SIZE:
            bounds.append(edge)
    bounds.append(len(ranked))  # no edge moves up, so the last bin is large enough too
    bins = []
    for start, end in itertools.pairwise(bounds):
        mean_confidence = round(float(ranked[start:end].mean()), 6)
        accuracy = round(float(correct[start:end].mean()), 6)
        bins.append(ReliabilityBin(mean_confidence, accuracy, end - start))
    return bins


def unsure_threshold(confidence: Tensor, is_correct: Tensor) -> tuple[float | None, float, float]:
    """Find the lowest confidence threshold that at least halves the error rate.

    Args:
        confidence: Highest probability of each image, `[images]`, in [0, 1].
        is_correct: True for correct predictions, `[images]`, boolean.

    Returns:
        The threshold (rounded down to six decimals), the fraction of images at or above it, and their accuracy. If
        there are no errors, or no threshold halves the error rate, returns None, 1, and the accuracy of all images.
    """
    order = confidence.argsort(descending=True, stable=True)
    sorted_confidence = confidence[order]
    errors = (~is_correct[order]).double()
    error_rates = errors.cumsum(0) / torch.arange(1, len(errors) + 1)
    # a threshold cannot separate images with equal confidence, so only the last of them is a candidate
    is_tie_end = torch.cat([sorted_confidence[1:] < sorted_confidence[:-1], torch.ones(1, dtype=torch.bool)])
    candidates = ((error_rates <= error_rates[-1] / 2) & is_tie_end).nonzero()
    if error_rates[-1] == 0 or not len(candidates):
        return None, 1.0, float(1 - error_rates[-1])
    last_kept = int(candidates[-1])
    threshold = float(np.floor(float(sorted_confidence[last_kept]) * 1e6) / 1e6)
    return threshold, (last_kept + 1) / len(errors), float(1 - error_rates[last_kept])


def _reliability(split: str, logits: Tensor, labels: Tensor, temperature: float) -> Reliability:
    """Measure calibration on one split, with and without the temperature."""
    results = []
    for scores in (logits / temperature, logits):
        confidence, predicted = scores.softmax(1).max(1)
        bins = reliability_bins(confidence, predicted == labels)
        results.append((bins, expected_calibration_error(bins), float(F.cross_entropy(scores, labels))))
    (bins, ece, loss), (bins_before, ece_before, loss_before) = results
    return Reliability(split, len(labels), ece, ece_before, loss, loss_before, bins, bins_before)
