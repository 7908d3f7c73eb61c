"""Sharding of frozen weights across processes with FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snella.layer import SnellaLayer
from snella_app.methods import spec_of
from snella_app.methods.model_parts import base_model, find_blocks
from snella_app.training.distributed import process_count

_GATHERED_BLOCKS = 2
"""Number of blocks with gathered weights at a time: the running block and the prefetched one."""


def shard_frozen(model: nn.Module) -> None:
    """Shard every frozen weight across processes; trainable parameters stay replicated.

    A block's weights are gathered for its forward and backward pass and freed after each. Weights outside the blocks
    are gathered for the whole pass of the model. All processes must run the same passes and call `average_gradients`
    after the last backward pass of a step.

    Args:
        model: Model from `build_method`, on its device, identical in all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (process_count(),))
    in_order = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _broadcast([parameter.detach() for parameter in in_order])
    trained = set(in_order)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=trained)
        block.register_forward_hook(_drop_effective_weights)
    # reshard after the forward pass in all processes; otherwise reading the model's state would reshard only one
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_frozen` was applied to a model."""
    if process_count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def average_gradients(model: nn.Module) -> None:
    """Average gradients over all processes and broadcast the main process's batch norm statistics."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for flat, parts in _flattened(gradients):
        dist.all_reduce(flat)
        flat /= process_count()
        for gradient, part in zip(parts, flat.split([gradient.numel() for gradient in parts]), strict=True):
            gradient.copy_(part.view_as(gradient))
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    _broadcast([buffer for layer in layers for buffer in layer.buffers()])


def sharding_savings(model: nn.Module, count: int) -> int:
    """Predict the bytes that each of `count` processes saves by sharding the frozen weights of an unsharded model."""
    if count == 1:
        return 0
    blocks = [_frozen_bytes(block) for block in _blocks(model)]
    total = _frozen_bytes(model)
    outside = total - sum(blocks)
    gathered = outside + min(_GATHERED_BLOCKS * max(blocks, default=0), sum(blocks))
    return max(total - total // count - gathered, 0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the backbone's repeated blocks in forward order."""
    return [block for _, block in find_blocks(base_model(model), spec_of(model).head)]


def _drop_effective_weights(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook: free cached effective weights, which evaluation would otherwise keep unsharded."""
    if not module.training:
        for layer in module.modules():
            if isinstance(layer, SnellaLayer):
                layer.clear_cache()


def _frozen_bytes(module: nn.Module) -> int:
    """Return the bytes of the frozen parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def _broadcast(tensors: list[Tensor]) -> None:
    """Broadcast tensors from the main process."""
    for flat, parts in _flattened(tensors):
        dist.broadcast(flat, src=0)
        for tensor, part in zip(parts, flat.split([tensor.numel() for tensor in parts]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _flattened(tensors: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Flatten tensors into one vector per dtype; return each vector with its tensors."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return [(torch.cat([tensor.flatten() for tensor in parts]), parts) for parts in by_dtype.values()]
