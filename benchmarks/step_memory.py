"""What methods keep for the backward pass and hold at most in a training step, by size of the model: counted.

python benchmarks/step_memory.py                     three ViTs at batch 8; replaces step_memory.jsonl
python benchmarks/step_memory.py --backbones vit_base_patch16_224 --depths 4 8 --out other.jsonl

Each method comes with and without SNELLA's recomputation of inputs. Bytes are counted by autograd's own hooks, each
storage once, and the peak is `snella_app.training.memory.predict_step_memory`'s: weights, gradients, AdamW's moments,
saved tensors and temporaries. All blocks of a ViT are alike, so large ones are counted at two depths, on whose line the
whole model lies. What SPT-Adapter keeps depends on which matrices get an adapter, so it is counted on whole models.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import timm
import torch

from snella_app.training.memory import predict_step_memory
from snella_lab.bench import BASELINES
from snella_lab.bench.baselines import NUM_CLASSES, Workload, random_batch
from snella_lab.bench.rows import append_rows, conditions, put_between, read_rows

ROWS = Path(__file__).parent / "step_memory.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
_BEGIN, _END = "<!-- rows of benchmarks/step_memory.jsonl begin -->", "<!-- rows of step_memory end -->"

# the whole model where no depths are named
DEPTHS: dict[str, tuple[int, ...]] = {
    "vit_base_patch16_224": (),
    "vit_large_patch16_224": (4, 8),
    "vit_huge_patch14_224": (2, 4),
}
# each without the recomputation of inputs, and with it
METHODS = {
    "snella": ("snella-keep-inputs", "snella"),
    "lora": ("lora", "lora-recompute"),
    "gps": ("gps", "gps-recompute"),
    "spt-lora": ("spt-lora", "spt-lora-recompute"),
    "spt-adapter": ("spt-adapter", "spt-adapter-recompute"),
    "full": ("full", "full-recompute"),
}
NOT_BY_DEPTH = ("spt-adapter",)
BATCH = 8
FIELDS = ("weights", "trainable", "kept", "peak")


def count(contender: str, backbone: str, batch: int, depth: int | None) -> dict[str, int]:
    """Weights, trained parameters, kept bytes and peak bytes of one model."""
    workload = Workload(backbone)
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    model = timm.create_model(backbone, num_classes=NUM_CLASSES, **options)
    weights = sum(p.numel() for p in model.parameters())
    model = BASELINES[contender](model, workload)
    images, _ = random_batch(workload, 1)
    memory = predict_step_memory(model, tuple(images.shape[1:]), batch)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": weights, "trainable": trainable, "kept": memory.kept, "peak": memory.total}


def count_whole(contender: str, backbone: str, batch: int, depths: tuple[int, ...]) -> dict[str, int]:
    """The same of the whole model, on the line through two depths where some are named."""
    if not depths:
        return count(contender, backbone, batch, None)
    with torch.device("meta"):
        blocks = len(timm.create_model(backbone).blocks)
    few, more = (count(contender, backbone, batch, depth) for depth in depths)
    steps = (blocks - depths[0]) / (depths[1] - depths[0])
    return {name: round(few[name] + steps * (more[name] - few[name])) for name in FIELDS}


def rows_of(backbone: str, batch: int, depths: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each method, without and with recomputation."""
    common = {"benchmark": "step_memory", "backbone": backbone, "batch": batch, "r": 8, "sparsity": 0.7}
    common |= {"dtype": "float32", "depths": list(depths), **conditions("cpu")}
    rows = []
    for method, contenders in METHODS.items():
        if depths and method in NOT_BY_DEPTH:
            continue
        for recomputes, contender in zip((False, True), contenders, strict=True):
            found = count_whole(contender, backbone, batch, depths)
            gc.collect()
            mib = {f"{name}_mib": round(found[name] / 2**20, 1) for name in ("kept", "peak")}
            parameters = {name: found[name] for name in ("weights", "trainable")}
            row = {**common, "method": method, "contender": contender, "recomputes": recomputes, **parameters, **mib}
            print({name: row[name] for name in ("backbone", "contender", "kept_mib", "peak_mib")}, flush=True)
            rows.append(row)
    return rows


def memory_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: peak and kept bytes of each method, a pair of columns for each backbone."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    found = {(row["backbone"], row["method"], row["recomputes"]): row for row in rows}
    titles = {"peak_mib": "Peak of a training step", "kept_mib": "Kept for the backward pass"}
    tables = []
    for field, title in titles.items():
        sizes = [f"{found[name, 'full', False]['weights'] / 1e6:.0f} M" for name in backbones]
        heads = [f"{name} ({size}) | recomputed" for name, size in zip(backbones, sizes, strict=True)]
        lines = [f"**{title}, batch {rows[0]['batch']}, float32**, MiB by count", ""]
        lines += [f"| | {' | '.join(heads)} |", "|---" * (1 + 2 * len(backbones)) + "|"]
        for method in METHODS:
            pairs = [found.get((name, method, flag)) for name in backbones for flag in (False, True)]
            cells = ["" if row is None else f"{row[field]:,.0f}" for row in pairs]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def update_page(page: Path = PAGE, rows_file: Path = ROWS) -> bool:
    """Put the tables into the page; whether it changed."""
    return put_between(page, _BEGIN, _END, memory_tables(read_rows(rows_file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(DEPTHS), help="timm names of ViTs")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--depths", type=int, nargs=2, help="instead of those of each backbone")
    parser.add_argument("--out", type=Path, help="replaced; step_memory.jsonl for the default models")
    args = parser.parse_args()
    if args.out is None and (args.backbones, args.batch, args.depths) != (list(DEPTHS), BATCH, None):
        parser.error(f"--out is required with other models; {ROWS.name} holds the default ones")
    torch.set_num_threads(1)
    out = args.out or ROWS
    out.unlink(missing_ok=True)
    for backbone in args.backbones:
        append_rows(out, rows_of(backbone, args.batch, tuple(args.depths or DEPTHS.get(backbone, ()))))


if __name__ == "__main__":
    main()
