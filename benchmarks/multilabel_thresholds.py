"""F1 on new images of the thresholds of multi-label classification, in simulations.

python benchmarks/multilabel_thresholds.py [--count 60]      prints the table; about a minute on one core

A class has normal scores whose mean depends on the label. Its probabilities are calibrated, too low, or too high. The
thresholds are fitted to a few validation images and evaluated on 4,000 others. `best_threshold` maximizes F1 on the
validation images; `fit_thresholds`, which `snella train` uses, averages over bootstrap resamples. The last column
gives the highest F1 that any threshold reaches.
"""

import argparse
import itertools
from statistics import fmean

import numpy as np
from documents import markdown_table

from snella_app.tasks.multilabel import best_threshold, fit_thresholds

IMAGES = (30, 60, 150, 500)
SHARES = (0.1, 0.3, 0.5)
"""Fractions of images that have the label."""
SHIFTS = (0.0, -1.5, 1.5)
"""Errors of the logits. Without an error, the probabilities are calibrated."""
NEW_IMAGES = 4000


def sample(generator: np.random.Generator, count: int, share: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities and labels of images."""
    labels = (generator.random(count) < share).astype(int)
    logits = generator.normal(0, 1, count) + 2.5 * (labels - 0.5) + np.log(share / (1 - share)) + shift
    return 1 / (1 + np.exp(-logits)), labels


def f1(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Return the F1 of the images at a threshold."""
    predicted = probabilities >= threshold
    return float(2 * (predicted & (labels > 0)).sum() / (predicted.sum() + labels.sum()))


def mean_f1(images: int, count: int) -> list[float]:
    """Return the mean F1 for the threshold 1/2, `best_threshold`, `fit_thresholds`, and the best one."""
    generator = np.random.default_rng(0)
    results: list[list[float]] = []
    for _, share, shift in itertools.product(range(count), SHARES, SHIFTS):
        scores, labels = sample(generator, images, share, shift)
        new = sample(generator, NEW_IMAGES, share, shift)
        fitted = fit_thresholds(scores[:, None], labels[:, None])[0]
        results.append([f1(*new, threshold) for threshold in (0.5, best_threshold(scores, labels), fitted)])
        results[-1].append(f1(*new, best_threshold(*new)))
    return [fmean(column) for column in zip(*results, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="simulations per setting")
    args = parser.parse_args()
    lines = [[str(images), *(f"{100 * value:.1f}" for value in mean_f1(images, args.count))] for images in IMAGES]
    print(markdown_table(["images", "0.5", "`best_threshold`", "`fit_thresholds`", "best"], lines, left=1))


if __name__ == "__main__":
    main()
