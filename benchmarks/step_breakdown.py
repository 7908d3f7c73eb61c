"""Time of the parts of a small SNELLA training step on a CPU.

python benchmarks/step_breakdown.py [--rounds 15]     appends to step_breakdown.jsonl
python benchmarks/step_breakdown.py --table           writes docs/notes/step-time.md

A step of the bundled suite trains a ViT-S/14 on 16 images of 42 px, here with a sparsity of 70% in all matrices. Steps
of LoRA and SNELLA alternate on one thread. The row contains medians of the process time of a step and of its parts.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from documents import markdown_table, put_between
from torch import nn

from snella import BudgetAllocator, create_snella_optimizer
from snella.backends.numba import backend
from snella.layer import SnellaLayer
from snella_app.methods.registry import build_method
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "notes" / "step-time.md"
MODEL, SIDE, BATCH, SPARSITY = "vit_small_patch14_dinov2", 42, 16, 0.7
PARTS = {
    "merge_and_count": "forward: merge and magnitude histogram",
    "select_threshold": "forward: find the threshold",
    "add_sparse": "forward: add to `W0`",
    "factor_gradients": "backward: gradients and effective weight",
    "optimizer": "optimizer and importance",
}
"""Descriptions of the parts. The first four are functions of the Numba backend."""
Times = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.table:
        put_between(PAGE, "<!-- step breakdown begin -->", "<!-- step breakdown end -->", table(read_rows(ROWS)))
        return
    append_rows(args.out, [{**measure(args.rounds), **conditions("cpu")}])


def measure(rounds: int) -> dict[str, Any]:
    """Return the median times in milliseconds of steps and their parts."""
    steps = {method: make_step(method) for method in ("lora", "snella")}
    samples: dict[str, list[Times]] = defaultdict(list)
    with timed_kernels() as times:
        for round_number in range(rounds + 1):  # round 0 compiles
            for method, step in steps.items():
                times.clear()
                start = time.process_time()
                step(times)
                times["step"] = time.process_time() - start
                if round_number:
                    samples[method].append(dict(times))
    medians = {
        method: {
            name: round(1e3 * statistics.median(sample.get(name, 0.0) for sample in measured), 2)
            for name in sorted({name for sample in measured for name in sample})
        }
        for method, measured in samples.items()
    }
    ratio = statistics.median(
        snella["step"] / lora["step"] for lora, snella in zip(samples["lora"], samples["snella"], strict=True)
    )
    return {
        "model": MODEL,
        "side": SIDE,
        "batch": BATCH,
        "sparsity": SPARSITY,
        "rounds": rounds,
        **medians,
        "ratio": round(ratio, 3),
    }


def make_step(method: str) -> Callable[[Times], None]:
    """Adapt a model and return a function that trains it for one step and adds the time of the optimizer."""
    torch.manual_seed(0)
    model = build_method(f"{method}-8", timm.create_model(MODEL, img_size=SIDE, num_classes=10)).train()
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    if method == "snella":
        optimizer: torch.optim.Optimizer = create_snella_optimizer(model, lr=1e-4)
        BudgetAllocator(model, total_epochs=100, steps_per_epoch=100).attach(optimizer)
        for layer in model.modules():
            if isinstance(layer, SnellaLayer):
                sizes = [rows * layer.in_features for rows in layer.row_counts["default"]]
                layer.set_budget("default", [round((1 - SPARSITY) * size) for size in sizes])
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(times: Times) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        start = time.process_time()
        optimizer.step()
        times["optimizer"] = time.process_time() - start

    return step


@contextmanager
def timed_kernels() -> Iterator[Times]:
    """Add the process time of the backend's kernels and of the threshold search to the yielded times."""
    times: Times = defaultdict(float)
    run, select = backend._run, backend.select_threshold

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        times[name] += time.process_time() - start
        return result

    backend._run = lambda kernel, *arguments: timed(kernel.__name__, run, kernel, *arguments)
    backend.select_threshold = lambda *arguments: timed("select_threshold", select, *arguments)
    try:
        yield times
    finally:
        backend._run, backend.select_threshold = run, select


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the last row."""
    row = rows[-1]
    lines = []
    for name, description in PARTS.items():
        lora = f"{row['lora'][name]:.0f}" if name in row["lora"] else ""
        lines.append([description, lora, f"{row['snella'][name]:.0f}", percent(row["snella"], name)])
    rest = {
        method: row[method]["step"] - sum(row[method].get(name, 0.0) for name in PARTS) for method in ("lora", "snella")
    }
    share = f"{100 * rest['snella'] / row['snella']['step']:.0f}%"
    lines.append(
        ["rest: matrix products, attention, and other operations", *(f"{value:.0f}" for value in rest.values()), share]
    )
    lines.append(["step", *(f"{row[method]['step']:.0f}" for method in ("lora", "snella")), "100%"])
    return markdown_table(["part", "LoRA, ms", "SNELLA, ms", "share of SNELLA's step"], lines, left=1)


def percent(times: Times, name: str) -> str:
    """Format a part's share of the step."""
    return f"{100 * times[name] / times['step']:.0f}%"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
