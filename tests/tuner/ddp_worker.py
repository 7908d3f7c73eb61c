"""One process of a distributed run: prints its budgets and a digest of its factors. Started by `test_distributed`."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer


def main(rank: int, world: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    config = SnellaConfig(
        r=4, init_weights=False, scaling=0.1, target_modules=["0", "2"], modules_to_save=["4"], impl="eager"
    )
    model = DistributedDataParallel(get_peft_model(base, config))
    optimizer = create_snella_optimizer(model, lr=1e-2)
    allocator = BudgetAllocator(model, total_epochs=4, steps_per_epoch=3).attach(optimizer)
    # every rank sees other data
    torch.manual_seed(100 + rank)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(6, 10)).square().sum().backward()
        optimizer.step()
    digest = sum(p.double().abs().sum().item() for p in model.parameters() if p.requires_grad)
    nonzeros = {matrix.name: matrix.nonzeros() for matrix in allocator.matrices}
    print(json.dumps({"history": allocator.history, "nonzeros": nonzeros, "digest": digest}), flush=True)
    dist.barrier()
    os._exit(0)  # two ranks that take gloo's threads down at once wait for each other now and then


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
