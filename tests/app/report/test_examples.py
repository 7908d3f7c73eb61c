import json
import math

import numpy as np
import pytest
from PIL import Image

from snella_app.records.predictions import MaskPredictions
from snella_app.records.record import read
from snella_app.records.results import MaskScores
from snella_app.records.run import Metrics
from snella_app.report.examples import mask_colors, overlay, overlay_panels, read_mask, write_mask


def test_colors_differ_for_many_classes_and_the_background_is_black():
    colors = mask_colors(20)
    assert colors.shape == (20, 3) and not colors[0].any()
    assert len({tuple(color) for color in colors.tolist()}) == 20
    assert np.array_equal(mask_colors(4), colors[:4])


def test_a_mask_is_written_as_a_palette_png_of_labels(tmp_path):
    labels = np.array([[0, 1, 9], [2, 0, 255]], np.uint8)
    write_mask(labels, tmp_path / "m.png")
    image = read_mask(tmp_path / "m.png")
    assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
    assert tuple(np.asarray(image.convert("RGB"))[0, 1]) == tuple(mask_colors(2)[1])


def test_an_overlay_draws_outlines_and_keeps_the_background():
    image = Image.new("RGB", (20, 20), (100, 100, 100))
    labels = np.zeros((10, 10), np.uint8)
    labels[2:8, 2:8] = 1
    pixels = np.asarray(overlay(image, labels))
    assert (pixels[0] == 100).all()
    color = mask_colors(2)[1].astype(float)
    assert np.allclose(pixels[10, 10], np.round(100 + 0.45 * (color - 100)), atol=1)
    # the outline: the square's first and last rows and columns
    assert all(np.array_equal(pixels[position], color) for position in ((10, 4), (10, 15), (4, 10), (15, 10)))


def test_panels_have_equal_sizes():
    picture = overlay_panels(Image.new("RGB", (100, 50)), [np.zeros((5, 10)), np.ones((50, 100))])
    assert picture.size == (3 * 260 + 2 * 4, 130)


def test_null_segmentation_metrics_are_read_as_nan(tmp_path):
    scores = {"dice": 0.5, "iou": 0.4, "dice_pooled": 0.6, "iou_pooled": 0.45, "images": 3, "loss": 1}
    scores["per_class"] = [{"name": "background", "pixels": 9, "dice": None, "dice_pooled": 0.9, "iou_pooled": 0.8}]
    row = {"epoch": 1, "val_dice": 0.5, "val_iou": 0.4}
    metrics = {"trainable_parameters": 7, "best_metric": "val_dice", "history": [row], "val": scores}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    loaded = read(Metrics, tmp_path)
    assert isinstance(loaded.val, MaskScores) and loaded.test is None and loaded.history[0].val_dice == 0.5
    assert math.isnan(loaded.val.per_class[0].dice) and math.isnan(loaded.val.dice_gps_foreground_only)
    assert [value for _, value, _ in loaded.val.rows("test")][:2] == [
        "50.0%",
        "40.0%",
    ]
    items = [{"index": 0, "name": "a", "dice": None, "iou": None, "mask": "masks/00000.png"}]
    (tmp_path / "predictions.json").write_text(json.dumps({"split": "val", "items": items}))
    assert math.isnan(read(MaskPredictions, tmp_path).items[0].dice)


def test_a_metric_of_the_wrong_type_is_rejected(tmp_path):
    metrics = {"trainable_parameters": 7, "val": {"dice": 0.5, "iou": "high"}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=r"val: 'iou' must be a valid number, got 'high'"):
        read(Metrics, tmp_path)
