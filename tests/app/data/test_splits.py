import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snella_app.data.splits import fold_split, grouped_split, merge_strata, stratified_sample, stratified_split

CLASSES = ["a", "b", "c"]


def labels_of(counts: list[int]) -> list[int]:
    return [label for label, count in enumerate(counts) for _ in range(count)]


@given(
    counts=st.lists(st.integers(3, 60), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    reserve=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_is_a_partition_with_every_class_on_both_sides(counts, fraction, reserve, seed):
    labels, classes = labels_of(counts), [str(index) for index in range(len(counts))]
    rest, selected = stratified_split(labels, fraction, seed=seed, classes=classes, reserve=reserve)
    assert sorted(rest + selected) == list(range(len(labels)))
    assert min(Counter(labels[i] for i in rest).values()) >= reserve
    assert len({labels[i] for i in rest}) == len({labels[i] for i in selected}) == len(counts)


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=6), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_sample_has_the_exact_size_and_every_class(counts, seed, data):
    labels, classes = labels_of(counts), [str(index) for index in range(len(counts))]
    size = data.draw(st.integers(len(counts), len(labels)))
    sample = stratified_sample(labels, size, seed=seed, classes=classes, argument="train_size")
    assert len(set(sample)) == size and sample == sorted(sample)
    counts_by_label = Counter(labels[i] for i in sample)
    assert len(counts_by_label) == len(counts)


@pytest.mark.parametrize(("fraction", "expected"), [(0.2, [20, 10, 6]), (0.5, [50, 25, 15])])
def test_class_proportions_are_preserved(fraction, expected):
    labels = labels_of([100, 50, 30])
    _, selected = stratified_split(labels, fraction, seed=0, classes=CLASSES)
    assert [Counter(labels[i] for i in selected)[label] for label in range(3)] == expected


def test_samples_depend_on_the_seed():
    labels = labels_of([40, 40, 40])
    splits = [stratified_split(labels, 0.25, seed=seed, classes=CLASSES) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_sampling_uses_the_legacy_numpy_generator():
    _, selected = stratified_split(labels_of([6, 6]), 0.34, seed=0, classes=["a", "b"])
    stream = np.random.RandomState(0)
    assert selected == sorted([*stream.permutation(6)[:2], *(6 + stream.permutation(6)[:2])])


def test_a_rare_class_is_in_every_split():
    labels = labels_of([1000, 3])
    rest, test = stratified_split(labels, 0.1, seed=0, classes=["common", "rare"], reserve=2, part="test")
    assert Counter(labels[i] for i in test)[1] == 1 and Counter(labels[i] for i in rest)[1] == 2


def test_classes_with_too_few_images_are_reported():
    message = "every class needs at least 3 images to create a 'test' split; 'b' has 2, 'c' has 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        stratified_split(labels_of([9, 2, 1]), 0.2, seed=0, classes=CLASSES, reserve=2, part="test")


def test_too_few_images_without_classes_are_reported():
    with pytest.raises(ValueError, match=r"creating a 'test' split requires at least 3 images, got 1\. Add images"):
        stratified_split([0], 0.2, seed=0, classes=["others"], reserve=2, part="test")


def test_a_sample_larger_than_the_data_is_rejected():
    with pytest.raises(
        ValueError, match=r"val_size must be at most 6, the number of images in the split, got 7; .*val_fraction"
    ):
        stratified_sample(labels_of([3, 3]), 7, seed=0, classes=["a", "b"], argument="val_size")


def test_a_sample_smaller_than_the_number_of_classes_is_rejected():
    with pytest.raises(ValueError, match="val_size must be at least 3, one image per class, got 2"):
        stratified_sample(labels_of([3, 3, 3]), 2, seed=0, classes=CLASSES, argument="val_size")


def test_small_grouped_data_is_split():
    draw, num_split = random.Random(0), 0
    for seed in range(40):
        count = draw.randrange(4, 10)
        labels, groups = ([draw.randrange(n) for _ in range(count)] for n in (3, 7))
        try:
            rest, selected = grouped_split(labels, list(map(str, groups)), 0.3, seed=seed)
        except ValueError as error:
            assert "requires at least two groups" in str(error)
        else:
            assert rest and selected
            num_split += 1
    assert num_split >= 20
    with pytest.raises(
        ValueError, match="folds must be at most 2, the number of groups or of images in the largest class, got 3"
    ):
        fold_split([0, 0, 1, 1], ["a", "b", "c", "d"], 3, 1, seed=0, classes=["x", "y"])


def test_a_grouped_split_leaves_a_group_of_each_class_for_training():
    draw = random.Random(0)
    for seed in range(60):
        groups = [f"g{draw.randrange(8)}" for _ in range(40)]
        labels = [draw.choice([0, 1, 1, 2]) if group != "g0" else 0 for group in groups]
        rest, selected = grouped_split(labels, groups, 0.4, seed=seed, part="test")
        assert sorted(rest + selected) == list(range(40)) and selected
        assert {labels[row] for row in rest} == set(labels)
        assert not {groups[row] for row in rest} & {groups[row] for row in selected}


def test_small_strata_are_merged_with_each_other_or_with_the_largest():
    names = ["a", "b", "c", "d"]
    assert merge_strata([0, 0, 1, 1], names, 2) == ([0, 0, 1, 1], names)
    assert merge_strata([0, 0, 2, 3, 0], names, 2) == ([0, 0, 1, 1, 0], ["a", "others"])
    assert merge_strata([0, 0, 1, 1, 1, 3], names, 2) == ([0, 0, 1, 1, 1, 1], ["a", "b"])
    assert merge_strata([0, 3], names, 5) == ([0, 0], ["others"])


def test_a_class_without_images_does_not_prevent_a_split():
    rest, selected = stratified_split([0, 0, 0, 2, 2, 2], 0.3, seed=0, classes=CLASSES)
    assert len(rest) == 4 and len(selected) == 2


def test_five_of_many_small_classes_are_listed():
    with pytest.raises(
        ValueError, match=r"'c4' has 1 and 15 more\. Add images, or provide the splits as folders or a split"
    ):
        stratified_split(list(range(20)), 0.2, seed=0, classes=[f"c{index}" for index in range(20)])
    with pytest.raises(ValueError, match=r"got 5; 'c0' has 1, .*, 'c4' has 1 and 15 more$"):
        fold_split(list(range(20)), None, 5, 1, seed=0, classes=[f"c{index}" for index in range(20)])
