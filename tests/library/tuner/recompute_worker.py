"""One process that compares the gradients of sharded models with those of whole ones. Started by `test_distributed`."""

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
    """A layer and the normalization of its output."""


# the modules that are a unit of their own, which is gathered and freed apart from the others
UNITS = {"whole": (), "norms": (nn.LayerNorm,), "layers": (SnellaLayer,), "blocks": (Block,)}


def make(compress: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(nn.Linear(n, m), nn.LayerNorm(m)) for n, m in ((6, 64), (64, 8))]
    settings = dict(init_weights=False, scaling=0.1, compress_activations=compress)
    config = SnellaConfig(r=4, target_modules="(0[.]0|1[.]0|2)", **settings)
    base = nn.Sequential(*blocks, nn.Linear(8, 4))
    return get_peft_model(base, config).train()


def wrap(kind: str, model: nn.Module, units: tuple[type[nn.Module], ...]) -> nn.Module:
    """The model, sharded in that way."""
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
    """The gradients of two batches, those of a sharded model gathered."""
    for x in torch.linspace(-1, 1, 60).view(2, 5, 6):
        model(x).square().sum().backward()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {plain(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def plain(name: str) -> str:
    """A parameter's name without what the wrapper puts into it."""
    return name.replace("_fsdp_wrapped_module.", "")


def compare(kind: str, units: str, compress: bool) -> float:
    """The largest difference to the gradients of the whole model, as a part of the largest gradient of a tensor."""
    expected = gradients(make(compress))
    found = gradients(wrap(kind, make(compress), UNITS[units]))
    if found.keys() != expected.keys():
        raise AssertionError(f"gradients of {sorted(found)}, expected {sorted(expected)}")
    return max(float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in expected.items())


def main(rank: int, meeting_point: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    results: dict[str, float | str] = {}
    for case in cases:
        kind, units, form = case.split("-")
        try:
            results[case] = compare(kind, units, form == "compressed")
        except Exception as error:
            results[case] = f"{type(error).__name__}: {error}"
    print(json.dumps(results), flush=True)
    dist.barrier()
    os._exit(0)  # two ranks that take gloo's threads down at once wait for each other now and then


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
