"""Step time with Numba kernels on torch's OpenMP threads and on separate threads, interleaved.

python benchmarks/thread_runtimes.py               one minute on two idle cores; appends a row to results.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from snella.backends.numba import backend
from snella_lab.bench.baselines import Workload
from snella_lab.bench.bench import Runner, random_batch
from snella_lab.bench.reference import op_error
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import conditions

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default=str(HERE / "results.jsonl"))
    args = parser.parse_args()
    error = op_error("numba")
    if error is not None:
        raise RuntimeError(f"impl='numba' does not match the reference: {error}; nothing was timed")
    workload = Workload(args.backbone)
    runner, batch = Runner("snella", workload), random_batch(workload, args.batch)
    runtimes = {"openmp": backend._torch_openmp, "own": lambda: None}
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(-1, args.rounds):
        for name in runtimes if number % 2 else reversed(runtimes):
            backend._torch_openmp = runtimes[name]
            step = runner.step(*batch).step_s
            if number >= 0:
                times[name].append(step)
    ratios = [separate_s / openmp_s for separate_s, openmp_s in zip(times["own"], times["openmp"], strict=True)]
    row = {
        "benchmark": "thread_runtimes",
        "backbone": args.backbone,
        "batch": args.batch,
        "r": workload.r,
        "sparsity": workload.sparsity,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        **conditions("cpu"),
        **{f"{name}_s": round(statistics.median(values), 4) for name, values in times.items()},
        "own_over_openmp": round(statistics.median(ratios), 3),
    }
    append_rows(args.out, [row])
    print(row)


if __name__ == "__main__":
    main()
