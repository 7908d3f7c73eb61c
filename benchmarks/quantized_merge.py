"""Error of merging an update into a quantized weight.

python benchmarks/quantized_merge.py             appends to quantized_merge.jsonl; requires bitsandbytes and torchao
python benchmarks/quantized_merge.py --table     writes docs/notes/checks.md

The weight `W` of a 64×128 linear layer and the update `U` are random. Half of the entries of `U` are nonzero. The
script merges an adapter with this update, which quantizes the weight again (`Q`). The error is `‖Q(W + U) − (W + U)‖ /
‖U‖`.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from documents import markdown_table, put_between
from peft import get_peft_model
from torch import nn

from snella import SnellaConfig
from snella.layer import SnellaLayer
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "notes" / "checks.md"
FORMATS = {
    "bitsandbytes `int8`": 8,
    "torchao `int8`": 8,
    "bitsandbytes `nf4`": 4,
    "bitsandbytes `fp4`": 4,
    "torchao `int4`, groups of 32": 4,
}
"""Number of bits by name of the format."""
SIZES = {"1/3": 1 / 3, "1/30": 1 / 30}
"""Values of `‖U‖ / ‖W‖`."""
SEEDS = range(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.table:
        put_between(PAGE, "<!-- quantized merge begin -->", "<!-- quantized merge end -->", table(read_rows(ROWS)))
        return
    info = conditions("cpu", ("torch", "peft", "bitsandbytes", "torchao"))
    for name in FORMATS:
        for size, ratio in SIZES.items():
            errors = [round(merge_error(name, ratio, seed), 4) for seed in SEEDS]
            append_rows(args.out, [{"format": name, "size": size, "errors": errors, **info}])


def merge_error(name: str, ratio: float, seed: int) -> float:
    """Merge an update with `‖U‖ / ‖W‖ = ratio` into a quantized layer and return the relative error."""
    torch.manual_seed(seed)
    network = nn.Sequential(quantized_layer(name))
    config = SnellaConfig(r=4, target_modules=["0"], init_sparsity=0.5, init_weights=False, scaling=1.0)
    layer: Any = next(module for module in get_peft_model(network, config).modules() if isinstance(module, SnellaLayer))
    weight = layer._weight().materialize().float()
    layer.set_scale("default", ratio * float(weight.norm() / layer.get_delta_weight("default").float().norm()))
    update = layer.get_delta_weight("default").float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about this error
        layer.merge()
    error = layer._weight().materialize().float() - (weight + update)
    return float(error.norm() / update.norm())


def quantized_layer(name: str) -> nn.Module:
    """Create a random linear layer in a quantized format."""
    linear = nn.Linear(128, 64, bias=False)
    library, kind = name.split("`")[0].strip(), name.split("`")[1]
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, granularity, quantize_

        int8 = Int8WeightOnlyConfig(set_inductor_config=False)
        quantize_(linear, int8 if kind == "int8" else IntxWeightOnlyConfig(torch.int4, granularity.PerGroup(32)))
        return linear
    import bitsandbytes

    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type=kind)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean errors by format and size of the update."""
    cells = {(row["format"], row["size"]): f"{100 * sum(row['errors']) / len(row['errors']):.0f}%" for row in rows}
    lines = [[name, str(bits), *(cells[name, size] for size in SIZES)] for name, bits in FORMATS.items()]
    return markdown_table(
        ["format", "bits", *(f"update {size} as large as the weight" for size in SIZES)], lines, left=1
    )


if __name__ == "__main__":
    main()
