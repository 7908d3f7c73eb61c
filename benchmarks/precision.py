"""Step and evaluation times of SNELLA, LoRA and full fine-tuning in float32 and under bfloat16 autocast.

python benchmarks/precision.py                 three minutes on two cores; appends to precision.jsonl

A step is a forward and a backward pass without the optimizer. Methods and precisions are interleaved; rows contain
medians over `--rounds`.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from snella import SnellaConfig
from snella_app.device import autocast
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import measurement_info

HERE = Path(__file__).parent
MODELS = (("vit_small_patch14_dinov2", 70, 32), ("vit_base_patch16_224", 224, 16))
METHODS, PRECISIONS, CLASSES = ("lora", "full", "snella"), ("fp32", "bf16"), 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "precision.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = {"threads": args.threads, "rounds": args.rounds, "torch": torch.__version__, **measurement_info()}
    for name, size, batch in MODELS:
        for row in measure(name, size, batch, args.rounds):
            print(row, flush=True)
            append_rows(args.out, [{**row, **shared}])


def measure(name: str, size: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time all methods in both precisions; the first two rounds are warm-up."""
    models = {method: build(method, name, size) for method in METHODS}
    images, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds + 2):
        for method, precision in itertools.product(METHODS, PRECISIONS):
            times.setdefault((method, precision), []).append(step_times(models[method], images, labels, precision))
    rows = []
    for (method, precision), pairs in times.items():
        step_s, forward_s = (statistics.median(values) for values in zip(*pairs[2:], strict=True))
        row = {"backbone": name, "img_size": size, "batch_size": batch, "method": method, "precision": precision}
        rows.append({**row, "step_s": round(step_s, 4), "forward_s": round(forward_s, 4)})
    return rows


def build(method: str, name: str, size: int) -> nn.Module:
    """Build an adapted model with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, img_size=size)
    if method == "full":
        return model
    targets = {"target_modules": r"blocks\..*\.(qkv|proj|fc1|fc2)", "modules_to_save": ["head"]}
    return get_peft_model(model, (LoraConfig if method == "lora" else SnellaConfig)(r=8, **targets))


def step_times(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass in training mode, and of a forward pass in evaluation mode."""
    model.train()
    start = time.perf_counter()
    with autocast(images.device, precision):
        logits = model(images)
    nn.functional.cross_entropy(logits.float(), labels).backward()
    step_s = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    model.eval()
    start = time.perf_counter()
    with torch.no_grad(), autocast(images.device, precision):
        model(images)
    return step_s, time.perf_counter() - start


if __name__ == "__main__":
    main()
