"""One process of a distributed run; prints the results of each kind of parallelism. Started by `test_distributed`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from snella.importance import _find_shard_starts
from snella.matrices import adapted_matrices


class Block(nn.Module):
    """Attention followed by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.attn(x, x, x, need_weights=False)[0]))


def wrap(kind: str, model: nn.Module) -> nn.Module:
    """Wrap a model for one kind of parallelism."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu")
        )
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module)
    return fully_shard(model)


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the full trained parameters of a wrapped model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def strip_wrappers(name: str) -> str:
    """Remove the wrappers' parts from a parameter name."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def run(kind: str, impl: str, rank: int, importance: str = "sensitivity") -> dict[str, Any]:
    """Train an adapter for four epochs of three steps, with different data on every rank."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), Block(), nn.Linear(12, 3))
    config = SnellaConfig(
        r=4,
        init_weights=False,
        scaling=0.1,
        target_modules=["0", "attn", "fc"],
        modules_to_save=["3"],
        impl=impl,
        importance=importance,
    )
    adapted = get_peft_model(base, config)
    model = wrap(kind, adapted)
    optimizer = create_snella_optimizer(model, lr=1e-2)
    allocator = BudgetAllocator(model, total_epochs=4, steps_per_epoch=3).attach(optimizer)
    torch.manual_seed(100 + rank)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(6, 5, 10)).square().sum().backward()
        optimizer.step()
    model.eval()
    torch.manual_seed(7)
    x = torch.randn(2, 5, 10)
    without_gradients = torch.no_grad()(model)(x)
    parameters = {strip_wrappers(name): p for name, p in full_parameters(model).items()}
    # the same adapter on one device, as a reference
    torch.manual_seed(0)
    on_one_device = get_peft_model(
        nn.Sequential(nn.Linear(10, 12), nn.Tanh(), Block(), nn.Linear(12, 3)), config
    ).eval()
    missing = on_one_device.load_state_dict(parameters, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    matrices = adapted_matrices(on_one_device)
    for matrix in matrices:
        if matrix.group == 0:
            actual = [allocator.budgets[m.name] for m in matrices if m.layer is matrix.layer]
            matrix.layer.set_budget("default", actual)
    expected = torch.no_grad()(on_one_device)(x)
    return {
        "history": allocator.history,
        "nonzeros": {matrix.name: matrix.nonzeros() for matrix in matrices},
        "digest": {name: p.double().abs().sum().item() for name, p in sorted(parameters.items())},
        "evaluation_error": float((without_gradients - expected).abs().max() / expected.abs().max()),
    }


def main(rank: int, meeting_point: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    results = {}
    for case in cases:
        try:
            if case == "pieces":  # a full copy in each of two groups, as with HYBRID_SHARD
                _find_shard_starts([torch.zeros(3)], [3])
            kind, impl, *importance = case.split("-")
            results[case] = run(kind, impl, rank, *importance)
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can deadlock if both ranks shut down concurrently


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
