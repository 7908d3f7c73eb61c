"""Throughput of snella's data loading and torchvision's ImageFolder, interleaved, with the same transform.

    python benchmarks/data_loading.py --out benchmarks/data_loading.jsonl

The images are Tux Paint's stamps (Debian's tuxpaint-stamps-default), as PNGs (median 155×195) and enlarged to JPEGs of
1600 pixels ("photographs"). Each round reads one epoch with ImageFolder and two with snella, in the main process. Times
are CPU seconds. `first epoch` decodes all images; `later epochs` reads decoded images from a cache of up to 512 MiB.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from data_reading import CONFIG, enlarge
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from snella_app.data.datasets import ImageDataset
from snella_app.data.load import load_data
from snella_app.data.sources import FileImages
from snella_app.data.transforms import build_transform
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import conditions

BATCH = 32


def write_images(folder: Path, kind: str, count: int) -> None:
    """Write the stamps to class folders."""
    stamps = load_data("stamps").train
    for index in range(count):
        class_folder = folder / stamps.names[index].partition("/")[0]
        class_folder.mkdir(parents=True, exist_ok=True)
        image = stamps.image(index)
        if kind == "photographs":
            enlarge(image).save(class_folder / f"{index:04}.jpg", quality=90)
        else:
            image.save(class_folder / f"{index:04}.png")


def read_all(dataset) -> tuple[float, float]:
    """Read one epoch and return CPU and wall-clock seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for images, _ in DataLoader(dataset, BATCH):
        if images.shape[1:] != (3, 224, 224):
            raise RuntimeError(f"images must be 3×224×224, got {list(images.shape)}")
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transform = build_transform(CONFIG, augment="crop")
    for kind in ("stamps", "photographs"):
        with tempfile.TemporaryDirectory() as temporary:
            write_images(Path(temporary), kind, options.images)
            image_folder = ImageFolder(temporary, transform)
            paths = [Path(path) for path, _ in image_folder.samples]
            labels, names = [label for _, label in image_folder.samples], [path.name for path in paths]
            times: dict[str, list[tuple[float, float]]] = {"ImageFolder": [], "first epoch": [], "later epochs": []}
            for _ in range(options.rounds):
                images = ImageDataset(FileImages(paths), range(len(paths)), labels, names)
                dataset = images.with_transform(transform)
                times["ImageFolder"].append(read_all(image_folder))
                times["first epoch"].append(read_all(dataset))
                times["later epochs"].append(read_all(dataset))
            medians = {name: statistics.median(cpu for cpu, _ in pairs) for name, pairs in times.items()}
            row = {
                "benchmark": "data_loading",
                "images": kind,
                "count": options.images,
                "rounds": options.rounds,
                "batch": BATCH,
                "command": f"python benchmarks/data_loading.py --images {options.images} --rounds {options.rounds}",
                **conditions("cpu"),
                **{f"{n.replace(' ', '_')}_images_per_cpu_s": round(options.images / s, 1) for n, s in medians.items()},
                "first_epoch_over_ImageFolder": round(medians["ImageFolder"] / medians["first epoch"], 3),
                "later_epochs_over_ImageFolder": round(medians["ImageFolder"] / medians["later epochs"], 3),
            }
            print(row)
            append_rows(options.out, [row])


if __name__ == "__main__":
    main()
