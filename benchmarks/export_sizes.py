"""Size of sparse files by sparsity, compared with factors, LoRA of the same rank and merged weights.

    python benchmarks/export_sizes.py runs/photos      # a SNELLA run; prints a table for docs/notes/checks.md

The budgets of the run's matrices are scaled in proportion to reach each sparsity. `snella_app.runs.export` writes the
files.
"""

import argparse
import json

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save

from snella.layer import SnellaLayer
from snella.matrices import adapted_matrices
from snella_app.runs import load_run
from snella_app.runs.export import sparse_patch
from snella_app.runs.model import make_backbone

SPARSITIES = (0.7, 0.8, 0.9, 0.97, 0.99, 0.999)


def mib(content: bytes) -> str:
    """Format a size in MiB."""
    return f"{len(content) / 2**20:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a SNELLA run")
    run = parser.parse_args().run
    loaded = load_run(run, "cpu")
    model, base = loaded.model, make_backbone(loaded.info.backbone, loaded.task.name)
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    run_budgets = {id(layer): layer.budgets("default") for layer in layers}
    total, changed = sum(matrix.size for matrix in adapted_matrices(model)), sum(map(sum, run_budgets.values()))
    rank = layers[0].snella_A["default"].shape[-1]
    names = [name.removeprefix("base_model.model.") for name, module in model.named_modules() if module in layers]
    lora = get_peft_model(
        make_backbone(loaded.info.backbone, loaded.task.name), LoraConfig(r=rank, target_modules=names)
    )
    factors = {k: v.contiguous() for k, v in get_peft_model_state_dict(model).items() if "snella_" in k}
    print(
        f"{run}: {loaded.info.backbone.name}, {total:,} adapted weights, r {rank}, sparsity {1 - changed / total:.3f}\n"
    )
    print(f"factors {mib(save(factors))} MiB, LoRA {mib(save(dict(get_peft_model_state_dict(lora))))} MiB, "
          f"merged weights {mib(save({k: v.contiguous() for k, v in base.state_dict().items()}))} MiB\n")  # fmt: skip
    print("| sparsity | changed weights | index encoding | fp32 values, MiB | bf16 values, MiB | "
          "int32 positions and fp32 values, MiB |")  # fmt: skip
    print("|---:|---:|---|---:|---:|---:|")
    for sparsity in SPARSITIES:
        factor = (1 - sparsity) * total / changed
        for layer in layers:
            limits = [rows * layer.in_features for rows in layer.row_counts["default"]]
            budgets = [
                min(int(budget * factor), limit) for budget, limit in zip(run_budgets[id(layer)], limits, strict=True)
            ]
            layer.set_budget("default", budgets)
        patch = sparse_patch(model, base)
        fp32, bf16 = patch.to_bytes("fp32"), patch.to_bytes("bf16")
        encodings = index_encodings(fp32)
        count = sum(len(entries.indices) for entries in patch.entries.values())
        print(f"| {sparsity} | {count:,} | {encodings} | {mib(fp32)} | {mib(bf16)} | {8 * count / 2**20:.2f} |")


def index_encodings(content: bytes) -> str:
    """Return the index encodings and the number of matrices that use them."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    encodings = [key.rpartition(":")[2] for key in header if ":" in key and not key.endswith(":values")]
    return ", ".join(f"{encoding} ({encodings.count(encoding)})" for encoding in sorted(set(encodings)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
