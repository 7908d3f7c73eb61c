"""Stratified, seeded splits of labeled images, which may form groups that stay together.

Splits are stratified by class. Data without classes has strata instead, e.g. ranges of a number.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from snella_app.text import listed

_MAX_FOLDS = 20
"""Maximum number of folds from which `grouped_split` composes a split."""


def stratified_split(
    labels: Sequence[int], fraction: float, *, seed: int, classes: Sequence[str], reserve: int = 1, part: str = "val"
) -> tuple[list[int], list[int]]:
    """Split off a fraction of each class, at least one image per class.

    Args:
        labels: Class indices.
        fraction: Fraction of all images, in (0, 1).
        seed: Random seed.
        classes: Class names.
        reserve: Minimum number of remaining images per class.
        part: Name of the new split, for messages.

    Returns:
        Remaining positions and selected positions, both ascending.

    Raises:
        ValueError: If a class has images, but fewer than `reserve + 1`.
    """
    counts = np.bincount(labels, minlength=len(classes))
    too_small = [f"{name!r} has {count}" for name, count in zip(classes, counts, strict=True) if 0 < count <= reserve]
    if too_small:
        can_skip = part == "test" and counts[counts > 0].min() > 1  # the validation split also takes an image per class
        needed = (
            f"every class needs at least {reserve + 1} images to create a '{part}' split; {listed(too_small)}"
            if len(classes) > 1
            else f"creating a '{part}' split requires at least {reserve + 1} images, got {len(labels)}"
        )
        raise ValueError(
            f"{needed}. Add images, or provide the splits as folders or a split column"
            + (", or disable the test split with --test-fraction 0 (test_fraction=0)" if can_skip else "")
        )
    total = max(round(fraction * len(labels)), int((counts > 0).sum()))
    available = int((counts - reserve).clip(0).sum())
    quotas = _quotas(counts, min(total, available), reserve)
    selected = _sample(labels, quotas, seed)
    return _rest(labels, selected), selected


def merge_strata(labels: Sequence[int], names: Sequence[str], minimum: int) -> tuple[list[int], list[str]]:
    """Merge strata with fewer than `minimum` images.

    If they are still too small together, they join the largest of the other strata, if there is one.

    Returns:
        New labels, and the names of the new strata.
    """
    counts = Counter(labels)
    kept = [label for label in sorted(counts) if counts[label] >= minimum]
    if len(kept) == len(counts):
        return list(labels), list(names)
    num_merged = len(labels) - sum(counts[label] for label in kept)
    new_names = [names[label] for label in kept]
    numbers = {label: number for number, label in enumerate(kept)}
    if num_merged >= minimum or not kept:
        rest = len(kept)
        new_names.append("others")
    else:
        rest = max(range(len(kept)), key=lambda number: counts[kept[number]])
    return [numbers.get(label, rest) for label in labels], new_names


def grouped_split(
    labels: Sequence[int],
    groups: Sequence[str],
    fraction: float,
    *,
    seed: int,
    part: str = "val",
    keeps_classes: bool = True,
) -> tuple[list[int], list[int]]:
    """Split off groups that contain approximately a fraction of the images, stratified by class.

    scikit-learn's `StratifiedGroupKFold` creates folds, and the number of selected folds approximates the fraction. If
    `keeps_classes`, each class keeps at least one group for training: a class's only group is never selected, and if
    all groups of a class are selected, the smallest one is returned to training. Numeric targets do not need this,
    since their strata are not classes.

    Arguments and return value are as for `stratified_split`.

    Raises:
        ValueError: If fewer than two groups can be split.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # lazy: slow import

    by_label: dict[int, set[str]] = {}
    for label, group in zip(labels, groups, strict=True) if keeps_classes else ():
        by_label.setdefault(label, set()).add(group)
    fixed = {group for members in by_label.values() if len(members) == 1 for group in members}
    free = np.array([position for position, group in enumerate(groups) if group not in fixed])
    num_groups = len({groups[position] for position in free})
    if num_groups < 2:
        raise ValueError(
            f"creating a '{part}' split requires at least two groups, not counting the only group of a class, "
            f"got {num_groups} of {len(set(groups))}. Add a split column, or disable groups with --columns group=none"
        )
    strata = np.asarray(labels)[free]
    if np.bincount(strata).max() < 2:  # nothing to stratify
        strata = np.zeros_like(strata)
    folds = min(_MAX_FOLDS, num_groups, int(np.bincount(strata).max()))
    # select `numerator` of the folds, at least one but not all of them
    share = min(Fraction(fraction * len(labels) / len(free)).limit_denominator(folds), Fraction(folds - 1, folds))
    numerator, folds = (share.numerator, share.denominator) if share > 0 else (1, folds)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds
        pieces = [selected for _, selected in splitter.split(free, strata, np.asarray(groups)[free])]
    chosen = {groups[position] for position in free[np.concatenate(pieces[:numerator])]}
    sizes = Counter(groups)
    for members in by_label.values():
        if members <= chosen:  # keep the smallest group of the class for training
            chosen.remove(min(members, key=lambda group: (sizes[group], group)))
    selected = [position for position, group in enumerate(groups) if group in chosen]
    return _rest(labels, selected), selected


