"""Training-step time of SNELLA beside its peers, interleaved in one process; one JSON line a row.

    python benchmarks/step_time.py --backbone vit_base_patch16_224 --batch 4 16 --out benchmarks/results.jsonl

Every contender takes the same images through the same backbone. In each round every contender does one step, in an
order that changes from round to round; a row holds the medians of forward, backward and step seconds, the bytes that
autograd keeps for the backward pass, and the median of the round-by-round ratio to PEFT's LoRA. A contender whose
gradients are not finite gets no row.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from snella.training.memory import saved_bytes

TARGETS = r".*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
PEER = "lora"


def lora(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    config = LoraConfig(r=args.r, lora_alpha=args.r, target_modules=TARGETS, modules_to_save=["head"])
    return get_peft_model(model, config)


def dora(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    config = LoraConfig(r=args.r, lora_alpha=args.r, target_modules=TARGETS, modules_to_save=["head"], use_dora=True)
    return get_peft_model(model, config)


def shira(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return get_peft_model(model, ShiraConfig(r=args.r, target_modules=TARGETS, modules_to_save=["head"]))


def full(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return model


def frozen(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    model.requires_grad_(False)
    for parameter in (model.cls_token, *model.head.parameters()):
        parameter.requires_grad_(True)
    return model


def snella(impl: str, **options: object) -> Callable[[nn.Module, argparse.Namespace], nn.Module]:
    def build(model: nn.Module, args: argparse.Namespace) -> nn.Module:
        # the budget that the sparsity means holds from the first step on
        sparsity = {"target_sparsity": args.sparsity, "init_sparsity": args.sparsity}
        config = SnellaConfig(
            r=args.r, target_modules=TARGETS, modules_to_save=["head"], impl=impl, **sparsity, **options
        )
        return get_peft_model(model, config)

    return build


CONTENDERS: dict[str, Callable[[nn.Module, argparse.Namespace], nn.Module]] = {
    "frozen": frozen,
    "lora": lora,
    "dora": dora,
    "shira": shira,
    "full": full,
    "snella": snella("auto"),
    "snella-keep-delta": snella("auto", keep_delta=True),
    "snella-eager": snella("eager"),
    "snella-reference": snella("reference"),
}


class Runner:
    """One contender with its optimiser, ready to step."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model = timm.create_model(args.backbone, num_classes=100)
        self.model = CONTENDERS[name](model, args).train()
        self.optimizer = create_snella_optimizer(self.model, lr=1e-4)
        if name.startswith("snella"):
            BudgetAllocator(self.model, total_epochs=100, steps_per_epoch=100).attach(self.optimizer)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
        """Seconds of forward, backward, and the whole step."""
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        return forward - start, backward - forward, end - start

    def gradients_are_finite(self, images: torch.Tensor, labels: torch.Tensor) -> bool:
        nn.functional.cross_entropy(self.model(images), labels).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(gradients) and all(bool(torch.isfinite(g).all()) for g in gradients)
        self.optimizer.zero_grad()
        return finite


def measure(args: argparse.Namespace, batch: int, console: Console) -> list[dict[str, object]]:
    """Rows of one batch size."""
    side = timm.get_pretrained_cfg_value(args.backbone, "input_size")[-1]
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 100, (batch,))
    runners = {name: Runner(name, args) for name in args.methods}
    for name in list(runners):
        if not runners[name].gradients_are_finite(images, labels):
            console.print(f"{name}: its gradients are not finite, so it is not timed")
            del runners[name]
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runners}
    order = list(runners)
    shuffle = random.Random(0)
    for _ in track(range(args.rounds), f"batch {batch}", console=console):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(runners[name].step(images, labels))
    rows = []
    for name, steps in times.items():
        ratios = [mine[2] / peer[2] for mine, peer in zip(steps, times.get(PEER, steps), strict=True)]
        rows.append(
            {
                "contender": name,
                "batch": batch,
                "forward_s": round(statistics.median(s[0] for s in steps), 4),
                "backward_s": round(statistics.median(s[1] for s in steps), 4),
                "step_s": round(statistics.median(s[2] for s in steps), 4),
                f"step_over_{PEER}": round(statistics.median(ratios), 3),
                f"step_over_{PEER}_quartiles": [round(q, 3) for q in quartiles(ratios)],
                "saved_mib": round(saved_bytes(runners[name].model, images) / 2**20, 1),
                "trainable": sum(p.numel() for p in runners[name].model.parameters() if p.requires_grad),
            }
        )
    return rows


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def conditions(args: argparse.Namespace) -> dict[str, object]:
    """What a row must say besides its numbers."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    packages = ("torch", "peft", "timm", "numba", "numpy")
    return {
        "benchmark": "step_time",
        "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "backbone": args.backbone,
        "r": args.r,
        "sparsity": args.sparsity,
        "dtype": "float32",
        "device": f"cpu, {torch.get_num_threads()} threads, {platform.machine()}",
        "rounds": args.rounds,
        "versions": {package: version(package) for package in packages},
        "commit": commit.stdout.strip(),
        "dirty": bool(dirty.stdout.strip()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(rows: list[dict[str, object]]) -> Table:
    shown = ["contender", "batch", "forward_s", "backward_s", "step_s", f"step_over_{PEER}", "saved_mib", "trainable"]
    result = Table()
    for title in shown:
        result.add_column(title.replace("_", " "), justify="left" if title == "contender" else "right")
    for row in rows:
        result.add_row(*(f"{row[title]:,}" if isinstance(row[title], int) else str(row[title]) for title in shown))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--methods", nargs="+", default=["frozen", "lora", "full", "snella"], choices=CONTENDERS)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    args = parser.parse_args()
    console = Console()
    for batch in args.batch:
        rows = measure(args, batch, console)
        console.print(table(rows))
        if args.out is not None:
            with args.out.open("a") as file:
                file.writelines(json.dumps({**conditions(args), **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
