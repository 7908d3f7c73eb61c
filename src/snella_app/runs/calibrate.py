"""Temperature scaling of a classifier, and its threshold for unsure predictions."""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snella_app.records.run import Calibration, Reliability, ReliabilityBin

MAX_BINS = 15
_MIN_BIN_SIZE = 12  # minimum images per bin; keeps the standard error of its accuracy below 15 points
_MIN_TEMPERATURE = 0.05
_MAX_TEMPERATURE = 20.0
_TINY = 1e-38  # probabilities are float32


def calibrate(measured: Mapping[str, tuple[Tensor, Tensor]]) -> Calibration | None:
    """Fit a temperature on the validation split, and measure calibration on the validation and test splits.

    Args:
        measured: Probabilities `[images, classes]` and labels `[images]`, by split.

    Returns:
        The calibration; None without validation images, since test images must not be used for fitting.
    """
    if "val" not in measured or not len(measured["val"][1]):
        return None
    logits = {split: (p.double().clamp_min(_TINY).log(), labels) for split, (p, labels) in measured.items()}
    temperature = fit_temperature(*logits["val"])
    scores, labels = logits["val"]
    confidence, predicted = (scores / temperature).softmax(1).max(1)
    threshold, coverage, accuracy = unsure_threshold(confidence, predicted == labels)
    reliability = [_reliability(split, *logits[split], temperature) for split in ("val", "test") if split in logits]
    return Calibration(temperature, threshold, coverage, accuracy, reliability)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature in [0.05, 20] that minimizes the cross entropy.

    T = argmin_T mean_i( -Σ_c q[i, c] log softmax(logits / T)[i, c] ),  q = (1 - ε) onehot + ε / classes

    with `ε = 1 / (images + 2)`. As in Platt scaling, the smoothing prevents infinite confidence if all predictions are
    correct. The loss is convex in `1 / T`, so every local minimum is a global one.

    Args:
        logits: `[images, classes]`, floating point; log probabilities work too.
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
    """Compute `Σ_b count_b / count · |accuracy_b - confidence_b|`."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total


def reliability_bins(confidence: Tensor, is_correct: Tensor) -> list[ReliabilityBin]:
    """Group images by confidence into up to 15 bins of about equal size, with at least 12 images each.

    Images with equal confidence share a bin. Fewer than 12 images form one bin.

    Args:
        confidence: Highest probability of each image, `[images]`, in [0, 1].
        is_correct: True for correct predictions, `[images]`, boolean.
    """
    if not len(confidence):
        return []
    order = confidence.argsort(stable=True)
    ranked, correct = confidence[order].double(), is_correct[order].double()
    count = max(1, min(MAX_BINS, len(ranked) // _MIN_BIN_SIZE))
    quantile_indices = torch.tensor(
        [round(number * len(ranked) / count) for number in range(1, count)], dtype=torch.long
    )
    bounds = [0]
    for edge in torch.searchsorted(ranked, ranked[quantile_indices]).tolist():  # first image with equal confidence
        if edge - bounds[-1] >= _MIN_BIN_SIZE:
            bounds.append(edge)
    bounds.append(len(ranked))  # edges only move down, so the last bin is large enough too
    return [
        ReliabilityBin(
            round(float(ranked[start:end].mean()), 6), round(float(correct[start:end].mean()), 6), end - start
        )
        for start, end in itertools.pairwise(bounds)
    ]


def unsure_threshold(confidence: Tensor, is_correct: Tensor) -> tuple[float | None, float, float]:
    """Find the lowest confidence threshold that halves the error rate.

    Args:
        confidence: Highest probability of each image, `[images]`, in [0, 1].
        is_correct: True for correct predictions, `[images]`, boolean.

    Returns:
        Threshold (rounded down to six decimals), fraction of images at or above it, and their accuracy. If no threshold
        halves the error rate, or there are no errors: None, 1, and the accuracy of all images.
    """
    order = confidence.argsort(descending=True, stable=True)
    sorted_confidence = confidence[order]
    wrong = (~is_correct[order]).double()
    error_rates = wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)
    is_tie_end = torch.cat([sorted_confidence[1:] < sorted_confidence[:-1], torch.ones(1, dtype=torch.bool)])
    candidates = ((error_rates <= error_rates[-1] / 2) & is_tie_end).nonzero()  # `is_tie_end` keeps ties together
    if error_rates[-1] == 0 or not len(candidates):
        return None, 1.0, float(1 - error_rates[-1])
    last = int(candidates[-1])
    threshold = float(np.floor(float(sorted_confidence[last]) * 1e6) / 1e6)
    return threshold, (last + 1) / len(wrong), float(1 - error_rates[last])


def _reliability(split: str, logits: Tensor, labels: Tensor, temperature: float) -> Reliability:
    """Measure calibration on one split with and without the temperature."""
    results = []
    for scores in (logits / temperature, logits):
        confidence, predicted = scores.softmax(1).max(1)
        bins = reliability_bins(confidence, predicted == labels)
        results.append((bins, expected_calibration_error(bins), float(F.cross_entropy(scores, labels))))
    (bins, ece, loss), (bins_before, ece_before, loss_before) = results
    return Reliability(split, len(labels), ece, ece_before, loss, loss_before, bins, bins_before)
