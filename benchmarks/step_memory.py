"""Saved tensors and peak memory of a training step by model size, counted from shapes.

python benchmarks/step_memory.py                     three ViTs at batch size 8; replaces step_memory.jsonl
python benchmarks/step_memory.py --backbones vit_base_patch16_224 --depths 4 8 --out other.jsonl

Each method is counted with and without SNELLA's recomputation of inputs. Autograd hooks count each saved storage once.
The peak comes from `snella_app.training.memory.predict_step_memory`: weights, gradients, AdamW's moments, saved tensors
and temporaries. As ViT blocks are identical, large models are extrapolated linearly from two depths. SPT-Adapter is
only counted on full models, because its memory depends on the selected matrices.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import timm
import torch
from documents import markdown_table, put_between

from snella_app.training.memory import predict_step_memory
from snella_lab.bench.baselines import BASELINES, NUM_CLASSES, Workload, random_batch
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).parent / "step_memory.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "notes" / "paper.md"
_BEGIN, _END = "<!-- rows of benchmarks/step_memory.jsonl begin -->", "<!-- rows of step_memory end -->"

# () counts the full model
DEPTHS: dict[str, tuple[int, ...]] = {
    "vit_base_patch16_224": (),
    "vit_large_patch16_224": (4, 8),
    "vit_huge_patch14_224": (2, 4),
}
# methods by family, without and with recomputation of inputs
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


def count(method: str, backbone: str, batch: int, depth: int | None) -> dict[str, int]:
    """Count weights, trainable parameters, saved bytes and peak bytes of one model."""
    workload = Workload(backbone)
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    model = timm.create_model(backbone, num_classes=NUM_CLASSES, **options)
    weights = sum(p.numel() for p in model.parameters())
    model = BASELINES[method](model, workload)
    images, _ = random_batch(workload, 1)
    memory = predict_step_memory(model, tuple(images.shape[1:]), batch)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": weights, "trainable": trainable, "kept": memory.saved_bytes, "peak": memory.total}


def count_full(method: str, backbone: str, batch: int, depths: tuple[int, ...]) -> dict[str, int]:
    """Count the full model, extrapolated from two depths if `depths` is set."""
    if not depths:
        return count(method, backbone, batch, None)
    with torch.device("meta"):
        blocks = len(timm.create_model(backbone).blocks)
    small, large = (count(method, backbone, batch, depth) for depth in depths)
    steps = (blocks - depths[0]) / (depths[1] - depths[0])
    return {name: round(small[name] + steps * (large[name] - small[name])) for name in FIELDS}


def rows_of(backbone: str, batch: int, depths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each method, without and with recomputation."""
    common = {"benchmark": "step_memory", "backbone": backbone, "batch": batch, "r": 8, "sparsity": 0.7}
    common |= {"dtype": "float32", "depths": list(depths), **conditions("cpu")}
    rows = []
    for family, methods in METHODS.items():
        if depths and family in NOT_BY_DEPTH:
            continue
        for recomputes, method in zip((False, True), methods, strict=True):
            counts = count_full(method, backbone, batch, depths)
            gc.collect()
            mib = {f"{name}_mib": round(counts[name] / 2**20, 1) for name in ("kept", "peak")}
            parameters = {name: counts[name] for name in ("weights", "trainable")}
            row = {**common, "family": family, "method": method, "recomputes": recomputes, **parameters, **mib}
            print({name: row[name] for name in ("backbone", "method", "kept_mib", "peak_mib")}, flush=True)
            rows.append(row)
    return rows


def memory_tables(rows: list[dict[str, Any]]) -> str:
    """Format peak and saved memory by method as Markdown, with two columns per backbone."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    by_key = {(row["backbone"], row["family"], row["recomputes"]): row for row in rows}
    titles = {"peak_mib": "Peak memory of a training step", "kept_mib": "Saved for backward"}
    tables = []
    for field, title in titles.items():
        head = [""]
        for name in backbones:
            head += [f"{name} ({by_key[name, 'full', False]['weights'] / 1e6:.0f} M)", "with recomputation"]
        lines = []
        for family in METHODS:
            pairs = [by_key.get((name, family, flag)) for name in backbones for flag in (False, True)]
            lines.append([family, *("" if row is None else f"{row[field]:,.0f}" for row in pairs)])
        caption = f"**{title}, batch {rows[0]['batch']}, float32**, MiB, counted from shapes"
        tables.append(f"{caption}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(tables)


def update_page(page: Path = PAGE, rows_file: Path = ROWS) -> bool:
    """Write the tables into the page; return True if it changed."""
    return put_between(page, _BEGIN, _END, memory_tables(read_rows(rows_file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(DEPTHS), help="timm names of ViTs")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--depths", type=int, nargs=2, help="two numbers of blocks to extrapolate from")
    parser.add_argument("--out", type=Path, help="output file, replaced; default step_memory.jsonl")
    args = parser.parse_args()
    if args.out is None and (args.backbones, args.batch, args.depths) != (list(DEPTHS), BATCH, None):
        parser.error(f"--out is required for other models, batch sizes or depths; {ROWS.name} contains the defaults")
    torch.set_num_threads(1)
    out = args.out or ROWS
    depths = {backbone: tuple(args.depths or DEPTHS.get(backbone, ())) for backbone in args.backbones}
    rows = [row for backbone in args.backbones for row in rows_of(backbone, args.batch, depths[backbone])]
    out.unlink(missing_ok=True)
    append_rows(out, rows)


if __name__ == "__main__":
    main()
