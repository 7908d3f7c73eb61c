"""One of two processes that train sharded models and print the differences from unsharded ones; see `test_sharding`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snella.layer import SnellaLayer
from snella_app.methods import SelectionData, build_method
from snella_app.training.distributed import average_gradients, is_sharded, shard_frozen

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([0, 1, 2, 0])
QUICK: dict[str, dict[str, Any]] = {"noah": {"supernet_epochs": 1}}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Return two batches for methods with parameter selection."""
    return iter([(IMAGES, LABELS), (IMAGES.flip(0), LABELS.flip(0))])


def make(method: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    backbone = timm.create_model("test_vit", num_classes=3, img_size=32)
    return build_method(method, backbone, batches=SelectionData(batches, batches), **QUICK.get(method, {}))


def train(model: nn.Module, parts: list[slice]) -> Tensor:
    """Take two steps, each on the mean gradient over `parts` of the images, and return the outputs."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(2):
        for part in parts:
            torch.manual_seed(step)
            (cross_entropy(model(IMAGES[part]), LABELS[part]) / len(parts)).backward()
        if is_sharded(model):
            average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model.eval()(IMAGES)


def compare(method: str, rank: int) -> dict[str, Any]:
    """Train an unsharded model on both halves of the images and a sharded model on the half of this process."""
    halves = [slice(0, 2), slice(2, 4)]
    sharded = make(method)
    if rank == 1:  # the main process's values are broadcast
        with torch.no_grad():
            for parameter in sharded.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    shard_frozen(sharded)
    outputs = train(sharded, [halves[rank]])
    expected = train(make(method), halves)
    layers = [module for module in sharded.modules() if isinstance(module, SnellaLayer)]
    return {
        "error": float((outputs - expected).abs().max()),
        "outputs": outputs.tolist(),
        "kept": sum(layer._cache._effective is not None for layer in layers),
    }


def main(rank: int, rendezvous: str, *methods: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for method in methods:
        try:
            results[method] = compare(method, rank)
        except RuntimeError as error:  # raised in both processes
            results[method] = {"raised": str(error)}
    print(json.dumps(results), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can deadlock if both ranks shut down concurrently


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
