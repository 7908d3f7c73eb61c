"""`calibrate`: a temperature for a classifier's logits, and the probability below which it is unsure."""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snella_app.records import Calibration, Reliability, ReliabilityBin

__all__ = ["calibrate", "expected_calibration_error", "fit_temperature", "reliability_bins", "unsure_threshold"]

MOST_BINS = 15
_PER_BIN = 12  # images: the standard error of a bin's accuracy is below 15 points
_LEAST, _MOST = 0.05, 20.0
_TINY = 1e-38  # probabilities are float32


def calibrate(measured: Mapping[str, tuple[Tensor, Tensor]]) -> Calibration | None:
    """Fit a temperature on validation images, and measure what it changes there and on test images.

    Args:
        measured: By split, probabilities `[images, classes]` and labels `[images]`.

    Returns:
        None without validation images: those that are tested on must not decide anything.
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
    """The temperature with the least cross entropy, in [0.05, 20].

    T = argmin_T mean_i( -Σ_c q[i, c] log softmax(logits / T)[i, c] ),  q = (1 - ε) onehot + ε / classes

    with `ε = 1 / (images + 2)`: as in Platt's scaling, images that are all right do not make a model infinitely sure of
    itself. The loss is convex in `1 / T`, so that the search finds its only minimum.

    Args:
        logits: `[images, classes]`, floating point; logarithms of probabilities will do.
        labels: `[images]`, class numbers.

    Returns:
        The temperature, rounded to six digits.

    Sources:
        Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599); Platt, Probabilistic Outputs for
        Support Vector Machines (1999).
    """
    from scipy.optimize import minimize_scalar  # half a second, and only to fit

    smoothing = 1 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        scaled = logits.double() * float(np.exp(-log_temperature))
        return float(F.cross_entropy(scaled, labels, label_smoothing=smoothing))

    bounds = (float(np.log(_LEAST)), float(np.log(_MOST)))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return round(float(np.exp(found.x)), 6)


def expected_calibration_error(bins: list[ReliabilityBin]) -> float:
    """`Σ_b count_b / count · |accuracy_b - confidence_b|`."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total


def reliability_bins(confidence: Tensor, is_right: Tensor) -> list[ReliabilityBin]:
    """The images in bins of equally many, by their highest probability; up to 15 bins, of 12 images at least.

    Images of equal probability are in one bin.

    Args:
        confidence: `[images]`, in [0, 1].
        is_right: `[images]`, boolean.
    """
    if not len(confidence):
        return []
    order = confidence.argsort(stable=True)
    ranked, right = confidence[order].double(), is_right[order].double()
    count = max(1, min(MOST_BINS, len(ranked) // _PER_BIN))
    places = torch.tensor([round(number * len(ranked) / count) for number in range(1, count)], dtype=torch.long)
    bounds = [0]
    for edge in torch.searchsorted(ranked, ranked[places]).tolist():  # the first image of equal probability
        if edge - bounds[-1] >= _PER_BIN:
            bounds.append(edge)
    bounds.append(len(ranked))  # an edge is never behind its place, so the last bin is large enough too
    return [
        ReliabilityBin(round(float(ranked[start:end].mean()), 6), round(float(right[start:end].mean()), 6), end - start)
        for start, end in itertools.pairwise(bounds)
    ]


def unsure_threshold(confidence: Tensor, is_right: Tensor) -> tuple[float | None, float, float]:
    """The least probability that leaves half as many errors, as a share, among the images that reach it.

    Args:
        confidence: `[images]`, in [0, 1].
        is_right: `[images]`, boolean.

    Returns:
        The threshold, the share of images that reach it, and the share of these that is right; None where no threshold
        does that, or where there is no error at all, with the shares of all images.
    """
    order = confidence.argsort(descending=True, stable=True)
    sorted_confidence, wrong = confidence[order], (~is_right[order]).double()
    shares = wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)
    ends = torch.cat([sorted_confidence[1:] < sorted_confidence[:-1], torch.ones(1, dtype=torch.bool)])
    good = ((shares <= shares[-1] / 2) & ends).nonzero()  # ties stand on one side
    if shares[-1] == 0 or not len(good):
        return None, 1.0, float(1 - shares[-1])
    last = int(good[-1])
    threshold = float(np.floor(float(sorted_confidence[last]) * 1e6) / 1e6)
    return threshold, (last + 1) / len(wrong), float(1 - shares[last])


def _reliability(split: str, logits: Tensor, labels: Tensor, temperature: float) -> Reliability:
    """What a temperature changes on one split."""
    sides = []
    for scores in (logits / temperature, logits):
        confidence, predicted = scores.softmax(1).max(1)
        bins = reliability_bins(confidence, predicted == labels)
        sides.append((bins, expected_calibration_error(bins), float(F.cross_entropy(scores, labels))))
    (bins, ece, loss), (bins_before, ece_before, loss_before) = sides
    return Reliability(split, len(labels), ece, ece_before, loss, loss_before, bins, bins_before)
