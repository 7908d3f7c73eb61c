"""Run products on folders sequentially, with time budgets and seeds, and append a JSON line per run.

python benchmarks/products/run.py --cache CACHE --folders-root ROOT --out rows.jsonl
    [--products snella fastai ...] [--folders clipart ...] [--minutes 1 3 10] [--seeds 0 1 2] [--pixels 70]

Runs with an existing row are skipped. The default is all development folders.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product as combinations
from pathlib import Path

from environments import interpreter, make
from folders import DEVELOPMENT, FOLDERS

from snella_lab.bench.rows import append_rows, read_rows

PRODUCTS: dict[str, tuple[str, str, str]] = {
    "snella": ("main", "snella_train.py", "default"),
    **{
        f"snella-{variant}": ("main", "snella_train.py", variant)
        for variant in (
            *("fixed-epochs", "own-size", "lora-8", "dora-8", "full", "no-recipe"),
            *("no-head-norm", "no-crops", "one-view", "random-head", "trained-head"),
        )
    },
    "fastai": ("fastai", "fastai_finetune.py", "default"),
    "fastai-bn": ("fastai", "fastai_finetune.py", "bn"),
    "fastai-all": ("fastai", "fastai_finetune.py", "all"),
    "fastai-fixed-epochs": ("fastai", "fastai_finetune.py", "fixed-epochs"),
    "autogluon": ("autogluon", "autogluon_multimodal.py", "default"),
    "lightly": ("lightly", "lightly_classification.py", "default"),
    "transformers": ("main", "transformers_trainer.py", "default"),
    "transformers-fixed-epochs": ("main", "transformers_trainer.py", "fixed-epochs"),
    "timm": ("main", "timm_finetune.py", "default"),
    "timm-fixed-epochs": ("main", "timm_finetune.py", "fixed-epochs"),
    "sklearn": ("main", "frozen_features.py", "logistic"),
    "sklearn-knn": ("main", "frozen_features.py", "knn"),
}
"""Environment, script and variant, by product."""

_HERE = Path(__file__).resolve().parent
_KEYS = ("product", "folder", "minutes", "pixels", "seed", "weights", "threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="environments and weights; created if missing")
    parser.add_argument("--folders-root", type=Path, required=True, help="output of folders.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", nargs="+", choices=list(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--folders", nargs="+", choices=sorted(FOLDERS), default=list(DEVELOPMENT))
    parser.add_argument("--minutes", nargs="+", type=float, default=[1.0, 3.0, 10.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pixels", type=int, default=70)
    parser.add_argument("--weights", default="dinov2s")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    subprocess.run([sys.executable, _HERE / "weights.py", "--cache", args.cache / "weights"], check=True)
    for name in args.products:
        make(args.cache / "environments", PRODUCTS[name][0])
    done = {tuple(row[key] for key in _KEYS) for row in read_rows(args.out)} if args.out.exists() else set()
    failed = []
    for seed, minutes, folder, name in combinations(args.seeds, args.minutes, args.folders, args.products):
        if (name, folder, minutes, args.pixels, seed, args.weights, args.threads) in done:
            continue
        environment, script, variant = PRODUCTS[name]
        with tempfile.TemporaryDirectory() as temporary:
            row = Path(temporary) / "row.json"
            values = {
                "--folder": args.folders_root / folder, "--minutes": minutes, "--pixels": args.pixels, "--seed": seed,
                "--weights": args.weights, "--threads": args.threads, "--cache": args.cache / "weights",
                "--variant": variant, "--out": row,
            }  # fmt: skip
            arguments = [str(item) for pair in values.items() for item in pair]
            python = interpreter(args.cache / "environments", environment)
            status = subprocess.run([python, _HERE / "peers" / script, *arguments]).returncode
            if status or not row.exists():
                failed.append(f"{name} on {folder}, {minutes:g} min, seed {seed}: status {status}")
                print("failed:", failed[-1], flush=True)
                continue
            scores = json.loads(row.read_text())
            append_rows(args.out, [scores])
            result = f"{100 * scores['accuracy']:.1f} in {scores['seconds']:.0f} s"
            print(f"{name} {folder} {minutes:g} min seed {seed}: {result}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
