"""One process of a distributed run; prints the results of each kind of parallelism. Started by `test_distributed`."""

from __future__ import annotations

import copy
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
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
    """Return the unsharded trained parameters of a wrapped model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def strip_wrappers(name: str) -> str:
    """Remove wrapper prefixes from a parameter name."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def prepare(
    kind: str, impl: str, importance: str = "sensitivity"
) -> tuple[nn.Module, torch.optim.Optimizer, BudgetAllocator, SnellaConfig]:
    """Return a wrapped model, its optimizer with an attached allocator, the allocator, and the adapter's config."""
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
    optimizer = create_snella_optimizer(model, lr=1e-2, weight_decay=0.1)
    return model, optimizer, BudgetAllocator(model, total_epochs=4, steps_per_epoch=3).attach(optimizer), config


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, first: int = 0, end: int = 12) -> None:
    """Train for some of the twelve steps, with different data on every rank."""
    model.train()
    for step in range(first, end):
        torch.manual_seed(100 * rank + step)
        optimizer.zero_grad()
        model(torch.randn(6, 5, 10)).square().sum().backward()
        optimizer.step()


def run(kind: str, impl: str, rank: int, importance: str = "sensitivity") -> dict[str, Any]:
    """Train an adapter for four epochs of three steps."""
    model, optimizer, allocator, config = prepare(kind, impl, importance)
    train(model, optimizer, rank)
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
        "groups": {group["name"]: len(group["params"]) for group in optimizer.param_groups},
    }


def resume(kind: str, rank: int) -> list[dict[str, Any]]:
    """Return the results of an uninterrupted run, and of a run that loads its state after six steps."""
    options = StateDictOptions(full_state_dict=True)
    model, optimizer, allocator, _ = prepare(kind, "eager")
    train(model, optimizer, rank, end=6)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    train(model, optimizer, rank, first=6)
    resumed, resumed_optimizer, resumed_allocator, _ = prepare(kind, "eager")
    set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    train(resumed, resumed_optimizer, rank, first=6)
    return [
        {"history": part.history, "digest": {n: p.double().sum().item() for n, p in full_parameters(wrapped).items()}}
        for part, wrapped in ((allocator, model), (resumed_allocator, resumed))
    ]


def main(rank: int, rendezvous: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for case in cases:
        try:
            if case == "pieces":  # a full copy in each of two groups, as with HYBRID_SHARD
                _find_shard_starts([torch.zeros(3)], [3])
            kind, impl, *importance = case.split("-")
            results[case] = resume(kind, rank) if impl == "resume" else run(kind, impl, rank, *importance)
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can deadlock if both ranks shut down concurrently


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
