"""Dice and IoU compared with hand-counted cases and torchmetrics."""

import numpy as np
import pytest
import torch

from snella_app.tasks.segmentation import image_scores, pixel_counts, pooled_scores


def counts_of(predicted, labels, classes=2):
    return pixel_counts(torch.as_tensor(predicted), torch.as_tensor(labels), classes).numpy()


def test_pixels_are_counted_by_true_and_predicted_class():
    counts = counts_of([[[0, 1], [1, 1]], [[2, 2], [0, 0]]], [[[0, 0], [1, 1]], [[2, 1], [0, 0]]], 3)
    assert counts.tolist() == [[[1, 1, 0], [0, 2, 0], [0, 0, 0]], [[2, 0, 0], [0, 0, 1], [0, 0, 1]]]


def test_dice_and_iou_match_hand_computed_values():
    # image 1: TP 1, FP 1, FN 1; image 2: TP 4, FP 0, FN 0
    predicted = [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    labels = [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]
    scores = pooled_scores(counts_of(predicted, labels), ["background", "polyp"])
    assert scores["dice"] == pytest.approx((2 / 4 + 1) / 2)
    assert scores["iou"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["dice_pooled"] == pytest.approx(2 * 5 / (2 * 5 + 2))
    assert scores["iou_pooled"] == pytest.approx(5 / 7)
    assert scores["iou_pooled_with_background"] == pytest.approx((5 / 7 + 1 / 3) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(6 / 8)
    assert scores["per_class"][1] == {
        "name": "polyp", "pixels": 6, "dice": pytest.approx(0.75), "iou": pytest.approx(2 / 3),
        "dice_pooled": pytest.approx(10 / 12), "iou_pooled": pytest.approx(5 / 7),
    }  # fmt: skip


def test_gps_variant_ignores_false_positives():
    labels = np.zeros((1, 4, 4), int)
    labels[0, 0, :] = 1
    everything = np.ones_like(labels)
    scores = pooled_scores(counts_of(everything, labels), ["background", "polyp"])
    assert scores["iou_pooled"] == pytest.approx(4 / 16)
    assert scores["iou_gps_foreground_only"] == 1.0 == scores["dice_gps_foreground_only"]
    half = np.zeros_like(labels)
    half[0, 0, :2] = 1
    scores = pooled_scores(counts_of(half, labels), ["background", "polyp"])
    recall = 0.5
    assert scores["iou_gps_foreground_only"] == pytest.approx(recall)
    assert scores["dice_gps_foreground_only"] == pytest.approx(2 * recall / (1 + recall))


def test_pooled_dice_follows_from_pooled_iou():
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 2, (5, 9, 9), generator=generator) for _ in range(2))
    scores = pooled_scores(counts_of(predicted, labels), ["background", "polyp"])
    assert scores["dice_pooled"] == pytest.approx(2 * scores["iou_pooled"] / (1 + scores["iou_pooled"]))


def test_classes_neither_present_nor_predicted_are_ignored():
    labels = np.array([[[0, 1]], [[0, 0]], [[0, 0]]])
    predicted = np.array([[[0, 1]], [[0, 0]], [[0, 2]]])
    dice, _ = image_scores(counts_of(predicted, labels, 3))
    assert np.isnan(dice[:, 1:]).tolist() == [[False, True], [True, True], [True, False]]
    scores = pooled_scores(counts_of(predicted, labels, 3), ["a", "b", "c"])
    assert scores["dice"] == pytest.approx((1 + 0) / 2)  # the second image is excluded
    empty = pooled_scores(counts_of(labels[1:2], labels[1:2], 3), ["a", "b", "c"])
    assert empty["dice"] == empty["dice_pooled"] == 1.0 and empty["per_class"][1]["dice"] is None


def test_pooled_and_by_image_scores_match_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics.functional.segmentation import dice_score
    from torchmetrics.segmentation import MeanIoU

    assert torchmetrics
    generator = torch.Generator().manual_seed(1)
    predicted, labels = (torch.randint(0, 4, (6, 8, 8), generator=generator) for _ in range(2))
    scores = pooled_scores(counts_of(predicted, labels, 4), list("abcd"))
    by_image = dice_score(predicted, labels, 4, include_background=False, average="macro", input_format="index")
    assert scores["dice"] == pytest.approx(float(by_image.mean()), abs=1e-6)
    pooled = dice_score(
        predicted, labels, 4, include_background=False, average="macro", input_format="index",
        aggregation_level="global",
    )  # fmt: skip
    assert scores["dice_pooled"] == pytest.approx(float(pooled), abs=1e-6)
    iou = MeanIoU(4, include_background=False, input_format="index")
    iou.update(predicted, labels)
    assert scores["iou"] == pytest.approx(float(iou.compute()), abs=1e-6)
