"""One process that compares the gradients of sharded and unsharded models. Started by `test_distributed`."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor

from snella import SnellaConfig
from snella.layer import SnellaLayer


class Block(nn.Sequential):
    """Linear layer followed by a normalization."""


# modules that FSDP wraps as separate units, gathered and freed independently
UNITS = {"root": (), "norms": (nn.LayerNorm,), "layers": (SnellaLayer,), "blocks": (Block,)}


def make(compress: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(nn.Linear(n, m), nn.LayerNorm(m)) for n, m in ((6, 64), (64, 8))]
    settings = dict(init_weights=False, scaling=0.1, compress_activations=compress)
    config = SnellaConfig(r=4, target_modules="(0[.]0|1[.]0|2)", **settings)
    base = nn.Sequential(*blocks, nn.Linear(8, 4))
    return get_peft_model(base, config).train()


def wrap(kind: str, model: nn.Module, units: tuple[type[nn.Module], ...]) -> nn.Module:
    """Shard a model."""
    if kind == "FSDP2":
        for module in model.modules():
            if isinstance(module, units):
                fully_shard(module)
        return fully_shard(model)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: isinstance(module, units)),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[kind],
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of two batches, gathered if sharded."""
    for x in torch.linspace(-1, 1, 60).view(2, 5, 6):
        model(x).square().sum().backward()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {strip_wrapper(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def strip_wrapper(name: str) -> str:
    """Remove wrapper prefixes from a parameter name."""
    return name.replace("_fsdp_wrapped_module.", "")


def compare(kind: str, units: str, compress: bool) -> float:
    """Return the largest difference from the unsharded gradients, relative to the tensor's largest gradient."""
    expected = gradients(make(compress))
    actual = gradients(wrap(kind, make(compress), UNITS[units]))
    if actual.keys() != expected.keys():
        raise AssertionError(f"gradients of {sorted(actual)}, expected {sorted(expected)}")
    return max(float((actual[name] - grad).abs().max() / grad.abs().max()) for name, grad in expected.items())


def main(rank: int, rendezvous: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results: dict[str, float | str] = {}
    for case in cases:
        kind, units, variant = case.split("-")
        try:
            results[case] = compare(kind, units, variant == "compressed")
        except Exception as error:
            results[case] = f"{type(error).__name__}: {error}"
    print(json.dumps(results), flush=True)
    dist.barrier()
    os._exit(0)  # gloo can deadlock if both ranks shut down concurrently


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
