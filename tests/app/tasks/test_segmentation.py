import pytest
import torch
import torch.nn.functional as F

from snella_app.config.train import TrainConfig
from snella_app.data.datasets import MaskDataset
from snella_app.data.load import load_data
from snella_app.tasks import TASKS, SegmentationTask, create_task, task_class
from snella_app.tasks.segmentation import choose_indices, overlap_losses, resized_labels

LABELS = torch.tensor([[[0, 1], [1, 1]]])
SCORES = torch.tensor([[[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [3.0, 1.0]]]])


def test_overlap_losses_match_hand_computed_values():
    p = SCORES.softmax(1)[0, 1]
    t = LABELS[0].float()
    intersection, sums = (p * t).sum(), p.sum() + t.sum()
    assert torch.allclose(overlap_losses(SCORES, LABELS, "dice"), 1 - (2 * intersection + 1) / (sums + 1))
    assert torch.allclose(overlap_losses(SCORES, LABELS, "iou"), 1 - (intersection + 1) / (sums - intersection + 1))
    assert overlap_losses(SCORES, LABELS, "none").tolist() == [0.0]


@pytest.mark.parametrize("classes", [2, 8, 21])
def test_classes_are_resized_in_groups_without_changing_the_mask(classes):
    scores = torch.randint(0, 3, (classes, 6, 8), generator=torch.Generator().manual_seed(0)).float()  # with ties
    expected = F.interpolate(scores[None], (15, 20), mode="bilinear", align_corners=False).argmax(1)[0]
    labels = resized_labels(scores, (15, 20))
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), expected)


def test_the_loss_is_cross_entropy_plus_overlap_and_falls_with_better_scores():
    task = SegmentationTask(("background", "polyp"), mask_loss="iou")
    expected = F.cross_entropy(SCORES, LABELS) + overlap_losses(SCORES, LABELS, "iou").mean()
    assert torch.allclose(task.loss(SCORES, LABELS), expected)
    perfect = 20.0 * F.one_hot(LABELS, 2).permute(0, 3, 1, 2)
    assert task.loss(perfect, LABELS) < 1e-6 < task.loss(SCORES, LABELS)
    assert task.loss(SCORES.bfloat16(), LABELS).dtype == torch.float32


def test_reduced_batches_give_the_metrics():
    task = SegmentationTask(("background", "polyp"))
    reduced, labels = task.reduce(torch.cat([SCORES, -SCORES]), LABELS.repeat(2, 1, 1))
    assert reduced.shape == (2, 5) and labels.tolist() == [0, 0]
    scores = task.metrics(reduced.numpy(), labels.numpy())
    # SCORES predicts [[0, 1], [1, 0]] (the tie goes to the background); -SCORES [[1, 0], [0, 0]]
    assert scores["dice"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 0) / 2)
    assert scores["loss"] == pytest.approx(float(task.loss(torch.cat([SCORES, -SCORES]), LABELS.repeat(2, 1, 1))))
    with pytest.raises(ValueError, match="the same length of at least 1, got 0 and 0"):
        task.metrics(reduced[:0].numpy(), labels[:0].numpy())


def test_epochs_are_ranked_by_dice_and_then_by_loss():
    task = SegmentationTask(("background", "polyp"))
    rows = [{"val_dice": 0.5, "val_loss": 0.1}, {"val_dice": 0.6, "val_loss": 0.9}, {"val_dice": 0.6, "val_loss": 0.8}]
    assert max(rows, key=task.selection_score) is rows[2]


def test_a_single_class_is_rejected():
    with pytest.raises(ValueError, match=r"at least 2 entries including background, got \['one'\]"):
        SegmentationTask(("one",))


def test_tasks_have_the_configured_names():
    from typing import get_args

    assert list(get_args(TrainConfig.settings()["task"].type)) == list(TASKS)
    with pytest.raises(ValueError, match=r"one of classification, .*segmentation, got 'segmentatoin'; nearest: segm"):
        task_class("segmentatoin")
    assert create_task("segmentation", ["a", "b"], mask_loss=None, epochs=3).classes == ("a", "b")


def test_settings_of_another_task_are_rejected():
    required = {"data": "d", "backbone": "b", "out": "o"}
    with pytest.raises(ValueError, match="mask_loss applies to task segmentation, got 'iou' with task 'class"):
        TrainConfig.from_flat(**required, mask_loss="iou")
    with pytest.raises(ValueError, match=r"min_lr must be at most lr, 0.001, got 0.1"):
        TrainConfig.from_flat(**required, lr=1e-3, min_lr=0.1)
    with pytest.raises(ValueError, match=r"task must be one of classification, .*segmentation, got 'detection'"):
        TrainConfig.from_flat(**required, task="detection")


def test_segmentation_requires_masks():
    with pytest.raises(ValueError, match=r"must be images with masks for task segmentation, .*got 'digits'"):
        load_data("digits", target=SegmentationTask.target)
    SegmentationTask(("background", "polyp")).check_data(object.__new__(MaskDataset), "masks:x")


def test_examples_are_the_worst_and_evenly_spaced_images(monkeypatch):
    dice = [0.9, 0.1, None, 0.5, 0.7, 0.3, 0.95, 0.2]
    assert sorted(choose_indices(dice)) == list(range(8))
    monkeypatch.setattr("snella_app.tasks.segmentation._MAX_EXAMPLES", 4)
    assert choose_indices(dice) == [1, 7, 3, 6]


def test_the_decoding_comment_gives_the_label_of_each_pixel():
    outputs = torch.randn(1, 3, 4, 5)
    comment = SegmentationTask(("a", "b", "c")).decoding_comment("outputs")
    assert torch.equal(eval(comment.removeprefix("# ")), outputs.argmax(1)[0])


def test_masks_are_remapped_to_the_classes_of_the_run():
    assert SegmentationTask(("a", "b", "c")).remap_labels(torch.tensor([[0, 1]]), [0, 2]).tolist() == [[0, 2]]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "segmentation"])
def test_other_tasks_reject_images_with_masks(name):
    task, masked = create_task(name, ["a", "b", "c"]), object.__new__(MaskDataset)
    with pytest.raises(ValueError, match=f"segmentation for images with masks such as masks:x, got {name!r}; add"):
        task.check_data(masked, "masks:x")


def test_outputs_are_averaged_over_an_image_and_its_flip():
    task, images = SegmentationTask(["a", "b"]), torch.randn(3, 2, 4, 6)
    assert torch.equal(task.outputs(lambda batch: 2 * batch, images), 2 * images)
    torch.testing.assert_close(task.outputs(torch.nn.Identity(), images, 2).softmax(1), images.softmax(1))
    classification = create_task("classification", ["a", "b", "c"])
    weights = torch.randn(6, 3)
    plain, flipped = ((batch.mean((1, 2)) @ weights).softmax(1) for batch in (images, images.flip(-1)))
    averaged = classification.outputs(lambda batch: batch.mean((1, 2)) @ weights, images, 2)
    torch.testing.assert_close(averaged.softmax(1), (plain + flipped) / 2)
