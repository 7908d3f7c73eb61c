"""Run the demonstration (`make demo`) on the CPU in float32 with several seeds.

python benchmarks/demo.py [--seeds 0 1 2]        appends to demo.jsonl

Each row contains the results of one method and the time of the whole demonstration in seconds (`demo_s`). The run
folders remain in `--runs`.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from snella_app.records.generators import MethodResults
from snella_app.records.record import read
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import conditions
from snella_lab.recipes.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    for seed in args.seeds:
        start = time.perf_counter()
        folder = run_demo(args.runs / f"seed-{seed}", overwrite=True, seed=seed, device="cpu", precision="fp32")
        demo = {"seed": seed, "precision": "fp32", "demo_s": round(time.perf_counter() - start, 1)}
        results = read(MethodResults, folder).rows
        append_rows(args.out, [{**demo, **asdict(result), **conditions("cpu")} for result in results])


if __name__ == "__main__":
    main()
