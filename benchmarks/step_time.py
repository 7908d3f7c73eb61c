"""Step time and memory of SNELLA and baselines; `snella bench` has all options.

python benchmarks/step_time.py                     16 minutes on two cores; appends to results.jsonl
python benchmarks/step_time.py --matrices          only single operations on the CPU: about one minute
python benchmarks/step_time.py --competition       only importance, selection and allocation: one minute
python benchmarks/step_time.py --gpu               all methods on a GPU, batch size 64, float32 and bfloat16
python benchmarks/step_time.py --grid              all backbones, batch sizes, ranks, sparsities and dtypes: hours
"""

import argparse
from pathlib import Path

from single_operations import measure_competition, measure_matrix, measure_sampling

from snella_app.console import make_console
from snella_lab.bench.bench import BenchConfig, bench, grid
from snella_lab.bench.rows import append_rows

HERE = Path(__file__).parent
VARIANTS = [
    "snella-bf16-gradient",
    "snella-sample",
    "snella-sample-quarter",
    "snella-compress",
    "snella-compress-sample",
]
METHODS = ["frozen", "lora", "dora", "shira", "full", "snella", *VARIANTS, "snella-keep-inputs"]


def gpu_config(out: str) -> BenchConfig:
    """Return the settings of `make gpu`: the methods of `make bench`, on a GPU."""
    return BenchConfig(batch=[64], methods=[*METHODS, "paper"], dtype=["fp32", "bf16"], device="cuda", out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="run the full grid")
    parser.add_argument("--matrices", action="store_true", help="only single operations, on the CPU")
    parser.add_argument("--competition", action="store_true", help="only importance, selection and allocation")
    parser.add_argument("--gpu", action="store_true", help="only batch size 64 in float32 and bfloat16, on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(HERE / "results.jsonl"))
    args = parser.parse_args()
    console = make_console()
    if args.grid:
        bench(grid(args.device, args.out), console)
        return
    if args.gpu:
        bench(gpu_config(args.out), console)
        return
    if args.competition:
        append_rows(args.out, [measure_competition()])
        return
    if args.device == "cpu" or args.matrices:
        matrices = [measure_matrix(3072, 768), measure_matrix(11008, 4096, tokens=512, rounds=3)]
        for row in matrices:
            console.print(
                {key: row[key] for key in ("shape", "effective_s", "effective_over_product", "extra_over_matrix")}
            )
        samplings = [
            measure_sampling(m, n, tokens=tokens, density=density)
            for m, n in ((3072, 768), (768, 768))
            for tokens in (788, 3152)
            for density in (0.01, 0.03, 0.05, 0.1)
        ]
        append_rows(args.out, [*matrices, *samplings, measure_competition()])
    if args.matrices:
        return
    small, base, huge = "vit_small_patch16_224", "vit_base_patch16_224", "vit_huge_patch14_224"
    common = {"device": args.device, "out": args.out}
    bench(BenchConfig([base], [4], METHODS, rounds=5, **common), console)
    bench(BenchConfig([base], [16], ["frozen", "lora", "full", "snella", *VARIANTS], rounds=4, **common), console)
    bench(BenchConfig([base], [16], ["lora", "snella"], sparsity=[0.99], rounds=2, **common), console)
    bench(BenchConfig([base], [4], ["lora", "snella", "paper"], rounds=2, **common), console)
    bench(BenchConfig([small], [4], ["lora", "full", "snella"], rounds=4, **common), console)
    if args.device != "cpu":
        methods = [*METHODS, "snella-keep-delta"]
        bench(BenchConfig([base], [64], [*methods, "paper"], dtype=["bf16"], memory=True, **common), console)
        bench(BenchConfig([huge], [8], methods, dtype=["bf16"], memory=True, **common), console)


if __name__ == "__main__":
    main()