def fold_split(
    labels: Sequence[int], groups: Sequence[str] | None, folds: int, fold: int, *, seed: int, classes: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Split off cross-validation fold `fold`, counted from 1, stratified by class; groups stay together.

    Arguments and return value are as for `stratified_split`.

    Raises:
        ValueError: If there are fewer groups than folds, or a class (with groups: every class) has fewer images than
            folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # lazy: slow import

    if groups is None:
        counts = np.bincount(labels, minlength=len(classes))
        too_small = [f"{name!r} has {count}" for name, count in zip(classes, counts, strict=True) if 0 < count < folds]
        if too_small:
            raise ValueError(
                f"folds must be at most the number of images of each class, got {folds}; {listed(too_small)}"
            )
    elif (most := min(len(set(groups)), max(Counter(labels).values()))) < folds:
        raise ValueError(
            f"folds must be at most {most}, the number of groups or of images in the largest class, got {folds}"
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds
        pieces = list(kind(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups))
    rest, selected = pieces[fold - 1]
    return rest.tolist(), selected.tolist()


def stratified_sample(
    labels: Sequence[int], size: int, *, seed: int, classes: Sequence[str], argument: str
) -> list[int]:
    """Sample `size` positions, ascending, in proportion to class sizes, at least one per present class.

    `argument` is the name of the size in messages.

    Raises:
        ValueError: If `size` exceeds the number of images or is below the number of present classes.
    """
    counts = np.bincount(labels, minlength=len(classes))
    present = int((counts > 0).sum())
    if size > len(labels):
        raise ValueError(
            f"{argument} must be at most {len(labels)}, the number of images in the split, got {size}; "
            "split fractions are set with val_fraction and test_fraction"
        )
    if size < present:
        raise ValueError(f"{argument} must be at least {present}, one image per class, got {size}")
    return _sample(labels, _quotas(counts, size, 0), seed)


def _quotas(counts: np.ndarray, total: int, reserve: int) -> np.ndarray:
    """Apportion exactly `total` images in proportion to class sizes, by largest remainders.

    Each present class gets at least one image, and `reserve` images of each class are left.
    """
    caps = np.maximum(counts - reserve, 0)
    share = total * counts / max(counts.sum(), 1)
    quotas = np.minimum(np.maximum(np.floor(share).astype(int), 1), caps)
    while (gap := total - int(quotas.sum())) != 0:
        step = 1 if gap > 0 else -1
        possible = quotas < caps if gap > 0 else quotas > 1
        deficit = np.where(possible, step * (share - quotas), -np.inf)
        quotas[int(np.argmax(deficit))] += step
    return quotas


def _sample(labels: Sequence[int], quotas: np.ndarray, seed: int) -> list[int]:
    """Draw `quotas` positions of each class at random and return all of them, ascending."""
    generator = np.random.RandomState(seed)
    labels_array = np.asarray(labels)
    selected: list[int] = []
    for label, quota in enumerate(quotas.tolist()):
        members = np.flatnonzero(labels_array == label)
        if 0 < quota < len(members):
            members = members[generator.permutation(len(members))]
        selected += members[:quota].tolist()
    return sorted(selected)


def _rest(labels: Sequence[int], selected: Sequence[int]) -> list[int]:
    """Return the positions that are not selected, ascending."""
    return sorted(set(range(len(labels))) - set(selected))
