"""Table and figure of product rows: mean rank and mean difference from `snella train` over folders.

python benchmarks/products/table.py rows.jsonl [--products snella fastai ...] [--minutes 1 3 ...] [--weights W]
    [--pixels N] [--threads N] [--since DATE] [--until DATE] [--last] [--folders drums ...] [--figure FILE]

`--since` and `--until` separate the rows of different recipes. Runs with the same settings are averaged; with `--last`,
only the last one counts.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from snella_app.text import decimal_text
from snella_lab.bench.rows import read_rows
from snella_lab.comparison.statistics import Difference, difference_of, with_holm
from snella_lab.comparison.summary import difference_text, significance_texts

REFERENCE = "snella"
_LABELS = {"snella": "snella train", "fastai-all": "fastai fine_tune"}
"""Names in the figure's legend; other products keep theirs."""
Means = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--products", nargs="+", help="default: all")
    parser.add_argument("--minutes", nargs="+", type=float, help="default: all")
    parser.add_argument("--weights", default="dinov2s")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--since", help="first date of the rows, e.g. 2026-11-30")
    parser.add_argument("--until", help="date before which the rows were measured")
    parser.add_argument("--last", action="store_true", help="use only the last run with the same settings")
    parser.add_argument("--folders", nargs="+", help="default: all")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    rows = [row for row in read_rows(args.rows) if row["weights"] == args.weights]
    rows = [row for row in rows if args.products is None or row["product"] in args.products]
    rows = [row for row in rows if args.minutes is None or row["minutes"] in args.minutes]
    rows = [row for row in rows if args.pixels in (None, row["pixels"]) and args.threads in (None, row["threads"])]
    rows = [row for row in rows if args.since is None or row["date"] >= args.since]
    rows = [row for row in rows if args.until is None or row["date"] < args.until]
    rows = [row for row in rows if args.folders is None or row["folder"] in args.folders]
    if args.last:
        rows = last_runs(rows)
    if not rows:
        parser.error(f"{args.rows} contains no rows with these settings")
    for name in ("pixels", "threads"):
        if len(found := sorted({row[name] for row in rows})) > 1:
            parser.error(f"rows must have the same {name}, got {found}; select one with --{name}")
    for minutes in sorted({row["minutes"] for row in rows}):
        print(f"\n{minutes:g} minutes\n\n{markdown([row for row in rows if row['minutes'] == minutes])}")
    if args.figure:
        draw(rows, args.figure)


def last_runs(rows: list[dict]) -> list[dict]:
    """Return the last run of each product with the same folder, budget, seed, image size, and number of threads."""
    last = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        last[tuple(row[key] for key in ("product", "folder", "minutes", "seed", "pixels", "threads"))] = row
    return list(last.values())


def means(rows: list[dict], score: str = "accuracy") -> Means:
    """Average a score over seeds by product and folder, for the folders that all products share."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["product"]][row["folder"]].append(row[score])
    common = set.intersection(*(set(folders) for folders in values.values()))
    return {name: {f: float(np.mean(scores[f])) for f in sorted(common)} for name, scores in values.items()}


def mean_ranks(accuracies: Means) -> dict[str, float]:
    """Return each product's mean rank over folders; rank 1 is the highest accuracy, ties share their mean rank."""
    names = list(accuracies)
    table = np.array([list(accuracies[name].values()) for name in names])  # [products, folders]
    ranks = np.stack([rankdata(-column) for column in table.T], axis=1)
    return dict(zip(names, ranks.mean(1).tolist(), strict=True))


def differences(accuracies: Means, reference: str = REFERENCE) -> dict[str, Difference | None]:
    """Return differences from the reference over folders, with Holm's correction; empty without a reference."""
    if reference not in accuracies:
        return {}
    base = accuracies[reference]
    gaps = {name: [[value - base[folder]] for folder, value in scores.items()] for name, scores in accuracies.items()}
    return with_holm({name: difference_of(values) for name, values in gaps.items() if name != reference})


def markdown(rows: list[dict]) -> str:
    """Format the table of a time budget, sorted by mean rank."""
    rows = [{"peak_mib": math.nan} | row for row in rows]
    accuracies = means(rows)
    ranks = mean_ranks(accuracies)
    folders = list(next(iter(accuracies.values())))
    if not folders:
        return "no folder has rows for all products"
    others = {
        score: means(rows, score)
        for score in ("balanced_accuracy", "nll", "ece", "seconds", "peak_mib", "stored_bytes")
    }
    lines = [
        f"| product | mean rank | accuracy, {len(folders)} folders | minus {REFERENCE} | p | above "
        "| balanced | NLL | ECE | seconds | MiB | stored MB |",
        "|---" * 12 + "|",
    ]
    gaps = differences(accuracies)
    for name in sorted(ranks, key=ranks.__getitem__):

        def mean(score: str, name: str = name) -> float:
            return float(np.mean(list(others[score][name].values())))

        gap = " | ".join((difference_text(gaps.get(name), len(folders)), *significance_texts(gaps.get(name))))
        lines.append(
            f"| {name} | {ranks[name]:.2f} | {100 * np.mean(list(accuracies[name].values())):.1f} | {gap} "
            f"| {100 * mean('balanced_accuracy'):.1f} | {mean('nll'):.3f} | {mean('ece'):.3f} | {mean('seconds'):.0f} "
            f"| {decimal_text(mean('peak_mib'), 0)} | {mean('stored_bytes') / 1e6:.1f} |"
        )
    return "\n".join(lines)


def curves(rows: list[dict]) -> tuple[dict[str, list[tuple[float, float]]], list[str]]:
    """Return each product's points, mean minutes used and mean accuracy in percent, and the folders averaged.

    All points average the same folders, those with rows for every budget of every product.
    """
    folders: dict[tuple[str, float], set[str]] = defaultdict(set)
    for row in rows:
        folders[row["product"], row["minutes"]].add(row["folder"])
    common = sorted(set.intersection(*folders.values()))
    if not common:
        raise SystemExit("no folder has rows for all products and budgets; select some with --products")
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, minutes in sorted(folders):
        same = [r for r in rows if (r["product"], r["minutes"]) == (name, minutes) and r["folder"] in common]
        seconds, accuracy = (np.mean(list(means(same, score)[name].values())) for score in ("seconds", "accuracy"))
        points[name].append((float(seconds) / 60, 100 * float(accuracy)))
    return points, common


def draw(rows: list[dict], file: Path) -> None:
    """Plot mean accuracy versus minutes used, on a logarithmic axis, one line per product."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    points, folders = curves(rows)
    threads = "1 CPU thread" if rows[0]["threads"] == 1 else f"{rows[0]['threads']} CPU threads"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in sorted(points, key=lambda name: name != REFERENCE):
        width = 2.5 if name == REFERENCE else 1.2
        axes.plot(*zip(*points[name], strict=True), marker="o", label=_LABELS.get(name, name), linewidth=width)
    axes.set(xscale="log", xlabel=f"minutes used ({threads})", ylabel="test accuracy (%)")
    axes.set_title(f"Mean over {len(folders)} folders: {', '.join(folders)}", fontsize="small")
    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 3, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
