from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes noise images, e.g. `{"train/cat": 5}`, and returns their folder `photos`."""

    def write(counts: dict[str, int], suffix: str = ".png", size: int = 12) -> Path:
        root = tmp_path / "photos"
        for label, (name, count) in enumerate(counts.items()):
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = np.random.default_rng([label, index]).integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03}{suffix}")
        return root

    return write
