"""Stratified, seeded splits that leave every class in every part."""

import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_MOST_FOLDS = 20


def stratified_split(
    labels: Sequence[int], fraction: float, *, seed: int, classes: Sequence[str], reserve: int = 1, part: str = "val"
) -> tuple[list[int], list[int]]:
    """Split off a fraction of every class, at least one image of each.

    Args:
        labels: Class indices.
        fraction: Of all images, in (0, 1).
        seed: The same seed gives the same parts.
        classes: Names by class index, for messages.
        reserve: How many images of each class must be left.
        part: What is taken: `val` or `test`, for messages.

    Returns:
        Positions left and positions taken, both ascending.

    Raises:
        ValueError: A class has fewer than `reserve + 1` images.
    """
    counts = np.bincount(labels, minlength=len(classes))
    few = [f"{name!r} has {count}" for name, count in zip(classes, counts, strict=True) if count < reserve + 1]
    if few:
        raise ValueError(
            f"every class needs at least {reserve + 1} images for a part '{part}' of its own beside the others; "
            f"{', '.join(few)}. Add images, or give the parts as folders of their own"
            + (", or do without a test with --test-fraction 0 (test_fraction=0)" if part == "test" else "")
        )
    total = max(round(fraction * len(labels)), len(classes))
    return _take(labels, _quotas(counts, min(total, int((counts - reserve).sum())), reserve), seed)


def grouped_split(
    labels: Sequence[int], groups: Sequence[str], fraction: float, *, seed: int, part: str = "val"
) -> tuple[list[int], list[int]]:
    """Split off about a fraction of all images, whole groups at a time, classes as evenly as groups allow.

    The images are cut into folds by scikit-learn's `StratifiedGroupKFold`, of which as many are taken as come nearest
    to the fraction. Groups that a class occurs in alone are left, so that every class is trained on.

    Args:
        labels: Class indices.
        groups: Group of each image.
        fraction: Of all images, in (0, 1).
        seed: The same seed gives the same parts.
        part: What is taken: `val` or `test`, for messages.

    Returns:
        Positions left and positions taken, both ascending.

    Raises:
        ValueError: Fewer than two groups can be divided.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # a second, only to split

    by_label: dict[int, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        by_label.setdefault(label, set()).add(group)
    fixed = {group for members in by_label.values() if len(members) == 1 for group in members}
    free = np.array([position for position, group in enumerate(groups) if group not in fixed])
    count = len({groups[position] for position in free})
    if count < 2:
        raise ValueError(
            f"at least two groups are needed for a part '{part}' of its own, besides a class's only one; "
            f"got {count} of {len(set(groups))}. Add a column that says which part a row belongs to, or do without "
            "groups (columns group=none)"
        )
    folds = min(_MOST_FOLDS, count)
    share = min(Fraction(fraction * len(labels) / len(free)).limit_denominator(folds), Fraction(folds - 1, folds))
    numerator, folds = (share.numerator, share.denominator) if share > 0 else (1, folds)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds
        pieces = [taken for _, taken in splitter.split(free, np.asarray(labels)[free], np.asarray(groups)[free])]
    taken = free[np.concatenate(pieces[:numerator])]
    return sorted(set(range(len(labels))) - set(taken.tolist())), sorted(taken.tolist())


def fold_split(
    labels: Sequence[int], groups: Sequence[str] | None, folds: int, fold: int, *, seed: int, classes: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Split off one fold of a cross-validation: each image is in one fold, classes evenly, groups whole.

    Args:
        labels: Class indices.
        groups: Group of each image, None for none.
        folds: How many folds.
        fold: Which, from 1.
        seed: The same seed gives the same folds.
        classes: Names by class index, for messages.

    Returns:
        Positions left and positions of the fold, both ascending.

    Raises:
        ValueError: Fewer images of a class, or fewer groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # a second, only to split

    if groups is None:
        counts = np.bincount(labels, minlength=len(classes))
        few = [f"{name!r} has {count}" for name, count in zip(classes, counts, strict=True) if 0 < count < folds]
        if few:
            raise ValueError(f"folds must be at most the number of images of each class, got {folds}; {', '.join(few)}")
    elif len(set(groups)) < folds:
        raise ValueError(f"folds must be at most the number of groups, {len(set(groups))}, got {folds}")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds
        pieces = list(kind(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups))
    left, taken = pieces[fold - 1]
    return left.tolist(), taken.tolist()


def stratified_sample(
    labels: Sequence[int], size: int, *, seed: int, classes: Sequence[str], argument: str
) -> list[int]:
    """Choose `size` positions, each class by its share, at least one of each that is there.

    Args:
        labels: Class indices.
        size: How many in all.
        seed: The same seed gives the same choice.
        classes: Names by class index, for messages.
        argument: Name of the size as the user gave it, for messages.

    Returns:
        Positions, ascending.

    Raises:
        ValueError: There are fewer images than `size`, or fewer than one a class are asked for.
    """
    counts = np.bincount(labels, minlength=len(classes))
    present = int((counts > 0).sum())
    if size > len(labels):
        raise ValueError(
            f"{argument} must be at most {len(labels)}, the images of that part, got {size}; "
            "the parts' shares are set with val_fraction and test_fraction"
        )
    if size < present:
        raise ValueError(f"{argument} must be at least {present}, one image a class, got {size}")
    return _take(labels, _quotas(counts, size, 0), seed)[1]


def _quotas(counts: np.ndarray, total: int, reserve: int) -> np.ndarray:
    """Share `total` out by class size: at least one of each class, exact sum, largest remainders first."""
    caps = np.maximum(counts - reserve, 0)
    share = total * counts / max(counts.sum(), 1)
    quotas = np.minimum(np.maximum(np.floor(share).astype(int), 1), caps)
    while (gap := total - int(quotas.sum())) != 0:
        step = 1 if gap > 0 else -1
        possible = quotas < caps if gap > 0 else quotas > 1
        lacking = np.where(possible, step * (share - quotas), -np.inf)
        quotas[int(np.argmax(lacking))] += step
    return quotas


def _take(labels: Sequence[int], quotas: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Draw each class's quota; positions left and positions taken."""
    from sklearn.model_selection import train_test_split  # a second, only to split

    labels_array = np.asarray(labels)
    generator = np.random.RandomState(seed)
    left: list[int] = []
    taken: list[int] = []
    for label, quota in enumerate(quotas.tolist()):
        members = np.flatnonzero(labels_array == label)
        if quota in (0, len(members)):
            (taken if quota else left).extend(members.tolist())
            continue
        kept, drawn = train_test_split(members, test_size=quota, random_state=generator)
        left.extend(kept.tolist())
        taken.extend(drawn.tolist())
    return sorted(left), sorted(taken)
