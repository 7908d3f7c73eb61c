"""Test folders of images and masks."""

import numpy as np
from PIL import Image


def write_pairs(root, count, *, classes=2, side=32, white=255, ending=".png"):
    """Write noise images with a bright disc per class; masks contain labels, or 0 and `white` for two classes."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    y, x = np.mgrid[:side, : side + 8]
    for index in range(count):
        pixels = rng.integers(0, 110, (side, side + 8, 3))
        labels = np.zeros((side, side + 8), np.uint8)
        for label in range(1, classes):
            at_y, at_x = rng.integers(8, side - 8, 2)
            disc = (y - at_y) ** 2 + (x - at_x) ** 2 < 49
            labels[disc] = label
            pixels[disc, label % 3] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{index:03}.png")
        values = labels * white if classes == 2 else labels
        Image.fromarray(values.astype(np.uint8)).save(root / "masks" / f"{index:03}{ending}")
    return root
