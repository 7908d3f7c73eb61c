"""What the report page of a segmentation says beside what all reports say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from snella.analysis.examples import ImageSource, load_picture
from snella.analysis.overlays import mask_colours
from snella.analysis.run_files import Metrics, RunInfo, read_if_present, read_mask_predictions
from snella.analysis.scores import MaskScores

__all__ = ["classes_section", "masks_section"]

_LONGEST = 800


def classes_section(metrics: Metrics | None) -> dict[str, Any] | None:
    """Dice and IoU of each class, on the test split where there is one."""
    if metrics is None:
        return None
    split, scores = ("test", metrics.test) if metrics.test is not None else ("validation", metrics.val)
    if not isinstance(scores, MaskScores):
        return None
    return {"split": split, "count": scores.count, "rows": scores.classes}


def masks_section(folder: Path, info: RunInfo, images: ImageSource | None) -> dict[str, Any] | None:
    """Some images with true and predicted mask, the worst ones first."""
    if info.task != "segmentation":
        return None
    predictions = read_if_present(read_mask_predictions, folder, "predictions.json")
    if predictions is None:
        return None
    shown = [item for item in predictions.items if item.mask]
    shown.sort(key=lambda item: (math.isnan(item.dice), item.dice))
    if not shown:
        return None
    items = []
    for item in shown:
        uri, width, height, problem = load_picture(item.index, images, _LONGEST)
        picture = {"uri": uri, "width": width, "height": height, "problem": problem}
        items.append({"name": item.name, "dice": item.dice, "iou": item.iou, **picture})
    colours = mask_colours(len(info.classes)) / 255
    return {
        "split": "validation" if predictions.split == "val" else predictions.split,
        "note": f"{len(items)} of {len(predictions.items)} images: the worst ones, then others evenly spread.",
        "legend": [
            {"name": name, "colour": to_hex(colour)} for name, colour in zip(info.classes, colours, strict=True)
        ][1:],
        "items": items,
    }
