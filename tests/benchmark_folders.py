"""Tiny datasets in the layouts of VTAB-1k and FGVC."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_noise(path: Path, key: Sequence[int], side: int = 8, channel: int | None = None) -> None:
    """Write a random image seeded by `key`; `channel` is slightly brighter."""
    pixels = np.random.default_rng(key).integers(0, 150, (side, side, 3))
    if channel is not None:
        pixels[..., channel % 3] += 60
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_vtab(folder: Path, classes: int, sizes: Mapping[str, int], side: int = 8) -> Path:
    """Write one VTAB task with the given split sizes; train800val200 contains copies of train800 and val200."""
    rows: dict[str, list[str]] = {}
    labels: dict[str, list[int]] = {}
    for number, (split, size) in enumerate(sizes.items()):
        rows[split], labels[split] = [], []
        for index in range(size):
            label, name = index % classes, f"images/{split}/{index:06d}.jpg"
            write_noise(folder / name, (number, index), side, label if classes <= 3 else None)
            rows[split].append(f"{name} {label}")
            labels[split].append(label)
    joined = [line for split in ("train800", "val200") for line in rows[split]]
    rows["train800val200"] = []
    for index, line in enumerate(joined):
        source, label = line.split(" ")
        name = f"images/train800val200/{index:06d}.jpg"
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / source).read_bytes())
        rows["train800val200"].append(f"{name} {label}")
    for split, lines in rows.items():
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_fgvc(folder: Path, images: str, ids: Sequence[int], sizes: Mapping[str, int], side: int = 8) -> Path:
    """Write one FGVC dataset with the given split sizes, cycling through the class ids."""
    for number, (split, size) in enumerate(sizes.items()):
        entries = {}
        for index in range(size):
            class_id = ids[index % len(ids)]
            name = f"{class_id:03d}.Bird_{class_id}/{split}_{index}.jpg"
            write_noise(folder / images / name, (number, index), side, index % len(ids) if len(ids) <= 3 else None)
            entries[name] = class_id
        (folder / f"{split}.json").write_text(json.dumps(entries))
    return folder
