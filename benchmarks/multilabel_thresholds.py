"""F1 on new images of the thresholds of multi-label classification, in simulations.

python benchmarks/multilabel_thresholds.py [--count 60]      prints the table; about a minute on one core

The logits of a class are normally distributed, with a mean that depends on the label. They are calibrated, too low, or
too high. Thresholds are fitted to 30 to 500 validation images and evaluated on 4,000 other images. `best_threshold`
maximizes F1 on the validation images; `fit_thresholds`, which `snella train` uses, averages over bootstrap resamples.
The last column gives the highest F1 that any threshold reaches.
"""

import argparse
import itertools
from statistics import fmean

import numpy as np
from documents import markdown_table
from sklearn.metrics import f1_score

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


def mean_f1(images: int, count: int) -> list[float]:
    """Return the mean F1 for the threshold 1/2, `best_threshold`, `fit_thresholds`, and the best one."""
    generator = np.random.default_rng(0)
    results: list[list[float]] = []
    for _, share, shift in itertools.product(range(count), SHARES, SHIFTS):
        scores, labels = sample(generator, images, share, shift)
        new_scores, new_labels = sample(generator, NEW_IMAGES, share, shift)
        (fitted,) = fit_thresholds(scores[:, None], labels[:, None])
        thresholds = (0.5, best_threshold(scores, labels), fitted, best_threshold(new_scores, new_labels))
        results.append([float(f1_score(new_labels, new_scores >= threshold)) for threshold in thresholds])
    return [fmean(column) for column in zip(*results, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="simulations per setting")
    args = parser.parse_args()
    lines = [[str(images), *(f"{100 * value:.1f}" for value in mean_f1(images, args.count))] for images in IMAGES]
    print(markdown_table(["images", "0.5", "`best_threshold`", "`fit_thresholds`", "best"], lines, left=1))


if __name__ == "__main__":
    main()
